"""Write and read `checkpoint-STEP` folders: tensors as safetensors, the rest as JSON, no pickles.

A checkpoint holds for each module `NAME/`, and `NAME_ema/` if it is averaged; for each objective
`optimizer-OBJECTIVE.safetensors`; `state.json`; and `checksums.json`, which lists all of these files.
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

from diffusers_cfg.config import Config, UserError
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
# The layout described above. Checkpoints without a format were written before there were several methods.
FORMAT = 2
# All that a run writes into its folder, and all that --overwrite_output_dir deletes.
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
    Return the folder that `--resume_from_checkpoint` means: a name in the output folder, a path, or the latest that is
    undamaged. Return None if there is nothing to resume.

    Raises:
        UserError: it does not exist or is damaged.
    """
    wanted, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if wanted is None:
        return None
    existing = checkpoints(output_dir)
    if wanted == "latest":
        for path in reversed(existing):
            if (damage := verify_checkpoint(path)) is None:
                return path
            logger.warning("%s is damaged (%s): taking the one before it.", path, damage)
        if existing:
            raise UserError(
                f"All checkpoints in {output_dir} are damaged ({', '.join(path.name for path in existing)}): start "
                "again with --overwrite_output_dir."
            )
        logger.warning("There is no checkpoint in %s yet: starting a new run.", output_dir)
        return None
    found = [path for path in (output_dir / wanted, Path(wanted)) if (path / STATE_FILE).is_file()]
    if not found:
        raise UserError(
            f"--resume_from_checkpoint {wanted} does not exist. {output_dir} holds "
            f"{', '.join(path.name for path in existing) or 'no checkpoints'}."
        )
    if (damage := verify_checkpoint(found[0])) is not None:
        raise UserError(f"--resume_from_checkpoint {wanted} is damaged ({damage}): take another, or latest.")
    return found[0]


def check_output_dir(config: RunConfig) -> None:
    """Raise UserError if the output folder holds another run, and the settings do not say what to do with it."""
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder.")
    taken = output_dir.is_dir() and any(output_dir.iterdir())
    if taken and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty: resume with --resume_from_checkpoint latest, start again with "
            "--overwrite_output_dir, or name another folder."
        )


def prepare_output_dir(config: TrainConfig, checkpoint: Path | None) -> None:
    """
    Create the folder, and write down the settings of this run. Delete the run in the folder if that is wanted and none
    is resumed. Rename the checkpoints that are newer than the one that is resumed: they belong to the steps that this
    run takes again, and `latest` must not mean them.
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
            logger.warning("%s is newer than the checkpoint that is resumed: it is %s now.", newer, old.name)
    output_dir.mkdir(parents=True, exist_ok=True)
    config.save(output_dir / CONFIG_FILE)


def save_checkpoint(config: RunConfig, state: TrainState, facts: dict[str, Any]) -> bool:
    """
    Write `checkpoint-STEP` under a temporary name, make sure that it is on the disk and reads back as written, and only
    then give it its name and delete the oldest. A failure before that leaves the last valid checkpoint untouched, and a
    full disk costs the checkpoint and not the run.

    Args:
        config (`RunConfig`): output folder, and how many checkpoints are kept.
        state (`TrainState`): what is saved.
        facts (`dict`): what else `state.json` holds, for a resumed run to compare with.

    Returns:
        `bool`: whether it was written. If not, an error is logged.
    """
    output_dir = Path(config.output_dir)
    path, aside = output_dir / f"checkpoint-{state.step}", output_dir / f"tmp-checkpoint-{state.step}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write_checkpoint(aside, state, facts)
        write_checksums(aside)
        if (damage := verify_checkpoint(aside)) is not None:
            raise OSError(f"it does not read as it was written: {damage}")
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        fsync(output_dir)
    except (OSError, SafetensorError) as error:  # which safetensors raises for a full disk too
        shutil.rmtree(aside, ignore_errors=True)
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
    """Write down the checksum of each file of a folder, and wait until all of it is on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
    for path in [*files, folder / CHECKSUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(path)


def verify_checkpoint(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint: a file that is missing or not as it was written. None if nothing is."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if STATE_FILE not in checksums:
            return f"{CHECKSUMS} does not list {STATE_FILE}"
        for name, expected in checksums.items():
            if checksum(folder / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
    return None


def read_record(path: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`. Raises UserError if it has the layout of another version."""
    record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        age = "an older" if "format" not in record else "a newer"
        raise UserError(
            f"{path} was written by {age} version of diffusers-cfg, with another layout (format "
            f"{record.get('format', 1)}, this version reads {FORMAT}). Finish that run with the version that began it, "
            "or start again with --overwrite_output_dir; a model that it has saved can be the start of a new run, with "
            "--pretrained_model_name_or_path."
        )
    return record


def match_batch_size(path: Path, record: dict[str, Any], config: Config, num_processes: int) -> int:
    """
    Return the `gradient_accumulation_steps` with which a step has as many images as in a checkpoint.

    Raises:
        UserError: the processes and the batch size cannot make up that number.
    """
    batch_size, before = record["batch_size"], record["num_processes"]
    accumulation, rest = divmod(batch_size, config.train_batch_size * num_processes)
    if rest:
        raise UserError(
            f"{path} was written with steps of {batch_size} images, which {num_processes} processes cannot share in "
            f"batches of {config.train_batch_size}: choose another --train_batch_size or number of processes."
        )
    if accumulation != config.gradient_accumulation_steps:
        logger.warning(
            "--gradient_accumulation_steps is %d and not %d, so that a step stays one of %d images.",
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
    """Restore the state that `save_checkpoint` wrote. Raises UserError if the checkpoint is of another network."""
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
        raise UserError(f"{path} does not hold the weights of this model and run: {error}") from error
    if state.scaler is not None and record["scaler"] is not None:  # the checkpoint may be of another precision
        state.scaler.load_state_dict(record["scaler"])
    state.step, state.seconds, state.stream = record["step"], record["seconds"], record["stream"]


def load_moments(
    path: Path, number: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """
    Give an optimizer the moments in a file, and leave its settings.

    Raises:
        KeyError: the moments are not of these parameters, or not of as many as were saved.
    """
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        parameter, _, name = key.rpartition(".")
        moments.setdefault(parameter, {})[name] = value
    names = parameter_names(modules, optimizer)
    if unknown := sorted(moments.keys() - set(names)):
        raise KeyError(f"{path.name} has moments of other parameters, such as {unknown[0]}")
    if len(moments) != number:
        raise KeyError(f"{path.name} has the moments of {len(moments)} parameters, but {number} were saved")
    states = {index: moments[name] for index, name in enumerate(names) if name in moments}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
