"""Test datasets in memory and decoded lazily: batches, unreadable images, fingerprints, descriptions."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets as data
from diffusers_cfg.data.datasets import (
    CachedImages,
    ImageBatch,
    LazyImages,
    describe_data,
    fingerprint,
    identity_collate,
    num_images,
    stack_images,
    training_dataset,
)
from diffusers_cfg.data.decoding import to_array
from diffusers_cfg.data.sources import Digits, load_labelled_images
from diffusers_cfg.data.unreadable import check_unreadable, warn_about_unreadable
from diffusers_cfg.settings import DataConfig
from tests.support.images import SPLITS_CARD, open_stream, save_shards, save_three_classes
from tests.support.odd_images import READABLE, UNREADABLE


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_three_classes(tmp_path / "data")


def folder_config(folder: Path, **settings) -> DataConfig:
    cache_dir = str(folder.parent / "cache")
    return DataConfig(**{"resolution": 8, "cache_dir": cache_dir, "train_data_dir": str(folder), **settings})


@pytest.mark.parametrize("lazy", [False, True])
def test_cached_and_lazy_datasets_return_the_same_batches(folder, lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr(data, "MAX_CACHED_BYTES", 0)
    config = folder_config(folder)
    dataset = training_dataset(load_labelled_images(config), config, 3, show_progress=False)
    assert isinstance(dataset, LazyImages if lazy else CachedImages)
    assert len(dataset) == num_images(dataset) == 12
    batch = identity_collate(dataset.__getitems__([0, 11, 5]))
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.class_labels.tolist() == [0, 2, 1]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 200, 100]
    assert batch.unreadable == []


def test_datasets_up_to_a_size_are_cached(folder, monkeypatch):
    config = folder_config(folder)
    images = load_labelled_images(config)
    for limit, kind in ((12 * 3 * 8 * 8, CachedImages), (12 * 3 * 8 * 8 - 1, LazyImages)):
        monkeypatch.setattr(data, "MAX_CACHED_BYTES", limit)
        assert isinstance(training_dataset(images, config, 3, show_progress=False), kind)


def test_training_input_flips_selected_images():
    images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    batch = ImageBatch(images, torch.tensor([0, 1]), [])
    plain, flipped = batch.training_input(torch.device("cpu")), images.flip(-1).float() / 127.5 - 1
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, images.float() / 127.5 - 1)
    mixed = batch.training_input(torch.device("cpu"), flip=torch.tensor([False, True]))
    assert torch.equal(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], flipped[1])
    assert batch.images_rgb.shape == (2, 3, 2, 2)


@pytest.mark.parametrize("lazy", [False, True])
def test_unreadable_images_are_reported_and_skipped(folder, lazy, caplog):
    (folder / "dog" / "1.png").write_bytes(b"broken")
    config = folder_config(folder, max_unreadable_fraction=0.1)
    images = load_labelled_images(config)
    if lazy:
        batch = LazyImages(images, 8, 3, True).__getitems__([5, 4])
        assert len(batch.unreadable) == 1
        assert "1.png" in batch.unreadable[0]
        assert batch.class_labels.tolist() == [1, 1]
    else:
        with caplog.at_level(logging.WARNING):
            assert len(stack_images(images, config, 3, show_progress=False)) == 11
        assert "1.png" in caplog.text


def test_too_many_unreadable_images_are_refused(folder):
    for name in ("0.png", "1.png"):
        (folder / "dog" / name).write_bytes(b"broken")
    config = folder_config(folder, max_unreadable_fraction=0.1)
    with pytest.raises(UserError, match=r"2 of 12 images cannot be read.*0\.1.*0\.png"):
        stack_images(load_labelled_images(config), config, 3, show_progress=False)


@pytest.mark.parametrize("lazy", [False, True])
def test_dataset_without_readable_images_is_refused(folder, lazy):
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"broken")
    config = folder_config(folder, max_unreadable_fraction=1.0)
    images = load_labelled_images(config)

    def read():
        if lazy:
            return LazyImages(images, 8, 3, True).__getitems__([5])
        return stack_images(images, config, 3, show_progress=False)

    with pytest.raises(UserError, match=r"None of the 12 images can be read, starting with row \d+ \(.*\.png\)"):
        read()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_every_kind_of_unreadable_image_is_reported(folder, monkeypatch, caplog, name, lazy):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # the bomb has a little more than twice this number
    content, reason = UNREADABLE[name]
    (folder / "dog" / f"0-{name}").write_bytes(content)
    config = folder_config(folder, max_unreadable_fraction=0.1)
    images = load_labelled_images(config)
    with pytest.raises(Exception, match=reason):
        to_array(images.open_image(4), 8, 3, center_crop=True)
    if lazy:
        batch = LazyImages(images, 8, 3, True).__getitems__([4, 5])
        assert [name in reported for reported in batch.unreadable] == [True]
        assert batch.images[:, 0, 0, 0].tolist() == [100, 100]
    else:
        assert len(stack_images(images, config, 3, show_progress=False)) == 12
        assert f"Skipped unreadable image row 4 ({folder}/dog/0-{name}): " in caplog.text


def test_cached_and_lazy_datasets_decode_odd_images_equally(tmp_path, monkeypatch):
    for i, (content, _) in enumerate(READABLE.values()):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i // 2}.png"  # PIL ignores the suffix
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    config = folder_config(tmp_path / "data")
    images = load_labelled_images(config)
    everything = list(range(len(READABLE)))
    batches = []
    for limit in (2**30, 0):
        monkeypatch.setattr(data, "MAX_CACHED_BYTES", limit)
        batches.append(training_dataset(images, config, 3, show_progress=False).__getitems__(everything))
    assert batches[0].unreadable == batches[1].unreadable == []
    torch.testing.assert_close(batches[0].images, batches[1].images, rtol=0, atol=0)


def test_unreadable_images_are_allowed_up_to_a_fraction():
    check_unreadable(["a"], 10, 0.1)
    check_unreadable([], 0, 0.0)
    with pytest.raises(UserError, match=r"7 of 10 images cannot be read, .* 0\.5 allows: 0, 1, 2, 3, 4, … Repair"):
        check_unreadable(map(str, range(7)), 10, 0.5)


def test_unreadable_images_are_logged(caplog):
    warn_about_unreadable(set())
    assert caplog.messages == []
    warn_about_unreadable({"b", "a"})
    assert caplog.messages == ["2 images could not be read: a, b"]


def make_images(num_images: int) -> CachedImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return CachedImages(images, torch.arange(num_images) % 2)


def test_fingerprint_of_cached_images_covers_all_pixels_and_labels():
    dataset = make_images(3000)
    name = fingerprint(dataset)
    assert len(name) == 16
    assert fingerprint(make_images(3000)) == name
    assert fingerprint(CachedImages(dataset.images.view(3000, 3, 2, 8), dataset.class_labels)) != name
    assert fingerprint(CachedImages(dataset.images[:2999], dataset.class_labels[:2999])) != name
    # The memory layout does not matter
    channels_last = dataset.images.contiguous(memory_format=torch.channels_last)
    assert fingerprint(CachedImages(channels_last, dataset.class_labels)) == name
    dataset.images[1234, 0, 1, 2] ^= 1
    assert fingerprint(dataset) != name
    dataset.images[1234, 0, 1, 2] ^= 1
    assert fingerprint(dataset) == name
    dataset.class_labels[1234] = -1
    assert fingerprint(dataset) != name


def test_fingerprint_of_lazy_images_covers_all_labels_and_the_decoding():
    """See test_folders.py and test_sources.py for the images."""
    images = Digits()
    names = [
        fingerprint(LazyImages(images, *args)) for args in [(8, 1, True), (4, 1, True), (8, 3, True), (8, 1, False)]
    ]
    assert fingerprint(LazyImages(Digits(), 8, 1, True)) == names[0]
    images.class_labels[1234] = -1
    names.append(fingerprint(LazyImages(images, 8, 1, True)))
    images = Digits()
    images.images[1234, 0, 0] += 1
    names.append(fingerprint(LazyImages(images, 8, 1, True)))
    assert len(set(names)) == len(names)


def test_description_of_data_in_memory():
    images = Digits()
    dataset = stack_images(images, DataConfig(resolution=8), 1, show_progress=False)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    expected = {"class_names": names, "num_images": 1797, "fingerprint": fingerprint(dataset), "num_shards": None}
    assert describe_data(images, dataset) == expected
    images.id2label = dict(reversed(images.id2label.items()))
    assert describe_data(images, dataset)["class_names"] == names
    assert describe_data(images, LazyImages(images, 8, 1, True))["fingerprint"] is not None


def test_description_of_a_stream(tmp_path):
    source = save_shards(tmp_path / "data", 6, 6)
    stream = open_stream(source)
    expected = {"class_names": ["ant", "bee"], "num_images": None, "fingerprint": None, "num_shards": 2}
    assert describe_data(stream.images, stream) == expected
    (tmp_path / "data" / "README.md").write_text(SPLITS_CARD.format(num_examples=12))
    stream = open_stream(source)
    assert describe_data(stream.images, stream) == {**expected, "num_images": 12}
