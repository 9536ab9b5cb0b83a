"""Encode a dataset once, and cache the autoencoder's posterior of each image on disk."""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import AutoencoderDC, AutoencoderKL
from torch.utils.data import BatchSampler, DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_cfg.config import CACHE_DIR, UserError
from diffusers_cfg.data.datasets import (
    CachedImages,
    LazyImages,
    fingerprint,
    identity_collate,
)
from diffusers_cfg.data.unreadable import check_unreadable, warn_about_unreadable
from diffusers_cfg.files import digest, read_safetensors, write_safetensors
from diffusers_cfg.randomness import seed_of
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# Images per file. A run that is killed while encoding loses at most one file per process.
FILE_SIZE = 512
LATENTS_DIR = CACHE_DIR / "latents"


class LatentBatch(NamedTuple):
    """A batch of posteriors."""

    # (batch, views, 2 · channels, height, width): mean and log-variance of the image and, with two views, of its mirror
    # image; of an AutoencoderDC, (batch, views, channels, height, width), the latents themselves
    moments: torch.Tensor
    class_labels: torch.Tensor  # (batch,), int64; -1 means unlabelled
    unreadable: list[str]  # always empty: unreadable images are counted during encoding

    def training_input(self, device: torch.device, flip: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the moments of each image, `(batch, 2 · channels, height, width)`.

        Args:
            device (`torch.device`): the device to move the moments to.
            flip (`torch.Tensor` of shape `(batch,)`, *optional*): bool, on `device`; for which images to return the
                moments of the mirror image.
        """
        moments = self.moments.to(device, non_blocking=True)
        return moments[:, 0] if flip is None else torch.where(flip.view(-1, 1, 1, 1), moments[:, 1], moments[:, 0])


class CachedLatents(Dataset):
    """
    Posteriors in the order of the dataset, memory-mapped from disk.

    Args:
        files (`Sequence[dict[str, torch.Tensor]]`): "moments" and "class_labels" of each file, memory-mapped.
    """

    def __init__(self, files: Sequence[dict[str, torch.Tensor]]) -> None:
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
    vae: AutoencoderKL | AutoencoderDC | None,
    sample_shape: tuple[int, int, int],
) -> CachedLatents:
    """
    Return the latents of all images, read from an earlier run's cache or encoded by all processes together.

    The cache is identified by the data, the weights and dtype of the autoencoder, and `config.random_flip`. Damaged
    files are encoded again.

    Args:
        config (`TrainConfig`): the settings.
        accelerator (`accelerate.Accelerator`): the processes, all of which must call this function.
        dataset (`Dataset`): the images, `CachedImages` or `LazyImages`.
        vae (`AutoencoderKL` or `AutoencoderDC`, *optional*): the autoencoder.
        sample_shape (`tuple[int, int, int]`): channels, height and width of a latent.

    Raises:
        UserError: if there is no autoencoder, the latents do not fit on the disk, or too many images cannot be read.
    """
    if vae is None:
        raise UserError(
            f"--cache_latents needs an autoencoder, but {config.pretrained_model_name_or_path} has none. Leave out "
            "--cache_latents."
        )
    assert isinstance(dataset, CachedImages | LazyImages)
    identity = {
        "data": fingerprint(dataset),
        "vae": digest(vae.state_dict()),
        "dtype": str(vae.dtype),
        "flip": str(config.random_flip),
    }
    folder = LATENTS_DIR / f"{seed_of(*identity.values()):016x}"
    rows_of_files = BatchSampler(range(len(dataset)), FILE_SIZE, drop_last=False)
    files = {folder / f"{rows[0]}-{rows[-1]}.safetensors": rows for rows in rows_of_files}
    own_files = list(files)[accelerator.process_index :: accelerator.num_processes]
    missing = {path: files[path] for path in own_files if not is_intact(path, identity)}
    try:
        num_missing = sum(len(rows) for path, rows in files.items() if not path.is_file())
        check_disk_space(config, vae, sample_shape, folder, num_missing)
        encoded = encode(config, accelerator, dataset, vae, list(missing.values()))
        for path, (tensors, unreadable) in zip(missing, encoded, strict=True):
            metadata = {**identity, "digest": digest(tensors), "unreadable": json.dumps(unreadable)}
            write_safetensors(tensors, metadata, path)
        accelerator.wait_for_everyone()
        tensors, metadata = zip(*map(read_safetensors, files), strict=True)
    except OSError as error:
        raise UserError(
            f"--cache_latents cannot store latents in {folder}: {error}. Every process must be able to read and write "
            "there. Set XDG_CACHE_HOME to use a different folder."
        ) from error
    unreadable = {name for entry in metadata for name in json.loads(entry["unreadable"])}
    check_unreadable(unreadable, len(dataset), config.max_unreadable_fraction)
    warn_about_unreadable(unreadable)
    return CachedLatents(tensors)


def is_intact(path: Path, identity: dict[str, str]) -> bool:
    """Return whether a file is intact and holds the latents of `identity`. Log a warning if it exists but is not."""
    if not path.is_file():
        return False
    try:
        tensors, metadata = read_safetensors(path)
        intact = metadata.items() >= {**identity, "digest": digest(tensors)}.items()
    except OSError:
        intact = False
    if not intact:
        logger.warning("%s is damaged or holds different latents. Encoding its images again.", path)
    return intact


def check_disk_space(
    config: TrainConfig,
    vae: AutoencoderKL | AutoencoderDC,
    sample_shape: tuple[int, int, int],
    folder: Path,
    num_images: int,
) -> None:
    """Raise UserError if the latents of `num_images` images do not fit on the disk."""
    # Mean and log-variance, or the latent, of each view
    values_per_view = (2 if isinstance(vae, AutoencoderKL) else 1) * math.prod(sample_shape)
    values_per_image = values_per_view * (2 if config.random_flip else 1)
    needed = num_images * values_per_image * vae.dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--cache_latents needs {needed / 1e6:.2f} MB for the latents of {num_images} images, but {folder} has "
            f"{free / 1e6:.2f} MB free. Free disk space, or set XDG_CACHE_HOME to a folder on a different disk."
        )


def encode(
    config: TrainConfig,
    accelerator: Accelerator,
    dataset: Dataset,
    vae: AutoencoderKL | AutoencoderDC,
    files: list[list[int]],
) -> Iterator[tuple[dict[str, torch.Tensor], list[str]]]:
    """Yield the content of each file: moments and class labels of its rows, and the names of unreadable images."""
    batches = [list(BatchSampler(rows, config.train_batch_size, drop_last=False)) for rows in files]
    loader = DataLoader(
        dataset,
        batch_sampler=[*chain(*batches)],
        collate_fn=identity_collate,
        num_workers=0 if isinstance(dataset, CachedImages) else config.dataloader_num_workers,
    )
    loaded, vae = iter(loader), vae.to(accelerator.device)
    disable = None if accelerator.is_main_process else True  # None hides the bar unless in a terminal
    with tqdm(desc="Encoding", total=sum(map(len, files)), unit="image", leave=False, disable=disable) as progress:
        for file_batches in batches:
            moments, class_labels, unreadable = [], [], []
            for batch in islice(loaded, len(file_batches)):
                images = batch.training_input(accelerator.device).to(vae.dtype)
                views = [images, images.flip(-1)] if config.random_flip else [images]
                with torch.no_grad():
                    parameters = [encode_view(vae, view) for view in views]
                moments.append(torch.stack(parameters, dim=1).cpu())
                class_labels.append(batch.class_labels)
                unreadable += batch.unreadable
                progress.update(len(images))
            yield {"moments": torch.cat(moments), "class_labels": torch.cat(class_labels)}, unreadable


def encode_view(vae: AutoencoderKL | AutoencoderDC, images: torch.Tensor) -> torch.Tensor:
    """Return the mean and log-variance of the latents of images, or the latents if the autoencoder has no posterior."""
    encoded: Any = vae.encode(images)
    return encoded.latent_dist.parameters if isinstance(vae, AutoencoderKL) else encoded.latent
