"""Keep sets of samples on disk in shards, so that drawing them can be resumed, and write them in other formats."""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.grids import draw_grid
from diffusers_cfg.files import atomic_write

# Images in a shard. A process that is killed loses at most one shard.
SHARD_SIZE = 500
SETTINGS_FILE = "settings.json"


class Shard(NamedTuple):
    images: np.ndarray  # (images, height, width, 3), uint8
    class_labels: np.ndarray  # (images,), int64
    network_evaluations: float  # for one image


class SampleSet:
    """
    The images of one w on disk: `shard-00000.npz` and so on, each with `arr_0` and `arr_1` as ADM's evaluator has them.

    Args:
        folder (`Path`): where the shards are, or will be.
        num_samples (`int`): images in the set. The shards of a larger set serve a smaller one.
    """

    def __init__(self, folder: Path, num_samples: int):
        self.folder, self.num_samples = folder, num_samples
        self.shards = [
            range(first, min(first + SHARD_SIZE, num_samples)) for first in range(0, num_samples, SHARD_SIZE)
        ]

    def path(self, shard: range) -> Path:
        """Return the file of a shard."""
        return self.folder / f"shard-{shard.start // SHARD_SIZE:05}.npz"

    def has(self, shard: range, class_labels: np.ndarray | torch.Tensor) -> bool:
        """Return whether a shard is there, whole, and of these classes."""
        try:
            return self.load(shard).class_labels.tolist() == class_labels.tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    def save(self, shard: range, content: Shard) -> None:
        """Write a shard, atomically."""
        images, class_labels, evaluations = content
        with atomic_write(self.path(shard)) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, arr_0=images, arr_1=class_labels, network_evaluations=evaluations)

    def load(self, shard: range) -> Shard:
        """Read a shard. Raises OSError, ValueError, KeyError or BadZipFile if it is missing or damaged."""
        with np.load(self.path(shard)) as file:
            images, class_labels = (file[name][: len(shard)] for name in ("arr_0", "arr_1"))
            return Shard(images, class_labels, float(file["network_evaluations"]))

    def first_images(self, count: int) -> torch.Tensor:
        """Return the first images, `(count, 3, height, width)`, in [0, 1]."""
        shards = [shard for shard in self.shards if shard.start < count]
        images = torch.cat([torch.from_numpy(self.load(shard).images) for shard in shards])
        return images[:count].movedim(-1, 1) / 255


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Record how the samples in a folder are drawn. Raises UserError if it holds samples of other settings."""
    path, settings = folder / SETTINGS_FILE, json.loads(json.dumps(settings))
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if known.get(name) != settings[name]]
        if changed:
            changes = ", ".join(f"{name} {known.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise UserError(
                f"{folder} holds samples that were drawn differently ({changes}): choose another --output_dir, or "
                "delete them."
            )
    else:
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_png(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """Write `CLASS/INDEX.png`, as `--train_data_dir` reads them."""
    mode = "L" if pipeline.image_shape[0] == 1 else "RGB"
    names = {-1: "unconditional", **{i: str(i) for i in range(pipeline.unet.num_classes)}, **pipeline.id2label}
    for shard in samples.shards:
        content = samples.load(shard)
        for index, image, class_id in zip(shard, content.images, content.class_labels.tolist(), strict=True):
            # A class may have any name, a folder may not.
            path = folder / names[class_id].replace("/", "_").strip(".") / f"{index:06}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).convert(mode).save(path)


def write_grid(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """Write `grid.png`, at most ten images in a row."""
    images = samples.first_images(samples.num_samples)
    columns = min(10, len(images))
    missing = torch.ones(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, missing]).unflatten(0, (-1, columns))
    draw_grid(rows, [str(row * columns) for row in range(len(rows))], [""] * columns).save(folder / "grid.png")


def write_npz(samples: SampleSet, folder: Path, pipeline: CFGPipeline) -> None:
    """Write `samples.npz`, which holds all shards. They are copied one at a time, so memory does not grow."""
    shape = samples.load(samples.shards[0]).images.shape[1:]
    unfinished = samples.folder / "samples.npz"  # among the shards, which a run that is killed leaves for the next
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, field, dtype, rest in (("arr_0", "images", "|u1", shape), ("arr_1", "class_labels", "<i8", ())):
            with archive.open(f"{member}.npy", "w", force_zip64=True) as file:
                header = {"descr": dtype, "fortran_order": False, "shape": (samples.num_samples, *rest)}
                np.lib.format.write_array_header_1_0(file, header)
                for shard in samples.shards:
                    file.write(getattr(samples.load(shard), field).astype(dtype).tobytes())
    unfinished.replace(folder / "samples.npz")


WRITERS = {"png": write_png, "grid": write_grid, "npz": write_npz}
