"""Write the results of a sweep over w: metrics.json, a table in Markdown and curves."""

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffusers_cfg.evaluation.settings import format_number
from diffusers_cfg.files import atomic_write

METRICS_FILE, LIKELIHOOD_FILE = "metrics.json", "likelihood.json"
LOWER_IS_BETTER = ("frechet_distance", "spatial_frechet_distance", "kernel_distance")
# Metrics whose error is a standard error over blocks of images, shown as a 95 % interval.
WITH_INTERVAL = ("frechet_distance", "spatial_frechet_distance", "class_accuracy")
# Metrics of which neither a high nor a low value is better.
NOT_RANKED = ("close_to_training",)
# Half the width of a 95 % interval, in standard errors.
INTERVAL = 1.96
# What w means by each rule of guidance but classifier-free guidance, whose formula is that of the paper.
RULES = {
    "classifier": "the unconditional model and the classifier at the scale 1 + w",
    "conditional_classifier": "the conditional model and the classifier at the scale w",
    "both": "classifier-free guidance at w/2 and the classifier at the scale w/2",
}
DECIMALS = {"kernel_distance": 4, "inception_score": 2}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a header and rows as a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def spread(values: list[float], decimals: int = 3) -> str:
    """Format the mean of a value over seeds, and its standard deviation if there are several. No value is empty."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6, 4), title: str | None = None, sharey: bool = False
) -> Figure:
    """
    Return a figure with a grid of axes, in `figure.axes` row by row. The figure has no window or backend, and needs no
    closing.

    Args:
        rows (`int`), columns (`int`): the shape of the grid.
        size (`tuple[float, float]`): the width and height in inches.
        title (`str`, *optional*): the title above the axes.
        sharey (`bool`): whether all axes share one vertical scale.
    """
    figure = Figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns, sharey=sharey)
    if title is not None:
        figure.suptitle(title)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file atomically."""
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")


def metric_names(feature_extractor: str) -> dict[str, str]:
    """Return the display names of the metrics. Only Inception's features give an FID, KID, IS or sFID."""
    names = ["Fréchet distance", "kernel distance", "classifier score"]
    if feature_extractor == "inception":
        names = ["FID", "KID", "IS"]
    return {
        **dict(zip(("frechet_distance", "kernel_distance", "inception_score"), names, strict=True)),
        "spatial_frechet_distance": "sFID",
        **{name: name for name in ("precision", "recall", "density", "coverage")},
        "class_accuracy": "class accuracy",
        "worst_class_accuracy": "worst class",
        "close_to_training": "close to training",
    }


def best_scales(results: list[dict[str, Any]], names: dict[str, str]) -> dict[str, float]:
    """Return the w with the best value of each metric."""
    best = {}
    for metric in names:
        if metric in results[0] and metric not in NOT_RANKED:
            choose = min if metric in LOWER_IS_BETTER else max
            best[metric] = choose(results, key=lambda row, metric=metric: row[metric])["guidance_scale"]
    return best


def sweep_table(record: dict[str, Any]) -> str:
    """Return the Markdown table of a sweep, with a caption that describes the measurement."""
    names = {metric: name for metric, name in record["metric_names"].items() if metric in record["results"][0]}
    costs = cost_names(record["results"])
    rows = []
    for row in record["results"]:
        cells = [cell(row, metric, record["best"]) for metric in names]
        rows.append([format_number(row["guidance_scale"]), *cells, *(f"{row[cost]:g}" for cost in costs)])
    if record["floor"]:
        rows.append(["real", *(cell(record["floor"], metric) for metric in names), *("" for _ in costs)])
    text = f"{table(['w', *names.values(), *costs.values()], rows)}\n\n{caption(record)}\n"
    return text + (f"\n{record['memorisation']}\n" if "memorisation" in record else "")


def sweep_curves(record: dict[str, Any], prefix: str = "") -> list[dict[str, float]]:
    """
    Return what was measured for each w as numbers by name, ordered by w.

    Args:
        record (`dict[str, Any]`): the contents of metrics.json.
        prefix (`str`): text before each name. That of w is `w`.
    """
    rows = sorted(record["results"], key=lambda row: row["guidance_scale"])
    left_out = {"guidance_scale", "gradients"} - cost_names(rows).keys()
    names = [name for name, value in rows[0].items() if isinstance(value, (int, float)) and name not in left_out]
    return [{f"{prefix}w": row["guidance_scale"], **{f"{prefix}{name}": row[name] for name in names}} for row in rows]


def sweep_cells(record: dict[str, Any]) -> tuple[list[str], list[list[float | str | None]]]:
    """Return the columns and the rows of `sweep_table` as numbers, with a column for each standard error."""
    first = record["results"][0]
    names = {metric: name for metric, name in record["metric_names"].items() if metric in first}
    errors = {f"{metric}_error": f"{name}, standard error" for metric, name in names.items()}
    columns = {**names, **{key: name for key, name in errors.items() if key in first}, **cost_names(record["results"])}
    rows = [(format_number(row["guidance_scale"]), row) for row in record["results"]]
    rows += [("real", record["floor"])] if record["floor"] else []  # with --reference there is none
    return ["w", *columns.values()], [[w, *(row.get(column) for column in columns)] for w, row in rows]


