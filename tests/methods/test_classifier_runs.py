"""Test runs of train_classifier.py: what is saved, logged and resumed. test_trajectories.py divides their steps."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data import latents
from diffusers_cfg.evaluation import in_training
from diffusers_cfg.evaluation.likelihood_data import choose_images
from diffusers_cfg.evaluation.settings import LikelihoodConfig
from diffusers_cfg.methods.networks import record_process
from tests.support.draws import assert_same_draws
from tests.support.hub_client import HubClient
from tests.support.images import save_shards
from tests.support.latents import CLOSE, count_encoded, vae_flags
from tests.support.models import generators, vdm
from tests.support.runs import WEIGHTS, assert_same_tensors, scalars, train, train_classifier

# EMA weights that differ from those of the last step, and a second EMA
FLAGS = ["--ema_max_decay", "0.5", "0.9", "--ema_power", "3", "--validation_steps", "2", "--report_to", "tensorboard"]
LOG_SNRS = ["3.2_to_20.0", "1.8_to_3.2", "0.8_to_1.8", "0.0_to_0.8"]
LOG_SNRS += ["-0.8_to_0.0", "-1.8_to_-0.8", "-3.2_to_-1.8", "-20.0_to_-3.2"]
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def run(trained_model, tmp_path_factory) -> Path:
    """Return the folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("classifier") / "out"
    train_classifier(folder, trained_model, *FLAGS)
    return folder


def load(folder: Path | str, **kwargs: Any) -> CFGPipeline:
    pipeline = CFGPipeline.from_pretrained(folder, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: CFGPipeline) -> torch.Tensor:
    """Return two images of a pipeline that its classifier guides from the unconditional model."""
    images: Any = pipeline(
        ["three", 7], -1, 4, generator=generators(0, 1), output_type="pt", classifier_guidance_scale=[2.0, 0.5]
    ).images
    return images


def test_saved_pipeline_is_the_diffusion_model_with_its_classifier(run, trained_model):
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [
        "checkpoint-2", "checkpoint-4", "classifier", "logs", "samples", "scheduler", "unet",
    ]  # fmt: skip
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((run / file).read_text()).items() == json.loads((trained_model / file).read_text()).items()
    assert_same_tensors(run / "unet" / WEIGHTS, trained_model / "unet" / WEIGHTS)
    remote: Any = DiffusionPipeline.from_pretrained(run, trust_remote_code=True)
    remote.set_progress_bar_config(disable=True)
    pipeline = load(run)
    assert pipeline.classifier.noise_process.items() <= pipeline.unet.noise_process.items()
    assert pipeline.config.conditioning_dropout_prob == 0.2
    assert (pipeline.id2label[3], pipeline.classifier.config.id2label["3"]) == ("three", "three")
    assert_same_draws(draw(remote), draw(pipeline), pipeline, 2.0, 4)


def test_all_weights_of_the_classifier_move(run):
    start, end = (load_file(run / f"checkpoint-{step}" / "classifier" / WEIGHTS) for step in (2, 4))
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_ema_weights_are_saved_with_variants(run):
    checkpoint = run / "checkpoint-4"
    assert_same_tensors(run / "classifier" / WEIGHTS, checkpoint / "classifier_ema" / WEIGHTS)
    (variant,) = {path.name.split(".")[1] for path in (run / "classifier").glob("*.ema*.safetensors")}
    assert variant == "ema9"
    first, second = load(run), load(run, variant="ema9")
    raw = load_file(checkpoint / "classifier" / WEIGHTS)["head.weight"]
    weights = [raw, first.classifier.head.weight, second.classifier.head.weight]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)


def test_accuracy_over_log_snr_is_logged_and_recorded(run):
    logged = {tag: dict(values) for tag, values in scalars(run).items()}
    tags = [f"held_out/accuracy/log_snr_{levels}" for levels in LOG_SNRS]
    assert {"held_out/loss", "held_out/accuracy", *tags} == {tag for tag in logged if tag.startswith("held_out/")}
    assert {f"{value}/log_snr_{levels}" for value in ("loss", "accuracy") for levels in LOG_SNRS} >= {
        tag for tag in logged if "/log_snr_" in tag and not tag.startswith("held_out/")
    }
    for tag in tags:
        assert list(logged[tag]) == [2, 4]
        assert 0 <= logged[tag][4] <= 1
    assert logged["held_out/accuracy"][4] == pytest.approx(sum(logged[tag][4] for tag in tags) / 8)
    assert abs(logged["held_out/loss"][4] - math.log(10)) < 0.3
    record = json.loads((run / "run.json").read_text())
    assert record["method"]["classifier_accuracy"] == {
        f"log_snr_{levels}": pytest.approx(logged[tag][4], abs=1e-4) for levels, tag in zip(LOG_SNRS, tags, strict=True)
    }
    assert (record["num_images"], record["data"]["train_val_split"]) == (1617, 0.1)
    assert record["num_parameters"] == sum(p.numel() for p in load(run).classifier.parameters())
    assert record["method"]["conditioning_dropout_prob"] == 0.2


