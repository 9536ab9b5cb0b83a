"""Test the command train_ddgan.py: its flags, its plan, and a run from the command line."""

import re
import subprocess
import sys

import pytest
from PIL import Image

from tests.support.commands import check_refused, help_of, load_command
from tests.support.runs import SHARED, SMALLEST_GAN, TRAINING, launch, printed_code, reset_accelerate

# The flags that recipes rely on, besides those of all training commands
FLAGS = {
    "num_timesteps", "latent_dim", "discriminator_channels", "loss", "r1_gamma", "lazy_reg", "learning_rate",
    "learning_rate_discriminator", "max_grad_norm", "max_grad_norm_discriminator", "conditioning_dropout_prob",
    "adam_beta1", "adam_beta2", "ema_max_decay", "eval_steps", "push_to_hub", "streaming",
}  # fmt: skip
OF_DIFFUSION_MODELS = {
    "num_inference_steps", "validation_guidance_scales", "prediction_type", "log_snr_min", "log_snr_max",
    "noise_schedule", "teacher",
}  # fmt: skip


def test_flags(capsys):
    printed = help_of(TRAINING / "train_ddgan.py", capsys)
    shown = set(re.findall(r"--([a-z][a-z0-9_]*)", printed))
    assert shown >= FLAGS
    assert not shown & OF_DIFFUSION_MODELS
    assert "arXiv 2112.07804" in " ".join(printed.split())


def test_dry_run_prints_the_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    load_command("train_ddgan").main([*SHARED, *SMALLEST_GAN, "--dry_run", "--lazy_reg", "7"])
    plan = capsys.readouterr().out
    for line in (
        r"generator +0\.0 M parameters",
        r"discriminator +0\.0 M parameters",
        r"method .*num_timesteps 4, latent_dim 4, loss non_saturating, r1_gamma 0.05, lazy_reg 7",
        r"steps +4 of 8 images",
        r"output +ddgan-model, from the first step",
    ):
        assert re.search(line, plan), plan
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mixed_precision", "fp16"], "fp16 is not supported"),
        (["--train_batch_size", "5"], "must be a multiple of 4, .* but is 5"),
        (["--pretrained_model_name_or_path", "me/gan"], "cannot be trained further without its discriminator"),
    ],
)
def test_bad_settings_are_refused(argv, message, monkeypatch):
    check_refused(load_command("train_ddgan").main, argv, message, monkeypatch)


@pytest.mark.slow
def test_train_and_sample_from_the_command_line(tmp_path):
    script = TRAINING / "train_ddgan.py"
    result = launch(*SHARED, *SMALLEST_GAN, "--output_dir", "out", cwd=tmp_path, script=script)
    code = printed_code(result.stdout)
    assert "guidance_scale" not in code
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=300, check=True)
    assert Image.open(tmp_path / "zero.png").size == (8, 8)
    again = launch(*SHARED, *SMALLEST_GAN, "--output_dir", "out", cwd=tmp_path, script=script, fails=True)
    assert "train_ddgan.py: error: --output_dir out is not empty" in again.stderr
