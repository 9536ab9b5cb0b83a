"""What a student of few steps is to predict. Functions over tensors: teacher and scheduler are arguments."""

from collections.abc import Callable

import torch
from objectives import prediction_target


def few_step_target(
    scheduler, predict: Callable, z: torch.Tensor, u: torch.Tensor, next_u: torch.Tensor, teacher_steps: int
) -> torch.Tensor:
    """
    The prediction with which one step of DDIM from u to next_u arrives where the teacher arrives by several
    (Salimans & Ho 2022, arXiv 2202.00512, appendix G; there by two).

    Args:
        scheduler (`LogSNRScheduler`): the noise process, and what is predicted.
        predict (`Callable`): the teacher, `(z, timesteps) -> prediction`.
        z (`torch.Tensor` of shape `(batch, …)`): noisy samples at u.
        u, next_u (`torch.Tensor` of shape `(batch,)`): noise levels, 0 ≤ next_u < u ≤ 1.
        teacher_steps (`int`): how many steps of equal length in u the teacher takes.

    Returns:
        `torch.Tensor` of the shape of z.
    """
    next_z = z
    for step in range(teacher_steps):
        here, there = (torch.lerp(u, next_u, i / teacher_steps) for i in (step, step + 1))
        next_z = ddim_step(scheduler, predict(next_z, scheduler.timestep(here)), next_z, here, there)

    # z' = α'x + σ'(z - αx)/σ, solved for x
    (alpha, sigma), (next_alpha, next_sigma) = (alpha_sigma(scheduler, level, z) for level in (u, next_u))
    x = (next_z - next_sigma / sigma * z) / (next_alpha - next_sigma / sigma * alpha)
    return prediction_target(scheduler, x, (z - alpha * x) / sigma, scheduler.timestep(u))


def ddim_step(scheduler, pred: torch.Tensor, z: torch.Tensor, u: torch.Tensor, next_u: torch.Tensor) -> torch.Tensor:
    """z at next_u, along the prediction at u: α'x̃ + σ'(z - αx̃)/σ (Song et al. 2021, arXiv 2010.02502, η = 0)."""
    (alpha, sigma), (next_alpha, next_sigma) = (alpha_sigma(scheduler, level, z) for level in (u, next_u))
    x = scheduler.predict_original_sample(pred, z, scheduler.log_snr(u).view_as(alpha))
    return next_alpha * x + next_sigma * (z - alpha * x) / sigma


def alpha_sigma(scheduler, u: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """α and σ at u, in a shape that broadcasts over z."""
    return tuple(value.view(-1, *(1,) * (z.ndim - 1)) for value in scheduler.alpha_sigma(u))
