"""Generate images with a trained model. The seed and an image's index determine the image."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.class_labels import parse_class_labels
from diffusers_cfg.evaluation.guidance_rules import check_guidance, passes_per_step
from diffusers_cfg.evaluation.records import recorded_data
from diffusers_cfg.evaluation.sample_sets import SETTINGS_FILE, WRITERS, Cost, SampleSet, Shard, claimed
from diffusers_cfg.evaluation.settings import (
    GUIDANCE,
    PAPER_SCALES,
    EvaluationConfig,
    SampleConfig,
    SamplingConfig,
    SavedModelConfig,
    format_number,
)
from diffusers_cfg.evaluation.timing import now
from diffusers_cfg.files import check_writable, digest, refuse_data_folder
from diffusers_cfg.loading import load_guide_unet
from diffusers_cfg.randomness import seeded_generator

logger = logging.getLogger(__name__)

# The folder of the unfinished samples in the output folder of `sample.py`. No class has a folder of this name.
UNFINISHED = ".samples"

C = TypeVar("C", bound=SamplingConfig)


def load_pipeline(config: SamplingConfig, device: torch.device | str) -> CFGPipeline:
    """
    Load the model, with the scheduler and the guide model of the settings.

    Raises:
        UserError: if a model cannot be loaded, or the scheduler is not supported.
    """
    guidance_arguments(config, 0.0)  # raises UserError for an unknown guider
    pipeline = load_model(config)
    if config.guide_model is not None:
        try:
            pipeline.guide_unet = load_guide(config.guide_model, pipeline)
        except (OSError, ValueError) as error:
            raise UserError(f"--guide_model {config.guide_model} cannot be loaded: {error}") from error
    if pipeline.guider is not None:
        logger.warning("The model's own %s is ignored. Pass --guider to use a guider.", type(pipeline.guider).__name__)
        pipeline.guider = None
    if config.scheduler is not None:
        pipeline.scheduler = choose_scheduler(config.scheduler, pipeline)
    return pipeline.to(device)


def load_model(config: SavedModelConfig) -> CFGPipeline:
    """Load the model of the settings, in float32 on the CPU. Raise `UserError` if that fails."""
    try:
        pipeline = CFGPipeline.from_pretrained(config.model, variant=config.variant)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {config.model} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_guide(name: str, pipeline: CFGPipeline) -> UNet2DCFGModel:
    """
    Load the network of a guide model.

    Args:
        name (`str`): a pipeline, or a checkpoint of a training run.
        pipeline (`CFGPipeline`): the pipeline to guide.

    Raises:
        OSError: if it cannot be found.
        ValueError: if it cannot be loaded, is of another kind, or has other classes or a different noise process than
            the pipeline.
    """
    try:
        guide = CFGPipeline.from_pretrained(name)
    except FileNotFoundError:  # A checkpoint has no classes to compare, and its network records its noise process.
        return load_guide_unet(name)
    kinds = [
        "a diffusion model" if unet.latent_dim is None else "a denoising diffusion GAN"
        for unet in (guide.unet, pipeline.unet)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"It is {kinds[0]}, and cannot guide {kinds[1]}. Pass a guide of the same kind.")
    ours, theirs = pipeline.id2label, guide.id2label
    if ours and theirs and (differing := sorted(ours.items() ^ theirs.items())):
        raise ValueError(
            f"The guide has different classes, such as {differing[:2]}. Pass a guide for the classes of the model."
        )
    original, pipeline.scheduler = pipeline.scheduler, guide.scheduler
    check_call(pipeline, guidance_scale=0.0, num_inference_steps=guide.num_inference_steps)  # checks the noise process
    pipeline.scheduler = original
    return guide.unet


def choose_scheduler(name: str, pipeline: CFGPipeline) -> SchedulerMixin:
    """Create a scheduler for the noise process of a pipeline. Raise `UserError` if the scheduler is not supported."""
    if pipeline.unet.latent_dim is not None and name != pipeline.generator_scheduler:
        raise UserError(
            f"--scheduler {name} is not supported by a denoising diffusion GAN, whose generator was trained for the "
            f"steps of its own {pipeline.generator_scheduler}. Leave it out."
        )
    if pipeline.unet.latent_dim is None and name not in pipeline.schedulers:
        raise UserError(f"--scheduler {name} is not supported. Supported schedulers: {', '.join(pipeline.schedulers)}.")
    return make_scheduler(name, pipeline.scheduler)


def make_scheduler(name: str, scheduler: SchedulerMixin, **settings: Any) -> SchedulerMixin:
    """Create a scheduler, a class of diffusers or `LogSNRScheduler`, for the noise process of a given scheduler."""
    scheduler_class = getattr(diffusers, name, LogSNRScheduler)
    if isinstance(scheduler, LogSNRScheduler):  # without a warning about its own settings
        scheduler = scheduler.solver(scheduler_class)
    created = scheduler_class.from_config(scheduler.config, **settings)
    assert isinstance(created, SchedulerMixin)
    return created


def with_model_defaults(config: C, pipeline: CFGPipeline) -> C:
    """Return the settings with the model's own number of steps if they set none."""
    return dataclasses.replace(config, num_inference_steps=config.num_inference_steps or pipeline.num_inference_steps)


