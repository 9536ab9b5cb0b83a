"""Test runs of train_vdm.py: what is saved, resumed, published, and trained further."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.evaluation.sampling import make_scheduler
from diffusers_cfg.methods.vdm import VariationalDiffusion
from diffusers_cfg.noise_schedule import NoiseSchedule
from tests.support.draws import assert_same_draws
from tests.support.hub_client import HubClient
from tests.support.models import generators
from tests.support.runs import WEIGHTS, assert_same_tensors, distill, scalars, train, train_vdm

SCHEDULE = "noise_schedule.safetensors"
# With EMA weights that differ from those of the last step, and ends that move fast
FLAGS = ["--ema_max_decay", "0.5", "--ema_power", "3", "--schedule_learning_rate", "0.05", "--validation_steps", "2"]


@pytest.fixture(scope="module")
def run_and_previews(tmp_path_factory) -> tuple[Path, list[float]]:
    """Return the folder of a run of four steps, and γ₀ in the pipeline when the samples of step 2 and 4 were drawn."""
    folder, ends, preview = tmp_path_factory.mktemp("vdm") / "out", [], VariationalDiffusion.preview

    def spy(self, accelerator):
        ends.append(-self.pipeline.scheduler.config.log_snr_max)
        return preview(self, accelerator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VariationalDiffusion, "preview", spy)
        train_vdm(folder, *FLAGS, "--report_to", "tensorboard", "--conditioning_dropout_prob", "0.4")
    return folder, ends


@pytest.fixture
def run(run_and_previews) -> Path:
    return run_and_previews[0]


def load(folder: Path) -> CFGPipeline:
    pipeline = CFGPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def test_learned_ends_are_those_of_the_saved_pipeline(run):
    gamma_0, gamma_1 = (load_file(run / SCHEDULE)[name].item() for name in ("gamma_0", "gamma_1"))
    assert abs(gamma_0 + 13.3) > 0.01
    assert abs(gamma_1 - 5) > 0.01
    remote: Any = DiffusionPipeline.from_pretrained(run, trust_remote_code=True)
    remote.set_progress_bar_config(disable=True)
    images: Any = []
    for pipeline in (load(run), remote):
        config = pipeline.scheduler.config
        assert (config.log_snr_max, config.log_snr_min) == pytest.approx((-gamma_0, -gamma_1), abs=1e-6)
        assert pipeline.unet.noise_process.items() <= config.items()
        assert (pipeline.num_inference_steps, config.variance_interpolation) == (100, 0)
        images.append(pipeline([0, 1], 1.0, 4, generator=generators(0, 1), output_type="pt").images)
    assert_same_draws(images[1], images[0], load(run), 1.0, 4)


def test_the_process_travels_to_the_solvers_of_diffusers_and_back(run):
    pipeline = load(run)
    scheduler = pipeline.scheduler
    for name in CFGPipeline.schedulers:
        pipeline.scheduler = make_scheduler(name, scheduler)
        assert noise_process(pipeline).config.log_snr_max == scheduler.config.log_snr_max
        assert pipeline("three", 0.0, 5, output_type="pt").images.isfinite().all()


def test_averaged_ends_belong_to_the_averaged_network(run):
    """The network's time depends on the ends, so both are averages of the same steps."""
    checkpoint = run / "checkpoint-4"
    raw, averaged = (load_file(checkpoint / name / WEIGHTS) for name in ("noise_schedule", "noise_schedule_ema"))
    assert raw.keys() == averaged.keys() == {"gamma_0", "gamma_1", "w1", "w2", "b2", "w3"}
    assert all(not torch.equal(raw[name], averaged[name]) for name in raw)
    assert_same_tensors(run / SCHEDULE, checkpoint / "noise_schedule_ema" / WEIGHTS)
    assert_same_tensors(run / "unet" / WEIGHTS, checkpoint / "unet_ema" / WEIGHTS)
    schedule = NoiseSchedule()
    schedule.load_state_dict(load_file(run / SCHEDULE))
    assert schedule.ends() == (-scheduler_config(run)["log_snr_max"], -scheduler_config(run)["log_snr_min"])


def test_previews_sample_with_the_averaged_ends(run_and_previews):
    run, ends = run_and_previews
    checkpoints = [run / f"checkpoint-{step}" / "noise_schedule_ema" / WEIGHTS for step in (2, 4)]
    assert ends == [load_file(path)["gamma_0"].item() for path in checkpoints]
    assert ends[0] != ends[1]


