"""Autoencoders and data for tests of cached latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diffusers_cfg.data.sources import Digits

# An autoencoder that encodes batches of another size sums in another order. That changes latents of size 1 by some 1e-6
# in float32, and what is trained on them by little more.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def few_digits(count: int = 100) -> Digits:
    """Return the first of the digits."""
    digits = Digits()
    digits.images, digits.class_labels = digits.images[:count], digits.class_labels[:count]
    return digits


def make_vae(seed: int = 0) -> AutoencoderKL:
    """Return a frozen autoencoder of random weights, from 8×8 grayscale images to 2×4×4 latents."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    )
    return vae.eval().requires_grad_(False)


def vae_flags(path: Path, seed: int = 0) -> list[str]:
    """Return the flags to train on the latents of an autoencoder of random weights, which is saved to a path."""
    make_vae(seed).save_pretrained(path)
    return ["--pretrained_vae_model_name_or_path", str(path)]


def count_encoded(monkeypatch) -> list[int]:
    """Return a list to which the number of images is appended whenever an autoencoder encodes a batch."""
    counts, encode = [], AutoencoderKL.encode

    def count(self, x, *args):
        counts.append(len(x))
        return encode(self, x, *args)

    monkeypatch.setattr(AutoencoderKL, "encode", count)
    return counts
