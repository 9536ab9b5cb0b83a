"""Encode a dataset once: keep an autoencoder's posterior of each image on disk."""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch.utils.data import BatchSampler, DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_cfg.config import CACHE_DIR, UserError
from diffusers_cfg.data.datasets import (
    CachedImages,
    check_unreadable,
    fingerprint,
    identity_collate,
    warn_of_unreadable,
)
from diffusers_cfg.files import digest, write_safetensors
from diffusers_cfg.randomness import seed_of
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# Images in a file. A run that is killed while it encodes loses at most one file of each process.
FILE_SIZE = 512
LATENTS_DIR = CACHE_DIR / "latents"


class LatentBatch(NamedTuple):
    """A batch of posteriors."""

    # (batch, views, 2 · channels, height, width): mean and log-variance, for the image and, with two views, its mirror
    # image
    moments: torch.Tensor
    class_labels: torch.Tensor  # (batch,), int64; -1 is unlabelled
    unreadable: list[str]  # empty: unreadable images are counted when they are encoded

    def training_input(self, device: torch.device, flip: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the moments of each image, `(batch, 2 · channels, height, width)`.

        Args:
            device (`torch.device`): where to put them.
            flip (`torch.Tensor` of shape `(batch,)`, *optional*): bool, on that device; the images to flip
                horizontally.
        """
        moments = self.moments.to(device, non_blocking=True)
        return moments[:, 0] if flip is None else torch.where(flip.view(-1, 1, 1, 1), moments[:, 1], moments[:, 0])


class CachedLatents(Dataset):
    """
    Posteriors in the order of the dataset. They stay on disk until they are fetched.

    Args:
        files (`list[dict[str, torch.Tensor]]`): "moments" and "class_labels" of each file, memory-mapped.
    """

    def __init__(self, files: list[dict[str, torch.Tensor]]):
        self.moments = [file["moments"] for file in files]
        self.class_labels = torch.cat([file["class_labels"] for file in files])

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitems__(self, indices: list[int]) -> LatentBatch:
        moments = torch.stack([self.moments[index // FILE_SIZE][index % FILE_SIZE] for index in indices])
        return LatentBatch(moments, self.class_labels[indices], [])


def cache_latents(
    config: TrainConfig,
    accelerator: Accelerator,
    dataset: Dataset,
    vae: AutoencoderKL | None,
    sample_shape: tuple[int, int, int],
) -> CachedLatents:
    """
    Return the latents of all images, from the cache of an earlier run or encoded by all processes together.

    The cache is identified by the data, the weights and the dtype of the autoencoder, and `config.random_flip`. A
    damaged file is encoded again.

    Args:
        config (`TrainConfig`): the settings.
        accelerator (`accelerate.Accelerator`): the processes. Each of them calls this function.
        dataset (`Dataset`): the images, `CachedImages` or `LazyImages`.
        vae (`AutoencoderKL`, *optional*): the autoencoder.
        sample_shape (`tuple[int, int, int]`): channels, height and width of a latent.

    Raises:
        UserError: there is no autoencoder; the latents do not fit on the disk; too many images cannot be read.
    """
    if vae is None:
        raise UserError(
            f"--cache_latents: {config.pretrained_model_name_or_path} has no autoencoder. Leave out --cache_latents."
        )
    identity = {
        "data": fingerprint(dataset),
        "vae": digest(vae.state_dict()),
        "dtype": str(vae.dtype),
        "flip": str(config.random_flip),
    }
    folder = LATENTS_DIR / f"{seed_of(*identity.values()):016x}"
    parts = BatchSampler(range(len(dataset)), FILE_SIZE, drop_last=False)
    files = {folder / f"{rows[0]}-{rows[-1]}.safetensors": rows for rows in parts}
    mine = list(files)[accelerator.process_index :: accelerator.num_processes]
    missing = {path: files[path] for path in mine if not is_whole(path, identity)}
    try:
        num_missing = sum(len(rows) for path, rows in files.items() if not path.is_file())
        check_space(config, vae, sample_shape, folder, num_missing)
        encoded = encode(config, accelerator, dataset, vae, list(missing.values()))
        for path, (tensors, unreadable) in zip(missing, encoded, strict=True):
            metadata = {**identity, "digest": digest(tensors), "unreadable": json.dumps(unreadable)}
            write_safetensors(tensors, metadata, path)
        accelerator.wait_for_everyone()
        tensors, metadata = zip(*map(read_file, files), strict=True)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        raise UserError(
            f"--cache_latents cannot keep latents in {folder}: {error}. Every process has to write and read there; "
            "XDG_CACHE_HOME names another folder."
        ) from error
    unreadable = {name for entry in metadata for name in json.loads(entry["unreadable"])}
    check_unreadable(unreadable, len(dataset), config.max_unreadable_fraction)
    warn_of_unreadable(unreadable)
    return CachedLatents(tensors)


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a file, memory-mapped, and its metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def is_whole(path: Path, identity: dict[str, str]) -> bool:
    """Return whether a file exists, holds the latents of `identity` and is intact. Logs if it exists and does not."""
    if not path.is_file():
        return False
    try:
        tensors, metadata = read_file(path)
        whole = metadata.items() >= {**identity, "digest": digest(tensors)}.items()
    except (OSError, SafetensorError):
        whole = False
    if not whole:
        logger.warning("%s is damaged or holds other latents: its images are encoded again.", path)
    return whole


def check_space(
    config: TrainConfig, vae: AutoencoderKL, sample_shape: tuple[int, int, int], folder: Path, num_images: int
) -> None:
    """Raise UserError if the latents of a number of images do not fit on the disk."""
    numbers = 2 * math.prod(sample_shape) * (2 if config.random_flip else 1)  # mean and log-variance of each view
    needed = num_images * numbers * vae.dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--cache_latents needs {needed / 1e6:.2f} MB for the latents of {num_images} images, but {folder} has "
            f"{free / 1e6:.2f} MB left: free some, or set XDG_CACHE_HOME to a folder on another disk."
        )


def encode(
    config: TrainConfig, accelerator: Accelerator, dataset: Dataset, vae: AutoencoderKL, parts: list[list[int]]
) -> Iterator[tuple[dict[str, torch.Tensor], list[str]]]:
    """Yield, for each part of the data, its moments and class labels, and the names of its unreadable images."""
    batches = [list(BatchSampler(rows, config.train_batch_size, drop_last=False)) for rows in parts]
    loader = DataLoader(
        dataset,
        batch_sampler=[*chain(*batches)],
        collate_fn=identity_collate,
        num_workers=0 if isinstance(dataset, CachedImages) else config.dataloader_num_workers,
    )
    loaded, vae = iter(loader), vae.to(accelerator.device)
    disable = None if accelerator.is_main_process else True  # for None, tqdm shows nothing unless it has a terminal
    with tqdm(desc="Encoding", total=sum(map(len, parts)), unit="image", leave=False, disable=disable) as progress:
        for part in batches:
            moments, class_labels, unreadable = [], [], []
            for batch in islice(loaded, len(part)):
                images = batch.training_input(accelerator.device).to(vae.dtype)
                views = [images, images.flip(-1)] if config.random_flip else [images]
                with torch.no_grad():
                    parameters = [vae.encode(view).latent_dist.parameters for view in views]
                moments.append(torch.stack(parameters, dim=1).cpu())
                class_labels.append(batch.class_labels)
                unreadable += batch.unreadable
                progress.update(len(images))
            yield {"moments": torch.cat(moments), "class_labels": torch.cat(class_labels)}, unreadable
