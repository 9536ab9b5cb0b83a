"""Test guidance and its samplers against the exact results for a mixture of Gaussians."""

import itertools
import math

import pytest
import torch

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.evaluation.mixture import (
    GaussianMixtureModel,
    ToyProblem,
    deterministic_limit,
    guided_diffusion,
    guided_flow,
    rms_distance,
    sliced_wasserstein,
    three_gaussians,
)

F64 = torch.float64


@pytest.fixture(scope="module")
def mixture() -> GaussianMixtureModel:
    """Return a mixture for 1×2×2 images: three classes with unequal priors, one of which has two components."""
    generator = torch.Generator().manual_seed(0)
    return GaussianMixtureModel(
        LogSNRScheduler(),
        means=torch.randn(4, 1, 2, 2, generator=generator, dtype=F64).mul(0.5),
        stds=torch.tensor([0.1, 0.2, 0.3, 0.2], dtype=F64),
        component_classes=torch.tensor([0, 1, 1, 2]),
        probs=torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=F64),
    )


@pytest.fixture(scope="module")
def toy() -> ToyProblem:
    return ToyProblem(num_samples=192)


LEVELS = torch.tensor([-1.0, 0.0, 20.0, 300.0, 700.0, 990.0, 999.0], dtype=F64)


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("label", [0, 1, 2, -1, 3])
def test_eps_is_the_score_and_agrees_with_x(mixture, t, label):
    alpha, sigma = mixture.scheduler.alpha_sigma(mixture.scheduler.u(t))
    z = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64, requires_grad=True)
    labels = torch.full((6,), label)
    eps, x = mixture.expected_noise_and_sample(z, alpha, sigma, labels)
    (score,) = torch.autograd.grad(mixture.log_prob(z, alpha, sigma, labels).sum(), z)
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alpha * x + sigma * eps, z, rtol=1e-9, atol=1e-9)
    if label == -1:
        torch.testing.assert_close(mixture(z, t).sample, eps)


def test_density_matches_the_samples_and_is_normalized(mixture):
    labels = torch.arange(3).repeat_interleave(40_000)
    x = mixture.sample(labels, torch.Generator().manual_seed(0))
    # E over x ~ p(· | c) of q(x) / p(x | c) is ∫ q = 1, with q = p(· | a different class) or the marginal
    ratio = (mixture.log_prob(x, class_labels=torch.full_like(labels, -1)) - mixture.log_prob(x)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=1e-9)
    marginal = torch.stack([mixture.log_prob(x, class_labels=torch.full_like(labels, c)) for c in range(3)])
    prior = torch.tensor([1 / 8, 5 / 8, 2 / 8], dtype=F64).log()[:, None]
    torch.testing.assert_close((marginal + prior).logsumexp(0), mixture.log_prob(x))
    of_class_1 = x[labels == 1].flatten(1)
    expected = 0.4 * mixture.means[1] + 0.6 * mixture.means[2]
    torch.testing.assert_close(of_class_1.mean(0), expected, rtol=0, atol=0.02)
    grid = torch.cartesian_prod(*[torch.linspace(-2, 2, 161, dtype=F64)] * 2).view(-1, 1, 1, 2)
    model = three_gaussians(LogSNRScheduler()).double()
    assert (model.log_prob(grid).exp().sum() * (4 / 160) ** 2).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("w", [-0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("t", LEVELS)
def test_guidance_equals_classifier_guidance_at_scale_w_plus_one(mixture, t, w):
    """ε(z) - (w + 1) σ ∇ log p(c | z), with the exact classifier, is the pipeline's (1 + w) ε(z, c) - w ε(z)."""
    alpha, sigma = mixture.scheduler.alpha_sigma(mixture.scheduler.u(t))
    z = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    labels = torch.tensor([0, 1, 2] * 2)
    log_classifier = mixture.log_prob(z, alpha, sigma, labels) - mixture.log_prob(z, alpha, sigma)  # + log p(c)
    (gradient,) = torch.autograd.grad(log_classifier.sum(), z)
    expected = mixture.eps(z, alpha, sigma) - (w + 1) * sigma * gradient
    pipeline = CFGPipeline(mixture, mixture.scheduler)
    w = torch.full((6, 1, 1, 1), w)
    actual = pipeline.guide(*pipeline.predictions(z.detach(), t, labels, torch.full((6,), 3), w), w)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("w", "v"), [(0.0, 0.3), (1.0, 0.0), (1.0, 0.3), (4.0, 1.0)])
def test_float32_pipeline_matches_float64_algorithm_2(w, v, prediction_type):
    """Compare the pipeline in float32 with Algorithm 2 in float64, with the same noise, over all of λ."""
    toy = ToyProblem(64, variance_interpolation=v, prediction_type=prediction_type)
    actual = toy.draw(w, 256)

    generator, model = torch.Generator().manual_seed(1), three_gaussians(LogSNRScheduler()).double()
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    log_snrs = [-2 * math.log(math.tan(a * (1 - i / 255) + b)) for i in range(256)]
    z = toy.noise.double()
    for i, log_snr in enumerate(log_snrs):
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))
        guided = torch.lerp(model.eps(z, alpha, sigma), model.eps(z, alpha, sigma, toy.class_labels), 1 + w)
        x = (z - sigma * guided) / alpha
        if i == 255:
            z = x
            break
        e = math.exp(log_snr - log_snrs[i + 1])  # e^(λ - λ')
        next_alpha = math.sqrt(1 / (1 + math.exp(-log_snrs[i + 1])))
        next_variance = 1 / (1 + math.exp(log_snrs[i + 1]))
        variance = ((1 - e) * next_variance) ** (1 - v) * ((1 - e) * sigma**2) ** v
        noise = torch.randn(z.shape, generator=generator).double()
        z = e * next_alpha / alpha * z + (1 - e) * next_alpha * x + math.sqrt(variance) * noise
    assert rms_distance(actual, z) < 1e-4 * z.flatten(1).square().sum(1).mean().sqrt()


