"""Data sets of decoded images: in memory, decoded lazily, or streamed."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from operator import length_hint
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import to_array, to_float
from diffusers_cfg.data.order import Position, shuffled_blocks
from diffusers_cfg.data.sources import EncodedImage, ImageStream, LabelledImages, open_encoded
from diffusers_cfg.data.workers import InFlightItems
from diffusers_cfg.settings import DataConfig, TrainConfig

logger = logging.getLogger(__name__)

# Data that takes no more than this as uint8 is decoded once and kept; larger data is decoded as it is used.
MAX_CACHED_BYTES = 2 * 1024**3
# and from so many on its share of unreadable images is judged.
MIN_SEEN = 1000


class ImageBatch(NamedTuple):
    images: torch.Tensor  # (batch, channels, resolution, resolution), uint8
    class_labels: torch.Tensor  # (batch,), int64; -1 is unlabelled
    unreadable: list[str]  # names of the images that could not be read, and were replaced by another
    reached: tuple[int, Position] | None = None  # the stream that they are of, and where it goes on after them

    @property
    def images_rgb(self) -> torch.Tensor:
        """The images with three channels, grey or not."""
        return self.images.expand(-1, 3, -1, -1)

    def training_input(self, device: torch.device, flip: torch.Tensor | None = None) -> torch.Tensor:
        """The images in [-1, 1] on a device, flipped where `flip` says."""
        images = to_float(self.images.to(device, non_blocking=True))
        return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def training_dataset(images: LabelledImages, config: DataConfig, channels: int, show_progress: bool) -> Dataset:
    """The images as a `Dataset` of uint8 arrays, in memory if they fit. Raises UserError if too many are unreadable."""
    if isinstance(images, ImageStream):
        return StreamedImages(images, config, channels)
    if len(images) * channels * config.resolution**2 <= MAX_CACHED_BYTES:
        return stack_images(images, config, channels, show_progress)
    return LazyImages(images, config.resolution, channels, config.center_crop, config.dataloader_num_workers)


def stack_images(images: LabelledImages, config: DataConfig, channels: int, show_progress: bool) -> "CachedImages":
    """Decode all images. Those that cannot be read are named and left out; UserError if they are too many."""

    def decode(index: int) -> np.ndarray | None:
        try:
            return to_array(images.open_image(index), config.resolution, channels, config.center_crop)
        except Exception as error:  # whatever a decoder raises, the image cannot be used
            logger.warning("Skipped an image that cannot be read: %s: %s", images.name_image(index), error)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = pool.map(decode, range(len(images)))
        arrays = list(
            tqdm(arrays, "Decoding", len(images), unit="image", leave=False, disable=None if show_progress else True)
        )
    unreadable = [images.name_image(index) for index, array in enumerate(arrays) if array is None]
    check_unreadable(unreadable, len(images), config.max_unreadable_fraction)
    readable = [index for index, array in enumerate(arrays) if array is not None]
    return CachedImages(
        torch.from_numpy(np.stack([arrays[index] for index in readable])),
        torch.from_numpy(images.class_labels[readable]),
    )


def check_unreadable(unreadable: Iterable[str], num_images: int, max_unreadable_fraction: float) -> None:
    """Raises UserError if too large a share of the images cannot be read."""
    unreadable = list(unreadable)
    if len(unreadable) > max_unreadable_fraction * num_images:
        raise UserError(
            f"{len(unreadable)} of {num_images} images cannot be read, more than --max_unreadable_fraction "
            f"{max_unreadable_fraction} allows: {', '.join(unreadable[:5])}{', …' if len(unreadable) > 5 else ''}"
        )


def warn_of_unreadable(unreadable: set[str]) -> None:
    """Name those that there are, or the first of them."""
    if unreadable:
        logger.warning("%d images could not be read: %s", len(unreadable), ", ".join(sorted(unreadable)[:20]))


class CachedImages(Dataset):
    """Images decoded once. `__getitems__` is what a `DataLoader` calls for a whole batch."""

    def __init__(self, images: torch.Tensor, class_labels: torch.Tensor):
        self.images, self.class_labels = images, class_labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        return ImageBatch(self.images[indices], self.class_labels[indices], [])


class LazyImages(Dataset):
    """Images decoded when they are asked for. One that cannot be read is replaced by the next that can."""

    def __init__(self, images: LabelledImages, resolution: int, channels: int, center_crop: bool, num_workers: int = 0):
        self.images, self.to_array_args, self.in_flight = (
            images,
            (resolution, channels, center_crop),
            InFlightItems(num_workers),
        )
        self.class_labels = torch.from_numpy(images.class_labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        unreadable = []
        arrays, labels = zip(*map(self._read, indices, repeat(unreadable)), strict=True)
        self.in_flight.record("")
        return ImageBatch(torch.from_numpy(np.stack(arrays)), torch.tensor(labels), unreadable)

    def _read(self, index: int, unreadable: list[str]) -> tuple[np.ndarray, int]:
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            self.in_flight.record(str(candidate))
            try:
                array = to_array(self.images.open_image(candidate), *self.to_array_args)
                return array, self.class_labels[candidate].item()
            except Exception:  # whatever a decoder raises, the image cannot be used
                unreadable.append(self.images.name_image(candidate))
        raise UserError("None of the images can be read.")

    def name_held(self, item: str) -> str:
        """What to call in a message what a worker had in its hands."""
        return self.images.name_image(int(item))


class StreamedImages(IterableDataset):
    """
    Batches without end, read and decoded as they are asked for. Each worker of each process has a stream of its own,
    and they take turns: of n streams, number i mod n gives batch i of all processes'. An image that cannot be read is
    left out.

    Attributes:
        probe (`CachedImages`): some of the images, to look at.
        reached (`dict[int, Position]`): where the streams of this process go on, as far as their batches were used.
    """

    def __init__(self, images: ImageStream, config: TrainConfig, channels: int):
        self.images, self.config, self.num_shards = images, config, images.num_shards
        self.to_array_args = (config.resolution, channels, config.center_crop)
        self.probe = stack_images(images, config, channels, show_progress=False)
        self.in_flight = InFlightItems(config.dataloader_num_workers)

    def __len__(self) -> int:
        if not self.images.num_images:
            raise TypeError("The data set does not say how many images it has.")
        return self.images.num_images

    def divide(self, rank: int, world_size: int) -> None:
        """Take the share of one process of several. Called before anything else."""
        self.rank, self.world_size = rank, world_size
        num_streams = world_size * max(1, self.config.dataloader_num_workers)
        if self.num_shards < num_streams:
            logger.warning(
                "The data set has %d shards for %d streams: each of them reads all of it, and decodes its own part.",
                self.num_shards, num_streams,
            )  # fmt: skip
        self.positions, self.reached, self.batches = [Position()] * num_streams, {}, 0

    def __iter__(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        turn = self.batches + self.rank + (worker.id * self.world_size if worker is not None else 0)
        stream = turn % len(self.positions)
        blocks = shuffled_blocks(
            self, self.config.shuffle_buffer_size, self.config.seed, stream, len(self.positions), self.positions[stream]
        )
        arrays, labels, unreadable = [], [], []
        for position, block in blocks:
            for done, image in enumerate(block[position.done :], position.done + 1):
                self.in_flight.record(image.name)
                try:
                    arrays.append(to_array(open_encoded(image.content), *self.to_array_args))
                    labels.append(image.class_label)
                except Exception:  # whatever a decoder raises, the image cannot be used
                    unreadable.append(image.name)
                    if not arrays and len(unreadable) >= MIN_SEEN:
                        raise UserError(
                            f"None of {MIN_SEEN} images in a row could be read: {unreadable[0]}, …"
                        ) from None
                if len(arrays) == self.config.train_batch_size:
                    self.in_flight.record("")
                    reached = (stream, position._replace(done=done))
                    yield ImageBatch(torch.from_numpy(np.stack(arrays)), torch.tensor(labels), unreadable, reached)
                    arrays, labels, unreadable = [], [], []

    def rows(self, shard: int, first: int) -> Iterator[EncodedImage]:
        self.in_flight.record(f"shard {shard}")
        return self.images.rows(shard, first)

    def name_held(self, item: str) -> str:
        return item

    def used(self, batch: ImageBatch) -> None:
        """Take note that this process, as all others, has used its next batch."""
        stream, position = batch.reached
        self.reached[stream] = Position(*position)
        self.batches += self.world_size

    def state_dict(self, reached: list[dict[int, Position]]) -> dict[str, Any]:
        """The place in the data, for JSON, from what all processes have reached."""
        positions = list(self.positions)
        for stream, position in (item for part in reached for item in part.items()):
            positions[stream] = position
        return {
            "num_shards": self.num_shards,
            "batch_size": self.config.train_batch_size,
            "batches": self.batches,
            "positions": positions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises UserError if the data is divided otherwise now."""
        if state["num_shards"] != self.num_shards:
            raise UserError(
                f"The data set has {self.num_shards} shards, but had {state['num_shards']} when the checkpoint was "
                "written: it is not the same data. Start anew with --overwrite_output_dir."
            )
        if state["batch_size"] != self.config.train_batch_size:
            raise UserError(
                f"--train_batch_size {self.config.train_batch_size}: streams that were read in batches of "
                f"{state['batch_size']} can only go on in such."
            )
        if len(state["positions"]) != len(self.positions):
            raise UserError(
                f"The checkpoint holds the places of {len(state['positions'])} streams, one for each worker of each "
                f"process, but there are {self.world_size} processes with --dataloader_num_workers "
                f"{self.config.dataloader_num_workers}: choose them so that there are as many (0 workers count as 1)."
            )
        self.batches, self.positions = state["batches"], [Position(*position) for position in state["positions"]]


def num_images(dataset: Dataset) -> int | None:
    """How many images there are, where that is known."""
    return length_hint(dataset) or None


def raise_for_dead_worker(dataset: Dataset, error: RuntimeError) -> None:
    """If it is torch's word that a worker died, raises UserError with what that had in its hands."""
    if "DataLoader worker" in str(error):
        held = [dataset.name_held(item) for item in dataset.in_flight.of_dead_workers(error)]
        raise UserError(
            f"{str(error).rstrip(' .')}. It held {', '.join(held) or 'no image'}. Did the machine run out of memory "
            "(then lower --dataloader_num_workers), or is that damaged? Go on with --resume_from_checkpoint latest."
        ) from error


def fingerprint(dataset: Dataset) -> str:
    """Names the data by its labels, and by up to 1,000 of its images as they are decoded."""
    digest = hashlib.blake2b(dataset.class_labels.numpy().tobytes(), digest_size=8)
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), 1000)).astype(int).tolist():
        image = dataset.__getitems__([index]).images
        digest.update(str(tuple(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()


def identity_collate(batch: ImageBatch) -> ImageBatch:
    """The collate function: `__getitems__` has made the batch already. (A function, so that workers can be spawned.)"""
    return batch
