"""Labelled images, from a data set of the Hub, a folder of class folders, or scikit-learn's digits."""

import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from operator import length_hint
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from config import DataConfig, TrainConfig, UserError
from PIL import Image, ImageOps
from streaming import Position, shuffled_blocks
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from workers import Hands

logger = logging.getLogger(__name__)

UNLABELLED = -1
# Data that takes no more than this as uint8 is decoded once and kept; larger data is decoded as it is used.
MAX_CACHED_BYTES = 2 * 1024**3
# A data set of fewer files is streamed by the parts of its files, where their format has parts.
MANY_SHARDS = 128
# Of a stream so many images are looked at before it is used,
PROBE_SIZE = 256
# and from so many on its share of unreadable images is judged.
MIN_SEEN = 1000
# PIL warns of an image of more pixels than its limit, and refuses one of more than twice as many. That is enough.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Batch(NamedTuple):
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


class LabelledImages:
    """
    What there is to train on, before it is decoded.

    Args:
        class_labels (`numpy.ndarray` of shape `(images,)`): int64, `0 … num_classes - 1`, or -1 for unlabelled.
        id2label (`dict[int, str]`): name of each class.
        present (`numpy.ndarray`, *optional*): the classes that there are; by default those of `class_labels`.

    Raises:
        UserError: there are fewer than two classes.
    """

    def __init__(self, class_labels: np.ndarray, id2label: dict[int, str], present: np.ndarray | None = None):
        self.class_labels, self.id2label = class_labels, id2label
        if present is None:
            present = np.unique(class_labels[class_labels != UNLABELLED])
        if len(present) < 2:
            raise UserError(
                f"Class-conditional training needs at least two classes, but the data has {len(present)} "
                f"{[id2label[i] for i in present.tolist()]}: check --label_column, or that each class has a folder of "
                "its own."
            )

    def open_image(self, index: int) -> Image.Image:
        """The image at an index, as PIL opens it. May raise anything."""
        raise NotImplementedError

    def name_image(self, index: int) -> str:
        """What to call it in a message."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.class_labels)

    @property
    def channels(self) -> int:
        """1 if the images are grey, else 3, as a look at some of them says."""
        for index in np.linspace(0, len(self) - 1, min(len(self), 32)).astype(int).tolist():
            try:
                if normalise(self.open_image(index)).mode == "RGB":
                    return 3
            except Exception:  # unreadable: counted when it is decoded
                continue
        return 1


class Digits(LabelledImages):
    """scikit-learn's 1,797 handwritten digits, 8×8, grey; they are part of that package."""

    def __init__(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = (digits.images * (255 / 16)).round().astype(np.uint8)
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        super().__init__(digits.target.astype(np.int64), dict(enumerate(names)))

    def open_image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name_image(self, index: int) -> str:
        return f"digit {index}"


class DatasetImages(LabelledImages):
    """The images of a `datasets.Dataset`, its labels made ids. Raises UserError for a column that does not fit."""

    def __init__(self, dataset, image_column: str, label_column: str):
        from datasets import Image as EncodedImage

        check_columns(dataset, image_column, label_column)
        names = getattr(dataset.features[label_column], "names", None)
        super().__init__(*class_ids(dataset[label_column][:], names))
        self.column = image_column
        self.encoded = dataset.select_columns(image_column).cast_column(image_column, EncodedImage(decode=False))

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.encoded[index][self.column])

    def name_image(self, index: int) -> str:
        path = self.encoded[index][self.column]["path"]
        return f"row {index}" + (f" ({path})" if path else "")


class EncodedImage(NamedTuple):
    name: str
    content: dict[str, Any]  # as `datasets` has it
    class_label: int


