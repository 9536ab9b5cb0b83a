"""Test `UNet2DCFGModel` against `UNet2DModel`: outputs, labels, settings and the guidance input."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

from diffusers_cfg import UNet2DCFGModel
from tests.support.models import make_pipeline, make_unet

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


def test_constructor_adds_only_three_arguments():
    stock = list(inspect.signature(UNet2DModel.__init__).parameters.values())
    *shared, first, second, third = inspect.signature(UNet2DCFGModel.__init__).parameters.values()
    assert [(parameter.name, parameter.default) for parameter in shared] == [
        (parameter.name, parameter.default) for parameter in stock
    ]
    assert [(added.name, added.default) for added in (first, second, third)] == [
        ("max_guidance_scale", None),
        ("fourier_frequencies", None),
        ("latent_dim", None),
    ]


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


@pytest.mark.parametrize("w", [[9.0, 0.0], [-1.0, 0.0], [float("nan"), 0.0], [1.0], 1.0, [[1.0, 1.0]]])
def test_guidance_scale_outside_the_range_is_refused(unet, w):
    student, w = with_guidance_input(unet), torch.tensor(w)
    with pytest.raises(ValueError, match=r"one w per sample, shape \(2,\), in 0 … 4, the range"):
        student(Z, T, guidance_scale=w)
    if w.shape == (2,):  # reading a value on the meta device raises
        student.to(torch.device("meta"))  # pyright: ignore[reportArgumentType]
        student(Z.to("meta"), T.to("meta"), guidance_scale=w.to("meta"))


def test_attention_backend_without_effect_is_refused(unet):
    with pytest.raises(ValueError, match=r"set_attention_backend\('flex'\) would have no effect"):
        unet.set_attention_backend("flex")


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


@pytest.fixture
def folder(unet, tmp_path) -> Path:
    unet.save_pretrained(tmp_path)
    return tmp_path


def rewrite(path: Path, change) -> None:
    """Change the tensors of a safetensors file."""
    save_file(change(load_file(path)), path)


def without(tensors: dict, *names: str) -> dict:
    return {name: value for name, value in tensors.items() if name not in names}


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES = {
    "no class embedding": (lambda x: without(x, "class_embedding.weight"), r"1 missing \(class_embedding.weight\)"),
    "another tensor": (lambda x: {**x, "other": torch.ones(1)}, r"1 unexpected \(other\)"),
    "empty file": (lambda x: {}, r"145 missing \(class_embedding.weight, conv_in.bias, conv_in.weight\)"),
    "renamed": (
        lambda x: {f"module.{name}": value for name, value in x.items()},
        r"145 missing .*145 unexpected \(module.class_embedding.weight, ",
    ),
    "empty tensor": (lambda x: {**x, "conv_in.bias": torch.empty(0)}, r"conv_in.bias.*\[8\].*\[0\]"),
    "another shape": (lambda x: {**x, "conv_out.bias": torch.ones(2)}, r"conv_out.bias.*\[1\].*\[2\]"),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("name", DAMAGES)
def test_incomplete_weights_are_refused(folder, name, low_cpu_mem_usage):
    """diffusers leaves missing tensors on the meta device, or random."""
    change, message = DAMAGES[name]
    rewrite(folder / WEIGHTS, change)
    for path, settings in ((folder, {}), (folder.parent, {"subfolder": folder.name})):
        with pytest.raises(ValueError, match=rf"(?s){folder}.*{message}"):
            UNet2DCFGModel.from_pretrained(path, low_cpu_mem_usage=low_cpu_mem_usage, **settings)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_incomplete_shard_is_refused(unet, tmp_path, low_cpu_mem_usage):
    """The index of the shards names the missing tensor, so that diffusers counts it as loaded."""
    unet.save_pretrained(tmp_path, max_shard_size="20kB")
    loaded = UNet2DCFGModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(loaded(Z, T).sample, unet(Z, T).sample)
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    rewrite(tmp_path / index["class_embedding.weight"], lambda x: without(x, "class_embedding.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(class_embedding.weight\)"):
        UNet2DCFGModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_incomplete_variant_is_refused(unet, tmp_path):
    unet.save_pretrained(tmp_path, variant="fp16")
    assert UNet2DCFGModel.from_pretrained(tmp_path, variant="fp16").num_classes == 3
    rewrite(tmp_path / "diffusion_pytorch_model.fp16.safetensors", lambda x: without(x, "conv_in.bias"))
    with pytest.raises(ValueError, match=r"1 missing \(conv_in.bias\)"):
        UNet2DCFGModel.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("missing", [WEIGHTS, "config.json"])
def test_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")  # a pickle is not loaded instead
    with pytest.raises(OSError, match=missing):
        UNet2DCFGModel.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04."])
def test_damaged_file_is_named(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(OSError, match=str(folder / WEIGHTS)):
        UNet2DCFGModel.from_pretrained(folder)


def test_pickles_are_refused(folder):
    with pytest.raises(ValueError, match="use_safetensors=False is not supported"):
        UNet2DCFGModel.from_pretrained(folder, use_safetensors=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *[(config, "config.json must contain the settings of a UNet2DCFGModel") for config in ([], None, 5)],
        ({"num_class_embeds": "4"}, "num_class_embeds must be .*'4'"),
        ({"num_class_embeds": 10**9}, "num_class_embeds must be .*1000000000"),
        ({"layers_per_block": 10**9}, "layers_per_block must be at most 100, but is 1000000000"),
        ({"max_guidance_scale": 4.0}, r"4 missing \(guidance_embedding"),
        ({"down_block_types": ["Other", "Other"]}, "Other does not exist"),
    ],
)
def test_invalid_config_is_refused(folder, config, message):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **config} if isinstance(config, dict) else config
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        UNet2DCFGModel.from_pretrained(folder)


def test_missing_folder_says_so(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path / 'none'} does not exist"):
        UNet2DCFGModel.from_pretrained(tmp_path / "none")


def test_incomplete_weights_are_refused_by_remote_code(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    rewrite(tmp_path / "unet" / WEIGHTS, lambda x: without(x, "class_embedding.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(class_embedding.weight\)"):
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)


def test_loading_info_and_mismatched_sizes_are_those_of_diffusers(folder):
    loaded: Any = UNet2DCFGModel.from_pretrained(folder, output_loading_info=True)
    assert loaded[1]["missing_keys"] == []
    settings: dict[str, Any] = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    assert UNet2DCFGModel.from_pretrained(folder, num_class_embeds=6, **settings).num_classes == 5