def test_logged_parts_add_up_to_the_loss(run):
    logged = {tag: dict(values) for tag, values in scalars(run).items()}
    for step in (1, 2, 3, 4):
        # A step may have no null label.
        kinds = [kind for kind in ("conditional", "null") if step in logged[f"bits_per_dim/{kind}"]]
        for kind in kinds:
            parts = [logged[f"{part}/{kind}"][step] for part in ("prior", "reconstruction", "diffusion")]
            assert sum(parts) == pytest.approx(logged[f"bits_per_dim/{kind}"][step], rel=1e-5)
        weights = {"conditional": 1 - logged["dropout_rate"][step], "null": logged["dropout_rate"][step]}
        mean = sum(weights[kind] * logged[f"bits_per_dim/{kind}"][step] for kind in kinds)
        assert logged["loss"][step] == pytest.approx(mean, rel=1e-5)
    assert len(logged["bits_per_dim/null"]) > 1
    assert logged["gamma_0"][1] == pytest.approx(-13.3)
    assert logged["gamma_0"][4] != logged["gamma_0"][1]
    assert len([tag for tag in logged if tag.startswith("loss/log_snr_")]) == 8
    assert {"grad_norm/unet", "grad_norm/noise_schedule"} <= logged.keys()
    assert math.isfinite(logged["label_gain"][4])


def test_resumed_run_is_the_same_bit_for_bit(run, tmp_path):
    """The schedule and its moments are in the checkpoint, and the ends of earlier previews are not needed."""
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    moments = load_file(tmp_path / "checkpoint-2" / "optimizer-vdm.safetensors")
    assert {
        f"noise_schedule.{name}.exp_avg" for name in ("gamma_0", "gamma_1", "w1", "w2", "b2", "w3")
    } <= moments.keys()
    train_vdm(tmp_path, *FLAGS, "--conditioning_dropout_prob", "0.4", "--resume_from_checkpoint", "latest")
    files = [path.relative_to(run) for path in run.rglob("*.safetensors") if "checkpoint-2" not in path.parts]
    assert len(files) == 7  # two modules, their averages and the moments; the network and the schedule that are saved
    for file in files:
        assert_same_tensors(tmp_path / file, run / file)
    assert scheduler_config(tmp_path) == scheduler_config(run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise_schedule", "linear"], "--noise_schedule was 'learned' and is 'linear'"),
        (["--diffusion_steps", "10"], "--diffusion_steps was 0 and is 10"),
        (["--fourier_features", "7", "8"], r"--fourier_features was \[3, 4, 5, 6, 7, 8\] and is \[7, 8\]"),
        (["--loss_weighting", "simple"], "--loss_weighting was 'bound' and is 'simple'"),
        (["--log_snr_max", "12"], "--log_snr_max was 13.3 and is 12"),
    ],
)
def test_settings_that_cannot_change(run, tmp_path, flags, message):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=message):
        train_vdm(tmp_path, *FLAGS, "--conditioning_dropout_prob", "0.4", *flags, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("noise_schedule", ["fixed", "linear"])
def test_run_without_a_learned_shape(tmp_path, noise_schedule):
    train_vdm(tmp_path, "--noise_schedule", noise_schedule, "--max_train_steps", "2")
    ends = load_file(tmp_path / SCHEDULE)
    assert ends.keys() == {"gamma_0", "gamma_1"}
    config = scheduler_config(tmp_path)
    assert (config["log_snr_max"], config["log_snr_min"]) == (-ends["gamma_0"].item(), -ends["gamma_1"].item())
    has_moved = abs(config["log_snr_max"] - 13.3) > 1e-6
    assert has_moved == (tmp_path / "checkpoint-2" / "noise_schedule").exists() == (noise_schedule == "linear")


def test_run_with_steps_and_weights_that_are_finite(tmp_path):
    """The factor of a single step is 4e7, which clipping of the gradient survives."""
    train_vdm(tmp_path / "steps", "--diffusion_steps", "1", "--max_train_steps", "2", "--report_to", "tensorboard")
    train_vdm(tmp_path / "simple", "--loss_weighting", "simple", "--max_train_steps", "2")
    losses = dict(scalars(tmp_path / "steps")["loss"])
    assert losses[1] > 1e4
    assert all(map(math.isfinite, losses.values()))
    assert sum(value for _, value in scalars(tmp_path / "steps")["skipped_steps"]) == 0
    assert load_file(tmp_path / "simple" / SCHEDULE)["gamma_0"].item() == pytest.approx(-13.3)


@pytest.mark.slow
def test_published_model_is_loaded(hub, monkeypatch, tmp_path):
    """The published model draws the images of the folder, with and without its code; its card names the process."""
    HubClient(monkeypatch, hub, str(tmp_path / "hf"))
    train_vdm(tmp_path / "out", *FLAGS, "--push_to_hub", "--hub_model_id", "me/vdm", "--hub_strategy", "checkpoint")
    files = hub.files("me/vdm")
    assert json.loads(files["scheduler/scheduler_config.json"]) == scheduler_config(tmp_path / "out")
    assert scheduler_config(tmp_path / "out")["log_snr_schedule"] == "linear"
    assert not any("optimizer" in name or "checkpoint" in name for name in files)
    card = files["README.md"].decode()
    assert "class-conditional [variational diffusion model]" in card
    assert "| noise schedule | learned |\n| loss weighting | bound |" in card
    published = CFGPipeline.from_pretrained("me/vdm")
    for name, data in files.items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    remote: Any = DiffusionPipeline.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    images = []
    for pipeline in (load(tmp_path / "out"), published, remote):
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline([0, 1], 1.0, 4, generator=generators(0, 1), output_type="pt").images)
    for image in images[1:]:
        assert_same_draws(image, images[0], published, 1.0, 4)


