"""Test that no run trains on or is compared with the images that `--train_val_split` holds out."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets
from diffusers_cfg.data.datasets import CachedImages, fingerprint
from diffusers_cfg.evaluation.sweep import load_data
from tests.support.runs import ONE_LEVEL, WEIGHTS, assert_same_tensors, train

SPLIT = [*ONE_LEVEL, "--train_val_split", "0.25"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return the output folder of a run on three quarters of the digits."""
    folder = tmp_path_factory.mktemp("held-out") / "out"
    train(folder, *SPLIT)
    return folder


def test_an_evaluation_compares_with_the_images_of_training(model):
    data = json.loads((model / "checkpoint-4" / "state.json").read_text())["data"]
    dataset, id2label, _ = load_data(str(model), {}, CFGPipeline.from_pretrained(model), False)
    assert isinstance(dataset, CachedImages)
    assert (len(dataset), data["num_images"], len(id2label)) == (1348, 1348, 10)
    assert fingerprint(dataset) == data["fingerprint"]


def test_the_record_of_a_run_says_what_is_held_out(model):
    record = json.loads((model / "run.json").read_text())
    assert (record["num_images"], record["data"]["train_val_split"]) == (1348, 0.25)
    assert record["config"]["train_val_split"] == 0.25


def test_the_plan_and_the_log_say_how_many_images_are_held_out(tmp_path, capsys, caplog):
    train(tmp_path / "out", *SPLIT, "--dry_run")
    assert "1348 of 10 classes of scikit-learn's digits, 449 held out, decoded into memory\n" in capsys.readouterr().out
    with caplog.at_level(logging.INFO, "diffusers_cfg"):
        train(tmp_path / "out", *SPLIT)
    assert "1348 images (449 held out), 10 classes" in caplog.text


def test_a_resumed_run_cannot_change_the_split(model, tmp_path):
    resumed = tmp_path / "out"
    shutil.copytree(model / "checkpoint-2", resumed / "checkpoint-2")
    with pytest.raises(UserError, match="--train_val_split was 0.25 and is 0.0"):
        train(resumed, *ONE_LEVEL, "--resume_from_checkpoint", "latest")
    train(resumed, *SPLIT, "--resume_from_checkpoint", "latest")
    assert_same_tensors(model / "unet" / WEIGHTS, resumed / "unet" / WEIGHTS)


def test_images_decoded_lazily_train_the_same_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_CACHED_BYTES", 0)
    train(tmp_path, *SPLIT)
    assert_same_tensors(model / "unet" / WEIGHTS, tmp_path / "unet" / WEIGHTS)
