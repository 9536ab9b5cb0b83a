"""Test images that are stacked from three grayscale images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import CachedImages, LazyImages, training_dataset
from diffusers_cfg.data.images import NUM_STACKS, StackedImages, require_classes
from diffusers_cfg.data.sources import Digits, load_labelled_images
from diffusers_cfg.settings import DataConfig, TrainConfig
from tests.support.images import save_class_folders, solid

STACKED = DataConfig(resolution=8, stack=3)


@pytest.fixture(scope="module")
def stacks() -> StackedImages:
    images = load_labelled_images(STACKED)
    assert isinstance(images, StackedImages)
    return images


def test_channels_are_three_images_of_the_data(stacks):
    digits = Digits()
    assert (len(stacks), stacks.channels, stacks.id2label, stacks.present_classes) == (NUM_STACKS, 3, {}, [])
    assert set(stacks.class_labels) == {-1}
    for index in (0, 1, NUM_STACKS - 1):
        stacked = np.asarray(stacks.open_image(index))
        assert (stacked == digits.images[stacks.indices[index]].transpose(1, 2, 0)).all()
        names = ", ".join(f"digit {i}" for i in stacks.indices[index])
        assert stacks.name_image(index) == f"the stack of {names}"


def test_stacks_never_change(stacks):
    """Runs and published figures share them."""
    assert stacks.indices[:2].tolist() == [[1604, 181, 81], [399, 1305, 1571]]
    assert stacks.fingerprint() == load_labelled_images(DataConfig(resolution=8, stack=3)).fingerprint()


def test_channels_are_independent_and_all_images_are_used(stacks):
    counts = np.bincount(stacks.indices.ravel(), minlength=1797)
    mean = 3 * NUM_STACKS / 1797
    assert abs(counts - mean).max() < 5 * mean**0.5
    classes = Digits().class_labels[stacks.indices]
    modes = np.bincount(classes @ [100, 10, 1], minlength=1000)
    assert len(modes) == 1000
    assert abs(modes - 120).max() < 5 * 120**0.5 + 0.1 * 120  # the classes differ by 5 %


def test_memory_and_lazy_decoding_give_the_same_images(tmp_path, monkeypatch):
    folder = save_class_folders(tmp_path / "data")
    solid(77, (20, 10), "L").save(Path(folder) / "ant" / "wide.png")  # channels may differ in size
    config = DataConfig(train_data_dir=folder, resolution=8, stack=3, center_crop=False)
    monkeypatch.setattr("diffusers_cfg.data.images.NUM_STACKS", 50)
    images = load_labelled_images(config)
    cached = training_dataset(images, config, 3, show_progress=False)
    monkeypatch.setattr("diffusers_cfg.data.datasets.MAX_CACHED_BYTES", 0)
    lazy = training_dataset(images, config, 3, show_progress=False)
    assert isinstance(cached, CachedImages)
    assert isinstance(lazy, LazyImages)
    rows = list(range(50))
    assert torch.equal(cached.__getitems__(rows).images, lazy.__getitems__(rows).images)
    assert cached.class_labels.tolist() == lazy.class_labels.tolist() == [-1] * 50
    assert len(cached.images.flatten(1).unique()) > 5


def test_an_unreadable_image_is_in_no_stack(tmp_path, monkeypatch, caplog):
    folder = Path(save_class_folders(tmp_path / "data"))
    monkeypatch.setattr("diffusers_cfg.data.images.NUM_STACKS", 50)
    config = DataConfig(train_data_dir=str(folder), resolution=8, stack=3, max_unreadable_fraction=0.5)
    images = load_labelled_images(config)

    def pixels() -> torch.Tensor:
        """Return the value of each channel of each stack, since each image has one value."""
        dataset = training_dataset(images, config, 3, show_progress=False)
        assert isinstance(dataset, CachedImages)
        return dataset.images[:, :, 0, 0]

    assert set(pixels().unique().tolist()) == {*range(12)}
    (folder / "ant" / "4.png").write_bytes(b"broken")
    assert set(pixels().unique().tolist()) == {*range(12)} - {4}
    assert pixels().shape == (50, 3)
    assert "Skipped unreadable image" in caplog.text


def test_stacks_have_no_classes(stacks):
    with pytest.raises(UserError, match="--stack makes images without classes.*use train_ddgan.py"):
        require_classes(stacks)


def test_images_need_no_labels(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        solid(number, (8, 8), "L").save(folder / f"{number}.png")
    assert len(load_labelled_images(DataConfig(train_data_dir=str(folder), resolution=8, stack=3))) == NUM_STACKS


def test_images_with_color_are_refused(tmp_path):
    folder = Path(save_class_folders(tmp_path / "data"))
    solid(0, (8, 8)).save(folder / "ant" / "0.png")
    with pytest.raises(UserError, match="--stack makes the channels .* of grayscale images, but the data has images w"):
        load_labelled_images(DataConfig(train_data_dir=str(folder), stack=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stack": 2}, "stack must be one of 1, 3, but is 2"),
        ({"streaming": True, "dataset_name": "x"}, "--stack 3 chooses among all images, which --streaming does not"),
        ({"train_val_split": 0.1}, "--stack 3 cannot be combined with --train_val_split 0.1"),
        ({"eval_steps": 5}, "--eval_steps evaluates samples of each class.*studies/modes.py"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"stack": 3, **settings})
