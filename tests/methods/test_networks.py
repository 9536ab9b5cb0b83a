"""Test networks built from settings, from config files, and from the recipes."""

import json

import pytest
import torch

from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.networks import attention, build_pipeline, build_unet
from tests.support.models import make_unet
from tests.support.runs import TRAINING


def test_network_matches_its_settings():
    config = CFGConfig(resolution=16, block_out_channels=[16, 32, 64], layers_per_block=1, attention_resolutions=[8])
    unet = build_unet(config, None, channels=3, num_classes=7)
    assert unet.num_classes == 7
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.out_channels) == (16, 3, 3)
    assert unet.config.down_block_types == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]
    assert unet.config.up_block_types == ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    assert unet.config.norm_num_groups == 4
    again = build_unet(config, None, channels=3, num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("channels", [[8, 16], [48, 96], [128, 256]])
def test_attention_heads_divide_the_channels(channels):
    config = CFGConfig(resolution=8, block_out_channels=channels, layers_per_block=1, attention_resolutions=[8, 4])
    unet = build_unet(config, None, channels=1, num_classes=2)
    attentions = [
        unet.get_submodule(f"{block}.attentions.0") for block in ("down_blocks.0", "down_blocks.1", "mid_block")
    ]
    assert [attention.heads * unet.config.attention_head_dim for attention in attentions] == [*channels, channels[1]]
    assert unet.config.attention_head_dim <= 64
    assert unet(torch.zeros(1, 1, 8, 8), 0, class_labels=torch.zeros(1).long()).sample.shape == (1, 1, 8, 8)


def test_network_from_a_config_file(tmp_path):
    path = tmp_path / "config.json"
    settings = {
        "block_out_channels": [8, 8], "norm_num_groups": 4, "in_channels": 7,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    unet = build_unet(CFGConfig(model_config_name_or_path=str(path), resolution=8), None, 1, 2)
    assert (unet.config.block_out_channels, unet.config.in_channels, unet.num_classes) == ([8, 8], 1, 2)
    with pytest.raises(UserError, match="9×9 cannot be halved 1 times"):
        build_unet(CFGConfig(model_config_name_or_path=str(path), resolution=9), None, 1, 2)
    with pytest.raises(UserError, match="nowhere"):
        build_unet(CFGConfig(model_config_name_or_path=str(tmp_path / "nowhere")), None, 1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "cannot be read"),
        ("{", "cannot be read"),
        (
            '{"block_out_channels": [6, 6], "norm_num_groups": 4}',
            "build a network with the settings .*norm_num_groups.*: ",
        ),
    ],
)
def test_invalid_config_file_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        build_unet(CFGConfig(model_config_name_or_path=str(tmp_path / "config.json"), resolution=8), None, 1, 2)


@pytest.mark.parametrize("settings", [{"latent_dim": 6}, {"latent_dim": 0}, {"max_guidance_scale": 4.0}])
@pytest.mark.parametrize("latent_dim", [None, 3])
def test_config_of_another_kind_of_network_gives_its_layers_only(tmp_path, settings, latent_dim):
    """Whether a network takes a latent vector or w is a matter of the method."""
    make_unet(**settings, resnet_time_scale_shift="scale_shift", fourier_frequencies=[1.0]).save_config(tmp_path)
    config = CFGConfig(model_config_name_or_path=str(tmp_path), resolution=8)
    unet = build_unet(config, None, 1, num_classes=2, latent_dim=latent_dim)
    assert (unet.latent_dim, unet.max_guidance_scale, unet.num_classes) == (latent_dim, None, 2)
    assert (unet.config.resnet_time_scale_shift, unet.config.fourier_frequencies) == ("scale_shift", [1.0])
    assert "max_guidance_scale" not in unet.config
    assert ("latent_dim" in unet.config) == (latent_dim is not None)


def recipe(name: str) -> CFGConfig:
    return parse_config(CFGConfig, ["--config", str(TRAINING / "configs" / f"{name}.yaml")])


# The counts come from ADM's code (github.com/openai/guided-diffusion) with the flags in its README for each of the two,
# and `--learn_sigma False`: the same layers, 1000 classes. With the learned variance, ADM publishes 296 M and 422 M.
@pytest.mark.parametrize(
    ("name", "adm", "published", "heads", "dropout"),
    [("imagenet64", 295_899_267, 296, [6, 9, 12], 0.1), ("imagenet128", 421_522_691, 422, [4, 6, 8], 0.0)],
)
def test_networks_of_the_recipes_match_adm(name, adm, published, heads, dropout):
    with torch.device("meta"):
        unet = build_unet(recipe(name), None, channels=3, num_classes=1000)
    null_row = unet.get_parameter("class_embedding.weight")[-1].numel()
    assert unet.num_parameters() == adm + null_row
    assert round(unet.num_parameters() / 1e6) == published
    attentions = [block.get_submodule("attentions.0") for block in unet.down_blocks if hasattr(block, "attentions")]
    assert [attention.heads for attention in attentions] == heads
    assert {block.get_submodule("resnets.0").dropout.p for block in unet.down_blocks} == {dropout}


@pytest.mark.parametrize(("resolution", "v"), [(64, 0.3), (128, 0.2)])
def test_sampling_variance_matches_the_paper(resolution, v):
    config = CFGConfig(resolution=resolution, block_out_channels=[8], attention_resolutions=[0])
    assert noise_process(build_pipeline(config, Digits())).config.variance_interpolation == v


@pytest.mark.slow
def test_every_parameter_of_a_recipe_network_gets_a_gradient():
    unet = build_unet(recipe("imagenet64"), None, channels=3, num_classes=1000).train()
    pred = unet(torch.randn(1, 3, 64, 64), torch.tensor([500.0]), class_labels=torch.tensor([3])).sample
    pred.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters()}
    assert [
        name for name, grad in gradients.items() if grad is None or not grad.isfinite().all() or not grad.any()
    ] == []


@pytest.mark.parametrize(
    ("resolutions", "attended"),
    [([0], []), ([8], [8]), ([4], [4]), ([8, 4], [8, 4]), ([0, 4], [4]), ([16, 8], [8])],
)
def test_attention_is_at_the_given_resolutions(resolutions, attended):
    blocks = attention(resolutions, 8, [8, 16])["down_block_types"]
    assert blocks == ["AttnDownBlock2D" if size in attended else "DownBlock2D" for size in (8, 4)]


@pytest.mark.parametrize("resolutions", [[1000], [7], [8, 7], [16], [8, 16], [2]])
def test_attention_at_a_resolution_without_a_level_raises(resolutions):
    with pytest.raises(
        UserError, match=r"the levels of the network have 8, 4 pixels, not .*. Use those, or 0 for none"
    ):
        attention(resolutions, 8, [8, 16])


def test_default_without_any_attention_is_reported(caplog):
    attention([16, 8], 4, [8, 16])
    assert "The network has no attention: the levels of the network have 4, 2 pixels" in caplog.text
