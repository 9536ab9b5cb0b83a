"""The training loop: batches, steps, logs, checkpoints, samples. What a step learns is its caller's business."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DynamoBackend, ProjectConfiguration, gather_object, parse_flag_from_env
from checkpoint import (
    TrainState,
    averaged_weights,
    check_disk,
    checkpoints,
    keep_batch_size,
    load_checkpoint,
    prepare_output_dir,
    save_checkpoint,
)
from config import CONFIGS, TrainConfig, UserError
from data import (
    MIN_SEEN,
    UNLABELLED,
    CachedImages,
    StreamedImages,
    check_unreadable,
    keep_batch,
    name_dead_worker,
    num_images,
    warn_of_unreadable,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import is_xformers_available
from grid import sample_grid
from model import noise_process
from preemption import Preempted, Preemption, leave_signals_to_the_parent
from randomness import Draws, GlobalBatchSampler, seed_of, seeded_generator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline, LogSNRScheduler

logger = logging.getLogger(__name__)

# The loss is also logged for each of so many intervals of the log-SNR λ, each drawn as often as another in training.
NOISE_LEVELS = 8

# (network, the training input of a batch, its class_labels, draws) -> loss of each sample
Loss = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Draws], torch.Tensor]


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    dataset: Dataset,
    pipeline: CFGPipeline,
    loss_of: Loss,
    checkpoint: Path | None,
    preemption: Preemption,
    after_checkpoint: Callable[[TrainState], None] | None = None,
    evaluate: Callable[[CFGPipeline], dict[str, float]] | None = None,
    probe_labels: bool = True,
) -> TrainState:
    """
    Minimise the mean of `loss_of` over the data, from a checkpoint on, and leave the pipeline with the (first) average
    of the weights. It has that too when `after_checkpoint` is called on the main process, and `evaluate` on all. With
    `probe_labels` it is seen whether right labels lower the loss.

    Raises:
        Preempted: the run was asked to stop; there is a checkpoint of the step that it reached.
        FloatingPointError: too many steps in a row had a loss or a gradient that is not finite.
    """
    if checkpoint is not None:
        keep_batch_size(checkpoint, config, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    available = num_images(dataset)
    batch_size, total_steps = length_of_run(config, accelerator, available)
    stream = dataset if isinstance(dataset, StreamedImages) else None
    check_disk(config, pipeline.unet, total_steps)
    pipeline.to(accelerator.device)
    state = make_state(config, pipeline.unet, total_steps, batch_size, accelerator.num_processes)
    model, state.optimizer = accelerator.prepare(state.unet, state.optimizer)
    state.scaler = accelerator.scaler
    if stream is not None:
        stream.divide(accelerator.process_index, accelerator.num_processes)
    if checkpoint is not None:
        load_checkpoint(checkpoint, config, state)
        if stream is not None and state.stream is not None:
            stream.load_state_dict(state.stream)
        logger.info("Resumed from %s", checkpoint)
    steps = accelerator.gather(torch.tensor([state.step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"The processes would go on from different steps, {steps}: --output_dir {config.output_dir} has to be a "
            "folder that all machines share."
        )
    if accelerator.is_main_process:
        prepare_output_dir(config)
    started = time.perf_counter() - state.seconds
    log = Log(config, accelerator, state.step, total_steps, batch_size, noise_process(pipeline))
    epochs = f" ({total_steps * batch_size / available:.1f} epochs)" if available is not None else ""
    logger.info(
        "%s images, %d classes, %.1f M parameters, %d steps of %d images%s on %d × %s",
        available or "Streamed", state.unet.num_classes, state.unet.num_parameters() / 1e6,
        total_steps, batch_size, epochs, accelerator.num_processes, accelerator.device.type,
    )  # fmt: skip

    def note_place() -> None:
        """Have the main process know how far all of them are in the data. Called by all of them."""
        if stream is not None:
            state.stream = stream.state_dict(gather_object([stream.reached]))

    def save() -> None:
        if accelerator.is_main_process:
            saved = save_checkpoint(config, state)
            if saved and after_checkpoint is not None and state.step < total_steps:
                with averaged_weights(state):
                    after_checkpoint(state)

    def look(draw: bool, measure: bool) -> None:
        """Samples and figures of the run as it is. They can wait, where the run is asked to stop."""
        note_place()
        with averaged_weights(state), preemption.interruptible():
            if draw:
                save_samples(config, accelerator, pipeline, state.step)
            if draw and probe_labels:
                probe = dataset if stream is None else stream.probe
                accelerator.log({"label_gain": label_gain(config, probe, state.unet, loss_of)}, step=state.step)
            if measure and evaluate is not None:
                accelerator.log(evaluate(pipeline), step=state.step)

    any_process_stops = make_vote(config, accelerator)
    preemption.running, saved_step = True, state.step
    try:
        for step in step_batches(config, accelerator, dataset, state.unet, range(state.step, total_steps), log):
            for x, class_labels, draws in step:
                with accelerator.accumulate(model):
                    losses = loss_of(model, x, class_labels, draws)
                    accelerator.backward(losses.mean())
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                        skip_if_not_finite(state, grad_norm)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                log.batch(losses.detach(), class_labels, draws)
            state.lr_scheduler.step()
            for average in state.averages:
                average.step(state.unet.parameters())
            state.step += 1

            state.seconds = time.perf_counter() - started
            log.step(state.step, grad_norm, state.lr_scheduler.get_last_lr()[0])
            last = state.step == total_steps
            if due(config.checkpointing_steps, state.step) or (config.checkpointing_steps and last):
                note_place()
                save()
                saved_step = state.step
                accelerator.wait_for_everyone()
            draw, measure = due(config.validation_steps, state.step), due(config.eval_steps, state.step)
            if any_process_stops(preemption.requested, at_once=draw or measure or last):
                note_place()
                raise Preempted
            if (draw or measure) and not last:
                look(draw, measure)
        look(draw=True, measure=True)
    except Preempted:
        if state.step > saved_step:
            save()
        log.close()
        raise
    except RuntimeError as error:  # torch says so wherever the main process is
        name_dead_worker(dataset, error)
        raise

    log.close()
    if state.averages:
        state.averages[0].copy_to(state.unet.parameters())
    state.unet.eval()
    return state


def length_of_run(config: TrainConfig, accelerator: Accelerator, available: int | None) -> tuple[int, int]:
    """
    Images in a step, on all processes and accumulated, and steps. Raises UserError if so many images are too few, or
    nobody knows how many there are.
    """
    batch_size = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    if available is None and config.max_train_steps is None:
        raise UserError("The data set does not say how many images it has, so --max_train_steps is needed.")
    if available is not None and available < batch_size:
        raise UserError(
            f"There are {available} images, but a step takes {batch_size} ({config.train_batch_size} on each of "
            f"{accelerator.num_processes} processes, {config.gradient_accumulation_steps} times): lower "
            "--train_batch_size."
        )
    return batch_size, config.max_train_steps or config.num_train_epochs * available // batch_size


@torch.no_grad()
def label_gain(config: TrainConfig, dataset: Dataset, unet: torch.nn.Module, loss_of: Loss, n: int = 256) -> float:
    """
    How much better the network predicts with the right labels than with wrong ones, in standard errors of the mean over
    up to n images. Warns below 3: such a network ignores its labels, and guidance has nothing to work with.
    """
    device, num_classes = unet.device, unet.num_classes
    generator = seeded_generator("cpu", config.seed, "label gain")
    labelled = (dataset.class_labels != UNLABELLED).nonzero().flatten()
    chosen = labelled[torch.randperm(len(labelled), generator=generator)[:n]]
    batch = dataset.__getitems__(chosen.tolist())
    x, right = batch.training_input(device), batch.class_labels
    wrong = (right + torch.randint(1, num_classes, right.shape, generator=generator)) % num_classes
    draws = Draws.of_step(config.seed, -1, (len(chosen), *sample_shape(unet)), device)
    draws.dropout.fill_(1.0)  # no label is dropped
    gain = torch.zeros(len(chosen), device=device)
    for rows in torch.arange(len(chosen)).split(config.train_batch_size):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        losses = [loss_of(unet, x[part], labels[part].to(device), draws[part]) for labels in (wrong, right)]
        gain[part] = losses[0] - losses[1]
    standard_errors = (gain.mean() / (gain.std() / len(chosen) ** 0.5)).item()
    if standard_errors < 3:
        logger.warning(
            "The network does not predict better with the right labels than with wrong ones (by %.1f standard errors). "
            "Early in a run that is normal; later check that --label_column is what the images show.",
            standard_errors,
        )
    return standard_errors


def sample_shape(unet: torch.nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of what the UNet sees."""
    return (unet.config.in_channels, *np.broadcast_to(unet.config.sample_size, 2).tolist())


