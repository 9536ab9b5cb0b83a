"""Test the estimate of the variational bound against closed forms, and that it depends on seed and index only."""

import math

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation.likelihood import estimate
from diffusers_cfg.evaluation.mixture import GaussianMixtureModel
from diffusers_cfg.noise_schedule import SHAPES, NoiseSchedule, linear
from tests.support.latents import make_vae
from tests.support.models import make_pipeline, make_unet, vdm

ENDS = -13.3, 5.0


class ZeroModel(GaussianMixtureModel):
    """A network for digits that predicts zero."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> UNet2DOutput:
        return UNet2DOutput(sample=torch.zeros_like(sample))


def zero_vdm(prediction_type: str, ends: tuple[float, float]) -> CFGPipeline:
    """Return a model of digits that predicts zero, between two ends of γ."""
    scheduler = vdm(prediction_type, ends).scheduler
    model = ZeroModel(scheduler, torch.zeros(10, 1, 8, 8), torch.ones(10), torch.arange(10))
    return CFGPipeline(model, scheduler)  # pyright: ignore[reportArgumentType]  (in place of a U-Net)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    digits = Digits()
    return torch.from_numpy(digits.images)[:24, None], torch.from_numpy(digits.class_labels)[:24]


def integral_of_zero_prediction(prediction_type: str, x: torch.Tensor, gamma_0: float, gamma_1: float) -> torch.Tensor:
    """Return ½ ∫ E‖ε - ε̂‖² dγ of a network that predicts zero, `(images,)`."""
    elements, square = x[0].numel(), x.flatten(1).square().sum(1)
    softplus, sigmoid = torch.nn.functional.softplus, torch.sigmoid
    ends = torch.tensor([gamma_0, gamma_1], dtype=torch.float64)
    alpha_2, rise = (-softplus(-ends)).diff(), sigmoid(ends).diff()  # ∫ α² dγ and ∫ α²σ² dγ = Δσ²
    twice = {
        "epsilon": elements * ends.diff().expand(len(x)),
        "v_prediction": elements * (alpha_2 - rise) + square * rise,  # α² (α²D + σ²‖x‖²)
        "sample": square * (-ends).exp().diff().neg(),  # e^-γ ‖x‖²
    }
    return twice[prediction_type] / 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusion_term_of_a_zero_prediction_has_a_closed_form(data, prediction_type):
    images, labels = data
    pipeline = zero_vdm(prediction_type, (-4.0, 5.0))
    terms = estimate(pipeline, images, labels, times_per_image=2000, batch_size=4000)
    expected = integral_of_zero_prediction(prediction_type, to_float(images).double(), -4.0, 5.0)
    torch.testing.assert_close(terms.diffusion, expected[:, None].expand(-1, 2), rtol=0.02, atol=0)
    assert (terms.diffusion.mean() / expected.mean()).item() == pytest.approx(1, abs=0.004)
    assert (terms.network_evaluations, terms.prior.shape) == (24 * 2000 * 2, (24,))


@pytest.mark.parametrize("name", SHAPES)
def test_continuous_bound_does_not_depend_on_the_shape(data, name):
    images, labels = data
    terms = estimate(
        zero_vdm("v_prediction", ENDS), images, labels, times_per_image=2000, schedule=SHAPES[name](-6.0, 5.0)
    )
    expected = integral_of_zero_prediction("v_prediction", to_float(images).double(), -6.0, 5.0)
    difference = terms.diffusion[:, 0] - expected
    error = difference.std() / len(difference) ** 0.5
    assert abs(difference.mean() / error) < 4
    assert (difference.mean() / expected.mean()).abs() < 0.02


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_bound_of_the_exact_denoiser_of_discrete_pixels_is_their_entropy(prediction_type):
    """Two classes of two pixels with known probabilities: for T = ∞ the bound is tight, and fewer steps loosen it."""
    levels = torch.tensor([[-1.0, 0.2], [1.0, 1.0], [-0.6, 1.0]]).view(3, 1, 1, 2)  # of 256 between -1 and 1
    probs = torch.tensor([0.2, 0.5, 0.3])
    scheduler = vdm(prediction_type, (-15.0, 8.0)).scheduler
    model = GaussianMixtureModel(scheduler, levels, torch.zeros(3), torch.tensor([0, 0, 1]), probs)
    pipeline = CFGPipeline(model, scheduler)  # pyright: ignore[reportArgumentType]  (in place of a U-Net)
    k = torch.tensor([0] * 20 + [1] * 50 + [2] * 30).repeat(10)
    images, labels = ((levels[k] + 1) * 127.5).round().to(torch.uint8), torch.tensor([0, 0, 1])[k]
    found = {}
    for steps in (10, 100, 1000, 0):
        terms = estimate(pipeline, images, labels, diffusion_steps=steps, times_per_image=50, batch_size=50_000)
        found[steps] = (terms.prior + terms.reconstruction)[:, None] + terms.diffusion
    joint, given_class = -(probs * probs.log()).sum(), -(0.2 * math.log(2 / 7) + 0.5 * math.log(5 / 7))
    difference = found[0].mean(0) - torch.tensor([given_class, joint])
    assert (difference.abs() < 3 * found[0].std(0) / len(k) ** 0.5).all()
    assert (difference.abs() < 0.05).all()
    for fewer, more, by in ((10, 100, 0.5), (100, 1000, 0.02), (1000, 0, 0.0)):
        assert (found[fewer].mean(0) > found[more].mean(0) + by).all()


def test_terms_depend_on_seed_and_index_but_not_on_the_batch(data):
    images, labels = data
    pipeline = vdm()
    together = estimate(pipeline, images, labels, times_per_image=7, seed=3)
    for first, batch_size in ((0, 5), (9, 100)):
        rows = slice(first, None)
        part = estimate(
            pipeline, images[rows], labels[rows], seed=3, first_index=first, times_per_image=7, batch_size=batch_size
        )
        for whole, own in zip(together, part, strict=True):
            torch.testing.assert_close(whole[first:], own, rtol=1e-4, atol=1e-3)
    other = estimate(pipeline, images, labels, first_index=1, times_per_image=7, seed=3)
    assert (other.gamma != together.gamma).all()
    assert (other.reconstruction != together.reconstruction).all()
    as_floats = estimate(pipeline, to_float(images), labels, times_per_image=7, seed=3)
    assert torch.equal(as_floats.diffusion, together.diffusion)


def test_times_are_stratified_and_shared_by_all_numbers_of_steps(data):
    images, labels = data
    pipeline, schedule = vdm(), linear(-12.0, 4.0)
    terms = {
        steps: estimate(pipeline, images, labels, diffusion_steps=steps, times_per_image=16, schedule=schedule)
        for steps in (0, 8)
    }
    times = (terms[0].gamma + 12) / 16
    assert torch.equal((times * 16).floor(), torch.arange(16.0, dtype=torch.float64).expand(24, -1))
    assert (times.diff() - 1 / 16).abs().max() < 1e-9
    assert torch.equal(((terms[8].gamma + 12) / 2).round(), ((times * 8).floor() + 1))
    assert torch.equal(terms[0].prior, terms[8].prior)
    assert torch.equal(terms[0].reconstruction, terms[8].reconstruction)


def test_unlabelled_images_and_models_without_null_class(data):
    images, labels = data
    labels = labels.clone()
    labels[::2] = -1
    terms = estimate(vdm(), images, labels, times_per_image=2)
    assert terms.diffusion[::2, 0].isnan().all()
    assert terms.diffusion[1::2].isfinite().all()
    assert terms.diffusion[:, 1].isfinite().all()
    assert terms.network_evaluations == 24 * 2 + 12 * 2
    terms = estimate(vdm(), images, labels, times_per_image=2, null_class=False)
    assert terms.diffusion[:, 1].isnan().all()
    assert terms.network_evaluations == 12 * 2


def test_bound_of_a_model_with_the_arctan_process(data):
    """The ends of the bound may be any inside the process; γ = -20 is beyond those of `NoiseSchedule`."""
    images, labels = data
    pipeline = make_pipeline(make_unet(num_class_embeds=11), LogSNRScheduler(prediction_type="v_prediction"))
    terms = estimate(pipeline, images, labels, times_per_image=8)
    assert terms.gamma.min() < -18
    assert terms.gamma.max() > 18
    narrow = estimate(pipeline, images, labels, times_per_image=8, schedule=linear(-13.3, 5.0))
    assert narrow.diffusion.mean() < terms.diffusion.mean()
    assert narrow.prior.mean() > terms.prior.mean()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda: linear(-14.0, 4.0), "from log-SNR 14 to -4, but must go down, and the model knows only 13.3 … -5"),
        (lambda: linear(-12.0, 6.0), "from log-SNR 12 to -6"),
        (lambda: linear(3.0, -2.0), "from log-SNR -3 to 2"),
        (lambda: NoiseSchedule(-13.2, 5.2), "from log-SNR 13.2 to -5.2"),
    ],
)
def test_ends_outside_the_process_are_refused(data, schedule, message):
    with pytest.raises(UserError, match=message):
        estimate(vdm(), *data, schedule=schedule())


def test_model_in_half_precision_is_refused(data):
    with pytest.raises(UserError, match="torch.bfloat16"):
        estimate(vdm().to(torch.bfloat16), *data)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_prediction_that_is_not_finite_is_refused(data, value):
    """It would be the bound of an image without a label, or no number at all."""
    images, labels = data
    pipeline = vdm()
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, value)
    with pytest.raises(UserError, match="prediction at log-SNR .* is not finite: its weights are damaged"):
        estimate(pipeline, images[:2], labels[:2], times_per_image=2)


def test_model_with_an_autoencoder_is_refused(data):
    pipeline = make_pipeline(make_unet(in_channels=2, out_channels=2, sample_size=4), vae=make_vae())
    with pytest.raises(UserError, match="The model has an autoencoder"):
        estimate(pipeline, *data)


def test_guidance_does_not_change_the_bound(data):
    """A guide is not used, and a distilled network is evaluated at w = 0."""
    images, labels = data
    terms = estimate(vdm(), images, labels, times_per_image=2)
    guided = vdm()
    guided.guide_unet = make_unet(num_class_embeds=11)
    torch.testing.assert_close(estimate(guided, images, labels, times_per_image=2).error, terms.error)
    student = make_pipeline(make_unet(num_class_embeds=11, max_guidance_scale=4.0), vdm().scheduler, id2label=None)
    torch.nn.init.normal_(student.unet.guidance_embedding.linear_2.weight)
    at_zero = estimate(student, images, labels, times_per_image=2)
    student.unet.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "guidance_scale": torch.zeros(len(args[0]))}), with_kwargs=True
    )
    explicit = estimate(student, images, labels, times_per_image=2)
    torch.testing.assert_close(at_zero.error, explicit.error)


def test_unknown_class_is_refused(data):
    images, labels = data
    with pytest.raises(ValueError, match="11"):
        estimate(vdm(), images, labels + 11)
