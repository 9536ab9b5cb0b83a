"""Datasets of decoded images: in memory, decoded lazily, or streamed."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
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

# Data of at most this size as uint8 is decoded once and kept in memory; larger data is decoded lazily.
MAX_CACHED_BYTES = 2 * 1024**3
# Number of images from which on the share of unreadable ones is judged.
MIN_SEEN = 1000
# Number of images by which lazily decoded data is identified.
FINGERPRINT_SIZE = 1000


class ImageBatch(NamedTuple):
    """A batch of decoded images."""

    images: torch.Tensor  # (batch, channels, resolution, resolution), uint8
    class_labels: torch.Tensor  # (batch,), int64; -1 is unlabelled
    unreadable: list[str]  # names of the images that could not be read, and were replaced by others
    reached: tuple[int, Position] | None = None  # of a stream: its number, and its position after the batch

    @property
    def images_rgb(self) -> torch.Tensor:
        """The images with three channels, `(batch, 3, resolution, resolution)`, uint8."""
        return self.images.expand(-1, 3, -1, -1)

    def training_input(self, device: torch.device, flip: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the images as float32 in [-1, 1].

        Args:
            device (`torch.device`): where to put them.
            flip (`torch.Tensor` of shape `(batch,)`, *optional*): bool, on that device; the images to flip
                horizontally.
        """
        images = to_float(self.images.to(device, non_blocking=True))
        return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def training_dataset(images: LabelledImages, config: DataConfig, channels: int, show_progress: bool) -> Dataset:
    """
    Return a dataset that gives `ImageBatch`es.

    Args:
        images (`LabelledImages`): the images.
        config (`DataConfig`): the resolution and the crop. For a stream, a `TrainConfig`.
        channels (`int`): 1 for grayscale, 3 for RGB.
        show_progress (`bool`): whether to show a progress bar while images are decoded into memory.

    Returns:
        `StreamedImages` for a stream, else `CachedImages` if they fit into `MAX_CACHED_BYTES`, else `LazyImages`.

    Raises:
        UserError: too many images cannot be read.
    """
    if isinstance(images, ImageStream):
        return StreamedImages(images, config, channels)
    if len(images) * channels * config.resolution**2 <= MAX_CACHED_BYTES:
        return stack_images(images, config, channels, show_progress)
    return LazyImages(images, config.resolution, channels, config.center_crop, config.dataloader_num_workers)


def stack_images(images: LabelledImages, config: DataConfig, channels: int, show_progress: bool) -> "CachedImages":
    """
    Decode all images into memory. Unreadable ones are logged and left out.

    Raises:
        UserError: more than `config.max_unreadable_fraction` of them, or all, cannot be read.
    """

    def decode(index: int) -> np.ndarray | None:
        try:
            return to_array(images.open_image(index), config.resolution, channels, config.center_crop)
        except Exception as error:  # whatever a decoder raises, the image cannot be used
            logger.warning("Skipped an image that cannot be read: %s: %s", images.name_image(index), error)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(decode, range(len(images)))
        disable = None if show_progress else True  # for None, tqdm shows nothing unless the output is a terminal
        arrays = list(tqdm(decoded, "Decoding", len(images), unit="image", leave=False, disable=disable))
    unreadable = [images.name_image(index) for index, array in enumerate(arrays) if array is None]
    check_unreadable(unreadable, len(images), config.max_unreadable_fraction)
    readable = [index for index, array in enumerate(arrays) if array is not None]
    if not readable:
        raise UserError(f"None of the {len(images)} images can be read: {unreadable[0]}, …")
    return CachedImages(
        torch.from_numpy(np.stack([arrays[index] for index in readable])),
        torch.from_numpy(images.class_labels[readable]),
    )


