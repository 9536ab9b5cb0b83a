"""Load labelled images from a dataset on the Hub, a folder of class folders, or scikit-learn's digits."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import normalise
from diffusers_cfg.data.order import Position, shuffled_blocks
from diffusers_cfg.settings import DataConfig

logger = logging.getLogger(__name__)

# The class label of an unlabelled image.
UNLABELLED = -1
# A streamed dataset with fewer shards is split further, if its file format allows it.
MANY_SHARDS = 128
# Number of images at the start of a stream that are kept for inspecting the data.
PROBE_SIZE = 256
# Number of images that are decoded to determine whether a dataset is grayscale.
CHANNELS_SAMPLE_SIZE = 32


class LabelledImages:
    """
    Images that are not decoded yet, with their class labels.

    Args:
        class_labels (`numpy.ndarray` of shape `(images,)`): int64, `0 … num_classes - 1`; -1 means unlabelled.
        id2label (`dict[int, str]`): name of each class; empty for unlabelled data.

    Raises:
        UserError: if there are no images.
    """

    def __init__(self, class_labels: np.ndarray, id2label: dict[int, str]) -> None:
        if not len(class_labels):
            raise UserError("The dataset has no images. Check --dataset_split.")
        self.class_labels, self.id2label = class_labels, id2label

    def open_image(self, index: int) -> Image.Image:
        """Open the image at `index` with PIL. An unreadable image may raise any exception."""
        raise NotImplementedError

    def name_image(self, index: int) -> str:
        """Return a human-readable name for the image at `index`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.class_labels)

    @property
    def channels(self) -> int:
        """The number of channels: 1 if a sample of the images is grayscale, otherwise 3."""
        for index in np.linspace(0, len(self) - 1, min(len(self), CHANNELS_SAMPLE_SIZE)).astype(int).tolist():
            try:
                if normalise(self.open_image(index)).mode == "RGB":
                    return 3
            except Exception:  # unreadable images are counted when the dataset is decoded
                continue
        return 1

    @property
    def present_classes(self) -> list[int]:
        """The ids of the classes that have images."""
        return np.unique(self.class_labels[self.class_labels != UNLABELLED]).tolist()


def require_classes(images: LabelledImages) -> None:
    """Raise UserError if the images have fewer than two classes. Used by class-conditional methods."""
    present = images.present_classes
    if len(present) < 2:
        raise UserError(
            f"Class-conditional training needs at least two classes, but the data has {len(present)}: "
            f"{[images.id2label[i] for i in present]}. Check --label_column, or that each class has its own folder."
        )


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

    def name_image(self, index: int) -> str:
        return f"digit {index}"


