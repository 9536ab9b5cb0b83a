"""Serve decoded images as datasets: cached in memory, decoded lazily, or streamed."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from diffusers_cfg.config import UserError
from diffusers_cfg.data.columns import open_encoded
from diffusers_cfg.data.decoding import COLOR_LOST, ColorCheck, is_colored, to_array, to_float
from diffusers_cfg.data.images import ImageSubset, LabelledImages, StackedImages
from diffusers_cfg.data.labels import UNLABELLED, listed
from diffusers_cfg.data.order import Position, shuffled_blocks
from diffusers_cfg.data.sources import EncodedImage, ImageStream
from diffusers_cfg.data.unreadable import check_unreadable, none_readable_message
from diffusers_cfg.data.workers import InFlightItems
from diffusers_cfg.settings import DataConfig, TrainConfig

logger = logging.getLogger(__name__)

# Datasets up to this size in uint8 are decoded once and kept in memory; larger ones are decoded lazily.
MAX_CACHED_BYTES = 2 * 1024**3
# Number of images to read before the fraction of unreadable ones is checked.
MIN_SEEN = 1000

BatchT = TypeVar("BatchT")


class ImageBatch(NamedTuple):
    """A batch of decoded images."""

    images: torch.Tensor  # (batch, channels, resolution, resolution), uint8
    class_labels: torch.Tensor  # (batch,), int64; -1 means unlabelled
    unreadable: list[str]  # names of images that could not be read and were skipped or replaced
    reached: tuple[int, Position] | None = None  # for a stream: its index, and its position after the batch

    @property
    def images_rgb(self) -> torch.Tensor:
        """The images with three channels, `(batch, 3, resolution, resolution)`, uint8."""
        return self.images.expand(-1, 3, -1, -1)

    def training_input(self, device: torch.device, flip: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the images as float32 in [-1, 1].

        Args:
            device (`torch.device`): the device to move the images to.
            flip (`torch.Tensor` of shape `(batch,)`, *optional*): bool, on `device`; which images to flip
                horizontally.
        """
        images = to_float(self.images.to(device, non_blocking=True))
        return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def training_dataset(
    images: LabelledImages, config: DataConfig, channels: int, show_progress: bool
) -> "CachedImages | LazyImages | StreamedImages":
    """
    Return a dataset that yields `ImageBatch`es.

    Args:
        images (`LabelledImages`): the images.
        config (`DataConfig`): the resolution and the crop. A stream needs a `TrainConfig`.
        channels (`int`): 1 for grayscale, 3 for RGB.
        show_progress (`bool`): whether to show a progress bar while images are decoded into memory.

    Returns:
        `StreamedImages` for a stream, `CachedImages` if the images fit into `MAX_CACHED_BYTES`, otherwise `LazyImages`.

    Raises:
        UserError: if too many images cannot be read.
    """
    if isinstance(images, ImageStream):
        assert isinstance(config, TrainConfig)
        return StreamedImages(images, config, channels)
    if len(images) * channels * config.resolution**2 <= MAX_CACHED_BYTES:
        if isinstance(images, StackedImages):
            return combine_channels(images, config, show_progress)
        return stack_images(images, config, channels, show_progress)
    return LazyImages(images, config.resolution, channels, config.center_crop, config.dataloader_num_workers)


def stack_images(images: LabelledImages, config: DataConfig, channels: int, show_progress: bool) -> "CachedImages":
    """
    Decode all images into memory. Unreadable images are logged and skipped.

    Raises:
        UserError: if all images, or more than `config.max_unreadable_fraction` of them, cannot be read.
    """

    colored = []

    def decode(index: int) -> np.ndarray | None:
        try:
            image = images.open_image(index)
            if channels == 1 and is_colored(image):
                colored.append(images.name_image(index))
            return to_array(image, config.resolution, channels, config.center_crop)
        except Exception as error:  # decoders raise exceptions of many types
            logger.warning("Skipped unreadable image %s: %s", images.name_image(index), error)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(decode, range(len(images)))
        disable = None if show_progress else True  # None hides the bar unless in a terminal
        arrays = list(tqdm(decoded, "Decoding", len(images), unit="image", leave=False, disable=disable))
    unreadable = [images.name_image(index) for index, array in enumerate(arrays) if array is None]
    num_files = len(images) + len(images.left_out)
    check_unreadable([*unreadable, *images.left_out], num_files, config.max_unreadable_fraction)
    readable = [index for index, array in enumerate(arrays) if array is not None]
    if not readable:
        raise UserError(none_readable_message(len(images), unreadable[0]))
    class_labels = images.class_labels[readable]
    lost = np.setdiff1d(images.class_labels, [*class_labels, UNLABELLED]).tolist()
    if lost and not isinstance(images, ImageStream):  # of which these are only the first images
        names = listed([images.id2label[class_id] for class_id in lost])
        raise UserError(f"No image of these classes can be read: {names}. Repair the images, or remove the classes.")
    if colored:
        logger.warning("%d %s: %s", len(colored), COLOR_LOST, listed(sorted(colored)))
    return CachedImages(
        torch.from_numpy(np.stack([array for array in arrays if array is not None])), torch.from_numpy(class_labels)
    )


