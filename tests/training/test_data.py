import logging

import datasets
import numpy as np
import pytest
import torch
from config import TrainConfig, UserError
from data import (
    CachedImages,
    LazyImages,
    class_ids,
    load_labelled_images,
    stack_images,
    to_array,
    to_float,
    training_dataset,
)
from PIL import Image


def picture(value: int, size=(12, 10), mode="RGB") -> Image.Image:
    return Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value))


@pytest.fixture
def folder(tmp_path):
    """Three classes of four colour pictures."""
    for label, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            picture(label * 100).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def config(tmp_path, **settings) -> TrainConfig:
    return TrainConfig(**{"resolution": 8, "cache_dir": str(tmp_path / "cache"), **settings})


def save_dataset(path, labels, feature=None) -> str:
    """A data set in the Hub's layout, a grey picture a row."""
    features = {"image": datasets.Image(), "label": feature} if feature else None
    rows = {"image": [picture(10 * i, mode="L") for i in range(len(labels))], "label": labels}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features) if features else None)
    if features is None:
        dataset = dataset.cast_column("image", datasets.Image())
    path.mkdir()
    dataset.to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


# ----- sources -----


def test_digits():
    images = load_labelled_images(TrainConfig(resolution=8))
    assert (len(images), images.channels, images.id2label[3]) == (1797, 1, "three")
    data = stack_images(images, TrainConfig(resolution=8), 1, show_progress=False)
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 255)


def test_a_folder_of_class_folders(folder, tmp_path):
    images = load_labelled_images(config(tmp_path, train_data_dir=str(folder)))
    assert images.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert images.channels == 3
    data = stack_images(images, config(tmp_path), 3, show_progress=False)
    assert data.images.shape == (12, 3, 8, 8)
    assert torch.equal(data.images[:, 0, 0, 0] // 100, data.class_labels)


def test_a_data_set_in_the_hubs_layout(tmp_path):
    names = ["no", "yes"]
    source = save_dataset(tmp_path / "data", [0, 1, 1, -1], datasets.ClassLabel(names=names))
    images = load_labelled_images(config(tmp_path, dataset_name=source))
    assert images.id2label == {0: "no", 1: "yes"}
    assert images.class_labels.tolist() == [0, 1, 1, -1]
    assert images.channels == 1
    assert np.asarray(images.open_image(2))[0, 0] == 20


def test_a_data_set_written_by_save_to_disk(tmp_path):
    dataset = datasets.load_dataset(save_dataset(tmp_path / "data", [0, 1]), cache_dir=str(tmp_path / "cache"))
    dataset.save_to_disk(tmp_path / "all")
    dataset["train"].save_to_disk(tmp_path / "one")
    for name in ("all", "one"):
        assert len(load_labelled_images(config(tmp_path, dataset_name=str(tmp_path / name)))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "species"}, r"no column 'species'.*--label_column can be one of \['image', 'label'\]"),
        ({"image_column": "picture"}, r"no column 'picture'.*\['image', 'label'\]"),
        ({"image_column": "label"}, r"holds ClassLabel, not images.*\['image'\]"),
        ({"dataset_split": "test"}, "cannot be loaded.*test"),
        ({"train_data_dir": "/nowhere"}, "/nowhere is not a folder"),
        ({"train_data_dir": None, "dataset_name": "/nowhere/at/all"}, "'/nowhere/at/all' cannot be loaded"),
    ],
)
def test_what_is_missing_is_named(folder, tmp_path, settings, message):
    settings = {"train_data_dir": str(folder), **settings}
    with pytest.raises(UserError, match=message):
        load_labelled_images(config(tmp_path, **settings))