def due(every: int, step: int) -> bool:
    """Whether something that is done every so many steps (0 for never) is to be done at this one."""
    return every > 0 and step % every == 0


def make_vote(config: TrainConfig, accelerator: Accelerator) -> Callable[[bool, bool], bool]:
    """
    A function that says whether any of the processes says yes: at once, or else to the question of the call before, so
    that nobody waits. It speaks between the machines' CPUs, so that nobody waits for a GPU either.
    """
    if accelerator.num_processes == 1:
        return lambda vote, at_once: vote
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=config.ddp_timeout))
    under_way = []

    def any_process(vote: bool, at_once: bool) -> bool:
        votes = torch.tensor(int(vote))
        under_way.append((votes, torch.distributed.all_reduce(votes, group=group, async_op=True)))
        asked = [under_way.pop(0) for _ in range(len(under_way) - (not at_once))]
        for _, work in asked:
            work.wait()
        return any(votes.item() for votes, _ in asked)

    return any_process


def skip_if_not_finite(state: TrainState, grad_norm: torch.Tensor) -> None:
    """
    Have the optimizer leave the weights and its moments as they are if the gradient is not finite, without waiting for
    the device to say so. The gradient is the mean of all processes', so they all decide alike.
    """
    if state.scaler is None:  # which does the same, in fp16
        optimizer = getattr(state.optimizer, "optimizer", state.optimizer)
        optimizer.found_inf = (~torch.isfinite(grad_norm)).float()


