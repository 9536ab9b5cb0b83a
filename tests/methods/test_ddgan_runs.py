"""Test runs of train_ddgan.py: what is saved, logged, skipped and resumed. test_trajectories.py divides their steps."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.engine.trainer import Trainer
from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN
from tests.support.draws import assert_same_draws
from tests.support.images import save_shards
from tests.support.models import generators
from tests.support.runs import WEIGHTS, assert_same_tensors, scalars, train, train_ddgan

# R1 is due at the steps 0, 3 and 6; a run resumes from step 4. EMA weights differ from those of the last step.
FLAGS = ["--max_train_steps", "8", "--checkpointing_steps", "4", "--ema_max_decay", "0.5", "--report_to", "tensorboard"]
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run of eight steps."""
    folder = tmp_path_factory.mktemp("ddgan") / "out"
    train_ddgan(folder, *FLAGS)
    return folder


def load(folder: Path) -> CFGPipeline:
    pipeline = CFGPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / name / WEIGHTS)


def test_saved_pipeline_samples_in_four_evaluations(run):
    remote: Any = DiffusionPipeline.from_pretrained(run, trust_remote_code=True)
    remote.set_progress_bar_config(disable=True)
    images: list[Any] = []
    for pipeline in (load(run), remote):
        calls: list[int] = []
        pipeline.unet.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(len(given[0])))
        images.append(pipeline(["three", 7], generator=generators(0, 1), output_type="pt").images)
        assert calls == [2] * 4
    assert_same_draws(images[1], images[0], load(run), 0.0, 4)
    facts = json.loads((run / "run.json").read_text())["method"]
    assert (facts["num_timesteps"], facts["latent_dim"], facts["loss"], facts["lazy_reg"]) == (
        4,
        4,
        "non_saturating",
        3,
    )


def test_checkpoint_contains_both_networks_and_the_pipeline_the_generator(run):
    assert sorted(path.name for path in (run / "checkpoint-8").iterdir() if path.is_dir()) == [
        "discriminator", "generator", "generator_ema",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoint-8").glob("optimizer-*")) == [
        "optimizer-discriminator.safetensors", "optimizer-generator.safetensors",
    ]  # fmt: skip
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [
        "checkpoint-4", "checkpoint-8", "logs", "samples", "scheduler", "unet",
    ]  # fmt: skip
    assert_same_tensors(run / "unet" / WEIGHTS, run / "checkpoint-8" / "generator_ema" / WEIGHTS)
    raw, averaged = weights(run, 8, "generator"), weights(run, 8, "generator_ema")
    assert raw.keys() == averaged.keys()
    assert not torch.equal(raw["conv_in.weight"], averaged["conv_in.weight"])
    assert not any("discriminator" in path.read_text() for path in (run / "unet").glob("*.json"))


def test_logged_values(run):
    logged = {tag: dict(values) for tag, values in scalars(run).items()}
    assert list(logged["discriminator/r1"]) == [1, 4, 7]  # of the steps 0, 3 and 6
    assert {f"discriminator/real_minus_fake/t_{t}" for t in range(4)} < logged.keys()
    assert {"generator/loss", "generator/grad_norm", "discriminator/grad_norm", "label_gain"} < logged.keys()
    assert logged["discriminator/lr"] != logged["generator/lr"]
    for tag in ("discriminator/loss", "generator/loss"):
        assert len(logged[tag]) == 8
        assert all(map(math.isfinite, logged[tag].values()))
    # All logits are zero in the first step.
    assert logged["discriminator/loss"][1] == pytest.approx(2 * math.log(2))
    assert logged["generator/loss"][1] > 0


def test_resumed_run_is_the_same_bit_for_bit(run, tmp_path):
    """The run stops between two penalties."""
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    train_ddgan(tmp_path, *FLAGS, *RESUME)
    files = [path.relative_to(run) for path in run.rglob("*.safetensors") if "checkpoint-4" not in path.parts]
    assert len(files) == 6  # two networks, an average and two optimizers; the generator that is saved
    for file in files:
        assert_same_tensors(tmp_path / file, run / file)
    assert [step for step, _ in scalars(tmp_path)["discriminator/r1"]] == [7]
    assert (tmp_path / "samples" / "step-8.png").read_bytes() == (run / "samples" / "step-8.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_timesteps", "2"], "--num_timesteps was 4 and is 2"),
        (["--latent_dim", "0"], "--latent_dim was 4 and is 0"),
        (["--stack", "3"], "--stack was 1 and is 3"),
        (["--discriminator_channels", "8", "4"], r"--discriminator_channels was \[8, 8\] and is \[8, 4\]"),
    ],
)
def test_settings_that_cannot_change(run, tmp_path, flags, message):
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match=message):
        train_ddgan(tmp_path, *FLAGS, *flags, *RESUME)


def test_each_update_changes_one_network(tmp_path, monkeypatch):
    """Neither weights nor gradients of the other network are touched, and both updates get the same images."""
    minimise, updates = Trainer.minimise, []

    def spy(self, objective, batches):
        before = {name: [p.clone() for p in module.parameters()] for name, module in self.method.modules.items()}
        minimise(self, objective, batches)
        changed = {
            name: any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
            for name, module in self.method.modules.items()
        }
        updates.append((objective.name, batches[0].step, batches[0].x.sum().item(), changed))
        other = {"discriminator": "generator", "generator": "discriminator"}[objective.name]
        for parameter in self.method.modules[other].parameters():
            assert parameter.requires_grad
            assert parameter.grad is None

    monkeypatch.setattr(Trainer, "minimise", spy)
    train_ddgan(tmp_path, "--max_train_steps", "2", "--lr_scheduler", "constant")
    assert [update[:2] for update in updates] == [(n, s) for s in (0, 1) for n in ("discriminator", "generator")]
    assert updates[0][2] == updates[1][2] != updates[2][2]
    assert all(changed == {name: True, other: False} for (name, _, _, changed), other in zip(
        updates, ["generator", "discriminator"] * 2, strict=True))  # fmt: skip