def test_a_folder_without_class_folders(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(UserError, match="has no folders in it, but each class needs a folder of its own"):
        load_labelled_images(config(tmp_path, train_data_dir=str(tmp_path / "flat")))


def test_a_single_class_is_refused(tmp_path):
    source = save_dataset(tmp_path / "data", [1, 1, -1], datasets.ClassLabel(names=["no", "yes"]))
    with pytest.raises(UserError, match=r"at least two classes, but the data has 1 \['yes'\]"):
        load_labelled_images(config(tmp_path, dataset_name=source))


# ----- labels -----


@pytest.mark.parametrize(
    ("labels", "names", "ids", "id2label", "said"),
    [
        ([0, 1, 1], ["a", "b"], [0, 1, 1], {0: "a", 1: "b"}, ""),
        ([0, 2, 1], None, [0, 2, 1], {0: "0", 1: "1", 2: "2"}, ""),
        ([3, 7, 3], None, [0, 1, 0], {0: "3", 1: "7"}, "3 -> 0, 7 -> 1"),
        (["b", "a"], None, [1, 0], {0: "a", 1: "b"}, "'a' -> 0, 'b' -> 1"),
        ([True, False], None, [1, 0], {0: "False", 1: "True"}, ""),
        ([0, -1, None, 1], None, [0, -1, -1, 1], {0: "0", 1: "1"}, "2 of 4 images have no label"),
    ],
)
def test_labels_become_ids(labels, names, ids, id2label, said, caplog):
    class_labels, actual = class_ids(labels, names)
    assert class_labels.tolist() == ids
    assert class_labels.dtype == np.int64
    assert actual == id2label
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0.0, 1.0], None, r"but are float \(0.0, 1.0"),
        ([0, "a"], None, "int, str"),
        ([0, 5], ["a", "b"], "from 0 to 5, but there are 2 names"),
    ],
)
def test_other_labels_are_refused(labels, names, message):
    with pytest.raises(UserError, match=message):
        class_ids(labels, names)


# ----- decoding -----


def test_images_are_covered_and_cropped():
    wide = Image.new("L", (30, 10), 0)
    wide.paste(255, (10, 0, 20, 10))
    assert to_array(wide, 10, 1, center_crop=True).min() == 255
    assert to_array(wide, 10, 1, center_crop=False).max() == 0
    assert to_array(wide, 5, 3, center_crop=True).shape == (3, 5, 5)


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile([0, 255], (64, 32)).astype(np.uint8))
    assert abs(to_array(stripes, 8, 1, center_crop=True).astype(int) - 127).max() < 20


def test_the_range_of_images():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("lazy", [False, True])
def test_both_kinds_of_data_set_give_the_same_batches(folder, tmp_path, lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr("data.MAX_CACHED_BYTES", 0)
    settings = config(tmp_path, train_data_dir=str(folder))
    data = training_dataset(load_labelled_images(settings), settings, 3, show_progress=False)
    assert isinstance(data, LazyImages if lazy else CachedImages)
    batch = data.__getitems__([0, 11, 5])
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.class_labels.tolist() == [0, 2, 1]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 200, 100]
    assert batch.unreadable == []


@pytest.mark.parametrize("lazy", [False, True])
def test_unreadable_images_are_named_and_skipped(folder, tmp_path, lazy, caplog):
    (folder / "dog" / "1.png").write_bytes(b"not a picture")
    settings = config(tmp_path, train_data_dir=str(folder), max_unreadable_fraction=0.1)
    images = load_labelled_images(settings)
    if lazy:
        batch = LazyImages(images, 8, 3, True).__getitems__([5, 4])
        assert len(batch.unreadable) == 1
        assert "1.png" in batch.unreadable[0]
        assert batch.class_labels.tolist() == [1, 1]
    else:
        with caplog.at_level(logging.WARNING):
            assert len(stack_images(images, settings, 3, show_progress=False)) == 11
        assert "1.png" in caplog.text


def test_too_many_unreadable_images_stop_the_run(folder, tmp_path):
    for name in ("0.png", "1.png"):
        (folder / "dog" / name).write_bytes(b"not a picture")
    settings = config(tmp_path, train_data_dir=str(folder), max_unreadable_fraction=0.1)
    with pytest.raises(UserError, match=r"2 of 12 images cannot be read.*0\.1.*0\.png"):
        stack_images(load_labelled_images(settings), settings, 3, show_progress=False)
