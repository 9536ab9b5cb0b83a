"""Compare the rules of guidance on one model with one classifier: their trade-off, their cost, and their classes."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from diffusers_cfg import CFGPipeline
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.evaluation.ablations import time_of
from diffusers_cfg.evaluation.features import classifier_split
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.evaluation.reports import (
    INTERVAL,
    RULES,
    caption,
    cell,
    cost_names,
    new_figure,
    save_figure,
    score_of,
    table,
)
from diffusers_cfg.evaluation.sampling import load_pipeline
from diffusers_cfg.evaluation.settings import EvaluationConfig, format_number
from diffusers_cfg.evaluation.statistics import BATCH_SIZE, RealStatistics, Summarizer
from diffusers_cfg.evaluation.sweep import load_data, sample_set
from diffusers_cfg.randomness import seeded_generator

# The metrics in the table.
COMPARED = ("frechet_distance", "inception_score", "class_accuracy", "precision", "recall")


def compare(configs: list[EvaluationConfig], records: list[dict[str, Any]], accelerator: Accelerator) -> dict[str, Any]:
    """
    Merge the records of the sweeps of one model by each rule of guidance.

    Args:
        configs (`list[EvaluationConfig]`): the settings of each sweep, which differ in the rule and the folder alone.
        records (`list[dict]`): what `run_sweep` returned for each; empty on all processes but the main one.
        accelerator (`Accelerator`): the processes that share the classification of the samples.

    Returns:
        On the main process the settings and the metrics of real images, `best`, the w with the best value of each
        metric by rule, and `rows`, the metrics at each w by each rule, with `seconds` for 100 samples. If the feature
        extractor has the dataset's classes, the rows and those of the real images, `floor`, also have the shares of
        `agreement`. On the other processes an empty dictionary.
    """
    shares = classified(configs, accelerator)
    if not accelerator.is_main_process:
        return {}
    shared = {name: value for name, value in records[0].items() if name not in ("results", "best", "floor")}
    rows = [
        {
            "guidance": config.guidance,
            **row,
            **time_of(config, row["guidance_scale"]),
            **shares.get((config.guidance, row["guidance_scale"]), {}),
        }
        for config, record in zip(configs, records, strict=True)
        for row in record["results"]
    ]
    return {
        **shared,
        "batch_size": configs[0].batch_size,
        "floor": {**records[0]["floor"], **shares.get(("real", None), {})},
        "best": {config.guidance: record["best"] for config, record in zip(configs, records, strict=True)},
        "rows": rows,
    }


def classified(
    configs: list[EvaluationConfig], accelerator: Accelerator
) -> dict[tuple[str, float | None], dict[str, Any]]:
    """
    Return the shares of `agreement` for the samples of each rule at each w, and for real images that the feature
    extractor was not trained on, under `("real", None)`. It is empty if the extractor lacks classes of the dataset.
    """
    first = configs[0]
    pipeline = load_pipeline(first, accelerator.device)
    with accelerator.main_process_first():
        dataset, id2label, _ = load_data(first.model, first.given_data, pipeline, accelerator.is_main_process)
    real = RealStatistics(
        accelerator, dataset, id2label, first.feature_extractor, first.num_samples, Path(first.statistics_dir)
    )
    if (real.summarizer.class_map[:-1] < 0).any():
        return {}
    judges = Judges(pipeline, real.summarizer, first.seed)
    found: dict[tuple[str, float | None], dict[str, Any]] = {}
    found["real", None] = agreement(judges.count_real(dataset, accelerator))
    for config in configs:
        for w in config.guidance_scales or []:
            found[config.guidance, w] = agreement(judges.count_samples(config, w, accelerator))
    return found


class Judges:
    """
    Two classifiers of images: the guiding one, and the feature extractor, which is independent of it. It has another
    architecture and was trained on the images without noise.

    Args:
        pipeline (`CFGPipeline`): a pipeline with a classifier.
        summarizer (`Summarizer`): the feature extractor, which has all classes of the dataset.
        seed (`int`): the seed of the latents of a model with a VAE.
    """

    def __init__(self, pipeline: CFGPipeline, summarizer: Summarizer, seed: int) -> None:
        self.pipeline, self.summarizer, self.seed = pipeline, summarizer, seed
        self.process = noise_process(pipeline)

    @torch.no_grad()
    def count(self, images: torch.Tensor, class_labels: torch.Tensor, indices: list[int]) -> torch.Tensor:
        """
        Count the images of the requested class according to the classifiers.

        Args:
            images (`torch.Tensor` of shape `(images, 3, height, width)`): uint8.
            class_labels (`torch.Tensor` of shape `(images,)`): the requested classes, ids of the dataset.
            indices (`list[int]`): the indices of the images in their set.

        Returns:
            `torch.Tensor` of shape `(3,)`: all images, those that the guiding classifier accepts, and those of them
            that the feature extractor rejects; float64.
        """
        device = self.pipeline.classifier.device
        x = to_float(images[:, : self.pipeline.image_shape[0]].to(device))
        x = self.pipeline.encode(x, [seeded_generator("cpu", self.seed, "encode", index) for index in indices]).float()
        u = torch.zeros(len(x), device=device)  # the clean end, where z = αx and α is almost 1
        alpha, _ = self.process.alpha_sigma(u)
        logits = self.pipeline.classifier(alpha.square().view(-1, 1, 1, 1) * x, self.process.timestep(u))
        accepted = logits.argmax(1).cpu() == class_labels
        _, logits = self.summarizer.extractor(images.to(self.summarizer.device))
        rejected = logits.argmax(1).cpu() != self.summarizer.class_map[class_labels]
        return torch.tensor([len(images), accepted.sum(), (accepted & rejected).sum()], dtype=torch.float64)

    def count_samples(self, config: EvaluationConfig, w: float, accelerator: Accelerator) -> torch.Tensor:
        """Return the counts of a set of samples over all processes."""
        samples, total = sample_set(config, w), torch.zeros(3, dtype=torch.float64)
        for shard in samples.shards[accelerator.process_index :: accelerator.num_processes]:
            content = samples.load(shard)
            images = torch.from_numpy(content.images).movedim(-1, 1)
            class_labels = torch.from_numpy(content.class_labels)
            for rows in torch.arange(len(shard)).split(BATCH_SIZE):
                total += self.count(images[rows], class_labels[rows], (shard.start + rows).tolist())
        return summed(total, accelerator)

    def count_real(self, dataset: Dataset, accelerator: Accelerator) -> torch.Tensor:
        """Return the counts over all processes of the real images that the small extractor is not trained on."""
        (indices, _), total = classifier_split(dataset.class_labels), torch.zeros(3, dtype=torch.float64)
        for rows in indices.split(BATCH_SIZE)[accelerator.process_index :: accelerator.num_processes]:
            batch = dataset.__getitems__(rows.tolist())
            total += self.count(batch.images_rgb, batch.class_labels, rows.tolist())
        return summed(total, accelerator)


def summed(counts: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Return the sum of counts over all processes."""
    reduced = accelerator.reduce(counts.to(accelerator.device), reduction="sum")
    assert isinstance(reduced, torch.Tensor)
    return reduced.cpu()


