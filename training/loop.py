"""The training loop: batches, steps, logs, checkpoints, samples. What a step learns is its caller's business."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from checkpoint import averaged_weights, find_checkpoint, load_checkpoint, prepare_output_dir, save_checkpoint
from config import TrainConfig, UserError
from data import Batch, check_unreadable, keep_batch, to_float
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from randomness import Draws, GlobalBatchSampler, seeded_generator
from samples import sample_grid
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline

logger = logging.getLogger(__name__)

# (unet, images in [-1, 1], class_labels, draws, generator) -> loss of each sample
Loss = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Draws, torch.Generator], torch.Tensor]


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The processes and the device that `accelerate launch` gave. Raises UserError for a tracker that is missing."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output_dir) / config.logging_dir)),
    )
    logging.basicConfig(
        format="%(levelname)s %(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR
    )
    for chatty in ("httpx", "datasets", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if config.report_to != "none" and not accelerator.log_with:
        raise UserError(f"--report_to {config.report_to}: that tracker is not installed. Install it, or say none.")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision != "no":
        logger.warning("Training in fp32: on a CPU %s is many times slower.", accelerator.mixed_precision)
        accelerator.state._mixed_precision = "no"
    if accelerator.device.type == "cpu":
        # `accelerate launch` leaves one thread to a process unless it is told that there is no GPU.
        torch.set_num_threads(max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def available_cpus() -> int:
    """The processors that this process may use (all of them, where the system does not say)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(
    config: TrainConfig, accelerator: Accelerator, dataset: Dataset, pipeline: CFGPipeline, loss_of: Loss
) -> None:
    """Minimise the mean of `loss_of` over the data, and leave the pipeline with the trained weights."""
    unet, device = pipeline.unet, accelerator.device
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    rank, world_size = accelerator.process_index, accelerator.num_processes
    global_batch_size = batch_size * world_size * accumulation
    if len(dataset) < global_batch_size:
        raise UserError(
            f"There are {len(dataset)} images, but a step takes {global_batch_size} ({batch_size} on each of "
            f"{world_size} processes, {accumulation} times): lower --train_batch_size."
        )
    total_steps = config.max_train_steps or config.num_train_epochs * len(dataset) // global_batch_size

    pipeline.to(device)
    unet.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    ema = None
    if config.use_ema:
        ema = EMAModel(
            unet.parameters(),
            decay=config.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
            foreach=True,
        )
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    # Not prepared by accelerate, which would step it once for each process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    state = (config, unet, ema, optimizer, lr_scheduler, accelerator.scaler)

    first_step = 0
    if (checkpoint := find_checkpoint(config)) is not None:
        first_step = load_checkpoint(checkpoint, *state)
        logger.info("Resumed from %s at step %d", checkpoint, first_step)
    if accelerator.is_main_process:
        prepare_output_dir(config)
    accelerator.init_trackers("train_cfg", {name: loggable(value) for name, value in asdict(config).items()})
    steps = range(first_step, total_steps)
    loader = DataLoader(
        dataset,
        batch_sampler=GlobalBatchSampler(len(dataset), batch_size, config.seed, steps, rank, world_size, accumulation),
        collate_fn=keep_batch,
        num_workers=config.dataloader_num_workers if not hasattr(dataset, "class_labels") else 0,
        pin_memory=device.type == "cuda",
    )
    logger.info(
        "%d images, %d classes, %.1f M parameters, %d steps of %d images (%.1f epochs) on %d × %s",
        len(dataset), pipeline.unet.num_classes, sum(p.numel() for p in unet.parameters()) / 1e6, total_steps,
        global_batch_size, total_steps * global_batch_size / len(dataset), world_size, device.type,
    )  # fmt: skip

    batches = iter(loader)
    unreadable: set[str] = set()
    losses, last_log = torch.zeros((), device=device), (first_step, time.perf_counter())
    sample_shape = (unet.config.in_channels, *np.broadcast_to(unet.config.sample_size, 2).tolist())
    progress = tqdm(
        total=total_steps, initial=first_step, desc="Training", unit="step", disable=not accelerator.is_main_process
    )
    for step in steps:
        draws = Draws.of_step(config.seed, step, (global_batch_size, *sample_shape), device)
        for micro_step in range(accumulation):
            first_row = (micro_step * world_size + rank) * batch_size
            rows = draws[first_row : first_row + batch_size]
            images, class_labels = next_batch(batches, rows, config, device, unreadable, len(dataset))
            generator = seeded_generator(device, config.seed, "encode", step, micro_step, rank)
            with accelerator.accumulate(model):
                loss = loss_of(model, images, class_labels, rows, generator).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses += loss.detach() / accumulation
        lr_scheduler.step()
        if ema is not None:
            ema.step(unet.parameters())
        progress.update()

        done = step + 1
        last = done == total_steps
        if last or done % config.logging_steps == 0:
            since, then = last_log
            last_log = (done, time.perf_counter())
            loss = accelerator.reduce(losses / (done - since), reduction="mean").item()
            losses.zero_()
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"The loss became {loss} by step {done}. Lower --learning_rate (now {config.learning_rate}), and "
                    "go on from the last good checkpoint with --resume_from_checkpoint."
                )
            images_per_second = (done - since) * global_batch_size / (last_log[1] - then)
            progress.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{images_per_second:.0f}")
            accelerator.log(
                {"loss": loss, "lr": lr_scheduler.get_last_lr()[0], "images_per_second": images_per_second}, step=done
            )
        if config.checkpointing_steps and (last or done % config.checkpointing_steps == 0):
            if accelerator.is_main_process:
                save_checkpoint(done, *state)
            accelerator.wait_for_everyone()
        if last or (config.validation_steps and done % config.validation_steps == 0):
            progress.clear()
            with averaged_weights(unet, ema):
                save_samples(config, accelerator, pipeline, done)
    progress.close()
    if unreadable:
        logger.warning("%d images could not be read: %s", len(unreadable), ", ".join(sorted(unreadable)[:20]))
    if ema is not None:
        ema.copy_to(unet.parameters())
    unet.eval()


def loggable(value: Any) -> int | float | str | bool:
    """A setting as TensorBoard accepts it."""
    return value if isinstance(value, (int, float, str, bool)) else str(value)


def next_batch(
    batches, draws: Draws, config: TrainConfig, device: torch.device, unreadable: set[str], num_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next images, float32 in [-1, 1] and flipped as drawn, and their labels, on the device."""
    batch: Batch = next(batches)
    if batch.unreadable:
        unreadable.update(batch.unreadable)
        check_unreadable(unreadable, num_images, config.max_unreadable_fraction)
    images = to_float(batch.images.to(device, non_blocking=True))
    if config.random_flip:
        images = torch.where(draws.flip.view(-1, 1, 1, 1), images.flip(-1), images)
    return images, batch.class_labels.to(device, non_blocking=True)


def save_samples(config: TrainConfig, accelerator: Accelerator, pipeline: CFGPipeline, step: int) -> None:
    """Draw the grid of samples, and give it to the output folder and to the trackers."""
    pipeline.set_progress_bar_config(desc="Sampling", leave=False, disable=not accelerator.is_local_main_process)
    grid = sample_grid(
        pipeline, accelerator, config.validation_guidance_scales, config.num_inference_steps, config.seed
    )
    if not accelerator.is_main_process:
        return
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"step-{step}.png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **TRACKER_IMAGES.get(tracker.name, {}))


# TensorBoard must be told the order of the axes.
TRACKER_IMAGES = {"tensorboard": {"dataformats": "NHWC"}}