def cost_names(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the display names of the costs: network evaluations, and gradients of the classifier if there are any."""
    has_gradients = any(row.get("gradients") for row in rows)
    return {"network_evaluations": "evaluations", **({"gradients": "gradients"} if has_gradients else {})}


def cell(row: dict[str, Any], metric: str, best: dict[str, float] | None = None) -> str:
    """
    Format a metric and its error for a table. Return an empty string if the row lacks the metric.

    Args:
        row (`dict[str, Any]`): the metrics at one w.
        metric (`str`): the name of the metric.
        best (`dict[str, float]`, *optional*): the w with the best value of each metric, which is set in bold.
    """
    if metric not in row:
        return ""
    decimals = DECIMALS.get(metric, 3)
    value = f"{row[metric]:.{decimals}f}"
    if best and metric in best and best[metric] == row.get("guidance_scale"):
        value = f"**{value}**"
    error = row.get(f"{metric}_error")
    if error is None:
        return value
    return f"{value} ± {error * (INTERVAL if metric in WITH_INTERVAL else 1):.{decimals}f}"


def caption(record: dict[str, Any], sampling: str | None = None) -> str:
    """
    Describe how the metrics of a sweep were measured.

    Args:
        record (`dict[str, Any]`): the contents of metrics.json.
        sampling (`str`, *optional*): how the images were generated; by default the record's steps and scheduler.
    """
    extractor = record["feature_extractor"]
    accuracy = extractor["accuracy"]
    accuracy_text = f"; accuracy on held-out images: {accuracy:.1%}" if accuracy is not None else ""
    settings = dict(record["guidance"])
    rule = settings.pop("rule", None)
    guidance = f", guided by the rule `{rule}`: {RULES[rule]}" if rule else ""
    guidance += "".join(f"; {name} {value}" for name, value in settings.items() if value)
    sampling = sampling or f"{record['num_inference_steps']} steps of {record['scheduler']}"
    has_gradients = "gradients" in cost_names(record.get("results") or record["rows"])
    gradients = ", and gradients those of the classifier" if has_gradients else ""
    return (
        f"{record['num_samples']} samples for each w ({record['class_labels']} labels, seed {record['seed']}), "
        f"{sampling}{guidance}. Evaluations are network evaluations per image{gradients}. Features: "
        f"{extractor['name']} ({extractor['num_features']} features; resize: {extractor['resize']}{accuracy_text}). "
        f"{reference_caption(record)} ± is a "
        "95 % interval for Fréchet distances and the accuracy (jackknife over ten blocks), and a standard deviation "
        "for the score (over ten splits) and the kernel distance (over subsets)."
    )


def reference_caption(record: dict[str, Any]) -> str:
    """Describe the real images or the reference statistics that the samples of a sweep were compared with."""
    number = record["num_neighbours"]
    pairs = f"precision, recall, density, coverage and kernel distance compare {number} samples with {number}"
    if "reference" not in record:
        return (
            f"Reference: {record['num_real']} real images; {pairs} real images. Last row: {record['num_held_out']} "
            "held-out real images in place of samples, against the other real images."
        )
    file = record["reference"]
    text = f"Reference: the statistics in {file['name']} (SHA-256 {file['sha256'][:12]}…), not the training data; "
    text += (
        f"{pairs} of its images."
        if number
        else "it has no images, and therefore no precision, recall, density, coverage or KID."
    )
    return text if file["has_spatial_features"] else f"{text} It has no spatial features, and therefore no sFID."


def plot_curves(record: dict[str, Any], path: Path) -> None:
    """Plot Fréchet distance and inception score (or class accuracy) against w, and against each other."""
    results, names, floor = record["results"], record["metric_names"], record["floor"]
    quality = score_of(results)
    w = [row["guidance_scale"] for row in results]
    figure = new_figure(1, 3, size=(13, 4))
    axes, rule = figure.axes, record["guidance"].get("rule")
    xlabel = f"guidance scale w by the rule {rule}" if rule else "guidance scale w"
    for axis, metric in zip(axes, ("frechet_distance", quality), strict=False):
        width = 1 if metric == "inception_score" else INTERVAL
        errors = [width * row.get(f"{metric}_error", 0.0) for row in results]
        axis.errorbar(w, [row[metric] for row in results], errors, marker="o", capsize=3)
        if metric in floor:
            axis.axhline(floor[metric], color="gray", linestyle=":", label="real images")
        best = record["best"][metric]
        axis.axvline(best, color="tab:orange", linewidth=0.8, label=f"best: w = {format_number(best)}")
        axis.set(xlabel=xlabel, ylabel=names[metric])
        axis.legend()
    axes[2].plot([row[quality] for row in results], [row["frechet_distance"] for row in results], marker="o")
    for row in results:
        w, point = format_number(row["guidance_scale"]), (row[quality], row["frechet_distance"])
        axes[2].annotate(w, point, (4, 4), textcoords="offset points")
    axes[2].set(xlabel=names[quality], ylabel=names["frechet_distance"], title="labelled by w")
    extractor = record["feature_extractor"]["name"]
    figure.suptitle(f"{record['num_samples']} samples for each w, features of {extractor}", fontsize=10)
    save_figure(figure, path)


def score_of(rows: list[dict[str, Any]]) -> str:
    """Return the metric of how well images show their class: the first that rows have of three."""
    return next(metric for metric in ("inception_score", "class_accuracy", "precision") if metric in rows[0])


def write_report(output_dir: Path, record: dict[str, Any], feature_extractor: str) -> dict[str, Any]:
    """
    Write metrics.json, metrics.md and curves.png.

    Returns:
        The contents of metrics.json: the record with the names of the metrics, and the w with the best value of each.
    """
    names = metric_names(feature_extractor)
    record = {**record, "metric_names": names, "best": best_scales(record["results"], names)}
    write_json(record, output_dir / METRICS_FILE)
    write_text(sweep_table(record), output_dir / "metrics.md")
    plot_curves(record, output_dir / "curves.png")
    return record


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record to a JSON file atomically."""
    write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
