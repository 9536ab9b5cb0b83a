"""Test sampling that starts from an image."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.evaluation.mixture import GaussianMixtureModel
from tests.support.latents import make_vae
from tests.support.models import ddgan, generators, make_pipeline, make_unet

STOCHASTIC = {"LogSNRScheduler", "DDPMScheduler", "DDPMParallelScheduler", "KDPM2AncestralDiscreteScheduler"}
MEAN, STD = 0.3, 0.2


def gaussian(name: str) -> CFGPipeline:
    """Return the exact pipeline of p(x) = N(0.3, 0.2²) for each of four pixels, with a solver."""
    process = LogSNRScheduler(clip_sample=False)
    means, stds = torch.full((1, 1, 2, 2), MEAN), torch.tensor([STD])
    model: Any = GaussianMixtureModel(process, means, stds, torch.tensor([0]))
    pipeline = CFGPipeline(model, process)
    if name != "LogSNRScheduler":
        pipeline.scheduler = process.solver(getattr(diffusers, name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: CFGPipeline, *args: Any, **settings: Any) -> torch.Tensor:
    images = pipeline(*args, **{"output_type": "pt", "num_inference_steps": 10, **settings}).images
    assert isinstance(images, torch.Tensor)
    return images


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_gaussian_is_solved_from_the_noise_level_of_the_strength(name):
    pipeline, number = gaussian(name), 4000 if name in STOCHASTIC else 8
    torch.manual_seed(0)
    noise = torch.randn(number, 1, 2, 2)
    images = torch.full((1, 1, 2, 2), 0.4)  # x = -0.2
    settings = {"num_images_per_label": number, "latents": noise, "output_type": "latent", "num_inference_steps": 250}
    found = draw(pipeline, 0, 0.0, image=images, strength=0.6, **settings)

    log_snr = pipeline.log_snr()
    assert len(log_snr) == (299 if pipeline.scheduler.order == 2 else 150)
    assert -6 < log_snr[0] < -0.5  # so that both x and ε count
    alpha, sigma = (torch.sigmoid(sign * log_snr[0]).sqrt().float() for sign in (1, -1))
    variance = alpha**2 * STD**2 + sigma**2
    deviation = alpha * -0.2 + sigma * noise - alpha * MEAN
    if name not in STOCHASTIC:
        # The probability flow of a Gaussian keeps (z - αμ) / √v.
        torch.testing.assert_close(found, MEAN + STD * deviation / variance.sqrt(), rtol=0, atol=0.01)
        return
    mean = MEAN + alpha * STD**2 / variance * deviation  # of p(x | z), from which the reverse diffusion draws
    std = STD * sigma / variance.sqrt()
    standard_error = std / math.sqrt(mean.numel())
    assert abs((found - mean).mean()) < 4 * standard_error + 0.002
    assert (found - mean).std() == pytest.approx(std.item(), rel=0.05)


@pytest.mark.parametrize("name", ["LogSNRScheduler", "DDIMScheduler", "HeunDiscreteScheduler"])
def test_strength_sets_the_number_of_steps_and_one_ignores_the_image(name):
    pipeline, steps = make_pipeline(), []
    if name != "LogSNRScheduler":
        pipeline.scheduler = pipeline.scheduler.solver(getattr(diffusers, name))
    image = torch.rand(1, 1, 8, 8)

    def count(_: CFGPipeline, step: int, *__: Any) -> None:
        steps.append(step)

    plain = draw(pipeline, [0, 1], generator=generators(0, 1))
    assert torch.equal(draw(pipeline, [0, 1], generator=generators(0, 1), image=image, strength=1), plain)
    for strength, number in ((0.3, 3), (0.55, 5), (None, 8)):
        steps.clear()
        draw(pipeline, 0, image=image, strength=strength, callback_on_step_end=count)
        expected = 2 * number - 1 if name == "HeunDiscreteScheduler" else number
        assert steps == list(range(expected))
        assert pipeline.num_timesteps == len(pipeline.log_snr()) == expected


def test_weak_change_stays_close_to_the_image():
    pipeline = make_pipeline(scheduler=LogSNRScheduler().solver(diffusers.DPMSolverMultistepScheduler))
    image = torch.rand(1, 1, 8, 8)
    weak, strong = (
        (draw(pipeline, 0, image=image, strength=s, generator=generators(0), num_inference_steps=50) - image)
        .abs()
        .max()
        for s in (0.04, 1.0)
    )
    assert weak < 0.1 < strong


def test_guidance_per_step_is_that_of_the_steps_that_are_taken():
    pipeline, asked = make_pipeline(), []

    def scale(log_snr: float) -> float:
        asked.append(log_snr)
        return 1.0

    draw(pipeline, 0, scale, image=torch.rand(1, 1, 8, 8), strength=0.5)
    everything = make_pipeline()
    draw(everything, 0)
    assert asked == everything.log_snr()[5:].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_forms_of_an_image(channels):
    pipeline = make_pipeline(make_unet(in_channels=channels, out_channels=channels))
    pixels = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    pictures = [Image.fromarray(array.squeeze()) for array in arrays]
    expected = draw(pipeline, [0, 1], image=pixels / 255, generator=generators(0, 1))
    other_mode = [picture.convert("RGB") for picture in pictures]
    for image in (pictures, tuple(pictures), other_mode, np.stack(arrays) / 255, [*(pixels / 255)]):
        torch.testing.assert_close(draw(pipeline, [0, 1], image=image, generator=generators(0, 1)), expected)


def test_images_for_all_for_each_label_and_for_each_image():
    pipeline, images = make_pipeline(), torch.rand(4, 1, 8, 8)

    def edit(image: torch.Tensor) -> torch.Tensor:
        settings: dict[str, Any] = {"num_images_per_label": 2, "generator": generators(0, 1, 2, 3), "strength": 0.5}
        return draw(pipeline, [0, 1], image=image, **settings)

    each = edit(images)
    for row in range(4):
        alone = draw(pipeline, row // 2, image=images[row : row + 1], generator=generators(row), strength=0.5)
        torch.testing.assert_close(each[row : row + 1], alone, rtol=0, atol=1e-4)
    assert torch.equal(edit(images[:1]), edit(images[:1].expand(4, -1, -1, -1)))
    assert torch.equal(edit(images[:2]), edit(images[[0, 0, 1, 1]]))


def test_image_is_encoded_to_latents():
    vae = make_vae()
    pipeline = make_pipeline(make_unet(in_channels=2, out_channels=2), LogSNRScheduler(clip_sample=False), vae=vae)
    image = torch.rand(1, *pipeline.image_shape)
    seen = []
    encode = pipeline.encode
    pipeline.encode = lambda images, generator: seen.append(images) or encode(images, generator)  # pyright: ignore
    changed = draw(pipeline, 0, image=image, strength=0.5, generator=generators(0))
    assert changed.shape == image.shape
    torch.testing.assert_close(seen[0], 2 * image - 1)


def test_generator_starts_at_one_of_its_own_steps():
    pipeline = ddgan("--num_timesteps", "4")
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 1, 8, 8)
    changed = draw(pipeline, 0, image=image, strength=0.5, num_inference_steps=4)
    assert pipeline.num_timesteps == 2
    assert changed.isfinite().all()


IMAGE = torch.rand(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.5}, "strength must be None without image; pass image too, but is 0.5"),
        *(({"image": IMAGE, "strength": s}, r"strength must be in \(0, 1\]") for s in (0, -0.1, 1.1, "much", math.nan)),
        ({"image": IMAGE, "strength": 0.05}, "strength 0.05 leaves none of 10 steps. Use at least 1/10"),
        ({"image": torch.rand(1, 1, 8, 9)}, r"image has the shape \(1, 8, 9\).* but this model needs \(1, 8, 8\)"),
        ({"image": torch.rand(1, 3, 8, 8)}, r"image has the shape \(3, 8, 8\)"),
        ({"image": Image.new("L", (9, 8))}, r"image has the shape \(1, 8, 9\)"),
        ({"image": Image.new("RGBA", (8, 8))}, "The mode of image must be one without transparency.*'RGBA'"),
        ({"image": [Image.new("L", (9, 8)), Image.new("L", (8, 8))]}, "image must be a PIL image.* all of one size"),
        ({"image": 255 * IMAGE}, r"The range of image must be in \[0, 1\]"),
        ({"image": IMAGE - 0.5}, r"The range of image must be in \[0, 1\]"),
        ({"image": math.nan * IMAGE}, r"The range of image must be in \[0, 1\]"),
        ({"image": torch.rand(3, 1, 8, 8)}, r"image contains 3 images, but must contain one, .*\(1\).*\(2\)"),
        *(({"image": image}, "image must be a PIL image") for image in ("cat.png", [], 3, ["cat.png"])),
    ],
)
def test_invalid_images(settings, message):
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match=message):
        draw(pipeline, 0, num_images_per_label=2, **settings)
