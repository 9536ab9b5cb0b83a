"""Test that schedules sample what the pipeline samples."""

import dataclasses

import pytest
import torch

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.sampling import make_scheduler
from diffusers_cfg.export.graph import GuidedPrediction
from diffusers_cfg.export.schedule import Schedule, make_schedule
from tests.support.models import make_pipeline, make_unet, vdm

LABELS, SCALES = torch.tensor([0, 1, 2, 3]), torch.tensor([-1.0, 0.0, 1.0, 2.5])
ADDING_NOISE = {"LogSNRScheduler", "DDPMScheduler", "DDPMParallelScheduler", "KDPM2AncestralDiscreteScheduler"}
DETERMINISTIC = sorted({*CFGPipeline.schedulers} - ADDING_NOISE)


def with_scheduler(name: str, prediction_type: str = "v_prediction", **settings) -> CFGPipeline:
    """Return a pipeline with random weights and a scheduler of diffusers."""
    pipeline = make_pipeline(make_unet(), LogSNRScheduler(prediction_type=prediction_type))
    torch.nn.init.normal_(pipeline.unet.conv_out.weight, std=0.05)
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler, **settings)
    return pipeline


def draw(schedule: Schedule, pipeline: CFGPipeline, noise: torch.Tensor) -> torch.Tensor:
    """Sample by a schedule, given as many images as `LABELS`."""
    guided = GuidedPrediction(pipeline)
    with torch.no_grad():
        return schedule.draw(noise, lambda z, i: guided(z, torch.tensor(schedule.timesteps[i]), LABELS, SCALES))


def assert_samples_as_the_pipeline(pipeline: CFGPipeline, steps: int) -> None:
    """Assert that a schedule and its JSON draw the images of the pipeline, to the precision of float32."""
    noise = torch.randn(4, *pipeline.sample_shape, generator=torch.Generator().manual_seed(1))
    labels = LABELS.where(pipeline.num_classes > LABELS, -1)
    call = {"guidance_scale": SCALES, "num_inference_steps": steps, "latents": noise, "output_type": "latent"}
    (expected,) = pipeline(labels, return_dict=False, **call)
    schedule = make_schedule(pipeline.scheduler, steps)
    scale = expected.abs().max().clamp(min=1)
    for one in (schedule, Schedule(**schedule.to_json())):
        assert (draw(one, pipeline, noise) - expected).abs().max() / scale < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_samples_equal_those_of_the_pipeline(name, prediction_type):
    if name == "KDPM2DiscreteScheduler" and prediction_type == "sample":
        pytest.skip("this scheduler does not know predictions of x")
    assert_samples_as_the_pipeline(with_scheduler(name, prediction_type), 5)


def test_more_steps_and_other_settings_equal_the_pipeline():
    assert_samples_as_the_pipeline(with_scheduler("DPMSolverMultistepScheduler"), 24)
    assert_samples_as_the_pipeline(with_scheduler("DPMSolverMultistepScheduler", thresholding=False), 12)
    assert_samples_as_the_pipeline(with_scheduler("DPMSolverMultistepScheduler", solver_order=3), 12)
    assert_samples_as_the_pipeline(with_scheduler("DDIMScheduler", clip_sample_range=0.5, thresholding=False), 10)


def test_a_variational_diffusion_model_equals_the_pipeline():
    pipeline = vdm()
    torch.nn.init.normal_(pipeline.unet.conv_out.weight, std=0.05)
    pipeline.scheduler = make_scheduler("DPMSolverMultistepScheduler", pipeline.scheduler)
    assert_samples_as_the_pipeline(pipeline, 8)


@pytest.mark.parametrize("name", sorted(ADDING_NOISE))
def test_schedulers_that_draw_noise_are_refused(name):
    scheduler, before = with_scheduler(name).scheduler, torch.get_rng_state()
    with pytest.raises(UserError, match=f"{name} .* draws noise.*--scheduler DPMSolverMultistepScheduler"):
        make_schedule(scheduler, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_dynamic_thresholding_is_refused():
    scheduler = with_scheduler("DPMSolverMultistepScheduler", sample_max_value=2.0).scheduler
    with pytest.raises(UserError, match="not a linear function"):
        make_schedule(scheduler, 5)


def test_a_prediction_that_a_scheduler_does_not_know_is_refused():
    with pytest.raises(UserError, match="KDPM2DiscreteScheduler cannot sample this model: prediction_type"):
        make_schedule(with_scheduler("KDPM2DiscreteScheduler", "sample").scheduler, 5)


def test_the_form_of_a_schedule():
    schedule = make_schedule(with_scheduler("DPMSolverMultistepScheduler").scheduler, 6)
    assert [len(row) for row in schedule.combinations] == [1, 2, 3, 4, 5, 6, 7]
    assert schedule.timesteps == sorted(schedule.timesteps, reverse=True)
    assert schedule.clip == 1
    assert dataclasses.replace(schedule, **schedule.to_json()).combinations != []
