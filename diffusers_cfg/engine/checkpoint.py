"""Write and read `checkpoint-STEP` folders, with tensors as safetensors, all else as JSON, and no pickles.

A checkpoint contains a folder `NAME` for each module, a folder `NAME_ema` for each averaged module, a file
`optimizer-OBJECTIVE.safetensors` for each objective, a file `posthoc_ema.safetensors` for `--posthoc_ema_steps`,
`state.json`, and `checksums.json`, which lists all other files.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffusers_cfg.config import UserError
from diffusers_cfg.engine.processes import most_threads, threads_are_set
from diffusers_cfg.engine.state import (
    TrainState,
    ema_weights,
    load_weights,
    parameter_names,
    save_module,
    save_variants,
    variant_of,
    weights_file,
)
from diffusers_cfg.files import checksum, disk_errors, fsync, remove
from diffusers_cfg.model_files import checkpoints
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

STATE_FILE, CHECKSUMS, POSTHOC_EMA = "state.json", "checksums.json", "posthoc_ema.safetensors"
# Version of the layout above. Checkpoints without a format were written by versions with a single method.
FORMAT = 2
# Entries of `state.json`: numbers with their least values, mappings with the keys that a resumed run reads, and others
# with their types.
NUMBERS = {"step": 0, "seconds": 0.0, "batch_size": 1, "num_processes": 1}
MAPPINGS = {
    "optimizers": [],
    "settings": [],
    "identity": ["method"],
    "data": ["class_names", "num_images", "fingerprint"],
}
OTHERS = {"history": list, "stream": dict | None, "scaler": dict | None}


class Checkpoint(NamedTuple):
    """A checkpoint to resume: its folder, and the contents of its `state.json`."""

    path: Path
    record: dict[str, Any]


def find_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """
    Return the checkpoint of `--resume_from_checkpoint`: a name in the output folder, a path, or the latest
    undamaged checkpoint. Return None if there is none to resume.

    Raises:
        UserError: if the checkpoint does not exist, is damaged, or has the layout of a different version.
    """
    requested, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if requested is None:
        return None
    existing = checkpoints(output_dir)
    if requested == "latest":
        for path in reversed(existing):
            if (damage := verify_checkpoint(path)) is None:
                return Checkpoint(path, read_record(path))
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
        problem = "is not a checkpoint" if Path(requested).exists() else "does not exist"
        raise UserError(
            f"--resume_from_checkpoint {requested} {problem}. {output_dir} contains "
            f"{', '.join(path.name for path in existing) or 'no checkpoints'}."
        )
    if (damage := verify_checkpoint(found[0])) is not None:
        raise UserError(f"--resume_from_checkpoint {requested} is damaged ({damage}). Pass an earlier one or latest.")
    return Checkpoint(found[0], read_record(found[0]))


def save_checkpoint(config: TrainConfig, state: TrainState, facts: dict[str, Any]) -> bool:
    """
    Write `checkpoint-STEP` under a temporary name, flush it to the disk and verify it. Then rename it and delete the
    oldest checkpoints. A failure before the rename, such as a full disk, leaves the last valid checkpoint untouched and
    does not end the run.

    Args:
        config (`TrainConfig`): the output folder, and the number of checkpoints to keep.
        state (`TrainState`): the state to save.
        facts (`dict`): other entries of `state.json`, which a resumed run is compared with.

    Returns:
        `bool`: whether the checkpoint was written. If not, an error is logged.
    """
    output_dir = Path(config.output_dir)
    path, unfinished = output_dir / f"checkpoint-{state.step}", output_dir / f"tmp-checkpoint-{state.step}"
    try:
        remove(unfinished)
        with disk_errors():
            write_checkpoint(unfinished, state, facts)
        write_checksums(unfinished)
        if (damage := verify_checkpoint(unfinished)) is not None:
            raise OSError(f"verification failed: {damage}")
        remove(path)
        unfinished.rename(path)
        fsync(output_dir)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        last = [other.name for other in checkpoints(output_dir)][-1:]
        logger.error(
            "Failed to write the checkpoint of step %d: %s. The last valid checkpoint is %s.",
            state.step,
            error,
            last[0] if last else "none",
        )
        return False
    limit = config.checkpoints_total_limit
    try:
        for old in checkpoints(output_dir)[:-limit] if limit is not None else []:
            remove(old)
    except OSError as error:
        logger.warning("Failed to delete an old checkpoint: %s", error)
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
    if state.posthoc is not None:
        state.posthoc.save(folder / POSTHOC_EMA)
    record = {
        "format": FORMAT,
        "step": state.step,
        "seconds": state.seconds,
        "batch_size": state.batch_size,
        "num_processes": state.num_processes,
        "num_threads": torch.get_num_threads(),
        "stream": state.stream,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "optimizers": {name: len(optimizer.state) for name, optimizer in state.optimizers.items()},
        "moments": {name: sum(map(len, optimizer.state.values())) for name, optimizer in state.optimizers.items()},
        "trackers": state.trackers,
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
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return verify_record(record, folder) if record.get("format") == FORMAT else None
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError) as error:
        return str(error)
    except KeyError as error:
        return f"{STATE_FILE} lacks {error}"


def verify_record(record: dict[str, Any], folder: Path) -> str | None:
    """Return a description of the first entry of `state.json` that is wrong or lacks its file, or None."""
    for name, least in NUMBERS.items():
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, (int, type(least))) or not value >= least:
            return f"{name} in {STATE_FILE} is {value!r}"
    for name, keys in MAPPINGS.items():
        if not isinstance(record[name], dict) or not record[name]:
            return f"{name} in {STATE_FILE} is {record[name]!r}"
        if missing := [key for key in keys if key not in record[name]]:
            return f"{name} in {STATE_FILE} lacks {missing[0]!r}"
    for name, kind in OTHERS.items():
        if not isinstance(record[name], kind):
            return f"{name} in {STATE_FILE} is {record[name]!r}"
    method = record["identity"]["method"]
    averaged = method["averaged"] if record["settings"].get("use_ema") else []
    for name in [*method["modules"], *(f"{name}_ema" for name in averaged)]:
        if not (folder / name / weights_file(None)).is_file():
            return f"{name}/{weights_file(None)} is missing"
    if record["settings"].get("posthoc_ema_steps") and not (folder / POSTHOC_EMA).is_file():
        return f"{POSTHOC_EMA} is missing"
    for name in set(method["objectives"]):
        with safe_open(folder / f"optimizer-{name}.safetensors", "pt") as file:
            moments = list(file.keys())
        parameters = {key.rpartition(".")[0] for key in moments}
        saved = record.get("moments", {}).get(name, len(moments))  # not counted by the first versions of this layout
        if (len(parameters), len(moments)) != (record["optimizers"][name], saved):
            return (
                f"optimizer-{name}.safetensors has {len(moments)} moments of {len(parameters)} parameters, but {saved} "
                f"of {record['optimizers'][name]} were saved"
            )
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


def reuse_num_threads(checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """
    Use the number of threads of the run that wrote a checkpoint, on which the rounding of sums on a CPU depends, unless
    the user has set one, the number of processes has changed, or this machine has fewer CPUs.
    """
    path, record = checkpoint
    is_same = accelerator.device.type == "cpu" and record["num_processes"] == accelerator.num_processes
    saved = record.get("num_threads", torch.get_num_threads())
    if not is_same or threads_are_set() or saved == torch.get_num_threads():
        return
    if saved > (most := most_threads(accelerator.num_processes)):
        logger.warning(
            "%s was written with %d threads per process, but only %d CPUs are available: sums are rounded differently.",
            path,
            saved,
            most,
        )
        return
    logger.info("Using %d threads, as the run that wrote %s.", saved, path)
    torch.set_num_threads(saved)


def match_batch_size(checkpoint: Checkpoint, config: TrainConfig, num_processes: int) -> int:
    """
    Return the `gradient_accumulation_steps` for which the global batch size matches the checkpoint's.

    Args:
        checkpoint (`Checkpoint`): the checkpoint.
        config (`TrainConfig`): the batch size of a process.
        num_processes (`int`): number of processes of this run.

    Raises:
        UserError: if the batch size of all processes does not divide the checkpoint's.
    """
    path, record = checkpoint
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


def load_checkpoint(checkpoint: Checkpoint, state: TrainState) -> None:
    """Restore the state that `save_checkpoint` wrote. Raise UserError if the weights do not match the modules."""
    path, record = checkpoint
    try:
        for name, module in state.modules.items():
            module.load_state_dict(load_weights(path / name))
            for index, ema in enumerate(state.ema.get(name, [])):
                weights = load_weights(path / f"{name}_ema", variant_of(ema) if index else None)
                ema.shadow_params = [weights[key].to(p.device) for key, p in module.named_parameters()]
                ema.optimization_step = record["step"]
        for name, optimizer in state.optimizers.items():
            load_moments(path / f"optimizer-{name}.safetensors", state.modules, optimizer)
        if state.posthoc is not None:
            state.posthoc.load(path / POSTHOC_EMA)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{path} does not match the model of this run: {error}. Resume a checkpoint of the same model, "
            "or restart with --overwrite_output_dir."
        ) from error
    if state.scaler is not None and record["scaler"] is not None:  # the precision may have changed
        state.scaler.load_state_dict(record["scaler"])
    state.seconds, state.stream = record["seconds"], record["stream"]


def load_moments(path: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """
    Load the moments in a file into an optimizer, and keep the settings of its parameter groups.

    Args:
        path (`Path`): the safetensors file.
        modules (`dict[str, torch.nn.Module]`): the modules of the run, by name.
        optimizer (`torch.optim.Optimizer`): the optimizer.

    Raises:
        KeyError: if the file has moments of unknown parameters.
    """
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        parameter, _, name = key.rpartition(".")
        moments.setdefault(parameter, {})[name] = value
    names = parameter_names(modules, optimizer)
    if unknown := sorted(moments.keys() - set(names)):
        raise KeyError(f"{path.name} has moments of unknown parameters, such as {unknown[0]}")
    states = {index: moments[name] for index, name in enumerate(names) if name in moments}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
