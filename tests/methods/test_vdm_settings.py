"""Test that train_vdm.py refuses settings and data without a likelihood before anything is written."""

from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.accelerator import make_accelerator
from diffusers_cfg.method_settings import VDMConfig
from diffusers_cfg.methods.networks import record_process
from diffusers_cfg.methods.vdm import VariationalDiffusion
from tests.support.latents import vae_flags
from tests.support.models import vdm
from tests.support.runs import reset_accelerate, train, train_vdm


def parse(*argv: str) -> VDMConfig:
    return parse_config(VDMConfig, list(argv))


def test_defaults_are_those_of_the_digits_and_of_the_paper():
    config = parse()
    assert (config.log_snr_min, config.log_snr_max, config.adam_beta2, config.adam_weight_decay) == (
        -5,
        13.3,
        0.99,
        0.01,
    )
    assert (config.block_out_channels, config.train_val_split, config.output_dir) == ([32], 0.15, "vdm-model")
    assert config.fourier_features == [3, 4, 5, 6, 7, 8]
    assert (config.noise_schedule, config.loss_weighting, config.diffusion_steps) == ("learned", "bound", 0)
    assert parse("--dataset_name", "me/cats").block_out_channels == [128, 256, 256, 256]


REFUSED = [
    (
        ["--pretrained_vae_model_name_or_path", "vae"],
        "the likelihood of latents is not that of the images. Leave it out, or use",
    ),
    (["--random_flip"], "--random_flip changes the distribution of the images, so .* Leave it out"),
    (["--log_snr_min", "13.3"], "log_snr_min=13.3 must be below log_snr_max=13.3"),
    (["--log_snr_min", "14"], "log_snr_min=14.0 must be below log_snr_max=13.3"),
    (["--log_snr_min", "12.5"], "log_snr_min=12.5 and log_snr_max=13.3 must be at least 1 apart"),
    (["--log_snr_max", "15.1"], r"log_snr_max must lie in \[-10, 15\], but is 15.1"),
    (["--log_snr_max", "nan"], r"log_snr_max must lie in \[-10, 15\], but is nan"),
    (["--diffusion_steps", "-1"], r"diffusion_steps must lie in \[0, 1000000\], but is -1"),
    (["--schedule_learning_rate", "0"], "schedule_learning_rate must be a positive number, but is 0"),
    (["--fourier_features", "13"], r"fourier_features must lie in \[0, 12\], but is \[13\]"),
    (["--fourier_features", "0", "7"], r"fourier_features: 0 means none, but is \[0, 7\]. Leave 0 out"),
    (["--fourier_features", "7", "7"], r"fourier_features must not repeat a value, but is \[7, 7\]"),
    (
        ["--ema_max_decay", "0.9", "0.99"],
        r"ema_max_decay \[0.9, 0.99\]: each EMA .* own ends .* Pass one value, or --noise_schedule fixed",
    ),
    (
        ["--noise_schedule", "linear", "--loss_weighting", "simple"],
        "--noise_schedule linear learns its ends, which needs the bound, but --loss_weighting is simple. Use",
    ),
    (
        ["--diffusion_steps", "10", "--loss_weighting", "sigmoid"],
        "--loss_weighting sigmoid is defined in continuous time. Leave out --diffusion_steps 10",
    ),
    (
        ["--noise_schedule", "fixed", "--schedule_learning_rate", "1e-3"],
        "schedule_learning_rate: no effect with --noise_schedule fixed. Leave one of them out",
    ),
    (
        ["--pretrained_model_name_or_path", "me/vdm", "--fourier_features", "7"],
        "fourier_features: the network comes from --pretrained_model_name_or_path me/vdm",
    ),
    (
        ["--pretrained_model_name_or_path", "me/vdm", "--log_snr_max", "12"],
        "log_snr_max: the network comes from --pretrained_model_name_or_path me/vdm",
    ),
    (
        ["--model_config_name_or_path", "config.json", "--fourier_features", "7"],
        "fourier_features: the network comes from --model_config_name_or_path config.json",
    ),
    (["--streaming", "--dataset_name", "me/cats", "--train_val_split", "0.1"], "cannot be combined with --streaming"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_settings_without_a_likelihood_or_an_effect_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


ACCEPTED = [
    ["--noise_schedule", "fixed", "--ema_max_decay", "0.9", "0.99"],
    ["--loss_weighting", "simple", "--ema_max_decay", "0.9", "0.99"],
    ["--no_use_ema"],
    ["--noise_schedule", "learned", "--loss_weighting", "sigmoid", "--schedule_learning_rate", "1e-3"],
    ["--noise_schedule", "linear", "--diffusion_steps", "1000000"],
    ["--log_snr_max", "15", "--log_snr_min", "14"],
    ["--fourier_features", "0"],
]


@pytest.mark.parametrize("argv", ACCEPTED, ids=" ".join)
def test_related_settings_are_accepted(argv):
    parse(*argv)


def test_saved_settings_repeat_the_run(tmp_path):
    """The file of a run names all settings, also those that have no effect in it."""
    config = parse("--noise_schedule", "fixed", "--fourier_features", "7", "8")
    config.save(tmp_path / "train_config.yaml")
    assert parse("--config", str(tmp_path / "train_config.yaml")) == config


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_needs_fourier_features(monkeypatch, precision):
    """A CPU always uses fp32, so the state of a GPU is pretended."""
    reset_accelerate()
    make_accelerator(config := parse("--fourier_features", "0", "--report_to", "none"))
    VariationalDiffusion.build(config, Digits())
    monkeypatch.setattr(AcceleratorState, "mixed_precision", precision)
    with pytest.raises(UserError, match=f"--mixed_precision {precision} rounds the images by more than the noise"):
        VariationalDiffusion.build(config, Digits())
    VariationalDiffusion.build(parse("--report_to", "none"), Digits())


def save_images(folder: Path, dtype: str, suffix: str) -> str:
    """Write six images of noise of each of two classes, the last of them with another type of pixels."""
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for i in range(6):
            pixels = (
                np.random.default_rng(i).integers(0, 256, (8, 8)).astype(dtype if (label, i) == ("b", 5) else "uint8")
            )
            Image.fromarray(pixels).save(folder / label / f"{i}{suffix}")
    return str(folder)


@pytest.mark.parametrize(("dtype", "suffix", "mode"), [("uint16", ".png", "I;16"), ("float32", ".tif", "F")])
def test_images_whose_levels_are_not_8_bits_are_refused(tmp_path, dtype, suffix, mode):
    """train_cfg.py converts 16 bits to 8, and leaves out a few unreadable images."""
    folder = save_images(tmp_path / "images", dtype, suffix)
    flags = ["--train_data_dir", folder, "--resolution", "8", "--max_train_steps", "1"]
    with pytest.raises(
        UserError, match=f"5{suffix}. has more than 8 bits per channel .mode {mode}., but the likelihood"
    ):
        train_vdm(tmp_path / "vdm", *flags)
    assert not (tmp_path / "vdm").exists()
    train(tmp_path / "cfg", *flags, "--max_unreadable_fraction", "0.5")


def test_models_of_latents_are_refused(tmp_path):
    train(tmp_path / "latent", *vae_flags(tmp_path / "vae"), "--max_train_steps", "1")
    with pytest.raises(UserError, match="latent models latents, which have no likelihood of images"):
        train_vdm(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "latent"))
    assert not (tmp_path / "out").exists()


def test_processes_that_no_schedule_can_start_from_are_refused(tmp_path):
    pipeline = vdm(ends=(-1.5, -1.0))
    record_process(pipeline.unet, pipeline.scheduler)
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="base has the log-SNR 1 … 1.5, but a schedule needs ends at least 1 apart"):
        train_vdm(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()