def check_unreadable(unreadable: Iterable[str], num_images: int, max_unreadable_fraction: float) -> None:
    """Raise UserError if more than a fraction of the images cannot be read."""
    unreadable = list(unreadable)
    if len(unreadable) > max_unreadable_fraction * num_images:
        raise UserError(
            f"{len(unreadable)} of {num_images} images cannot be read, more than --max_unreadable_fraction "
            f"{max_unreadable_fraction} allows: {', '.join(unreadable[:5])}{', …' if len(unreadable) > 5 else ''}"
        )


def warn_of_unreadable(unreadable: set[str]) -> None:
    """Log how many images could not be read, and the names of the first of them. Does nothing if all could be."""
    if unreadable:
        logger.warning("%d images could not be read: %s", len(unreadable), ", ".join(sorted(unreadable)[:20]))


class CachedImages(Dataset):
    """
    Images in memory. A `DataLoader` fetches a whole batch by `__getitems__`.

    Args:
        images (`torch.Tensor` of shape `(images, channels, resolution, resolution)`): uint8.
        class_labels (`torch.Tensor` of shape `(images,)`): int64; -1 is unlabelled.
    """

    def __init__(self, images: torch.Tensor, class_labels: torch.Tensor):
        self.images, self.class_labels = images, class_labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        return ImageBatch(self.images[indices], self.class_labels[indices], [])


class LazyImages(Dataset):
    """
    Images that are decoded when they are fetched. An unreadable image is replaced by the next readable one.

    Args:
        images (`LabelledImages`): the images.
        resolution (`int`), channels (`int`), center_crop (`bool`): of the decoded images, see `to_array`.
        num_workers (`int`): number of workers of the `DataLoader`.
    """

    def __init__(self, images: LabelledImages, resolution: int, channels: int, center_crop: bool, num_workers: int = 0):
        self.images, self.to_array_args = images, (resolution, channels, center_crop)
        self.in_flight = InFlightItems(num_workers)
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
        raise UserError(f"None of the {len(self)} images can be read: {unreadable[0]}, …")

    def name_item(self, item: str) -> str:
        """Return a human-readable name for an item that a worker was processing."""
        return self.images.name_image(int(item))


class StreamedImages(IterableDataset):
    """
    Endless batches of images that are read and decoded lazily. An unreadable image is left out.

    Each worker of each process reads its own stream, and the streams take turns: batch i of the run, counted over all
    processes, comes from stream i mod n of the n streams. Call `divide` before anything else.

    Args:
        images (`ImageStream`): the images.
        config (`TrainConfig`): the resolution, the crop, the batch size, the seed and the number of workers.
        channels (`int`): 1 for grayscale, 3 for RGB.

    Attributes:
        probe (`CachedImages`): the first images, to inspect the data.
        reached (`dict[int, Position]`): positions of the streams of this process after the batches that were used.
    """

    def __init__(self, images: ImageStream, config: TrainConfig, channels: int):
        self.images, self.config, self.num_shards = images, config, images.num_shards
        self.to_array_args = (config.resolution, channels, config.center_crop)
        self.probe = stack_images(images, config, channels, show_progress=False)
        self.in_flight = InFlightItems(config.dataloader_num_workers)

    def divide(self, rank: int, world_size: int) -> None:
        """Take the share of process `rank` of `world_size` processes, from the start of the data."""
        self.rank, self.world_size = rank, world_size
        num_streams = world_size * max(1, self.config.dataloader_num_workers)
        if self.num_shards < num_streams:
            logger.warning(
                "The dataset has %d shards for %d streams: each stream reads all of it, and decodes its own part.",
                self.num_shards,
                num_streams,
            )
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
        """Yield the images of a shard, from its row `first` on."""
        self.in_flight.record(f"shard {shard}")
        return self.images.rows(shard, first)

    def name_item(self, item: str) -> str:
        """Return a human-readable name for an item that a worker was processing."""
        return item

    def used(self, batch: ImageBatch) -> None:
        """Record that this process has used its next batch. All processes call it for each of their batches."""
        stream, position = batch.reached
        self.reached[stream] = Position(*position)
        self.batches += self.world_size

    def state_dict(self, reached: list[dict[int, Position]]) -> dict[str, Any]:
        """
        Return the positions of all streams, as JSON can store them.

        Args:
            reached (`list[dict[int, Position]]`): the attribute `reached` of each process.
        """
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
        """Resume from the positions of a `state_dict`. Raises UserError if the data or its division has changed."""
        if state["num_shards"] != self.num_shards:
            raise UserError(
                f"The dataset has {self.num_shards} shards, but had {state['num_shards']} when the checkpoint was "
                "written, so it is not the same data. Train from the beginning with --overwrite_output_dir."
            )
        if state["batch_size"] != self.config.train_batch_size:
            raise UserError(
                f"--train_batch_size is {self.config.train_batch_size}, but the checkpoint's streams were read in "
                f"batches of {state['batch_size']}: resume with --train_batch_size {state['batch_size']}."
            )
        if len(state["positions"]) != len(self.positions):
            raise UserError(
                f"The checkpoint holds the positions of {len(state['positions'])} streams, one for each worker of each "
                f"process, but there are {self.world_size} processes with --dataloader_num_workers "
                f"{self.config.dataloader_num_workers}: choose both so that their product is the same (0 workers count "
                "as 1)."
            )
        self.batches, self.positions = state["batches"], [Position(*position) for position in state["positions"]]