def only_sampler(pipeline: CFGPipeline) -> tuple[str, int] | None:
    """
    Return the scheduler and the number of steps of a model that was trained for these alone: a generator, or a student
    that was distilled to few DDIM steps. Return `None` for other models.
    """
    is_student = pipeline.unet.max_guidance_scale is not None and isinstance(pipeline.scheduler, DDIMScheduler)
    if pipeline.unet.latent_dim is None and not is_student:
        return None
    return type(pipeline.scheduler).__name__, pipeline.num_inference_steps


def guidance_scales(config: SampleConfig | EvaluationConfig, pipeline: CFGPipeline) -> list[float]:
    """
    Return the guidance scales of the settings, or by default those for the kind of model.

    Raises:
        UserError: if other settings of guidance are given without w for a generator, which is not guided by default.
    """
    is_generator = pipeline.unet.latent_dim is not None
    if isinstance(config, SampleConfig):
        name, default = "--guidance_scale", [1.0]
        given = None if config.guidance_scale is None else [config.guidance_scale]
    else:
        name, given, default = "--guidance_scales", config.guidance_scales, PAPER_SCALES
    if given is not None:
        return given
    if is_generator and (useless := config.guidance_flags):
        raise UserError(
            f"{', '.join(useless)}: no effect at w = 0, the default of a denoising diffusion GAN. Leave it out, or set "
            f"{name}."
        )
    return [0.0] if is_generator else default


def guidance_arguments(config: SamplingConfig, w: float) -> dict[str, Any]:
    """Return the call arguments for guidance at scale w. Raise `UserError` if the guider cannot be created."""
    if config.guider is None:
        interval = tuple(config.guidance_interval) if config.guidance_interval else None
        return {
            **GUIDANCE[config.guidance](w),
            "guidance_interval": interval,
            "guidance_rescale": config.guidance_rescale,
        }
    guider = getattr(diffusers.guiders, config.guider, None)
    if not (isinstance(guider, type) and issubclass(guider, BaseGuidance)):
        raise UserError(f"--guider {config.guider} is not a guider of diffusers. Pass a class of diffusers.guiders.")
    settings: dict[str, Any] = {"guidance_scale": w, "use_original_formulation": True}
    try:
        return {"guider": guider(**settings)}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--guider {config.guider} cannot be created from a guidance scale alone: {str(error).rstrip('.')}. Use a "
            "guider that needs no other arguments."
        ) from error


def call_arguments(config: SamplingConfig, w: float) -> dict[str, Any]:
    """Return the call arguments of the pipeline for a guidance scale w: guidance and number of steps."""
    return {**guidance_arguments(config, w), "num_inference_steps": config.num_inference_steps}


