"""Read the metadata of a folder of images: a table with the names of the files and their labels."""

import logging
import os
import posixpath
from collections.abc import Mapping
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from diffusers_cfg.config import UserError
from diffusers_cfg.data.columns import find_feature, has_column, outermost_column, values_of
from diffusers_cfg.data.labels import UNLABELLED, listed
from diffusers_cfg.settings import DataConfig

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def read_metadata(path: str) -> pa.Table:
    """Read a file of metadata. Raise UserError if it is damaged."""
    try:
        if path.endswith(".csv"):
            # Without `convert_dtypes`, integers beside an empty cell become floats.
            return pa.Table.from_pandas(pd.read_csv(path).convert_dtypes(), preserve_index=False)
        if path.endswith(".jsonl"):
            # A row must fit into a block.
            block = pyarrow.json.ReadOptions(block_size=max(1, os.path.getsize(path)))
            return pyarrow.json.read_json(path, read_options=block)
        return pyarrow.parquet.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def has_labels(table: pa.Table, column: str) -> bool:
    """Return whether a table has the column of the labels."""
    return has_column(datasets.Features.from_arrow_schema(table.schema), column)


def rows_of_metadata(
    root: str, images: list[str], tables: Mapping[str, pa.Table], config: DataConfig
) -> tuple[list[str | None], list[Any], Any]:
    """
    Return the images that metadata lists, in its order. Log the number of images that it does not list.

    Args:
        root (`str`): the folder of the images.
        images (`list[str]`): the images in the folder, by their relative paths.
        tables (`Mapping[str, pa.Table]`): each file of metadata and its content.
        config (`DataConfig`): the names of the columns.

    Returns:
        The paths of the images (`None` where a row names no file), their labels and the type of the labels.

    Raises:
        UserError: if a table lacks the names of the files, or the tables differ.
    """
    paths, labels, features = [], [], []
    for source, table in tables.items():
        known = datasets.Features.from_arrow_schema(table.schema)
        expected = ["file_name"] if config.image_column == "image" else []
        expected.append(f"{config.image_column}_file_name")
        if not (found := [name for name in expected if name in known]):
            raise UserError(f"{source} has no column {expected[0]!r} with the names of the images: {[*known]}.")
        paths += [resolve(source, name) for name in table[found[0]].to_pylist()]
        feature = None
        if has_column(known, config.label_column):
            column, feature = outermost_column(known, config.label_column), find_feature(known, config.label_column)
            labels += values_of(table[column].to_pylist(), column, config.label_column)
        else:
            labels += [UNLABELLED] * len(table)
        features.append(feature)
    if any(feature != features[0] for feature in features):
        raise UserError(f"The column {config.label_column!r} has different types in {listed([*tables])}.")
    if unlisted := sorted({f"{root}/{path}" for path in images} - set(paths)):
        logger.warning(
            "%s: %d of the %d images in the folder are listed, so %d are left out: %s",
            listed([*tables]),
            len(images) - len(unlisted),
            len(images),
            len(unlisted),
            listed(unlisted),
        )
    return paths, labels, features[0]


def resolve(source: str, name: Any) -> str | None:
    """Return the absolute path of a file that metadata names. Raise UserError if it is not in the same folder."""
    if name is None:
        return None
    path = posixpath.normpath(str(name).replace("\\", "/"))
    if path.startswith(("/", "../")) or "://" in str(name):
        raise UserError(f"{source} names {name!r}, but may name only files in the same folder or below it.")
    return f"{os.path.dirname(source)}/{path}"
