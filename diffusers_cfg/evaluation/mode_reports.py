"""Report the study of mode coverage: tables, a picture of the Gaussians, and a grid of stacked samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusers_cfg.evaluation.grids import make_grid
from diffusers_cfg.evaluation.reports import new_figure, save_figure, spread, table
from diffusers_cfg.files import save_image

# Names of the columns of the tables, and the number of decimals
COLUMNS = {"modes": ("modes", 1), "high_quality": ("high quality", 3), "kl": ("KL", 3), "seconds": ("seconds", 0)}
# Number of stacks in a row of the grid
GRID_COLUMNS = 10


def coverage_table(part: Mapping[str, Any]) -> str:
    """
    Return a Markdown table with a row for each number of steps T, and one for each reference.

    Args:
        part (`Mapping`): `runs`, the results of each run with its `num_timesteps`; and `references`, results by name.
    """
    runs, references = part["runs"], part["references"]
    names = [name for name in COLUMNS if name in runs[0]]
    rows = []
    for num_timesteps in dict.fromkeys(run["num_timesteps"] for run in runs):
        chosen = [run for run in runs if run["num_timesteps"] == num_timesteps]
        cells = [spread([run[name] for run in chosen], COLUMNS[name][1]) for name in names]
        rows.append([f"T = {num_timesteps}", str(len(chosen)), *cells])
    for name, values in references.items():
        rows.append([name, "", *(spread([values[n]] if n in values else [], COLUMNS[n][1]) for n in names)])
    return table(["", "seeds", *(COLUMNS[name][0] for name in names)], rows)


def gaussians_text(part: Mapping[str, Any]) -> str:
    """Return the table of the 25 Gaussians with its caption."""
    return (
        f"{coverage_table(part)}\n\n"
        f"25 Gaussians, {part['num_samples']} samples: modes with a sample within 3 standard deviations (of 25), the "
        "share of samples within 3 standard deviations of a mean, and KL(q‖uniform) in nats of the nearest mode. "
        "perfect: as many samples of the data. uniform square: points that reach all modes evenly without having any, "
        "so that a low KL only counts with a share of high quality above theirs. ± is the standard deviation over "
        "seeds; seconds are of training.\n"
    )


def stacked_text(part: Mapping[str, Any]) -> str:
    """Return the table of stacked images with its caption."""
    return (
        f"{coverage_table(part)}\n\n"
        f"Stacked images of {part['dataset']}, {part['num_samples']} samples of the null class: modes that are reached "
        f"(of {part['num_modes']}), and KL(q‖uniform) in nats. The class of each channel is that of a classifier "
        f"(accuracy on held-out images: {part['classifier_accuracy']:.1%}). data: {part['num_real']} stacks of the "
        "data, by the classifier. perfect: as many samples as above with the class frequencies of the data, simulated; "
        f"with infinitely many the KL is {part['kl_of_data']:.4f}. ± is the standard deviation over seeds; seconds are "
        "of training.\n"
    )


def plot_points(points: Mapping[str, torch.Tensor], path: Path) -> None:
    """Plot sets of points of the plane, `(points, 2)` each, side by side under their names."""
    figure = new_figure(1, len(points), size=(3 * len(points), 3.3))
    limit = 1.3 * next(iter(points.values())).abs().max().item()
    for axis, (name, values) in zip(figure.axes, points.items(), strict=True):
        axis.scatter(*values.T.numpy(), s=0.5, linewidths=0)
        axis.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    save_figure(figure, path)


def save_stacks(rows: Mapping[str, torch.Tensor], path: Path) -> None:
    """Save the first stacks of sets of images, uint8 `(images, 3, height, width)` each, in a row for each name."""
    images = torch.stack([values[:GRID_COLUMNS] for values in rows.values()]) / 255
    save_image(make_grid(images, [*rows], [""] * images.shape[1]), path)
