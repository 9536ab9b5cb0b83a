"""Test that the commands of evaluation take a denoising diffusion GAN as it is, or refuse it by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from diffusers import DDIMScheduler
from PIL import Image

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.evaluation import exactness, in_training, likelihood_run, reports, sampling
from diffusers_cfg.evaluation.in_training import training_evaluation
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.evaluation.sampling import draw_to_folder, load_guide, load_pipeline, only_sampler
from diffusers_cfg.evaluation.settings import PAPER_SCALES, EvaluationConfig, LikelihoodConfig, SampleConfig
from diffusers_cfg.evaluation.sweep import run_sweep
from diffusers_cfg.method_settings import DDGANConfig
from diffusers_cfg.randomness import seeded_generator
from tests.evaluation.test_in_training import ToyMethod
from tests.support.models import ddgan, make_pipeline, make_unet


def save(pipeline: CFGPipeline, folder: Path) -> Path:
    """Save a model whose record names the digits as training data."""
    pipeline.save_pretrained(folder)
    (folder / "run.json").write_text('{"data": {"dataset_name": null}}')
    return folder


def digits_model(**settings) -> CFGPipeline:
    return make_pipeline(make_unet(num_class_embeds=11, **settings), id2label=ddgan().id2label)


@pytest.fixture(scope="module")
def gan(tmp_path_factory) -> Path:
    return save(ddgan(), tmp_path_factory.mktemp("saved") / "gan")


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory) -> Path:
    return save(digits_model(), tmp_path_factory.mktemp("saved") / "cfg")


def sampled(model: Path, *argv: str) -> SampleConfig:
    return parse_config(SampleConfig, ["--model", str(model), "--output_dir", str(model / "images"), *argv])


def evaluated(model: Path, output_dir: Path, statistics_dir: Path, *argv: str) -> EvaluationConfig:
    folders = ["--model", str(model), "--output_dir", str(output_dir), "--statistics_dir", str(statistics_dir)]
    return parse_config(EvaluationConfig, [*folders, "--num_samples", "20", *argv])


def never(*_, **__):
    raise AssertionError("a network was evaluated")


def test_samples_are_those_of_the_pipeline_by_default(tmp_path):
    model = save(ddgan(), tmp_path / "gan")
    draw_to_folder(sampled(model, "--num_samples", "3"), Accelerator(cpu=True))
    pipeline = CFGPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    generators = [seeded_generator("cpu", 0, "sample", index) for index in range(3)]
    drawn = np.asarray(pipeline([0, 1, 2], generator=generators, output_type="np").images)
    for index, name in enumerate(("zero", "one", "two")):
        image = np.asarray(Image.open(model / "images" / name / f"{index:06}.png"), dtype=float)
        assert np.abs(image - drawn[index, ..., 0] * 255).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_inference_steps", "3"], "num_inference_steps is 3, but .* trained to generate in 2 steps .* Leave it"),
        (["--num_inference_steps", "1"], "num_inference_steps is 1, but"),
        (["--scheduler", "DDIMScheduler"], "--scheduler DDIMScheduler is not supported by a denoising diffusion GAN"),
        (["--scheduler", "LogSNRScheduler"], "--scheduler LogSNRScheduler is .* steps of its own DDPMScheduler"),
        (["--guider", "ClassifierFreeGuidance"], "--guider: no effect at w = 0, .* set --guidance_scale"),
        (["--guidance_interval", "1", "5"], "--guidance_interval: no effect at w = 0"),
        (["--guidance_rescale", "0.5", "--guide_model", "GAN"], "--guidance_rescale, --guide_model: no effect at"),
        (["--guide_model", "CFG"], "--guide_model .* It is a diffusion model, and cannot guide a denoising diff"),
    ],
)
def test_what_does_not_fit_a_generator_is_refused_before_it_draws(
    gan, diffusion_model, tmp_path, monkeypatch, argv, message
):
    monkeypatch.setattr(sampling, "draw_sets", never)
    models = {"GAN": str(gan), "CFG": str(diffusion_model)}
    argv = [str(models.get(argument, argument)) for argument in argv]
    with pytest.raises(UserError, match=message):
        draw_to_folder(sampled(gan, "--output_dir", str(tmp_path / "images"), *argv), Accelerator(cpu=True))
    with pytest.raises(UserError, match=message):
        run_sweep(evaluated(gan, tmp_path / "out", tmp_path / "statistics", *argv), Accelerator(cpu=True))
    assert not any(tmp_path.iterdir())


def test_other_kinds_of_guides_are_refused(gan, diffusion_model, tmp_path):
    other = save(ddgan("--num_timesteps", "4"), tmp_path / "other")
    for model, guide, message in (
        (diffusion_model, gan, "It is a denoising diffusion GAN, and cannot guide a diffusion model"),
        (gan, other, "DDPMScheduler does not match the noise process .*num_train_timesteps 4 instead of 2"),
    ):
        with pytest.raises(UserError, match=f"--guide_model {guide} cannot be loaded: {message}"):
            load_pipeline(sampled(model, "--guide_model", str(guide), "--guidance_scale", "1"), "cpu")
    pipeline = load_pipeline(sampled(gan), "cpu")
    assert load_guide(str(gan), pipeline).latent_dim == 6


def test_evaluation_defaults_to_no_guidance(gan, digits, statistics_dir, tmp_path, monkeypatch):
    """A guided evaluation is one that is asked for. That during training gives the same metrics."""
    monkeypatch.setattr(reports, "plot_curves", lambda *_: None)
    record = run_sweep(evaluated(gan, tmp_path / "out", statistics_dir), Accelerator(cpu=True))
    (row,) = record["results"]
    assert (row["guidance_scale"], row["network_evaluations"]) == (0.0, 2)
    assert (record["num_inference_steps"], record["scheduler"]) == (2, "DDPMScheduler")
    assert row["worst_class_accuracy"] == min(row["accuracy_by_class"].values()) <= row["class_accuracy"]
    assert "| class accuracy | worst class |" in (tmp_path / "out" / "metrics.md").read_text()

    argv = ["--guidance_scales", "0", "1", "--guide_model", str(gan), "--scheduler", "DDPMScheduler"]
    guided = run_sweep(evaluated(gan, tmp_path / "guided", statistics_dir, *argv), Accelerator(cpu=True))
    assert [row["network_evaluations"] for row in guided["results"]] == [2, 4]
    assert guided["results"][0] == row

    monkeypatch.setattr(in_training, "CACHE_DIR", statistics_dir)
    pipeline = CFGPipeline.from_pretrained(gan)
    method = ToyMethod(pipeline=pipeline, guidance_scales=[0.0], num_inference_steps=2)
    config = parse_config(DDGANConfig, ["--num_eval_samples", "20", "--eval_steps", "1"])
    metrics = training_evaluation(method, config, Accelerator(cpu=True), digits)(pipeline)
    for name in ("frechet_distance", "precision", "recall", "class_accuracy", "worst_class_accuracy"):
        assert metrics[f"{name}/w=0"] == pytest.approx(row[name], rel=1e-6), name


def test_other_models_keep_their_guidance_scales(diffusion_model, tmp_path):
    pipeline = load_pipeline(sampled(diffusion_model), "cpu")
    assert sampling.guidance_scales(sampled(diffusion_model), pipeline) == [1.0]
    config = evaluated(diffusion_model, tmp_path, tmp_path, "--guidance_interval", "1", "2")
    assert sampling.guidance_scales(config, pipeline) == PAPER_SCALES
    assert sampling.guidance_scales(sampled(diffusion_model, "--guidance_scale", "0"), pipeline) == [0.0]


def test_only_sampler_is_that_of_generators_and_few_step_students():
    ddim = LogSNRScheduler().solver(DDIMScheduler)
    assert only_sampler(ddgan("--num_timesteps", "4")) == ("DDPMScheduler", 4)
    student = make_pipeline(make_unet(max_guidance_scale=4.0), ddim, num_inference_steps=8)
    assert only_sampler(student) == ("DDIMScheduler", 8)
    assert only_sampler(make_pipeline(make_unet(max_guidance_scale=4.0))) is None
    assert only_sampler(make_pipeline(scheduler=ddim)) is None


def test_a_generator_has_no_noise_process_in_continuous_time(gan, tmp_path, monkeypatch):
    message = "gan is a denoising diffusion GAN: its generator draws images in 2 steps and predicts at no other"
    monkeypatch.setattr(UNet2DCFGModel, "forward", never)
    config = parse_config(LikelihoodConfig, ["--model", str(gan), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match=message):
        noise_process(CFGPipeline.from_pretrained(gan))
    with pytest.raises(UserError, match=message):
        likelihood_run.run_likelihood(config, Accelerator(cpu=True))
    with pytest.raises(UserError, match=message):
        exactness.check_rules(EvaluationConfig(model=str(gan), guidance_scales=[2.0], num_inference_steps=20))
    assert not any(tmp_path.iterdir())


def test_seconds_are_recorded_in_the_shards(gan, tmp_path, statistics_dir, monkeypatch):
    monkeypatch.setattr(reports, "plot_curves", lambda *_: None)
    run_sweep(evaluated(gan, tmp_path / "out", statistics_dir), Accelerator(cpu=True))
    with np.load(tmp_path / "out" / "samples" / "w=0" / "shard-00000.npz") as file:
        assert 0 < file["seconds"] < 10
    assert "seconds" not in json.dumps(json.loads((tmp_path / "out" / "metrics.json").read_text()))
