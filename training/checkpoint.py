"""`checkpoint-STEP` folders: weights, their average and the optimizer as safetensors, the rest as JSON; no pickles."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from config import TrainConfig, UserError
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)

CONFIG_FILE = "train_config.yaml"
STATE_FILE, CHECKSUMS = "state.json", "checksums.json"
# All that a run writes into its folder, and all that --overwrite_output_dir deletes.
RUN_FILES = [
    CONFIG_FILE, "run.json", "evaluation", "model_index.json", "pipeline_cfg.py", "unet", "scheduler", "vae",
    "samples", "checkpoint-*", "tmp-*",
]  # fmt: skip
# Settings that a run cannot go on without: another value means other batches, other noise or other weights.
SETTINGS_OF_A_RUN = [
    "seed", "resolution", "conditioning_dropout_prob", "prediction_type", "dataset_name", "train_data_dir", "streaming",
    "shuffle_buffer_size", "max_train_steps", "lr_scheduler", "learning_rate",
]  # fmt: skip


@dataclass
class TrainState:
    """All that changes during a run, and that a checkpoint has to hold."""

    unet: torch.nn.Module
    averages: list[EMAModel]  # the first is what is sampled; the others are kept as variants
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    batch_size: int  # images a step, on all processes and accumulated
    num_processes: int
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    seconds: float = 0.0
    stream: dict[str, Any] | None = None  # the place in data that is streamed


@contextmanager
def averaged_weights(state: TrainState, index: int = 0) -> Iterator[None]:
    """Inside, the network has the weights of one of the averages, if there are any, and is in eval mode."""
    unet, average = state.unet, state.averages[index] if state.averages else None
    was_training = unet.training
    unet.eval()
    if average is not None:
        average.store(unet.parameters())
        average.copy_to(unet.parameters())
    try:
        yield
    finally:
        if average is not None:
            average.restore(unet.parameters())
        unet.train(was_training)


def save_variants(state: TrainState, folder: Path) -> None:
    """Save each average but the first beside a network's weights, as a variant of them such as `ema999`."""
    for index, average in enumerate(state.averages[1:], start=1):
        with averaged_weights(state, index):
            state.unet.save_pretrained(folder, variant=variant_of(average))


def variant_of(average: EMAModel) -> str:
    """0.999 is ema999: the names of variants have no dots."""
    return "ema" + str(average.decay).removeprefix("0.")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(config: TrainConfig) -> Path | None:
    """
    The folder that `--resume_from_checkpoint` means: a name in the output folder, a path, or the latest that is whole.
    None if there is nothing to resume. Raises UserError for one that does not exist or is damaged.
    """
    wanted, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if wanted is None:
        return None
    existing = checkpoints(output_dir)
    if wanted == "latest":
        for path in reversed(existing):
            if (damage := find_damage(path)) is None:
                return path
            logger.warning("%s is damaged (%s): taking the one before it.", path, damage)
        if existing:
            raise UserError(
                f"None of the checkpoints in {output_dir} is whole ({', '.join(path.name for path in existing)}): "
                "start anew with --overwrite_output_dir."
            )
        logger.warning("There is no checkpoint in %s yet: starting a new run.", output_dir)
        return None
    found = [path for path in (output_dir / wanted, Path(wanted)) if (path / STATE_FILE).is_file()]
    if not found:
        raise UserError(
            f"--resume_from_checkpoint {wanted} does not exist. {output_dir} holds "
            f"{', '.join(path.name for path in existing) or 'no checkpoints'}."
        )
    if (damage := find_damage(found[0])) is not None:
        raise UserError(f"--resume_from_checkpoint {wanted} is damaged ({damage}): take another, or latest.")
    return found[0]


def check_output_dir(config: TrainConfig) -> None:
    """Raises UserError if the output folder holds another run, and the settings do not say what to do with it."""
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file.")
    taken = output_dir.is_dir() and any(output_dir.iterdir())
    if taken and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty: go on with --resume_from_checkpoint latest, start anew with "
            "--overwrite_output_dir, or name another folder."
        )