class ImageStream(LabelledImages):
    """
    A `datasets.IterableDataset`, which is read as it is used. Some of its first images are what there is to look at.
    Raises UserError for a column that does not fit, or labels whose names are not known beforehand.
    """

    def __init__(self, dataset, config: DataConfig):
        check_columns(dataset, config.image_column, config.label_column)
        names = getattr(dataset.features[config.label_column], "names", None)
        if names is None:
            raise UserError(
                f"--streaming has to know the classes beforehand, but the column {config.label_column!r} holds plain "
                "values: leave out --streaming, or make it a ClassLabel (with cast_column, or under `dataset_info` in "
                "the README.md of the data set)."
            )
        self.columns, self.num_classes = [config.image_column, config.label_column], len(names)
        dataset = dataset.decode(False).select_columns(self.columns)
        self.dataset = dataset if dataset.num_shards >= MANY_SHARDS else dataset.reshard()
        self.num_shards = self.dataset.num_shards
        split = (dataset.info.splits or {}).get(str(dataset.split))
        self.num_images = (split.num_examples if split is not None else None) or 0  # where it is not known

        _, first = next(shuffled_blocks(self, config.shuffle_buffer_size, 0, 0, 1, Position()))
        if len({image.class_label for image in first}) == 1 < len(first):
            logger.warning(
                "The first %d images are all of one class: the data seems to be sorted, and training will see a class "
                "at a time. Raise --shuffle_buffer_size, or leave out --streaming.",
                len(first),
            )
        self.first = first[:PROBE_SIZE]
        class_labels = np.array([image.class_label for image in self.first])
        super().__init__(class_labels, dict(enumerate(names)), present=np.arange(len(names)))

    def rows(self, shard: int, first: int) -> Iterator[EncodedImage]:
        """The images of a shard from a row on, not decoded yet."""
        batches = self.dataset.shard(self.num_shards, shard).skip(first).iter(batch_size=100)
        pairs = (pair for batch in batches for pair in zip(*(batch[name] for name in self.columns), strict=True))
        for row, (content, label) in enumerate(pairs, first):
            name = f"row {row} of shard {shard}" + (f" ({content['path']})" if content and content["path"] else "")
            label = UNLABELLED if label is None else label
            if not UNLABELLED <= label < self.num_classes:
                raise UserError(f"The label of {name} is {label}, but there are {self.num_classes} names.")
            yield EncodedImage(name, content, label)

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.first[index].content)

    def name_image(self, index: int) -> str:
        return self.first[index].name


def check_columns(dataset, image_column: str, label_column: str) -> None:
    """Raises UserError if a data set has no such columns, or the first is not one of images."""
    kinds = {name: type(feature).__name__ for name, feature in (dataset.features or {}).items()}
    for flag, column in (("--image_column", image_column), ("--label_column", label_column)):
        if column not in kinds:
            raise UserError(f"The data set has no column {column!r}: {flag} can be one of {sorted(kinds)}.")
    if kinds[image_column] != "Image":
        raise UserError(
            f"The column {image_column!r} holds {kinds[image_column]}, not images: --image_column can be one of "
            f"{[name for name, kind in kinds.items() if kind == 'Image']}."
        )


def open_encoded(content: dict[str, Any]) -> Image.Image:
    """Open an image as `datasets` has it: its bytes, or the path of its file, which may be on the Hub."""
    path, data = content["path"], content["bytes"]
    if data is None and "://" in path:
        from datasets import Image as EncodedImage

        return EncodedImage().decode_example(content)
    return Image.open(path if data is None else io.BytesIO(data))


# ----- where they come from -----


def load_labelled_images(config: DataConfig) -> LabelledImages:
    """The data that the settings name. Raises UserError if it cannot be found or does not have what training needs."""
    if config.train_data_dir is not None:
        dataset = load_class_folders(config)
    elif config.dataset_name is not None:
        dataset = load_dataset(config)
    else:
        return Digits()
    if config.streaming:
        with named_errors(config.dataset_name or config.train_data_dir):
            return ImageStream(dataset, config)
    return DatasetImages(dataset, config.image_column, config.label_column)


def load_class_folders(config: DataConfig):
    import datasets

    folder = Path(config.train_data_dir)
    if not folder.is_dir():
        raise UserError(f"--train_data_dir {folder} is not a folder.")
    if not any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f"--train_data_dir {folder} has no folders in it, but each class needs a folder of its own.")
    with named_errors(folder):
        return datasets.load_dataset(
            "imagefolder", data_dir=str(folder), split=config.dataset_split, cache_dir=config.cache_dir,
            streaming=config.streaming,
        )  # fmt: skip


def load_dataset(config: DataConfig):
    import datasets

    source = config.dataset_name
    if config.streaming and any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise UserError(f"--streaming: {source} was written by save_to_disk, and is read from there without it.")
    with named_errors(source):
        if (Path(source) / "dataset_dict.json").is_file():  # written by save_to_disk
            return datasets.load_from_disk(source)[config.dataset_split]
        if (Path(source) / "state.json").is_file():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(
            source, config.dataset_config_name, split=config.dataset_split, cache_dir=config.cache_dir,
            streaming=config.streaming,
        )  # fmt: skip


@contextmanager
def named_errors(source: str | Path) -> Iterator[None]:
    """What goes wrong inside is the data set's fault."""
    try:
        yield
    except UserError:
        raise
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"The data set {str(source)!r} cannot be loaded: {error}") from error