def test_unguided_flow_preserves_the_density(toy):
    """Verify the exact solution: the flow maps N(0, I) to p(x | c), deterministically."""
    noise = torch.randn(3000, 1, 1, 2, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(3000) % 3
    x = guided_flow(toy.model, noise, labels, 0.0, 80.0)
    truth, second = (toy.model.sample(labels, torch.Generator().manual_seed(seed)) for seed in (6, 7))
    assert sliced_wasserstein(x, truth) < 2 * sliced_wasserstein(second, truth) + 0.003
    # For one Gaussian the flow has a closed form: the deviation from the mean shrinks by std / std of the start.
    single = GaussianMixtureModel(
        toy.scheduler, torch.full((1, 1, 1, 2), 0.3, dtype=F64), torch.tensor([0.2], dtype=F64), torch.tensor([0])
    )
    start = noise[:10].double() * math.sqrt(1 + 80**2)  # y at σ/α = 80
    expected = 0.3 + (start - 0.3) * 0.2 / math.sqrt(0.2**2 + 80**2)
    torch.testing.assert_close(guided_flow(single, noise[:10], torch.zeros(10).long(), 0.0, 80.0), expected)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("DDIMScheduler", 1),
        ("EulerDiscreteScheduler", 1),
        ("HeunDiscreteScheduler", 2),
        ("DPMSolverMultistepScheduler", 2),
        ("UniPCMultistepScheduler", 2),
        ("DEISMultistepScheduler", 2),
    ],
)
def test_solvers_converge_to_the_guided_flow(toy, name, order, w):
    toy.use_scheduler(name)
    errors = [toy.error(w, steps) for steps in (10, 20, 40)]
    assert errors[0] > errors[1] > errors[2]
    assert math.log2(errors[1] / errors[2]) > order - 0.4
    assert errors[2] < {1: 0.03, 2: 0.008}[order]


@pytest.mark.parametrize(
    ("name", "w"),
    [
        *itertools.product(["HeunDiscreteScheduler", "DPMSolverMultistepScheduler"], [0.0]),
        *itertools.product(["UniPCMultistepScheduler", "DEISMultistepScheduler"], [0.0, 1.0]),
    ],
)
def test_second_order_solvers_at_20_steps_beat_the_noiseless_paper_sampler_at_128(toy, name, w):
    limit = deterministic_limit(toy.model, toy.noise, toy.class_labels, w, 128)
    limit_error = rms_distance(limit, toy.flow(w, math.exp(10)))
    toy.use_scheduler(name)
    assert toy.error(w, 20) < limit_error < 0.01


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LogSNRScheduler", {"variance_interpolation": 0.0}),
        ("LogSNRScheduler", {"variance_interpolation": 0.3}),
        ("LogSNRScheduler", {"variance_interpolation": 1.0}),
        ("DDPMScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_stochastic_samplers_converge_to_the_guided_diffusion(truths, name, settings, w):
    toy, truth = truths
    toy.use_scheduler(name, **settings)
    coarse, fine = (sliced_wasserstein(toy.draw(w, steps, latents=None), truth[w]) for steps in (6, 200))
    assert fine < 0.015  # the distance between two draws of the truth is 0.006
    assert coarse > 2 * fine


@pytest.fixture(scope="module")
def truths():
    toy = ToyProblem(num_samples=6000)
    generator = torch.Generator().manual_seed(2)
    truth = {0.0: toy.model.sample(toy.class_labels, generator)}
    truth[1.0] = guided_diffusion(toy.model, toy.class_labels, 1.0, 500, generator)
    return toy, truth


def test_unguided_diffusion_preserves_the_density(truths):
    toy, truth = truths
    draws = guided_diffusion(toy.model, toy.class_labels, 0.0, 500, torch.Generator().manual_seed(3))
    assert sliced_wasserstein(draws, truth[0.0]) < 0.012


def test_clipping_changes_samples_only_under_strong_guidance():
    """The data lies within ±1, and so does the exact x̃ unless guidance is strong."""
    clipped, unclipped = ToyProblem(192, clip_sample=True), ToyProblem(192)
    for toy in (clipped, unclipped):
        toy.use_scheduler("UniPCMultistepScheduler")
    moved = {w: rms_distance(clipped.draw(w, 20), unclipped.draw(w, 20)) for w in (0.0, 1.0, 2.0, 4.0)}
    assert max(moved[0.0], moved[1.0]) < 1e-5
    assert moved[2.0] < 0.005
    assert 0.02 < moved[4.0] < 0.1
