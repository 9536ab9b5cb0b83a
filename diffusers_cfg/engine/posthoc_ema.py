"""Track power-function averages of the weights, from which an average of any length can be fitted after the run.

Post-hoc EMA of Karras et al. (2023, arXiv 2312.02696), section 3 and appendix C. An average has the profile

    p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t],

the weight of the weights at step τ in their average at step t. Its length is measured by σ_rel, the standard deviation
of p divided by t. A run tracks two lengths and saves snapshots of both. Every other profile is then approximated by a
linear combination of the profiles of all snapshots, and its average by the same combination of the snapshots.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from diffusers_cfg.files import digest, fsync, write_safetensors
from diffusers_cfg.model_files import SNAPSHOTS

logger = logging.getLogger(__name__)

Numbers = np.ndarray | float

# The tracked lengths, those of the paper
SIGMA_RELS = (0.05, 0.1)
# The σ_rel of a constant profile, γ = 0
MAX_SIGMA_REL = 12**-0.5


class PowerAverages:
    """
    The averages of some modules at each length of `SIGMA_RELS`, in float32.

    Args:
        modules (`Mapping[str, torch.nn.Module]`): the modules, by the name that they have in the saved files.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self.parameters = {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
        }
        self.exponents = {sigma_rel: gamma_of(sigma_rel) + 1 for sigma_rel in SIGMA_RELS}
        self.averages = {
            sigma_rel: [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self.parameters.values()]
            for sigma_rel in SIGMA_RELS
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """
        Include the weights after a step, θ̂(t) = β θ̂(t - 1) + (1 - β) θ(t) with β = (1 - 1/t)^(γ + 1). Then θ(τ) has the
        weight ∫ p over [τ - 1, τ] in θ̂(t), exactly. The weights before the first step have none.

        Args:
            step (`int`): the number t of completed steps, from 1.
        """
        parameters = [parameter.detach() for parameter in self.parameters.values()]
        for sigma_rel, averages in self.averages.items():
            torch._foreach_lerp_(averages, parameters, 1 - (1 - 1 / step) ** self.exponents[sigma_rel])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the averages by the names `SIGMA_REL/MODULE.PARAMETER`."""
        return {
            f"{sigma_rel:g}/{name}": average
            for sigma_rel, averages in self.averages.items()
            for name, average in zip(self.parameters, averages, strict=True)
        }

    def save(self, path: Path) -> None:
        """Write the averages to a safetensors file of a checkpoint."""
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, path)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote. Raise KeyError or RuntimeError if the file is of other modules."""
        saved = load_file(path)
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])


def save_snapshot(averages: PowerAverages, output_dir: Path, step: int) -> None:
    """Write a snapshot of the averages. A failure, such as a full disk, is logged as an error and does not raise."""
    path = output_dir / SNAPSHOTS / f"step-{step}.safetensors"
    tensors = averages.tensors()
    try:
        write_safetensors(tensors, {"digest": digest(tensors)}, path)
        fsync(path)
        fsync(path.parent)
    except OSError as error:
        logger.error(
            "Failed to write the snapshot of step %d for the post-hoc EMA: %s. Training continues; averages that are "
            "reconstructed without it are less exact.",
            step,
            error,
        )


def snapshot_steps(interval: int, total_steps: int) -> list[int]:
    """Return the steps of a run's snapshots: every `interval` steps, and the last one. None without an interval."""
    return sorted({*range(interval, total_steps + 1, interval), total_steps}) if interval else []


def gamma_of(sigma_rel: float) -> float:
    """
    Return the exponent γ > 0 of a length, the root of σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)).

    Raises:
        ValueError: if σ_rel is not in (0, 1/√12), the lengths of profiles that rise.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel must lie between 0 and {MAX_SIGMA_REL:.4f}, but is {sigma_rel:g}.")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def inner_product(gamma_a: Numbers, t_a: Numbers, gamma_b: Numbers, t_b: Numbers) -> np.ndarray:
    """Return ∫ p_a p_b dτ of profiles, by their exponents γ and steps t, which are broadcast."""
    ends_first = np.where(t_a <= t_b, gamma_b, gamma_a)  # the exponent of the profile that ends last
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** ends_first / last


class Fit(NamedTuple):
    """A profile as a linear combination of the profiles of snapshots."""

    coefficients: np.ndarray  # (snapshots, lengths), float64
    residual: float  # the L2 norm of the difference, relative to that of the profile


def fit_profile(steps: Sequence[int], sigma_rel: float, step: int) -> Fit:
    """
    Fit the profile of another length to the profiles of all snapshots, by least squares with coefficients of sum 1.

    The paper leaves the sum free, because its networks normalise their weights when they use them. Here a sum of 0.99
    would scale all weights. With the sum fixed, the error of the average depends on how much the weights change during
    the run, not on their size.

    Args:
        steps (`Sequence[int]`): the steps of the snapshots, each of which has all lengths of `SIGMA_RELS`.
        sigma_rel (`float`): the length.
        step (`int`): the step t of the average.
    """
    gamma, t = (
        np.tile([gamma_of(length) for length in SIGMA_RELS], len(steps)),
        np.repeat(steps, len(SIGMA_RELS)) / step,
    )
    target = gamma_of(sigma_rel)
    norms = np.sqrt(inner_product(gamma, t, gamma, t))
    norm = np.sqrt(inner_product(target, 1.0, target, 1.0))
    products = inner_product(gamma[:, None], t[:, None], gamma, t) / norms[:, None] / norms
    with_target = inner_product(gamma, t, target, 1.0) / norms / norm
    # Lagrange's equations for profiles of norm 1, with the multiplier of the sum as the last unknown
    sums = norm / norms
    equations = np.block([[products, sums[:, None]], [sums, np.zeros(1)]])
    x = np.linalg.solve(equations, np.append(with_target, 1))[:-1]
    residual = max(0.0, float(1 - 2 * x @ with_target + x @ products @ x)) ** 0.5
    return Fit((x * sums).reshape(len(steps), len(SIGMA_RELS)), residual)
