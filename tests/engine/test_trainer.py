"""Test runs from the settings to a saved pipeline, in this process."""

import json
import logging
import re
import shutil
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data import sources
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine import log
from diffusers_cfg.engine import method as method_module
from diffusers_cfg.engine.method import Objective, Terms
from diffusers_cfg.method_settings import CFGConfig, DDGANConfig
from diffusers_cfg.methods.cfg import ClassifierFreeGuidance
from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN
from diffusers_cfg.model_files import checkpoints
from tests.support.latents import vae_flags
from tests.support.runs import TIMES, WEIGHTS, assert_same_tensors, distill, events, printed_code, scalars, train
from tests.support.toys import Unlabelled


def test_run_saves_a_pipeline_that_loads(tmp_path, capsys):
    config = train(tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "checkpoint-2", "checkpoint-4", "model_index.json", "pipeline_cfg.py", "run.json", "samples",
        "scheduler", "train_config.yaml", "unet",
    ]  # fmt: skip
    assert CFGConfig.load(out / "train_config.yaml") == config
    assert [path.name for path in (out / "samples").iterdir()] == ["step-4.png"]
    width, height = Image.open(out / "samples" / "step-4.png").size
    assert width > 2 * 64
    assert height > 10 * 64
    assert f'DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)' in capsys.readouterr().out

    pipeline = CFGPipeline.from_pretrained(out)
    assert pipeline.id2label[3] == "three"
    assert pipeline.config.conditioning_dropout_prob == 0.1
    assert len(pipeline(["three", 7], [0.0, 2.5], num_inference_steps=2).images) == 2
    # The saved weights are the EMA weights.
    assert_same_tensors(out / "unet" / WEIGHTS, out / "checkpoint-4" / "unet_ema" / WEIGHTS)


def test_printed_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(Path("out"))
    exec(printed_code(capsys.readouterr().out), {})
    assert Image.open("zero.png").size == (8, 8)


def test_printed_code_runs_for_any_class_name_and_student(tmp_path, monkeypatch, capsys):
    """A class name has quotation marks and slashes, and a student has a small maximum guidance scale."""
    digits = Digits()
    digits.id2label = {**digits.id2label, 0: 'a "zero" \\/'}
    monkeypatch.setattr(sources, "Digits", lambda: digits)
    monkeypatch.chdir(tmp_path)
    train(Path("teacher"))
    exec(printed_code(capsys.readouterr().out), {})
    Path("a-zero-.png").unlink()
    distill(Path("teacher"), Path("student"), "--max_guidance_scale", "0.25")
    printed = capsys.readouterr().out
    assert "guidance_scale=0.25)" in printed
    exec(printed_code(printed), {})
    assert Image.open("a-zero-.png").size == (8, 8)


def test_documented_method_trains(tmp_path, monkeypatch, capsys):
    """The method in the docstring of `engine.method` runs as it stands, on data without labels."""
    monkeypatch.chdir(tmp_path)
    imports = """
        from dataclasses import dataclass
        from diffusers_cfg import CFGPipeline, LogSNRScheduler
        from diffusers_cfg.config import recorded
        from diffusers_cfg.engine.method import Method, Objective, Terms
        from diffusers_cfg.methods.networks import build_unet
        from diffusers_cfg.methods.objectives import squared_error
        from diffusers_cfg.settings import TrainConfig
    """
    source = method_module.__doc__ or ""
    source = source[source.index("    @dataclass") : source.index("A command trains it")]
    namespace: dict[str, Any] = {"__name__": "documented"}
    exec(dedent(imports) + dedent(source), namespace)
    train(Path("out"), "--antithetic", method=namespace["Denoiser"], config_class=namespace["DenoiserConfig"])
    exec(printed_code(capsys.readouterr().out), {})
    assert Image.open("sample.png").size == (8, 8)


