"""`--dry_run`: what a run is going to do and need, and that it is not run."""

import re
import shutil
from collections import namedtuple

import pytest
import torch
from diffusers_cfg.config import UserError
from diffusers_cfg.settings import CFGConfig
from diffusers_cfg.methods.networks import build_unet
from plan import activation_bytes
from test_train import train

Usage = namedtuple("Usage", "total used free")


def plan_of(text: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}|(?<=rate) |(?<= as) ", line, maxsplit=1) for line in text.splitlines())


def test_the_plan_is_told_and_not_carried_out(tmp_path, capsys):
    train(tmp_path / "out", "--dry_run", "--gradient_accumulation_steps", "2", "--checkpoints_total_limit", "1")
    assert list(tmp_path.iterdir()) == []
    plan = plan_of(capsys.readouterr().out)
    assert plan["images"] == "1797 of 10 classes, decoded and kept in memory"
    assert plan["network"] == "0.0 M parameters, for samples of 1×8×8"
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_batch(checkpointing):
    config = CFGConfig(
        resolution=16, block_out_channels=[16, 32], layers_per_block=1, attention_resolutions=[0],
        train_batch_size=6, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    unet = build_unet(config, None, channels=3, num_classes=4).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.zeros(6, 3, 16, 16), torch.zeros(6), class_labels=torch.zeros(6).long())
    for parameter in unet.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert activation_bytes(config, unet) == pytest.approx(real, rel=0.05)


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