def make_accelerator(config: TrainConfig) -> Accelerator:
    """
    The processes and the device that `accelerate launch` gave. Raises UserError for a tracker that is missing, and for
    what cuts the network into pieces.
    """
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise UserError(
                f"`accelerate launch` was told --use_{kind.lower()}, but checkpoints, averages and samples need each "
                "process to have the whole network. Use DDP, such as --config_file "
                f"{CONFIGS / 'accelerate' / 'ddp.yaml'}; it needs some 20 bytes for each parameter."
            )
    # Unless it is told that there is no GPU, accelerate takes several processes without one for several runs.
    cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=config.ddp_timeout))
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
        # It compiles a wrapper: the network that is sampled and saved stays as it is.
        dynamo_backend="inductor" if config.compile else None,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        import torch._inductor.config as inductor

        # With it torch 2.13 loses, on a CPU at least and without a word, the gradient of all that lies before an
        # upsampling: most of the network would not learn.
        inductor.layout_optimization = False
    if config.report_to != "none" and not accelerator.log_with:
        raise UserError(f"--report_to {config.report_to}: that tracker is not installed. Install it, or say none.")
    return accelerator


def available_cpus() -> int:
    """The processors that this process may use (all of them, where the system does not say)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_state(
    config: TrainConfig, unet: torch.nn.Module, total_steps: int, batch_size: int, num_processes: int
) -> TrainState:
    """The network ready to train, its average, the optimizer and the learning rate, before the first step."""
    unet.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        if not (is_xformers_available() and torch.cuda.is_available()):
            raise UserError(
                '--enable_xformers_memory_efficient_attention needs a GPU and xformers (pip install -e ".[xformers]"); '
                "leave it out to use torch's own attention."
            )
        unet.enable_xformers_memory_efficient_attention()
    averages = [
        EMAModel(
            unet.parameters(),
            decay=decay,
            use_ema_warmup=True,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
            foreach=True,
        )
        for decay in config.ema_decays
    ]
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
    return TrainState(unet, averages, optimizer, lr_scheduler, batch_size, num_processes)


def step_batches(
    config: TrainConfig,
    accelerator: Accelerator,
    dataset: Dataset,
    unet: torch.nn.Module,
    steps: range,
    log: "Log",
) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor, Draws]]]:
    """
    For each step the batches of this process: their training input, flipped where that was drawn; their labels; and
    their share of the global batch's random numbers. All on the device.
    """
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    streamed = isinstance(dataset, StreamedImages)
    if streamed:
        order = {"batch_size": None}
    else:
        sampler = GlobalBatchSampler(len(dataset), batch_size, config.seed, steps, rank, world_size, accumulation)
        order = {"batch_sampler": sampler}
    loader = DataLoader(
        dataset,
        **order,
        collate_fn=keep_batch,
        num_workers=0 if isinstance(dataset, CachedImages) else config.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=device.type == "cuda",
    )
    batches, unreadable, seen = iter(loader), set(), 0

    def one_step(step: int):
        nonlocal seen
        draws = Draws.of_step(config.seed, step, (accumulation * world_size * batch_size, *sample_shape(unet)), device)
        for micro_step in range(accumulation):
            first = (micro_step * world_size + rank) * batch_size
            asked = time.perf_counter()
            rows, batch = draws[first : first + batch_size], next(batches)
            log.data_wait += time.perf_counter() - asked
            if streamed:
                dataset.used(batch)
            seen += batch_size + len(batch.unreadable)
            if batch.unreadable:
                unreadable.update(batch.unreadable)
                if seen >= MIN_SEEN or not streamed:
                    among = seen if streamed else len(dataset)
                    check_unreadable(unreadable, among, config.max_unreadable_fraction)
            x = batch.training_input(device, rows.flip if config.random_flip else None)
            # What the network itself draws, its dropout, comes from torch's own generator.
            torch.manual_seed(seed_of(config.seed, "network", step, micro_step, rank))
            yield x, batch.class_labels.to(device, non_blocking=True), rows

    yield from map(one_step, steps)
    warn_of_unreadable(unreadable)


class Log:
    """
    The progress bar, and the trackers every `logging_steps`: the loss, also by noise level and of conditional and null
    class apart, and what else tells whether a run is well. Numbers are read off the device only when they are logged.
    Raises FloatingPointError if too many steps in a row were skipped.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        first_step: int,
        total_steps: int,
        batch_size: int,
        scheduler: LogSNRScheduler,
    ):
        self.config, self.accelerator, self.batch_size, self.scheduler = config, accelerator, batch_size, scheduler
        self.total_steps, self.since, self.then = total_steps, first_step, time.perf_counter()
        self.data_wait = 0.0  # seconds
        device = accelerator.device
        # by noise level and whether the label was dropped
        self.loss, self.count = torch.zeros(2, NOISE_LEVELS, 2, device=device)
        self.grad_norm, self.skipped, self.skipped_in_a_row = torch.zeros(3, device=device)
        # TensorBoard accepts no lists, and no None.
        settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.public().items()}
        accelerator.init_trackers("train_cfg", settings)
        self.progress = tqdm(
            total=total_steps,
            initial=first_step,
            desc="Training",
            unit="step",
            disable=None if accelerator.is_main_process else True,  # None: if the output is no terminal
        )

    def batch(self, losses: torch.Tensor, class_labels: torch.Tensor, draws: Draws) -> None:
        """Take note of the loss of each sample of a batch."""
        noise_level = (draws.u * NOISE_LEVELS).long().clamp(max=NOISE_LEVELS - 1)
        is_null = (draws.dropout < self.config.conditioning_dropout_prob) | (class_labels == UNLABELLED)
        finite = torch.isfinite(losses)
        index = (noise_level, is_null.long())
        self.loss.index_put_(index, torch.where(finite, losses, 0.0), accumulate=True)
        self.count.index_put_(index, finite.float(), accumulate=True)

    def step(self, step: int, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """Take note of a step."""
        finite = torch.isfinite(grad_norm)
        self.grad_norm += torch.where(finite, grad_norm, 0.0)
        self.skipped += ~finite
        self.skipped_in_a_row = torch.where(finite, 0.0, self.skipped_in_a_row + 1)
        self.progress.update()
        if due(self.config.logging_steps, step) or step == self.total_steps:
            self._write(step, learning_rate)

    def _write(self, step: int, learning_rate: float) -> None:
        loss, count = self.accelerator.reduce(torch.stack([self.loss, self.count]), reduction="sum").cpu()
        norm, skipped, in_a_row = torch.stack([self.grad_norm, self.skipped, self.skipped_in_a_row]).tolist()
        steps, now = step - self.since, time.perf_counter()
        if in_a_row >= self.config.max_nonfinite_steps:
            existing = [path.name for path in checkpoints(Path(self.config.output_dir))]
            raise FloatingPointError(
                f"The loss or its gradient was not finite in the last {in_a_row:.0f} steps, up to step {step}. Lower "
                f"--learning_rate (now {self.config.learning_rate}), and go on from the last good checkpoint with "
                f"--resume_from_checkpoint {existing[-1] if existing else '(there is none yet)'}."
            )
        values = {
            "loss": (loss.sum() / count.sum()).item(),
            "lr": learning_rate,
            "grad_norm": norm / max(1.0, steps - skipped),
            "images_per_second": steps * self.batch_size / (now - self.then),
            "data_wait": self.data_wait / (now - self.then),
            "dropout_rate": (count[:, 1].sum() / count.sum()).item(),
            "skipped_steps": skipped,
        }
        by_kind = dict(zip(("conditional", "null"), zip(loss.sum(0), count.sum(0), strict=True), strict=True))
        edges = self.scheduler.log_snr(torch.linspace(0, 1, NOISE_LEVELS + 1, dtype=torch.float64))
        edges = (edges.round(decimals=1) + 0.0).tolist()  # no negative zero
        by_level = {
            f"log_snr_{low}_to_{high}": pair
            for (high, low), *pair in zip(pairwise(edges), loss.sum(1), count.sum(1), strict=True)
        }
        for name, (total, number) in {**by_kind, **by_level}.items():
            if number > 0:
                values[f"loss/{name}"] = (total / number).item()
        left = timedelta(seconds=round((self.total_steps - step) * (now - self.then) / steps))
        if self.progress.disable:
            logger.info(
                "step %d of %d, loss %.4f, %.0f images/s, %s left",
                step, self.total_steps, values["loss"], values["images_per_second"], left,
            )  # fmt: skip
        for sums in (self.loss, self.count, self.grad_norm, self.skipped):
            sums.zero_()
        self.since, self.then, self.data_wait = step, now, 0.0
        self.progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.0f}")
        self.accelerator.log(values, step=step)
        if skipped:
            logger.warning("%.0f of the last %d steps were skipped: their gradient was not finite.", skipped, steps)

    def close(self) -> None:
        self.progress.close()


def save_samples(config: TrainConfig, accelerator: Accelerator, pipeline: CFGPipeline, step: int) -> None:
    """Draw the grid of samples, and give it to the output folder and to the trackers."""
    logger.info("Drawing samples at step %d", step)
    quiet = None if accelerator.is_local_main_process else True
    pipeline.set_progress_bar_config(desc="Sampling", leave=False, disable=quiet)
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