class DatasetImages(LabelledImages):
    """
    The images of a `datasets.Dataset`, with its labels mapped to class ids.

    Args:
        dataset (`datasets.Dataset`): the dataset.
        image_column (`str`): the column with the images.
        label_column (`str`, *optional*): the column with the labels. By default all images are unlabelled.

    Raises:
        UserError: if a column is missing or has the wrong type.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str, label_column: str | None) -> None:
        features = check_columns(dataset, image_column, label_column)
        if label_column is None:
            super().__init__(np.full(len(dataset), UNLABELLED, np.int64), {})
        else:
            names = getattr(features[label_column], "names", None)
            super().__init__(*class_ids(dataset[label_column][:], names))
        self.column = image_column
        self.encoded = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.encoded[index][self.column])

    def name_image(self, index: int) -> str:
        path = self.encoded[index][self.column]["path"]
        return f"row {index}" + (f" ({path})" if path else "")


class EncodedImage(NamedTuple):
    """An image of a stream before it is decoded."""

    name: str  # for messages
    content: dict[str, Any]  # as `datasets` stores it: its bytes, its path, or both
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
        features = check_columns(dataset, config.image_column, label_column)
        names = [] if label_column is None else getattr(features[label_column], "names", None)
        if names is None:
            raise UserError(
                f"--streaming must know the classes in advance, but the column {label_column!r} holds plain values. "
                "Leave out --streaming, or make the column a ClassLabel (with cast_column, or under `dataset_info` in "
                "the dataset's README.md)."
            )
        self.image_column, self.label_column, self.num_classes = config.image_column, label_column, len(names)
        columns = [column for column in (config.image_column, label_column) if column is not None]
        dataset = dataset.decode(False).select_columns(columns)
        self.dataset = dataset if dataset.num_shards >= MANY_SHARDS else dataset.reshard()
        self.num_shards = self.dataset.num_shards
        split = (dataset.info.splits or {}).get(str(dataset.split))
        self.num_images = (split.num_examples if split is not None else None) or None

        _, first = next(shuffled_blocks(self, config.shuffle_buffer_size, 0, 0, 1, Position()))
        if names and len({image.class_label for image in first}) == 1 < len(first):
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
            name = f"row {row} of shard {shard}" + (f" ({content['path']})" if content and content["path"] else "")
            label = UNLABELLED if label is None else label
            if label == self.num_classes:
                raise UserError(f"The label of {name} is {label}, {off_by_one_hint(self.num_classes)}")
            if not UNLABELLED <= label < self.num_classes:
                raise UserError(f"The label of {name} is {label}, {unnamed_label_hint(self.num_classes)}")
            yield EncodedImage(name, content, label)

    def _cells(self, shard: int, first: int) -> Iterator[tuple[dict[str, Any], int | None]]:
        for batch in self.dataset.shard(self.num_shards, shard).skip(first).iter(batch_size=100):
            contents = batch[self.image_column]
            labels = repeat(None, len(contents)) if self.label_column is None else batch[self.label_column]
            yield from zip(contents, labels, strict=True)

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.first[index].content)

    def name_image(self, index: int) -> str:
        return self.first[index].name


def off_by_one_hint(num_classes: int) -> str:
    """Return the end of the error message for a label that equals the number of classes."""
    return (
        f"but the {num_classes} classes are numbered from 0 to {num_classes - 1}. Are the labels counted from 1? If "
        "so, subtract 1 from each. (-1 marks an unlabelled image.)"
    )


def unnamed_label_hint(num_classes: int) -> str:
    """Return the end of the error message for a label that is not a class id."""
    return f"but the dataset names {num_classes} classes. Correct the label, or add class names to the dataset."


def check_columns(
    dataset: datasets.Dataset | datasets.IterableDataset, image_column: str, label_column: str | None
) -> datasets.Features:
    """Return the features of a dataset. Raise UserError if a column is missing, or `image_column` holds no images."""
    features = dataset.features or datasets.Features()
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    for flag, column in (("--image_column", image_column), ("--label_column", label_column)):
        if column is not None and column not in kinds:
            raise UserError(f"The dataset has no column {column!r}. Set {flag} to one of {sorted(kinds)}.")
    if kinds[image_column] != "Image":
        raise UserError(
            f"The column {image_column!r} holds {kinds[image_column]}, not images. Set --image_column to one of "
            f"{[name for name, kind in kinds.items() if kind == 'Image']}."
        )
    return features


def open_encoded(content: dict[str, Any]) -> Image.Image:
    """Open an image that `datasets` stores as bytes, or as a path that may be on the Hub."""
    path, data = content["path"], content["bytes"]
    if data is None and "://" in path:
        return datasets.Image().decode_example(content)
    return Image.open(path if data is None else io.BytesIO(data))


def load_labelled_images(config: DataConfig, needs_labels: bool = True) -> LabelledImages:
    """
    Load the images of the dataset that the settings name.

    Args:
        config (`DataConfig`): the settings.
        needs_labels (`bool`): whether to refuse a dataset without `--label_column`, or a folder without class folders.
            With `False`, all images of such a dataset get the label -1, and there are no class names.

    Raises:
        UserError: if the dataset cannot be found or loaded, or lacks a column.
    """
    if config.train_data_dir is not None:
        source, dataset = config.train_data_dir, load_folder(config.train_data_dir, config, needs_labels)
    elif config.dataset_name is not None:
        source, dataset = config.dataset_name, load_dataset(config.dataset_name, config)
    else:
        return Digits()
    label_column = config.label_column
    if not needs_labels and label_column not in (dataset.features or {}):
        logger.info("The dataset has no column %r (--label_column), so its images are unlabelled.", label_column)
        label_column = None
    if isinstance(dataset, datasets.IterableDataset):
        with named_errors(source):
            return ImageStream(dataset, config, label_column)
    return DatasetImages(dataset, config.image_column, label_column)


def load_folder(
    source: str, config: DataConfig, needs_labels: bool = True
) -> datasets.Dataset | datasets.IterableDataset:
    """Load the images in a folder. Raise UserError if labels are needed and the folder has no class folders."""
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"--train_data_dir {folder} is not a folder. Pass an existing folder of images.")
    if needs_labels and not any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f"--train_data_dir {folder} has no subfolders. Pass a folder with one subfolder per class.")
    with named_errors(folder):
        return load_split(config, "imagefolder", data_dir=str(folder))


def load_dataset(source: str, config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset from the Hub, a local folder or file, or a folder written by `save_to_disk`."""
    saved_to_disk = any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if config.streaming and saved_to_disk:
        raise UserError(f"{source} was written by save_to_disk, which cannot be streamed. Leave out --streaming.")
    with named_errors(source):
        if saved_to_disk:
            dataset = datasets.load_from_disk(source)
            return dataset[config.dataset_split] if isinstance(dataset, datasets.DatasetDict) else dataset
        return load_split(config, source, config.dataset_config_name)


