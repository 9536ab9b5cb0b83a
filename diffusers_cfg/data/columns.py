"""Find the images and the labels in the columns of a dataset, which may be nested, and check their types."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from PIL import Image

from diffusers_cfg.config import UserError

# How the names of the types of labels start.
LABEL_TYPES = ("int", "uint", "string", "large_string", "bool", "null")


def check_columns(features: datasets.Features | None, image_column: str, label_column: str | None) -> Any:
    """
    Return the type of the labels, `None` without labels.

    Raises:
        UserError: if a column is missing, `image_column` holds no images, or `label_column` not one label per image.
    """
    features = features or datasets.Features()
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    if not images:
        raise UserError(f"The dataset has no images, only the columns {sorted(kinds)}. Pass a dataset of images.")
    if image_column not in kinds:
        raise UserError(f"The dataset has no column {image_column!r}. Set --image_column to one of {images}.")
    if image_column not in images:
        raise UserError(
            f"The column {image_column!r} holds {kinds[image_column]}, not images. Set --image_column to one of "
            f"{images}."
        )
    if label_column is None:
        return None
    try:
        feature = find_feature(features, label_column)
    except KeyError:
        raise UserError(
            f"The dataset has no column {label_column!r}. Set --label_column to one of {leaf_columns(features)}."
        ) from None
    check_label_feature(feature, label_column)
    return feature


def find_feature(features: datasets.Features, column: str) -> Any:
    """Return the type of a column, or of a nested column such as "json.label". Raise KeyError if there is none."""
    if column in features:
        return features[column]
    head, _, tail = column.partition(".")
    if isinstance(features[head], dict):
        return find_feature(datasets.Features(features[head]), tail)
    raise KeyError(column)


def has_column(features: datasets.Features | None, column: str) -> bool:
    """Return whether there is a column, or a nested column such as "json.label"."""
    try:
        find_feature(features or datasets.Features(), column)
    except KeyError:
        return False
    return True


def leaf_columns(features: Mapping[str, Any]) -> list[str]:
    """Return the names of all columns, sorted. Nested columns are joined by dots."""
    leaves = []
    for name, feature in features.items():
        leaves += [f"{name}.{leaf}" for leaf in leaf_columns(feature)] if isinstance(feature, dict) else [name]
    return sorted(leaves)


def values_of(cells: Sequence[Any], column: str, path: str) -> list[Any]:
    """Return the values at `path`, a column or a nested column, in the cells of its outermost column."""
    for name in path.removeprefix(column).split(".")[1:]:
        cells = [None if cell is None else cell[name] for cell in cells]
    return list(cells)


def outermost_column(features: datasets.Features | None, path: str) -> str:
    """Return the outermost column of a nested column such as "json.label"."""
    return path if path in (features or {}) else path.partition(".")[0]


def check_label_feature(feature: Any, column: str) -> None:
    """Raise UserError if a column cannot hold one label per image."""
    if isinstance(feature, dict):
        raise UserError(
            f"The column {column!r} holds several values per image. Set --label_column to one of "
            f"{[f'{column}.{leaf}' for leaf in leaf_columns(feature)]}."
        )
    if not isinstance(feature, datasets.ClassLabel | datasets.Value) or not feature.dtype.startswith(LABEL_TYPES):
        raise UserError(
            f"The labels must be integers or strings, one for each image, but the column {column!r} holds {feature}. "
            "Cast it to integers or to ClassLabel (argmax turns one-hot vectors into integers), or choose a different "
            "--label_column."
        )


def open_encoded(content: dict[str, Any] | None) -> Image.Image:
    """Open an image that `datasets` stores as bytes, or as a path that may be on the Hub."""
    if not content or not (content["path"] or content["bytes"]):
        raise ValueError("The image is null.")
    path, data = content["path"], content["bytes"]
    if data is None and "://" in path:
        return datasets.Image().decode_example(content)
    return Image.open(path if data is None else io.BytesIO(data))


def name_encoded(row: str, content: dict[str, Any] | None) -> str:
    """Return the name of an image for messages: its row, and its path if it has one."""
    return f"{row} ({content['path']})" if content and content["path"] else row
