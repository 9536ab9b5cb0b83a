"""The network and the pipeline that a run trains and saves."""

import json
import logging
import math
from pathlib import Path

import torch
from config import ModelConfig, TrainConfig, UserError
from data import LabelledImages
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, SchedulerMixin

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel

logger = logging.getLogger(__name__)

# What new models are sampled with unless told otherwise: DPM-Solver++, as near to the data as any that was tried, and
# nearer than 256 steps of the paper's sampler; see "What was measured" in the README.
SOLVER, NUM_INFERENCE_STEPS = DPMSolverMultistepScheduler, 12


def build_pipeline(config: TrainConfig, images: LabelledImages) -> CFGPipeline:
    """What the run trains: new, or a published pipeline to go on from. Raises UserError if it does not fit the data."""
    if config.pretrained_model_name_or_path is not None:
        pipeline = load_pipeline(config, images)
        if pipeline.unet.max_guidance_scale is not None:
            raise UserError(
                f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path} was distilled to guide in one "
                "pass, and would forget that: go on from the model that it was made from, and distil that one."
            )
        return pipeline
    vae = load_vae(config)
    unet = build_unet(config, vae, images.channels, num_classes=len(images.id2label))
    scheduler = LogSNRScheduler(
        log_snr_min=config.log_snr_min,
        log_snr_max=config.log_snr_max,
        prediction_type=config.prediction_type,
        variance_interpolation=0.3 if config.resolution < 128 else 0.2,  # the paper's, at 64×64 and at 128×128
        clip_sample=vae is None,  # latents have no fixed range
    )
    return new_pipeline(config, unet, scheduler, vae, images.id2label)


def new_pipeline(
    config: TrainConfig,
    unet: UNet2DCFGModel,
    scheduler: LogSNRScheduler,
    vae: AutoencoderKL | None,
    id2label: dict[int, str],
    solver: type[SchedulerMixin] = SOLVER,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
) -> CFGPipeline:
    return CFGPipeline(
        unet,
        scheduler.solver(solver),
        vae,
        id2label,
        config.conditioning_dropout_prob,
        num_inference_steps=num_inference_steps,
    )


def noise_process(pipeline: CFGPipeline) -> LogSNRScheduler:
    """The noise process that a pipeline's scheduler was made from."""
    return LogSNRScheduler.from_config(pipeline.scheduler.config)


def image_channels(pipeline: CFGPipeline) -> int:
    """Channels of the images that a pipeline draws."""
    return pipeline.unet.config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels


def image_resolution(pipeline: CFGPipeline) -> int:
    """Height and width of the images that a pipeline draws."""
    size = pipeline.unet.config.sample_size
    return (size if isinstance(size, int) else size[0]) * pixels_per_latent(pipeline.vae)


# ----- from a published pipeline -----


def load_pipeline(config: TrainConfig, images: LabelledImages) -> CFGPipeline:
    """The pipeline to go on from, with the classes of the data. Its noise process stays what it is."""
    source = config.pretrained_model_name_or_path
    try:
        pretrained = CFGPipeline.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"--pretrained_model_name_or_path {source} cannot be loaded: {error}") from error
    unet, vae = pretrained.unet, pretrained.vae
    replace_classes(unet, pretrained.id2label, images.id2label)
    unet.register_to_config(sample_size=check_sample_size(unet, sample_size(config, vae)))
    if vae is not None:
        vae.eval().requires_grad_(False)
    if not {"log_snr_min", "_log_snr_min"} & pretrained.scheduler.config.keys():
        raise UserError(
            f"--pretrained_model_name_or_path {source} has a {type(pretrained.scheduler).__name__} that was not made "
            "from a LogSNRScheduler: the noise process of its training is not known."
        )
    if (channels := image_channels(pretrained)) != images.channels:
        logger.warning("The images are converted to the %d channels that %s draws.", channels, source)
    return new_pipeline(config, unet, noise_process(pretrained), vae, images.id2label)


