"""Conditioning dropout: how one network learns ε(z, c) and ε(z)."""

import torch


def drop_class_labels(
    class_labels: torch.Tensor,
    conditioning_dropout_prob: float,
    null_class_label: int,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """
    c ← ∅ with probability p_uncond, for each example by itself (Ho & Salimans 2022, Algorithm 1, line 3).

    Args:
        class_labels (`torch.Tensor` of shape `(batch,)`): integers; they are not changed.
        conditioning_dropout_prob (`float`): p_uncond in [0, 1).
        null_class_label (`int`): ∅.
        uniform (`torch.Tensor` of shape `(batch,)`): draws from U[0, 1).

    Returns:
        `torch.Tensor` of shape `(batch,)`: the labels, some of them replaced by ∅.
    """
    return torch.where(uniform < conditioning_dropout_prob, null_class_label, class_labels)
