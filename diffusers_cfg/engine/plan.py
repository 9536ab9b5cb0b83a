"""Compute the length of a run, and the disk space and memory that it needs."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import CachedImages, num_images
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.data.naming import local_name
from diffusers_cfg.engine.checkpoint import Checkpoint
from diffusers_cfg.engine.method import Method
from diffusers_cfg.engine.muon import split_parameters
from diffusers_cfg.engine.posthoc_ema import SIGMA_RELS, snapshot_steps
from diffusers_cfg.model_files import snapshots
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# Profiles of lengths between 0.03 and 0.2 have an error of at most 5 % with 15 snapshots, and of about 10 % with 8.
MIN_SNAPSHOTS, GOOD_SNAPSHOTS = 8, 15


@dataclass(frozen=True)
class Plan:
    """
    The length of a run.

    Args:
        num_images (`int`, *optional*): number of images in the dataset, if known.
        batch_size (`int`): number of images in a step, over all processes and accumulated batches.
        accumulation (`int`): number of batches per process and step.
        total_steps (`int`): number of steps of the run.
    """

    num_images: int | None
    batch_size: int
    accumulation: int
    total_steps: int

    @property
    def epochs(self) -> str:
        """The length in epochs as text, or an empty string if the number of images is unknown."""
        return "" if self.num_images is None else f"{self.total_steps * self.batch_size / self.num_images:.1f} epochs"


def make_plan(config: TrainConfig, num_processes: int, accumulation: int, dataset: Dataset) -> Plan:
    """
    Return the length of a run. Warn if the warmup is longer, or the snapshots of the post-hoc EMA are too few.

    Raises:
        UserError: if a step has more images than the dataset, or the length depends on an unknown number of images.
    """
    available = num_images(dataset)
    batch_size = config.train_batch_size * num_processes * accumulation
    if available is not None and available < batch_size:
        raise UserError(
            f"The dataset has {available} images, but a step needs {batch_size} ({config.train_batch_size} on each of "
            f"{num_processes} processes, {accumulation} times). Lower --train_batch_size."
        )
    total_steps = config.max_train_steps
    if total_steps is None:
        if available is None:
            raise UserError("The dataset does not report its number of images. Pass --max_train_steps.")
        total_steps = config.num_train_epochs * available // batch_size
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        logger.warning("--lr_scheduler constant has no warmup. For one, use constant_with_warmup.")
    elif config.lr_warmup_steps >= total_steps:
        logger.warning(
            "--lr_warmup_steps is %d, but the run has only %d steps, so it ends before the learning rate reaches "
            "--learning_rate. Lower --lr_warmup_steps.",
            config.lr_warmup_steps,
            total_steps,
        )
    saved = len(snapshot_steps(config.posthoc_ema_steps, total_steps))
    if 0 < saved < MIN_SNAPSHOTS:
        logger.warning(
            "--posthoc_ema_steps %d saves %d snapshots in %d steps, too few to reconstruct averages of other lengths "
            "than %s well. Use at most %d.",
            config.posthoc_ema_steps,
            saved,
            total_steps,
            " and ".join(map(str, SIGMA_RELS)),
            max(1, total_steps // GOOD_SNAPSHOTS),
        )
    return Plan(available, batch_size, accumulation, total_steps)


def format_size(size: float) -> str:
    """Format a number of bytes as GiB, or as MiB if it is small."""
    return f"{size / 1024**3:.2f} GiB" if size >= 1024**3 / 10 else f"{size / 1024**2:.2f} MiB"


def num_parameters(method: Method, averaged: bool = False) -> int:
    """Return the number of parameters of all modules, or of the averaged modules only."""
    names = method.averaged if averaged else method.modules
    return sum(parameter.numel() for name in names for parameter in method.modules[name].parameters())


def checkpoint_bytes(config: TrainConfig, method: Method) -> int:
    """Return the size of a checkpoint in bytes: the weights, the moments of the optimizer and all averages."""
    weights, averages = num_parameters(method), len(config.ema_decays) * num_parameters(method, averaged=True)
    moments = 2 * weights
    if config.optimizer == "muon":  # It has one moment, Adam has two.
        moments -= sum(matrix.numel() for matrix in split_parameters(method.modules.values())[0])
    return 4 * (weights + moments + averages) + snapshot_bytes(config, method)


def snapshot_bytes(config: TrainConfig, method: Method) -> int:
    """Return the size in bytes of a snapshot of the post-hoc EMA; 0 if none are saved."""
    return 4 * len(SIGMA_RELS) * num_parameters(method, averaged=True) if config.posthoc_ema_steps else 0


def checkpoints_at_once(config: TrainConfig, total_steps: int) -> int:
    """Return the maximum number of checkpoints on the disk at a time, including the one being written."""
    if not config.checkpointing_steps:
        return 0
    number = -(-total_steps // config.checkpointing_steps)
    return number if config.checkpoints_total_limit is None else min(number, config.checkpoints_total_limit + 1)


def free_bytes(config: TrainConfig) -> int:
    """Return the free space in bytes on the disk of the output folder. The folder need not exist."""
    folder = Path(config.output_dir).resolve()
    return shutil.disk_usage(next(path for path in [folder, *folder.parents] if path.exists())).free


def check_disk(config: TrainConfig, method: Method, total_steps: int) -> None:
    """
    Warn if the disk is too small for all checkpoints. Raise UserError if it is too small for the first two, and for the
    snapshots of the post-hoc EMA that are not written yet, none of which is deleted.
    """
    size, number, free = checkpoint_bytes(config, method), checkpoints_at_once(config, total_steps), free_bytes(config)
    steps = {*snapshot_steps(config.posthoc_ema_steps, total_steps)} - {*snapshots(Path(config.output_dir))}
    of_snapshots = len(steps) * snapshot_bytes(config, method)
    if free >= number * size + of_snapshots:
        return
    snapshots_too = f" and {len(steps)} snapshots {format_size(of_snapshots)}" if steps else ""
    message = (
        f"The disk of --output_dir {config.output_dir} has {format_size(free)} free, but {number} checkpoints take "
        f"{format_size(number * size)}{snapshots_too}"
    )
    if free < min(number, 2) * size + of_snapshots:
        larger = " or raise --posthoc_ema_steps" if steps else ""
        raise UserError(f"{message}. Pass a folder on a larger disk{larger}.")
    logger.warning("%s. Lower --checkpoints_total_limit or raise --checkpointing_steps.", message)


def describe_plan(
    config: TrainConfig,
    accelerator: Accelerator,
    dataset: Dataset,
    method: Method,
    plan: Plan,
    images: LabelledImages,
    checkpoint: Checkpoint | None,
    repo_id: str | None,
) -> str:
    """Return the plan of a run as the text that `--dry_run` prints."""
    device = accelerator.device
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    # The weights, their gradient, the moments of the optimizer, and the averages, of which the main process has more.
    memory = 4 * num_parameters(method) + checkpoint_bytes(config, method)
    free = f", {format_size(torch.accelerator.get_memory_info(device)[0])} free" if device.type != "cpu" else ""
    number, size = checkpoints_at_once(config, plan.total_steps), checkpoint_bytes(config, method)
    steps = snapshot_steps(config.posthoc_ema_steps, plan.total_steps)
    of_snapshots = f"{len(steps)} snapshots of {format_size(snapshot_bytes(config, method))}, " if steps else ""
    lines = {
        "images": f"{plan.num_images or 'unknown'} of {len(images.present_classes)} classes of {local_name(config)}, "
        + (f"{images.num_held_out} held out, " if images.num_held_out else "")
        + ("decoded into memory" if isinstance(dataset, CachedImages) else "decoded lazily"),
        **{name: f"{count_parameters(module)} parameters" for name, module in method.modules.items()},
        "samples": "×".join(map(str, method.sample_shape)),
        "method": ", ".join(f"{name} {value}" for name, value in method.facts().items() if value is not None),
        "steps": f"{plan.total_steps} of {plan.batch_size} images" + (f": {plan.epochs}" if plan.epochs else ""),
        "a step": f"{accelerator.num_processes} × {device.type} × {plan.accumulation} batches of "
        f"{config.train_batch_size}, {precision}",
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler}, {config.lr_warmup_steps} warmup steps",
        "memory": f"{format_size(memory)} on each device, plus the activations of a batch{free}",
        "disk": f"{number} checkpoints of {format_size(size)}, {of_snapshots}{format_size(free_bytes(config))} free",
        "output": f"{config.output_dir}, from {checkpoint.path.name if checkpoint else 'the first step'}",
        "tracker": config.report_to,
        "repository": repo_id or "none",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items())


def count_parameters(module: torch.nn.Module) -> str:
    """Format the number of parameters of a module in millions."""
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"
