"""Plot noise schedules, and the variance of the loss under each of them."""

from collections.abc import Mapping
from pathlib import Path

import torch

from diffusers_cfg.evaluation.loss_variance import ErrorMoments
from diffusers_cfg.evaluation.reports import new_figure, save_figure
from diffusers_cfg.noise_schedule import SHAPES, Schedule

LEARNED = "learned"
# How a schedule is drawn, apart from dashed.
LINES = {LEARNED: "k-"}
# Number of points of a curve.
POINTS = 1001


def schedules_between(ends: tuple[float, float], learned: Schedule | None) -> dict[str, Schedule]:
    """Return the schedules to compare between two ends of γ: the learned one, if any, and those of `SHAPES`."""
    fixed = {name: shape(*ends) for name, shape in SHAPES.items()}
    return {**({LEARNED: learned} if learned is not None else {}), **fixed}


def plot_schedules(schedules: Mapping[str, Schedule], path: Path) -> None:
    """Plot γ(t) = -log SNR and the SNR of noise schedules on the CPU."""
    figure, times = new_figure(1, 2, size=(10, 4)), torch.linspace(0, 1, POINTS, dtype=torch.float64)
    for name, schedule in schedules.items():
        gamma = schedule(times).gamma
        for axis, values in zip(figure.axes, (gamma, (-gamma).exp()), strict=True):
            axis.plot(times, values, LINES.get(name, "--"), label=name)
    for axis, name in zip(figure.axes, ("γ(t) = −log SNR", "SNR(t)"), strict=True):
        axis.set(xlabel="t", ylabel=name)
    figure.axes[1].set_yscale("log")
    figure.axes[0].legend()
    save_figure(figure, path)


def plot_variance(
    moments: ErrorMoments, schedules: Mapping[str, Schedule], variance: dict[str, float], bits: float, path: Path
) -> None:
    """Plot the second moment of the diffusion term over t under each schedule, in (bits per dimension)²."""
    figure, times = new_figure(), torch.linspace(0, 1, POINTS, dtype=torch.float64)
    axis = figure.axes[0]
    for name, schedule in schedules.items():
        values = bits**2 * moments.over_time(schedule, times)
        axis.plot(times, values, LINES.get(name, "--"), label=f"{name}: variance {variance[name]:.3g}")
    axis.set(xlabel="t", ylabel="E[(diffusion term at t)²], (bits per dimension)²", yscale="log")
    axis.legend()
    save_figure(figure, path)
