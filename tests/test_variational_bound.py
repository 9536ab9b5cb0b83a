"""Test the terms of the variational bound against closed forms, and the bound against the entropy of the data."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusers_cfg import variational_bound
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.noise_schedule import SHAPES, NoiseSchedule, Schedule, linear
from diffusers_cfg.randomness import Draws
from diffusers_cfg.variational_bound import (
    bits_per_dim,
    continuous_weight,
    diffuse,
    discrete_times,
    discrete_weight,
    minimise_variance,
    noise_error,
    prior_term,
    reconstruction_term,
)
from tests.support.pixels import F64, NOISE, WEIGHTS, Pixel

GAMMAS = torch.tensor([-15.0, -13.3, -5.0, 0.0, 3.0, 5.0], dtype=F64)
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def random_images(batch_size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Return images of random levels in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch_size, *shape), generator=generator).double() / 127.5 - 1


def random_noise(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def cosine_like_learned(gamma_0: float, gamma_1: float) -> Schedule:
    """Return a learned schedule whose shape is far from a line."""
    schedule = NoiseSchedule(gamma_0, gamma_1, learn_ends=False, hidden_size=16).double()
    with torch.no_grad():
        schedule.w3 += torch.linspace(3, 0, 16)
    return schedule


ALL_SHAPES = {**SHAPES, "learned": cosine_like_learned}


def test_prior_is_the_divergence_from_a_normal_distribution():
    """Compare with the divergence of two Gaussians that torch computes."""
    x = random_images(3, 2, 4, 4)
    for gamma in [*GAMMAS[2:], torch.tensor(20.0, dtype=F64)]:
        alpha, sigma = (1 / (1 + math.exp(g)) ** 0.5 for g in (gamma, -gamma))
        q, p = torch.distributions.Normal(alpha * x, sigma), torch.distributions.Normal(torch.zeros_like(x), 1.0)
        expected = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
        torch.testing.assert_close(prior_term(x, gamma), expected, rtol=1e-9, atol=1e-12)
        rough = prior_term(x.float(), gamma.float())
        torch.testing.assert_close(rough.double(), expected, rtol=1e-5, atol=0)


def test_reconstruction_is_a_softmax_over_the_levels():
    """Compare with -log p(x|z₀), p(x|z₀) ∝ N(z₀; α₀ x, σ₀²), in NumPy and pixel by pixel."""
    x = random_images(2, 1, 2, 3)
    noise = random_noise(x)
    for gamma in (-15.0, -11.0, -5.0, 0.0):
        alpha, sigma = (1 / (1 + math.exp(g)) ** 0.5 for g in (gamma, -gamma))
        expected = np.zeros(2)
        for index in np.ndindex(*x.shape):
            z = alpha * x[index].item() + sigma * noise[index].item()
            log_density = -0.5 * ((z - alpha * (np.arange(256) / 127.5 - 1)) / sigma) ** 2
            log_probs = log_density - log_density.max() - np.log(np.exp(log_density - log_density.max()).sum())
            expected[index[0]] -= log_probs[round((x[index].item() + 1) * 127.5)]
        actual = reconstruction_term(x, noise, torch.tensor(gamma, dtype=F64))
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-12)
        rough = reconstruction_term(x.float(), noise.float(), torch.tensor(gamma))
        np.testing.assert_allclose(rough.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_decoder_has_the_levels_of_the_images():
    """Without noise every level of a decoded image is by far the most probable one."""
    x = to_float(torch.arange(256, dtype=torch.uint8)).view(256, 1)
    assert reconstruction_term(x, torch.zeros_like(x), torch.tensor(-13.3)).max() < 1e-6
    # At z₀ half-way to the next level the two are equally probable, so the scale of the levels is right.
    half = torch.full_like(x, math.exp(13.3 / 2) / 255)[:-1]
    torch.testing.assert_close(
        reconstruction_term(x[:-1], half, torch.tensor(-13.3)), torch.full((255,), math.log(2)), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("gamma", GAMMAS.tolist())
def test_all_prediction_types_have_the_same_error(gamma):
    """For one ε̂, the errors agree draw by draw."""
    x = random_images(3, 1, 4, 4)
    noise, gamma = random_noise(x), torch.full((3,), gamma, dtype=F64)
    z, eps = diffuse(x, noise, gamma), noise + 0.1 * random_noise(x, 2)
    alpha, sigma = ((1 / (1 + math.exp(g))) ** 0.5 for g in (gamma[0], -gamma[0]))
    torch.testing.assert_close(z, alpha * x + sigma * noise, rtol=1e-12, atol=1e-12)
    x_hat = (z - sigma * eps) / alpha
    preds = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_hat, "sample": x_hat}
    expected = (noise - eps).square().sum((1, 2, 3))
    for name in PREDICTION_TYPES:
        error = noise_error(name, preds[name], x, noise, gamma)
        torch.testing.assert_close(error, expected, rtol=1e-7, atol=0)


def test_error_of_half_precision_predictions_is_computed_in_float32():
    x = random_images(3, 1, 4, 4).float()
    noise, gamma = random_noise(x), torch.zeros(3)
    pred = random_noise(x, 2).bfloat16()
    error = noise_error("epsilon", pred, x, noise, gamma)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, (noise - pred.float()).square().sum((1, 2, 3)))


def test_bits_per_dim():
    """A uniform distribution over the 256 levels has 8 bits per dimension."""
    nats = 3 * 4 * 4 * math.log(256)
    assert nats * bits_per_dim((3, 4, 4)) == pytest.approx(8)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000, 1_000_000])
def test_discrete_times(steps):
    below_1 = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    s, t = discrete_times(torch.tensor([0.0, 2**-24, 0.5, below_1]), steps)
    assert (s[0], s[1]) == (0, 0)  # u = 0 is drawn, and belongs to the first step
    assert t[0].item() == pytest.approx(1 / steps)
    assert t[3] == 1
    assert s[3].item() == pytest.approx(1 - 1 / steps)
    assert (s < t).all()
    torch.testing.assert_close(s[2].item(), math.floor(steps / 2) / steps)


def test_all_steps_are_equally_likely():
    s, t = discrete_times((torch.arange(1000, dtype=F64) + 0.5) / 1000, 10)
    assert torch.equal(s.unique(return_counts=True)[1], torch.full((10,), 100))
    torch.testing.assert_close(t - s, torch.full((1000,), 0.1, dtype=F64))


def test_weights_are_those_of_the_paper():
    """Equations 14 and 17, with SNR = e^-γ: T/2 (SNR(s) - SNR(t)) ‖x - x̂‖², and -SNR'(t)/2 ‖x - x̂‖²."""
    s, t = torch.tensor([-13.0, -1.0, 2.0], dtype=F64), torch.tensor([-12.5, 1.0, 5.0], dtype=F64)
    to_x_error = (-t).exp()  # ‖ε - ε̂‖² = SNR ‖x - x̂‖²
    torch.testing.assert_close(discrete_weight(s, t, 7) * to_x_error, 7 / 2 * ((-s).exp() - (-t).exp()))
    slope = torch.tensor([18.3, 5.0, 0.2], dtype=F64)
    torch.testing.assert_close(continuous_weight(slope) * to_x_error, slope * (-t).exp() / 2)
    # Close times, in float32: the difference of the SNRs themselves would have no correct digits.
    s, t = torch.tensor(-1.0), torch.tensor(-1.0 + 18.3e-5)
    exact = 50_000 * math.expm1(t.item() - s.item())
    assert discrete_weight(s, t, 100_000).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("gamma_0", [-15.0, -13.3])
