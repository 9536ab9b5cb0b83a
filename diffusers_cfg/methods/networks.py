"""Build the network and the pipeline that a run trains, from settings or from a pretrained pipeline."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DPMSolverMultistepScheduler, SchedulerMixin

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.config import UserError
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.loading import find_folder, load_autoencoder
from diffusers_cfg.method_settings import CFGConfig, DiffusionConfig
from diffusers_cfg.model_files import read_object
from diffusers_cfg.run_settings import ATTENTION_RESOLUTIONS, ModelConfig
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# New models sample with DPM-Solver++. In the measured results no other sampler comes closer to the data, not even
# the paper's sampler with 256 steps.
SOLVER, NUM_INFERENCE_STEPS = DPMSolverMultistepScheduler, 12

# The settings of a LogSNRScheduler that a network is trained for, and records.
NOISE_PROCESS = ("prediction_type", "log_snr_min", "log_snr_max", "log_snr_schedule", "num_train_timesteps")

CLASSES_WITHOUT_NAMES = (
    "The model's classes have no names. Assuming that they are the classes of the data, in the same order."
)


def build_pipeline(config: CFGConfig, images: LabelledImages) -> CFGPipeline:
    """Return a new or pretrained pipeline to train. Raise UserError if it does not fit the data."""
    if config.pretrained_model_name_or_path is not None:
        pipeline = load_pretrained(config, images)
        refuse_one_pass(config, pipeline.unet, config.max_guidance_scale)
        if config.max_guidance_scale is not None:
            pipeline.unet = one_pass_network(pipeline.unet, config.max_guidance_scale, config.seed)
        return pipeline
    vae = load_vae(config)
    unet = build_unet(
        config,
        vae,
        images.channels,
        num_classes=len(images.id2label),
        max_guidance_scale=config.max_guidance_scale,
        # Time and class scale the features, as in ADM (arXiv 2105.05233, section 3.1), instead of being added to them.
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = LogSNRScheduler(
        log_snr_min=config.log_snr_min,
        log_snr_max=config.log_snr_max,
        prediction_type=config.prediction_type,
        variance_interpolation=0.3 if config.resolution < 128 else 0.2,  # the paper's, at 64×64 and at 128×128
        clip_sample=vae is None,  # latents have no fixed range
    )
    return new_pipeline(config, unet, scheduler, vae, images.id2label)


def new_pipeline(
    config: DiffusionConfig,
    unet: UNet2DCFGModel,
    scheduler: LogSNRScheduler,
    vae: AutoencoderKL | AutoencoderDC | None,
    id2label: dict[int, str],
    solver: type[SchedulerMixin] = SOLVER,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
) -> CFGPipeline:
    """Return a pipeline for a network, which records its noise process and samples with one of diffusers' solvers."""
    record_process(unet, scheduler)
    return CFGPipeline(
        unet,
        scheduler.solver(solver),
        vae,
        id2label,
        config.conditioning_dropout_prob,
        num_inference_steps=num_inference_steps,
    )


def record_process(unet: UNet2DCFGModel, scheduler: LogSNRScheduler) -> None:
    """Record the noise process that a network is trained with in its config."""
    unet.noise_process = {name: scheduler.config[name] for name in NOISE_PROCESS}


def load_pretrained(
    config: DiffusionConfig, images: LabelledImages, flag: str = "--pretrained_model_name_or_path"
) -> CFGPipeline:
    """
    Load a pretrained pipeline to train, with its own noise process and the classes of the data.

    Args:
        config (`DiffusionConfig`): settings with `pretrained_model_name_or_path`.
        images (`LabelledImages`): the data.
        flag (`str`): the flag that named the pipeline, for messages.

    Raises:
        UserError: if the pipeline cannot be loaded, does not fit the resolution, or has an unknown noise process.
    """
    pretrained = load_diffusion_model(config, flag)
    unet, vae = pretrained.unet, pretrained.vae
    if pretrained.classifier is not None:
        source = config.pretrained_model_name_or_path
        logger.warning("Leaving out the classifier of %s: the run saves the network that it trains alone.", source)
    replace_classes(unet, pretrained.id2label, images.id2label)
    unet.register_to_config(sample_size=check_sample_size(unet.config.block_out_channels, sample_size(config, vae)))
    if vae is not None:
        vae.eval().requires_grad_(False)
    pipeline = new_pipeline(config, unet, noise_process(pretrained), vae, images.id2label)
    warn_about_channels(config, pipeline, images)
    return pipeline


