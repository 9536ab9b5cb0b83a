"""Test how images are split into those to train on and those that are held out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.data.sources import load_held_out_images, load_labelled_images
from diffusers_cfg.settings import DataConfig
from tests.support.images import save_class_folders, save_shards


def make_source(kind: str, folder: Path) -> dict[str, Any]:
    """Write twelve numbered images, alternating between two classes, and return the settings that name them."""
    if kind == "folder":
        return {"train_data_dir": save_class_folders(folder)}
    return {"dataset_name": save_shards(folder, 6, 6), "cache_dir": str(folder.parent / "cache")}


def both_parts(**settings) -> tuple[LabelledImages, LabelledImages]:
    config = DataConfig(resolution=8, **settings)
    return load_labelled_images(config), load_held_out_images(config)


def numbers_of(images: LabelledImages) -> list[int]:
    """Return the numbers of images whose pixels are their number."""
    return [int(np.asarray(images.open_image(index))[0, 0]) for index in range(len(images))]


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_the_parts_divide_the_images(tmp_path, kind, fraction):
    settings = make_source(kind, tmp_path / "data")
    everything = load_labelled_images(DataConfig(**settings))
    training, held_out = both_parts(**settings, train_val_split=fraction)
    assert sorted(numbers_of(training) + numbers_of(held_out)) == list(range(12))
    assert (len(held_out), training.num_held_out) == (round(12 * fraction),) * 2
    names = dict(zip(numbers_of(everything), map(everything.name_image, range(12)), strict=True))
    for part in (training, held_out):
        assert part.class_labels.tolist() == [number % 2 for number in numbers_of(part)]
        assert [part.name_image(index) for index in range(len(part))] == [names[n] for n in numbers_of(part)]
        assert (part.id2label, part.channels) == ({0: "ant", 1: "bee"}, 1)
        order = [numbers_of(everything).index(number) for number in numbers_of(part)]
        assert order == sorted(order)