def combine_channels(images: StackedImages, config: DataConfig, show_progress: bool) -> "CachedImages":
    """
    Return stacked images in memory, and decode each of their channels once instead of for each stack. If images cannot
    be read, the stacks are made of the others. Raise UserError as `stack_images` does.
    """
    used, positions = np.unique(images.indices, return_inverse=True)
    channels = stack_images(ImageSubset(images.images, used), config, 1, show_progress).images[:, 0]
    chosen = torch.from_numpy(positions.reshape(images.indices.shape)) % len(channels)
    return CachedImages(channels[chosen], torch.from_numpy(images.class_labels))


class CachedImages(Dataset):
    """
    Images in memory. A `DataLoader` fetches a whole batch with `__getitems__`.

    Args:
        images (`torch.Tensor` of shape `(images, channels, resolution, resolution)`): uint8.
        class_labels (`torch.Tensor` of shape `(images,)`): int64; -1 means unlabelled.
    """

    def __init__(self, images: torch.Tensor, class_labels: torch.Tensor) -> None:
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
        resolution (`int`), channels (`int`), center_crop (`bool`): arguments of `to_array`.
        num_workers (`int`): number of `DataLoader` workers.
    """

    def __init__(
        self, images: LabelledImages, resolution: int, channels: int, center_crop: bool, num_workers: int = 0
    ) -> None:
        self.images, self.to_array_args = images, (resolution, channels, center_crop)
        self.check_color = ColorCheck(channels)
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
                image = self.images.open_image(candidate)
                self.check_color(image, partial(self.images.name_image, candidate))
                return to_array(image, *self.to_array_args), int(self.class_labels[candidate])
            except Exception:  # decoders raise exceptions of many types
                unreadable.append(self.images.name_image(candidate))
        raise UserError(none_readable_message(len(self), unreadable[0]))

    def name_item(self, item: str) -> str:
        """Return a human-readable name for an item that a worker was processing."""
        return self.images.name_image(int(item))


class StreamedImages(IterableDataset):
    """
    An endless stream of batches that are read and decoded lazily. Unreadable images are skipped.

    Each worker of each process reads its own stream. The n streams alternate: batch i of the run, counted over all
    processes, comes from stream i mod n. Call `divide` before reading.

    Args:
        images (`ImageStream`): the images.
        config (`TrainConfig`): the resolution, the crop, the batch size, the seed and the number of workers.
        channels (`int`): 1 for grayscale, 3 for RGB.

    Attributes:
        probe (`CachedImages`): the first images, for inspecting the data.
        reached (`dict[int, Position]`): position of each stream of this process after its last used batch.
    """

    def __init__(self, images: ImageStream, config: TrainConfig, channels: int) -> None:
        self.images, self.config, self.num_shards = images, config, images.num_shards
        self.to_array_args, self.check_color = (config.resolution, channels, config.center_crop), ColorCheck(channels)
        self.probe = stack_images(images, config, channels, show_progress=False)
        self.in_flight = InFlightItems(config.dataloader_num_workers)

    def divide(self, rank: int, world_size: int) -> None:
        """Assign streams to process `rank` of `world_size` processes, at the start of the data."""
        self.rank, self.world_size = rank, world_size
        num_streams = world_size * max(1, self.config.dataloader_num_workers)
        if self.num_shards < num_streams:
            logger.warning(
                "The dataset has %d shards for %d streams, so every stream reads all shards and decodes its share of "
                "the rows. Lower --dataloader_num_workers to read less.",
                self.num_shards,
                num_streams,
            )
        self.positions, self.reached, self.batches = [Position()] * num_streams, {}, 0

    def __iter__(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        batch_index = self.batches + self.rank + (worker.id * self.world_size if worker is not None else 0)
        stream = batch_index % len(self.positions)
        blocks = shuffled_blocks(
            self, self.config.shuffle_buffer_size, self.config.seed, stream, len(self.positions), self.positions[stream]
        )
        arrays, labels, unreadable = [], [], []
        for position, block in blocks:
            for done, image in enumerate(block[position.done :], position.done + 1):
                self.in_flight.record(image.name)
                try:
                    opened = open_encoded(image.content)
                    self.check_color(opened, partial(str, image.name))
                    arrays.append(to_array(opened, *self.to_array_args))
                    labels.append(image.class_label)
                except Exception:  # decoders raise exceptions of many types
                    unreadable.append(image.name)
                    if not arrays and len(unreadable) >= MIN_SEEN:
                        raise UserError(
                            f"{MIN_SEEN} images in a row cannot be read, starting with {unreadable[0]}. Check that "
                            "PIL can open them."
                        ) from None
                if len(arrays) == self.config.train_batch_size:
                    self.in_flight.record("")
                    reached = (stream, position._replace(done=done))
                    yield ImageBatch(torch.from_numpy(np.stack(arrays)), torch.tensor(labels), unreadable, reached)
                    arrays, labels, unreadable = [], [], []

    def rows(self, shard: int, first: int) -> Iterator[EncodedImage]:
        """Yield the images of a shard, starting at row `first`."""
        self.in_flight.record(f"shard {shard}")
        return self.images.rows(shard, first)

    def name_item(self, item: str) -> str:
        """Return a human-readable name for an item that a worker was processing."""
        return item

    def mark_used(self, batch: ImageBatch) -> None:
        """Record that this process has used a batch. Every process must call it for each of its batches."""
        assert batch.reached is not None
        stream, position = batch.reached
        self.reached[stream] = Position(*position)
        self.batches += self.world_size

    def state_dict(self, reached: list[dict[int, Position]]) -> dict[str, Any]:
        """
        Return the positions of all streams, JSON-serializable.

        Args:
            reached (`list[dict[int, Position]]`): the `reached` attribute of every process.
        """
        positions = list(self.positions)
        for stream, position in (item for by_stream in reached for item in by_stream.items()):
            positions[stream] = position
        return {
            "num_shards": self.num_shards,
            "batch_size": self.config.train_batch_size,
            "batches": self.batches,
            "positions": positions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the positions in a `state_dict`. Raise UserError if the data or the streams have changed."""
        if state["num_shards"] != self.num_shards:
            raise UserError(
                f"The dataset has {self.num_shards} shards, but had {state['num_shards']} when the checkpoint was "
                "written: the data has changed. Start from the beginning with --overwrite_output_dir."
            )
        if state["batch_size"] != self.config.train_batch_size:
            raise UserError(
                f"--train_batch_size is {self.config.train_batch_size}, but the checkpoint's streams were read in "
                f"batches of {state['batch_size']}. Resume with --train_batch_size {state['batch_size']}."
            )
        if len(state["positions"]) != len(self.positions):
            raise UserError(
                f"The checkpoint has the positions of {len(state['positions'])} streams, one for each worker of each "
                f"process, but this run has {self.world_size} processes with --dataloader_num_workers "
                f"{self.config.dataloader_num_workers}. Choose both so that their product is "
                f"{len(state['positions'])} (0 workers count as 1)."
            )
        self.batches, self.positions = state["batches"], [Position(*position) for position in state["positions"]]