def load_diffusion_model(config: TrainConfig, flag: str = "--pretrained_model_name_or_path") -> CFGPipeline:
    """Load `pretrained_model_name_or_path`, the value of `flag`. Raise UserError if that fails or it is a generator."""
    source = config.pretrained_model_name_or_path
    assert source is not None
    try:
        pretrained = CFGPipeline.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {source} cannot be loaded: {error}") from error
    if pretrained.unet.latent_dim is not None:
        raise UserError(
            f"{flag} {source} is a denoising diffusion GAN, whose generator draws images in "
            f"{pretrained.num_inference_steps} steps instead of predicting at every noise level. Start from a model of "
            "train_cfg.py or train_vdm.py."
        )
    return pretrained


def warn_about_channels(config: TrainConfig, pipeline: CFGPipeline, images: LabelledImages) -> None:
    """Warn if the images are converted to the number of channels of a pretrained pipeline."""
    if (channels := pipeline.image_shape[0]) != images.channels:
        source = config.pretrained_model_name_or_path
        logger.warning("Converting the images to %d channels, the number of channels of %s.", channels, source)


def refuse_one_pass(config: DiffusionConfig, unet: UNet2DCFGModel, trained_scale: float | None = None) -> None:
    """Raise UserError if a pretrained network guides in one pass, unless it is trained for the same range of w."""
    largest = unet.max_guidance_scale
    if largest not in (None, trained_scale):
        raise UserError(
            f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path} guides in one pass up to w = "
            f"{largest:g}, which other training would undo. Train it with train_cfg.py --max_guidance_scale "
            f"{largest:g}, or start from a model that guides in two passes."
        )


def one_pass_network(unet: UNet2DCFGModel, max_guidance_scale: float, seed: int) -> UNet2DCFGModel:
    """Return a copy of a network that takes w in [0, `max_guidance_scale`], and starts as the network for every w."""
    torch.manual_seed(seed)
    # `from_config` is annotated to return a tuple as well, but does so only with `return_unused_kwargs`.
    copy = cast(UNet2DCFGModel, UNet2DCFGModel.from_config(unet.config, max_guidance_scale=max_guidance_scale))
    copy.load_state_dict(unet.state_dict(), strict=False)  # the network may have no embedding of w
    return copy


def replace_classes(unet: UNet2DCFGModel, old: dict[int, str], new: dict[int, str]) -> None:
    """
    Replace the rows of the class embedding, one for each new class, and log the change. A class with a known name keeps
    its row. Other classes start from the row of the null class, which is kept.
    """
    if old == new:
        return
    if not old and len(new) == unet.num_classes:
        logger.warning(CLASSES_WITHOUT_NAMES)
        return
    rows = unet.get_parameter("class_embedding.weight").data
    null_row = rows[unet.null_class_label]
    known = {name: class_id for class_id, name in old.items()}
    kept = [name for name in new.values() if name in known]
    chosen = [rows[known[name]] if name in known else null_row for _, name in sorted(new.items())]
    unet.class_embedding = torch.nn.Embedding.from_pretrained(torch.stack([*chosen, null_row]), freeze=False)
    unet.register_to_config(num_class_embeds=len(new) + 1)
    logger.warning(
        "Replaced the model's %d classes by the %d classes of the data: %d with the same name keep their embedding, "
        "the others start from the null class, which is kept.",
        len(rows) - 1,
        len(new),
        len(kept),
    )


