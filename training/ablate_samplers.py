"""Measure a model by several samplers: how near to the data they come for how many evaluations of the network.

python training/ablate_samplers.py --model cfg-model --output_dir samplers
python training/ablate_samplers.py --model teacher student --output_dir samplers --guidance_interval 0.2 5

Flags that are not listed below are evaluate_cfg.py's. Run again, it goes on with what is missing.
"""

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from evaluate_cfg import evaluate_cfg
from evaluate_cfg import parse_args as parse_evaluation_args

PAPERS_SAMPLER = "LogSNRScheduler"
SAMPLERS = [
    f"{PAPERS_SAMPLER}:256",
    "DDIMScheduler:10,20,50",
    "DPMSolverMultistepScheduler:5,8,12,16,20,25",
    "UniPCMultistepScheduler:5,8,12,16,20,25",
]
# A distance is as good as another that is smaller by no more than this share.
TOLERANCE = 0.05


class Setting(NamedTuple):
    """A way to draw a model's images."""

    model: str
    scheduler: str
    num_inference_steps: int
    guidance_interval: tuple[float, float] | None


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    parser = ArgumentParser(
        prog="ablate_samplers.py",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", nargs="+", required=True, help="Output folders of training runs, or repositories.")
    parser.add_argument(
        "--output_dir", required=True, help="A folder for table.md, samplers.json, curves.png and samples."
    )
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, help="Classes, and their numbers of steps.")
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, help="Measure each also with guidance where σ_lo < σ/α ≤ σ_hi only."
    )
    parser.add_argument(
        "--guidance_scales", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="The paper's w; the best counts."
    )
    return parser.parse_known_args(argv)


