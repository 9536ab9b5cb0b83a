"""Store sets of samples on disk in shards, so that sampling can resume, and convert them to other formats."""

import json
import logging
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.naming import RUN_MARKERS, is_visible
from diffusers_cfg.evaluation.grids import make_grid
from diffusers_cfg.evaluation.records import read_if_intact
from diffusers_cfg.files import LOCK_FILE, atomic_write, locked, save_image

logger = logging.getLogger(__name__)

# Images per shard. A killed process loses at most one shard.
SHARD_SIZE = 500
SETTINGS_FILE, SHARDS = "settings.json", "shard-*.npz"
# The bytes that a file name can have.
MAX_NAME_BYTES = 255
# Characters that some systems do not allow in file names.
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')


class Cost(NamedTuple):
    """The cost of an image."""

    network_evaluations: float
    gradients: float = 0.0  # of the classifier


class Shard(NamedTuple):
    """The contents of one shard."""

    images: np.ndarray  # (images, height, width, 3), uint8
    class_labels: np.ndarray  # (images,), int64
    network_evaluations: float  # per image
    gradients: float = 0.0  # of the classifier, per image
    seconds: float = float("nan")  # per image, in the process that drew them; unknown of an older version


# The costs of a shard. A shard of an older version lacks some of them.
COSTS = ("network_evaluations", "gradients", "seconds")


class SampleSet:
    """
    The images of one w on disk, in `shard-00000.npz` and so on, each with `arr_0` and `arr_1` as in the format of ADM's
    evaluator.

    Args:
        folder (`Path`): the folder of the shards.
        num_samples (`int`): the number of images in the set. A smaller set can reuse the shards of a larger one.
    """

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.folder, self.num_samples = folder, num_samples
        self.shards = [
            range(first, min(first + SHARD_SIZE, num_samples)) for first in range(0, num_samples, SHARD_SIZE)
        ]

    def path(self, shard: range) -> Path:
        """Return the path of a shard."""
        return self.folder / f"shard-{shard.start // SHARD_SIZE:05}.npz"

    def has(self, shard: range, class_labels: np.ndarray | torch.Tensor, size: tuple[int, ...]) -> bool:
        """Return whether a shard exists, is intact, and has these class labels and images of this (height, width)."""
        if not self.path(shard).is_file():
            return False
        try:
            content = self.load(shard)
            images, labels = content.images, content.class_labels
            intact = images.dtype == np.uint8 and images.shape[1:] == (*size, 3)
            intact = intact and np.isfinite(content.network_evaluations)
        except Exception as error:  # a damaged file raises exceptions of many types
            logger.warning("%s is damaged (%s) and drawn again.", self.path(shard), error)
            return False
        return bool(intact) and len(images) == len(shard) and labels.tolist() == class_labels.tolist()

    def save(self, shard: range, content: Shard) -> None:
        """Write a shard atomically."""
        images, class_labels, *costs = content
        arrays = {"arr_0": images, "arr_1": class_labels, **dict(zip(COSTS, costs, strict=True))}
        with atomic_write(self.path(shard)) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def load(self, shard: range) -> Shard:
        """Read a shard. A missing or damaged one raises an exception of any type."""
        with np.load(self.path(shard)) as file:
            images, class_labels = (file[name][: len(shard)] for name in ("arr_0", "arr_1"))
            return Shard(images, class_labels, **{name: float(file[name]) for name in COSTS if name in file})

    def first_images(self, count: int) -> torch.Tensor:
        """Return the first images, `(count, 3, height, width)`, with values in [0, 1]."""
        shards = [shard for shard in self.shards if shard.start < count]
        images = torch.cat([torch.from_numpy(self.load(shard).images) for shard in shards])
        return images[:count].movedim(-1, 1) / 255

    def delete(self) -> None:
        """Delete the shards, the settings and the folder, but no other file in it."""
        for pattern in ("shard-*", "settings.*", "samples.npz", LOCK_FILE):  # also files of a killed process
            for path in self.folder.glob(pattern):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """
    Record the settings of a folder of shards. Shards in it whose settings are not known are deleted, with a warning.
    Settings without a shard are those of a command that failed before its first one, and are replaced.

    Raises:
        UserError: if the folder holds results with different settings.
    """
    path, settings = folder / SETTINGS_FILE, json.loads(json.dumps(settings))
    known, shards = read_if_intact(path, json.loads), sorted(folder.rglob(SHARDS))
    if not known or not shards:
        if shards:
            logger.warning("%d shards in %s have unknown settings and are computed again.", len(shards), folder)
        for shard in shards:
            shard.unlink()
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    changed = [name for name in settings if known.get(name) != settings[name]]
    if changed:
        changes = ", ".join(f"{name} {known.get(name)!r}, now {settings[name]!r}" for name in changed)
        raise UserError(
            f"{folder} holds results with different settings ({changes}). Choose a different --output_dir, or delete "
            "that folder."
        )


