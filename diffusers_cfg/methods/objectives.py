"""Provide pure tensor functions that methods share: label dropout, targets, errors, losses by group."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import SchedulerMixin

from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.randomness import Draws

# Number of bins of u, and so of the log-SNR λ, for which the loss is logged separately. All are equally likely.
NOISE_LEVELS = 8


def drop_class_labels(
    class_labels: torch.Tensor,
    conditioning_dropout_prob: float,
    null_class_label: int,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """
    Replace each label by ∅ independently, with probability p_uncond (Ho & Salimans 2022, Algorithm 1, line 3).

    Args:
        class_labels (`torch.Tensor` of shape `(batch,)`): integers, not modified in-place.
        conditioning_dropout_prob (`float`): p_uncond in [0, 1).
        null_class_label (`int`): ∅.
        uniform (`torch.Tensor` of shape `(batch,)`): draws from U[0, 1).

    Returns:
        `torch.Tensor` of shape `(batch,)`: the labels after dropout.
    """
    return torch.where(uniform < conditioning_dropout_prob, null_class_label, class_labels)


def draw_guidance_scales(draws: Draws, max_guidance_scale: float) -> torch.Tensor:
    """Return a guidance scale w for each sample, `(batch,)`. √w is uniform, because samples change most at small w."""
    return max_guidance_scale * draws.uniform("guidance scale").square()


def prediction_target(
    scheduler: SchedulerMixin, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """
    Return the training target at z = αx + σε: ε, v = αε - σx or x, according to the scheduler's `prediction_type`.

    Args:
        scheduler (`SchedulerMixin`): has `config.prediction_type` and `get_velocity`.
        x (`torch.Tensor` of shape `(batch, …)`): clean samples.
        noise (`torch.Tensor` of shape `(batch, …)`): ε.
        timesteps (`torch.Tensor` of shape `(batch,)`): the network's time.

    Raises:
        ValueError: if the prediction type is unknown.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(x, noise, timesteps)
        case "sample":
            return x
        case other:
            raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, but is {other!r}.")


def squared_error(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return ‖pred - target‖² of each sample, averaged over its elements: `(batch,)`, float32."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def by_group(values: torch.Tensor, index: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    Split values by group, for the log.

    Args:
        values (`torch.Tensor` of shape `(batch,)`): one value for each sample.
        index (`torch.Tensor` of shape `(batch,)`): the group of each sample, `0 … len(names) - 1`.
        names (`Sequence[str]`): the names of the groups.

    Returns:
        `dict[str, torch.Tensor]`: the values by group, `(batch,)` each, with NaN for samples of other groups.
    """
    groups = torch.arange(len(names), device=index.device)[:, None]
    return dict(zip(names, torch.where(index == groups, values, torch.nan).unbind(), strict=True))


def level_names(scheduler: LogSNRScheduler, value: str = "loss") -> list[str]:
    """Return the log names of the losses, or of another value, by log-SNR from the clean end to the noisy end."""
    edges = scheduler.log_snr(torch.linspace(0, 1, NOISE_LEVELS + 1, dtype=torch.float64))
    edges = (edges.round(decimals=1) + 0.0).tolist()  # no negative zero
    return [f"{value}/log_snr_{low}_to_{high}" for high, low in pairwise(edges)]


def noise_level(u: torch.Tensor) -> torch.Tensor:
    """Return the index of the noise level of each time in [0, 1], int64, in the shape of u."""
    return (u * NOISE_LEVELS).long().clamp(max=NOISE_LEVELS - 1)


def loss_logs(
    loss: torch.Tensor, u: torch.Tensor, is_null: torch.Tensor, levels: Sequence[str]
) -> dict[str, torch.Tensor]:
    """
    Return the loss by noise level and by kind of label, and the fraction of null labels, for the log.

    Args:
        loss (`torch.Tensor` of shape `(batch,)`): the detached loss.
        u (`torch.Tensor` of shape `(batch,)`): noise levels in [0, 1].
        is_null (`torch.Tensor` of shape `(batch,)`): bool, whether the network was given the null class.
        levels (`Sequence[str]`): from `level_names`.
    """
    return {
        **by_group(loss, is_null.long(), ["loss/conditional", "loss/null"]),
        **by_group(loss, noise_level(u), levels),
        "dropout_rate": is_null.float(),
    }