def ablate_samplers(args: Namespace, evaluation_argv: list[str]) -> str:
    """The table of all settings, and which are the cheapest good ones. Raises UserError if a part fails."""
    output_dir = Path(args.output_dir)
    runs = {setting: evaluation_args(setting, args, evaluation_argv) for setting in settings_of(args)}
    check_settings(runs)
    for run in runs.values():
        evaluate_cfg(run)
    files = {setting: Path(run.output_dir) / "metrics.json" for setting, run in runs.items()}
    record = gather({setting: json.loads(file.read_text(encoding="utf-8")) for setting, file in files.items()})
    (output_dir / "samplers.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    table = markdown(record)
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    draw_curves(record, output_dir / "curves.png")
    return table


# ----- before anything is drawn -----


def settings_of(args: Namespace) -> list[Setting]:
    if len(set(map(name_of, args.model))) < len(args.model):
        raise UserError(f"--model {' '.join(args.model)}: two have the same name, which their results are called by.")
    intervals = [None] if args.guidance_interval is None else [None, tuple(args.guidance_interval)]
    settings = [
        Setting(model, scheduler, steps, interval)
        for model in args.model
        for scheduler, numbers in map(parse_sampler, args.samplers)
        for interval in intervals
        for steps in numbers
    ]
    return list(dict.fromkeys(settings))


def name_of(model: str) -> str:
    return Path(model).resolve().name


def parse_sampler(text: str) -> tuple[str, list[int]]:
    scheduler, _, numbers = text.partition(":")
    try:
        return scheduler, [int(number) for number in numbers.split(",")]
    except ValueError:
        raise UserError(f"--samplers {text} must be a class and its numbers of steps, as {SAMPLERS[1]}.") from None


def evaluation_args(setting: Setting, args: Namespace, evaluation_argv: list[str]) -> Namespace:
    """What evaluate_cfg.py is called with: a folder of its own for each setting."""
    if taken := [flag for flag in evaluation_argv if flag.startswith(("--scheduler", "--num_inference_steps"))]:
        raise UserError(f"{taken[0]} is not a flag of this script: give the samplers and their steps by --samplers.")
    name = f"{setting.scheduler}-{setting.num_inference_steps}"
    flags = ["--model", setting.model, "--scheduler", setting.scheduler]
    flags += ["--num_inference_steps", str(setting.num_inference_steps)]
    flags += ["--guidance_scales", *map(str, args.guidance_scales)]
    if setting.guidance_interval is not None:
        low, high = setting.guidance_interval
        name += f"-interval={low:g},{high:g}"
        flags += ["--guidance_interval", str(low), str(high)]
    folder = Path(args.output_dir) / name_of(setting.model) / name
    return parse_evaluation_args([*evaluation_argv, *flags, "--output_dir", str(folder)])


def check_settings(runs: dict[Setting, Namespace]) -> None:
    """Begin to draw by each setting, up to the network. Raises UserError for one that the pipeline refuses."""
    from sample import draw_images, guidance, load_pipeline

    class Begun(Exception):
        pass

    def stop(*_):
        raise Begun

    for setting, run in runs.items():
        pipeline = load_pipeline(run, "cpu")
        pipeline.unet.register_forward_pre_hook(stop)
        call = {**guidance(run, run.guidance_scales[0]), "num_inference_steps": setting.num_inference_steps}
        with suppress(Begun):
            draw_images(pipeline, [0], [0], run.seed, **call)


# ----- what came out -----


def gather(records: dict[Setting, dict[str, Any]]) -> dict[str, Any]:
    """
    What all settings were measured with, and a row for each, at the w where its Fréchet distance is smallest.

    Raises:
        UserError: models were measured against different data, so that their distances cannot be compared.
    """
    first_setting, first = next(iter(records.items()))
    rows = []
    for setting, record in records.items():
        if any(record[name] != first[name] for name in ("dataset", "feature_extractor", "num_real")):
            raise UserError(
                f"{first_setting.model} was measured against {first['dataset']} and {setting.model} against "
                f"{record['dataset']}, or by other features: their distances cannot be compared."
            )
        best = min(record["results"], key=lambda row: row["frechet_distance"])
        rows.append({**setting._asdict(), "model": name_of(setting.model), **best})
    own = ("num_inference_steps", "scheduler", "results", "best")
    shared = {name: value for name, value in first.items() if name not in own}
    return {**shared, "guidance_scales": [row["guidance_scale"] for row in first["results"]], "rows": rows}


def papers_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The paper's sampler as the paper has it: the first model's, with the most steps, and guided at all of them."""
    papers = [row for row in rows if row["scheduler"] == PAPERS_SAMPLER and row["guidance_interval"] is None]
    return max(papers, key=lambda row: row["num_inference_steps"], default=None)


def cheapest(rows: list[dict[str, Any]], distance: float) -> dict[str, Any]:
    """Of the rows that come as near to the data as `distance`, the one with the fewest evaluations."""
    good = [row for row in rows if row["frechet_distance"] <= distance * (1 + TOLERANCE)]
    return min(good, key=lambda row: (row["network_evaluations"], row["frechet_distance"]))


def label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The sampler, and the model where there are several."""
    return row["scheduler"] if len({row["model"] for row in rows}) == 1 else f"{row['scheduler']} of {row['model']}"


def interval(row: dict[str, Any]) -> str:
    return "{:g} … {:g}".format(*row["guidance_interval"]) if row["guidance_interval"] else ""


def markdown(record: dict[str, Any]) -> str:
    from report import caption, cell, table

    rows, names = record["rows"], record["metric_names"]
    metrics = [metric for metric in ("frechet_distance", "class_accuracy") if metric in rows[0]]
    smallest = min(row["frechet_distance"] for row in rows)
    lines = []
    for row in rows:
        best = {"frechet_distance": row["guidance_scale"]} if row["frechet_distance"] == smallest else {}
        how = [label(row, rows), str(row["num_inference_steps"]), interval(row), f"{row['network_evaluations']:g}"]
        lines.append([*how, f"{row['guidance_scale']:g}", *(cell(row, metric, best) for metric in metrics)])
    lines.append(["real", "", "", "", "", *(cell(record["floor"], metric, {}) for metric in metrics)])
    header = ["sampler", "steps", "interval", "evaluations", "w", *(names[metric] for metric in metrics)]
    scales = ", ".join(f"{w:g}" for w in record["guidance_scales"])
    note = caption(record, f"each sampler at its best w of {scales}")
    return f"{table(header, lines)}\n\n{note}\n\n{verdict(rows)}\n"


def verdict(rows: list[dict[str, Any]]) -> str:
    """The cheapest setting that is as good as the best, and the cheapest that is as good as the paper's sampler."""

    def describe(row: dict[str, Any]) -> str:
        how = f"{label(row, rows)}, {row['num_inference_steps']} steps"
        how += f", interval {interval(row)}" if interval(row) else ""
        return f"{how}, {row['network_evaluations']:g} evaluations ({row['frechet_distance']:.3f})"

    smallest = min(row["frechet_distance"] for row in rows)
    text = (
        f"Cheapest within {TOLERANCE:.0%} of the best distance, {smallest:.3f}: {describe(cheapest(rows, smallest))}."
    )
    if (papers := papers_row(rows)) is not None:
        chosen = cheapest(rows, papers["frechet_distance"])
        share = chosen["network_evaluations"] / papers["network_evaluations"]
        text += (
            f" Cheapest within {TOLERANCE:.0%} of the paper's sampler, {papers['frechet_distance']:.3f} for "
            f"{papers['network_evaluations']:g} evaluations: {describe(chosen)}, {share:.1%} of them."
        )
    return text


def draw_curves(record: dict[str, Any], path: Path) -> None:
    """Fréchet distance over evaluations, a line for each sampler, dashed where guidance has an interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    from report import INTERVAL

    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(record["rows"], key=lambda row: row["network_evaluations"]):
        lines.setdefault((label(row, record["rows"]), interval(row)), []).append(row)
    samplers = sorted({sampler for sampler, _ in lines})
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for (sampler, guided), line in sorted(lines.items()):
        color = f"C{samplers.index(sampler)}"
        axis.errorbar(
            [row["network_evaluations"] for row in line],
            [row["frechet_distance"] for row in line],
            [INTERVAL * row.get("frechet_distance_error", 0.0) for row in line],
            fmt="s--" if guided else "o-",
            color=color,
            markerfacecolor="white" if guided else color,
            ecolor=(color, 0.35),
            label=f"{sampler},\nguided in {guided} only" if guided else sampler,
        )
    axis.axhline(record["floor"]["frechet_distance"], color="grey", linestyle=":", label="real images")
    axis.set(xscale="log", yscale="log", xlabel="network evaluations for an image")
    axis.set_ylabel(record["metric_names"]["frechet_distance"])
    for ticks, digits in ((axis.xaxis, (1, 2, 5)), (axis.yaxis, range(1, 10))):
        ticks.set_major_locator(LogLocator(subs=digits))
        ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
        ticks.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    try:
        print(ablate_samplers(*parse_args()))
    except UserError as error:
        sys.exit(f"ablate_samplers.py: error: {error}")
