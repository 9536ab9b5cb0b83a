"""What a run is going to do and what it needs, for `--dry_run`."""

from pathlib import Path

import torch
from accelerate import Accelerator
from checkpoint import check_disk, checkpoint_bytes, checkpoints_at_once, free_bytes, gib, keep_batch_size
from config import TrainConfig
from data import CachedImages, num_images
from loop import length_of_run, sample_shape
from torch.utils.data import Dataset

from diffusers_cfg import CFGPipeline


def describe_plan(
    config: TrainConfig, accelerator: Accelerator, dataset: Dataset, pipeline: CFGPipeline, checkpoint: Path | None
) -> str:
    """The plan, a line for each matter. The memory is an estimate. Raises UserError for what `train` would refuse."""
    unet, device = pipeline.unet, accelerator.device
    if checkpoint is not None:
        keep_batch_size(checkpoint, config, accelerator.num_processes)
    available = num_images(dataset)
    batch_size, total_steps = length_of_run(config, accelerator, available)
    epochs = f": {total_steps * batch_size / available:.1f} epochs" if available is not None else ""
    check_disk(config, unet, total_steps)
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    fixed = 4 * unet.num_parameters() * (4 + len(config.ema_decays))  # weights, gradient, Adam's two moments
    activations = activation_bytes(config, unet) / (1 if precision == "fp32" else 2)
    free = f", {gib(torch.accelerator.get_memory_info(device)[0])} are free" if device.type != "cpu" else ""
    number, size = checkpoints_at_once(config, total_steps), checkpoint_bytes(config, unet)
    lines = {
        "images": f"{available or 'unknown'} of {len(pipeline.id2label)} classes, "
        + ("decoded and kept in memory" if isinstance(dataset, CachedImages) else "decoded as they are used"),
        "network": f"{unet.num_parameters() / 1e6:.1f} M parameters, for samples of "
        + "×".join(map(str, sample_shape(unet))),
        "target": f"{config.prediction_type}, {config.conditioning_dropout_prob:.0%} of the labels dropped",
        "steps": f"{total_steps} of {batch_size} images{epochs}",
        "a step": f"{accelerator.num_processes} × {device.type} × {config.gradient_accumulation_steps} batches of "
        f"{config.train_batch_size}, {precision}",
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler}, {config.lr_warmup_steps} steps of warm-up",
        "memory": f"about {gib(fixed + activations)} on each device, {gib(fixed)} of it for any batch{free}",
        "disk": f"{number} checkpoints at once of {gib(size)}, {gib(free_bytes(config))} are free",
        "output": f"{config.output_dir}, from {checkpoint.name if checkpoint else 'the first step'}",
        "tracked by": config.report_to,
        "published as": config.hub_model_id if config.push_to_hub else "nothing",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items())


def activation_bytes(config: TrainConfig, unet: torch.nn.Module) -> int:
    """What the backward pass of a batch finds kept, in float32: counted on a network without memory."""
    with torch.device("meta"):
        shadow = type(unet).from_config(unet.config).train()
        batch = torch.empty(config.train_batch_size, *sample_shape(unet))
        class_labels = torch.zeros(config.train_batch_size, dtype=torch.long)
    if config.gradient_checkpointing:
        shadow.enable_gradient_checkpointing()
    parameters = {parameter.untyped_storage()._cdata for parameter in shadow.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shadow(batch, torch.zeros(len(batch), device="meta"), class_labels=class_labels)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)
