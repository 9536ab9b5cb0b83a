"""Map the labels of a dataset to class ids, and name the classes."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_cfg.config import UserError

logger = logging.getLogger(__name__)

# The class label of an unlabelled image.
UNLABELLED = -1
# Number of names that a message lists.
MAX_LISTED = 10


def listed(names: Sequence[str], limit: int = MAX_LISTED) -> str:
    """Return the first names, separated by commas, for a message."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def first_names(id2label: Mapping[int, str]) -> str:
    """Return the names of the first five classes, for a message."""
    return listed([name for _, name in sorted(id2label.items())], 5)


def names_of(feature: Any, column: str | None, class_names: str | None) -> list[str] | None:
    """
    Return the names of the classes 0, 1, …, or `None` if only the labels themselves can tell them.

    Args:
        feature: the type of the label column; `None` for unlabelled data.
        column (`str`, *optional*): the label column.
        class_names (`str`, *optional*): the setting `class_names`.

    Raises:
        UserError: if both the column and the setting name the classes, or the setting is wrong.
    """
    known = getattr(feature, "names", None)
    if class_names is None:
        return known
    if known is not None or column is None:
        raise UserError(
            f"--class_names {class_names} names the classes of a column of plain labels, but "
            + (f"the column {column!r} already names its classes: {listed(known)}." if known else "there is none.")
            + " Leave it out."
        )
    return read_class_names(class_names)


def read_class_names(value: str) -> list[str]:
    """
    Read the setting `class_names`: a text file with a name per line, a JSON file with a list of names or an object
    `{id: name}`, or a count N, which stands for the names "0" … "N-1".

    Raises:
        UserError: if the file is missing or damaged, or the names are not distinct strings for the ids 0 … N - 1.
    """
    path = Path(value)
    if value.isdecimal() and not path.exists():
        names: Any = list(map(str, range(int(value))))
    elif not path.is_file():
        raise UserError(f"--class_names {value} is neither a file (.txt or .json) nor a number of classes.")
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")  # Windows writes a mark at the start
            names = json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"--class_names {value} cannot be read: {error}") from error
    if isinstance(names, dict):
        if names.keys() != set(map(str, range(len(names)))):
            raise UserError(
                f"--class_names {value} must name the ids 0 … {len(names) - 1}, but names {listed([*names])}."
            )
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"--class_names {value} must contain a list of names, but contains {str(names)[:50]!r}.")
    seen: dict[Any, int] = {}
    for class_id, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise UserError(f"--class_names {value}: the name of class {class_id} is {name!r}, not text.")
        if seen.setdefault(name, class_id) != class_id:
            raise UserError(
                f"--class_names {value} gives the classes {seen[name]} and {class_id} the same name {name!r}."
            )
    return names


def off_by_one_hint(num_classes: int) -> str:
    """Return the end of the error message for a label that equals the number of classes."""
    return (
        f"but the {num_classes} classes are numbered from 0 to {num_classes - 1}. Are the labels counted from 1? If "
        "so, subtract 1 from each. (-1 marks an unlabelled image.)"
    )


def unnamed_label_hint(num_classes: int) -> str:
    """Return the end of the error message for a label that is not a class id."""
    return f"but the dataset names {num_classes} classes. Correct the label, or add class names to the dataset."


def label_to_id(label: Any, ids: Mapping[str, int], where: str) -> int:
    """
    Return the class id of one label.

    Args:
        label: an integer, a string, or `None`, which means unlabelled, as -1 does.
        ids (`Mapping[str, int]`): the id of each class name.
        where (`str`): the name of the image, for messages.

    Raises:
        UserError: if the label is not a class id and not a class name.
    """
    label = UNLABELLED if label is None else ids.get(label, label) if isinstance(label, str) else label
    if isinstance(label, str) or not UNLABELLED <= label <= len(ids):
        raise UserError(f"The label of {where} is {label!r}, {unnamed_label_hint(len(ids))}")
    if label == len(ids):
        raise UserError(f"The label of {where} is {label}, {off_by_one_hint(len(ids))}")
    return label


def warn_about_numbers(names: Sequence[Any]) -> None:
    """Log the id of each class if the name of a class is a number other than its id."""
    if any(str(name).isdecimal() and int(str(name)) != class_id for class_id, name in enumerate(names)):
        warn_about_mapping(names)


def warn_about_mapping(names: Sequence[Any]) -> None:
    """Log the id of each class."""
    mapping = listed([f"{name!r} -> {class_id}" for class_id, name in enumerate(names)])
    logger.warning("Labels were mapped to class ids: %s", mapping)


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
    kinds = {type(label) for label in labels if label is not None and label != UNLABELLED}
    if len(kinds) > 1 or not kinds <= {int, str, bool}:
        examples = sorted({repr(label) for label in labels if label is not None})[:3]
        raise UserError(
            f"The labels must be integers or strings, but are {', '.join(sorted(k.__name__ for k in kinds))} "
            f"({', '.join(examples)}, …). Cast the column to integers or to ClassLabel, or choose a different "
            "--label_column."
        )
    present = {label for label in labels if label is not None and label != UNLABELLED}
    if kinds in ({int}, {bool}) and names is not None:
        if min(present) >= 0 and max(present) == len(names):
            raise UserError(f"The largest label is {max(present)}, {off_by_one_hint(len(names))}")
        if not all(0 <= label < len(names) for label in present):
            raise UserError(f"The labels range from {min(present)} to {max(present)}, {unnamed_label_hint(len(names))}")
        values = list(range(len(names)))
    elif names is not None:
        if unnamed := sorted(map(str, present - set(names))):
            raise UserError(f"The labels {listed(unnamed)} are not class names, {unnamed_label_hint(len(names))}")
        values = names
    else:
        values = sorted(present)
    if names is not None:
        warn_about_numbers(names)
    elif values != list(range(len(values))):
        warn_about_mapping(values)

    ids = {value: i for i, value in enumerate(values)}
    class_labels = np.array([ids.get(label, UNLABELLED) for label in labels], dtype=np.int64)
    if unlabelled := int((class_labels == UNLABELLED).sum()):
        logger.warning("%d of %d images have no label.", unlabelled, len(labels))
    id2label = dict(enumerate(names or map(str, values)))
    if absent := [name for class_id, name in id2label.items() if values[class_id] not in present]:
        logger.warning("%d of %d classes have no image: %s", len(absent), len(id2label), listed(absent))
    return class_labels, id2label