def test_bound_of_an_exact_denoiser_is_the_entropy(gamma_0, monkeypatch):
    """
    The decoder tells 256 levels apart with an error of 1e-12 nats at γ₀ = -15. At -13.3, adjacent levels overlap, so
    this pixel has 16 levels. What is left is the divergence of the last z from N(0, I), 4e-6.
    """
    pixel = Pixel()
    if gamma_0 > -15:
        monkeypatch.setattr(variational_bound, "LEVELS", 16)
        pixel = Pixel((0, 2, 3, 6, 8, 11, 12, 14), num_levels=16)
    terms = pixel.bound(linear(gamma_0, 5.0))
    gap = sum(terms.values()) - pixel.entropy
    assert 0 < gap < 1e-5
    assert terms["prior"] > 0
    assert terms["reconstruction"] >= 0
    # The paper's limit: with more steps the bound falls, to that in continuous time.
    bounds = [sum(pixel.bound(linear(gamma_0, 5.0), steps).values()) for steps in (1, 2, 5, 10, 50, 100, 1000)]
    assert all(more > fewer for more, fewer in pairwise(bounds))
    assert 0 < bounds[-1] - sum(terms.values()) < 1.2 * (bounds[-2] - sum(terms.values())) / 10
    assert bounds[-1] > pixel.entropy


