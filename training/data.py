"""Labelled images, from a data set of the Hub, a folder of class folders, or scikit-learn's digits."""

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from config import DataConfig, UserError
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

UNLABELLED = -1
# Data that takes no more than this as uint8 is decoded once and kept; larger data is decoded as it is used.
MAX_CACHED_BYTES = 2 * 1024**3
GREY_MODES = {"1", "L", "LA", "I", "I;16", "F"}


class Batch(NamedTuple):
    images: torch.Tensor  # (batch, channels, resolution, resolution), uint8
    class_labels: torch.Tensor  # (batch,), int64; -1 is unlabelled
    unreadable: list[str]  # names of the images that could not be read, and were replaced by another

    @property
    def images_rgb(self) -> torch.Tensor:
        """The images with three channels, grey or not."""
        return self.images.expand(-1, 3, -1, -1)


class LabelledImages:
    """
    What there is to train on, before it is decoded.

    Args:
        class_labels (`numpy.ndarray` of shape `(images,)`): int64, `0 … num_classes - 1`, or -1 for unlabelled.
        id2label (`dict[int, str]`): name of each class.

    Raises:
        UserError: there are fewer than two classes.
    """

    def __init__(self, class_labels: np.ndarray, id2label: dict[int, str]):
        self.class_labels, self.id2label = class_labels, id2label
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
                if self.open_image(index).mode not in GREY_MODES:
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

        kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
        for flag, column in (("--image_column", image_column), ("--label_column", label_column)):
            if column not in kinds:
                raise UserError(f"The data set has no column {column!r}: {flag} can be one of {sorted(kinds)}.")
        if kinds[image_column] != "Image":
            raise UserError(
                f"The column {image_column!r} holds {kinds[image_column]}, not images: --image_column can be one of "
                f"{[name for name, kind in kinds.items() if kind == 'Image']}."
            )
        names = getattr(dataset.features[label_column], "names", None)
        super().__init__(*class_ids(dataset[label_column][:], names))
        self.column = image_column
        self.encoded = dataset.select_columns(image_column).cast_column(image_column, EncodedImage(decode=False))

    def open_image(self, index: int) -> Image.Image:
        row = self.encoded[index][self.column]
        return Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"]))

    def name_image(self, index: int) -> str:
        path = self.encoded[index][self.column]["path"]
        return f"row {index}" + (f" ({path})" if path else "")


# ----- where they come from -----


def load_labelled_images(config: DataConfig) -> LabelledImages:
    """The data that the settings name. Raises UserError if it cannot be found or does not have what training needs."""
    if config.train_data_dir is not None:
        return DatasetImages(load_class_folders(config), config.image_column, config.label_column)
    if config.dataset_name is not None:
        return DatasetImages(load_dataset(config), config.image_column, config.label_column)
    return Digits()


def load_class_folders(config: DataConfig):
    import datasets

    folder = Path(config.train_data_dir)
    if not folder.is_dir():
        raise UserError(f"--train_data_dir {folder} is not a folder.")
    if not any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f"--train_data_dir {folder} has no folders in it, but each class needs a folder of its own.")
    with named_errors(folder):
        return datasets.load_dataset(
            "imagefolder", data_dir=str(folder), split=config.dataset_split, cache_dir=config.cache_dir
        )


def load_dataset(config: DataConfig):
    import datasets

    source = config.dataset_name
    with named_errors(source):
        if (Path(source) / "dataset_dict.json").is_file():  # written by save_to_disk
            return datasets.load_from_disk(source)[config.dataset_split]
        if (Path(source) / "state.json").is_file():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(
            source, config.dataset_config_name, split=config.dataset_split, cache_dir=config.cache_dir
        )


@contextmanager
def named_errors(source: str | Path) -> Iterator[None]:
    """What goes wrong inside is the data set's fault."""
    try:
        yield
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


def to_array(image: Image.Image, resolution: int, channels: int, center_crop: bool) -> np.ndarray:
    """A PIL image to uint8 `(channels, resolution, resolution)`: resized with antialiasing to cover it, and cropped."""
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    centering = (0.5, 0.5) if center_crop else (0.0, 0.0)
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC, centering=centering)
    return np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)


def training_dataset(images: LabelledImages, config: DataConfig, channels: int, show_progress: bool) -> Dataset:
    """The images as a `Dataset` of uint8 arrays, in memory if they fit. Raises UserError if too many are unreadable."""
    if len(images) * channels * config.resolution**2 <= MAX_CACHED_BYTES:
        return stack_images(images, config, channels, show_progress)
    return LazyImages(images, config.resolution, channels, config.center_crop)


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

    def __init__(self, images: LabelledImages, resolution: int, channels: int, center_crop: bool):
        self.images, self.to_array_args = images, (resolution, channels, center_crop)
        self.class_labels = torch.from_numpy(images.class_labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        unreadable = []
        arrays, labels = zip(*map(self._read, indices, repeat(unreadable)), strict=True)
        return Batch(torch.from_numpy(np.stack(arrays)), torch.tensor(labels), unreadable)

    def _read(self, index: int, unreadable: list[str]) -> tuple[np.ndarray, int]:
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                array = to_array(self.images.open_image(candidate), *self.to_array_args)
                return array, self.class_labels[candidate].item()
            except Exception:  # whatever a decoder raises, the image cannot be used
                unreadable.append(self.images.name_image(candidate))
        raise UserError("None of the images can be read.")


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