def replace_classes(unet: UNet2DCFGModel, old: dict[int, str], new: dict[int, str]) -> None:
    """
    Give the network one class-embedding row for each new class, and say so. A class of a known name keeps its row, any
    other starts from that of the null class, which is kept.
    """
    if old == new:
        return
    if not old and len(new) == unet.num_classes:
        logger.warning("The model's classes have no names: they are taken to be those of the data, in its order.")
        return
    rows, null_row = unet.class_embedding.weight.data, unet.class_embedding.weight.data[unet.null_class_label]
    known = {name: class_id for class_id, name in old.items()}
    kept = [name for name in new.values() if name in known]
    chosen = [rows[known[name]] if name in known else null_row for _, name in sorted(new.items())]
    unet.class_embedding = unet.ClassEmbedding.from_pretrained(torch.stack([*chosen, null_row]), freeze=False)
    unet.register_to_config(num_class_embeds=len(new) + 1)
    logger.warning(
        "The model's %d classes were replaced by the %d of the data: %d of the same name keep their rows, the others "
        "start from the null class, which is kept.",
        len(rows) - 1, len(new), len(kept),
    )  # fmt: skip


# ----- from nothing -----


def load_vae(config: ModelConfig) -> AutoencoderKL | None:
    """The frozen autoencoder whose latents are trained on, if the settings name one."""
    name_or_path = config.pretrained_vae_model_name_or_path
    if name_or_path is None:
        return None
    try:
        vae = AutoencoderKL.from_pretrained(name_or_path)
    except OSError as error:
        raise UserError(f"--pretrained_vae_model_name_or_path {name_or_path} cannot be loaded: {error}") from error
    return vae.eval().requires_grad_(False)


def sample_size(config: TrainConfig, vae: AutoencoderKL | None) -> int:
    """Height and width of what the UNet sees: images of the run's resolution, or their latents."""
    return config.resolution // pixels_per_latent(vae)


def pixels_per_latent(vae: AutoencoderKL | None) -> int:
    """In each direction; each level of an autoencoder but the last halves the image."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def check_sample_size(unet: UNet2DCFGModel, size: int) -> int:
    """Raises UserError if the levels of the UNet cannot halve it."""
    halvings = len(unet.config.block_out_channels) - 1
    if size % 2**halvings or size == 0:
        raise UserError(
            f"The UNet sees samples of {size}×{size}, which cannot be halved {halvings} times, as its {halvings + 1} "
            f"levels do: choose a --resolution that makes them a multiple of {2**halvings}."
        )
    return size


def build_unet(config: TrainConfig, vae: AutoencoderKL | None, channels: int, num_classes: int) -> UNet2DCFGModel:
    """
    A new network, its weights determined by the seed, for images of the run's resolution and so many channels, or for
    their latents. Raises UserError if its levels do not fit.
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
        }
    settings |= {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": num_classes + 1,
        "class_embed_type": None,
    }
    try:
        unet = UNet2DCFGModel.from_config(settings)
    except Exception as error:  # whatever layers raise that do not fit
        raise UserError(f"There is no network with the settings {settings}: {error}") from error
    check_sample_size(unet, size)
    return unet


def load_model_config(name_or_path: str) -> dict:
    """A UNet2DModel's config, from a JSON file, a folder or the Hub."""
    try:
        if Path(name_or_path).is_file():
            return dict(json.loads(Path(name_or_path).read_text(encoding="utf-8")))
        return dict(UNet2DCFGModel.load_config(name_or_path))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"--model_config_name_or_path {name_or_path} cannot be read: {error}") from error


def attention(resolutions: list[int], sample_size: int, block_out_channels: list[int]) -> dict:
    """Block types with self-attention at the given resolutions, heads of 64 channels at the most (as ADM's)."""
    attended = [sample_size // 2**level in resolutions for level in range(len(block_out_channels))]
    channels = [channels for channels, here in zip(block_out_channels, attended, strict=True) if here]
    return {
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attended],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        "add_attention": attended[-1],
        "attention_head_dim": math.gcd(64, *channels),
    }


def normalization(block_out_channels: list[int]) -> dict:
    """Group norm with at least four channels a group, and 32 groups at the most."""
    groups = math.gcd(32, *block_out_channels)
    while groups > 1 and min(block_out_channels) // groups < 4:
        groups //= 2
    return {"norm_num_groups": groups}