def build_unet(
    config: TrainConfig,
    vae: AutoencoderKL | AutoencoderDC | None,
    channels: int,
    num_classes: int,
    latent_dim: int | None = None,
    max_guidance_scale: float | None = None,
    **extra: Any,
) -> UNet2DCFGModel:
    """
    Return a new network, with weights determined by the seed.

    Args:
        config (`TrainConfig`): resolution, seed and network settings.
        vae (`AutoencoderKL` or `AutoencoderDC`, *optional*): the autoencoder whose latents the network models.
        channels (`int`): channels of the images, used without an autoencoder.
        num_classes (`int`): number of real classes; the network has one more, the null class.
        latent_dim (`int`, *optional*): size of the latent vector of a generator; by default no generator.
        max_guidance_scale (`float`, *optional*): largest w of a network that takes w; by default it does not.
        extra: other settings of `UNet2DCFGModel`, which a network config replaces.

    Raises:
        UserError: if the settings describe no network, or its levels do not fit the resolution.
    """
    torch.manual_seed(config.seed)
    size = sample_size(config, vae)
    if vae is not None:
        channels = vae.config.latent_channels
    if config.model_config_name_or_path is not None:
        settings = load_model_config(config.model_config_name_or_path)
    else:
        settings = {
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "dropout": config.dropout,
            **attention(config.attention_resolutions, size, config.block_out_channels),
            **normalization(config.block_out_channels),
            **extra,
        }
    settings |= {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": num_classes + 1,
        "class_embed_type": None,
        "latent_dim": latent_dim,
        "max_guidance_scale": max_guidance_scale,
    }
    try:
        unet = cast(UNet2DCFGModel, UNet2DCFGModel.from_config(settings))
    except Exception as error:  # incompatible layers raise exceptions of many types
        raise UserError(f"Failed to build a network with the settings {settings}: {error}") from error
    check_sample_size(unet.config.block_out_channels, size)
    return unet


def load_model_config(name_or_path: str) -> dict[str, Any]:
    """Load the config of a UNet2DModel from a JSON file, a folder or the Hub. Raise UserError if that fails."""
    try:
        if os.path.isfile(name_or_path):
            return read_object(Path(name_or_path))
        return read_object(find_folder(name_or_path, ["config.json"]) / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"--model_config_name_or_path {name_or_path} cannot be read: {error}") from error


def attention(resolutions: list[int], sample_size: int, block_out_channels: list[int]) -> dict[str, Any]:
    """
    Return block types with self-attention at the given resolutions, and heads of at most 64 channels (as in ADM).

    Raises:
        UserError: if no level has one of the resolutions. Values of the default may be left over.
    """
    sizes = [sample_size // 2**level for level in range(len(block_out_channels))]
    if unmatched := sorted(set(resolutions) - {0, *sizes}):
        levels = f"the levels of the network have {', '.join(map(str, sizes))} pixels"
        if resolutions != ATTENTION_RESOLUTIONS:
            raise UserError(
                f"attention_resolutions {resolutions}: {levels}, not {unmatched}. Use those, or 0 for none."
            )
        if len(unmatched) == len(resolutions):
            logger.warning("The network has no attention: %s, not %s (--attention_resolutions).", levels, unmatched)
    attended = [size in resolutions for size in sizes]
    channels = [channels for channels, here in zip(block_out_channels, attended, strict=True) if here]
    return {
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attended],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        "add_attention": attended[-1],
        "attention_head_dim": math.gcd(64, *channels),
    }


def normalization(block_out_channels: list[int]) -> dict[str, Any]:
    """Return the settings of a group norm with at least four channels per group and at most 32 groups."""
    groups = math.gcd(32, *block_out_channels)
    while groups > 1 and min(block_out_channels) // groups < 4:
        groups //= 2
    return {"norm_num_groups": groups}


def load_vae(config: ModelConfig) -> AutoencoderKL | AutoencoderDC | None:
    """Load the frozen autoencoder whose latents the network models, or return None if the settings name none."""
    name_or_path = config.pretrained_vae_model_name_or_path
    if name_or_path is None:
        return None
    try:
        vae = load_autoencoder(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"--pretrained_vae_model_name_or_path {name_or_path} cannot be loaded: {error}") from error
    return vae.eval().requires_grad_(False)


def sample_size(config: TrainConfig, vae: AutoencoderKL | AutoencoderDC | None) -> int:
    """Return the height and width of the UNet's samples: images of the run's resolution, or their latents."""
    return config.resolution // pixels_per_latent(vae)


def pixels_per_latent(vae: AutoencoderKL | AutoencoderDC | None) -> int:
    """Return the pixels per latent in each direction: each level of an encoder but the last halves the image."""
    if vae is None:
        return 1
    return 2 ** (len(vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]) - 1)


def check_sample_size(block_out_channels: Sequence[int], size: int) -> int:
    """Return the sample size. Raise UserError if the levels of a network cannot halve it."""
    halvings = len(block_out_channels) - 1
    if size % 2**halvings or size == 0:
        raise UserError(
            f"Samples of {size}×{size} cannot be halved {halvings} times, as the {halvings + 1} levels of the network "
            f"require. Choose a --resolution that makes the sample size a multiple of {2**halvings}, or fewer levels."
        )
    return size
