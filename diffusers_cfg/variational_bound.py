"""Compute the variational bound on the negative log-likelihood of images, in three terms (Kingma et al. 2021,
arXiv 2107.00630, sections 3 and 4): -log p(x) ≤ prior + reconstruction + diffusion.

Images have 256 levels in [-1, 1], z = αx + σε with σ² = sigmoid(γ), and every term is in nats per image, `(batch,)`.
"""

import math

import torch

# The values of a pixel, 2k/255 - 1
LEVELS = 256


def bits_per_dim(shape: torch.Size | tuple[int, ...]) -> float:
    """Return the bits per dimension of one nat per image, for images of a shape `(channels, height, width)`."""
    return 1 / (math.prod(shape) * math.log(2))


def like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return one value for each sample, in a shape that broadcasts against x `(batch, …)`."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def alpha_sigma(gamma: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return α and σ at γ `(batch,)`, in a shape that broadcasts against x `(batch, …)`."""
    return like((-gamma).sigmoid().sqrt(), x), like(gamma.sigmoid().sqrt(), x)


def diffuse(x: torch.Tensor, noise: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Return z = αx + σε at γ `(batch,)`, in the shape of x."""
    alpha, sigma = alpha_sigma(gamma, x)
    return alpha * x + sigma * noise


def prior_term(x: torch.Tensor, gamma_1: torch.Tensor) -> torch.Tensor:
    """Return KL(q(z₁|x) ‖ N(0, I)) (equation 11) of images x `(batch, …)`, for γ₁ `()`."""
    # α²x² + σ² - log σ² - 1, without the cancellation of σ² and 1
    per_element = (-gamma_1).sigmoid() * (x**2 - 1) + torch.nn.functional.softplus(-gamma_1)
    return 0.5 * per_element.flatten(1).sum(1)


def reconstruction_term(x: torch.Tensor, noise: torch.Tensor, gamma_0: torch.Tensor) -> torch.Tensor:
    """
    Return -log p(x|z₀), with p(x|z₀) ∝ q(z₀|x) over the levels of each pixel (section 3.3).

    Args:
        x (`torch.Tensor` of shape `(batch, …)`): images.
        noise (`torch.Tensor` of the same shape): ε of z₀, independent of that of the diffusion term.
        gamma_0 (`torch.Tensor` of shape `()`): γ₀.
    """
    # z₀/α₀ and the levels, in units of σ₀/α₀
    scale = (-gamma_0 / 2).exp()
    levels = torch.linspace(-1, 1, LEVELS, dtype=x.dtype, device=x.device) * scale
    logits = -0.5 * ((x * scale + noise)[..., None] - levels) ** 2
    target = ((x + 1) / 2 * (LEVELS - 1)).round().long()
    per_element = torch.nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return per_element.view_as(x).flatten(1).sum(1)


def noise_error(
    prediction_type: str, pred: torch.Tensor, x: torch.Tensor, noise: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """
    Return ‖ε - ε̂‖² of each image.

    Args:
        prediction_type (`str`): what the network predicts: `"epsilon"`, `"v_prediction"` (αε - σx) or `"sample"` (x).
        pred (`torch.Tensor` of shape `(batch, …)`): the prediction at z = αx + σε.
        x, noise (`torch.Tensor` of the same shape): images, and ε.
        gamma (`torch.Tensor` of shape `(batch,)`): γ.
    """
    alpha, sigma = alpha_sigma(gamma, x)
    # Not from ε̂, which cancels at one end of the process: ε - ε̂ = α (v - v̂) = -(α/σ) (x - x̂)
    target, factor = {
        "epsilon": (noise, torch.ones_like(gamma)),
        "v_prediction": (alpha * noise - sigma * x, (-gamma).sigmoid()),
        "sample": (x, (-gamma).exp()),
    }[prediction_type]
    return factor * (target - pred).square().flatten(1).sum(1)


def discrete_times(u: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s = (i - 1)/T and t = i/T with i = ⌊uT⌋ + 1, for u in [0, 1) and T steps."""
    i = (u * steps).floor() + 1  # not ⌈uT⌉, which is 0 at u = 0
    return (i - 1) / steps, i / steps


def discrete_weight(gamma_s: torch.Tensor, gamma_t: torch.Tensor, steps: int) -> torch.Tensor:
    """Return T/2 (e^(γ(t) - γ(s)) - 1), the factor of ‖ε - ε̂‖² in the diffusion term of T steps (equation 14)."""
    return steps / 2 * torch.expm1(gamma_t - gamma_s)


def continuous_weight(gamma_slope: torch.Tensor) -> torch.Tensor:
    """Return γ'(t)/2, the factor of ‖ε - ε̂‖² in the diffusion term in continuous time (equation 17)."""
    return gamma_slope / 2


def minimise_variance(diffusion: torch.Tensor, *shape: torch.Tensor) -> None:
    """
    Make the parameters behind n(t) and n'(t) minimise the mean of the squared diffusion terms, while all others
    minimise the mean (appendix I.2). The mean does not depend on these parameters, so this minimises the variance.

    Args:
        diffusion (`torch.Tensor` of shape `(batch,)`): the diffusion terms, which depend on row i of `shape` in row i.
        shape (`torch.Tensor` of shape `(batch,)`): n(t) and n'(t).
    """
    # d(L²) = 2L dL, in each row: one backward pass serves both objectives.
    for tensor in shape:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: 2 * diffusion.detach() * gradient)