def prepare_output_dir(config: TrainConfig) -> None:
    """Make the folder, delete the run in it if that is wanted, and write down the settings of this one."""
    output_dir = Path(config.output_dir)
    if config.overwrite_output_dir and config.resume_from_checkpoint is None:
        for path in [match for name in [*RUN_FILES, config.logging_dir] for match in output_dir.glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    config.save(output_dir / CONFIG_FILE)


def gib(size: float) -> str:
    return f"{size / 1024**3:.2f} GiB"


def checkpoint_bytes(config: TrainConfig, unet: torch.nn.Module) -> int:
    """The size of a checkpoint: the weights, Adam's two moments and the averages."""
    return 4 * unet.num_parameters() * (3 + len(config.ema_decays))


def checkpoints_at_once(config: TrainConfig, total_steps: int) -> int:
    """How many checkpoints there are at the most: the one more than is kept is the one that is being written."""
    if not config.checkpointing_steps:
        return 0
    number = -(-total_steps // config.checkpointing_steps)
    return number if config.checkpoints_total_limit is None else min(number, config.checkpoints_total_limit + 1)


def free_bytes(config: TrainConfig) -> int:
    """What is free on the disk of the output folder, which need not exist yet."""
    folder = Path(config.output_dir).resolve()
    return shutil.disk_usage(next(path for path in [folder, *folder.parents] if path.exists())).free


def check_disk(config: TrainConfig, unet: torch.nn.Module, total_steps: int) -> None:
    """Warns if the disk has no room for all checkpoints. Raises UserError if it has none for the first two of them."""
    size, number, free = checkpoint_bytes(config, unet), checkpoints_at_once(config, total_steps), free_bytes(config)
    if free >= number * size:
        return
    message = (
        f"The disk of --output_dir {config.output_dir} has {gib(free)} left, but {number} checkpoints at once take "
        f"{gib(number * size)}"
    )
    if free < min(number, 2) * size:
        raise UserError(f"{message}: name a folder on another disk.")
    logger.warning("%s: keep fewer, with --checkpoints_total_limit, or write them less often.", message)


def save_checkpoint(config: TrainConfig, state: TrainState) -> bool:
    """
    Write `checkpoint-STEP` aside, make sure that it is on the disk and whole, and only then give it its name and delete
    the oldest. Whatever happens before leaves the last good one as it is. A disk that is full costs the checkpoint and
    not the run: it is said aloud, and False is returned.
    """
    output_dir = Path(config.output_dir)
    path, aside = output_dir / f"checkpoint-{state.step}", output_dir / f"tmp-checkpoint-{state.step}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write_checkpoint(aside, config, state)
        seal(aside)
        if (damage := find_damage(aside)) is not None:
            raise OSError(f"it does not read as it was written: {damage}")
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        flush(output_dir)
    except (OSError, SafetensorError) as error:  # which safetensors raises for a full disk too
        shutil.rmtree(aside, ignore_errors=True)
        last = [other.name for other in checkpoints(output_dir)][-1:]
        logger.error(
            "THE CHECKPOINT OF STEP %d COULD NOT BE WRITTEN: %s. The run goes on; what it can go back to is %s.",
            state.step, error, last[0] if last else "nothing",
        )  # fmt: skip
        return False
    if config.checkpoints_total_limit is not None:
        for old in checkpoints(output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)
    return True


def write_checkpoint(folder: Path, config: TrainConfig, state: TrainState) -> None:
    state.unet.save_pretrained(folder / "unet")
    if state.averages:
        with averaged_weights(state):
            state.unet.save_pretrained(folder / "unet_ema")
        save_variants(state, folder / "unet_ema")
    moments = state.optimizer.state_dict()["state"]
    save_file(
        {f"{i}.{name}": value.contiguous() for i, values in moments.items() for name, value in values.items()},
        folder / "optimizer.safetensors",
    )
    record = {
        "step": state.step,
        "seconds": state.seconds,
        "batch_size": state.batch_size,
        "num_processes": state.num_processes,
        "stream": state.stream,
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "settings": {name: getattr(config, name) for name in SETTINGS_OF_A_RUN},
    }
    (folder / STATE_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")


def seal(folder: Path) -> None:
    """Write down the checksum of each file of a folder, and wait until all of it is on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
    for path in [*files, folder / CHECKSUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, or not as it was written. None if it is whole."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in checksums.items():
            if checksum(folder / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def keep_batch_size(path: Path, config: TrainConfig, num_processes: int) -> None:
    """
    Have as many images in a step as in those before a checkpoint, on whatever number of processes: the batches are
    accumulated until there are. Raises UserError if there cannot be so many.
    """
    record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
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
            accumulation, config.gradient_accumulation_steps, batch_size,
        )  # fmt: skip
        config.gradient_accumulation_steps = accumulation
    if num_processes != before:
        logger.warning(
            "Going on with %d processes instead of %d: with the same images and noise in each step, but their sums are "
            "rounded otherwise, and what the network drops out is drawn anew.", num_processes, before,
        )  # fmt: skip


def load_checkpoint(path: Path, config: TrainConfig, state: TrainState) -> None:
    """Put everything back as `save_checkpoint` found it. Raises UserError if the checkpoint is of another network."""
    record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    changed = {name: old for name, old in record["settings"].items() if getattr(config, name) != old}
    if changed:
        listed = ", ".join(f"{name} {old} -> {getattr(config, name)}" for name, old in changed.items())
        logger.warning("%s was written with other settings: %s. The run will not be the same.", path, listed)
    try:
        state.unet.load_state_dict(load_file(path / "unet" / "diffusion_pytorch_model.safetensors"))
        for index, average in enumerate(state.averages):
            variant = f".{variant_of(average)}" if index else ""
            weights = load_file(path / "unet_ema" / f"diffusion_pytorch_model{variant}.safetensors")
            average.shadow_params = [weights[name].to(p.device) for name, p in state.unet.named_parameters()]
            average.optimization_step = record["step"]
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} does not hold the weights of this model and run: {error}") from error
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})
    state.lr_scheduler.load_state_dict(record["lr_scheduler"])
    for group, learning_rate in zip(state.optimizer.param_groups, state.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate
    if state.scaler is not None:
        state.scaler.load_state_dict(record["scaler"])
    state.step, state.seconds, state.stream = record["step"], record["seconds"], record.get("stream")
