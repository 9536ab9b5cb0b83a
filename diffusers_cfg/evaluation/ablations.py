"""Write the tables and figures of the ablations over p_uncond, and over samplers and step counts."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.records import recorded_data
from diffusers_cfg.evaluation.reports import INTERVAL, caption, cell, new_figure, save_figure, table
from diffusers_cfg.evaluation.sampling import load_pipeline
from diffusers_cfg.evaluation.settings import EvaluationConfig, format_number
from diffusers_cfg.evaluation.sweep import check_folders, check_sampling

PAPER_SAMPLER = "LogSNRScheduler"
# Two distances count as equal if the larger exceeds the smaller by at most this fraction.
TOLERANCE = 0.05
# The settings that identify a row.
ROW_SETTINGS = ("model", "scheduler", "num_inference_steps", "guidance_interval")


def dropout_table(records: dict[float, dict[str, Any]]) -> str:
    """Return a Markdown table of Fréchet distance and inception score: a row for each w, a column for each p_uncond."""
    first = next(iter(records.values()))
    metrics = [metric for metric in ("frechet_distance", "inception_score") if metric in first["results"][0]]
    names = [f"{first['metric_names'][metric]}, p = {format_number(p)}" for metric in metrics for p in records]
    rows = []
    for i, row in enumerate(first["results"]):
        cells = [
            cell(record["results"][i], metric, record["best"]) for metric in metrics for record in records.values()
        ]
        rows.append([format_number(row["guidance_scale"]), *cells])
    rows.append(["real", *(cell(record["floor"], metric) for metric in metrics for record in records.values())])
    return f"{table(['w', *names], rows)}\n\n{caption(first)}\n"


def plot_tradeoff(records: dict[float, dict[str, Any]], path: Path) -> None:
    """Plot Fréchet distance against inception score, a curve for each p_uncond, as in figure 1 of the paper."""
    figure = new_figure()
    (axis,) = figure.axes
    for p, record in records.items():
        distances = [row["frechet_distance"] for row in record["results"]]
        axis.plot(
            [row["inception_score"] for row in record["results"]], distances, "o-", label=f"p = {format_number(p)}"
        )
    names = next(iter(records.values()))["metric_names"]
    axis.set(xlabel=names["inception_score"], ylabel=names["frechet_distance"])
    axis.legend()
    save_figure(figure, path)


def check_settings(configs: list[EvaluationConfig]) -> None:
    """Raise `UserError` for settings that a pipeline rejects, before any image is drawn."""
    for _, group in groupby(configs, key=lambda config: config.model):
        model_configs = list(group)
        pipeline = load_pipeline(replace(model_configs[0], scheduler=None), "cpu")
        for config in model_configs:
            check_sampling(config, pipeline)
            check_folders(config, recorded_data(config.model, pipeline) or {})


def combine(configs: list[EvaluationConfig], records: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Merge the records of all sweeps: the settings that they share, and a row for each sweep at the w with its smallest
    Fréchet distance.

    Raises:
        UserError: if the models were measured against different data or with different features.
    """
    first, rows = records[0], []
    for config, record in zip(configs, records, strict=True):
        if any(record[name] != first[name] for name in ("dataset", "feature_extractor", "num_real")):
            raise UserError(
                f"{configs[0].model} was measured against {first['dataset']} and {config.model} against "
                f"{record['dataset']}, or with different features, so their distances cannot be compared. Evaluate "
                "both on the same data."
            )
        best = min(record["results"], key=lambda row: row["frechet_distance"])
        settings = {name: getattr(config, name) for name in ROW_SETTINGS}
        rows.append({**settings, "model": config.model_name, **best})
    specific = ("num_inference_steps", "scheduler", "results", "best")
    shared = {name: value for name, value in first.items() if name not in specific}
    return {**shared, "guidance_scales": [row["guidance_scale"] for row in first["results"]], "rows": rows}


def paper_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row of the paper's sampler for the first model, with the most steps and no guidance interval."""
    paper_rows = [row for row in rows if row["scheduler"] == PAPER_SAMPLER and row["guidance_interval"] is None]
    return max(paper_rows, key=lambda row: row["num_inference_steps"], default=None)


