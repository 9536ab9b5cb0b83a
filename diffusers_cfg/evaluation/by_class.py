"""Measure samples of each class: long tails show in the classes with few training images, not in the mean."""

from typing import Any

import torch

from diffusers_cfg.evaluation.metrics import jackknife, polynomial_mmd
from diffusers_cfg.evaluation.reports import INTERVAL, cell, format_number, table
from diffusers_cfg.evaluation.statistics import BLOCKS, RealStatistics

# Images of each class and set that are compared.
MAX_OF_CLASS = 1000


def measure_classes(
    features: torch.Tensor, class_labels: torch.Tensor, real: RealStatistics, id2label: dict[int, str]
) -> dict[str, dict[str, Any]]:
    """
    Compute the kernel distance of each class between images and the real images that are not held out, of the same
    class. It is unbiased for any number of images; the Fréchet distance of a class with fewer images than features has
    a bias that depends on their number, so that classes could not be compared.

    Args:
        features (`torch.Tensor` of shape `(images, features)`): the features of samples or of held-out real images.
        class_labels (`torch.Tensor` of shape `(images,)`): their classes.
        real (`RealStatistics`): the statistics of the real images.
        id2label (`dict[int, str]`): the names of the classes.

    Returns:
        For each class the number `num_images` of compared images, and if both sets have two or more the
        `kernel_distance`, with its standard error `kernel_distance_error` from 20 images on.
    """
    others, other_labels = real.others.features.double(), real.class_labels["others"]
    rows: dict[str, dict[str, Any]] = {}
    for class_id, name in id2label.items():
        own = features[class_labels == class_id][:MAX_OF_CLASS].double().cpu()
        other = others[other_labels == class_id][:MAX_OF_CLASS]
        row: dict[str, Any] = {"num_images": len(own)}
        rows[name] = row
        if min(len(own), len(other)) < 2:
            continue
        row["kernel_distance"] = polynomial_mmd(other, own)
        if len(own) >= 2 * BLOCKS:
            block = torch.arange(len(own)) % BLOCKS
            row["kernel_distance_error"] = jackknife(
                lambda kept, block=block, own=own, other=other: polynomial_mmd(other, own[kept[block]]), BLOCKS
            )
    return rows


def class_table(record: dict[str, Any]) -> str:
    """
    Return the Markdown table of the classes at the w with the best Fréchet distance, those with the most training
    images first.

    Args:
        record (`dict[str, Any]`): the contents of metrics.json.
    """
    w = record["best"]["frechet_distance"]
    best = next(row for row in record["results"] if row["guidance_scale"] == w)
    counts, accuracy = record.get("training_images"), best.get("accuracy_by_class", {})
    names = list(best["by_class"])
    if counts:
        names.sort(key=lambda name: -counts[name])
    header = ["class", *(["training images"] if counts else []), "samples", *(["accuracy"] if accuracy else [])]
    rows = []
    for name in names:
        row, real = best["by_class"][name], record["floor"]["by_class"][name]
        cells = [name, *([f"{counts[name]:,}"] if counts else []), f"{row['num_images']:,}"]
        cells += [f"{accuracy[name]:.3f}" if name in accuracy else ""] if accuracy else []
        errors = (
            {"kernel_distance_error": INTERVAL * row["kernel_distance_error"]} if "kernel_distance_error" in row else {}
        )
        rows.append([*cells, cell({**row, **errors}, "kernel_distance"), cell(real, "kernel_distance")])
    caption = (
        f"Samples at w = {format_number(w)}. The kernel distance (unbiased, a 95 % jackknife interval from "
        f"{2 * BLOCKS} samples on) compares the samples of a class with its real images, real with held-out real "
        f"images in place of samples; a small class has a wide interval. {record['num_samples']} samples of all "
        f"classes ({record['class_labels']} labels), features of {record['feature_extractor']['name']}."
    )
    return f"{table([*header, 'kernel distance', 'real'], rows)}\n\n{caption}\n"