def class_ids(labels: list, names: list[str] | None) -> tuple[np.ndarray, dict[int, str]]:
    """
    Labels as a data set has them to class ids without gaps.

    Args:
        labels (`list`): integers, strings or booleans; -1 or None is unlabelled.
        names (`list[str]`, *optional*): the names of the integers 0, 1, …, where the data set knows them.

    Returns:
        The ids, int64 `(len(labels),)`, and the name of each id.

    Raises:
        UserError: the labels are floats or something else, or an integer has no name.
    """
    present = {label for label in labels if label is not None and label != UNLABELLED}
    kinds = {type(label) for label in present}
    if len(kinds) > 1 or not kinds <= {int, str, bool}:
        examples = sorted(map(repr, present))[:3]
        raise UserError(
            f"The labels must be integers or strings, but are {', '.join(sorted(k.__name__ for k in kinds))} "
            f"({', '.join(examples)}, …). Cast the column to integers or to ClassLabel, or choose another "
            "--label_column."
        )
    if kinds == {int} and names is not None:
        if not all(0 <= label < len(names) for label in present):
            raise UserError(f"The labels go from {min(present)} to {max(present)}, but there are {len(names)} names.")
        values = list(range(len(names)))
    else:
        values = sorted(present)
        names = [str(value) for value in values]
        if values != list(range(len(values))):
            shown = ", ".join(f"{value!r} -> {i}" for i, value in enumerate(values[:10]))
            logger.warning("Labels were mapped to class ids: %s%s", shown, ", …" if len(values) > 10 else "")

    ids = {value: i for i, value in enumerate(values)}
    class_labels = np.array([ids.get(label, UNLABELLED) for label in labels], dtype=np.int64)
    unlabelled = int((class_labels == UNLABELLED).sum())
    if unlabelled:
        logger.warning("%d of %d images have no label: they train the null class.", unlabelled, len(labels))
    return class_labels, dict(enumerate(names))


# ----- decoding -----


def normalise(image: Image.Image) -> Image.Image:
    """
    What PIL opened, as it is meant to be seen, in 8 bits: "L" if it is grey, else "RGB". It is upright, has white where
    it is transparent, and of several frames it is the first.

    Raises:
        ValueError: it is of 32-bit numbers, of which nothing says what is black and what white.
    """
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(f'its pixels are 32-bit numbers (mode "{image.mode}") of unknown range: save it with 8 or 16')
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        pixels = np.asarray(image)
        grey = (pixels >> 8).astype(np.uint8)  # the high byte, which is what PIL keeps of 16-bit colours
        grey[pixels == image.info.get("transparency")] = 255
        return Image.fromarray(grey)
    palette = image.getpalette() or []
    is_grey = image.mode in ("1", "L", "LA") or (palette and palette[0::3] == palette[1::3] == palette[2::3])
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    mode = "L" if is_grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_array(image: Image.Image, resolution: int, channels: int, center_crop: bool) -> np.ndarray:
    """A PIL image to uint8 `(channels, resolution, resolution)`: resized with antialiasing to cover it, and cropped."""
    image = normalise(image).convert("L" if channels == 1 else "RGB")
    centering = (0.5, 0.5) if center_crop else (0.0, 0.0)
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC, centering=centering)
    return np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)


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

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(self.images[indices], self.class_labels[indices], [])


class LazyImages(Dataset):
    """Images decoded when they are asked for. One that cannot be read is replaced by the next that can."""

    def __init__(self, images: LabelledImages, resolution: int, channels: int, center_crop: bool, num_workers: int = 0):
        self.images, self.to_array_args, self.hands = images, (resolution, channels, center_crop), Hands(num_workers)
        self.class_labels = torch.from_numpy(images.class_labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        unreadable = []
        arrays, labels = zip(*map(self._read, indices, repeat(unreadable)), strict=True)
        self.hands.hold("")
        return Batch(torch.from_numpy(np.stack(arrays)), torch.tensor(labels), unreadable)

    def _read(self, index: int, unreadable: list[str]) -> tuple[np.ndarray, int]:
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            self.hands.hold(str(candidate))
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
        self.hands = Hands(config.dataloader_num_workers)

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

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn = self.batches + self.rank + (worker.id * self.world_size if worker is not None else 0)
        stream = turn % len(self.positions)
        blocks = shuffled_blocks(
            self, self.config.shuffle_buffer_size, self.config.seed, stream, len(self.positions), self.positions[stream]
        )
        arrays, labels, unreadable = [], [], []
        for position, block in blocks:
            for done, image in enumerate(block[position.done :], position.done + 1):
                self.hands.hold(image.name)
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
                    self.hands.hold("")
                    reached = (stream, position._replace(done=done))
                    yield Batch(torch.from_numpy(np.stack(arrays)), torch.tensor(labels), unreadable, reached)
                    arrays, labels, unreadable = [], [], []

    def rows(self, shard: int, first: int) -> Iterator[EncodedImage]:
        self.hands.hold(f"shard {shard}")
        return self.images.rows(shard, first)

    def name_held(self, item: str) -> str:
        return item

    def used(self, batch: Batch) -> None:
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


def name_dead_worker(dataset: Dataset, error: RuntimeError) -> None:
    """If it is torch's word that a worker died, raises UserError with what that had in its hands."""
    if "DataLoader worker" in str(error):
        held = [dataset.name_held(item) for item in dataset.hands.of_dead(error)]
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


def keep_batch(batch: Batch) -> Batch:
    """The collate function: `__getitems__` has made the batch already. (A function, so that workers can be spawned.)"""
    return batch


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
