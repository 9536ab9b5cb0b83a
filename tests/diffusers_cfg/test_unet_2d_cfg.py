"""Test `UNet2DCFGModel` against `UNet2DModel`: outputs, labels, settings and the guidance input."""

import inspect

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.utils import logging as diffusers_logging

from diffusers_cfg import UNet2DCFGModel
from tests.support.models import make_unet

Z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor(500.0)


def test_null_class_is_the_last_row(unet):
    assert unet.num_classes == 3
    assert unet.null_class_label == 3
    assert unet.class_embedding.num_embeddings == 4


def test_none_and_minus_one_are_the_null_class(unet):
    null = unet(Z, T, class_labels=torch.tensor([3, 3])).sample
    assert torch.equal(unet(Z, T).sample, null)
    mixed = unet(Z, T, class_labels=torch.tensor([1, -1])).sample
    assert torch.equal(mixed[1], null[1])
    assert not torch.allclose(mixed[0], null[0])


def test_labels_are_not_modified(unet):
    labels = torch.tensor([1, -1])
    unet(Z, T, class_labels=labels)
    assert labels.tolist() == [1, -1]


def test_weights_mix_the_rows_of_the_class_embedding(unet):
    """A weight of one is the label itself. A mix equals a class whose row is the weighted mean of two rows."""
    one_hot = torch.eye(4)[[1, 3]]
    assert torch.equal(unet(Z, T, class_labels=one_hot).sample, unet(Z, T, class_labels=torch.tensor([1, -1])).sample)
    mixed = unet(Z, T, class_labels=torch.tensor([[0.25, 0.75, 0, 0]] * 2)).sample
    rows = unet.class_embedding.weight.data
    rows[2] = 0.25 * rows[0] + 0.75 * rows[1]
    torch.testing.assert_close(mixed, unet(Z, T, class_labels=torch.tensor([2, 2])).sample)
    assert not torch.allclose(mixed, unet(Z, T, class_labels=torch.tensor([1, 1])).sample)


SKIP_BLOCKS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "block_out_channels": (32, 64),  # these blocks ignore `norm_num_groups`
    "norm_num_groups": 32,
    "time_embedding_type": "fourier",
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"center_input_sample": True},
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
        {"mid_block_type": None},
        {"resnet_time_scale_shift": "scale_shift", "dropout": 0.5},
        SKIP_BLOCKS,
    ],
)
def test_matches_unet2dmodel_bit_for_bit(settings):
    """Compare outputs and gradients with the same weights in memory, in evaluation and training mode."""
    unet = make_unet(**settings)
    stock = UNet2DModel.from_config(unet.config)
    assert isinstance(stock, UNet2DModel)
    stock.load_state_dict(unet.state_dict(), assign=True)
    labels, z = torch.tensor([0, 3]), torch.randn(2, unet.config.in_channels, 8, 8)
    t = torch.tensor([3, 700]) if unet.config.time_embedding_type == "learned" else T
    for train in (False, True):
        outputs = []
        for network in (stock, unet):
            network.train(train).requires_grad_(True).zero_grad()
            torch.manual_seed(2)
            outputs.append(network(z, t, class_labels=labels).sample)
            outputs[-1].square().mean().backward()
        assert torch.equal(*outputs)
        for name, parameter in stock.named_parameters():
            expected, actual = parameter.grad, unet.get_parameter(name).grad
            assert expected is not None, name
            assert actual is not None, name
            assert torch.equal(actual, expected), name
    with torch.no_grad():
        cut = [network.eval()(z, 5.7, class_labels=labels, return_dict=False)[0] for network in (stock, unet)]
    assert torch.equal(*cut)


def test_constructor_adds_only_max_guidance_scale():
    stock = list(inspect.signature(UNet2DModel.__init__).parameters.values())
    *shared, added = inspect.signature(UNet2DCFGModel.__init__).parameters.values()
    assert [(parameter.name, parameter.default) for parameter in shared] == [
        (parameter.name, parameter.default) for parameter in stock
    ]
    assert (added.name, added.default) == ("max_guidance_scale", None)


def test_every_setting_is_saved_and_loaded(tmp_path):
    settings = {"sample_size": (8, 16), "center_input_sample": True, "dropout": 0.25, "attention_head_dim": 4}
    unet = make_unet(**settings)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DCFGModel.from_pretrained(tmp_path)
    stored = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    assert {name: tuple(v) if isinstance(v := loaded.config[name], list) else v for name in stored} == stored
    assert loaded.state_dict().keys() == unet.state_dict().keys()
    for name, value in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_unet2dmodel_loads_it_without_a_warning(unet, tmp_path, caplog):
    diffusers_logging.enable_propagation()
    unet.save_pretrained(tmp_path)
    stock, loaded = UNet2DModel.from_pretrained(tmp_path), UNet2DCFGModel.from_pretrained(tmp_path)
    UNet2DModel.from_config(unet.config)
    assert caplog.text == ""
    labels = torch.tensor([0, 2])
    torch.testing.assert_close(stock(Z, T, class_labels=labels).sample, unet(Z, T, class_labels=labels).sample)
    torch.testing.assert_close(loaded(Z, T).sample, unet(Z, T).sample)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), r"\[4\] are out of range.*0 … 2"),
        (torch.tensor([-2, 0]), r"\[-2\] are out of range"),
        (torch.tensor([0.0, 1.0]), r"must be integers.*float32"),
        (torch.tensor([True, False]), r"must be integers.*bool"),
        (torch.tensor([1]), r"shape \(2,\).*\(1,\)"),
        (torch.tensor([[0, 1]]), r"shape \(2,\).*\(1, 2\)"),
        (torch.tensor(1), r"shape \(2,\).*\(\)"),
        (torch.full((2, 3), 1 / 3), r"weights of shape \(2, 4\).*\(2, 3\)"),
        (torch.full((2, 4), 0.5), r"add up to one, but are \[0.5, 0.5, 0.5, 0.5\]"),
        (torch.tensor([[2.0, -1.0, 0.0, 0.0]] * 2), r"at least 0.*-1.0"),
        (torch.full((2, 4), torch.nan), "nan"),
    ],
)
def test_invalid_labels_are_refused(unet, labels, message):
    with pytest.raises(ValueError, match=message):
        unet(Z, T, class_labels=labels)