def load_split(
    config: DataConfig, path: str, name: str | None = None, data_dir: str | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Load the split that the settings name with `datasets.load_dataset`, streamed with `--streaming`."""
    split, cache_dir = config.dataset_split, config.cache_dir
    if config.streaming:  # a literal in each call, from which type checkers infer the returned class
        return datasets.load_dataset(path, name, data_dir, split=split, cache_dir=cache_dir, streaming=True)
    return datasets.load_dataset(path, name, data_dir, split=split, cache_dir=cache_dir, streaming=False)


@contextmanager
def named_errors(source: str | Path) -> Iterator[None]:
    """Convert errors that `datasets` raises in the block to a UserError that names the dataset."""
    try:
        yield
    except UserError:
        raise
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"The dataset {str(source)!r} cannot be loaded: {error}") from error


def class_ids(labels: list, names: list[str] | None) -> tuple[np.ndarray, dict[int, str]]:
    """
    Map the labels of a dataset to class ids without gaps.

    Args:
        labels (`list`): integers, strings or booleans; -1 and None mean unlabelled.
        names (`list[str]`, *optional*): the names of the integers 0, 1, …, if the dataset has names.

    Returns:
        The ids, int64 `(len(labels),)`, and the name of each id.

    Raises:
        UserError: if the labels have an unsupported type, such as float, or an integer has no name.
    """
    present = {label for label in labels if label is not None and label != UNLABELLED}
    kinds = {type(label) for label in present}
    if len(kinds) > 1 or not kinds <= {int, str, bool}:
        examples = sorted(map(repr, present))[:3]
        raise UserError(
            f"The labels must be integers or strings, but are {', '.join(sorted(k.__name__ for k in kinds))} "
            f"({', '.join(examples)}, …). Cast the column to integers or to ClassLabel, or choose a different "
            "--label_column."
        )
    if kinds == {int} and names is not None:
        if min(present) >= 0 and max(present) == len(names):
            raise UserError(f"The largest label is {max(present)}, {off_by_one_hint(len(names))}")
        if not all(0 <= label < len(names) for label in present):
            raise UserError(f"The labels range from {min(present)} to {max(present)}, {unnamed_label_hint(len(names))}")
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
        logger.warning("%d of %d images have no label.", unlabelled, len(labels))
    return class_labels, dict(enumerate(names))