def num_images(dataset: Dataset) -> int | None:
    """Return the number of images in a dataset, or None for a stream of unknown length."""
    if isinstance(dataset, StreamedImages):
        return dataset.images.num_images
    assert isinstance(dataset, Sized)
    return len(dataset)


def raise_for_dead_worker(dataset: Dataset, error: RuntimeError) -> None:
    """Raise UserError naming the image if `error` reports a dead DataLoader worker. Otherwise do nothing."""
    if "DataLoader worker (pid" in str(error):  # other errors inside a worker say "DataLoader worker process"
        items = [dataset.name_item(item) for item in dataset.in_flight.of_dead_workers(error)]
        raise UserError(
            f"{str(error).rstrip(' .')}. It was reading {', '.join(items) or 'no image'}. If the machine ran out of "
            "memory, lower --dataloader_num_workers; if the image is damaged, remove it. Then resume with "
            "--resume_from_checkpoint latest."
        ) from error


def fingerprint(dataset: Dataset) -> str:
    """
    Return a hash that identifies a dataset by its labels and all of its images.

    The hash covers the pixels of images in memory. If images are decoded lazily, it covers the names, sizes and times
    of their files, or the version of the dataset that contains them, and how they are decoded.

    Args:
        dataset (`Dataset`): `CachedImages` or `LazyImages`.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.blake2b(dataset.class_labels.contiguous().numpy(), digest_size=8)
    if isinstance(dataset, CachedImages):
        digest.update(str(tuple(dataset.images.shape)).encode())
        digest.update(dataset.images.contiguous().numpy().data)
    else:
        assert isinstance(dataset, LazyImages)
        digest.update(f"{dataset.to_array_args} {dataset.images.fingerprint()}".encode())
    return digest.hexdigest()


def describe_data(images: LabelledImages, dataset: Dataset) -> dict[str, Any]:
    """
    Describe the data of a run, for comparison with the data of a checkpoint.

    Args:
        images (`LabelledImages`): the images before decoding.
        dataset (`Dataset`): their `training_dataset`, before its latents are cached.

    Returns:
        A dictionary for JSON: `class_names` ordered by id, `num_images` (None for a stream of unknown length),
        `fingerprint` (None for a stream) and `num_shards` (None unless the data is streamed).
    """
    return {
        "class_names": [name for _, name in sorted(images.id2label.items())],
        "num_images": num_images(dataset),
        "fingerprint": None if isinstance(dataset, StreamedImages) else fingerprint(dataset),
        "num_shards": dataset.num_shards if isinstance(dataset, StreamedImages) else None,
    }


def identity_collate(batch: BatchT) -> BatchT:
    """Return a batch unchanged, since `__getitems__` collates it. Spawned workers could not unpickle a lambda."""
    return batch