@pytest.mark.parametrize(
    ("argv", "num_files"),
    [
        (["--dropout", "0.2"], 7),
        (["--gradient_accumulation_steps", "2", "--random_flip"], 7),
        (["--no_use_ema"], 5),
        (["--ema_max_decay", "0.9", "0.2"], 10),
    ],
)
def test_resume_is_bit_exact(tmp_path, argv, num_files):
    argv = [*argv, "--report_to", "tensorboard"]
    train(tmp_path / "whole", *argv)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(tmp_path / "resumed", *argv, "--resume_from_checkpoint", "latest")

    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(files) == num_files
    for file in files:
        assert_same_tensors(tmp_path / "whole" / file, tmp_path / "resumed" / file)
    states = [json.loads((tmp_path / run / "checkpoint-4" / "state.json").read_text()) for run in ("whole", "resumed")]
    assert {**states[0], "seconds": 0} == {**states[1], "seconds": 0}
    grids = [(tmp_path / run / "samples" / "step-4.png").read_bytes() for run in ("whole", "resumed")]
    assert grids[0] == grids[1]
    logged = {(tag, *point) for tag, points in scalars(tmp_path / "whole").items() for point in points if point[0] > 2}
    again = {(tag, *point) for tag, points in scalars(tmp_path / "resumed").items() for point in points}
    assert {entry for entry in logged if entry[0] not in TIMES} == {entry for entry in again if entry[0] not in TIMES}
    assert {("loss", 3), ("loss", 4), ("grad_norm", 4), ("label_gain", 4)} <= {entry[:2] for entry in again}


def test_each_ema_decay_has_its_own_weights(tmp_path):
    train(tmp_path, "--ema_max_decay", "0.9", "0.2", "--ema_power", "9", "--checkpointing_steps", "1")
    steps = [load_file(tmp_path / f"checkpoint-{step}" / "unet" / WEIGHTS) for step in (1, 2, 3, 4)]
    for file, decay in ((WEIGHTS, 0.9), ("diffusion_pytorch_model.ema2.safetensors", 0.2)):
        ema = steps[0]  # The decay of the first step is 0.
        for weights in steps[1:]:
            ema = {name: decay * ema[name] + (1 - decay) * weights[name] for name in weights}
        saved = load_file(tmp_path / "unet" / file)
        for name in saved:
            torch.testing.assert_close(saved[name], ema[name], rtol=1e-5, atol=1e-7)
    pipelines = [CFGPipeline.from_pretrained(tmp_path, variant=variant) for variant in (None, "ema2")]
    assert not torch.equal(*(pipeline.unet.conv_in.weight for pipeline in pipelines))
    with pytest.raises(ValueError, match="no weights of the variant 'ema3'"):
        CFGPipeline.from_pretrained(tmp_path, variant="ema3")


def test_gradient_checkpointing_does_not_change_the_weights(tmp_path, monkeypatch):
    flags, recomputed = ["--attention_resolutions", "4", "--dropout", "0.2"], []
    train(tmp_path / "kept", *flags)
    original = torch.utils.checkpoint.checkpoint

    def count(*args, **kwargs):
        recomputed.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", count)
    train(tmp_path / "recomputed", *flags, "--gradient_checkpointing")
    assert recomputed
    assert_same_tensors(tmp_path / "kept" / "unet" / WEIGHTS, tmp_path / "recomputed" / "unet" / WEIGHTS)


def test_latent_model_trains(tmp_path):
    train(tmp_path / "out", *vae_flags(tmp_path / "vae"))
    pipeline = CFGPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.sample_size) == (2, 4)
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline(0, num_inference_steps=2).images[0].size == (8, 8)


def test_oldest_checkpoints_are_deleted(tmp_path):
    train(tmp_path, "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_tensorboard_gets_losses_and_samples(tmp_path):
    train(tmp_path, "--report_to", "tensorboard")
    losses = scalars(tmp_path)["loss"]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert all(value > 0 for _, value in losses)
    assert [event.step for event in events(tmp_path).Images("samples")] == [4]


@pytest.mark.parametrize(("seconds", "steps"), [(0, ["1", "2", "3", "4"]), (3600, ["1", "4"])])
def test_progress_lines_are_rate_limited_and_trackers_are_not(tmp_path, monkeypatch, caplog, seconds, steps):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", seconds)
    caplog.set_level(logging.INFO)
    train(tmp_path, "--report_to", "tensorboard")
    lines = re.findall(r"step (\d) of 4, loss \d\.\d{4}, \d+ images/s, \d:\d\d:\d\d left", caplog.text)
    assert lines == steps
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3, 4]


