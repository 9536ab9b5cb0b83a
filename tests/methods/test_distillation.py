"""Test distillation: students that guide in one pass or in few steps."""

import json
from itertools import pairwise

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.method_settings import CFGConfig, DistillationConfig
from diffusers_cfg.methods import distillation
from diffusers_cfg.methods.distillation import ddim_step, few_step_target
from tests.support.runs import WEIGHTS, assert_same_tensors, distill, train

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


@pytest.fixture(scope="module")
def teacher(trained_model):
    return trained_model


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "out"
    distill(teacher, folder, "--max_guidance_scale", "3")
    return folder


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_step_matches_diffusers(prediction_type):
    scheduler = LogSNRScheduler(prediction_type=prediction_type)
    stock = scheduler.solver(diffusers.DDIMScheduler)
    stock.set_timesteps(4)
    z, pred = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for step, t in enumerate(stock.timesteps):
        u = torch.full((3,), 1 - step / 4)
        expected = stock.step(pred, t, z, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ddim_step(scheduler, pred, z, u, u - 1 / 4), expected, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("teacher_steps", [1, 2, 5])
def test_one_step_with_the_target_matches_the_teachers_steps(prediction_type, teacher_steps):
    scheduler = LogSNRScheduler(prediction_type=prediction_type, clip_sample=False)
    u, next_u = torch.tensor([1.0, 0.5, 0.25]).double(), torch.tensor([0.75, 0.25, 0.0]).double()
    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []

    def predict(z, t):
        seen.append(scheduler.u(t))
        return torch.sin(3 * z) + t.view(-1, 1, 1, 1) / 1000

    target = few_step_target(scheduler, predict, z, u, next_u, teacher_steps)
    assert len(seen) == teacher_steps
    torch.testing.assert_close(seen[-1], u + (next_u - u) * (teacher_steps - 1) / teacher_steps)
    levels, end = [*seen, next_u], z
    for current, following in pairwise(levels):
        end = ddim_step(scheduler, predict(end, scheduler.timestep(current)), end, current, following)
    torch.testing.assert_close(ddim_step(scheduler, target, z, u, next_u), end)
    if teacher_steps == 1:
        torch.testing.assert_close(target, predict(z, scheduler.timestep(u)))


def test_student_target_is_the_guided_teacher(teacher, tmp_path, monkeypatch):
    inputs, targets = [], []
    forward, error = UNet2DCFGModel.forward, distillation.squared_error

    def spy_on_forward(self, z, t, class_labels, **kwargs):
        if "guidance_scale" in kwargs and self.training:
            inputs.append((z, t, class_labels, kwargs["guidance_scale"]))
        return forward(self, z, t, class_labels=class_labels, **kwargs)

    def spy_on_error(pred, target):
        targets.append(target)
        return error(pred, target)

    monkeypatch.setattr(UNet2DCFGModel, "forward", spy_on_forward)
    monkeypatch.setattr(distillation, "squared_error", spy_on_error)
    distill(teacher, tmp_path, "--max_guidance_scale", "2.5", "--conditioning_dropout_prob", "0.5")
    monkeypatch.undo()

    unet = CFGPipeline.from_pretrained(teacher).unet
    assert len(inputs) == len(targets) == 4
    for (z, t, c, w), target in zip(inputs, targets, strict=True):
        with torch.no_grad():
            conditional, unconditional = unet(z, t, class_labels=c).sample, unet(z, t).sample
        s = 1 + w.view(-1, 1, 1, 1)
        torch.testing.assert_close(target, s * conditional - (s - 1) * unconditional, rtol=1e-4, atol=1e-5)
    scales = torch.cat([w for *_, w in inputs])
    assert 0 <= scales.min() < 0.6
    assert 1.9 < scales.max() <= 2.5
    assert {*torch.cat([c for _, _, c, _ in inputs]).tolist()} > {10}


@pytest.mark.parametrize(
    ("argv", "held_out"),
    [
        ([], 0.25),
        (["--train_val_split", "0.5"], 0.5),
        (["--train_val_split", "0"], 0.0),
        (["--dataset_name", "pets"], 0.25),
        (["--dataset_name", "cars"], 0.0),
        (["--dataset_split", "test"], 0.0),
        (["--dataset_name", "cars", "--streaming"], 0.0),
        (["--resolution", "16"], 0.25),
    ],
)
def test_a_student_holds_out_its_teachers_images(tmp_path, argv, held_out):
    """Of other data it holds out what its own flags say."""
    CFGConfig(dataset_name="pets", train_val_split=0.25).save(tmp_path / "train_config.yaml")
    config = parse_config(DistillationConfig, ["--teacher", str(tmp_path), *argv])
    assert config.train_val_split == held_out


def test_a_student_loads_and_guides_in_one_pass(teacher, student):
    pipeline = CFGPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.max_guidance_scale == 3.0
    assert pipeline.id2label[3] == "three"
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    pipeline(["three", 7, -1], [0.0, 2.5, 1.0])
    assert sizes == [3] * 12
    with pytest.raises(ValueError, match="trained for 0 … 3"):
        pipeline("three", 4.0)
    # Training changed the embedding of w, which starts at zero
    weights = load_file(student / "unet" / WEIGHTS)
    assert weights["guidance_embedding.linear_2.weight"].any()


def test_data_and_optimization_default_to_the_teachers(teacher):
    config = parse_config(DistillationConfig, ["--teacher", str(teacher), "--learning_rate", "0.5"])
    of_teacher = CFGConfig.load(teacher / "train_config.yaml")
    assert (config.train_batch_size, config.max_train_steps) == (8, 4)
    assert (config.resolution, config.learning_rate, of_teacher.learning_rate) == (8, 0.5, 1e-3)
    assert config.output_dir == "cfg-model"  # not the teacher's output_dir


def test_few_step_student(student, tmp_path):
    distill(student, tmp_path / "four", "--student_steps", "4", "--teacher_steps", "8")
    index = json.loads((tmp_path / "four" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    pipeline = CFGPipeline.from_pretrained(tmp_path / "four")
    pipeline.set_progress_bar_config(disable=True)
    timesteps = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: timesteps.append(inputs[1].item()))
    pipeline("three", 1.5)
    assert timesteps == [999, 749, 499, 249]

    with pytest.raises(UserError, match="--teacher_steps is 8, but the teacher was distilled to 4 steps"):
        distill(tmp_path / "four", tmp_path / "two", "--student_steps", "2", "--teacher_steps", "8")
    distill(tmp_path / "four", tmp_path / "two", "--student_steps", "2", "--teacher_steps", "4")
    assert CFGPipeline.from_pretrained(tmp_path / "two").num_inference_steps == 2


def test_few_step_student_trains_at_its_sampling_timesteps(student, tmp_path, monkeypatch):
    timesteps, forward = [], UNet2DCFGModel.forward

    def spy_on_forward(self, z, t, class_labels, **kwargs):
        if self.training:
            timesteps.extend(t.tolist())
        return forward(self, z, t, class_labels=class_labels, **kwargs)

    monkeypatch.setattr(UNet2DCFGModel, "forward", spy_on_forward)
    distill(student, tmp_path, "--student_steps", "4", "--teacher_steps", "4")
    assert {round(t, 3) for t in timesteps} == {999, 749, 499, 249}


def test_resumed_distillation_is_bit_exact(teacher, student, tmp_path):
    flags = ["--max_guidance_scale", "3", "--resume_from_checkpoint", "checkpoint-2", "--output_dir", str(tmp_path)]
    (tmp_path / "checkpoint-2").symlink_to(student / "checkpoint-2")
    distill(teacher, tmp_path, *flags)
    assert_same_tensors(tmp_path / "unet" / WEIGHTS, student / "unet" / WEIGHTS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--student_steps", "3"], "--student_steps must divide 1000.* but is 3"),
        (["--student_steps", "8", "--teacher_steps", "12"], "--teacher_steps 12"),
        (["--student_steps", "0"], "student_steps must be at least 1, but is 0"),
        (["--max_guidance_scale", "0"], "max_guidance_scale must be a positive number, but is 0"),
        (["--block_out_channels", "8"], "block_out_channels: the network comes from --pretrained_model_name_or_path"),
        (["--prediction_type", "epsilon"], "prediction_type: the student inherits this from --teacher"),
        (["--log_snr_max", "5"], "log_snr_max: the student inherits this from --teacher"),
        (["--teacher_steps", "16"], "teacher_steps: no effect without --student_steps"),
        (["--student_steps", "8", "--teacher_steps", "2000"], r"teacher_steps must lie in \[1, 1000\]"),
        (["--student_steps", "8", "--num_inference_steps", "9"], "num_inference_steps: the student samples in 8 steps"),
        (["--pretrained_model_name_or_path", "m"], "pretrained_model_name_or_path: the student inherits this"),
        (["--learning_rat", "1"], None),
    ],
)
def test_invalid_flags_are_refused(teacher, argv, message):
    with pytest.raises(UserError if message else SystemExit, match=message):
        parse_config(DistillationConfig, ["--teacher", str(teacher), *argv])


@pytest.mark.parametrize("text", ["prediction_type: epsilon\n", "log_snr_min: -9\n", "teacher_steps: 16\n"])
def test_settings_of_the_teacher_in_a_file_are_refused(teacher, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=f"{text.split(':')[0]}: (the student inherits this|no effect)"):
        parse_config(DistillationConfig, ["--teacher", str(teacher), "--config", str(tmp_path / "run.yaml")])


def test_settings_of_a_student_say_what_was_done(student):
    saved = (student / "train_config.yaml").read_text()
    assert not any(name in saved for name in ("prediction_type", "log_snr_min", "block_out_channels"))
    assert parse_config(DistillationConfig, ["--config", str(student / "train_config.yaml")]).max_guidance_scale == 3


def test_samples_outside_the_range_of_the_student_are_named(teacher, tmp_path, caplog):
    distill(teacher, tmp_path, "--max_guidance_scale", "3", "--validation_guidance_scales", "0", "4", "--dry_run")
    assert "The samples leave out w = [4.0]: the network learns 0 to 3." in caplog.text


def test_invalid_teachers_are_refused(student, tmp_path):
    with pytest.raises(UserError, match="already guides in one pass. Set --student_steps"):
        distill(student, tmp_path / "out")
    with pytest.raises(UserError, match="--max_guidance_scale is 4, but the teacher was trained with 3"):
        distill(student, tmp_path / "out", "--student_steps", "4", "--max_guidance_scale", "4")
    train(tmp_path / "plain", "--conditioning_dropout_prob", "0", "--max_train_steps", "1")
    with pytest.raises(UserError, match="conditioning_dropout_prob = 0"):
        distill(tmp_path / "plain", tmp_path / "out", "--conditioning_dropout_prob", "0.1")
    assert not (tmp_path / "out").exists()


def test_training_from_a_student_is_refused(student, tmp_path):
    with pytest.raises(UserError, match="guides in one pass up to w = 3, which other training would undo"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(student))


@pytest.mark.slow
def test_a_student_learns_its_teachers_guidance(tmp_path):
    """The student is far closer to the guided teacher than the teacher without guidance is."""
    train(tmp_path / "teacher", "--max_train_steps", "300", "--train_batch_size", "32", "--checkpointing_steps", "0")
    distill(
        tmp_path / "teacher", tmp_path / "student",
        "--max_train_steps", "400", "--train_batch_size", "32", "--checkpointing_steps", "0",
    )  # fmt: skip
    images = {}
    for name, folder, w in (("guided", "teacher", 2.0), ("student", "student", 2.0), ("plain", "teacher", 0.0)):
        pipeline = CFGPipeline.from_pretrained(tmp_path / folder)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(40) % 10
        images[name] = pipeline(labels, w, latents=noise, output_type="pt").images
    student_error, plain_error = ((images["guided"] - images[name]).square().mean() for name in ("student", "plain"))
    assert student_error < 0.3 * plain_error