def sampling_settings(config: SamplingConfig, pipeline: CFGPipeline) -> dict[str, Any]:
    """Return, for JSON, all settings that affect the images of a set except class labels and w."""
    names = ["num_inference_steps", "guidance_interval", "guidance_rescale", "guider", "seed"]
    networks = [network for network in (pipeline.unet, pipeline.guide_unet, pipeline.vae) if network is not None]
    guidance = classifier = None  # as in older folders of samples, which record neither
    if config.guidance != "classifier_free":
        guidance, classifier = config.guidance, digest(pipeline.classifier.state_dict())
    return {
        **{name: getattr(config, name) for name in names},
        "guidance": guidance,
        "classifier": classifier,
        "scheduler": type(pipeline.scheduler).__name__,
        "networks": [digest(network.state_dict()) for network in networks],
    }


class _ReachedNetwork(Exception):
    """Raised by `check_call` instead of evaluating a network."""


def check_call(pipeline: CFGPipeline, **call: Any) -> None:
    """
    Check the arguments of a pipeline's call without evaluating a network.

    Args:
        pipeline (`CFGPipeline`): the pipeline to call.
        call: the arguments, without the class labels.

    Raises:
        UserError: if the pipeline rejects the arguments.
    """

    def stop(*_: Any) -> None:
        raise _ReachedNetwork

    hooks = [network.register_forward_pre_hook(stop) for network in networks_of(pipeline)]
    try:
        with suppress(_ReachedNetwork):
            pipeline(class_labels=[0], generator=[torch.Generator().manual_seed(0)], output_type="latent", **call)
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        for hook in hooks:
            hook.remove()


def networks_of(pipeline: CFGPipeline) -> list[torch.nn.Module]:
    """Return the networks of a pipeline that predict at each step."""
    return [network for network in (pipeline.unet, pipeline.guide_unet) if network is not None]


@contextmanager
def counted_evaluations(*networks: torch.nn.Module) -> Iterator[list[int]]:
    """Record the batch size of each evaluation of the networks in the yielded list."""
    batch_sizes: list[int] = []
    hooks = [net.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0]))) for net in networks]
    try:
        yield batch_sizes
    finally:
        for hook in hooks:
            hook.remove()