def cheapest(rows: list[dict[str, Any]], distance: float) -> dict[str, Any]:
    """Return the row with the fewest network evaluations among those within the tolerance of `distance`."""
    close = [row for row in rows if row["frechet_distance"] <= distance * (1 + TOLERANCE)]
    return min(close, key=lambda row: (row["network_evaluations"], row["frechet_distance"]))


def label_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the sampler of a row, followed by the model if the table has several."""
    return row["scheduler"] if len({row["model"] for row in rows}) == 1 else f"{row['scheduler']} ({row['model']})"


def interval_of(row: dict[str, Any]) -> str:
    """Format the guidance interval of a row for a table."""
    return " … ".join(map(format_number, row["guidance_interval"])) if row["guidance_interval"] else ""


def samplers_table(record: dict[str, Any]) -> str:
    """Return two Markdown tables: all rows, and the cheapest rows close to the best and to the paper's sampler."""
    rows, names = record["rows"], record["metric_names"]
    metrics = [metric for metric in ("frechet_distance", "class_accuracy") if metric in rows[0]]
    smallest = min(row["frechet_distance"] for row in rows)

    def cells(row: dict[str, Any]) -> list[str]:
        best = {"frechet_distance": row["guidance_scale"]} if row["frechet_distance"] == smallest else {}
        settings = [label_of(row, rows), str(row["num_inference_steps"]), interval_of(row)]
        cost = [f"{row['network_evaluations']:g}", format_number(row["guidance_scale"])]
        return [*settings, *cost, *(cell(row, metric, best) for metric in metrics)]

    targets = {f"best distance, {smallest:.3f}": smallest}
    if (paper := paper_row(rows)) is not None:
        distance, evaluations = paper["frechet_distance"], paper["network_evaluations"]
        targets[f"paper's sampler, {distance:.3f} with {evaluations:g} evaluations"] = distance
    header = ["sampler", "steps", "interval", "evaluations", "w", *(names[metric] for metric in metrics)]
    real = ["real", "", "", "", "", *(cell(record["floor"], metric) for metric in metrics)]
    chosen = [[target, *cells(cheapest(rows, distance))] for target, distance in targets.items()]
    scales = ", ".join(map(format_number, record["guidance_scales"]))
    return (
        f"{table(header, [*map(cells, rows), real])}\n\n"
        f"{caption(record, f'each sampler at its best w among {scales}')}\n\n"
        f"{table([f'cheapest within {TOLERANCE:.0%} of', *header], chosen)}\n"
    )


def plot_quality(record: dict[str, Any], path: Path) -> None:
    """Plot Fréchet distance against network evaluations, a line for each sampler, dashed with a guidance interval."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(record["rows"], key=lambda row: row["network_evaluations"]):
        lines.setdefault((label_of(row, record["rows"]), interval_of(row)), []).append(row)
    samplers = sorted({sampler for sampler, _ in lines})
    figure = new_figure(size=(9, 4))
    (axis,) = figure.axes
    for (sampler, interval), line in sorted(lines.items()):
        color = f"C{samplers.index(sampler)}"
        axis.errorbar(
            [row["network_evaluations"] for row in line],
            [row["frechet_distance"] for row in line],
            [INTERVAL * row.get("frechet_distance_error", 0.0) for row in line],
            fmt="s--" if interval else "o-",
            color=color,
            markerfacecolor="white" if interval else color,
            ecolor=(color, 0.35),
            label=f"{sampler},\nguidance only in {interval}" if interval else sampler,
        )
    axis.axhline(record["floor"]["frechet_distance"], color="gray", linestyle=":", label="real images")
    axis.set(xscale="log", yscale="log", xlabel="network evaluations per image")
    axis.set_ylabel(record["metric_names"]["frechet_distance"])
    for ticks, digits in ((axis.xaxis, (1, 2, 5)), (axis.yaxis, range(1, 10))):
        ticks.set_major_locator(LogLocator(subs=digits))
        ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
        ticks.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(figure, path)