@contextmanager
def claimed(folder: Path, settings: dict[str, Any], accelerator: Accelerator) -> Iterator[None]:
    """
    Lock a folder of shards in the block and record its settings, on the main process.

    Raises:
        UserError: if another process uses the folder, it holds results with different settings, or a file cannot be
            written in the block. The message then says which results are kept, and how to go on.
    """
    try:
        with ExitStack() as stack:
            if accelerator.is_main_process:
                stack.enter_context(locked(folder, "--output_dir"))
                claim_folder(folder, settings)
            yield
    except OSError as error:
        raise UserError(
            f"A file cannot be written: {error}. The results so far are kept in {folder}. Repeat the command to go "
            "on from them, after freeing disk space if the disk is full."
        ) from error


def folder_names(names: dict[int, str]) -> dict[int, str]:
    """
    Return a name for the folder of each class: its own if all systems allow that name and no other class has it (in any
    case, which some systems ignore). Other names are cleaned, and end in the id of the class.

    Args:
        names (`dict[int, str]`): the names of the classes by id, the one that keeps its name first.
    """
    folders: dict[int, str] = {}
    taken: set[str] = set()
    for class_id, name in names.items():
        is_read = is_visible(name) and not RUN_MARKERS.fullmatch(name)  # by --train_data_dir
        fits = is_read and not FORBIDDEN.search(name) and name == name.rstrip(" .")
        if name and fits and len(name.encode()) <= MAX_NAME_BYTES and comparable(name) not in taken:
            folders[class_id] = name
            taken.add(comparable(name))
    for class_id in [class_id for class_id in names if class_id not in folders]:
        cleaned = FORBIDDEN.sub("_", names[class_id]).strip(" .").encode()[: MAX_NAME_BYTES // 2]
        name = f"{cleaned.decode(errors='ignore')}_{class_id}".lstrip("_")
        while comparable(name) in taken:
            name += "_"
        folders[class_id] = name
        taken.add(comparable(name))
    return folders


def comparable(name: str) -> str:
    """Return a text that is equal for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", name).casefold()


def write_png(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """
    Write `CLASS/INDEX.png` files, the layout that `--train_data_dir` reads. If a class has a different name than its
    folder, metadata.jsonl holds the names of the classes, which `--train_data_dir` then reads instead.
    """
    mode = "L" if pipeline.image_shape[0] == 1 else "RGB"
    names = {**{i: str(i) for i in range(pipeline.num_classes)}, **pipeline.id2label, -1: "unconditional"}
    folders, rows = folder_names(names), []
    for shard in samples.shards:
        content = samples.load(shard)
        for index, image, class_id in zip(shard, content.images, content.class_labels.tolist(), strict=True):
            path = folder / folders[class_id] / f"{index:06}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).convert(mode).save(path)
            rows.append((class_id, path.relative_to(folder).as_posix()))
    if any(folders[class_id] != names[class_id] for class_id in {class_id for class_id, _ in rows}):
        with atomic_write(folder / "metadata.jsonl") as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for class_id, path in rows:
                label = names[class_id] if class_id >= 0 else None
                file.write(json.dumps({"file_name": path, "label": label}) + "\n")


def write_grid(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """Write `grid.png` with at most ten images per row."""
    images = samples.first_images(samples.num_samples)
    columns = min(10, len(images))
    padding = torch.ones(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, padding]).unflatten(0, (-1, columns))
    grid = make_grid(rows, [str(row * columns) for row in range(len(rows))], [""] * columns)
    save_image(grid, folder / "grid.png")


def write_npz(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """Write all shards to `samples.npz`. Memory is bounded, as shards are copied one at a time."""
    shape = samples.load(samples.shards[0]).images.shape[1:]
    unfinished = samples.folder / "samples.npz"  # in the shards' folder, which a killed run leaves behind
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, field, dtype, rest in (("arr_0", "images", "|u1", shape), ("arr_1", "class_labels", "<i8", ())):
            with archive.open(f"{member}.npy", "w", force_zip64=True) as file:
                header = {"descr": dtype, "fortran_order": False, "shape": (samples.num_samples, *rest)}
                np.lib.format.write_array_header_1_0(file, header)
                for shard in samples.shards:
                    file.write(getattr(samples.load(shard), field).astype(dtype).tobytes())
    unfinished.replace(folder / "samples.npz")


WRITERS = {"png": write_png, "grid": write_grid, "npz": write_npz}
