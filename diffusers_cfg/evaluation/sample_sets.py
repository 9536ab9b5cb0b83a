"""Store sets of samples on disk in shards, so that sampling can resume, and convert them to other formats."""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.grids import make_grid
from diffusers_cfg.files import atomic_write

# Images per shard. A killed process loses at most one shard.
SHARD_SIZE = 500
SETTINGS_FILE = "settings.json"


class Shard(NamedTuple):
    """The contents of one shard."""

    images: np.ndarray  # (images, height, width, 3), uint8
    class_labels: np.ndarray  # (images,), int64
    network_evaluations: float  # per image


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

    def has(self, shard: range, class_labels: np.ndarray | torch.Tensor) -> bool:
        """Return whether a shard exists, is intact and has these class labels."""
        try:
            return self.load(shard).class_labels.tolist() == class_labels.tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    def save(self, shard: range, content: Shard) -> None:
        """Write a shard atomically."""
        images, class_labels, evaluations = content
        with atomic_write(self.path(shard)) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, arr_0=images, arr_1=class_labels, network_evaluations=evaluations)

    def load(self, shard: range) -> Shard:
        """Read a shard. Raise `OSError`, `ValueError`, `KeyError` or `BadZipFile` if it is missing or damaged."""
        with np.load(self.path(shard)) as file:
            images, class_labels = (file[name][: len(shard)] for name in ("arr_0", "arr_1"))
            return Shard(images, class_labels, float(file["network_evaluations"]))

    def first_images(self, count: int) -> torch.Tensor:
        """Return the first images, `(count, 3, height, width)`, with values in [0, 1]."""
        shards = [shard for shard in self.shards if shard.start < count]
        images = torch.cat([torch.from_numpy(self.load(shard).images) for shard in shards])
        return images[:count].movedim(-1, 1) / 255


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Record the sampling settings of a folder. Raise `UserError` if it holds samples with different settings."""
    path, settings = folder / SETTINGS_FILE, json.loads(json.dumps(settings))
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if known.get(name) != settings[name]]
        if changed:
            changes = ", ".join(f"{name} {known.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise UserError(
                f"{folder} holds samples with different settings ({changes}). Choose a different --output_dir, or "
                "delete the samples."
            )
    else:
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_png(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """Write `CLASS/INDEX.png` files, the layout that `--train_data_dir` reads."""
    mode = "L" if pipeline.image_shape[0] == 1 else "RGB"
    names = {-1: "unconditional", **{i: str(i) for i in range(pipeline.unet.num_classes)}, **pipeline.id2label}
    for shard in samples.shards:
        content = samples.load(shard)
        for index, image, class_id in zip(shard, content.images, content.class_labels.tolist(), strict=True):
            # Class names may contain characters that folder names must not.
            path = folder / names[class_id].replace("/", "_").strip(".") / f"{index:06}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).convert(mode).save(path)


def write_grid(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """Write `grid.png` with at most ten images per row."""
    images = samples.first_images(samples.num_samples)
    columns = min(10, len(images))
    padding = torch.ones(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, padding]).unflatten(0, (-1, columns))
    make_grid(rows, [str(row * columns) for row in range(len(rows))], [""] * columns).save(folder / "grid.png")


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
