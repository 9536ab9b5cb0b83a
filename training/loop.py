"""The training loop: batches, steps, logs, checkpoints, samples. What a step learns is its caller's business."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration
from checkpoint import TrainState, averaged_weights, load_checkpoint, prepare_output_dir, save_checkpoint
from config import TrainConfig, UserError
from data import CachedImages, check_unreadable, keep_batch, to_float
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from grid import sample_grid
from randomness import Draws, GlobalBatchSampler, seed_of
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline

logger = logging.getLogger(__name__)

# (network, images in [-1, 1], class_labels, draws) -> loss of each sample
Loss = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Draws], torch.Tensor]


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    dataset: Dataset,
    pipeline: CFGPipeline,
    loss_of: Loss,
    checkpoint: Path | None,
    after_checkpoint: Callable[[TrainState], None] | None = None,
    evaluate: Callable[[CFGPipeline], dict[str, float]] | None = None,
) -> TrainState:
    """
    Minimise the mean of `loss_of` over the data, from a checkpoint on, and leave the pipeline with the weights.
    While it has the averaged weights, `after_checkpoint` is called on the main process, and `evaluate` on all of them.
    """
    batch_size = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    if len(dataset) < batch_size:
        raise UserError(
            f"There are {len(dataset)} images, but a step takes {batch_size} ({config.train_batch_size} on each of "
            f"{accelerator.num_processes} processes, {config.gradient_accumulation_steps} times): lower "
            "--train_batch_size."
        )
    total_steps = config.max_train_steps or config.num_train_epochs * len(dataset) // batch_size
    pipeline.to(accelerator.device)
    state = make_state(config, pipeline.unet, total_steps)
    model, state.optimizer = accelerator.prepare(state.unet, state.optimizer)
    state.scaler = accelerator.scaler
    if checkpoint is not None:
        load_checkpoint(checkpoint, config, state)
        logger.info("Resumed from %s", checkpoint)
    if accelerator.is_main_process:
        prepare_output_dir(config)
    started = time.perf_counter() - state.seconds
    log = Log(config, accelerator, state.step, total_steps, batch_size)
    logger.info(
        "%d images, %d classes, %.1f M parameters, %d steps of %d images (%.1f epochs) on %d × %s",
        len(dataset), state.unet.num_classes, sum(p.numel() for p in state.unet.parameters()) / 1e6, total_steps,
        batch_size, total_steps * batch_size / len(dataset), accelerator.num_processes, accelerator.device.type,
    )  # fmt: skip

    for step in step_batches(config, accelerator, dataset, state.unet, range(state.step, total_steps)):
        step_loss = torch.zeros((), device=accelerator.device)
        for images, class_labels, draws in step:
            with accelerator.accumulate(model):
                loss = loss_of(model, images, class_labels, draws).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                state.optimizer.step()
                state.optimizer.zero_grad()
            step_loss += loss.detach() / config.gradient_accumulation_steps
        state.lr_scheduler.step()
        if state.ema is not None:
            state.ema.step(state.unet.parameters())
        state.step += 1

        state.seconds = time.perf_counter() - started
        last = state.step == total_steps
        log.step(state.step, step_loss, state.lr_scheduler.get_last_lr()[0])
        if config.checkpointing_steps and (last or state.step % config.checkpointing_steps == 0):
            if accelerator.is_main_process:
                save_checkpoint(config, state)
                if after_checkpoint is not None and not last:
                    with averaged_weights(state.unet, state.ema):
                        after_checkpoint(state)
            accelerator.wait_for_everyone()
        if last or (config.validation_steps and state.step % config.validation_steps == 0):
            with averaged_weights(state.unet, state.ema):
                save_samples(config, accelerator, pipeline, state.step)
        if evaluate is not None and (last or state.step % config.eval_steps == 0):
            with averaged_weights(state.unet, state.ema):
                accelerator.log(evaluate(pipeline), step=state.step)

    log.close()
    if state.ema is not None:
        state.ema.copy_to(state.unet.parameters())
    state.unet.eval()
    return state


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The processes and the device that `accelerate launch` gave. Raises UserError for a tracker that is missing."""
    # Unless it is told that there is no GPU, accelerate takes several processes without one for several runs.
    cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    logging.basicConfig(
        format="%(levelname)s %(message)s", level=logging.INFO if state.is_main_process else logging.ERROR
    )
    for chatty in ("httpx", "datasets", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    mixed_precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if cpu:
        if mixed_precision != "no":
            logger.warning("Training in fp32: on a CPU %s is many times slower.", mixed_precision)
        mixed_precision = "no"
        # `accelerate launch` leaves one thread to a process unless it is told that there is no GPU.
        torch.set_num_threads(max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )
    if config.report_to != "none" and not accelerator.log_with:
        raise UserError(f"--report_to {config.report_to}: that tracker is not installed. Install it, or say none.")
    return accelerator


def available_cpus() -> int:
    """The processors that this process may use (all of them, where the system does not say)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_state(config: TrainConfig, unet: torch.nn.Module, total_steps: int) -> TrainState:
    """The network ready to train, its average, the optimizer and the learning rate, before the first step."""
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
    # accelerate is not to prepare it: it would step it once for each process.
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
    )
    return TrainState(unet, ema, optimizer, lr_scheduler)


def step_batches(
    config: TrainConfig, accelerator: Accelerator, dataset: Dataset, unet: torch.nn.Module, steps: range
) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor, Draws]]]:
    """
    For each step the batches of this process: images, float32 in [-1, 1], flipped if that was drawn; their labels; and
    their share of the global batch's random numbers. All on the device.
    """
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    loader = DataLoader(
        dataset,
        batch_sampler=GlobalBatchSampler(len(dataset), batch_size, config.seed, steps, rank, world_size, accumulation),
        collate_fn=keep_batch,
        num_workers=0 if isinstance(dataset, CachedImages) else config.dataloader_num_workers,
        pin_memory=device.type == "cuda",
    )
    sample_shape = (unet.config.in_channels, *np.broadcast_to(unet.config.sample_size, 2).tolist())
    batches, unreadable = iter(loader), set()

    def one_step(step: int):
        draws = Draws.of_step(config.seed, step, (accumulation * world_size * batch_size, *sample_shape), device)
        for micro_step in range(accumulation):
            first = (micro_step * world_size + rank) * batch_size
            rows, batch = draws[first : first + batch_size], next(batches)
            if batch.unreadable:
                unreadable.update(batch.unreadable)
                check_unreadable(unreadable, len(dataset), config.max_unreadable_fraction)
            images = to_float(batch.images.to(device, non_blocking=True))
            if config.random_flip:
                images = torch.where(rows.flip.view(-1, 1, 1, 1), images.flip(-1), images)
            # What the network itself draws, its dropout, comes from torch's own generator.
            torch.manual_seed(seed_of(config.seed, "network", step, micro_step, rank))
            yield images, batch.class_labels.to(device, non_blocking=True), rows

    yield from map(one_step, steps)
    if unreadable:
        logger.warning("%d images could not be read: %s", len(unreadable), ", ".join(sorted(unreadable)[:20]))


class Log:
    """The progress bar, and the trackers every `logging_steps`. Raises FloatingPointError if the loss goes wrong."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, first_step: int, total_steps: int, batch_size: int
    ):
        self.config, self.accelerator, self.batch_size = config, accelerator, batch_size
        self.total_steps, self.since, self.then = total_steps, first_step, time.perf_counter()
        self.loss = torch.zeros((), device=accelerator.device)
        # TensorBoard accepts no lists, and no None.
        settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.public().items()}
        accelerator.init_trackers("train_cfg", settings)
        self.progress = tqdm(
            total=total_steps,
            initial=first_step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_main_process,
        )

    def step(self, step: int, loss: torch.Tensor, learning_rate: float) -> None:
        """Take note of a step. The loss is read off the device only when it is logged."""
        self.loss += loss
        self.progress.update()
        if step % self.config.logging_steps and step != self.total_steps:
            return
        steps, now = step - self.since, time.perf_counter()
        loss = self.accelerator.reduce(self.loss / steps, reduction="mean").item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss became {loss} by step {step}. Lower --learning_rate (now {self.config.learning_rate}), and "
                "go on from the last good checkpoint with --resume_from_checkpoint."
            )
        images_per_second = steps * self.batch_size / (now - self.then)
        self.loss.zero_()
        self.since, self.then = step, now
        self.progress.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{images_per_second:.0f}")
        self.accelerator.log({"loss": loss, "lr": learning_rate, "images_per_second": images_per_second}, step=step)

    def close(self) -> None:
        self.progress.close()


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
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [grid]}, step=step)
