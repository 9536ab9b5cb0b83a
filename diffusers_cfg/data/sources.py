"""Load labelled images from a dataset on the Hub, a folder of class folders, or scikit-learn's digits."""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

from diffusers_cfg.config import UserError
from diffusers_cfg.data.columns import (
    check_columns,
    has_column,
    name_encoded,
    open_encoded,
    outermost_column,
    values_of,
)
from diffusers_cfg.data.folders import ImageFolder, count_kinds, find_splits, has_image_files, list_folder, read_folder
from diffusers_cfg.data.images import LabelledImages, StackedImages, split_images
from diffusers_cfg.data.labels import UNLABELLED, class_ids, label_to_id, listed, names_of, warn_about_numbers
from diffusers_cfg.data.order import Position, shuffled_blocks
from diffusers_cfg.settings import DataConfig

logger = logging.getLogger(__name__)

# A streamed dataset with fewer shards is split further, if its file format allows it.
MANY_SHARDS = 128
# Number of images at the start of a stream that are kept for inspecting the data.
PROBE_SIZE = 256


class Digits(LabelledImages):
    """scikit-learn's 1,797 handwritten digits, 8×8, grayscale. They ship with scikit-learn."""

    def __init__(self) -> None:
        # Imported here because the import takes a second, a third of a command's startup, and only the digits need it.
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = (digits.images * (255 / 16)).round().astype(np.uint8)
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        super().__init__(digits.target.astype(np.int64), dict(enumerate(names)))

    def open_image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images).hexdigest()

    def name_image(self, index: int) -> str:
        return f"digit {index}"


class DatasetImages(LabelledImages):
    """
    The images of a `datasets.Dataset`, with its labels mapped to class ids.

    Args:
        dataset (`datasets.Dataset`): the dataset.
        config (`DataConfig`): the column with the images, and the names of the classes.
        label_column (`str`, *optional*): the column with the labels. By default all images are unlabelled.

    Raises:
        UserError: if a column is missing or has the wrong type.
    """

    def __init__(self, dataset: datasets.Dataset, config: DataConfig, label_column: str | None) -> None:
        feature = check_columns(dataset.features, config.image_column, label_column)
        names = names_of(feature, label_column, config.class_names)
        if label_column is None:
            super().__init__(np.full(len(dataset), UNLABELLED, np.int64), {})
        else:
            column = outermost_column(dataset.features, label_column)
            super().__init__(*class_ids(values_of(dataset[column][:], column, label_column), names))
        self.dataset, self.column = dataset, config.image_column
        self.encoded = dataset.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.encoded[index][self.column])

    def name_image(self, index: int) -> str:
        return name_encoded(f"row {index}", self.encoded[index][self.column])

    def fingerprint(self) -> str:
        return self.dataset._fingerprint  # a hash of the version or the times of the files of the dataset