def agreement(counts: torch.Tensor) -> dict[str, Any]:
    """
    Return shares of images, from the counts of `Judges.count`.

    Returns:
        `guide_accuracy`, the share of images that the guiding classifier assigns to the requested class; `guide_only`,
        the share that it does and the feature extractor does not; and `guide_only_interval`, its 95 % interval.
    """
    total, accepted, alone = counts.tolist()
    interval = wilson_interval(alone, total)
    return {"guide_accuracy": accepted / total, "guide_only": alone / total, "guide_only_interval": interval}


def wilson_interval(count: float, total: float) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), which is not empty if the share is 0 or 1."""
    share, z2 = count / total, INTERVAL**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = INTERVAL / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, center - half), min(1.0, center + half)


def guidance_table(record: dict[str, Any]) -> str:
    """Return the Markdown table of a comparison, with a row for each rule and w, and its caption."""
    rows, names = record["rows"], record["metric_names"]
    metrics = [metric for metric in COMPARED if metric in rows[0]]
    has_classes, is_timed = "guide_only" in rows[0], any("seconds" in row for row in rows)
    costs = cost_names(rows)

    def shares(row: dict[str, Any]) -> list[str]:
        if not has_classes:
            return []
        low, high = row["guide_only_interval"]
        return [f"{row['guide_accuracy']:.3f}", f"{row['guide_only']:.4f} ({low:.4f} … {high:.4f})"]

    def cells(row: dict[str, Any]) -> list[str]:
        best = record["best"][row["guidance"]]
        seconds = [f"{row['seconds']:.3g}" if "seconds" in row else ""] if is_timed else []
        return [
            row["guidance"],
            format_number(row["guidance_scale"]),
            *(cell(row, metric, best) for metric in metrics),
            *shares(row),
            *(f"{row[cost]:g}" for cost in costs),
            *seconds,
        ]

    header = ["rule", "w", *(names[metric] for metric in metrics)]
    header += ["guide accuracy", "guide only"] if has_classes else []
    header += [*costs.values(), *(["s / 100 images"] if is_timed else [])]
    floor = ["real", "", *(cell(record["floor"], metric) for metric in metrics), *shares(record["floor"])]
    floor += [""] * (len(header) - len(floor))
    return f"{table(header, [*map(cells, rows), floor])}\n\n{guidance_caption(record)}\n"


def guidance_caption(record: dict[str, Any]) -> str:
    """Describe how the rules were compared."""
    rules = "".join(f"{rule}: {meaning}. " for rule, meaning in RULES.items())
    text = (
        f"classifier_free: ε̃ = (1 + w) ε(z, c) - w ε(z). {rules}With an exact classifier all draw the same images. "
        f"{caption(record)} Bold: the best w of a rule. Seconds are those of one process with batches of "
        f"{record['batch_size']} images."
    )
    if "guide_only" not in record["floor"]:
        return text
    return (
        f"{text} guide accuracy: the share of samples that the guiding classifier, at the clean end of the process, "
        "assigns to the requested class. guide only: the share that it assigns to the requested class and the feature "
        "extractor, an independent classifier, does not, with a 95 % interval (Wilson). The shares of the last row are "
        "of the real images that the small extractor is not trained on."
    )


def plot_guidance(record: dict[str, Any], path: Path) -> None:
    """
    Plot Fréchet distance against the score, a curve for each rule labelled by w, as in figures 1 and 4 of Ho & Salimans
    2022. If the shares are known, also plot those of samples that only the guiding classifier accepts, against w.
    """
    rows, names, floor = record["rows"], record["metric_names"], record["floor"]
    score, has_classes = score_of(rows), "guide_only" in floor
    figure = new_figure(1, 1 + has_classes, size=(7 + 6 * has_classes, 5))
    width = 1 if score == "inception_score" else INTERVAL
    for number, rule in enumerate(dict.fromkeys(row["guidance"] for row in rows)):
        curve = [row for row in rows if row["guidance"] == rule]
        # Hollow markers of different shapes, because rules with the same images have the same points
        style: dict[str, Any] = {"marker": "osD^"[number], "color": f"C{number}", "markerfacecolor": "none"}
        scores, distances = ([row[metric] for row in curve] for metric in (score, "frechet_distance"))
        figure.axes[0].errorbar(
            scores,
            distances,
            [INTERVAL * row.get("frechet_distance_error", 0.0) for row in curve],
            [width * row.get(f"{score}_error", 0.0) for row in curve],
            label=rule,
            **style,
        )
        for row, x, y in zip(curve, scores, distances, strict=True):
            label = format_number(row["guidance_scale"])
            figure.axes[0].annotate(label, (x, y), (5, 5), textcoords="offset points", color=style["color"], fontsize=8)
        if has_classes:
            share = torch.tensor([row["guide_only"] for row in curve])
            bounds = torch.tensor([row["guide_only_interval"] for row in curve])
            figure.axes[1].errorbar(
                [row["guidance_scale"] for row in curve],
                share.tolist(),
                (bounds.T - share).abs().tolist(),
                capsize=3,
                label=rule,
                **style,
            )
    figure.axes[0].plot(floor[score], floor["frechet_distance"], "k*", markersize=10, label="real images")
    figure.axes[0].set(xlabel=names[score], ylabel=names["frechet_distance"], yscale="log", title="labelled by w")
    if has_classes:
        figure.axes[1].axhline(floor["guide_only"], color="gray", linestyle=":", label="real images")
        figure.axes[1].axhspan(*floor["guide_only_interval"], color="gray", alpha=0.15, linewidth=0)
        figure.axes[1].set(xlabel="guidance scale w", ylabel="share that only the guiding classifier accepts")
    for axis in figure.axes:
        axis.legend(fontsize=8)
    save_figure(figure, path)
