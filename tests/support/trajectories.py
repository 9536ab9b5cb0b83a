"""Record and load the losses and gradient norms of each method's first steps, to detect unintended changes.

python -m tests.support.trajectories [NAME …]    # records all, or the named ones, after an intended change
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.support.runs import distill, scalars, train, train_classifier, train_ddgan, train_vdm
from tests.support.toys import Unlabelled

FOLDER = Path(__file__).parent / "trajectories"
TEACHER = Path(__file__).parent / "models-573b54d" / "plain"
STEPS = 20
# sin(ωz) multiplies rounding errors by up to 804, to 10 % of the gradient of the noise schedule within twenty steps.
WITHOUT_WAVES = ["--fourier_features", "0"]
# A function `(output_dir, *argv)` that trains each method. `config_class` gives settings other than CFGConfig.
METHODS: dict[str, Callable] = {
    "cfg": train,
    "one_pass": lambda output_dir, *argv: train(output_dir, "--max_guidance_scale", "4", *argv),
    "adamw": lambda output_dir, *argv: train(output_dir, "--optimizer", "adamw", *argv),
    "vdm": lambda output_dir, *argv: train_vdm(output_dir, *WITHOUT_WAVES, *argv),
    "distillation": partial(distill, TEACHER),
    "ddgan": train_ddgan,
    "classifier": lambda output_dir, *argv: train_classifier(output_dir, TEACHER, *argv),
    "unlabelled": partial(train, method=Unlabelled),
}


def train_trajectory(name: str, output_dir: Path, *argv: str) -> None:
    """Train a method for the steps of its trajectory, and log every step."""
    flags = ["--max_train_steps", str(STEPS), "--checkpointing_steps", "10", "--report_to", "tensorboard", *argv]
    METHODS[name](output_dir, *flags)


def trajectory_of(output_dir: Path) -> dict[str, dict[int, float]]:
    """Return the losses and gradient norms of a run by name and step, without those of held-out images."""
    logged = scalars(output_dir)
    return {
        tag: dict(points)
        for tag, points in sorted(logged.items())
        if (tag.split("/")[-1] == "loss" or "grad_norm" in tag) and not tag.startswith("held_out/")
    }


def expected(name: str) -> dict[str, dict[int, float]]:
    """Return the recorded trajectory of a method."""
    recorded = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return {tag: dict(enumerate(values, start=1)) for tag, values in recorded.items()}


def main() -> None:
    """Record the trajectories of all methods, or of those that the arguments name."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or METHODS:
        with tempfile.TemporaryDirectory() as folder:
            train_trajectory(name, Path(folder) / "out")
            trajectory = trajectory_of(Path(folder) / "out")
        values = {tag: [float(f"{value:.7g}") for value in points.values()] for tag, points in trajectory.items()}
        (FOLDER / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
