"""Find labelled images: in a data set of the Hub, a folder of class folders, or scikit-learn's digits."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
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

UNLABELLED = -1
# A data set of fewer files is streamed by the parts of its files, where their format has parts.
MANY_SHARDS = 128
# Of a stream so many images are looked at before it is used,
PROBE_SIZE = 256


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
        check_columns(dataset, image_column, label_column)
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
        return datasets.Image().decode_example(content)
    return Image.open(path if data is None else io.BytesIO(data))


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
