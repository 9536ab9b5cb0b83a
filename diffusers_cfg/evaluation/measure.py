"""Compute all metrics of a set of images against the real images, with standard errors."""

import warnings
from typing import Any

import torch
from torchmetrics.image.kid import KernelInceptionDistance

from diffusers_cfg.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    jackknife,
    precision_recall,
)
from diffusers_cfg.evaluation.statistics import BLOCKS, MAX_NEIGHBOURS, Gaussian, RealStatistics, Reference, Summary

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000


def measure(summary: Summary, reference: Reference, id2label: dict[int, str] | None = None) -> dict[str, Any]:
    """
    Compute the metrics of a set of images.

    Args:
        summary (`Summary`): the statistics of the whole set.
        reference (`Reference`): the statistics of the real images.
        id2label (`dict[int, str]`, *optional*): the names of the extractor's classes.

    Returns:
        `dict[str, Any]`: a value for each metric, and standard errors, whose names end in `_error`. There is no
        inception score if the extractor has no classes, no class accuracy if it lacks the dataset's classes, no sFID
        without spatial features, and no metric of neighbours and kernels if the reference has no `neighbours`.
    """
    kept = min(summary.num_images, MAX_NEIGHBOURS)
    assert (summary.sums["count"].sum(), len(summary.features)) == (summary.num_images, kept), (
        f"The summary has {summary.sums['count'].sum():.0f} of {summary.num_images} images. Add each image once."
    )

    row: dict[str, Any] = {}
    for name, real, spatial in (
        ("frechet_distance", reference.features, False),
        ("spatial_frechet_distance", reference.spatial_features, True),
    ):
        if real is None:
            continue

        def distance(
            blocks: torch.Tensor | slice = slice(None), real: Gaussian = real, spatial: bool = spatial
        ) -> float:
            return frechet_distance(real.moments, summary.moments(blocks, spatial), real.sqrt_covariance)

        row[name] = distance()
        if summary.moment_blocks > 1:
            row[f"{name}_error"] = jackknife(distance, summary.moment_blocks)
    if (real := reference.neighbours) is not None:
        fake = summary.features[: len(real)].to(real.device)
        row["kernel_distance"], row["kernel_distance_error"] = kernel_distance(real, fake)
        row["precision"], row["recall"] = precision_recall(real, fake)
        row["density"], row["coverage"] = density_coverage(real, fake)
    if summary.num_classes:
        splits = zip(*(summary.sums[n] for n in ("split_count", "probabilities", "negative_entropy")), strict=True)
        scores = torch.tensor([inception_score(*split) for split in splits])
        row["inception_score"], row["inception_score_error"] = scores.mean().item(), scores.std().item()
    correct, requested = summary.sums["right"], summary.sums["asked"]
    if requested.sum() > 0:
        names = id2label or {}
        row["class_accuracy"] = (correct.sum() / requested.sum()).item()
        row["class_accuracy_error"] = jackknife(
            lambda kept: (correct[kept].sum() / requested[kept].sum()).item(), BLOCKS
        )
        row["accuracy_by_class"] = by_class = {
            names.get(class_id, str(class_id)): (correct[:, class_id].sum() / requested[:, class_id].sum()).item()
            for class_id in requested.sum(0).nonzero().flatten().tolist()
        }
        row["worst_class_accuracy"] = min(by_class.values())
    return row


def measure_floor(real: RealStatistics) -> dict[str, Any]:
    """Compute the metrics of the held-out real images against the other real images: the values of a perfect model."""
    floor = measure(real.held_out, real.reference_without_held_out, real.extractor.id2label)
    if real.extractor.accuracy is not None:
        # The small classifier was trained on most of the held-out images: report its accuracy on unseen ones instead.
        floor["class_accuracy"] = real.extractor.accuracy
        for key in ("class_accuracy_error", "accuracy_by_class", "worst_class_accuracy"):
            floor.pop(key, None)
    return floor


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """
    Compute the squared MMD with a cubic kernel over random subsets (Bińkowski et al. 2018, arXiv 1801.01401). With
    Inception's features it is the KID. Torch's global random state does not change.

    Args:
        real, fake (`torch.Tensor` of shape `(images, features)`): the features of the two sets.

    Returns:
        The mean and the standard deviation over the subsets.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns that it stores all features, which are few here
        torch.manual_seed(0)
        distance = KernelInceptionDistance(
            feature=torch.nn.Identity(),
            subsets=KERNEL_SUBSETS,
            subset_size=min(KERNEL_SUBSET_SIZE, len(real) // 2, len(fake) // 2),
            sync_on_compute=False,
        )
        distance.update(real, real=True)
        distance.update(fake, real=False)
        mean, deviation = distance.compute()
    return mean.item(), deviation.item()
