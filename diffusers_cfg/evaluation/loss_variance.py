"""Compare noise schedules by the variance of the one-sample estimate of the diffusion term (Kingma et al. 2021,
arXiv 2107.00630, section 5.3 and figure 4), from the errors of one network at many noise levels.
"""

from collections.abc import Mapping

import torch

from diffusers_cfg.noise_schedule import Schedule

# Number of intervals of γ with as many errors each, and of the points at which a schedule is evaluated in each.
BINS, POINTS = 64, 16
# The name of the best possible shape
LEAST = "least possible"


class ErrorMoments:
    """
    The first two moments of ‖ε - ε̂‖² as a function of γ, constant in each of `BINS` intervals.

    Args:
        gamma (`torch.Tensor` of shape `(samples,)`): γ, drawn from any density over the range.
        error (`torch.Tensor` of shape `(samples,)`): ‖ε - ε̂‖² at γ.
        ends (`tuple[float, float]`): γ₀ and γ₁.
    """

    def __init__(self, gamma: torch.Tensor, error: torch.Tensor, ends: tuple[float, float]) -> None:
        gamma, order = gamma.double().sort()
        groups = error.double()[order].tensor_split(min(BINS, len(gamma)))
        starts = torch.tensor([len(group) for group in groups[:-1]], dtype=torch.long).cumsum(0)
        between = (gamma[starts - 1] + gamma[starts]) / 2
        self.edges = torch.cat([gamma.new_tensor(ends[:1]), between, gamma.new_tensor(ends[1:])])
        self.first = torch.stack([group.mean() for group in groups])  # E ‖ε - ε̂‖²
        self.second = torch.stack([group.square().mean() for group in groups])  # E ‖ε - ε̂‖⁴

    def mean(self) -> float:
        """Return the diffusion term ½ ∫ E‖ε - ε̂‖² dγ in nats, which is that of every schedule."""
        return (self.first * self.edges.diff()).sum().item() / 2

    def variance(self, schedule: Schedule) -> float:
        """Return the variance of ½ γ'(t) ‖ε - ε̂‖² for t ~ U[0, 1], in squared nats, under a schedule."""
        width = self.edges.diff()[:, None] / POINTS
        gamma = self.edges[:-1, None] + width * (torch.arange(POINTS) + 0.5)
        slope = schedule(times_of(schedule, gamma)).gamma_slope
        # ∫ (γ'/2)² E‖ε - ε̂‖⁴ dt = ¼ ∫ γ' E‖ε - ε̂‖⁴ dγ
        return ((slope * width).sum(1) @ self.second / 4 - self.mean() ** 2).item()

    def least_variance(self) -> float:
        """Return the least variance of any schedule between the ends, that with γ' ∝ 1/√E‖ε - ε̂‖⁴."""
        return ((self.second.sqrt() @ self.edges.diff()) ** 2 / 4 - self.mean() ** 2).item()

    def over_time(self, schedule: Schedule, times: torch.Tensor) -> torch.Tensor:
        """Return E[(½ γ'(t) ‖ε - ε̂‖²)²] at some times, in squared nats: its mean minus `mean()`² is the variance."""
        values = schedule(times)
        index = torch.bucketize(values.gamma, self.edges[1:-1])
        return (values.gamma_slope / 2) ** 2 * self.second[index]


def times_of(schedule: Schedule, gamma: torch.Tensor) -> torch.Tensor:
    """Return the times at which a schedule reaches γ, float64, by bisection."""
    low, high = torch.zeros_like(gamma), torch.ones_like(gamma)
    for _ in range(60):
        middle = (low + high) / 2
        is_below = schedule(middle).gamma < gamma
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


def variances(moments: ErrorMoments, schedules: Mapping[str, Schedule], unit: float) -> dict[str, float]:
    """
    Return the variance of the one-sample estimate under each schedule, and the least possible, for a unit in which one
    nat is `unit`.
    """
    nats = {name: moments.variance(schedule) for name, schedule in schedules.items()}
    return {name: unit**2 * value for name, value in {**nats, LEAST: moments.least_variance()}.items()}
