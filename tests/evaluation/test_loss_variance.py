"""Test the variance of the diffusion term under several noise schedules against closed forms."""

import pytest
import torch

from diffusers_cfg.evaluation.loss_variance import LEAST, ErrorMoments, variances
from diffusers_cfg.noise_schedule import SHAPES, Schedule, ScheduleValues, linear

ENDS = -8.0, 4.0


@pytest.fixture(scope="module")
def moments() -> ErrorMoments:
    """Return the moments of the error e^(γ/4), in random order of γ."""
    gamma = ENDS[0] + (ENDS[1] - ENDS[0]) * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    return ErrorMoments(gamma, (gamma / 4).exp(), ENDS)


def best() -> Schedule:
    """Return the schedule with γ' ∝ 1 / e^(γ/4), so that every time has the same diffusion term."""
    first, last = (torch.tensor(end, dtype=torch.float64) for end in ENDS)
    start, rise = (first / 4).exp(), (last / 4).exp() - (first / 4).exp()

    def schedule(times: torch.Tensor) -> ScheduleValues:
        gamma, slope = 4 * (start + rise * times).log(), 4 * rise / (start + rise * times)
        return ScheduleValues((gamma - first) / (last - first), slope / (last - first), first, last)

    return schedule


def test_variance_has_a_closed_form_and_a_least_value(moments):
    # ½ ∫ e^(γ/4) dγ, and ¼ (γ₁ - γ₀) ∫ e^(γ/2) dγ - mean² for a linear schedule
    start, end = (torch.tensor(gamma).div(4).exp().item() for gamma in ENDS)
    mean, second = 2 * (end - start), 12 / 4 * 2 * (end**2 - start**2)
    assert moments.mean() == pytest.approx(mean, rel=1e-3)
    found = variances(moments, {name: shape(*ENDS) for name, shape in SHAPES.items()} | {"best": best()}, unit=1.0)
    assert found["linear"] == pytest.approx(second - mean**2, rel=0.01)
    assert found["best"] == pytest.approx(0, abs=0.01 * found["linear"])
    assert found[LEAST] == min(found.values())
    assert variances(moments, {"linear": linear(*ENDS)}, unit=0.5)["linear"] == pytest.approx(found["linear"] / 4)


def test_second_moment_over_time_has_the_variance_as_its_mean(moments):
    times = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for shape in SHAPES.values():
        schedule = shape(*ENDS)
        mean = moments.over_time(schedule, times).mean().item()
        assert mean - moments.mean() ** 2 == pytest.approx(moments.variance(schedule), rel=0.01)


def test_one_error_gives_a_constant():
    moments = ErrorMoments(torch.tensor([1.0]), torch.tensor([3.0]), ENDS)
    assert moments.mean() == pytest.approx(3 * 12 / 2)
    assert moments.variance(linear(*ENDS)) == pytest.approx(0, abs=1e-9)