def draw_images(
    pipeline: CFGPipeline, class_labels: torch.Tensor, indices: list[int], seed: int, **call: Any
) -> tuple[torch.Tensor, Cost]:
    """
    Generate images, each of which depends only on the seed, its index and its class.

    Args:
        pipeline (`CFGPipeline`): the pipeline to sample with.
        class_labels (`torch.Tensor` of shape `(images,)`): class ids, -1 for the null class.
        indices (`list[int]`): the indices of the images in their set.
        seed (`int`): the seed of the set.
        call: other arguments of the pipeline's call.

    Returns:
        The images, uint8 `(images, 3, height, width)`, and their cost.

    Raises:
        UserError: if the pipeline rejects the arguments, or some images are not finite.
    """
    last: dict[str, torch.Tensor] = {}
    classifiers = [] if pipeline.classifier is None else [pipeline.classifier]

    def keep(_pipeline: DiffusionPipeline, _step: int, _timestep: torch.Tensor, tensors: dict) -> dict:
        last.update(tensors)
        return {}

    try:
        with (
            counted_evaluations(*networks_of(pipeline)) as evaluations,
            counted_evaluations(*classifiers) as gradients,
        ):
            images = pipeline(
                class_labels=class_labels,
                generator=[seeded_generator("cpu", seed, "sample", index) for index in indices],
                output_type="pt",
                callback_on_step_end=keep,
                **call,
            ).images
    except FloatingPointError as error:
        if "latents" not in last or last["latents"].isfinite().all():  # the gradient of the classifier is not finite
            raise UserError(f"In the batch of the images {indices[0]} … {indices[-1]}: {error}") from error
        finite = torch.isfinite(last["latents"]).flatten(1).all(1).tolist()
        bad = [index for index, is_finite in zip(indices, finite, strict=True) if not is_finite]
        raise UserError(f"{len(bad)} of {len(indices)} images are not finite (indices {bad[:10]}): {error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    images = (images * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1)
    return images, Cost(sum(evaluations) / len(indices), sum(gradients) / len(indices))


def draw_sets(
    config: SamplingConfig,
    accelerator: Accelerator,
    pipeline: CFGPipeline,
    sets: dict[float, SampleSet],
    class_labels: torch.Tensor,
) -> None:
    """
    Generate the missing shards of the sample set of each w. The image at an index has the class `class_labels[index]`
    and starts from the same noise for each w.

    Args:
        config (`SamplingConfig`): the settings, with a number of steps, see `with_model_defaults`.
        accelerator (`Accelerator`): the processes that share the shards.
        pipeline (`CFGPipeline`): the pipeline, from `load_pipeline`.
        sets (`dict[float, SampleSet]`): the sample set of each w.
        class_labels (`torch.Tensor` of shape `(num_samples,)`): class ids, -1 for the null class.
    """
    accelerator.wait_for_everyone()  # so that all processes find the same shards missing
    size = pipeline.image_shape[1:]
    missing = [
        (w, shard)
        for w, samples in sets.items()
        for shard in samples.shards
        if not samples.has(shard, class_labels[list(shard)], size)
    ]
    accelerator.wait_for_everyone()
    assigned = missing[accelerator.process_index :: accelerator.num_processes]
    # Progress counts passes of a network or a classifier, for an accurate time estimate.
    passes = {w: passes_per_step(config, w) for w in sets}
    total = sum(passes[w] * len(shard) for w, shard in assigned)
    disable = None if accelerator.is_main_process and assigned else True  # None hides the bar unless in a terminal
    progress = tqdm(total=total, unit="pass", desc="Sampling", disable=disable)
    for number, (w, shard) in enumerate(assigned, 1):
        progress.set_postfix_str(f"w = {format_number(w)}")
        if progress.disable:
            logger.info("Sampling shard %d of %d, w = %s", number, len(assigned), format_number(w))
        drawn, start = [], now()
        for indices in torch.tensor(shard).split(config.batch_size):
            call = call_arguments(config, w)
            drawn.append(draw_images(pipeline, class_labels[indices], indices.tolist(), config.seed, **call))
            progress.update(passes[w] * len(indices))
        images = torch.cat([images for images, _ in drawn]).movedim(1, -1).numpy()
        seconds = (now() - start) / len(shard)
        content = Shard(images, class_labels[list(shard)].numpy(), **drawn[0][1]._asdict(), seconds=seconds)
        sets[w].save(shard, content)
    progress.close()
    accelerator.wait_for_everyone()


def draw_to_folder(config: SampleConfig, accelerator: Accelerator) -> None:
    """
    Generate images and write them to a folder in the format of the settings.

    Args:
        config (`SampleConfig`): the settings of the command `sample.py`.
        accelerator (`Accelerator`): the processes that share the work.

    Raises:
        UserError: if the settings do not fit the model, the folder is not empty, or a file cannot be written.
    """
    pipeline = load_pipeline(config, accelerator.device)
    config = with_model_defaults(config, pipeline)
    check_guidance(config, pipeline)
    labels = parse_class_labels(config.class_labels, pipeline)
    class_labels = torch.tensor(labels)[torch.arange(config.num_samples) % len(labels)]
    (w,) = guidance_scales(config, pipeline)
    check_call(pipeline, **call_arguments(config, w))
    output_dir = Path(config.output_dir)
    samples = SampleSet(output_dir / UNFINISHED, config.num_samples)
    check_writable(output_dir, "--output_dir")
    refuse_data_folder(output_dir, recorded_data(config.model, pipeline) or {})
    if accelerator.is_main_process:
        # A repeated command continues an interrupted one, which may have written some of its images.
        interrupted = (samples.folder / SETTINGS_FILE).is_file() and not samples.folder.is_symlink()
        if output_dir.is_dir() and any(output_dir.iterdir()) and not interrupted:
            raise UserError(f"--output_dir {output_dir} is not empty. Choose a different folder.")
    settings = {"class_labels": labels, "guidance_scale": w, "format": config.format}
    with claimed(samples.folder, {**settings, **sampling_settings(config, pipeline)}, accelerator):
        draw_sets(config, accelerator, pipeline, {w: samples}, class_labels)
        if accelerator.is_main_process:
            WRITERS[config.format](samples, output_dir, pipeline)
            samples.delete()
