"""Write the tables and figures of the ablations over p_uncond, and over models, samplers and step counts."""

import logging
import math
import statistics
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.records import recorded_data
from diffusers_cfg.evaluation.reports import INTERVAL, caption, cell, new_figure, save_figure, table
from diffusers_cfg.evaluation.sampling import load_model, load_pipeline, only_sampler
from diffusers_cfg.evaluation.settings import EvaluationConfig, format_number, sampler_folder
from diffusers_cfg.evaluation.sweep import check_folders, check_sampling, sample_set

logger = logging.getLogger(__name__)

PAPER_SAMPLER = "LogSNRScheduler"
# Two distances count as equal if the larger exceeds the smaller by at most this fraction.
TOLERANCE = 0.05
# The settings that identify a row.
ROW_SETTINGS = ("model", "scheduler", "num_inference_steps", "guidance_interval")
# The metrics in the table of samplers, and the guidance scales of a generator.
COMPARED = ("frechet_distance", "class_accuracy", "worst_class_accuracy", "precision", "recall")
UNGUIDED = [0.0]


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


def check_settings(configs: list[EvaluationConfig]) -> list[EvaluationConfig]:
    """
    Return the settings that apply to each model, see `applicable`. Raise `UserError` for those that a pipeline rejects,
    before any image is drawn.
    """
    checked = []
    for _, group in groupby(configs, key=lambda config: config.model):
        model_configs = list(group)
        model_configs = applicable(model_configs, load_model(model_configs[0]))
        check_sweeps(model_configs)
        checked += model_configs
    return checked


def check_sweeps(configs: list[EvaluationConfig]) -> None:
    """Raise `UserError` for settings of the sweeps of one model that its pipeline rejects."""
    pipeline = load_pipeline(replace(configs[0], scheduler=None), "cpu")
    for config in configs:
        check_sampling(config, pipeline)
        check_folders(config, recorded_data(config.model, pipeline) or {})


def applicable(configs: list[EvaluationConfig], pipeline: CFGPipeline) -> list[EvaluationConfig]:
    """
    Return the settings of the sweeps of one model without those that do not apply to it: other samplers than the only
    one that it was trained for, and guidance of a generator.
    """
    sampler = only_sampler(pipeline)
    if sampler is None:
        return configs
    is_generator = pipeline.unet.latent_dim is not None
    own = {"scheduler": sampler[0], "num_inference_steps": sampler[1]}
    if is_generator:
        own |= {"guidance_scales": UNGUIDED, "guidance_interval": None, "guidance_rescale": 0.0}
        own |= {"guidance": "classifier_free", "guider": None, "guide_model": None}
    logger.info(
        "%s is evaluated only with the sampler that it was trained for, %d steps of %s%s.",
        configs[0].model,
        sampler[1],
        sampler[0],
        ", at w = 0" if is_generator else "",
    )
    sweeps = {}
    for config in (replace(config, **own) for config in configs):
        assert config.output_dir is not None
        folder = Path(config.output_dir).parent / sampler_folder(*sampler, config.guidance_interval)
        sweeps[folder] = replace(config, output_dir=str(folder))
    return list(sweeps.values())


def combine(configs: list[EvaluationConfig], records: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Merge the records of all sweeps: the settings that they share, and a row for each sweep at the w with its smallest
    Fréchet distance, with the seconds that 100 of its samples took.

    Raises:
        UserError: if the models were measured against different data or with different features.
    """
    guided = [i for i, config in enumerate(configs) if config.guidance_scales != UNGUIDED]
    base = guided[0] if guided else 0
    first, rows = records[base], []
    for config, record in zip(configs, records, strict=True):
        if any(record[name] != first[name] for name in ("dataset", "feature_extractor", "num_real")):
            raise UserError(
                f"{configs[base].model} was measured against {first['dataset']} and {config.model} against "
                f"{record['dataset']}, or with different features, so their distances cannot be compared. Evaluate "
                "both on the same data."
            )
        best = min(record["results"], key=lambda row: row["frechet_distance"])
        settings = {name: getattr(config, name) for name in ROW_SETTINGS}
        rows.append({**settings, "model": config.model_name, **best, **time_of(config, best["guidance_scale"])})
    specific = ("num_inference_steps", "scheduler", "results", "best")
    shared = {name: value for name, value in first.items() if name not in specific}
    unguided = [configs[i].model_name for i in range(len(configs)) if guided and i not in guided]
    return {
        **shared,
        "guidance_scales": [row["guidance_scale"] for row in first["results"]],
        "unguided": list(dict.fromkeys(unguided)),
        "batch_size": configs[base].batch_size,
        "rows": rows,
    }


def time_of(config: EvaluationConfig, w: float) -> dict[str, float]:
    """Return the seconds for 100 samples of a sweep, the median over its shards; empty if none has recorded them."""
    samples = sample_set(config, w)
    shards = [samples.load(shard).seconds for shard in samples.shards if samples.path(shard).is_file()]
    known = [seconds for seconds in shards if math.isfinite(seconds)]
    return {"seconds": 100 * statistics.median(known)} if known else {}


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
    metrics = [metric for metric in COMPARED if metric in rows[0]]
    is_timed = any("seconds" in row for row in rows)
    smallest = min(row["frechet_distance"] for row in rows)

    def cells(row: dict[str, Any]) -> list[str]:
        best = {"frechet_distance": row["guidance_scale"]} if row["frechet_distance"] == smallest else {}
        settings = [label_of(row, rows), str(row["num_inference_steps"]), interval_of(row)]
        cost = [f"{row['network_evaluations']:g}", format_number(row["guidance_scale"])]
        seconds = [f"{row['seconds']:.3g}" if "seconds" in row else ""] if is_timed else []
        return [*settings, *cost, *(cell(row, metric, best) for metric in metrics), *seconds]

    targets = {f"best distance, {smallest:.3f}": smallest}
    if (paper := paper_row(rows)) is not None:
        distance, evaluations = paper["frechet_distance"], paper["network_evaluations"]
        targets[f"paper's sampler, {distance:.3f} with {evaluations:g} evaluations"] = distance
    timed = ["s / 100 images"] if is_timed else []
    header = ["sampler", "steps", "interval", "evaluations", "w", *(names[metric] for metric in metrics), *timed]
    real = ["real", "", "", "", "", *(cell(record["floor"], metric) for metric in metrics), *("" for _ in timed)]
    chosen = [[target, *cells(cheapest(rows, distance))] for target, distance in targets.items()]
    scales = ", ".join(map(format_number, record["guidance_scales"]))
    unguided = f" ({', '.join(record['unguided'])} at 0)" if record["unguided"] else ""
    description = caption(record, f"each sampler at its best w among {scales}{unguided}")
    if is_timed:
        description += f" Seconds are those of one process with batches of {record['batch_size']} images."
    return (
        f"{table(header, [*map(cells, rows), real])}\n\n{description}\n\n"
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
    low, high = axis.get_ylim()
    few = (1, 2, 5)
    for ticks, digits in ((axis.xaxis, few), (axis.yaxis, range(1, 10) if high < 20 * low else few)):
        ticks.set_major_locator(LogLocator(subs=digits))
        ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
        ticks.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(figure, path)
