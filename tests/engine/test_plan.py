"""`--dry_run`: what a run will do and need, and that it is not run."""

import re
import shutil
from collections import namedtuple

import pytest

from diffusers_cfg.config import UserError
from tests.support.runs import train

Usage = namedtuple("Usage", "total used free")


def plan_of(text: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}|(?<=rate) |(?<= as) ", line, maxsplit=1) for line in text.splitlines())


def test_the_plan_is_told_and_not_carried_out(tmp_path, capsys):
    train(tmp_path / "out", "--dry_run", "--gradient_accumulation_steps", "2", "--checkpoints_total_limit", "1")
    assert list(tmp_path.iterdir()) == []
    plan = plan_of(capsys.readouterr().out)
    assert plan["images"] == "1797 of 10 classes, decoded and kept in memory"
    assert plan["unet"] == "0.0 M parameters"
    assert plan["samples"] == "1×8×8"
    assert plan["method"] == "prediction_type v_prediction, conditioning_dropout_prob 0.1"
    assert plan["steps"] == "4 of 16 images: 0.0 epochs"
    assert plan["a step"] == "1 × cpu × 2 batches of 8, fp32"
    assert plan["disk"].startswith("2 checkpoints at once of 0.00 GiB, ")
    assert plan["output"] == f"{tmp_path / 'out'}, from the first step"
    assert plan["published as"] == "nothing"


def test_the_plan_of_a_run_that_goes_on(tmp_path, capsys):
    train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    train(tmp_path, "--dry_run", "--resume_from_checkpoint", "latest", "--train_batch_size", "4")
    plan = plan_of(capsys.readouterr().out)
    assert plan["output"] == f"{tmp_path}, from checkpoint-4"
    assert plan["a step"] == "1 × cpu × 2 batches of 4, fp32"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_a_disk_that_is_too_small_is_found_before_the_first_step(tmp_path, monkeypatch, caplog, flags):
    size = 4 * 4 * 40_841  # weights, two moments and an average of as many parameters
    free = [1.5 * size]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free[0]))
    with pytest.raises(UserError, match="has 0.00 GiB left, but 2 checkpoints at once take 0.00 GiB: name a"):
        train(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    every_step = ["--checkpointing_steps", "1"]
    free[0] = 2.5 * size
    train(tmp_path / "out", *flags, *every_step)
    assert "4 checkpoints at once take 0.00 GiB: keep fewer, with --checkpoints_total_limit" in caplog.text
    caplog.clear()
    train(tmp_path / "limited", *flags, *every_step, "--checkpoints_total_limit", "1")
    assert "--checkpoints_total_limit" not in caplog.text


def test_what_the_run_would_refuse(tmp_path):
    with pytest.raises(UserError, match="1797 images, but a step takes 2000"):
        train(tmp_path / "out", "--dry_run", "--train_batch_size", "2000")
