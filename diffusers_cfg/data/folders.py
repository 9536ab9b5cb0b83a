"""
Read a local folder of images. The class of an image is the folder directly under the root.

`datasets` finds images by words such as "train" and "test" anywhere in their paths, and drops the others.
"""

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from PIL import Image

from diffusers_cfg.config import UserError
from diffusers_cfg.data.labels import UNLABELLED, listed
from diffusers_cfg.data.metadata import METADATA_FILES, has_labels, read_metadata, rows_of_metadata
from diffusers_cfg.data.naming import RUN_MARKERS, is_visible
from diffusers_cfg.settings import DataConfig

logger = logging.getLogger(__name__)

# The names of folders of splits, in lower case, by the names of the splits.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
# Files beside images that are not meant as images, by their suffix or by their name without it.
COMPANIONS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".log"}
COMPANIONS |= {"readme", "license", "thumbs", "desktop"}  # Thumbs.db and desktop.ini
# Files that `datasets` reads.
DATASET_FILES = {".parquet", ".arrow", ".tar"}
# What Python puts into names in place of bytes that are not UTF-8.
NOT_UTF8 = re.compile("[\ud800-\udfff]")


@cache
def image_suffixes() -> set[str]:
    """Return the suffixes of the files that PIL can read, in lower case."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def sorted_names(names: Iterable[str]) -> list[str]:
    """Sort the names of classes: by number if all are numbers, so that 0 … N - 1 are their own ids."""
    names = sorted(names)
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def count_kinds(paths: Iterable[str]) -> str:
    """Return the number of files with each suffix, such as ".HEIC 10, .AVIF 4"."""
    kinds = Counter(os.path.splitext(path)[1] or "no suffix" for path in paths)
    return listed([f"{kind} {count}" for kind, count in kinds.most_common()])


def kind_of(name: str) -> Literal["image", "metadata", "companion", "other"]:
    """Return the kind of a file by its name."""
    stem, suffix = os.path.splitext(name.lower())
    if name in METADATA_FILES:
        return "metadata"
    if suffix in image_suffixes():
        return "image"
    return "companion" if COMPANIONS & {stem, suffix} else "other"


@dataclass
class ImageFolder:
    """
    The files in a folder and below it, by their paths relative to the folder, sorted.

    Attributes:
        root (`str`): the absolute path of the folder.
        folders (`list[str]`): the subfolders.
        images (`list[str]`): the files that PIL can read according to their suffix.
        metadata (`list[str]`): the files of metadata.
        others (`list[str]`): the other files, such as images that PIL cannot read, but not `COMPANIONS`.
    """

    root: str
    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """The names of the folders directly in the folder, in the order of their class ids."""
        return sorted_names(path for path in self.folders if "/" not in path)

    def subfolder(self, name: str) -> "ImageFolder":
        """Return a subfolder."""
        parts = (self.folders, self.images, self.metadata, self.others)
        below = ([path[len(name) + 1 :] for path in paths if path.startswith(f"{name}/")] for paths in parts)
        return ImageFolder(f"{self.root}/{name}", *below)

    def absolute(self, paths: Iterable[str]) -> list[str]:
        """Return the absolute paths of files."""
        return [f"{self.root}/{path}" for path in paths]

    @property
    def hint(self) -> str:
        """The advice for a folder without images, judging by its other files."""
        kinds = {os.path.splitext(path)[1].lower(): path for path in reversed(self.others)}
        if kinds.keys() & DATASET_FILES:
            return " Pass Parquet, Arrow and WebDataset files with --dataset_name."
        return f" Unpack {self.root}/{kinds['.zip']}." if ".zip" in kinds else ""


def list_folder(source: str) -> ImageFolder:
    """
    List a folder. Symbolic links are followed. Hidden files are ignored, and output folders of runs are left out with a
    warning.
    """
    folder = ImageFolder(os.path.abspath(source))
    add_files(folder, "", frozenset())
    for paths in (folder.folders, folder.images, folder.metadata, folder.others):
        paths.sort()
    for path in (*folder.folders, *folder.images):
        if NOT_UTF8.search(path):
            raise UserError(f"{folder.root} contains {path!r}, whose name is not UTF-8. Rename it.")
    return folder


def add_files(folder: ImageFolder, prefix: str, parents: frozenset[tuple[int, int]]) -> None:
    """Add the files at `prefix` and below it. `parents` identifies the folders above, to which links may lead back."""
    path = f"{folder.root}/{prefix}"
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    with os.scandir(path) as found:
        entries = [entry for entry in found if is_visible(entry.name)]
    if any(RUN_MARKERS.fullmatch(entry.name) for entry in entries):
        if not prefix:
            raise UserError(f"{folder.root} is the output folder of a run. Pass the folder with the images.")
        logger.warning("%s is the output folder of a run, so its images are left out.", path.rstrip("/"))
        return
    if prefix:
        folder.folders.append(prefix[:-1])
    for entry in entries:
        if entry.is_dir():
            add_files(folder, f"{prefix}{entry.name}/", parents | {identity})
            continue
        kind = kind_of(entry.name)
        if kind != "companion":
            paths = {"image": folder.images, "metadata": folder.metadata, "other": folder.others}[kind]
            paths.append(prefix + entry.name)


class Rows(NamedTuple):
    """The images of a folder in order, with their labels."""

    paths: list[str | None]  # absolute; None where the metadata names no file
    labels: list[Any]
    feature: Any  # the type of the labels, None without labels, or the list of the names of class folders
    left_out: list[str]  # the absolute paths of files that PIL cannot read


def read_folder(folder: ImageFolder, config: DataConfig, needs_labels: bool) -> tuple[datasets.Dataset, list[str]]:
    """
    Read a folder of class folders, a folder with metadata, or a folder with such a folder for each split.

    Args:
        folder (`ImageFolder`): the folder.
        config (`DataConfig`): the split, and the names of the columns of metadata.
        needs_labels (`bool`): whether to refuse a folder without labels.

    Returns:
        The dataset, and the paths of the files in it that PIL cannot read.

    Raises:
        UserError: if the folder has no images, no labels or no such split, or the metadata is wrong.
    """
    folders = find_splits(folder, needs_labels)
    try:
        chosen = {name for name, _, _ in slices(config.dataset_split, dict.fromkeys(folders, sys.maxsize))}
    except ValueError as error:
        own = [name for name in folder.classes if name in folders] or [*folders]
        raise UserError(
            f"--dataset_split {config.dataset_split!r} is not a split of {folder.root}, nor a part or a sum of "
            f"splits. Use: {listed(own)}."
        ) from error
    splits = {name: read_rows(folders[name], config, needs_labels) for name in sorted(chosen)}
    parts = slices(config.dataset_split, {name: len(rows.paths) for name, rows in splits.items()})
    paths = [path for name, first, end in parts for path in splits[name].paths[first:end]]
    labels = [label for name, first, end in parts for label in splits[name].labels[first:end]]
    features = [rows.feature for rows in splits.values()]
    if all(isinstance(feature, list) for feature in features):
        classes = set().union(*features)
        # Splits that share classes have the same ids, even if a small split lacks some of them.
        shared = [folder.classes for folder in folders.values() if classes & {*folder.classes}]
        names = sorted_names(classes.union(*shared))
        ids = {name: class_id for class_id, name in enumerate(names)}
        columns = {"image": paths, "label": [ids[label] for label in labels]}
        types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    elif any(feature != features[0] for feature in features):
        raise UserError(f"{folder.root}: the splits of {config.dataset_split!r} have labels of different types.")
    else:
        columns, types = {config.image_column: paths}, {config.image_column: datasets.Image()}
        if features[0] is not None:
            columns[config.label_column], types[config.label_column] = labels, features[0]
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    return dataset, sorted({path for rows in splits.values() for path in rows.left_out})


def find_splits(folder: ImageFolder, needs_labels: bool) -> dict[str, ImageFolder]:
    """
    Return the folder of each split, by its own name and by that of the split. A folder has splits only if all of its
    subfolders are named like splits, and have labels if `needs_labels`. Otherwise it is the split "train" itself.
    """
    splits = {name: SPLIT_OF[name.lower()] for name in folder.classes if name.lower() in SPLIT_OF}
    folders = {name: folder.subfolder(name) for name in splits}
    others = [name for name in folder.classes if name not in splits]
    labelled = any(split.folders or split.metadata for split in folders.values())
    if others or not splits or (needs_labels and not labelled):
        if len(splits) > 1:
            reason = f"{others[0]} is beside them" if others else "they have no subfolders"
            taken = "The folders %s of %s are taken as classes, not as splits, because %s."
            logger.warning(taken, listed([*splits]), folder.root, reason)
        return {"train": folder}
    warn_about_files_beside(folder, [*folder.images, *folder.metadata, *folder.others])
    unique = {split: folders[name] for name, split in splits.items() if [*splits.values()].count(split) == 1}
    return unique | folders


def slices(split: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Return the name, the first row and the end of each part of a split such as "train[:10%]+test"."""
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, part.from_, part.to) for part in parts]


