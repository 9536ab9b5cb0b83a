"""Test several calls of one pipeline at a time, what a callback can read and do, and the numbers of steps."""

import threading
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from tests.support.models import generators, make_pipeline, make_unet

STEPS = (4, 5, 8, 10, 2, 4)  # divisors of 1000, for DDIM


def make_default_pipeline(name: str) -> CFGPipeline:
    """Return a pipeline with one small block, whose scheduler was made from that of a newly trained model."""
    unet = make_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    pipeline = make_pipeline(unet, scheduler=LogSNRScheduler().solver(diffusers.DPMSolverMultistepScheduler))
    pipeline.scheduler = getattr(diffusers, name, LogSNRScheduler).from_config(pipeline.scheduler.config)
    return pipeline


def draw(pipeline: CFGPipeline, k: int, **settings: Any) -> torch.Tensor:
    """Return the image that user k asks for."""
    call = {"num_inference_steps": STEPS[k], "generator": generators(k), "output_type": "latent", **settings}
    images = pipeline(k % 3, **call).images
    assert isinstance(images, torch.Tensor)
    return images


def apg() -> AdaptiveProjectedGuidance:
    return AdaptiveProjectedGuidance(
        2.0, use_original_formulation=True, eta=0.0, adaptive_projected_guidance_momentum=-0.5
    )


SHARED = ["LogSNRScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "APG"]


@pytest.mark.parametrize("name", SHARED)
def test_six_threads_draw_their_own_images(name):
    pipeline = make_default_pipeline(name if name != "APG" else "UniPCMultistepScheduler")
    settings = {"guider": apg()} if name == "APG" else {}
    expected, images = [draw(pipeline, k, **settings) for k in range(6)], {}
    threads = [threading.Thread(target=lambda k=k: images.update({k: draw(pipeline, k, **settings)})) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(images[k], expected[k]) for k in range(6))


@pytest.mark.parametrize("name", ["LogSNRScheduler", "UniPCMultistepScheduler", "APG"])
def test_call_inside_a_callback_changes_nothing(name):
    pipeline = make_default_pipeline(name if name != "APG" else "UniPCMultistepScheduler")
    settings: dict[str, Any] = {"guider": apg()} if name == "APG" else {}
    outer, inner, inside = draw(pipeline, 0, **settings), draw(pipeline, 1, **settings), []

    def call_again(*_: Any) -> None:
        inside.append(draw(pipeline, 1, **settings))

    assert torch.equal(draw(pipeline, 0, callback_on_step_end=call_again, **settings), outer)
    assert len(inside) == STEPS[0]
    assert all(torch.equal(image, inner) for image in inside)


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_call_leaves_the_scheduler_and_the_guider_as_they_were(name):
    pipeline = make_default_pipeline(name)
    kept = (apg(), pipeline.scheduler)
    before = [
        {name: list(value) if isinstance(value, list) else value for name, value in vars(x).items()} for x in kept
    ]
    draw(pipeline, 0, guider=kept[0])
    assert pipeline.scheduler is kept[1]
    for part, attributes in zip(kept, before, strict=True):
        for attribute, value in attributes.items():
            now = getattr(part, attribute)
            assert now == value if isinstance(value, list) else now is value, attribute


def test_callback_can_stop_the_sampling(pipeline):
    steps = []

    def stop_after_two(pipe: CFGPipeline, step: int, *_: Any) -> None:
        steps.append(step)
        pipe._interrupt = step == 1

    latents, kept = draw(pipeline, 3, callback_on_step_end=stop_after_two), []
    assert steps == [0, 1]
    assert pipeline.interrupt
    draw(pipeline, 3, callback_on_step_end=lambda *arguments: kept.append(arguments[3]["latents"]))
    assert torch.equal(latents, kept[1])
    assert (len(kept), pipeline.interrupt) == (STEPS[3], False)


def test_callback_can_read_the_call(pipeline):
    seen = []

    def read(pipe: CFGPipeline, *_: Any) -> None:
        seen.append((pipe.num_timesteps, pipe.guidance_scale, len(pipe.log_snr())))

    draw(pipeline, 0, guidance_scale=[2.0], callback_on_step_end=read)
    assert seen == [(4, [2.0], 4)] * 4
    draw(pipeline, 0)
    assert pipeline.guidance_scale == 1.0
    draw(pipeline, 0, guider=apg())
    assert pipeline.guidance_scale is None
    student = make_pipeline(make_unet(max_guidance_scale=0.5))
    draw(student, 0)
    assert student.guidance_scale == 0.5


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_every_listed_scheduler_takes_2_to_1000_steps(name):
    """
    With the exact ε for data that is one known image, any number of steps returns that image, or is refused. Solvers
    that round their timesteps have equal ones at the noisy end, and used to step past the last one.
    """
    target, reference = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8), LogSNRScheduler()

    def exact(z, t, class_labels):
        alpha, sigma = reference.alpha_sigma(reference.u(t.double()))
        return UNet2DOutput(sample=((z - alpha * target) / sigma).float())

    pipeline = make_default_pipeline(name)
    pipeline.unet.forward = exact
    refused = {"DEISMultistepScheduler": [1], "KDPM2AncestralDiscreteScheduler": [2]}
    for steps in (1, 2, 3, 7, 1000):
        call = {"guidance_scale": 0.0, "num_inference_steps": steps}
        if steps in (refused.get(name, []) if "DDIM" not in name else [3, 7]):
            with pytest.raises(ValueError, match=f"{name} cannot take {steps} steps"):
                draw(pipeline, 0, **call)
        else:
            torch.testing.assert_close(draw(pipeline, 0, **call), target, atol=0.05, rtol=0)
