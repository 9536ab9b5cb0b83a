"""Provide autoencoders and data for tests of cached latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from diffusers_cfg.data.sources import Digits

# An autoencoder that encodes batches of a different size sums in a different order. This changes latents of size 1 by
# some 1e-6 in float32, and weights that are trained on them by little more.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def few_digits(count: int = 100) -> Digits:
    """Return the first `count` digits."""
    digits = Digits()
    digits.images, digits.class_labels = digits.images[:count], digits.class_labels[:count]
    return digits


def make_vae(seed: int = 0) -> AutoencoderKL:
    """Return a frozen autoencoder with random weights, from 8×8 grayscale images to 2×4×4 latents."""
    torch.manual_seed(seed)
    # diffusers annotates the settings of each level as tuples of one.
    levels: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, norm_num_groups=4, latent_channels=2, scaling_factor=0.5, **levels
    )
    return vae.eval().requires_grad_(False)


def make_deterministic_vae(in_channels: int = 1, levels: int = 2, channels: int = 2) -> AutoencoderDC:
    """Return a frozen deep compression autoencoder with random weights, which halves images `levels - 1` times."""
    torch.manual_seed(0)
    widths, layers, scales = (8,) * levels, (1,) * levels, ((),) * levels
    vae = AutoencoderDC(
        in_channels=in_channels,
        latent_channels=channels,
        attention_head_dim=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.5,
    )
    return vae.eval().requires_grad_(False)


def vae_flags(path: Path, seed: int = 0) -> list[str]:
    """Save an autoencoder with random weights, and return the flags to train on its latents."""
    make_vae(seed).save_pretrained(path)
    # Muon would amplify the rounding of sums, which depends on how the images are divided.
    return ["--pretrained_vae_model_name_or_path", str(path), "--optimizer", "adamw"]


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of images of each batch that an autoencoder encodes."""
    counts, encode = [], AutoencoderKL.encode

    def count(self, x, *args):
        counts.append(len(x))
        return encode(self, x, *args)

    monkeypatch.setattr(AutoencoderKL, "encode", count)
    return counts
