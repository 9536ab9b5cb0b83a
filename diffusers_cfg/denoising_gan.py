"""Define the steps and the losses of denoising diffusion GANs (Xiao et al. 2021, arXiv 2112.07804).

Step t of t = 0 … T-1 lies between x_prev, at the noise level ᾱ[t-1], and x_next, at ᾱ[t]. As in diffusers, ᾱ[t] is the
cumulative product of 1 - β. ᾱ[-1] is 1, so the x_prev of step 0 is the data. All networks are given t, that of x_next.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch.nn.functional import softplus

Loss = Literal["non_saturating", "relativistic"]

# β(u) at the ends of the variance-preserving process in continuous time (Song et al. 2021, arXiv 2011.13456), which the
# paper discretizes, and its first time u.
BETA_MIN, BETA_MAX, FIRST_TIME = 0.1, 20.0, 1e-3


def vp_betas(num_timesteps: int) -> list[float]:
    """
    Return β of each of the T steps between equally spaced times of the variance-preserving process. ᾱ[T-1] is 4.3e-5
    for every T.
    """

    def log_alpha_bar(u: float) -> float:
        return -0.5 * u**2 * (BETA_MAX - BETA_MIN) - u * BETA_MIN

    times = [FIRST_TIME + (1 - FIRST_TIME) * i / num_timesteps for i in range(num_timesteps + 1)]
    logs = [log_alpha_bar(u) for u in times]
    return [-math.expm1(after - before) for before, after in pairwise(logs)]


class DenoisingSteps(torch.nn.Module):
    """
    The distributions q(x_prev, x_next | x) and q(x_prev | x_next, x) of T steps.

    Args:
        betas (`list[float]`): β of each step, in (0, 1).
    """

    # In the order of the columns of `table`
    coefficients = ("alpha_prev", "sigma_prev", "alpha_step", "sigma_step", "mean_x", "mean_next", "std")

    def __init__(self, betas: list[float]) -> None:
        super().__init__()
        kept = 1 - torch.tensor(betas, dtype=torch.float64)
        after = kept.cumprod(0)
        before = torch.cat([after.new_ones(1), after[:-1]])
        beta = 1 - kept  # with the rounding error of ᾱ, so that the posterior of step 0 is x exactly
        columns = [
            before.sqrt(),
            (1 - before).sqrt(),
            kept.sqrt(),
            beta.sqrt(),
            before.sqrt() * beta / (1 - after),
            kept.sqrt() * (1 - before) / (1 - after),
            (beta * (1 - before) / (1 - after)).sqrt(),
        ]
        self.table: torch.Tensor
        self.register_buffer("table", torch.stack(columns, dim=1), persistent=False)

    def diffuse(
        self, x: torch.Tensor, t: torch.Tensor, noise_prev: torch.Tensor, noise_next: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Sample x_prev ~ q(x_prev | x), and x_next ~ q(x_next | x_prev) from it.

        Args:
            x (`torch.Tensor` of shape `(batch, …)`): data.
            t (`torch.Tensor` of shape `(batch,)`): steps, int64.
            noise_prev, noise_next (`torch.Tensor` of the shape of x): independent noise of each.

        Returns:
            x_prev and x_next, of the shape of x.
        """
        c = self._at(t, x)
        x_prev = c["alpha_prev"] * x + c["sigma_prev"] * noise_prev
        return x_prev, c["alpha_step"] * x_prev + c["sigma_step"] * noise_next

    def denoise(self, x: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Sample x_prev from the posterior q(x_prev | x_next, x), which is x itself at t = 0.

        Args:
            x (`torch.Tensor` of shape `(batch, …)`): data, or the generator's.
            x_next (`torch.Tensor` of the shape of x): the noisier end of the step.
            t (`torch.Tensor` of shape `(batch,)`): steps, int64.
            noise (`torch.Tensor` of the shape of x): noise.
        """
        c = self._at(t, x)
        return c["mean_x"] * x + c["mean_next"] * x_next + c["std"] * noise

    def _at(self, t: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the coefficients of the steps t, each in a shape that broadcasts over x."""
        rows = self.table[t].to(x.dtype)
        return {name: rows[:, i].view(-1, *(1,) * (x.ndim - 1)) for i, name in enumerate(self.coefficients)}


def discriminator_loss(loss: Loss, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """
    Return the loss of a discriminator, `(batch,)`.

    Args:
        loss (`str`): "non_saturating" (equation 5), or "relativistic" (Huang et al. 2025, arXiv 2501.05441), which
            pairs each real sample with the generated one that has the same x_next.
        real, fake (`torch.Tensor` of shape `(batch,)`): the discriminator's logits D of real and of generated x_prev.
    """
    return softplus(fake - real) if loss == "relativistic" else softplus(-real) + softplus(fake)


def generator_loss(loss: Loss, real: torch.Tensor | None, fake: torch.Tensor) -> torch.Tensor:
    """Return the loss of a generator, `(batch,)`. See `discriminator_loss`; only "relativistic" needs `real`."""
    if loss == "relativistic":
        assert real is not None
        return softplus(real - fake)
    return softplus(-fake)


def squared_gradient(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """
    Return ‖∇ₓ D‖² of each sample, `(batch,)`: the R1 penalty is γ/2 times this (Mescheder et al. 2018,
    arXiv 1801.04406). It can be differentiated, and is computed without autocast.

    Args:
        logits (`torch.Tensor` of shape `(batch,)`): D, computed from x.
        x (`torch.Tensor` of shape `(batch, …)`): the samples, with `requires_grad`.
    """
    with torch.autocast(x.device.type, enabled=False):  # which also converts the operations of the backward pass
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)
