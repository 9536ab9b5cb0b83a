"""Record and load the losses and gradient norms of each method's first steps, to detect unintended changes.

python -m tests.support.trajectories    # records them again, after an intended change
"""

import json
import tempfile
from pathlib import Path

from diffusers_cfg.engine.method import Method
from diffusers_cfg.methods.cfg import ClassifierFreeGuidance
from diffusers_cfg.methods.distillation import GuidanceDistillation
from tests.support.runs import distill, scalars, train
from tests.support.toys import Adversarial, Unlabelled

FOLDER = Path(__file__).parent / "trajectories"
TEACHER = Path(__file__).parent / "models-573b54d" / "plain"
STEPS = 20
METHODS: dict[str, type[Method]] = {
    "cfg": ClassifierFreeGuidance,
    "distillation": GuidanceDistillation,
    "adversarial": Adversarial,
    "unlabelled": Unlabelled,
}


def train_trajectory(name: str, output_dir: Path, *argv: str) -> None:
    """Train a method for the steps of its trajectory, and log every step."""
    flags = ["--max_train_steps", str(STEPS), "--checkpointing_steps", "10", "--report_to", "tensorboard", *argv]
    if name == "distillation":
        distill(TEACHER, output_dir, *flags)
    else:
        train(output_dir, *flags, method=METHODS[name])


def trajectory_of(output_dir: Path) -> dict[str, dict[int, float]]:
    """Return the losses and gradient norms of a run by name and step."""
    logged = scalars(output_dir)
    return {
        tag: dict(points)
        for tag, points in sorted(logged.items())
        if tag.split("/")[-1] == "loss" or "grad_norm" in tag
    }


def expected(name: str) -> dict[str, dict[int, float]]:
    """Return the recorded trajectory of a method."""
    recorded = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return {tag: dict(enumerate(values, start=1)) for tag, values in recorded.items()}


def main() -> None:
    """Record the trajectories of all methods."""
    FOLDER.mkdir(exist_ok=True)
    for name in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            train_trajectory(name, Path(folder) / "out")
            trajectory = trajectory_of(Path(folder) / "out")
        values = {tag: [float(f"{value:.7g}") for value in points.values()] for tag, points in trajectory.items()}
        (FOLDER / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
