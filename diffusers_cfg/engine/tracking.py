"""Send what a run logs to the trackers of Accelerate, as one curve over resumed runs."""

import importlib
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from PIL import Image

from diffusers_cfg.config import CommandError, UserError
from diffusers_cfg.files import save_image
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# How each tracker gets an image: (tracker, image, step). Accelerate's trackers differ in this, and some have no images.
SEND_IMAGE: dict[str, Callable[[Any, Image.Image, int], Any]] = {
    "tensorboard": lambda tracker, image, step: tracker.log_images(
        {"samples": np.asarray(image)[None]}, step=step, dataformats="NHWC"
    ),
    "wandb": lambda tracker, image, step: tracker.log_images({"samples": [image]}, step=step),
    "swanlab": lambda tracker, image, step: tracker.log_images({"samples": [image]}, step=step),
    "aim": lambda tracker, image, step: tracker.log_images({"samples": image}, step=step),
    "clearml": lambda tracker, image, step: tracker.log_images({"samples": image}, step=step),
    "comet_ml": lambda tracker, image, step: tracker.tracker.log_image(image, name="samples", step=step),
    "mlflow": lambda tracker, image, step: library("mlflow").log_image(image, key="samples", step=step),
    "trackio": lambda tracker, image, step: tracker.log({"samples": library("trackio").Image(image)}, step=step),
}
# The id or the name by which a tracker resumes its run.
RUN_ID: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "trackio": lambda run: run.name,
    "mlflow": lambda run: run.info.run_id,
    "comet_ml": lambda run: run.get_key(),
    "aim": lambda run: run.hash,
    "clearml": lambda run: run.id,
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
        "swanlab": {"experiment_name": run_name},
    }


class Trackers:
    """
    The trackers of a run. One that fails is reported and left out: it ends neither the run nor the other trackers.

    Args:
        config (`TrainConfig`): the settings.
        accelerator (`Accelerator`): the trackers, which are not started yet.
        runs (`dict[str, str]`): the runs of the checkpoint by tracker. Updated to those of this run.
        first_step (`int`): the step that the run starts from.

    Raises:
        UserError: if a tracker cannot be started.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, runs: dict[str, str], first_step: int) -> None:
        self.accelerator, self.output_dir = accelerator, Path(config.output_dir)
        # TensorBoard accepts neither lists nor None.
        settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.public().items()}
        run_name = config.run_name or self.output_dir.resolve().name
        try:
            accelerator.init_trackers(
                config.tracker_project_name,
                settings if not runs else None,  # MLflow refuses changed settings
                init_arguments(run_name, runs, first_step),
            )
        except Exception as error:  # of any of the trackers' libraries
            raise UserError(
                f"--report_to {config.report_to} cannot be started: {error}. Set it up, or pass --report_to none."
            ) from error
        if accelerator.is_main_process:
            runs |= {t.name: RUN_ID[t.name](t.tracker) for t in accelerator.trackers if t.name in RUN_ID}
            if without := [tracker.name for tracker in accelerator.trackers if tracker.name not in SEND_IMAGE]:
                logger.warning("%s gets no images of samples, which are in %s.", ", ".join(without), self.folder)

    @property
    def folder(self) -> Path:
        """The folder of samples."""
        return self.output_dir / "samples"

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log values by name."""
        self._send(lambda tracker: tracker.log(dict(values), step=step))

    def log_samples(self, image: Image.Image, step: int) -> None:
        """Save an image of samples, and log it. Called on the main process."""
        try:
            save_image(image, self.folder / f"step-{step}.png")
        except OSError as error:
            logger.error("Failed to save the samples of step %d: %s", step, error)

        def send(tracker: GeneralTracker) -> None:
            if tracker.name in SEND_IMAGE:
                SEND_IMAGE[tracker.name](tracker, image, step)

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
