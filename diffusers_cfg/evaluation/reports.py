"""What a sweep over w leaves: metrics.json, a table and curves."""

import json
from pathlib import Path
from typing import Any

LOWER_IS_BETTER = ("frechet_distance", "kernel_distance")
# Two standard errors either way hold the truth 95 times in a hundred
INTERVAL = 1.96
DIGITS = {"frechet_distance": 3, "kernel_distance": 4, "inception_score": 2}


def metric_names(feature_extractor: str) -> dict[str, str]:
    """What the metrics are called: FID, KID and IS are Inception's; with other features they are other quantities."""
    names = ["Fréchet distance", "kernel distance", "classifier score"]
    if feature_extractor == "inception":
        names = ["FID", "KID", "IS"]
    return {
        **dict(zip(("frechet_distance", "kernel_distance", "inception_score"), names, strict=True)),
        **{name: name for name in ("precision", "recall", "density", "coverage")},
        "class_accuracy": "class accuracy",
    }


def best_scales(results: list[dict[str, Any]], names: dict[str, str]) -> dict[str, float]:
    """The w at which each metric is best."""
    best = {}
    for metric in names:
        if metric in results[0]:
            choose = min if metric in LOWER_IS_BETTER else max
            best[metric] = choose(results, key=lambda row, metric=metric: row[metric])["guidance_scale"]
    return best


def markdown(record: dict[str, Any]) -> str:
    """The table, and under it what its figures were measured with."""
    names = {metric: name for metric, name in record["metric_names"].items() if metric in record["results"][0]}
    rows = []
    for row in record["results"]:
        cells = [cell(row, metric, record["best"]) for metric in names]
        rows.append([f"{row['guidance_scale']:g}", *cells, f"{row['network_evaluations']:g}"])
    rows.append(["real", *(cell(record["floor"], metric, {}) for metric in names), ""])
    return f"{table(['w', *names.values(), 'evaluations'], rows)}\n\n{caption(record)}\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def cell(row: dict[str, Any], metric: str, best: dict[str, float]) -> str:
    if metric not in row:
        return ""
    digits = DIGITS.get(metric, 3)
    value = f"{row[metric]:.{digits}f}"
    if best.get(metric) == row.get("guidance_scale") and metric in best:
        value = f"**{value}**"
    error = row.get(f"{metric}_error")
    if error is None:
        return value
    return f"{value} ± {error * (INTERVAL if metric in ('frechet_distance', 'class_accuracy') else 1):.{digits}f}"


def caption(record: dict[str, Any], sampling: str | None = None) -> str:
    """What figures were measured with; `sampling` says how the images were drawn where the record has several ways."""
    extractor = record["feature_extractor"]
    accuracy = extractor["accuracy"]
    right = f", itself right on {accuracy:.1%} of held-out images" if accuracy is not None else ""
    guidance = "".join(f"; {name} {value}" for name, value in record["guidance"].items() if value)
    sampling = sampling or f"{record['num_inference_steps']} steps of {record['scheduler']}"
    return (
        f"{record['num_samples']} samples for each w ({record['class_labels']} labels, seed {record['seed']}), "
        f"{sampling}{guidance}; evaluations are the network's, for an image. Features: {extractor['name']} "
        f"({extractor['num_features']} features; resize: {extractor['resize']}{right}), against {record['num_real']} "
        f"real images; precision, recall, density, coverage and kernel distance: {record['num_neighbours']} of each. "
        f"Last row: {record['num_held_out']} real images, as if they were samples, against the others. ± is a 95 % "
        "interval for the Fréchet distance and the accuracy (jackknife over ten blocks), the standard deviation over "
        "ten splits for the score, and over subsets for the kernel distance."
    )


def draw_curves(record: dict[str, Any], path: Path) -> None:
    """Fréchet distance over w, inception score (or class accuracy) over w, and one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, names, floor = record["results"], record["metric_names"], record["floor"]
    rising = next((metric for metric in ("inception_score", "class_accuracy") if metric in results[0]), "precision")
    w = [row["guidance_scale"] for row in results]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, metric in zip(axes, ("frechet_distance", rising), strict=False):
        width = 1 if metric == "inception_score" else INTERVAL
        errors = [width * row.get(f"{metric}_error", 0.0) for row in results]
        axis.errorbar(w, [row[metric] for row in results], errors, marker="o", capsize=3)
        axis.axhline(floor[metric], color="grey", linestyle=":", label="real images")
        best = record["best"][metric]
        axis.axvline(best, color="tab:orange", linewidth=0.8, label=f"best: w = {best:g}")
        axis.set(xlabel="guidance scale w", ylabel=names[metric])
        axis.legend()
    axes[2].plot([row[rising] for row in results], [row["frechet_distance"] for row in results], marker="o")
    for row in results:
        axes[2].annotate(
            f"{row['guidance_scale']:g}", (row[rising], row["frechet_distance"]), (4, 4), textcoords="offset points"
        )
    axes[2].set(xlabel=names[rising], ylabel=names["frechet_distance"], title="by w")
    extractor = record["feature_extractor"]["name"]
    figure.suptitle(f"{record['num_samples']} samples for each w, features of {extractor}", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_report(output_dir: Path, record: dict[str, Any], feature_extractor: str) -> None:
    """Write metrics.json, metrics.md and curves.png, the names of the metrics and the best w added to the record."""
    names = metric_names(feature_extractor)
    record = {**record, "metric_names": names, "best": best_scales(record["results"], names)}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (output_dir / "metrics.json").write_text(text + "\n", encoding="utf-8")
    (output_dir / "metrics.md").write_text(markdown(record), encoding="utf-8")
    draw_curves(record, output_dir / "curves.png")
