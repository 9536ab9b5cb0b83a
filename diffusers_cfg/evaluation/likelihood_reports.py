"""Write the results of a likelihood evaluation: likelihood.json, tables in Markdown and figures."""

import logging
from pathlib import Path
from typing import Any

from matplotlib.ticker import ScalarFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_cfg.evaluation.likelihood import PARTS
from diffusers_cfg.evaluation.reports import LIKELIHOOD_FILE, new_figure, save_figure, table, write_json, write_text

VARIANCE_FIGURE, TRAINING_FIGURE = "loss_variance.png", "bits_per_dim.png"
# TensorBoard logs the end of each file.
logging.getLogger("tensorboard").setLevel(logging.WARNING)
# The names of the bounds in tables.
BOUNDS = {"conditional": "p(x\\|c)", "null": "p(x), null class", "labels": "p(x), by the labels"}
# The logged values of a training run that are bounds in bits per dimension, and their names in the figure.
LOGGED = {
    "bits_per_dim/conditional": "training, p(x|c)",
    "bits_per_dim/null": "training, p(x) by the null class",
    "validation/bits_per_dim": "held out, p(x|c)",
    "validation/bits_per_dim_null": "held out, p(x) by the null class",
}
# What the table of the variance says.
VARIANCE = (
    "Variance of the diffusion term at one random time per image, in (bits per dimension)², if the noise schedule had "
    "another shape between the same ends. Its mean, for T = ∞, is the same for all of them:"
)


def steps_text(steps: int) -> str:
    """Return T as text; 0 is continuous time."""
    return str(steps) if steps else "∞"


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """Format a value and its standard error, if any; `sign="+"` also shows the sign of positive values."""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def cell(figures: dict[str, Any] | None) -> str:
    """Format a bound and its standard error."""
    return "" if figures is None else with_error(figures["bits_per_dim"], figures["bits_per_dim_error"])


def likelihood_table(record: dict[str, Any]) -> str:
    """Return the tables of a likelihood evaluation in Markdown, and how they were measured."""
    results = record["results"]
    names = {name: title for name, title in BOUNDS.items() if any(name in row for row in results)}
    header = ["T", *names.values(), *PARTS[:2]]
    header += [f"diffusion, {'c' if name == 'conditional' else '∅'}" for name in names if name != "labels"]
    rows = []
    for row in results:
        shown = row.get("conditional") or row["null"]
        diffusion = [f"{row[name]['diffusion']:.3f}" for name in names if name != "labels"]
        values = [cell(row.get(name)) for name in names]
        evaluations = f"{row['network_evaluations']:,}"
        first = [f"{shown[part]:.3f}" for part in PARTS[:2]]
        rows.append([steps_text(row["diffusion_steps"]), *values, *first, *diffusion, evaluations])
    sections = [table([*header, "network evaluations"], rows), caption(record)]
    if record["by_class"]:
        title = (
            f"Bounds on −log p(x|c) by class, in bits per dimension (T = {steps_text(results[-1]['diffusion_steps'])}):"
        )
        classes = [
            [name.replace("|", r"\|"), cell(row), str(row["num_images"])] for name, row in record["by_class"].items()
        ]
        sections += [title, table(["class", "bits per dimension", "images"], classes)]
    if record.get("variance"):
        rows = [[name, f"{value:.4g}"] for name, value in record["variance"].items()]
        sections += [VARIANCE, table(["shape", "variance"], rows)]
    return "\n\n".join(sections) + "\n"


def caption(record: dict[str, Any]) -> str:
    """Describe what was measured, and how."""
    first, (channels, height, width) = record["results"][0], record["image_shape"]
    number = f"{record['num_images']} images"
    if record["num_images"] < record["num_available"]:
        number += f", drawn at random from {record['num_available']},"
    text = (
        "Upper bounds on the negative log-likelihood in bits per dimension, and their parts. ± is a standard error "
        f"over {number} of {record['dataset']} ({record['images']}; {height}×{width}×{channels}, 8 bits)."
    )
    if "conditional" in first:
        text += " p(x|c) is given the class of the image."
    if "labels" in first:
        text += (
            f" By the labels, −log p(x) ≤ −log p(x|c) − log p(c), and −log p(c) is {first['labels']['class']:.3f} bits "
            f"per dimension on average (class frequencies: {record['class_frequencies']})."
        )
    if "null" not in first:
        text += " There is no bound by the null class, because the model was trained without label dropout."
    text += (
        f" The log-SNR goes from {record['log_snr_max']:.4g} to {record['log_snr_min']:.4g}; other ends inside the "
        "model's noise process give other bounds. The bound of T steps also depends on the shape of the noise schedule "
        f"({record['noise_schedule']}), that in continuous time (T = ∞) does not. {record['times_per_image']} "
        f"stratified times per image, seed {record['seed']}."
    )
    if record["resized"]:
        text += " The images were resized or cropped: the likelihood is that of the resulting 8-bit images."
    if record["trained_with_flips"]:
        text += " The model was trained with random flips, and is evaluated without them."
    return text


def write_likelihood(output_dir: Path, record: dict[str, Any]) -> None:
    """Write likelihood.json and likelihood.md to a folder."""
    write_json(record, output_dir / LIKELIHOOD_FILE)
    write_text(likelihood_table(record), output_dir / "likelihood.md")


def logged_bounds(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the bounds that a training run has logged with TensorBoard in its folder, as (step, value) by name."""
    found = {}
    for path in sorted({path.parent for path in folder.glob("*/**/events.out.tfevents.*")}):
        events = EventAccumulator(str(path)).Reload()
        for tag in LOGGED.keys() & set(events.Tags()["scalars"]):
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return {tag: found[tag] for tag in LOGGED if tag in found}


def plot_training(bounds: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot bounds over the steps of a training run, as returned by `logged_bounds`."""
    figure = new_figure()
    axis = figure.axes[0]
    for tag, values in bounds.items():
        steps, bits = zip(*values, strict=True)
        axis.plot(steps, bits, "o-" if tag.startswith("validation") else "-", label=LOGGED[tag])
    axis.set(xlabel="step", ylabel="bits per dimension", yscale="log")
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(ScalarFormatter())  # no powers of ten
    axis.legend()
    save_figure(figure, path)
