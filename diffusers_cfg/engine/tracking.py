"""Send what a run or an evaluation logs to the trackers of Accelerate."""

import importlib
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from PIL import Image

from diffusers_cfg.config import CommandError, UserError
from diffusers_cfg.files import save_image
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# Lower than any step. A new TensorBoard run from here hides the events of earlier runs in its folder.
BEFORE_ALL_STEPS = -(2**31)


class Table(NamedTuple):
    """A table for trackers: rows of numbers, texts and None by column, and the same as text."""

    columns: list[str]
    rows: list[list[float | str | None]]
    markdown: str


# How each tracker gets an image: (tracker, name, image, step). Accelerate's trackers differ in this, and some have no
# images.
SEND_IMAGE: dict[str, Callable[[Any, str, Image.Image, int], Any]] = {
    "tensorboard": lambda tracker, name, image, step: tracker.log_images(
        {name: np.asarray(image)[None]}, step=step, dataformats="NHWC"
    ),
    "wandb": lambda tracker, name, image, step: tracker.log_images({name: [image]}, step=step),
    "swanlab": lambda tracker, name, image, step: tracker.log_images({name: [image]}, step=step),
    "aim": lambda tracker, name, image, step: tracker.log_images({name: image}, step=step),
    "clearml": lambda tracker, name, image, step: tracker.log_images({name: image}, step=step),
    "comet_ml": lambda tracker, name, image, step: tracker.tracker.log_image(image, name=name, step=step),
    "mlflow": lambda tracker, name, image, step: library("mlflow").log_image(image, key=name, step=step),
    "trackio": lambda tracker, name, image, step: tracker.log({name: library("trackio").Image(image)}, step=step),
}
# How each tracker gets a table: (tracker, name, table, step).
SEND_TABLE: dict[str, Callable[[Any, str, Table, int], Any]] = {
    "tensorboard": lambda tracker, name, table, step: tracker.log({name: table.markdown}, step=step),
    "wandb": lambda tracker, name, table, step: tracker.log_table(name, table.columns, table.rows, step=step),
    "clearml": lambda tracker, name, table, step: tracker.log_table(name, table.columns, table.rows, step=step),
    "swanlab": lambda tracker, name, table, step: tracker.log(
        {name: library("swanlab").echarts.Table().add(table.columns, table.rows)}, step=step
    ),
    "aim": lambda tracker, name, table, step: tracker.log({name: library("aim").Text(table.markdown)}, step=step),
    "comet_ml": lambda tracker, name, table, step: tracker.tracker.log_table(f"{name}.csv", table.rows, table.columns),
    "mlflow": lambda tracker, name, table, step: library("mlflow").log_table(
        {column: [row[i] for row in table.rows] for i, column in enumerate(table.columns)}, f"{name}.json"
    ),
    "trackio": lambda tracker, name, table, step: tracker.log(
        {name: library("trackio").Table(columns=table.columns, data=table.rows)}, step=step
    ),
}
# How a tracker draws a curve over another x axis than the step: (tracker, name of x, name of y, x, y). In Trackio the
# reader chooses the x axis.
DRAW_CURVE: dict[str, Callable[[Any, str, str, list[float], list[float]], Any]] = {
    "wandb": lambda tracker, x_name, y_name, x, y: tracker.tracker.define_metric(y_name, step_metric=x_name),
    "swanlab": lambda tracker, x_name, y_name, x, y: tracker.tracker.define_metric(y_name, x_axis=x_name),
    "comet_ml": lambda tracker, x_name, y_name, x, y: tracker.tracker.log_curve(y_name, x, y),
    "clearml": lambda tracker, x_name, y_name, x, y: tracker.tracker.get_logger().report_scatter2d(
        y_name, "curve", list(zip(x, y, strict=True)), iteration=0, xaxis=x_name, yaxis=y_name, mode="lines+markers"
    ),
}
# These know no x axis but the step, an integer, which is x in hundredths.
STEPS_ARE_HUNDREDTHS = ("tensorboard", "mlflow")
# The id or the name by which a tracker resumes its run.
RUN_ID: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "trackio": lambda run: run.name,
    "mlflow": lambda run: run.info.run_id,
    "comet_ml": lambda run: run.get_key(),
    "swanlab": lambda run: run.id,
    "aim": lambda run: run.hash,
    "clearml": lambda run: run.id,
}
# How a run gets its name, if not by `init_arguments`.
SET_NAME: dict[str, Callable[[Any, str], Any]] = {
    "comet_ml": lambda run, name: run.set_name(name),
    "aim": lambda run, name: setattr(run, "name", name),
}


def library(name: str) -> Any:
    """Return the library of a tracker, which is optional and which the tracker has imported."""
    return importlib.import_module(name)


def tracker_names(report_to: str) -> list[LoggerType]:
    """Return the trackers that `--report_to` lists. Raise UserError if one is unknown."""
    if report_to == "none":
        return []
    names = [name.strip() for name in report_to.split(",")]
    if unknown := [name for name in names if name not in LoggerType.list()]:
        trackers = ", ".join(LoggerType.list())
        raise UserError(f"--report_to {report_to}: {unknown[0]!r} is not a tracker. Use {trackers} or none.")
    return [LoggerType(name) for name in names]


