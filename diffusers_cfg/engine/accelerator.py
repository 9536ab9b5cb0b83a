"""Set up Accelerate: processes, device, precision and trackers."""

import atexit
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DynamoBackend, LoggerType, ProjectConfiguration, TorchDynamoPlugin, parse_flag_from_env

from diffusers_cfg.config import UserError
from diffusers_cfg.engine.processes import local_world_size, num_threads, threads_are_set
from diffusers_cfg.engine.tracking import tracker_names
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)


def make_accelerator(config: TrainConfig | None = None) -> Accelerator:
    """
    Return an `Accelerator` for the processes and the device of the launcher, and configure logging.

    Args:
        config (`TrainConfig`, *optional*): the settings of a training run, or the output folder and the trackers of an
            evaluation. By default there are no trackers, as for sampling.

    Raises:
        UserError: if a tracker is unknown or not installed, or the launcher would shard the network.
    """
    config = config or TrainConfig(report_to="none")
    refuse_sharding()
    # Without `cpu=True`, accelerate treats several CPU processes as independent runs.
    cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=config.ddp_timeout))
    # At exit and not at the end of a run: the same processes may start another run, and cannot recreate the group.
    atexit.unregister(destroy_process_group)
    atexit.register(destroy_process_group)
    configure_logging(state.is_main_process)

    mixed_precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if cpu:
        if mixed_precision != "no":
            logger.warning("Using fp32, because %s is many times slower on a CPU.", mixed_precision)
        mixed_precision = "no"
        local_processes = local_world_size()
        if not threads_are_set():
            torch.set_num_threads(num_threads(local_processes))
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    log_with = tracker_names(config.report_to)
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        # Compiles a wrapper. The network that is sampled and saved is unchanged.
        dynamo_backend="inductor" if config.compile else None,
        log_with=[*log_with] or None,  # accelerate warns of an empty list
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32  # Accelerate allows TF32 in all compiled runs.
    if dynamo_plugin(accelerator).backend != DynamoBackend.NO:
        # With layout optimization, torch 2.13 silently drops the gradient of all layers before an upsampling, at least
        # on a CPU, so most of the network would not learn. Reading this attribute makes torch import its compiler.
        torch._inductor.config.layout_optimization = False
    if missing := [str(name) for name in log_with if name not in (LoggerType.ALL, *accelerator.log_with)]:
        raise UserError(
            f"--report_to {', '.join(missing)} is not installed. Install it with `pip install {' '.join(missing)}`, or "
            "pass --report_to none."
        )
    return accelerator


def dynamo_plugin(accelerator: Accelerator) -> TorchDynamoPlugin:
    """Return accelerate's settings of torch.compile."""
    plugin = accelerator.state.dynamo_plugin
    assert plugin is not None  # `AcceleratorState` always has one.
    return plugin


def prepare_module(accelerator: Accelerator, module: torch.nn.Module, compiled: bool) -> torch.nn.Module:
    """Wrap a module with accelerate, which compiles it with `--compile` if `compiled` allows it."""
    plugin = dynamo_plugin(accelerator)
    backend = plugin.backend
    if not compiled:
        plugin.backend = DynamoBackend.NO
    try:
        return accelerator.prepare(module)
    finally:
        plugin.backend = backend


def destroy_process_group() -> None:
    """Destroy the default process group if it is initialized."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def refuse_sharding() -> None:
    """Raise UserError if the launcher would shard the network."""
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise UserError(
                f"`accelerate launch --use_{kind.lower()}` is not supported: checkpoints, EMA weights and samples need "
                "the whole network on every process. Use DDP, such as --config_file "
                "training/configs/accelerate/ddp.yaml, which needs about 20 bytes of memory per parameter."
            )


def configure_logging(is_main_process: bool) -> None:
    """Log at level INFO on the main process and at level ERROR on the other processes."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO if is_main_process else logging.ERROR)
    for noisy in ("httpx", "httpx2", "datasets", "fsspec"):  # httpx2 is the client of huggingface_hub 2
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Vote(Protocol):
    """A function that returns whether any rank votes yes, see `make_vote`."""

    def __call__(self, vote: bool, at_once: bool) -> bool: ...


def make_vote(accelerator: Accelerator, timeout_s: int) -> Vote:
    """
    Return a function `(vote, at_once) -> bool` that all-reduces a boolean with OR over all ranks. With `at_once=False`
    it returns the result of the *previous* call, so that the reduction overlaps with the step. It uses a gloo group,
    which does not synchronize the GPU.

    Args:
        accelerator (`Accelerator`): the processes.
        timeout_s (`int`): timeout of the reduction, in seconds.
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