def information(pixel: Pixel, gamma: float) -> float:
    """Return the mutual information of x and z at γ, by quadrature over log p(z|x) - log p(z)."""
    x, noise = pixel.grid()
    scale = math.exp(-gamma / 2)
    distance = (x * scale + noise)[..., None] - pixel.values * scale
    log_marginal = (pixel.probs.log() - distance**2 / 2).logsumexp(-1)
    return pixel.mean(-(noise**2) / 2 - log_marginal).item()


@pytest.mark.parametrize("ends", [(-13.3, 5.0), (-9.0, 9.0), (-6.0, 3.0)])
def test_each_term_of_the_bound_has_a_closed_form(ends):
    """
    With an exact denoiser, the diffusion term is I(x; z₀) - I(x; z₁). The two others exceed the entropy of x given z₀
    and I(x; z₁), so the bound is never below the entropy, whatever is lost at the ends.
    """
    pixel = Pixel()
    terms, (clean, noisy) = pixel.bound(linear(*ends)), (information(pixel, gamma) for gamma in ends)
    assert terms["diffusion"] == pytest.approx(clean - noisy, abs=1e-7)  # linear() has its ends in float32
    assert terms["reconstruction"] > pixel.entropy - clean
    assert terms["prior"] > noisy
    # x is drawn in proportion to PROBS, but the decoder supposes all 256 levels to be equally probable.
    x, noise = pixel.grid()
    scale = math.exp(-ends[0] / 2)
    logits = -(((x * scale + noise)[..., None] - torch.linspace(-1, 1, 256, dtype=F64) * scale) ** 2) / 2
    expected = pixel.mean(logits.logsumexp(-1) + noise**2 / 2).item()
    assert terms["reconstruction"] == pytest.approx(expected, abs=1e-6)


def test_bound_does_not_depend_on_the_shape_in_continuous_time():
    """The first claim of the paper, section 5.1: only the ends matter. With few steps the shape matters."""
    pixel, ends = Pixel(), (-13.3, 5.0)
    bounds = {name: sum(pixel.bound(make(*ends)).values()) for name, make in ALL_SHAPES.items()}
    assert list(bounds.values()) == pytest.approx([bounds["linear"]] * 4, rel=1e-6)
    few = [sum(pixel.bound(make(*ends), steps=10).values()) for make in ALL_SHAPES.values()]
    assert min(abs(a / b - 1) for a, b in pairwise(sorted(few))) > 0.01
    # A different end is another bound.
    assert sum(pixel.bound(linear(-13.3, 3.0)).values()) > bounds["linear"] + 1e-4


def test_weighted_loss_does_not_depend_on_the_shape():
    """∫ w(γ) γ'(t) ‖ε - ε̂‖² dt is an integral over γ."""
    pixel, ends, times = Pixel(), (-9.0, 5.0), torch.linspace(0, 1, 20_001, dtype=F64)
    gammas = torch.linspace(*ends, 801, dtype=F64)
    weighted = (2 + gammas).sigmoid() * pixel.moments(gammas)[0]
    losses = []
    for make in ALL_SHAPES.values():
        shape = make(*ends)(times)
        position = ((shape.gamma - ends[0]) / (ends[1] - ends[0]) * 800).clamp(0, 800)
        before = position.long().clamp(max=799)
        values = torch.lerp(weighted[before], weighted[before + 1], position - before)
        losses.append(torch.trapezoid(continuous_weight(shape.gamma_slope) * values, times).item())
    assert losses == pytest.approx([torch.trapezoid(weighted, gammas).item() / 2] * 4, rel=1e-4)


