"""Define pixels with few levels, whose exact denoiser and entropy are known, in float64."""

import math

import numpy as np
import torch

from diffusers_cfg.noise_schedule import Schedule
from diffusers_cfg.variational_bound import (
    continuous_weight,
    diffuse,
    discrete_times,
    discrete_weight,
    noise_error,
    prior_term,
    reconstruction_term,
)

F64 = torch.float64
# ε of a trapezoidal rule, whose error is below 1e-10 for these integrands, and its weights
NOISE = torch.linspace(-8.4, 8.4, 113, dtype=F64)
WEIGHTS = (-(NOISE**2) / 2).exp() / math.sqrt(2 * math.pi) * (NOISE[1] - NOISE[0])


class Pixel:
    """
    A pixel with eight levels of unequal probability, and a mean near 0, which keeps the prior term close to 0.

    Args:
        levels (`list[int]`): the levels, in `0 … num_levels - 1`; two of the default are adjacent.
        num_levels (`int`): number of levels from -1 to 1.
    """

    def __init__(self, levels: tuple[int, ...] = (0, 40, 41, 97, 130, 171, 200, 255), num_levels: int = 256) -> None:
        self.values = 2 * torch.tensor(levels, dtype=F64) / (num_levels - 1) - 1
        self.probs = torch.tensor([0.2, 0.04, 0.06, 0.14, 0.08, 0.11, 0.2, 0.17], dtype=F64)
        self.entropy = -(self.probs * self.probs.log()).sum().item()

    def denoise(self, z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """Return E[x | z] for z of any shape, at γ, which broadcasts against z."""
        alpha, sigma = (-gamma).sigmoid().sqrt(), gamma.sigmoid().sqrt()
        distance = (z[..., None] - alpha[..., None] * self.values) / sigma[..., None]
        return (self.probs.log() - distance**2 / 2).softmax(-1) @ self.values

    def grid(self, *leading: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all x and ε, `(*leading, levels, noise)` each."""
        shape = *leading, len(self.values), len(NOISE)
        return self.values[:, None].expand(shape), NOISE.expand(shape)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of values `(…, levels, noise)` over x and ε."""
        return values @ WEIGHTS @ self.probs

    def moments(self, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E‖ε - ε̂‖² and E‖ε - ε̂‖⁴ of the exact denoiser at each γ `(gammas,)`."""
        errors = torch.cat([self._errors(part) for part in gamma.split(100)])
        return self.mean(errors), self.mean(errors**2)

    def _errors(self, gamma: torch.Tensor) -> torch.Tensor:
        x, noise = self.grid(len(gamma))
        rows = gamma[:, None, None].expand(x.shape).reshape(-1)
        x, noise = x.reshape(-1, 1), noise.reshape(-1, 1)
        pred = self.denoise(diffuse(x, noise, rows), rows[:, None])
        return noise_error("sample", pred, x, noise, rows).view(len(gamma), len(self.values), len(NOISE))

    def bound(self, schedule: Schedule, steps: int = 0) -> dict[str, float]:
        """Return the mean of the three terms of the bound, in continuous time or with T steps."""
        if steps:
            s, times = discrete_times((torch.arange(steps, dtype=F64) + 0.5) / steps, steps)
            shape, weights = schedule(times), torch.full((steps,), 1 / steps, dtype=F64)
            factor = discrete_weight(schedule(s).gamma, shape.gamma, steps)
        else:
            times, weights = quadrature()
            shape = schedule(times)
            factor = continuous_weight(shape.gamma_slope)
        gamma_0, gamma_1, (x, noise) = shape.gamma_0.double(), shape.gamma_1.double(), self.grid()
        reconstruction = reconstruction_term(x.reshape(-1, 1), noise.reshape(-1, 1), gamma_0).view(x.shape)
        return {
            "prior": (prior_term(self.values[:, None], gamma_1) @ self.probs).item(),
            "reconstruction": self.mean(reconstruction).item(),
            "diffusion": (weights * factor * self.moments(shape.gamma)[0]).sum().item(),
        }


def quadrature(panels: int = 24, nodes: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nodes and weights of a composite Gauss-Legendre rule on [0, 1], denser at 0, where γ' may be large."""
    points, weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(nodes))
    starts = torch.arange(panels, dtype=F64)[:, None]
    s = ((starts + (points + 1) / 2) / panels).flatten()
    return s**5, 5 * s**4 * weights.repeat(panels) / (2 * panels)
