"""Write and read `checkpoint-STEP` folders, with tensors as safetensors, all else as JSON, and no pickles.

A checkpoint contains a folder `NAME` for each module, a folder `NAME_ema` for each averaged module, a file
`optimizer-OBJECTIVE.safetensors` for each objective, `state.json`, and `checksums.json`, which lists all other files.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusers_cfg.config import UserError
from diffusers_cfg.engine.state import (
    TrainState,
    ema_weights,
    load_weights,
    parameter_names,
    save_module,
    save_variants,
    variant_of,
)
from diffusers_cfg.files import checksum, fsync
from diffusers_cfg.settings import CONFIG_FILE, RunConfig, TrainConfig

logger = logging.getLogger(__name__)

STATE_FILE, CHECKSUMS = "state.json", "checksums.json"
# Version of the layout above. Checkpoints without a format were written by versions with a single method.
FORMAT = 2
# Everything that a run writes to its folder and that --overwrite_output_dir deletes.
RUN_FILES = [
    CONFIG_FILE, "run.json", "evaluation", "model_index.json", "pipeline_cfg.py", "unet", "scheduler", "vae",
    "samples", "checkpoint-*", "old-checkpoint-*", "tmp-*",
]  # fmt: skip


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(config: RunConfig) -> Path | None:
    """
    Return the checkpoint folder of `--resume_from_checkpoint`: a name in the output folder, a path, or the latest
    undamaged checkpoint. Return None if there is none to resume.

    Raises:
        UserError: if the checkpoint does not exist or is damaged.
    """
    requested, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if requested is None:
        return None
    existing = checkpoints(output_dir)
    if requested == "latest":
        for path in reversed(existing):
            if (damage := verify_checkpoint(path)) is None:
                return path
            logger.warning("%s is damaged (%s). Trying the previous checkpoint.", path, damage)
        if existing:
            raise UserError(
                f"All checkpoints in {output_dir} are damaged ({', '.join(path.name for path in existing)}). Restart "
                "with --overwrite_output_dir."
            )
        logger.warning("%s contains no checkpoint. Starting a new run.", output_dir)
        return None
    found = [path for path in (output_dir / requested, Path(requested)) if (path / STATE_FILE).is_file()]
    if not found:
        raise UserError(
            f"--resume_from_checkpoint {requested} does not exist. {output_dir} contains "
            f"{', '.join(path.name for path in existing) or 'no checkpoints'}."
        )
    if (damage := verify_checkpoint(found[0])) is not None:
        raise UserError(f"--resume_from_checkpoint {requested} is damaged ({damage}). Pass an earlier one or latest.")
    return found[0]


def check_output_dir(config: RunConfig) -> None:
    """Raise UserError if the output folder is not empty and the settings neither resume nor overwrite the run in it."""
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file. Pass a folder.")
    not_empty = output_dir.is_dir() and any(output_dir.iterdir())
    if not_empty and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty. Resume with --resume_from_checkpoint latest, restart with "
            "--overwrite_output_dir, or pass a different folder."
        )


def prepare_output_dir(config: TrainConfig, checkpoint: Path | None) -> None:
    """
    Create the output folder and save the settings in it.

    With `--overwrite_output_dir`, delete the run in the folder, unless a checkpoint is resumed. Rename checkpoints that
    are newer than the resumed one: this run repeats their steps, and `latest` must not find them.
    """
    output_dir = Path(config.output_dir)
    if config.overwrite_output_dir and checkpoint is None:
        found = [path for name in RUN_FILES for path in output_dir.glob(name)]
        for path in [*found, *output_dir.glob(config.logging_dir)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if checkpoint is not None and checkpoint.parent.resolve() == output_dir.resolve():
        existing = checkpoints(output_dir)
        for newer in existing[existing.index(output_dir / checkpoint.name) + 1 :]:
            old = output_dir / f"old-{newer.name}"
            shutil.rmtree(old, ignore_errors=True)
            newer.rename(old)
            logger.warning("%s is newer than the resumed checkpoint and was renamed to %s.", newer, old.name)
    output_dir.mkdir(parents=True, exist_ok=True)
    config.save(output_dir / CONFIG_FILE)


def save_checkpoint(config: RunConfig, state: TrainState, facts: dict[str, Any]) -> bool:
    """
    Write `checkpoint-STEP` under a temporary name, flush it to the disk and verify it. Then rename it and delete the
    oldest checkpoints. A failure before the rename, such as a full disk, leaves the last valid checkpoint untouched and
    does not end the run.

    Args:
        config (`RunConfig`): the output folder, and the number of checkpoints to keep.
        state (`TrainState`): the state to save.
        facts (`dict`): other entries of `state.json`, which a resumed run is compared with.

    Returns:
        `bool`: whether the checkpoint was written. If not, an error is logged.
    """
    output_dir = Path(config.output_dir)
    path, unfinished = output_dir / f"checkpoint-{state.step}", output_dir / f"tmp-checkpoint-{state.step}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        write_checkpoint(unfinished, state, facts)
        write_checksums(unfinished)
        if (damage := verify_checkpoint(unfinished)) is not None:
            raise OSError(f"verification failed: {damage}")
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        fsync(output_dir)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        last = [other.name for other in checkpoints(output_dir)][-1:]
        logger.error(
            "Failed to write the checkpoint of step %d: %s. The last valid checkpoint is %s.",
            state.step,
            error,
            last[0] if last else "none",
        )
        return False
    if config.checkpoints_total_limit is not None:
        for old in checkpoints(output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)
    return True


def write_checkpoint(folder: Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Write all files of a checkpoint except its checksums."""
    for name, module in state.modules.items():
        save_module(module, folder / name)
        if state.ema.get(name):
            with ema_weights(state):
                save_module(module, folder / f"{name}_ema")
            save_variants(state, name, folder / f"{name}_ema")
    for name, optimizer in state.optimizers.items():
        moments, names = optimizer.state_dict()["state"], parameter_names(state.modules, optimizer)
        save_file(
            {f"{names[i]}.{key}": value.contiguous() for i, values in moments.items() for key, value in values.items()},
            folder / f"optimizer-{name}.safetensors",
        )
    record = {
        "format": FORMAT,
        "step": state.step,
        "seconds": state.seconds,
        "batch_size": state.batch_size,
        "num_processes": state.num_processes,
        "stream": state.stream,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "optimizers": {name: len(optimizer.state) for name, optimizer in state.optimizers.items()},
        "history": state.history,
        **facts,
    }
    (folder / STATE_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Write `checksums.json`, the checksum of each file in a folder, and flush the folder to the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
    for path in [*files, folder / CHECKSUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(path)


def verify_checkpoint(folder: Path) -> str | None:
    """Return a description of the first missing or changed file of a checkpoint, or None if it is undamaged."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if STATE_FILE not in checksums:
            return f"{CHECKSUMS} does not list {STATE_FILE}"
        for name, expected in checksums.items():
            if checksum(folder / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
    return None


def read_record(path: Path) -> dict[str, Any]:
    """Read the `state.json` of a checkpoint. Raise UserError if a version with a different layout wrote it."""
    record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        age = "an older" if "format" not in record else "a newer"
        raise UserError(
            f"{path} was written by {age} version of diffusers-cfg with a different layout (format "
            f"{record.get('format', 1)}, this version reads {FORMAT}). Finish the run with the version that started "
            "it, or restart with --overwrite_output_dir. To train its saved model further, start a new run with "
            "--pretrained_model_name_or_path."
        )
    return record


def match_batch_size(path: Path, record: dict[str, Any], config: TrainConfig, num_processes: int) -> int:
    """
    Return the `gradient_accumulation_steps` for which the global batch size matches the checkpoint's.

    Args:
        path (`Path`): the checkpoint, for messages.
        record (`dict`): its `state.json`.
        config (`TrainConfig`): the batch size of a process.
        num_processes (`int`): number of processes of this run.

    Raises:
        UserError: if the batch size of all processes does not divide the checkpoint's.
    """
    batch_size, before = record["batch_size"], record["num_processes"]
    accumulation, rest = divmod(batch_size, config.train_batch_size * num_processes)
    if rest:
        raise UserError(
            f"{path} was written with {batch_size} images per step, which {num_processes} processes cannot divide into "
            f"batches of {config.train_batch_size}. Change --train_batch_size or the number of processes."
        )
    if accumulation != config.gradient_accumulation_steps:
        logger.warning(
            "Using --gradient_accumulation_steps %d instead of %d, so that a step still has %d images.",
            accumulation,
            config.gradient_accumulation_steps,
            batch_size,
        )
    if num_processes != before:
        logger.warning(
            "Resuming with %d processes instead of %d. Data and noise are the same; floating-point sums and dropout "
            "masks differ.",
            num_processes,
            before,
        )
    return accumulation


def load_checkpoint(path: Path, record: dict[str, Any], state: TrainState) -> None:
    """Restore the state that `save_checkpoint` wrote. Raise UserError if the weights do not match the modules."""
    try:
        for name, module in state.modules.items():
            module.load_state_dict(load_weights(path / name))
            for index, ema in enumerate(state.ema.get(name, [])):
                weights = load_weights(path / f"{name}_ema", variant_of(ema) if index else None)
                ema.shadow_params = [weights[key].to(p.device) for key, p in module.named_parameters()]
                ema.optimization_step = record["step"]
        for name, optimizer in state.optimizers.items():
            number = record["optimizers"][name]
            load_moments(path / f"optimizer-{name}.safetensors", number, state.modules, optimizer)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{path} does not match the model of this run: {error}. Resume a checkpoint of the same model, "
            "or restart with --overwrite_output_dir."
        ) from error
    if state.scaler is not None and record["scaler"] is not None:  # the precision may have changed
        state.scaler.load_state_dict(record["scaler"])
    state.step, state.seconds, state.stream = record["step"], record["seconds"], record["stream"]


def load_moments(
    path: Path, number: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """
    Load the moments in a file into an optimizer, and keep the settings of its parameter groups.

    Args:
        path (`Path`): the safetensors file.
        number (`int`): number of parameters that had moments when the file was written.
        modules (`dict[str, torch.nn.Module]`): the modules of the run, by name.
        optimizer (`torch.optim.Optimizer`): the optimizer.

    Raises:
        KeyError: if the file has moments of unknown parameters, or of a different number of parameters.
    """
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        parameter, _, name = key.rpartition(".")
        moments.setdefault(parameter, {})[name] = value
    names = parameter_names(modules, optimizer)
    if unknown := sorted(moments.keys() - set(names)):
        raise KeyError(f"{path.name} has moments of unknown parameters, such as {unknown[0]}")
    if len(moments) != number:
        raise KeyError(f"{path.name} has the moments of {len(moments)} parameters, but {number} were saved")
    states = {index: moments[name] for index, name in enumerate(names) if name in moments}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