def network(z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Return a nonlinear prediction of ε at z `(batch, 1, height, width)` and γ `(batch,)`."""
    scale = variational_bound.like(gamma, z)
    kernel = torch.linspace(-0.3, 0.4, 9, dtype=z.dtype).view(1, 1, 3, 3)
    return torch.tanh(torch.nn.functional.conv2d(z, kernel, padding=1) * (1 + scale / 10)) + 0.3 * z


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_variance_preserving_and_variance_exploding_are_one_model(steps):
    """
    The second claim, section 5.1 and appendix E: with z̃ = z/α = x + σ̃ε and σ̃² = 1/SNR, a network x̃(z̃) = x̂(α z̃) gives
    each draw the same loss, and so the same bound. The variance-exploding terms are those of the paper, in σ̃ only.
    """
    x = random_images(64, 1, 4, 4)
    noise, noise_0, u = random_noise(x), random_noise(x, 2), torch.linspace(0, 0.999, 64, dtype=F64)
    schedule = cosine_like_learned(-13.3, 5.0)
    s, t = discrete_times(u, steps) if steps else (u, u)
    shape = schedule(t)
    gamma_0, gamma_1 = shape.gamma_0.double(), shape.gamma_1.double()

    # Ours, variance preserving
    error = noise_error("epsilon", network(diffuse(x, noise, shape.gamma), shape.gamma), x, noise, shape.gamma)
    factor = discrete_weight(schedule(s).gamma, shape.gamma, steps) if steps else continuous_weight(shape.gamma_slope)
    ours = prior_term(x, gamma_1), reconstruction_term(x, noise_0, gamma_0), factor * error

    # The paper's, variance exploding
    def variance(times: torch.Tensor) -> torch.Tensor:
        return schedule(times).gamma.exp()

    def column(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1, 1)

    z = x + column(variance(t).sqrt()) * noise
    alpha = 1 / (1 + variance(t)).sqrt()
    x_hat = z - column(variance(t).sqrt()) * network(column(alpha) * z, shape.gamma)
    x_error = (x - x_hat).square().sum((1, 2, 3))
    if steps:
        diffusion = steps / 2 * (1 / variance(s) - 1 / variance(t)) * x_error
    else:
        times = t.clone().requires_grad_()
        (slope,) = torch.autograd.grad((1 / variance(times)).sum(), times)  # SNR'(t)
        diffusion = -slope / 2 * x_error
    last, first = gamma_1.exp(), gamma_0.exp()
    # p(z̃₁) = N(0, 1 + σ̃₁²), the distribution of z₁/α₁ for z₁ ~ N(0, I)
    q = torch.distributions.Normal(x, last.sqrt())
    p = torch.distributions.Normal(torch.zeros_like(x), (1 + last).sqrt())
    prior = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
    z_0 = x + first.sqrt() * noise_0
    levels = torch.arange(256, dtype=F64) / 127.5 - 1
    log_probs = (-((z_0[..., None] - levels) ** 2) / (2 * first)).log_softmax(-1)
    truth = ((x + 1) * 127.5).round().long()[..., None]
    reconstruction = -log_probs.gather(-1, truth).sum((1, 2, 3, 4))

    for own, theirs in zip(ours, (prior, reconstruction, diffusion), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-7, atol=1e-9)
    bounds = [sum(term.mean() for term in terms).item() for terms in (ours, (prior, reconstruction, diffusion))]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-9)


@pytest.mark.parametrize("bits", [1.0, 0.01])
def test_one_backward_pass_serves_two_objectives(bits):
    """
    Compare the hooks with two backward passes in float64, for a loss through z, the network's time and the slope. The
    units of L (nats or bits) scale the gradient of L², like that of L once more.
    """
    x = random_images(16, 1, 4, 4)
    noise, u = random_noise(x), Draws(0, 0, range(16), 16).antithetic("time").double()
    schedule = NoiseSchedule(hidden_size=8).double()
    weight = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))

    def loss(hooks: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the diffusion terms and the bounds."""
        shape = schedule(u)
        pred = weight * network(diffuse(x, noise, shape.gamma), 10 * shape.n)
        error = noise_error("v_prediction", pred, x, noise, shape.gamma)
        diffusion = bits * continuous_weight(shape.gamma_slope) * error
        if hooks:
            minimise_variance(diffusion, shape.n, shape.slope)
        ends = prior_term(x, shape.gamma_1) + reconstruction_term(x, noise, shape.gamma_0)
        return diffusion, bits * ends + diffusion

    inner = [schedule.w1, schedule.w2, schedule.b2, schedule.w3]
    outer = [weight, schedule.gamma_0, schedule.gamma_1]
    expected = [
        *torch.autograd.grad(loss(hooks=False)[0].square().mean(), inner),
        *torch.autograd.grad(loss(hooks=False)[1].mean(), outer),
    ]
    actual = torch.autograd.grad(loss(hooks=True)[1].mean(), [*inner, *outer])
    for own, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-9, atol=1e-12)
    plain = torch.autograd.grad(loss(hooks=False)[1].mean(), inner)
    assert not torch.allclose(plain[2], expected[2], rtol=0.1)


def test_frozen_shape_needs_no_hook():
    """In evaluation nothing requires a gradient."""
    shape = linear(-13.3, 5.0)(torch.tensor([0.5]))
    minimise_variance(torch.ones(1), shape.n, shape.slope)


def test_quadrature_of_the_tests_is_exact():
    powers = WEIGHTS @ torch.stack([NOISE**power for power in range(5)], 1)
    torch.testing.assert_close(powers, torch.tensor([1.0, 0, 1, 0, 3], dtype=F64), atol=1e-12, rtol=1e-12)
