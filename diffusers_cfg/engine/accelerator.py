"""Set up Accelerate: processes, device, precision and trackers."""

import atexit
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DynamoBackend, LoggerType, ProjectConfiguration, parse_flag_from_env

from diffusers_cfg.config import UserError
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)


def make_accelerator(config: TrainConfig | None = None) -> Accelerator:
    """
    Return the processes and the device that `accelerate launch` gave.

    Args:
        config (`TrainConfig`, *optional*): of a training; without it there are no trackers, for sampling.

    Raises:
        UserError: a tracker is not installed, or the launcher is to shard the network.
    """
    config = config or TrainConfig(report_to="none")
    refuse_sharding()
    # Without `cpu=True`, accelerate treats several CPU processes as independent runs.
    cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=config.ddp_timeout))
    # And not at the end of a run: the group cannot be built again in the same processes, which may have another run.
    atexit.unregister(destroy_process_group)
    atexit.register(destroy_process_group)
    configure_logging(state.is_main_process)

    mixed_precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if cpu:
        if mixed_precision != "no":
            logger.warning("Training in fp32: on a CPU %s is many times slower.", mixed_precision)
        mixed_precision = "no"
        # `accelerate launch` leaves one thread to a process unless it is told that there is no GPU.
        torch.set_num_threads(max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    try:
        log_with = None if config.report_to == "none" else LoggerType(config.report_to)
    except ValueError as error:
        trackers = ", ".join(LoggerType.list())
        raise UserError(f"--report_to {config.report_to!r} is no tracker: it can be {trackers}, or none.") from error
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        # It compiles a wrapper: the network that is sampled and saved stays as it is.
        dynamo_backend="inductor" if config.compile else None,
        log_with=log_with,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        # With it torch 2.13 silently loses, on a CPU at least, the gradient of all that lies before an upsampling:
        # most of the network would not learn. (torch imports its compiler when this attribute is first read.)
        torch._inductor.config.layout_optimization = False
    if config.report_to != "none" and not accelerator.log_with:
        raise UserError(
            f"--report_to {config.report_to}: that tracker is not installed. Install it, or set it to none."
        )
    return accelerator


def destroy_process_group() -> None:
    """Leave the group of processes, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def refuse_sharding() -> None:
    """Raise UserError if the launcher is to shard the network."""
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise UserError(
                f"`accelerate launch` was told --use_{kind.lower()}, but checkpoints, averages and samples need each "
                "process to have the whole network. Use DDP, such as --config_file "
                "training/configs/accelerate/ddp.yaml; it needs some 20 bytes for each parameter."
            )


def configure_logging(is_main_process: bool) -> None:
    """Log warnings and progress on the main process, errors on the others."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO if is_main_process else logging.ERROR)
    for noisy in ("httpx", "datasets", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def available_cpus() -> int:
    """Return the number of processors that this process may use (all of them, where the system does not say)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_vote(accelerator: Accelerator, timeout_s: int) -> Callable[[bool, bool], bool]:
    """
    Return a function `(vote, at_once) -> bool` that all-reduces a boolean (or) over all ranks. With `at_once=False` it
    returns the result of the *previous* call, so that the reduction overlaps with the step. It uses a gloo group, which
    does not synchronize the GPU.
    """
    if accelerator.num_processes == 1:
        return lambda vote, at_once: vote
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    pending = []

    def any_process(vote: bool, at_once: bool) -> bool:
        votes = torch.tensor(int(vote))
        pending.append((votes, torch.distributed.all_reduce(votes, group=group, async_op=True)))
        finished = [pending.pop(0) for _ in range(len(pending) - (not at_once))]
        for _, work in finished:
            work.wait()
        return any(votes.item() for votes, _ in finished)

    return any_process
