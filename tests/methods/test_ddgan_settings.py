"""Test which settings train_ddgan.py accepts, and what it refuses before anything is written."""

import json

import pytest
from accelerate.state import AcceleratorState

from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.accelerator import make_accelerator
from diffusers_cfg.engine.log import Diverged
from diffusers_cfg.method_settings import DDGANConfig
from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN, build_pipeline
from tests.support.images import save_images
from tests.support.latents import vae_flags
from tests.support.runs import SMALLEST, reset_accelerate, train_ddgan


def parse(*argv: str) -> DDGANConfig:
    return parse_config(DDGANConfig, list(argv))


def test_defaults_are_those_of_the_paper():
    config = parse("--dataset_name", "me/cats")
    assert (config.num_timesteps, config.latent_dim, config.r1_gamma, config.lazy_reg) == (4, 100, 0.02, 15)
    assert (config.learning_rate, config.learning_rate_discriminator) == (1.6e-4, 1.25e-4)
    assert (config.adam_beta1, config.adam_beta2, config.adam_weight_decay) == (0.5, 0.9, 0)
    assert (config.loss, config.conditioning_dropout_prob, config.output_dir) == ("non_saturating", 0.1, "ddgan-model")
    digits = parse()
    assert (digits.resolution, digits.block_out_channels) == (8, [32, 64])
    assert digits.learning_rate_discriminator > digits.learning_rate


VAE = "the generator's output is in \\[-1, 1\\], which latents exceed. Leave it out, or use train_cfg.py"
REFUSED = [
    (["--mixed_precision", "fp16"], "--mixed_precision fp16 is not supported: .* Use bf16 or no"),
    (["--pretrained_vae_model_name_or_path", "vae"], f"--pretrained_vae_model_name_or_path: {VAE}"),
    (
        ["--pretrained_model_name_or_path", "me/gan"],
        "me/gan: a generator cannot be trained further without its discriminator, .* --resume_from_checkpoint",
    ),
    (["--train_batch_size", "6"], "--train_batch_size must be a multiple of 4, .* but is 6"),
    (["--train_batch_size", "2"], "--train_batch_size must be a multiple of 4, .* but is 2"),
    (["--r1_gamma", "0", "--lazy_reg", "3"], "lazy_reg: no effect with --r1_gamma 0. Leave one of them out"),
    (["--num_timesteps", "0"], r"num_timesteps must lie in \[1, 8\], but is 0"),
    (["--num_timesteps", "9"], r"num_timesteps must lie in \[1, 8\], but is 9"),
    (["--latent_dim", "-1"], r"latent_dim must lie in \[0, 65536\], but is -1"),
    (["--r1_gamma", "-0.1"], "r1_gamma .* but is -0.1"),
    (["--r1_gamma", "nan"], "r1_gamma .* but is nan"),
    (["--lazy_reg", "0"], "lazy_reg .* but is 0"),
    (["--discriminator_channels", "0"], r"discriminator_channels .* but is \[0\]"),
    (["--learning_rate_discriminator", "0"], "learning_rate_discriminator must be a positive number, but is 0"),
    (["--max_grad_norm_discriminator", "0"], "max_grad_norm_discriminator must be a positive number, but is 0"),
    (["--conditioning_dropout_prob", "1"], "conditioning_dropout_prob .* but is 1"),
    (
        ["--model_config_name_or_path", "config.json", "--layers_per_block", "1"],
        "layers_per_block: the network comes from --model_config_name_or_path config.json",
    ),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_settings_that_cannot_work_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    "flag", ["--num_inference_steps", "--validation_guidance_scales", "--prediction_type", "--log_snr_min"]
)
def test_settings_of_diffusion_models_do_not_exist(flag, capsys):
    with pytest.raises(SystemExit):
        parse(flag, "2")
    assert f"unrecognized arguments: {flag} 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--mixed_precision", "bf16"],
        ["--loss", "relativistic", "--lazy_reg", "1"],
        ["--r1_gamma", "0"],
        ["--num_timesteps", "1"],
        ["--num_timesteps", "8", "--latent_dim", "0"],
        ["--model_config_name_or_path", "config.json", "--latent_dim", "8"],
    ],
    ids=" ".join,
)
def test_related_settings_are_accepted(argv):
    parse(*argv)


def test_saved_settings_repeat_the_run(tmp_path):
    """The file of a run names all settings, also those that have no effect in it."""
    config = parse("--r1_gamma", "0", "--num_timesteps", "2")
    config.save(tmp_path / "train_config.yaml")
    assert parse("--config", str(tmp_path / "train_config.yaml")) == config


def test_fp16_of_the_launcher_is_refused(monkeypatch):
    """A CPU always uses fp32, so the state of a GPU is pretended."""
    reset_accelerate()
    make_accelerator(config := parse(*SMALLEST, "--report_to", "none"))
    DenoisingDiffusionGAN.build(config, Digits())
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "bf16")
    DenoisingDiffusionGAN.build(config, Digits())
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
    with pytest.raises(UserError, match="--mixed_precision fp16 is not supported"):
        DenoisingDiffusionGAN.build(config, Digits())


@pytest.mark.parametrize("flags", ["vae", "batch"])
def test_nothing_is_written(tmp_path, flags):
    argv = vae_flags(tmp_path / "vae") if flags == "vae" else ["--train_batch_size", "10"]
    with pytest.raises(UserError):
        train_ddgan(tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_network_config(tmp_path):
    """A config decides everything but the latent vector; that of a generator without one gets one."""
    settings = {
        "block_out_channels": [8, 8], "norm_num_groups": 2, "layers_per_block": 2, "latent_dim": 0, "dropout": 0.5,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    }  # fmt: skip
    (tmp_path / "network.json").write_text(json.dumps(settings))
    flags = ["--model_config_name_or_path", str(tmp_path / "network.json")]
    unet = build_pipeline(parse(*flags, "--latent_dim", "5"), Digits()).unet
    assert (unet.latent_dim, unet.config.layers_per_block, unet.config.norm_num_groups) == (5, 2, 2)
    assert unet.config.resnet_time_scale_shift == "default"
    assert (unet.config.in_channels, unet.num_classes) == (1, 10)

    (tmp_path / "network.json").write_text(json.dumps({**settings, "time_embedding_type": "fourier"}))
    with pytest.raises(UserError, match=r"Failed to build a network .* A generator cannot have .*'fourier'"):
        build_pipeline(parse(*flags), Digits())


def test_discriminator_that_does_not_fit_in_memory_is_refused():
    config = parse(*SMALLEST, "--discriminator_channels", "8", str(10**15))
    reset_accelerate()
    make_accelerator(config)
    with pytest.raises(UserError, match=r"a network with --discriminator_channels \[8, 10{15}\]"):
        DenoisingDiffusionGAN.build(config, Digits())


def test_fewer_images_than_the_discriminator_compares_are_refused(tmp_path):
    data = save_images(tmp_path / "data", ["a", "b", "c"], n=1)
    message = "The dataset has 3 images, but the discriminator compares 4 at a time. Add images"
    with pytest.raises(UserError, match=message):
        train_ddgan(tmp_path / "run", "--train_data_dir", data, "--resolution", "8")
    assert not (tmp_path / "run").exists()


def test_diverged_run_names_the_learning_rates_of_both_networks(tmp_path):
    flags = ["--learning_rate_discriminator", "1e30", "--max_train_steps", "8", "--max_nonfinite_steps", "2"]
    message = r"--learning_rate .now 0.001. or --learning_rate_discriminator .now 1e\+30. and"
    with pytest.raises(Diverged, match=message):
        train_ddgan(tmp_path, *flags)
