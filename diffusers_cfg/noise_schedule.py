"""Define the noise schedules γ(t) of variational diffusion models (Kingma et al. 2021, arXiv 2107.00630, appendix H).

γ = -λ = -log SNR rises from γ₀ at t = 0 (clean) to γ₁ at t = 1 (noise), with σ² = sigmoid(γ) and α² = sigmoid(-γ). In
continuous time the bound depends on γ₀ and γ₁ only; the shape between them determines how noisy its estimate is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# Beyond, α² rounds to 1 in float32. LogSNRScheduler refuses a larger log_snr_max.
MIN_GAMMA = -15.0
# Beyond, the clean end has no image left, and α² is lost in the float32 β of diffusers' schedulers.
MAX_GAMMA_0 = 10.0
# LogSNRScheduler refuses a smaller log_snr_min.
MAX_GAMMA = 60.0
# Learned ends stay at least this far apart, up to rounding.
MIN_RANGE, TOLERANCE = 1.0, 1e-5


class ScheduleValues(NamedTuple):
    """A noise schedule at some times: γ(t) = γ₀ + (γ₁ - γ₀) n(t), with n(0) = 0 and n(1) = 1."""

    n: torch.Tensor  # n(t), in the shape of the times
    slope: torch.Tensor  # n'(t) > 0
    gamma_0: torch.Tensor  # ()
    gamma_1: torch.Tensor  # ()

    @property
    def gamma(self) -> torch.Tensor:
        """γ(t)."""
        return self.gamma_0 + (self.gamma_1 - self.gamma_0) * self.n

    @property
    def gamma_slope(self) -> torch.Tensor:
        """γ'(t)."""
        return (self.gamma_1 - self.gamma_0) * self.slope


