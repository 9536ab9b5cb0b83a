"""Test the steps and the losses of denoising diffusion GANs against other forms of the paper's equations."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_cfg.denoising_gan import (
    DenoisingSteps,
    Loss,
    discriminator_loss,
    generator_loss,
    squared_gradient,
    vp_betas,
)

NUM_TIMESTEPS = [1, 2, 3, 4, 8]
STEPS = [(num_timesteps, t) for num_timesteps in NUM_TIMESTEPS for t in range(num_timesteps)]


def alpha_bar(num_timesteps: int, t: int) -> float:
    """Return ᾱ[t] by the integral of β(u) = 0.1 + 19.9u from 0.001 to the end of step t, in continuous time."""
    u = 0.001 + 0.999 * (t + 1) / num_timesteps
    return math.exp(-(0.1 * (u - 0.001) + 19.9 / 2 * (u**2 - 0.001**2)))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(t: int, count: int) -> torch.Tensor:
    return torch.full((count,), t)


@pytest.mark.parametrize(
    ("num_timesteps", "betas"),
    [
        (1, [0.99996]),
        (2, [0.9213, 0.9995]),
        (4, [0.4783, 0.8492, 0.9564, 0.9874]),
        (8, [0.1564, 0.3815, 0.5465, 0.6675, 0.7562, 0.8212, 0.8689, 0.9039]),
    ],
)
def test_betas_are_those_of_the_paper(num_timesteps, betas):
    assert vp_betas(num_timesteps) == pytest.approx(betas, abs=5e-5)


@pytest.mark.parametrize("num_timesteps", NUM_TIMESTEPS)
def test_every_number_of_steps_has_the_same_noisy_end(num_timesteps):
    after = np.cumprod(1 - np.array(vp_betas(num_timesteps)))
    assert after == pytest.approx([alpha_bar(num_timesteps, t) for t in range(num_timesteps)], rel=1e-9)
    assert after[-1] == pytest.approx(4.3e-5, rel=0.01)


@pytest.mark.parametrize(("num_timesteps", "t"), STEPS)
def test_moments_of_diffuse(num_timesteps, t):
    """x_prev and x_next are linear in x and the two noises; find each coefficient, and with it the moments."""
    steps = DenoisingSteps(vp_betas(num_timesteps))
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    columns = [(one, zero, zero), (zero, one, zero), (zero, zero, one)]
    prev, after = np.array(
        [[x.item() for x in steps.diffuse(x, at(t, 1), a, b)] for x, a, b in columns]
    ).T  # fmt: skip
    before = alpha_bar(num_timesteps, t - 1) if t else 1.0
    own = alpha_bar(num_timesteps, t)
    assert prev == pytest.approx([before**0.5, (1 - before) ** 0.5, 0], abs=1e-12)
    assert after[0] == pytest.approx(own**0.5, abs=1e-12)
    assert (after[1:] ** 2).sum() == pytest.approx(1 - own, abs=1e-12)
    # The covariance given x: x_next comes from x_prev.
    assert prev[1:] @ after[1:] == pytest.approx((own / before) ** 0.5 * (1 - before), abs=1e-12)


@pytest.mark.parametrize(("num_timesteps", "t"), [(n, t) for n, t in STEPS if t])
def test_moments_of_denoise(num_timesteps, t):
    """Multiply the densities q(x_prev | x) and q(x_next | x_prev), whose precisions and weighted means add up."""
    before, own = alpha_bar(num_timesteps, t - 1), alpha_bar(num_timesteps, t)
    kept = own / before
    precision = 1 / (1 - before) + kept / (1 - kept)
    x, x_next, noise = draw(3, 6, 2)
    mean = (before**0.5 * x / (1 - before) + kept**0.5 * x_next / (1 - kept)) / precision
    steps = DenoisingSteps(vp_betas(num_timesteps))
    torch.testing.assert_close(steps.denoise(x, x_next, at(t, 6), 0 * noise), mean, rtol=0, atol=1e-12)
    moved = steps.denoise(x, x_next, at(t, 6), noise) - mean
    torch.testing.assert_close(moved, noise / precision**0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_timesteps", "t"), STEPS)
def test_denoise_is_the_step_of_diffusers(num_timesteps, t):
    betas = vp_betas(num_timesteps)
    scheduler = DDPMScheduler(
        num_timesteps, trained_betas=betas, prediction_type="sample", variance_type="fixed_small", clip_sample=True
    )
    scheduler.set_timesteps(num_timesteps)
    x, x_next = draw(5, 1, 4, 4).clamp(-1, 1).float(), draw(5, 1, 4, 4, seed=1).float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    stepped = scheduler.step(x, t, x_next, generator=torch.Generator().manual_seed(2)).prev_sample
    sample = DenoisingSteps(betas).denoise(x, x_next, at(t, 5), noise)
    torch.testing.assert_close(sample, stepped, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_timesteps", NUM_TIMESTEPS)
def test_first_step_ends_at_the_data(num_timesteps, dtype):
    steps = DenoisingSteps(vp_betas(num_timesteps))
    x, x_next, noise = draw(3, 64, 3).to(dtype) * torch.tensor([[[1.0]], [[1e3]], [[1e3]]], dtype=dtype)
    assert torch.equal(steps.denoise(x, x_next, at(0, 64), noise), x)
    assert torch.equal(steps.diffuse(x, at(0, 64), noise, x_next)[0], x)
    assert steps.denoise(x, x_next, at(0, 64), noise).dtype == dtype


def test_samples_of_a_batch_have_their_own_steps():
    steps, (x, x_next, noise) = DenoisingSteps(vp_betas(4)), draw(3, 4, 1, 2, 2)
    mixed = steps.denoise(x, x_next, torch.arange(4), noise)
    for t in range(4):
        row = slice(t, t + 1)
        assert torch.equal(mixed[row], steps.denoise(x[row], x_next[row], at(t, 1), noise[row]))


@pytest.mark.parametrize("t", [1, 2, 3])
def test_generated_pairs_of_a_perfect_generator_have_the_law_of_real_pairs(t):
    """Two pairs drawn from x independently, or a posterior without its variance, would have another covariance."""
    steps, count = DenoisingSteps(vp_betas(4)), 200_000
    x, *noises = draw(4, count, 1)
    x = x.sign()  # not Gaussian
    x_prev, x_next = steps.diffuse(x, at(t, count), *noises[:2])
    generated = steps.denoise(x, x_next, at(t, count), noises[2])
    real, fake = (torch.cat([x, end, x_next], dim=1).T.cov() for end in (x_prev, generated))
    torch.testing.assert_close(fake, real, rtol=0, atol=0.01)
    assert abs(real[1, 2].item()) > 0.1


LOGITS = np.array([-50.0, -3.0, -0.1, 0.0, 2.0, 50.0])


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def test_losses_follow_the_papers():
    real, fake = (torch.from_numpy(a.ravel()) for a in np.meshgrid(LOGITS, LOGITS))
    a, b = real.numpy(), fake.numpy()
    expected: dict[Loss, tuple[np.ndarray, np.ndarray]] = {
        "non_saturating": (softplus(-a) + softplus(b), softplus(-b)),
        "relativistic": (softplus(b - a), softplus(a - b)),
    }
    for loss, (of_discriminator, of_generator) in expected.items():
        np.testing.assert_allclose(discriminator_loss(loss, real, fake), of_discriminator, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(generator_loss(loss, real, fake), of_generator, rtol=1e-12, atol=1e-15)
    assert torch.equal(generator_loss("non_saturating", None, fake), generator_loss("non_saturating", real, fake))


def make_discriminator() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Softplus(), torch.nn.Linear(8, 1)).double()


def test_squared_gradient_of_each_sample():
    """Compare with central differences of each sample alone."""
    discriminator, x, step = make_discriminator(), draw(4, 3).requires_grad_(), 1e-5
    penalty = squared_gradient(discriminator(x).squeeze(1), x)
    for i in range(4):
        sides = x[i].detach() + step * torch.cat([torch.eye(3), -torch.eye(3)]).double()
        plus, minus = discriminator(sides).squeeze(1).view(2, 3)
        gradient = (plus - minus) / (2 * step)
        assert penalty[i].item() == pytest.approx(gradient.square().sum().item(), rel=1e-6)
    images = draw(2, 1, 2, 2).requires_grad_()  # A sum over the pixels
    assert squared_gradient((images * 3).sum((1, 2, 3)), images).tolist() == [36, 36]


def test_squared_gradient_can_be_differentiated():
    """Compare the gradient of its mean for a weight of each layer with central differences."""
    discriminator, x, step = make_discriminator(), draw(4, 3).requires_grad_(), 1e-5

    def penalty() -> torch.Tensor:
        return squared_gradient(discriminator(x).squeeze(1), x).mean()

    penalty().backward()
    for name in ("0.weight", "0.bias", "2.weight"):
        parameter = discriminator.get_parameter(name)
        assert parameter.grad is not None
        values, gradient = parameter.data.view(-1), parameter.grad.view(-1)[1].item()
        assert gradient != 0
        values[1] += step
        plus = penalty().item()
        values[1] -= 2 * step
        assert gradient == pytest.approx((plus - penalty().item()) / (2 * step), rel=1e-4)
        values[1] += step