def read_rows(folder: ImageFolder, config: DataConfig, needs_labels: bool) -> Rows:
    """Return the images of a split, labelled by metadata or by class folders. Raise UserError if there are none."""
    tables = {path: read_metadata(path) for path in folder.absolute(folder.metadata)}
    unlabelled = [path for path, table in tables.items() if not has_labels(table, config.label_column)]
    if unlabelled and len(unlabelled) == len(tables) and folder.classes:
        logger.warning(
            "%s has no column %r (--label_column), so the class folders label the images.",
            listed(unlabelled),
            config.label_column,
        )
    elif unlabelled and (needs_labels or len(unlabelled) < len(tables)):
        raise UserError(
            f"{unlabelled[0]} has no column {config.label_column!r}. Set --label_column to one of "
            f"{tables[unlabelled[0]].column_names}, or put the images into one subfolder per class."
        )
    elif tables:
        return Rows(*rows_of_metadata(folder.root, folder.images, tables, config), [])
    if not folder.classes or (not needs_labels and any("/" not in path for path in folder.images)):
        if needs_labels:
            raise UserError(
                f"{folder.root} has no subfolders. Pass a folder with one subfolder per class, or with a metadata.csv "
                f"that has the columns file_name and {config.label_column}.{folder.hint}"
            )
        if not folder.images:
            raise UserError(f"{folder.root} has no images.{folder.hint}")
        unlabelled_rows = [UNLABELLED] * len(folder.images)
        return Rows([*folder.absolute(folder.images)], unlabelled_rows, None, folder.absolute(folder.others))
    warn_about_files_beside(folder, [*folder.images, *folder.others])
    images, others = ([path for path in paths if "/" in path] for paths in (folder.images, folder.others))
    labels = [path.partition("/")[0] for path in images]
    present = {*labels}
    if empty := [name for name in folder.classes if name not in present]:
        unread = count_kinds(path for path in others if path.partition("/")[0] in empty)
        raise UserError(
            f"These class folders have no image that PIL can read: {listed(folder.absolute(empty))}"
            f"{f' (but {unread})' if unread else ''}. Add images, or remove the folders.{folder.hint}"
        )
    return Rows([*folder.absolute(images)], labels, folder.classes, folder.absolute(others))


def warn_about_files_beside(folder: ImageFolder, paths: list[str]) -> None:
    """Log those files that lie directly in the folder, beside class folders or splits."""
    if beside := [path for path in paths if "/" not in path]:
        logger.warning(
            "Files beside the subfolders are left out: %s. Put images into the folder of their class, and unpack "
            "archives.",
            listed(folder.absolute(beside)),
        )


def has_image_files(folder: ImageFolder) -> bool:
    """Return whether a folder holds images, rather than files of a dataset or a card that describes it."""
    card = Path(folder.root, "README.md")
    if card.is_file() and re.search(r"^(configs|dataset_info):", card.read_text("utf-8", "replace"), re.MULTILINE):
        return False
    kinds = Counter(os.path.splitext(path)[1].lower() for path in folder.others)
    return bool(folder.images) and not kinds.keys() & {".parquet", ".arrow"} and kinds[".tar"] < len(folder.images)
