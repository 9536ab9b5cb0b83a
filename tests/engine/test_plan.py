"""Test `--dry_run`: that it prints the plan and writes nothing."""

import re
import shutil
from collections import namedtuple

import pytest

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation import in_training
from tests.support.runs import train

Usage = namedtuple("Usage", "total used free")


def parse_plan(text: str) -> dict[str, str]:
    """Return the values of a printed plan by name."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    train(tmp_path / "out", "--dry_run", "--gradient_accumulation_steps", "2", "--checkpoints_total_limit", "1")
    assert list(tmp_path.iterdir()) == []
    plan = parse_plan(capsys.readouterr().out)
    assert plan["images"] == "1797 of 10 classes of scikit-learn's digits, decoded into memory"
    assert plan["unet"] == "0.0 M parameters"
    assert plan["samples"] == "1×8×8"
    assert plan["method"] == "prediction_type v_prediction, conditioning_dropout_prob 0.1"
    assert plan["steps"] == "4 of 16 images: 0.0 epochs"
    assert plan["a step"] == "1 × cpu × 2 batches of 8, fp32"
    assert plan["disk"].startswith("2 checkpoints of 0.51 MiB, ")
    assert plan["output"] == f"{tmp_path / 'out'}, from the first step"
    assert plan["repository"] == "none"


def test_dry_run_of_a_resumed_run(tmp_path, capsys):
    train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    train(tmp_path, "--dry_run", "--resume_from_checkpoint", "latest", "--train_batch_size", "4")
    plan = parse_plan(capsys.readouterr().out)
    assert plan["output"] == f"{tmp_path}, from checkpoint-4"
    assert plan["a step"] == "1 × cpu × 2 batches of 4, fp32"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_too_little_disk_space_raises_before_the_first_step(tmp_path, monkeypatch, caplog, flags):
    flags = [*flags, "--optimizer", "adamw"]
    size = 4 * 4 * 44_273  # bytes of the weights, two moments and EMA weights
    free = [1.5 * size]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free[0]))
    with pytest.raises(UserError, match="has 1.01 MiB free, but 2 checkpoints take 1.35 MiB. Pass a folder"):
        train(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    every_step = ["--checkpointing_steps", "1"]
    free[0] = 2.5 * size
    train(tmp_path / "out", *flags, *every_step)
    assert "4 checkpoints take 2.70 MiB. Lower --checkpoints_total_limit" in caplog.text
    caplog.clear()
    train(tmp_path / "limited", *flags, *every_step, "--checkpoints_total_limit", "1")
    assert "--checkpoints_total_limit" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_batch_size", "2000"], "1797 images, but a step needs 2000"),
        (["--eval_steps", "2", "--feature_extractor", "/nowhere"], "--feature_extractor /nowhere cannot be loaded"),
        (["--eval_steps", "2", "--num_eval_samples", "5"], "num_eval_samples must be at least 20"),
        (["--enable_xformers_memory_efficient_attention"], "needs a GPU and xformers"),
        (["--report_to", "tensorbord"], "'tensorbord' is not a tracker"),
        (["--report_to", "tensorboard,wandb"], "--report_to wandb is not installed"),
        (["--attention_resolutions", "7"], "the levels of the network have 8, 4 pixels"),
        (["--output_dir", "/proc/out"], "'/proc/out' cannot be written"),
        (["--pretrained_vae_model_name_or_path", "/nowhere"], "/nowhere"),
    ],
)
def test_dry_run_raises_the_errors_of_the_run(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", "--dry_run", *flags)


def test_dry_run_of_an_evaluation_measures_nothing(tmp_path, monkeypatch):
    def unexpected(*_):
        raise AssertionError("The real images are measured.")

    monkeypatch.setattr(in_training, "RealStatistics", unexpected)
    train(tmp_path / "out", "--dry_run", "--eval_steps", "2")


@pytest.mark.parametrize("value", ["0", "x", "-1", "", "1.5"])
def test_wrong_number_of_processes_raises(tmp_path, monkeypatch, value):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(UserError, match=f"LOCAL_WORLD_SIZE must be a positive integer, but is '{value}'"):
        train(tmp_path / "out", "--dry_run")


def test_warmup_of_a_constant_learning_rate_is_reported(tmp_path, caplog):
    train(tmp_path / "out", "--dry_run", "--lr_scheduler", "constant")
    assert "--lr_scheduler constant has no warmup. For one, use constant_with_warmup" in caplog.text


@pytest.mark.parametrize(("steps", "warns"), [("0", False), ("100", True), ("15", True), ("12", False)])
def test_few_snapshots_of_the_posthoc_ema_are_reported(tmp_path, caplog, steps, warns):
    train(tmp_path / "out", "--dry_run", "--max_train_steps", "90", "--posthoc_ema_steps", steps)
    assert (f"--posthoc_ema_steps {steps} saves " in caplog.text) == ("Use at most 6." in caplog.text) == warns


@pytest.mark.parametrize(("flags", "warns"), [(["--lr_warmup_steps", "4"], True), (["--lr_warmup_steps", "3"], False)])
def test_warmup_longer_than_the_run_is_reported(tmp_path, caplog, flags, warns):
    train(tmp_path / "out", "--dry_run", *flags)
    assert ("--lr_warmup_steps is 4, but the run has only 4 steps" in caplog.text) == warns
