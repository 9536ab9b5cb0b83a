"""Test sampling that keeps a part of an image."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from PIL import Image

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.evaluation.mixture import GaussianMixtureModel
from tests.support.latents import make_vae
from tests.support.models import ddgan, generators, make_pipeline, make_unet

SIZE = 8
LEFT = torch.cat([torch.zeros(1, 1, SIZE, SIZE // 2), torch.ones(1, 1, SIZE, SIZE // 2)], -1)  # the left half is kept


def draw(pipeline: CFGPipeline, *args: Any, **settings: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(*args, **{"output_type": "pt", "num_inference_steps": 10, **settings}).images
    assert isinstance(images, torch.Tensor)
    return images


def exact(model: type[GaussianMixtureModel], means: torch.Tensor, std: float, name: str, **config: Any) -> CFGPipeline:
    """Return a pipeline of components around 2×2 images, of one class, with a solver."""
    process = LogSNRScheduler(clip_sample=False, **config)
    number = len(means)
    network: Any = model(process, means, torch.full((number,), std), torch.zeros(number, dtype=torch.int64))
    pipeline = CFGPipeline(network, process)
    if name != "LogSNRScheduler":
        pipeline.scheduler = process.solver(getattr(diffusers, name))
    return pipeline


def complete(pipeline: CFGPipeline, kept: int, value: float, **settings: Any) -> torch.Tensor:
    """Return 1,000 samples of 2×2 pixels, `(1000, 4)`, of which the first `kept` are given and have one value."""
    mask = torch.ones(4)
    mask[:kept] = 0
    image = torch.full((1, 1, 2, 2), (1 + value) / 2)
    settings = {"num_images_per_label": 1000, "output_type": "latent", "num_inference_steps": 50, **settings}
    generator = torch.Generator().manual_seed(0)
    samples = draw(pipeline, 0, 0.0, image=image, mask_image=mask.view(1, 1, 2, 2), generator=generator, **settings)
    samples = samples.flatten(1)
    torch.testing.assert_close(samples[:, :kept], torch.full((1000, kept), value))
    return samples


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_one_pixel_tells_the_component_of_the_others(name):
    # p(x) = ½ N(½, 0.2² I) + ½ N(-½, 0.2² I): the odds of the first component at x₁ = ½ are exp(12.5) to 1.
    means = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    samples = complete(exact(GaussianMixtureModel, means, 0.2, name), kept=1, value=0.5)[:, 1:]
    right = samples.mean(1) > 0
    assert right.float().mean() > 0.88  # 0.6 to 0.7 if the kept part is only replaced
    assert samples[right].mean() == pytest.approx(0.5, abs=0.05)
    assert samples[right].std() == pytest.approx(0.2, abs=0.03)


class CorrelatedGaussian(GaussianMixtureModel):
    """The optimal network for p(x) = N(0, C), where four pixels have the variance 0.25 and the correlation 0.9."""

    covariance = 0.25 * (0.1 * torch.eye(4) + 0.9)

    def expected_noise_and_sample(self, z, alpha, sigma, class_labels=None):
        variance = alpha.flatten()[0] ** 2 * self.covariance + sigma.flatten()[0] ** 2 * torch.eye(4)
        x = (alpha.view(-1, 1) * z.flatten(1) @ torch.linalg.solve(variance, self.covariance)).view_as(z)
        return (z - alpha * x) / sigma, x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kept", [1, 2])
def test_samples_have_the_conditional_mean_of_a_gaussian(kept, prediction_type):
    pipeline = exact(
        CorrelatedGaussian, torch.zeros(1, 1, 2, 2), 0.5, "LogSNRScheduler", prediction_type=prediction_type
    )
    samples = complete(pipeline, kept, value=0.4)[:, kept:]
    covariance = CorrelatedGaussian.covariance
    gain = covariance[kept:, :kept] @ torch.linalg.inv(covariance[:kept, :kept])
    conditional = covariance[kept:, kept:] - gain @ covariance[:kept, kept:]
    mean, std = (gain.sum(1) * 0.4).mean().item(), conditional.diag().mean().sqrt().item()
    assert samples.mean() == pytest.approx(mean, abs=0.06)  # 0.36, 0.38; unconditionally 0
    assert samples.std() == pytest.approx(std, abs=0.04)  # 0.22, 0.19; unconditionally 0.5


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_black_is_kept_and_white_is_generated(name):
    pipeline = make_pipeline()
    if name != "LogSNRScheduler":
        pipeline.scheduler = pipeline.scheduler.solver(getattr(diffusers, name))
    image = torch.rand(2, 1, SIZE, SIZE)
    images = draw(pipeline, [0, 1], image=image, mask_image=LEFT, generator=generators(0, 1))
    black = (LEFT == 0).expand_as(image)
    torch.testing.assert_close(images[black], image[black], rtol=0, atol=1e-6)
    assert (images[~black] - image[~black]).abs().mean() > 0.1


def test_white_mask_changes_nothing_and_black_mask_returns_the_image():
    pipeline, image = make_pipeline(), torch.rand(1, 1, SIZE, SIZE)
    plain = draw(pipeline, 0, generator=generators(0))
    white = draw(pipeline, 0, image=image, mask_image=torch.ones(1, 1, SIZE, SIZE), generator=generators(0))
    torch.testing.assert_close(white, plain, rtol=0, atol=1e-4)
    black = draw(pipeline, 0, image=image, mask_image=torch.zeros(1, 1, SIZE, SIZE), generator=generators(0))
    torch.testing.assert_close(black, image, rtol=0, atol=1e-6)


def test_kept_part_moves_the_generated_part():
    pipeline = make_pipeline()
    one, other = (
        draw(pipeline, 0, image=torch.full((1, 1, SIZE, SIZE), value), mask_image=LEFT, generator=generators(0))
        for value in (0.0, 1.0)
    )
    assert (one - other)[..., SIZE // 2 :].abs().max() > 0.01


def test_strength_starts_the_generated_part_from_the_image():
    pipeline, image = make_pipeline(), torch.rand(1, 1, SIZE, SIZE)
    settings = {"image": image, "mask_image": LEFT, "num_inference_steps": 50}
    weak = draw(pipeline, 0, strength=0.04, generator=generators(0), **settings)
    assert pipeline.num_timesteps == 2
    strong = draw(pipeline, 0, generator=generators(0), **settings)
    assert pipeline.num_timesteps == 50
    assert (weak - image).abs().max() < 0.2 < (strong - image).abs().max()


def test_forms_of_a_mask():
    pipeline, image = make_pipeline(), torch.rand(1, 1, SIZE, SIZE)
    array = LEFT[0, 0].numpy()
    picture = Image.fromarray((255 * array).astype(np.uint8))
    expected = draw(pipeline, 0, image=image, mask_image=LEFT, generator=generators(0))
    for mask in (picture, picture.convert("RGB"), [picture], array[None, ..., None], 0.2 + 0.6 * LEFT):
        assert torch.equal(draw(pipeline, 0, image=image, mask_image=mask, generator=generators(0)), expected)


def test_guiders_and_inference_mode():
    pipeline, image = make_pipeline(), torch.rand(1, 1, SIZE, SIZE)
    settings = {"image": image, "mask_image": LEFT}
    guided = draw(pipeline, 0, generator=generators(0), guider=AdaptiveProjectedGuidance(2.0), **settings)
    torch.testing.assert_close(guided[..., : SIZE // 2], image[..., : SIZE // 2], rtol=0, atol=1e-6)
    plain = draw(pipeline, 0, generator=generators(0), **settings)
    assert not plain.requires_grad
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())
    with torch.inference_mode():
        assert torch.equal(draw(pipeline, 0, generator=generators(0), **settings), plain)


def test_latent_is_kept_where_all_of_its_pixels_are():
    pipeline = make_pipeline(
        make_unet(in_channels=2, out_channels=2), LogSNRScheduler(clip_sample=False), vae=make_vae()
    )
    image = torch.rand(1, *pipeline.image_shape)
    scale = pipeline.image_shape[1] // pipeline.sample_shape[1]
    mask = torch.zeros(1, 1, *pipeline.image_shape[1:])
    mask[..., 0, 0] = mask[..., scale : 2 * scale, scale : 2 * scale] = 1
    seen = []
    encode = pipeline.encode
    pipeline.encode = lambda *args: seen.append(encode(*args)) or seen[-1]  # pyright: ignore
    latents = draw(pipeline, 0, image=image, mask_image=mask, generator=generators(0), output_type="latent")
    changed = (latents != seen[0]).any(1)[0]
    assert changed.nonzero().tolist() == [[0, 0], [1, 1]]


IMAGE = torch.rand(1, 1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_image": LEFT}, "mask_image must be None without image; pass image too"),
        ({"mask_image": LEFT, "strength": 0}, r"strength must be in \(0, 1\]"),
        ({"image": IMAGE, "mask_image": LEFT[..., :7]}, r"mask_image has the shape \(1, 8, 7\).*needs \(1, 8, 8\)"),
        ({"image": IMAGE, "mask_image": LEFT.expand(1, 3, -1, -1)}, r"mask_image has the shape \(3, 8, 8\)"),
        ({"image": IMAGE, "mask_image": Image.new("1", (9, 8))}, r"mask_image has the shape \(1, 8, 9\)"),
        ({"image": IMAGE, "mask_image": Image.new("RGBA", (8, 8))}, "mask_image.convert"),
        ({"image": IMAGE, "mask_image": 255 * LEFT}, r"The range of mask_image must be in \[0, 1\]"),
        ({"image": IMAGE, "mask_image": LEFT.expand(3, -1, -1, -1)}, "mask_image contains 3 images"),
        *(({"image": IMAGE, "mask_image": mask}, "mask_image must be a PIL image") for mask in ("m.png", [], 3)),
    ],
)
def test_invalid_masks(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(), 0, num_images_per_label=2, **settings)


def test_generator_refuses_a_mask():
    with pytest.raises(ValueError, match="mask_image must be left out for a generator"):
        draw(ddgan("--num_timesteps", "4"), 0, image=IMAGE, mask_image=LEFT, num_inference_steps=4)