def test_output_dir_with_a_run_is_not_changed(tmp_path):
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"is not empty. Resume with --resume_from_checkpoint latest.*--overwrite_output_dir"
    ):
        train(tmp_path)
    # --overwrite_output_dir deletes nothing if another setting is invalid.
    with pytest.raises(UserError, match="train_batch_size"):
        train(tmp_path, "--overwrite_output_dir", "--train_batch_size", "9999")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    train(tmp_path, "--overwrite_output_dir", "--max_train_steps", "3")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_overwrite_output_dir_keeps_files_of_the_user(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    train(tmp_path, "--overwrite_output_dir")
    assert (tmp_path / "thesis.tex").read_text() == "text"


def test_missing_checkpoint_raises(tmp_path):
    train(tmp_path, "--overwrite_output_dir")
    with pytest.raises(UserError, match="checkpoint-77 does not exist.*checkpoint-2, checkpoint-4"):
        train(tmp_path, "--resume_from_checkpoint", "checkpoint-77")
    with pytest.raises(UserError, match=f"{tmp_path} is not a checkpoint.*checkpoint-2, checkpoint-4"):
        train(tmp_path, "--resume_from_checkpoint", str(tmp_path))


def test_checkpoint_of_a_different_network_raises(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match=r"--block_out_channels was \[8, 16\] and is \[8, 8\]"):
        train(tmp_path, "--resume_from_checkpoint", "latest", "--block_out_channels", "8", "8")


def test_resume_keeps_the_global_batch_size(tmp_path, caplog):
    train(tmp_path / "whole", "--optimizer", "adamw")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    resume = ["--resume_from_checkpoint", "latest", "--optimizer", "adamw"]
    config = train(tmp_path / "parts", *resume, "--train_batch_size", "2", "--gradient_accumulation_steps", "3")
    assert config.gradient_accumulation_steps == 3  # The settings are saved as they were passed.
    assert "Using --gradient_accumulation_steps 4 instead of 3, so that a step still has 8 images" in caplog.text
    assert_same_tensors(
        tmp_path / "whole" / "unet" / WEIGHTS, tmp_path / "parts" / "unet" / WEIGHTS, rtol=1e-4, atol=1e-6
    )
    with pytest.raises(UserError, match="8 images per step, which 1 processes cannot divide into batches of 3"):
        train(tmp_path / "parts", *resume, "--train_batch_size", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_batch_size", "2000"], "1797 images, but a step needs 2000"),
        (["--train_batch_size", "1000", "--gradient_accumulation_steps", "2"], "1797 images, but a step needs 2000"),
        (["--resolution", "9"], "resolution 9 cannot be halved 1 times"),
        (["--train_data_dir", "/nowhere", "--resolution", "8"], "/nowhere is not a folder"),
        (["--report_to", "wandb"], "wandb.*not installed"),
        (["--enable_xformers_memory_efficient_attention"], "xformers_memory_efficient_attention needs a GPU and xform"),
    ],
)
@pytest.mark.filterwarnings("ignore:`log_with:UserWarning")  # accelerate warns before the error
def test_invalid_settings_raise_before_anything_is_written(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed", "megatron_lm", "parallelism_config"])
def test_sharded_network_raises(tmp_path, monkeypatch, kind):
    """On a CPU, accelerate would silently ignore these flags of `accelerate launch`."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    with pytest.raises(UserError, match=f"--use_{kind}` is not supported.* Use DDP, .*configs/accelerate/ddp.yaml"):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nonfinite_loss_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite in the last 10 steps.*learning_rate"):
        train(tmp_path, "--learning_rate", "1e30", "--max_train_steps", "20", "--lr_warmup_steps", "0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda terms: Terms(terms.loss.mean()), r"unet returned loss of shape \(\), but .*shape \(8,\)"),
        (lambda terms: Terms(terms.loss, {"part": terms.loss.mean()}), r"unet returned part of shape \(\)"),
        (lambda terms: Terms(terms.loss.double()), "a loss in torch.float64. Compute it in float32"),
    ],
)
def test_invalid_terms_raise(tmp_path, change, message):
    class Wrong(ClassifierFreeGuidance):
        def loss(self, networks, batch):
            return change(super().loss(networks, batch))

    with pytest.raises(ValueError, match=message):
        train(tmp_path, method=Wrong)


def test_unfused_optimizer_skips_nonfinite_steps(tmp_path):
    """An unfused optimizer has no `found_inf`."""

    class NanAtStep2(Unlabelled):
        def loss(self, networks, batch):
            terms = super().loss(networks, batch)
            return Terms(terms.loss * (torch.nan if batch.step == 2 else 1.0))

    train(tmp_path, "--checkpointing_steps", "1", "--no_use_ema", method=NanAtStep2)
    weights = [load_file(tmp_path / f"checkpoint-{step}" / "unet" / WEIGHTS) for step in (2, 3, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(torch.isfinite(value).all() for value in weights[2].values())


def test_objectives_of_the_same_name_share_an_optimizer(tmp_path):
    """Several critic steps share the optimizer. Each has its own turn and dropout."""
    calls = []

    class ThreeCriticSteps(DenoisingDiffusionGAN):
        def __init__(self, *args):
            super().__init__(*args)
            self.objectives = [self.objectives[0]] * 3 + self.objectives[1:]

        def discriminator_loss(self, networks, batch):
            calls.append((batch.step, batch.turn, batch.x[0, 0, 4, 4].item(), torch.rand(1).item()))
            return super().discriminator_loss(networks, batch)

    train(tmp_path, "--max_train_steps", "2", method=ThreeCriticSteps, config_class=DDGANConfig)
    assert [call[:2] for call in calls] == [(step, turn) for step in (0, 1) for turn in (0, 1, 2)]
    assert len({x for step, _, x, _ in calls if step == 0}) == 1
    assert len({random for *_, random in calls}) == 6


def test_sampling_pipeline_is_built_with_the_ema_weights(tmp_path):
    """A method whose scheduler is learned builds its pipeline from the weights."""
    weights = []

    class Recording(ClassifierFreeGuidance):
        def sampling_pipeline(self):
            weights.append(self.pipeline.unet.conv_in.weight.detach().clone())
            return super().sampling_pipeline()

        def save(self, folder):
            super().save(folder)
            (folder / "extra.txt").write_text("text")

    train(tmp_path, "--ema_max_decay", "0.5", method=Recording)
    averaged = load_file(tmp_path / "checkpoint-4" / "unet_ema" / WEIGHTS)["conv_in.weight"]
    assert len(weights) >= 2
    assert all(torch.equal(weight, averaged) for weight in weights)
    assert (tmp_path / "extra.txt").is_file()


def test_frozen_module_can_be_averaged(tmp_path):
    class Fixed(Unlabelled):
        def __init__(self, *args):
            super().__init__(*args)
            self.modules["scale"].requires_grad_(False)

    train(tmp_path, method=Fixed)
    assert load_file(tmp_path / "checkpoint-4" / "scale_ema" / WEIGHTS)["weight"].item() == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "averaged", ("unett",)), "'unett'.* are averaged, but the modules are"),
        (lambda m: m.objectives.append(Objective("b", ("nett",), m.loss)), "b trains .*'nett'.*, but the modules are"),
        (lambda m: m.objectives.append(Objective("a/b", ("unet",), m.loss)), "'a/b' cannot name"),
        (lambda m: m.objectives.append(Objective("denoising", ("unet",), m.loss)), "denoising train different modules"),
        (lambda m: m.modules.update(unet_ema=m.modules["scale"]), "'unet_ema' cannot name"),
    ],
)
def test_inconsistent_method_raises(tmp_path, change, message):
    class Wrong(Unlabelled):
        def __init__(self, *args):
            super().__init__(*args)
            change(self)

    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", "--dry_run", method=Wrong)
