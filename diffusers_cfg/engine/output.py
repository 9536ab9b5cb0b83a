"""Check and clear the output folder of a run, and save the result in it."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers_cfg.config import CommandError, UserError
from diffusers_cfg.engine.checkpoint import Checkpoint
from diffusers_cfg.files import (
    LOCK_FILE,
    atomic_write,
    check_unlocked,
    check_writable,
    disk_errors,
    refuse_data_folder,
    remove,
)
from diffusers_cfg.model_files import INDEX, NOISE_SCHEDULE, RUN, SCHEDULE_PICTURE, SNAPSHOTS, checkpoints, snapshots
from diffusers_cfg.settings import CONFIG_FILE, TrainConfig

logger = logging.getLogger(__name__)

# The names of all that runs and evaluations write to the folder, besides logs. --overwrite_output_dir deletes them.
RUN_FILES = re.compile(
    "|".join(map(re.escape, (CONFIG_FILE, RUN, INDEX, "pipeline_cfg.py", NOISE_SCHEDULE, SCHEDULE_PICTURE)))
    + rf"|unet|scheduler|vae|classifier|evaluation|{SNAPSHOTS}|(old-|tmp-)?checkpoint-\d+|tmp-model"
)
# The settings that may be paths of what a run reads.
INPUTS = (
    "dataset_name",
    "train_data_dir",
    "model_config_name_or_path",
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
)


class Unfinished(CommandError):
    """An error of the disk that ends a run. The text says what is safe, and how to finish."""


def check_output_dir(config: TrainConfig) -> None:
    """
    Check that a run can write to its output folder, and that this endangers nothing.

    Raises:
        UserError: if the folder is a file, not writable, what the run reads, or in use by another run, or if it is not
            empty and the settings neither resume nor overwrite the run in it.
    """
    output_dir = Path(config.output_dir)
    check_writable(output_dir, "--output_dir")
    check_inputs(config)
    not_empty = output_dir.is_dir() and any(path.name != LOCK_FILE for path in output_dir.iterdir())
    if not_empty and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty. Resume with --resume_from_checkpoint latest, restart with "
            "--overwrite_output_dir, or pass a different folder."
        )
    check_unlocked(output_dir, "--output_dir")


def check_inputs(config: TrainConfig) -> None:
    """Raise UserError if the run reads from its output folder, or would write into its data."""
    output_dir = Path(config.output_dir)
    for name in INPUTS:
        value = getattr(config, name)
        if value is not None and os.path.exists(value) and Path(value).resolve().is_relative_to(output_dir.resolve()):
            raise UserError(
                f"--output_dir {output_dir} is or contains {value}, which the run reads. Pass another folder."
            )
    refuse_data_folder(output_dir, vars(config))


def prepare_output_dir(config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """
    Create the output folder and save the settings in it.

    With `--overwrite_output_dir`, delete the run in the folder, unless a checkpoint is resumed. Rename checkpoints that
    are newer than the resumed one: this run repeats their steps, and `latest` must not find them. Of the snapshots of
    the post-hoc EMA, keep only those of the run that is resumed.
    """
    output_dir = Path(config.output_dir)
    if config.overwrite_output_dir and checkpoint is None:
        delete_run(config)
    if checkpoint is not None and checkpoint.path.parent.resolve() == output_dir.resolve():
        existing = checkpoints(output_dir)
        for newer in existing[existing.index(output_dir / checkpoint.path.name) + 1 :]:
            old = output_dir / f"old-{newer.name}"
            remove(old)
            newer.rename(old)
            logger.warning("%s is newer than the resumed checkpoint and was renamed to %s.", newer, old.name)
    keep_snapshots(output_dir, checkpoint)
    with atomic_write(output_dir / CONFIG_FILE) as unfinished:
        config.save(unfinished)


def keep_snapshots(output_dir: Path, checkpoint: Checkpoint | None) -> None:
    """
    Keep the snapshots of the post-hoc EMA up to the resumed step, so that a resumed run ends with those of an
    uninterrupted one. Copy them if the checkpoint is in another folder, and delete all others.
    """
    source, step = (output_dir, 0) if checkpoint is None else (checkpoint.path.parent, checkpoint.record["step"])
    kept = {path.name: path for reached, path in snapshots(source).items() if reached <= step}
    is_here = source.resolve() == output_dir.resolve()
    for path in (output_dir / SNAPSHOTS).glob("step-*"):  # also unfinished ones of a killed process
        if not is_here or path.name not in kept:
            remove(path)
    if not is_here:
        for path in kept.values():
            with atomic_write(output_dir / SNAPSHOTS / path.name) as unfinished:
                shutil.copyfile(path, unfinished)


def delete_run(config: TrainConfig) -> None:
    """Delete what an earlier run wrote to the output folder, by name. All else remains, and the targets of links."""
    output_dir = Path(config.output_dir)
    if not (output_dir / CONFIG_FILE).is_file():  # the first file that a run writes
        return
    for path in output_dir.iterdir():
        if RUN_FILES.fullmatch(path.name):
            remove(path)
    samples, logs = output_dir / "samples", output_dir / config.logging_dir
    for folder, own in ((samples, samples.glob("step-*.png")), (logs, logs.glob(config.tracker_project_name))):
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            for path in own:
                remove(path)
            if not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def saved_together(output_dir: Path) -> Iterator[Path]:
    """
    Save the model of a run with `moved_together`.

    Raises:
        Unfinished: if the files cannot be written.
    """
    try:
        with moved_together(output_dir) as unfinished:
            yield unfinished
    except OSError as error:
        text = f"The training has finished, but the model could not be saved: {error}."
        raise unfinished_error(output_dir, text) from error


@contextmanager
def moved_together(output_dir: Path) -> Iterator[Path]:
    """
    Yield a temporary folder whose contents move to the output folder after the block, `model_index.json` last: a folder
    with an index is a whole model. If the block raises an error, the output folder is unchanged.
    """
    unfinished = output_dir / "tmp-model"
    try:
        remove(unfinished)
        unfinished.mkdir()
        with disk_errors():
            yield unfinished
        remove(output_dir / INDEX)
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == INDEX):
            remove(output_dir / path.name)
            path.rename(output_dir / path.name)
        unfinished.rmdir()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def unfinished_error(output_dir: Path, what: str) -> Unfinished:
    """Return an error that says what happened, which checkpoint is safe, and how to go on."""
    if existing := checkpoints(output_dir):
        return Unfinished(
            f"{what} {existing[-1]} is safe. Solve the problem, then run the same command with "
            "--resume_from_checkpoint latest."
        )
    return Unfinished(f"{what} There is no checkpoint to resume.")
