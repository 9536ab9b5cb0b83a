"""Write small datasets to disk, with images that are identified by their pixels."""

import io
import tarfile
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_cfg.data.datasets import StreamedImages, identity_collate, training_dataset
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.settings import TrainConfig

CLASSES = ["ant", "bee"]
SPLITS_CARD = "---\ndataset_info:\n  splits:\n  - {{name: train, num_bytes: 1, num_examples: {num_examples}}}\n---\n"
WEBDATASET_CARD = """---
dataset_info:
  features:
  - {name: png, dtype: image}
  - {name: cls, dtype: {class_label: {names: {'0': ant, '1': bee}}}}
---
"""


def solid(value: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Return an image of one color with `value` in its first channel."""
    return Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value))


def numbered(number: int) -> bytes:
    """Return an 8×8 grayscale PNG whose pixels are `number`."""
    file = io.BytesIO()
    solid(number, (8, 8), "L").save(file, "PNG")
    return file.getvalue()


def save_dataset(path: Path, labels: list | None, feature: datasets.ClassLabel | datasets.Value | None = None) -> str:
    """Write a Parquet dataset in the Hub's layout: grayscale images of 0, 10, 20, … and optional labels."""
    rows: dict[str, list] = {"image": [solid(10 * i, mode="L") for i in range(3 if labels is None else len(labels))]}
    if labels is not None:
        rows["label"] = labels
    features = datasets.Features({"image": datasets.Image(), "label": feature}) if feature is not None else None
    dataset = datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image())
    path.mkdir()
    dataset.to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


def save_shards(
    folder: Path,
    *sizes: int,
    labels: Callable[[int], int | None] | None = lambda number: number % 2,
    feature: datasets.ClassLabel | datasets.Value | None = None,
    broken: Collection[int] = (),
) -> str:
    """
    Write a Parquet dataset of consecutively numbered images.

    Args:
        folder (`Path`): Folder to create.
        sizes (`int`): Number of images in each shard.
        labels (`Callable`, *optional*): Function from the number of an image to its label; `None` for no label column.
        feature (*optional*): Type of the labels; by default a ClassLabel of `CLASSES`.
        broken (`Collection[int]`): Numbers of images that cannot be decoded.

    Returns:
        `str`: The folder.
    """
    folder.mkdir()
    features: dict[str, datasets.Image | datasets.ClassLabel | datasets.Value] = {"image": datasets.Image()}
    if labels is not None:
        features["label"] = feature or datasets.ClassLabel(names=CLASSES)
    for shard in range(len(sizes)):
        numbers = range(sum(sizes[:shard]), sum(sizes[: shard + 1]))
        rows: dict[str, list] = {
            "image": [{"bytes": b"broken" if n in broken else numbered(n), "path": f"{n}.png"} for n in numbers]
        }
        if labels is not None:
            rows["label"] = [labels(number) for number in numbers]
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        dataset.to_parquet(folder / f"train-{shard:05d}-of-{len(sizes):05d}.parquet")
    return str(folder)


def save_unchecked_label(folder: Path, label: int) -> str:
    """Write six images of two classes. Row 3 has a label that `datasets` refuses to write."""
    source = save_shards(folder, 6)
    path = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    labels = table["label"].to_pylist()
    labels[3] = label
    pq.write_table(table.set_column(1, table.schema.field("label"), [labels]), path)
    return source


def save_tars(folder: Path) -> str:
    """Write a WebDataset of two shards with six images each, without its card (see `WEBDATASET_CARD`)."""
    (folder / "train").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / "train" / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * 6, shard * 6 + 6):
                for kind, content in (("png", numbered(number)), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder)


def save_class_folders(folder: Path) -> str:
    """Write twelve numbered images, alternating between two class folders."""
    for number in range(12):
        path = folder / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbered(number))
    return str(folder)


def save_images(folder: Path, names: list[str], mode: str = "L", size: int = 8, n: int = 20) -> str:
    """Save `n` random images of each class in a folder of class folders, and return its path."""
    values = np.random.default_rng(0).integers(0, 256, (len(names), n, size, size), np.uint8)
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for j in range(n):
            Image.fromarray(values[i, j]).convert(mode).save(folder / name / f"{j}.png")
    return str(folder)


def save_three_classes(folder: Path) -> Path:
    """Write three class folders, each with four RGB images of one colour."""
    for label, name in enumerate(("cat", "dog", "eel")):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            solid(label * 100).save(folder / name / f"{i}.png")
    return folder


def save_folder_with_broken_image(folder: Path) -> None:
    """Write two class folders, each with ten 8×8 grayscale images of noise. Row 9 cannot be read."""
    for label, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    (folder / "a" / "9.png").write_bytes(b"broken")


def stream_config(source: str | None, **settings) -> TrainConfig:
    """Return settings to stream a dataset of 8×8 images in batches of 4 and shuffled blocks of 5."""
    return TrainConfig(
        **{
            "dataset_name": source,
            "streaming": True,
            "resolution": 8,
            "train_batch_size": 4,
            "shuffle_buffer_size": 5,
            "max_unreadable_fraction": 0.5,
            **settings,
        }
    )


def open_stream(
    source: str | None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    needs_labels: bool = True,
    **settings,
) -> StreamedImages:
    """Return the streamed dataset of one rank."""
    config = stream_config(source, dataloader_num_workers=num_workers, **settings)
    images = training_dataset(load_labelled_images(config, needs_labels), config, 1, show_progress=False)
    assert isinstance(images, StreamedImages)
    images.divide(rank, world_size)
    return images


def numbers_of(images: StreamedImages, num_batches: int) -> list[int]:
    """Use the next batches and return the numbers of their images. Check the default labels of `save_shards`."""
    num_workers = images.config.dataloader_num_workers
    loader = DataLoader(
        images,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=identity_collate,  # pyright: ignore[reportArgumentType] a batch: the dataset is already batched
    )
    numbers = []
    for batch in islice(loader, num_batches):
        assert (batch.images[:, 0, 0, 0] % 2 == batch.class_labels).all()
        numbers += batch.images[:, 0, 0, 0].tolist()
        images.mark_used(batch)
    return numbers
