"""Test how images are split into those to train on and those that are held out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import CachedImages, LazyImages, fingerprint, stack_images, training_dataset
from diffusers_cfg.data.images import ImageSubset, LabelledImages, require_8_bits
from diffusers_cfg.data.sources import Digits, load_held_out_images, load_labelled_images
from diffusers_cfg.settings import DataConfig, TrainConfig
from tests.support.images import save_class_folders, save_dataset, save_shards, solid
from tests.support.odd_images import READABLE


def source(kind: str, folder: Path) -> dict[str, Any]:
    """Write twelve numbered images, alternating between two classes, and return the settings that name them."""
    if kind == "folder":
        return {"train_data_dir": save_class_folders(folder)}
    return {"dataset_name": save_shards(folder, 6, 6), "cache_dir": str(folder.parent / "cache")}


def both_parts(train_val_split: float, **settings) -> tuple[LabelledImages, LabelledImages]:
    config = DataConfig(resolution=8, train_val_split=train_val_split, **settings)
    return load_labelled_images(config), load_held_out_images(config)


def numbers_of(images: LabelledImages) -> list[int]:
    """Return the numbers of images whose pixels are their number."""
    return [int(np.asarray(images.open_image(index))[0, 0]) for index in range(len(images))]


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_the_parts_divide_the_images(tmp_path, kind, fraction):
    settings = source(kind, tmp_path / "data")
    whole = load_labelled_images(DataConfig(**settings))
    training, held_out = both_parts(fraction, **settings)
    assert sorted(numbers_of(training) + numbers_of(held_out)) == list(range(12))
    assert (len(held_out), training.num_held_out) == (round(12 * fraction),) * 2
    position = {number: index for index, number in enumerate(numbers_of(whole))}
    for part in (training, held_out):
        indices = [position[number] for number in numbers_of(part)]
        assert indices == sorted(indices)
        assert part.class_labels.tolist() == whole.class_labels[indices].tolist()
        assert [part.name_image(i) for i in range(len(part))] == [whole.name_image(i) for i in indices]
        assert (part.id2label, part.channels) == ({0: "ant", 1: "bee"}, 1)


def test_the_split_of_the_digits_never_changes():
    """Published likelihoods name the fraction only."""
    training, held_out = both_parts(0.1)
    assert (len(training), len(held_out), held_out.channels) == (1617, 180, 1)
    names = [held_out.name_image(index) for index in range(180)]
    assert names[:5] == ["digit 30", "digit 42", "digit 53", "digit 67", "digit 73"]
    assert not {*names} & {training.name_image(index) for index in range(1617)}
    more = both_parts(0.2)[1]
    assert {*names} < {more.name_image(index) for index in range(len(more))}


def test_all_runs_hold_out_the_same_images(tmp_path):
    settings = {**source("dataset", tmp_path / "data"), "train_val_split": 0.5}
    held_out = numbers_of(load_held_out_images(DataConfig(**settings)))
    assert numbers_of(load_held_out_images(TrainConfig(**settings, seed=7), needs_labels=False)) == held_out


def test_without_a_split_all_images_are_trained_on(tmp_path):
    images = load_labelled_images(DataConfig(train_val_split=0.0))
    assert (type(images), len(images), images.num_held_out) == (Digits, 1797, 0)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.0, "--train_val_split 0 holds out 0 of the 12 images.*Raise it"),
        (0.01, "--train_val_split 0.01 holds out 0 of the 12 images.*Raise it"),
        (0.99, "--train_val_split 0.99 holds out 12 of the 12 images.*Lower it"),
    ],
)
def test_an_empty_part_is_refused(tmp_path, fraction, message):
    config = DataConfig(**source("folder", tmp_path / "data"), train_val_split=fraction)
    with pytest.raises(UserError, match=message):
        load_held_out_images(config)
    if fraction:
        with pytest.raises(UserError, match=message):
            load_labelled_images(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_val_split": 1.0}, r"train_val_split must lie in \[0, 1\), but is 1.0"),
        ({"train_val_split": -0.1}, r"train_val_split must lie in \[0, 1\), but is -0.1"),
        ({"train_val_split": float("nan")}, "but is nan"),
        (
            {"train_val_split": 0.1, "dataset_name": "x", "streaming": True},
            "--train_val_split 0.1 cannot be combined with --streaming.*evaluate_likelihood.py with --dataset_split",
        ),
    ],
)
def test_splits_that_do_not_fit_are_refused(settings: dict[str, Any], message):
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("kind", ["cached", "lazy"])
def test_the_fingerprint_changes_with_the_split(tmp_path, monkeypatch, kind):
    """It identifies the latents in the cache and the data of a checkpoint."""
    monkeypatch.setattr("diffusers_cfg.data.datasets.MAX_CACHED_BYTES", 0 if kind == "lazy" else 1 << 20)
    settings, fingerprints = source("folder", tmp_path / "data"), []
    for fraction in (0.0, 0.25, 0.5):
        config = DataConfig(**settings, resolution=8, train_val_split=fraction)
        parts = [load_labelled_images(config)] + ([load_held_out_images(config)] if fraction else [])
        for images in parts:
            dataset = training_dataset(images, config, 1, show_progress=False)
            assert isinstance(dataset, {"cached": CachedImages, "lazy": LazyImages}[kind])
            batch = dataset.__getitems__([len(images) - 1, 0])
            numbers = numbers_of(images)
            assert batch.images[:, 0, 0, 0].tolist() == [numbers[-1], numbers[0]]
            assert batch.class_labels.tolist() == images.class_labels[[-1, 0]].tolist()
            fingerprints.append(fingerprint(dataset))
    assert len({*fingerprints}) == 5


def test_parts_with_the_same_labels_have_different_fingerprints():
    images = Digits()
    images.class_labels[:] = 0
    names = [ImageSubset(images, np.arange(first, first + 10)).fingerprint() for first in (0, 10)]
    assert len({*names, images.fingerprint()}) == 3


def test_a_part_has_the_channels_of_all_images(tmp_path):
    """The model must fit the held-out images, even if only one image has color."""
    folder = Path(save_class_folders(tmp_path / "data"))
    solid(0, (8, 8)).save(folder / "ant" / "0.png")
    assert [part.channels for part in both_parts(0.5, train_data_dir=str(folder))] == [3, 3]


def test_a_class_of_which_all_images_are_held_out_keeps_its_id(tmp_path, caplog):
    """Plain labels name the classes in the order of all labels, not of those in a part."""
    settings = {"cache_dir": str(tmp_path / "cache"), "train_val_split": 1 / 12}
    rest = {**settings, "dataset_name": save_dataset(tmp_path / "even", [0, 1] * 6)}
    number = numbers_of(load_held_out_images(DataConfig(**rest)))[0] // 10
    labels = [2 if n == number else 3 * (n % 2) for n in range(12)]
    settings["dataset_name"] = save_dataset(tmp_path / "data", labels)
    caplog.clear()
    training, held_out = load_labelled_images(DataConfig(**settings)), load_held_out_images(DataConfig(**settings))
    assert training.id2label == held_out.id2label == {0: "0", 1: "2", 2: "3"}
    assert (training.present_classes, held_out.present_classes) == ([0, 2], [1])
    lost = [message for message in caplog.messages if "no image" in message]
    assert lost == [
        "1 of 3 classes have no image to train on, because --train_val_split 0.0833333 holds out all of them: 2"
    ]


def test_files_left_out_are_shared_in_proportion(tmp_path):
    """One part with few images must not exceed `max_unreadable_fraction` because of the files of the other."""
    folder = Path(save_class_folders(tmp_path / "data"))
    for number in range(4):
        (folder / "ant" / f"{number}.heic").write_bytes(b"broken")
    config = DataConfig(train_data_dir=str(folder), max_unreadable_fraction=0.25, resolution=8, train_val_split=0.75)
    training, held_out = load_labelled_images(config), load_held_out_images(config)
    assert [(len(part), len(part.left_out)) for part in (training, held_out)] == [(3, 1), (9, 3)]
    for part in (training, held_out):
        assert len(stack_images(part, config, 1, show_progress=False)) == len(part)
    with pytest.raises(UserError, match="3 of 12 images cannot be read"):
        stack_images(held_out, DataConfig(max_unreadable_fraction=0.2), 1, show_progress=False)


def test_images_with_more_than_8_bits_are_refused_by_name(tmp_path):
    folder = save_class_folders(tmp_path / "images")
    require_8_bits(load_labelled_images(DataConfig(train_data_dir=folder)))
    (tmp_path / "images" / "ant" / "broken.png").write_bytes(b"broken")  # counted when the images are decoded
    (tmp_path / "images" / "bee" / "scan.png").write_bytes(READABLE["16-bit grayscale"][0])
    images = load_labelled_images(DataConfig(train_data_dir=folder))
    with pytest.raises(UserError, match=r"bee.scan.png. has more than 8 bits per channel \(mode I;16\), but the"):
        require_8_bits(images)
