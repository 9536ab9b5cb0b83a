"""The network and the pipeline that a run trains and saves."""

import json
import math
from pathlib import Path

import torch
from config import ModelConfig, TrainConfig, UserError
from diffusers import AutoencoderKL

from diffusers_cfg import UNet2DCFGModel


def load_vae(config: ModelConfig) -> AutoencoderKL | None:
    """The frozen autoencoder whose latents are trained on, if the settings name one."""
    if config.pretrained_vae_model_name_or_path is None:
        return None
    try:
        vae = AutoencoderKL.from_pretrained(config.pretrained_vae_model_name_or_path)
    except OSError as error:
        raise UserError(
            f"--pretrained_vae_model_name_or_path {config.pretrained_vae_model_name_or_path}: {error}"
        ) from error
    return vae.eval().requires_grad_(False)


def build_unet(config: TrainConfig, vae: AutoencoderKL | None, channels: int, num_classes: int) -> UNet2DCFGModel:
    """
    A new network, its weights determined by the seed, for images of the run's resolution and so many channels, or for
    their latents. Raises UserError if its levels do not fit.
    """
    torch.manual_seed(config.seed)
    sample_size = config.resolution
    if vae is not None:
        sample_size //= 2 ** (len(vae.config.block_out_channels) - 1)
        channels = vae.config.latent_channels
    if config.model_config_name_or_path is not None:
        settings = load_model_config(config.model_config_name_or_path)
    else:
        settings = {
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "dropout": config.dropout,
            **attention(config.attention_resolutions, sample_size, len(config.block_out_channels)),
            **normalization(config.block_out_channels),
        }
    settings |= {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": num_classes + 1,
    }
    unet = UNet2DCFGModel.from_config(settings)
    halvings = len(unet.config.block_out_channels) - 1
    if sample_size % 2**halvings:
        raise UserError(
            f"The UNet sees samples of {sample_size}×{sample_size}, which cannot be halved {halvings} times, as its "
            f"{halvings + 1} levels do: choose a --resolution that makes them a multiple of {2**halvings}."
        )
    return unet


def load_model_config(name_or_path: str) -> dict:
    """A UNet2DModel's config, from a JSON file, a folder or the Hub."""
    try:
        if Path(name_or_path).is_file():
            return json.loads(Path(name_or_path).read_text(encoding="utf-8"))
        return dict(UNet2DCFGModel.load_config(name_or_path))
    except (OSError, ValueError) as error:
        raise UserError(f"--model_config_name_or_path {name_or_path} cannot be read: {error}") from error


def attention(resolutions: list[int], sample_size: int, levels: int) -> dict:
    """Block types with self-attention at the given resolutions, heads of 64 channels at the most (as ADM's)."""
    attended = [sample_size // 2**level in resolutions for level in range(levels)]
    return {
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attended],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        "add_attention": attended[-1],
        "attention_head_dim": 64,
    }


def normalization(block_out_channels: list[int]) -> dict:
    """Group norm with at least four channels a group, and 32 groups at the most."""
    groups = math.gcd(32, *block_out_channels)
    while groups > 1 and min(block_out_channels) // groups < 4:
        groups //= 2
    return {"norm_num_groups": groups}