def init_arguments(run_name: str, runs: Mapping[str, str], first_step: int) -> dict[str, dict[str, Any]]:
    """
    Return arguments for each tracker that name a new run, or resume the run of a checkpoint.

    Args:
        run_name (`str`): the name of a new run.
        runs (`Mapping[str, str]`): the runs of the checkpoint by tracker, from `Trackers.runs`.
        first_step (`int`): the step that the run starts from.
    """
    new = uuid.uuid4().hex[:8]
    return {
        # Events of the steps that are repeated are hidden.
        "tensorboard": {"purge_step": first_step + 1} if first_step else {},
        "wandb": {"name": run_name, "id": runs.get("wandb", new), "resume": "allow"},
        "trackio": {"name": runs.get("trackio", run_name), "resume": "allow" if "trackio" in runs else "never"},
        "mlflow": {"run_name": run_name, "run_id": runs.get("mlflow")},
        "comet_ml": {"experiment_key": runs.get("comet_ml")},
        "aim": {"run_hash": runs.get("aim")},
        "clearml": {"task_name": run_name, "continue_last_task": runs.get("clearml", False)},
        # SwanLab takes an id only with a run to resume.
        "swanlab": {
            "experiment_name": run_name,
            **({"id": runs["swanlab"], "resume": "allow"} if "swanlab" in runs else {}),
        },
    }


class Trackers:
    """
    The trackers of a run or an evaluation. One that fails is reported and left out: it ends neither the run nor the
    other trackers.

    Args:
        config (`TrainConfig`): the settings of the trackers and of the output folder.
        accelerator (`Accelerator`): the trackers, which `start` starts.
        settings (`Mapping[str, Any]`): the settings that the trackers show.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        self.config, self.accelerator, self.output_dir = config, accelerator, Path(config.output_dir)
        # TensorBoard accepts neither lists nor None.
        self.settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}

    def start(self, runs: dict[str, str] | None = None, first_step: int = BEFORE_ALL_STEPS) -> None:
        """
        Start the trackers.

        Args:
            runs (`dict[str, str]`, *optional*): the runs of the checkpoint by tracker. Updated to those of this run.
            first_step (`int`): the step that the run starts from. TensorBoard hides what is in its folder from later
                steps; by default everything.

        Raises:
            UserError: if a tracker cannot be started.
        """
        config, accelerator, runs = self.config, self.accelerator, {} if runs is None else runs
        run_name = config.run_name or self.output_dir.resolve().name
        try:
            accelerator.init_trackers(
                config.tracker_project_name,
                self.settings if not runs else None,  # MLflow refuses changed settings
                init_arguments(run_name, runs, first_step),
            )
            if accelerator.is_main_process:
                for tracker in accelerator.trackers:
                    if tracker.name in SET_NAME:
                        SET_NAME[tracker.name](tracker.tracker, run_name)
                runs |= {t.name: RUN_ID[t.name](t.tracker) for t in accelerator.trackers if t.name in RUN_ID}
        except Exception as error:  # of any of the trackers' libraries
            raise UserError(
                f"--report_to {config.report_to} cannot be started: {error}. Set it up, or pass --report_to none."
            ) from error
        if without := [tracker.name for tracker in accelerator.trackers if tracker.name not in SEND_IMAGE]:
            logger.warning("%s gets no images or tables, which are in %s.", ", ".join(without), self.output_dir)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log values by name. Characters of names that MLflow refuses, such as =, are replaced in all trackers."""
        named = {re.sub(r"[^\w/. -]", "_", name): value for name, value in values.items()}
        self._send(lambda tracker: tracker.log(dict(named), step=step))

    def log_samples(self, image: Image.Image, step: int) -> None:
        """Save an image of samples, and log it. Called on the main process."""
        try:
            save_image(image, self.output_dir / "samples" / f"step-{step}.png")
        except OSError as error:
            logger.error("Failed to save the samples of step %d: %s", step, error)
        self.log_image("samples", image, step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Log an image. Called on the main process."""
        rgb = image.convert("RGB")  # TensorBoard takes no other
        self._send(lambda tracker: tracker.name in SEND_IMAGE and SEND_IMAGE[tracker.name](tracker, name, rgb, step))

    def log_table(self, name: str, table: Table, step: int) -> None:
        """Log a table. Called on the main process."""
        self._send(lambda tracker: tracker.name in SEND_TABLE and SEND_TABLE[tracker.name](tracker, name, table, step))

    def log_curves(self, x_name: str, rows: Sequence[Mapping[str, float]]) -> None:
        """
        Log curves over one of the values. Called on the main process.

        Args:
            x_name (`str`): the value of the x axis.
            rows (`Sequence[Mapping[str, float]]`): the values of each point by name, ordered by `x_name`. All rows have
                the same names.
        """
        x = [row[x_name] for row in rows]

        def send(tracker: GeneralTracker) -> None:
            if tracker.name in DRAW_CURVE:
                for name in rows[0].keys() - {x_name}:
                    DRAW_CURVE[tracker.name](tracker, x_name, name, x, [row[name] for row in rows])
            for index, row in enumerate(rows):
                tracker.log(dict(row), step=round(100 * x[index]) if tracker.name in STEPS_ARE_HUNDREDTHS else index)

        self._send(send)

    def finish(self) -> None:
        """Flush and close the trackers."""
        self._send(lambda tracker: tracker.finish())

    def _send(self, send: Callable[[GeneralTracker], Any]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                send(tracker)
            except CommandError:  # a signal stops the run
                raise
            except Exception as error:  # of the disk, the network or the tracker's library
                self.accelerator.trackers.remove(tracker)
                logger.error("%s failed and gets no more values of this run: %s", tracker.name, error)