def test_resumed_run_is_the_same_bit_for_bit(run, trained_model, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    train_classifier(tmp_path, trained_model, *FLAGS, *RESUME)
    files = [path.relative_to(run) for path in run.rglob("*.safetensors") if "checkpoint-2" not in path.parts]
    assert len(files) == 7  # the network, two averages and the moments; the UNet, and two classifiers
    for file in files:
        assert_same_tensors(tmp_path / file, run / file)
    assert scalars(tmp_path)["held_out/loss"] == scalars(run)["held_out/loss"][1:]
    assert (tmp_path / "samples" / "step-4.png").read_bytes() == (run / "samples" / "step-4.png").read_bytes()


def test_held_out_images_cannot_change(run, trained_model, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="--train_val_split was 0.1 and is 0.2"):
        train_classifier(tmp_path, trained_model, *FLAGS, "--train_val_split", "0.2", *RESUME)


def test_a_model_of_another_noise_process_cannot_replace_the_first(run, tmp_path):
    model = vdm(num_inference_steps=4)
    record_process(model.unet, model.scheduler)
    model.save_pretrained(tmp_path / "vdm")
    shutil.copytree(run / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    with pytest.raises(UserError, match="log_snr_schedule of the method was 'arctan' and is 'linear'"):
        train_classifier(tmp_path / "resumed", tmp_path / "vdm", *FLAGS, *RESUME)


@pytest.mark.slow
def test_gradient_checkpointing_does_not_change_the_weights(run, trained_model, tmp_path, monkeypatch):
    original, recomputed = torch.utils.checkpoint.checkpoint, []

    def count(*args, **kwargs):
        recomputed.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", count)
    train_classifier(tmp_path, trained_model, *FLAGS, "--gradient_checkpointing", "--validation_steps", "0")
    assert recomputed
    assert_same_tensors(tmp_path / "classifier" / WEIGHTS, run / "classifier" / WEIGHTS, **CLOSE)


@pytest.mark.slow
def test_streamed_data_hold_out_nothing(tmp_path):
    data = ["--dataset_name", save_shards(tmp_path / "data", 5, 2, 4), "--resolution", "8"]
    train(tmp_path / "model", *data, "--max_train_steps", "1")
    train_classifier(tmp_path / "out", tmp_path / "model", *data, "--streaming", "--report_to", "tensorboard")
    logged = scalars(tmp_path / "out")
    assert "loss" in logged
    assert not any(tag.startswith("held_out/") for tag in logged)
    assert "classifier_accuracy" not in json.loads((tmp_path / "out" / "run.json").read_text())["method"]


@pytest.mark.parametrize("flags", [[], pytest.param(["--cache_latents"], marks=pytest.mark.slow)], ids=" ".join)
def test_a_classifier_of_latents_guides_their_diffusion_model(tmp_path, monkeypatch, flags):
    train(tmp_path / "latent", *vae_flags(tmp_path / "vae"), "--max_train_steps", "1")
    monkeypatch.setattr(latents, "LATENTS_DIR", tmp_path / "cache")
    counts = count_encoded(monkeypatch)
    train_classifier(tmp_path / "out", tmp_path / "latent", *flags, "--max_train_steps", "2")
    # The held-out images are encoded for each measurement.
    assert sum(counts) == (1617 if flags else 16) + 180
    pipeline = load(tmp_path / "out")
    assert (pipeline.classifier.config.sample_size, pipeline.classifier.config.in_channels) == (4, 2)
    assert draw(pipeline).shape == (2, 1, 8, 8)


def test_evaluations_during_training_guide_with_the_classifier(trained_model, tmp_path, monkeypatch):
    """The classifier guides the conditional model, as in the preview."""
    calls = []

    def record(pipeline, labels, *_, guidance_scale, classifier_guidance_scale, num_inference_steps):
        calls.append((guidance_scale, classifier_guidance_scale, num_inference_steps))
        return torch.zeros(len(labels), *pipeline.image_shape), None

    statistics = SimpleNamespace(summarizer=MagicMock(), reference=None, extractor=MagicMock())
    monkeypatch.setattr(in_training, "RealStatistics", lambda *_: statistics)
    monkeypatch.setattr(in_training, "draw_images", record)
    monkeypatch.setattr(in_training, "measure", lambda *_: {"recall": 0.5})
    monkeypatch.setattr(in_training, "CACHE_DIR", tmp_path / "cache")
    flags = ["--max_train_steps", "1", "--eval_steps", "1", "--num_eval_samples", "20", "--report_to", "tensorboard"]
    train_classifier(tmp_path / "out", trained_model, *flags)
    assert calls == [(0.0, 0.0, 12), (0.0, 1.0, 12)]
    assert {"recall/w_0", "recall/w_1"} < scalars(tmp_path / "out").keys()


def test_other_runs_start_from_a_model_with_a_classifier(run, trained_model, tmp_path, caplog):
    """Its diffusion model is trained further without the classifier, or gets another one."""
    train(tmp_path / "more", "--pretrained_model_name_or_path", str(run), "--max_train_steps", "1")
    assert f"Leaving out the classifier of {run}: the run saves the network that it trains alone" in caplog.text
    assert load(tmp_path / "more").classifier is None
    assert not (tmp_path / "more" / "classifier").exists()
    caplog.clear()
    train_classifier(tmp_path / "again", run, *FLAGS, "--validation_steps", "0")
    assert_same_tensors(tmp_path / "again" / "classifier" / WEIGHTS, run / "classifier" / WEIGHTS)
    assert "Leaving out" not in caplog.text


@pytest.mark.slow
def test_a_model_of_the_hub_is_guided(hub, trained_model, tmp_path, monkeypatch):
    """Its data must be named, unless they are the digits. The card names it as the base model."""
    HubClient(monkeypatch, hub, str(tmp_path / "hf"))
    load(trained_model).push_to_hub("me/digits")
    flags = ["--max_train_steps", "2", "--push_to_hub", "--hub_model_id", "me/guided", "--hub_strategy", "checkpoint"]
    train_classifier(tmp_path / "out", Path("me/digits"), *flags, "--checkpointing_steps", "1")
    assert [commit.message for commit in hub.repositories["me/guided"].commits[1:]] == ["Step 1", "Upload CFGPipeline"]
    files = hub.files("me/guided")
    assert sorted(name for name in files if name.startswith("classifier/")) == [
        "classifier/classifier_2d.py", "classifier/config.json", f"classifier/{WEIGHTS}",
    ]  # fmt: skip
    assert files[f"classifier/{WEIGHTS}"] == (tmp_path / "out" / "classifier" / WEIGHTS).read_bytes()
    assert not any("optimizer" in name or "checkpoint" in name or "logs" in name for name in files)
    assert "base_model: me/digits" in files["README.md"].decode()
    published = load("me/guided")
    assert_same_draws(draw(published), draw(load(tmp_path / "out")), published, 2.0, 4)


@pytest.mark.slow
def test_a_classifier_learns_the_digits(tmp_path):
    """It is right about clean digits, and guesses at the noisy end."""
    train(tmp_path / "model", "--max_train_steps", "1")
    flags = ["--block_out_channels", "16", "32", "--max_train_steps", "400", "--train_batch_size", "64"]
    train_classifier(
        tmp_path / "out", tmp_path / "model", *flags, "--learning_rate", "3e-3", "--checkpointing_steps", "0"
    )
    accuracy = list(json.loads((tmp_path / "out" / "run.json").read_text())["method"]["classifier_accuracy"].values())
    assert accuracy[0] > 0.9
    assert accuracy[-1] < 0.3
    assert all(noisier <= cleaner + 0.03 for cleaner, noisier in pairwise(accuracy))


def test_held_out_images_are_not_taken_for_those_of_the_diffusion_model(run):
    pipeline = CFGPipeline.from_pretrained(run)
    with pytest.raises(UserError, match="saved by the run of its classifier.*Evaluate the diffusion model that"):
        choose_images(LikelihoodConfig(model=str(run)), pipeline)