def test_label_values_are_not_read_from_the_device(unet):
    """Reading a value on the meta device raises; on a GPU it would synchronize."""
    unet, labels = unet.to("meta"), torch.tensor([0, 99], device="meta")
    assert unet(Z.to("meta"), T.to("meta"), class_labels=labels).sample.shape == Z.shape
    with pytest.raises(ValueError, match="float32"):
        unet(Z.to("meta"), T.to("meta"), class_labels=labels.float())


@pytest.mark.parametrize("settings", [{"num_class_embeds": None}, {"num_class_embeds": 1}])
def test_config_without_a_null_class_is_refused(settings):
    with pytest.raises(ValueError, match=f"num_class_embeds={settings['num_class_embeds']}"):
        _ = make_unet(**settings).null_class_label


def test_bfloat16(unet):
    labels = torch.tensor([0, -1])
    exact = unet(Z, T, class_labels=labels).sample
    rough = unet.to(torch.bfloat16)(Z.bfloat16(), T, class_labels=labels).sample
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(Z, T, class_labels=torch.tensor([0, -1])).sample.square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_compiles_to_one_graph_without_recompilation(unet):
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([0, -1])
    torch.testing.assert_close(compiled(Z, T, class_labels=labels).sample, unet(Z, T, class_labels=labels).sample)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(Z, torch.tensor(3.5), class_labels=torch.tensor([2, 1]))
    mixed = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]])
    torch.testing.assert_close(compiled(Z, T, class_labels=mixed).sample, unet(Z, T, class_labels=mixed).sample)

    compiled = torch.compile(with_guidance_input(unet), fullgraph=True, backend="aot_eager")
    compiled(Z, T, class_labels=labels, guidance_scale=torch.zeros(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(Z, torch.tensor(3.5), class_labels=torch.tensor([2, 1]), guidance_scale=torch.tensor([1.0, 4.0]))


def with_guidance_input(unet) -> UNet2DCFGModel:
    student = UNet2DCFGModel.from_config(unet.config, max_guidance_scale=4.0).eval()
    student.load_state_dict(unet.state_dict(), strict=False)
    return student


def test_w_is_an_input_only_if_configured(unet, tmp_path):
    assert "max_guidance_scale" not in unet.config
    assert unet.max_guidance_scale is None
    assert not [name for name in unet.state_dict() if "guidance" in name]
    with pytest.raises(ValueError, match="does not take guidance_scale"):
        unet(Z, T, guidance_scale=torch.ones(2))
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=f"max_guidance_scale must be a positive number, but is {wrong}"):
            UNet2DCFGModel.from_config(unet.config, max_guidance_scale=wrong)


def test_student_starts_as_its_teacher_and_can_depend_on_w(unet, tmp_path):
    student, labels, w = with_guidance_input(unet), torch.tensor([0, -1]), torch.tensor([0.5, 4.0])
    assert torch.equal(student(Z, T, labels, guidance_scale=w).sample, unet(Z, T, labels).sample)
    torch.manual_seed(0)
    assert student.guidance_embedding is not None
    torch.nn.init.normal_(student.guidance_embedding.linear_2.weight)
    guided = student(Z, T, labels, guidance_scale=w).sample
    assert not torch.allclose(guided, unet(Z, T, labels).sample, atol=1e-3)
    torch.testing.assert_close(guided[:1], student(Z[:1], T, labels[:1], guidance_scale=w[:1]).sample)
    assert torch.equal(student(Z, T, labels).sample, student(Z, T, labels, guidance_scale=torch.zeros(2)).sample)
    weights = torch.eye(4)[labels]
    torch.testing.assert_close(student(Z, T, weights, guidance_scale=w).sample, guided)

    student.save_pretrained(tmp_path)
    again = UNet2DCFGModel.from_pretrained(tmp_path)
    assert again.max_guidance_scale == 4.0
    torch.testing.assert_close(again(Z, T, labels, guidance_scale=w).sample, guided)


def test_dtype_is_the_compute_dtype(unet):
    assert unet.dtype == torch.float32
    assert unet.to(torch.bfloat16).dtype == torch.bfloat16
    labels = torch.tensor([0, -1])
    exact = unet(Z.bfloat16(), T, class_labels=labels).sample
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert (unet.conv_in.weight.dtype, unet.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    for given in (labels, torch.eye(4)[labels]):  # ids, and weights that mix rows stored in 8 bits
        rough = unet(Z.bfloat16(), T, class_labels=given).sample
        assert rough.dtype == torch.bfloat16
        assert (rough - exact).abs().max() < 0.5 * exact.abs().max()