class NoiseSchedule(torch.nn.Module):
    """
    A noise schedule whose ends and shape can be learned.

    The shape is n(t) = (g(t) - g(0)) / (g(1) - g(0)) with g(t) = |w₁| t + mean_k |w₃ₖ| sigmoid(|w₂ₖ| (2t - 1) + bₖ),
    which rises for any weights. The sigmoids start spread over [0, 1] and the shape starts within 0.0012 of a line:
    from small random weights it would not change in thousands of steps.

    Args:
        gamma_0 (`float`): γ₀ at the start, in [-15, 10].
        gamma_1 (`float`): γ₁ at the start, in [γ₀ + 1, 60].
        learn_ends (`bool`): Whether γ₀ and γ₁ are parameters; otherwise they are buffers.
        learn_shape (`bool`): Whether the shape has parameters; otherwise γ is linear in t.
        hidden_size (`int`): Number of sigmoids.

    Raises:
        ValueError: If the ends are out of range.
    """

    gamma_0: torch.Tensor
    gamma_1: torch.Tensor

    def __init__(
        self,
        gamma_0: float = -13.3,
        gamma_1: float = 5.0,
        learn_ends: bool = True,
        learn_shape: bool = True,
        hidden_size: int = 1024,
    ) -> None:
        super().__init__()
        within = MIN_GAMMA <= gamma_0 <= MAX_GAMMA_0 and gamma_1 <= MAX_GAMMA
        if not (within and gamma_1 - gamma_0 >= MIN_RANGE - TOLERANCE):
            raise ValueError(
                f"gamma_0 must lie in [{MIN_GAMMA:g}, {MAX_GAMMA_0:g}] and gamma_1 in [gamma_0 + {MIN_RANGE:g}, "
                f"{MAX_GAMMA:g}], but they are {gamma_0} and {gamma_1}."
            )
        self.learn_ends, self.learn_shape = learn_ends, learn_shape
        for name, value in (("gamma_0", gamma_0), ("gamma_1", gamma_1)):
            end = torch.tensor(float(value))
            if learn_ends:
                self.register_parameter(name, torch.nn.Parameter(end))
            else:
                self.register_buffer(name, end)
        if learn_shape:
            self.w1 = torch.nn.Parameter(torch.tensor(1.0))
            self.w2 = torch.nn.Parameter(torch.full((hidden_size,), 20.0))
            self.b2 = torch.nn.Parameter(-20 * torch.linspace(-1, 1, hidden_size))
            self.w3 = torch.nn.Parameter(torch.full((hidden_size,), 0.1))

    def forward(self, times: torch.Tensor) -> ScheduleValues:
        """
        Return the schedule at times in [0, 1], of any shape. The slope has a closed form, so that it needs no gradient.
        """
        if self.learn_ends:
            with torch.no_grad():  # an optimizer step may have left the range
                self.gamma_0.clamp_(MIN_GAMMA, MAX_GAMMA_0)
                self.gamma_1.clamp_(min=self.gamma_0 + MIN_RANGE).clamp_(max=MAX_GAMMA)
        if not self.learn_shape:
            return ScheduleValues(times, torch.ones_like(times), self.gamma_0, self.gamma_1)
        ends, _ = self._rise(torch.arange(2, device=times.device))
        rise, slope = self._rise(times)
        length = ends[1] - ends[0]
        return ScheduleValues((rise - ends[0]) / length, slope / length, self.gamma_0, self.gamma_1)

    def _rise(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return g(t) and g'(t)."""
        w1, w2, w3 = self.w1.abs(), self.w2.abs(), self.w3.abs()
        s = (w2 * (2 * times[..., None] - 1) + self.b2).sigmoid()
        return w1 * times + (w3 * s).mean(-1), w1 + (2 * w2 * w3 * s * (1 - s)).mean(-1)

    def ends(self) -> tuple[float, float]:
        """Return γ₀ and γ₁."""
        values = self(torch.zeros((), device=self.gamma_0.device))
        return values.gamma_0.item(), values.gamma_1.item()


Schedule = Callable[[torch.Tensor], ScheduleValues]


def linear(gamma_0: float, gamma_1: float) -> Schedule:
    """Return the schedule that is linear in t, between two ends."""

    def gamma(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gamma_0 + (gamma_1 - gamma_0) * times, torch.full_like(times, gamma_1 - gamma_0)

    return _between(gamma, gamma_0, gamma_1)


def cosine(gamma_0: float, gamma_1: float) -> Schedule:
    """Return α = cos(at + b) (Nichol & Dhariwal 2021, arXiv 2102.09672, without offset), cut off at two ends."""
    start, end = (math.atan(math.exp(gamma / 2)) for gamma in (gamma_0, gamma_1))

    def gamma(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = start + (end - start) * times
        return 2 * angle.tan().log(), 4 * (end - start) / (2 * angle).sin()

    return _between(gamma, gamma_0, gamma_1)


def beta_linear(gamma_0: float, gamma_1: float) -> Schedule:
    """Return α² = exp(-0.1 s - 9.95 s²) (Song et al. 2021, arXiv 2011.13456, VP-SDE), cut off at two ends."""
    linear_term, square_term = 0.1, 9.95
    # softplus(γ) = 0.1 s + 9.95 s², solved for s
    start, end = (
        (math.sqrt(linear_term**2 + 4 * square_term * math.log1p(math.exp(gamma))) - linear_term) / (2 * square_term)
        for gamma in (gamma_0, gamma_1)
    )

    def gamma(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = start + (end - start) * times
        integral = linear_term * s + square_term * s**2
        slope = (end - start) * (linear_term + 2 * square_term * s)
        return integral.expm1().log(), slope / -(-integral).expm1()

    return _between(gamma, gamma_0, gamma_1)


def _between(
    gamma: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], gamma_0: float, gamma_1: float
) -> Schedule:
    """Return a schedule from a function that maps times to γ and γ'."""

    def schedule(times: torch.Tensor) -> ScheduleValues:
        value, slope = gamma(times)
        n, slope = (value - gamma_0) / (gamma_1 - gamma_0), slope / (gamma_1 - gamma_0)
        ends = (torch.tensor(end, dtype=times.dtype, device=times.device) for end in (gamma_0, gamma_1))
        return ScheduleValues(n, slope, *ends)

    return schedule


# The schedules of figure 4 of the paper that are not learned
SHAPES: dict[str, Callable[[float, float], Schedule]] = {"linear": linear, "cosine": cosine, "β-linear": beta_linear}