def num_images(dataset: Dataset) -> int | None:
    """Return the number of images of a dataset, or None for a stream that does not know it."""
    return dataset.images.num_images if isinstance(dataset, StreamedImages) else len(dataset)


def raise_for_dead_worker(dataset: Dataset, error: RuntimeError) -> None:
    """Raise `UserError` naming the image if `error` reports a dead DataLoader worker. Else do nothing."""
    if "DataLoader worker (pid" in str(error):  # other errors inside a worker say "DataLoader worker process"
        items = [dataset.name_item(item) for item in dataset.in_flight.of_dead_workers(error)]
        raise UserError(
            f"{str(error).rstrip(' .')}. It was reading {', '.join(items) or 'no image'}. If the machine ran out of "
            "memory, lower --dataloader_num_workers; if the image is damaged, remove it. Then resume with "
            "--resume_from_checkpoint latest."
        ) from error


def fingerprint(dataset: Dataset) -> str:
    """
    Return a hash that identifies a dataset by its labels and decoded images.

    Images in memory are all hashed; of lazily decoded ones, `FINGERPRINT_SIZE` at equal distances.

    Args:
        dataset (`Dataset`): `CachedImages` or `LazyImages`.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.blake2b(dataset.class_labels.contiguous().numpy(), digest_size=8)
    if isinstance(dataset, CachedImages):
        batches = [dataset.images]
    else:
        chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), FINGERPRINT_SIZE)).astype(int).tolist()
        batches = (dataset.__getitems__([index]).images for index in chosen)
    for images in batches:
        digest.update(str(tuple(images.shape)).encode())
        digest.update(images.contiguous().numpy())
    return digest.hexdigest()


def describe_data(images: LabelledImages, dataset: Dataset) -> dict[str, Any]:
    """
    Describe the data of a run, to compare it with that of a checkpoint.

    Args:
        images (`LabelledImages`): the images before they were decoded.
        dataset (`Dataset`): their `training_dataset`, before its latents are cached.

    Returns:
        A dictionary for JSON: `class_names` in the order of their ids, `num_images` or None if a stream does not know
        it, `fingerprint` or None for a stream, `num_shards` or None if the data is not streamed.
    """
    streamed = isinstance(dataset, StreamedImages)
    return {
        "class_names": [name for _, name in sorted(images.id2label.items())],
        "num_images": num_images(dataset),
        "fingerprint": None if streamed else fingerprint(dataset),
        "num_shards": dataset.num_shards if streamed else None,
    }


def identity_collate(batch: ImageBatch) -> ImageBatch:
    """Return a batch that `__getitems__` has made already. It is a function so that workers can be spawned."""
    return batch
