"""Find labelled images: in a dataset of the Hub, a folder of class folders, or scikit-learn's digits."""

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

# The class label of an image without one.
UNLABELLED = -1
# A streamed dataset with fewer shards than this is divided further, where its file format allows it.
MANY_SHARDS = 128
# Number of images at the start of a stream that are kept, to inspect the data.
PROBE_SIZE = 256
# Number of images that are decoded to find out whether a dataset is grayscale.
CHANNELS_SAMPLE_SIZE = 32


class LabelledImages:
    """
    Images that are not decoded yet, with their class labels.

    Args:
        class_labels (`numpy.ndarray` of shape `(images,)`): int64, `0 … num_classes - 1`, or -1 for unlabelled.
        id2label (`dict[int, str]`): name of each class; empty if nothing is labelled.

    Raises:
        UserError: there are no images.
    """

    def __init__(self, class_labels: np.ndarray, id2label: dict[int, str]):
        if not len(class_labels):
            raise UserError("The dataset has no images: check --dataset_split.")
        self.class_labels, self.id2label = class_labels, id2label

    def open_image(self, index: int) -> Image.Image:
        """Return the image at an index as PIL opens it. An image that cannot be read may raise any exception."""
        raise NotImplementedError

    def name_image(self, index: int) -> str:
        """Return a name for the image at an index, for messages."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.class_labels)

    @property
    def channels(self) -> int:
        """1 if a sample of the images is grayscale, else 3."""
        for index in np.linspace(0, len(self) - 1, min(len(self), CHANNELS_SAMPLE_SIZE)).astype(int).tolist():
            try:
                if normalise(self.open_image(index)).mode == "RGB":
                    return 3
            except Exception:  # unreadable: counted when it is decoded
                continue
        return 1

    @property
    def present_classes(self) -> list[int]:
        """Ids of the classes that have images."""
        return np.unique(self.class_labels[self.class_labels != UNLABELLED]).tolist()


def require_classes(images: LabelledImages) -> None:
    """Raise UserError if the images have fewer than two classes. For methods that condition on the class."""
    present = images.present_classes
    if len(present) < 2:
        raise UserError(
            f"Class-conditional training needs at least two classes, but the data has {len(present)} "
            f"{[images.id2label[i] for i in present]}: check --label_column, or that each class has a folder of its "
            "own."
        )


class Digits(LabelledImages):
    """scikit-learn's 1,797 handwritten digits, 8×8, grayscale. They are part of that package."""

    def __init__(self):
        # Imported here because it takes a second, a third of the start of a command, and only this data needs it.
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
        image_column (`str`): its column of images.
        label_column (`str`, *optional*): its column of labels; without one, every image is unlabelled.

    Raises:
        UserError: a column is missing or holds something else.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str, label_column: str | None):
        check_columns(dataset, image_column, label_column)
        if label_column is None:
            super().__init__(np.full(len(dataset), UNLABELLED, np.int64), {})
        else:
            names = getattr(dataset.features[label_column], "names", None)
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
    The images of a streamed `datasets.IterableDataset`. As `LabelledImages` it consists of its first images only,
    `first`, by which the data is inspected.

    Args:
        dataset (`datasets.IterableDataset`): the dataset.
        config (`DataConfig`): its column of images, and the number of images to shuffle at a time.
        label_column (`str`, *optional*): its column of labels; without one, every image is unlabelled.

    Attributes:
        num_images (`int`, *optional*): number of images in the dataset, if it says so.
        num_shards (`int`): number of parts that can be read independently.

    Raises:
        UserError: a column is missing or holds something else, or the names of the labels are not known beforehand.
    """

    def __init__(self, dataset: datasets.IterableDataset, config: DataConfig, label_column: str | None):
        check_columns(dataset, config.image_column, label_column)
        names = [] if label_column is None else getattr(dataset.features[label_column], "names", None)
        if names is None:
            raise UserError(
                f"--streaming has to know the classes beforehand, but the column {label_column!r} holds plain values: "
                "leave out --streaming, or make it a ClassLabel (with cast_column, or under `dataset_info` in the "
                "README.md of the dataset)."
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
                "The first %d images are all of one class: the data seems to be sorted, and training will see one "
                "class at a time. Raise --shuffle_buffer_size, or leave out --streaming.",
                len(first),
            )
        self.first = first[:PROBE_SIZE]
        super().__init__(np.array([image.class_label for image in self.first], np.int64), dict(enumerate(names)))

    @property
    def present_classes(self) -> list[int]:
        """Ids of all classes, since a stream does not know which of them have images."""
        return list(self.id2label)

    def rows(self, shard: int, first: int) -> Iterator[EncodedImage]:
        """Yield the images of a shard, from its row `first` on. Raises UserError for a label without a name."""
        for row, (content, label) in enumerate(self._cells(shard, first), first):
            name = f"row {row} of shard {shard}" + (f" ({content['path']})" if content and content["path"] else "")
            label = UNLABELLED if label is None else label
            if label == self.num_classes:
                raise UserError(f"The label of {name} is {label}, {counted_from_1(self.num_classes)}")
            if not UNLABELLED <= label < self.num_classes:
                raise UserError(f"The label of {name} is {label}, but there are {self.num_classes} names.")
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


def counted_from_1(num_classes: int) -> str:
    """Return the end of the message about a label that equals the number of classes."""
    return (
        f"but the {num_classes} classes are numbered from 0 to {num_classes - 1}. Are the labels counted from 1? Then "
        "subtract 1 from each. (-1 marks an image without a label.)"
    )


def check_columns(
    dataset: datasets.Dataset | datasets.IterableDataset, image_column: str, label_column: str | None
) -> None:
    """Raise UserError if a dataset lacks a column, or if its column of images holds something else."""
    kinds = {name: type(feature).__name__ for name, feature in (dataset.features or {}).items()}
    for flag, column in (("--image_column", image_column), ("--label_column", label_column)):
        if column is not None and column not in kinds:
            raise UserError(f"The dataset has no column {column!r}: {flag} can be one of {sorted(kinds)}.")
    if kinds[image_column] != "Image":
        raise UserError(
            f"The column {image_column!r} holds {kinds[image_column]}, not images: --image_column can be one of "
            f"{[name for name, kind in kinds.items() if kind == 'Image']}."
        )


def open_encoded(content: dict[str, Any]) -> Image.Image:
    """Open an image as `datasets` stores it: its bytes, or the path of its file, which may be on the Hub."""
    path, data = content["path"], content["bytes"]
    if data is None and "://" in path:
        return datasets.Image().decode_example(content)
    return Image.open(path if data is None else io.BytesIO(data))


def load_labelled_images(config: DataConfig, needs_labels: bool = True) -> LabelledImages:
    """
    Find the dataset that the settings name.

    Args:
        config (`DataConfig`): the settings.
        needs_labels (`bool`): whether a dataset without `--label_column`, or a folder without class folders, is an
            error. If it is not, all of its images are labelled -1, and there are no class names.

    Raises:
        UserError: the dataset cannot be found or loaded, or lacks a column.
    """
    if config.train_data_dir is not None:
        dataset = load_folder(config, needs_labels)
    elif config.dataset_name is not None:
        dataset = load_dataset(config)
    else:
        return Digits()
    label_column = config.label_column
    if not needs_labels and label_column not in (dataset.features or {}):
        logger.info("The dataset has no column %r (--label_column): its images are unlabelled.", label_column)
        label_column = None
    if config.streaming:
        with named_errors(config.dataset_name or config.train_data_dir):
            return ImageStream(dataset, config, label_column)
    return DatasetImages(dataset, config.image_column, label_column)


def load_folder(config: DataConfig, needs_labels: bool = True) -> datasets.Dataset | datasets.IterableDataset:
    """Load the images in `--train_data_dir`. Raises UserError if labels are needed and it has no class folders."""
    folder = Path(config.train_data_dir)
    if not folder.is_dir():
        raise UserError(f"--train_data_dir {folder} is not a folder.")
    if needs_labels and not any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f"--train_data_dir {folder} has no folders in it, but each class needs a folder of its own.")
    with named_errors(folder):
        return datasets.load_dataset(
            "imagefolder",
            data_dir=str(folder),
            split=config.dataset_split,
            cache_dir=config.cache_dir,
            streaming=config.streaming,
        )


def load_dataset(config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """Load `--dataset_name` from the Hub, a local folder or file, or a folder written by `save_to_disk`."""
    source = config.dataset_name
    if config.streaming and any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise UserError(f"{source} was written by save_to_disk, which cannot be streamed: leave out --streaming.")
    with named_errors(source):
        if (Path(source) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(source)[config.dataset_split]
        if (Path(source) / "state.json").is_file():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(
            source,
            config.dataset_config_name,
            split=config.dataset_split,
            cache_dir=config.cache_dir,
            streaming=config.streaming,
        )


@contextmanager
def named_errors(source: str | Path) -> Iterator[None]:
    """Turn the errors of `datasets` inside the block into a UserError that names the dataset."""
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
        labels (`list`): integers, strings or booleans; -1 or None is unlabelled.
        names (`list[str]`, *optional*): the names of the integers 0, 1, …, if the dataset has them.

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
        if min(present) >= 0 and max(present) == len(names):
            raise UserError(f"The labels go up to {max(present)}, {counted_from_1(len(names))}")
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
        logger.warning("%d of %d images have no label.", unlabelled, len(labels))
    return class_labels, dict(enumerate(names))