def test_gradients_are_clipped_by_network(tmp_path):
    flags = ["--max_train_steps", "2", "--adam_epsilon", "1e9", "--lr_scheduler", "constant", "--adam_beta1", "0"]
    flags += ["--max_grad_norm", "1e-9", "--no_use_ema", "--checkpointing_steps", "1", "--validation_steps", "0"]
    train_ddgan(tmp_path, *flags, "--learning_rate_discriminator", "1e6", "--learning_rate", "1e6")
    # With such an ε, Adam is gradient descent at a rate of 0.001.
    moved = {}
    for name in ("discriminator", "generator"):
        before, after = (weights(tmp_path, step, name) for step in (1, 2))
        moved[name] = max((before[key] - after[key]).abs().max().item() for key in before)
    assert moved["generator"] < 1e-11 < 1e-6 < moved["discriminator"]


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        (["--num_timesteps", "1"], 1),
        (["--num_timesteps", "8", "--latent_dim", "0"], 8),
        (["--loss", "relativistic", "--r1_gamma", "0.1"], 4),
    ],
)
def test_other_numbers_of_steps_and_losses_train(tmp_path, flags, calls):
    train_ddgan(tmp_path, *flags, "--max_train_steps", "2", "--report_to", "tensorboard")
    pipeline, used = load(tmp_path), []
    pipeline.unet.register_forward_pre_hook(lambda *_: used.append(1))
    images = pipeline(3, generator=generators(0), output_type="pt").images
    assert images.isfinite().all()
    assert images.std() > 0
    assert len(used) == calls
    logged = scalars(tmp_path)
    assert ("discriminator/r2" in logged) == ("relativistic" in flags)
    assert all(value == 0 for _, value in logged["discriminator/skipped_steps"])


@pytest.mark.slow
def test_gradient_checkpointing_does_not_change_the_weights(run, tmp_path, monkeypatch):
    original, recomputed = torch.utils.checkpoint.checkpoint, []

    def count(*args, **kwargs):
        recomputed.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", count)
    train_ddgan(tmp_path, *FLAGS, "--gradient_checkpointing")
    assert recomputed
    assert_same_tensors(tmp_path / "checkpoint-8" / "generator" / WEIGHTS, run / "checkpoint-8" / "generator" / WEIGHTS)
    assert_same_tensors(
        tmp_path / "checkpoint-8" / "discriminator" / WEIGHTS, run / "checkpoint-8" / "discriminator" / WEIGHTS
    )


def test_a_discriminator_without_finite_values_is_skipped_alone(tmp_path, monkeypatch):
    """Its log has no finite value in that step, and the generator takes its own step."""
    loss = DenoisingDiffusionGAN.discriminator_loss

    def nan_at_step_2(self, networks, batch):
        terms = loss(self, networks, batch)
        if batch.step != 2:
            return terms
        return terms._replace(
            loss=terms.loss * torch.nan, logs={name: value * torch.nan for name, value in terms.logs.items()}
        )

    monkeypatch.setattr(DenoisingDiffusionGAN, "discriminator_loss", nan_at_step_2)
    train_ddgan(tmp_path, "--checkpointing_steps", "1", "--no_use_ema", "--report_to", "tensorboard")
    moved = {
        name: not torch.equal(*(next(iter(weights(tmp_path, step, name).values())) for step in (2, 3)))
        for name in ("discriminator", "generator")
    }
    assert moved == {"discriminator": False, "generator": True}
    logged = scalars(tmp_path)
    assert dict(logged["discriminator/skipped_steps"])[3] == 1
    assert dict(logged["generator/skipped_steps"])[3] == 0
    assert [step for step, _ in logged["discriminator/loss"]] == [1, 2, 4]


@pytest.mark.slow
def test_streamed_run_resumes_bit_for_bit(tmp_path):
    flags = ["--streaming", "--shuffle_buffer_size", "5", "--resolution", "8", "--train_batch_size", "4"]
    flags += ["--dataset_name", save_shards(tmp_path / "data", 5, 2, 4), "--max_train_steps", "5"]
    train_ddgan(tmp_path / "whole", *flags, "--checkpointing_steps", "2")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train_ddgan(tmp_path / "resumed", *flags, *RESUME)
    assert_same_tensors(tmp_path / "whole" / "unet" / WEIGHTS, tmp_path / "resumed" / "unet" / WEIGHTS)


def test_network_config_trains(tmp_path):
    """The config of a trained generator also gives the network of a run with another T and latent vector."""
    train_ddgan(tmp_path / "first", "--max_train_steps", "1")
    config = str(tmp_path / "first" / "unet" / "config.json")
    flags = ["--model_config_name_or_path", config, "--max_train_steps", "1", "--num_timesteps", "2"]
    train_ddgan(tmp_path / "second", *flags, "--latent_dim", "6")
    pipeline = load(tmp_path / "second")
    assert (pipeline.unet.latent_dim, pipeline.num_inference_steps) == (6, 2)
    assert pipeline.unet.config.resnet_time_scale_shift == "scale_shift"
    assert pipeline(0, output_type="pt").images.isfinite().all()


def test_other_methods_do_not_start_from_a_generator(run, tmp_path):
    with pytest.raises(UserError, match="is a denoising diffusion GAN, whose generator draws images in 4 steps"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(run))
    assert not (tmp_path / "out").exists()