def test_training_goes_on_from_its_own_models_only(run, trained_model, tmp_path, caplog):
    """A further run starts with the learned ends and the network of the first one."""
    train_vdm(tmp_path / "more", "--pretrained_model_name_or_path", str(run), "--learning_rate", "1e-9",
              "--schedule_learning_rate", "1e-9", "--max_train_steps", "1")  # fmt: skip
    for name in ("log_snr_min", "log_snr_max", "log_snr_schedule", "variance_interpolation"):
        assert scheduler_config(tmp_path / "more")[name] == pytest.approx(scheduler_config(run)[name], abs=1e-6)
    assert_same_tensors(tmp_path / "more" / "unet" / WEIGHTS, run / "unet" / WEIGHTS, atol=1e-6)
    with pytest.raises(UserError, match="was trained with another noise process .log_snr_schedule arctan"):
        train_vdm(tmp_path / "other", "--pretrained_model_name_or_path", str(trained_model))
    assert not (tmp_path / "other").exists()


def test_train_cfg_goes_on_from_a_vdm(run, tmp_path):
    """The noise process and the network are kept; only the loss is that of Algorithm 1."""
    train(tmp_path, "--pretrained_model_name_or_path", str(run), "--max_train_steps", "2")
    pipeline = load(tmp_path)
    process = noise_process(pipeline).config
    assert process.log_snr_schedule == "linear"
    assert (process.log_snr_max, process.log_snr_min) == (
        scheduler_config(run)["log_snr_max"],
        scheduler_config(run)["log_snr_min"],
    )
    assert pipeline.unet.config.fourier_frequencies == load(run).unet.config.fourier_frequencies
    assert isinstance(pipeline.scheduler, diffusers.DPMSolverMultistepScheduler)
    assert pipeline("three", 1.0, output_type="pt").images.isfinite().all()


def test_distilled_vdm_guides_in_one_pass(run, tmp_path):
    """The student has its teacher's process, waves, data and optimizer settings, then takes four steps."""
    config = distill(run, tmp_path / "student", "--max_guidance_scale", "3", "--max_train_steps", "2")
    assert (config.train_val_split, config.adam_beta2, config.conditioning_dropout_prob) == (0.15, 0.99, 0.4)
    distill(tmp_path / "student", tmp_path / "four", "--student_steps", "4", "--teacher_steps", "8")
    for name in ("student", "four"):
        student = load(tmp_path / name)
        process = noise_process(student).config
        assert process.log_snr_schedule == "linear"
        assert process.log_snr_max == scheduler_config(run)["log_snr_max"]
        assert student.unet.config.fourier_frequencies == load(run).unet.config.fourier_frequencies
        sizes: list[int] = []
        student.unet.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        assert student(["three", 7], [0.0, 2.5], output_type="pt").images.isfinite().all()
        assert set(sizes) == {2}  # one pass for both images
    with pytest.raises(UserError, match="guides in one pass up to w = "):
        train_vdm(tmp_path / "more", "--pretrained_model_name_or_path", str(tmp_path / "student"))