class FolderImages(DatasetImages):
    """The images of a folder. The arguments are those of `DatasetImages`."""

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and times of all files. It stays the same if the folder is moved."""
        paths = [content["path"] for content in self.encoded[self.column][:] if content]
        root, digest = os.path.commonpath([min(paths), max(paths)]), hashlib.sha256()
        for path in paths:
            with suppress(OSError):  # a missing file
                status = os.stat(path)
                digest.update(f"{path.removeprefix(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class EncodedImage(NamedTuple):
    """An image of a stream before it is decoded."""

    name: str  # for messages
    content: dict[str, Any] | None  # as `datasets` stores it: its bytes, its path, or both; None if it is null
    class_label: int


class ImageStream(LabelledImages):
    """
    The images of a streamed `datasets.IterableDataset`. The interface of `LabelledImages` covers only the first images,
    `first`, which are kept for inspecting the data.

    Args:
        dataset (`datasets.IterableDataset`): the dataset.
        config (`DataConfig`): the column with the images, and the number of images to shuffle at a time.
        label_column (`str`, *optional*): the column with the labels. By default all images are unlabelled.

    Attributes:
        num_images (`int`, *optional*): number of images in the dataset, if its card states it.
        num_shards (`int`): number of shards, which can be read independently.

    Raises:
        UserError: if a column is missing or has the wrong type, or the names of the classes are not known in advance.
    """

    def __init__(self, dataset: datasets.IterableDataset, config: DataConfig, label_column: str | None) -> None:
        feature = check_columns(dataset.features, config.image_column, label_column)
        names = [] if label_column is None else names_of(feature, label_column, config.class_names)
        if names is None:
            raise UserError(
                f"--streaming must know the classes in advance, but the column {label_column!r} holds plain values. "
                "Pass their names as --class_names (a file, or the number of classes), leave out --streaming, or make "
                "the column a ClassLabel (with cast_column, or under `dataset_info` in the dataset's README.md)."
            )
        warn_about_numbers(names)
        self.source, self.ids = config.dataset_name or config.train_data_dir, {n: i for i, n in enumerate(names)}
        self.image_column, self.label_column, columns = config.image_column, label_column, [config.image_column]
        if label_column is not None:
            self.outermost = outermost_column(dataset.features, label_column)
            columns.append(self.outermost)
        dataset = dataset.decode(False).select_columns(columns)
        self.dataset = dataset if dataset.num_shards >= MANY_SHARDS else dataset.reshard()
        self.num_shards = self.dataset.num_shards
        split = (dataset.info.splits or {}).get(str(dataset.split))
        self.num_images = (split.num_examples if split is not None else None) or None

        _, first = next(shuffled_blocks(self, config.shuffle_buffer_size, 0, 0, 1, Position()))
        labels = {image.class_label for image in first}
        if names and labels == {UNLABELLED}:
            logger.warning("The first %d images have no label. Check --label_column.", len(first))
        elif names and len(labels) == 1 < len(first):
            logger.warning(
                "The first %d images all have the same class. The data seems to be sorted, so training would see one "
                "class at a time. Raise --shuffle_buffer_size, or leave out --streaming.",
                len(first),
            )
        self.first = first[:PROBE_SIZE]
        super().__init__(np.array([image.class_label for image in self.first], np.int64), dict(enumerate(names)))

    @property
    def present_classes(self) -> list[int]:
        """The ids of all classes, since a stream does not know which classes have images."""
        return list(self.id2label)

    def rows(self, shard: int, first: int) -> Iterator[EncodedImage]:
        """Yield the images of a shard, starting at row `first`. Raise UserError for a label without a name."""
        for row, (content, label) in enumerate(self._cells(shard, first), first):
            name = name_encoded(f"row {row} of shard {shard}", content)
            yield EncodedImage(name, content, label_to_id(label, self.ids, name))

    def _cells(self, shard: int, first: int) -> Iterator[tuple[dict[str, Any] | None, int | str | None]]:
        with named_errors(self.source):
            for batch in self.dataset.shard(self.num_shards, shard).skip(first).iter(batch_size=100):
                contents, labels = batch[self.image_column], repeat(None)
                if self.label_column is not None:
                    labels = values_of(batch[self.outermost], self.outermost, self.label_column)
                yield from zip(contents, labels)  # noqa: B905 the labels may be endless

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.first[index].content)

    def name_image(self, index: int) -> str:
        return self.first[index].name


def load_labelled_images(config: DataConfig, needs_labels: bool = True) -> LabelledImages:
    """
    Load the images to train on: those of the dataset that the settings name, without those that `--train_val_split`
    holds out; or stacks of them, with `--stack`.

    Args:
        config (`DataConfig`): the settings.
        needs_labels (`bool`): whether to refuse a dataset without `--label_column`, or a folder without class folders.
            With `False`, all images of such a dataset get the label -1, and there are no class names.

    Raises:
        UserError: if the dataset cannot be found or loaded, lacks a column, has too few images to hold out some, or
            cannot be stacked.
    """
    if config.stack > 1:
        return StackedImages(load_all_images(config, needs_labels=False), config.resolution, config.center_crop)
    images = load_all_images(config, needs_labels)
    if not config.train_val_split:
        return images
    training, _ = split_images(images, config.train_val_split)
    if lost := sorted(set(images.present_classes) - set(training.present_classes)):
        text = "%d of %d classes have no image to train on, because --train_val_split %g holds out all of them: %s"
        names = listed([images.id2label[class_id] for class_id in lost])
        logger.warning(text, len(lost), len(images.id2label), config.train_val_split, names)
    return training


def load_held_out_images(config: DataConfig, needs_labels: bool = True) -> LabelledImages:
    """
    Load the images that `--train_val_split` holds out from training, with the ids of all classes of the dataset. The
    arguments and errors are those of `load_labelled_images`.
    """
    return split_images(load_all_images(config, needs_labels), config.train_val_split)[1]


def load_all_images(config: DataConfig, needs_labels: bool) -> LabelledImages:
    """Load all images of a dataset. The arguments and errors are those of `load_labelled_images`."""
    source = config.train_data_dir or config.dataset_name
    if source is None:
        return Digits()
    with named_errors(source):
        folder = find_image_folder(source, config)
        if folder is not None:
            return load_folder(folder, config, needs_labels)
        dataset = load_dataset(source, config)
        return make_images(DatasetImages, dataset, config, needs_labels)


def split_names(config: DataConfig) -> list[str]:
    """Return the names of the splits of the dataset that the settings name; `["train"]` if it has only one part."""
    source = config.train_data_dir or config.dataset_name
    if source is None:
        return ["train"]
    with named_errors(source):
        folder = find_image_folder(source, config)
        if folder is not None:
            return [*find_splits(folder, needs_labels=False)]
        if is_saved_to_disk(source):
            dataset = datasets.load_from_disk(source)
            return ["train"] if isinstance(dataset, datasets.Dataset) else [*map(str, dataset)]
        return datasets.get_dataset_split_names(source, config.dataset_config_name, cache_dir=config.cache_dir)


def find_image_folder(source: str, config: DataConfig) -> ImageFolder | None:
    """Return the folder of `--train_data_dir`, or of `--dataset_name` if it holds image files, otherwise `None`."""
    if not os.path.isdir(source):
        if config.train_data_dir is not None:
            raise UserError(f"--train_data_dir {source} is not a folder. Pass an existing folder of images.")
        return None
    folder = list_folder(source)
    is_plain = config.dataset_config_name is None and not is_saved_to_disk(source) and has_image_files(folder)
    return folder if config.train_data_dir is not None or is_plain else None


def load_folder(folder: ImageFolder, config: DataConfig, needs_labels: bool) -> LabelledImages:
    """Load the images in a folder. Log the files that cannot be read. Raise UserError if they are too many."""
    dataset, left_out = read_folder(folder, config, needs_labels)
    total = len(dataset) + len(left_out)
    if len(left_out) > config.max_unreadable_fraction * total:
        raise UserError(
            f"{len(left_out)} of the {total} files in {folder.root} are not images that PIL can read "
            f"({count_kinds(left_out)}), more than --max_unreadable_fraction {config.max_unreadable_fraction} allows: "
            f"{listed(left_out, 5)}. Convert them to PNG or JPEG, remove them, or raise --max_unreadable_fraction."
        )
    if left_out:
        text = "Files left out, because PIL cannot read them: %d (%s). Convert them to PNG or JPEG."
        logger.warning(text, len(left_out), count_kinds(left_out))
    opened = dataset.to_iterable_dataset() if config.streaming else dataset
    images = make_images(FolderImages, opened, config, needs_labels)
    if isinstance(images, ImageStream):
        images.num_images = len(dataset)
    else:
        images.left_out = left_out
    return images


def make_images(
    kind: type[DatasetImages],
    dataset: datasets.Dataset | datasets.IterableDataset,
    config: DataConfig,
    needs_labels: bool,
) -> LabelledImages:
    """Return the images of a dataset, without labels if they are not needed and there are none."""
    label_column = config.label_column
    if not needs_labels and not has_column(dataset.features, label_column):
        logger.info("The dataset has no column %r (--label_column), so its images are unlabelled.", label_column)
        label_column = None
    if isinstance(dataset, datasets.IterableDataset):
        return ImageStream(dataset, config, label_column)
    return kind(dataset, config, label_column)


def is_saved_to_disk(source: str) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_dataset(source: str, config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset from the Hub, a local folder or file, or a folder written by `save_to_disk`."""
    split, cache_dir = config.dataset_split, config.cache_dir
    if is_saved_to_disk(source):
        if config.streaming:
            raise UserError(f"{source} was written by save_to_disk, which cannot be streamed. Leave out --streaming.")
        dataset = datasets.load_from_disk(source)
        if isinstance(dataset, datasets.Dataset):  # A single split may have a name, but also stands for the default.
            dataset = datasets.DatasetDict({"train": dataset, str(dataset.split or "train"): dataset})
        if split not in dataset:
            raise UserError(f"{source} has no split {split!r}. Set --dataset_split to one of {[*dataset]}.")
        return dataset[split]
    name = config.dataset_config_name
    if config.streaming:  # a literal in each call, from which type checkers infer the returned class
        return datasets.load_dataset(source, name, split=split, cache_dir=cache_dir, streaming=True)
    return datasets.load_dataset(source, name, split=split, cache_dir=cache_dir, streaming=False)


@contextmanager
def named_errors(source: str | None) -> Iterator[None]:
    """Convert the errors that `datasets` raises in the block, which are of many types, to a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
        reason = ". ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
        raise UserError(f"The dataset {source!r} cannot be loaded: {reason}") from error
