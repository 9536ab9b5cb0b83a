"""Name and read the files of a saved model and of the run that trained it.

This module imports nothing heavy, so that a model card can be written without torch.
"""

import json
import re
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
# Files that a training run and an evaluation write next to the pipeline.
RUN, SAMPLES = "run.json", "samples.png"
EVALUATION, TABLE, CURVES, GRID = (
    f"evaluation/{name}" for name in ("metrics.json", "metrics.md", "curves.png", "grid.png")
)
# The learned noise schedule, which is not published, and its picture
NOISE_SCHEDULE, SCHEDULE_PICTURE = "noise_schedule.safetensors", "noise_schedule.png"
LIKELIHOOD, LIKELIHOOD_TABLE, SCHEDULE_FIGURE, VARIANCE_FIGURE, TRAINING_FIGURE = (
    f"evaluation/{name}"
    for name in ("likelihood.json", "likelihood.md", SCHEDULE_PICTURE, "loss_variance.png", "bits_per_dim.png")
)
FACTS = (RUN, SCHEDULE_PICTURE, EVALUATION, TABLE, CURVES, GRID)
FACTS += (LIKELIHOOD, LIKELIHOOD_TABLE, SCHEDULE_FIGURE, VARIANCE_FIGURE, TRAINING_FIGURE)
# The folder with the snapshots of the post-hoc EMA, which are not published
SNAPSHOTS = "posthoc_ema"
# The settings of the run, which are published from run.json: those of the run's folder have local paths.
CONFIG = "train_config.yaml"
# The largest number of classes with a picture of their own
MAX_PICTURES = 8
# The label of the null class in calls
NULL_CLASS = -1


def read_object(path: Path) -> dict[str, Any]:
    """Load the object in a JSON file. Raise ValueError if the file is missing or does not contain one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a JSON object, but contains {json.dumps(value)[:100]}.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Load the object in a JSON file; empty if the file does not exist."""
    return read_object(path) if path.is_file() else {}


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in the output folder of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def snapshots(folder: Path) -> dict[int, Path]:
    """Return the snapshots of the post-hoc EMA in the output folder of a run by step, earliest first."""
    found = {path: re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in (folder / SNAPSHOTS).glob("step-*")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def find_samples(folder: Path) -> Path | None:
    """Return the path of a folder's samples.png, or of the last grid of samples from a training run."""
    if (folder / SAMPLES).is_file():
        return folder / SAMPLES
    grids = (folder / "samples").glob("step-*.png")
    return max(grids, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def class_picture(class_id: int) -> str:
    """Return the name of the picture of a class in the repository."""
    return "samples/null-class.png" if class_id == NULL_CLASS else f"samples/class-{class_id}.png"


def example_classes(index: dict[str, Any], run: dict[str, Any]) -> list[int]:
    """
    Return the ids of the first classes with a name that had images in training. If the classes have no names, return
    that of the first class, or of the null class if training had no labels.
    """
    absent = run.get("method", {}).get("classes_without_images", [])
    named = sorted(int(class_id) for class_id in index.get("id2label") or {})
    found = [class_id for class_id in named if class_id not in absent][:MAX_PICTURES]
    return found or [NULL_CLASS if 0 in absent else 0]
