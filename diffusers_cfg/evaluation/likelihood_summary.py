"""Summarize the terms of the bound of many images in bits per dimension, with standard errors."""

from collections.abc import Mapping
from typing import Any

import torch

from diffusers_cfg.evaluation.likelihood import ImageTerms
from diffusers_cfg.evaluation.loss_variance import ErrorMoments
from diffusers_cfg.variational_bound import bits_per_dim


def standard_error(values: torch.Tensor) -> float | None:
    """Return the standard error of the mean of some values, `None` for one value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def figures(parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the mean of each part and of their sum, and the standard error of the sum (`None` for one image)."""
    total = torch.stack([*parts.values()]).sum(0)
    means = {name: values.mean().item() for name, values in parts.items()}
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_error": standard_error(total),
        **means,
        "num_images": len(total),
    }


def bounds(
    terms: ImageTerms, class_labels: torch.Tensor, bits: float, class_log_probs: torch.Tensor | None = None
) -> dict[str, Any]:
    """
    Return the bounds, as far as there are images for them.

    Args:
        terms (`ImageTerms`): the terms of the images.
        class_labels (`torch.Tensor` of shape `(images,)`): the classes, -1 for unlabelled images.
        bits (`float`): the unit, from `bits_per_dim`.
        class_log_probs (`torch.Tensor` of shape `(num_classes,)`, *optional*): log p(c), for the bound by the labels.

    Returns:
        `dict`: the `figures` of p(x|c) as `"conditional"`, of p(x) by the null class as `"null"`, and of p(x) by the
        labels, -log p(x) ≤ -log p(x|c) - log p(c), as `"labels"`.
    """
    found, labelled = {}, class_labels >= 0
    for name, rows, column in (("conditional", labelled, 0), ("null", ~terms.diffusion[:, 1].isnan(), 1)):
        parts = {"prior": terms.prior, "reconstruction": terms.reconstruction, "diffusion": terms.diffusion[:, column]}
        if rows.any():
            found[name] = figures({part: bits * values[rows] for part, values in parts.items()})
    if class_log_probs is not None and labelled.any():
        log_probs = class_log_probs[class_labels[labelled]]
        found["labels"] = figures({"conditional": bits * terms.given_class[labelled], "class": -bits * log_probs})
    return found


def by_class(terms: ImageTerms, class_labels: torch.Tensor, id2label: dict[int, str], bits: float) -> dict[str, Any]:
    """Return the `figures` of p(x|c) of the images of each class, without their parts."""
    rows = {}
    for class_id in class_labels[class_labels >= 0].unique().tolist():
        own = figures({"sum": bits * terms.given_class[class_labels == class_id]})
        rows[id2label.get(class_id, str(class_id))] = {name: own[name] for name in own if name != "sum"}
    return rows


def error_moments(terms: ImageTerms, class_labels: torch.Tensor, ends: tuple[float, float]) -> ErrorMoments:
    """Return the moments of the errors in continuous time, with the classes if there are any."""
    rows = class_labels >= 0
    labelled = bool(rows.any())
    rows, column = (rows, 0) if labelled else (~rows, 1)
    return ErrorMoments(terms.gamma[rows].flatten(), terms.error[rows][..., column].flatten(), ends)


def summarize(
    terms: Mapping[int, ImageTerms],
    class_labels: torch.Tensor,
    class_log_probs: torch.Tensor,
    id2label: dict[int, str],
    image_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """
    Return the results for the report.

    Args:
        terms (`Mapping[int, ImageTerms]`): the terms of the images by the number of steps, 0 for continuous time.
        class_labels (`torch.Tensor`), class_log_probs (`torch.Tensor`): as in `bounds`.
        id2label (`dict[int, str]`): the names of the classes.
        image_shape (`tuple[int, int, int]`): channels, height and width.

    Returns:
        `dict`: `results`, a row for each number of steps, and `by_class`, for the last of them.
    """
    bits = bits_per_dim(image_shape)
    results = [
        {
            "diffusion_steps": steps,
            **bounds(own, class_labels, bits, class_log_probs),
            "network_evaluations": own.network_evaluations,
        }
        for steps, own in terms.items()
    ]
    return {"results": results, "by_class": by_class([*terms.values()][-1], class_labels, id2label, bits)}
