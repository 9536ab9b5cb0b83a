"""Test the loading of labelled images from datasets of every layout, in memory and streamed."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_cfg.config import UserError
from diffusers_cfg.data import sources
from diffusers_cfg.data.datasets import LazyImages, fingerprint, stack_images
from diffusers_cfg.data.images import LabelledImages, require_classes
from diffusers_cfg.data.sources import DatasetImages, ImageStream, load_labelled_images, split_names
from diffusers_cfg.settings import DataConfig
from tests.support.images import (
    SPLITS_CARD,
    WEBDATASET_CARD,
    numbered,
    numbers_of,
    open_stream,
    save_class_folders,
    save_dataset,
    save_shards,
    save_tars,
    save_three_classes,
    save_unchecked_label,
    solid,
)
from tests.support.odd_images import READABLE


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_three_classes(tmp_path / "data")


@pytest.fixture
def flat_folder(tmp_path) -> Path:
    """Return a folder of three images, without class folders."""
    (tmp_path / "flat").mkdir()
    for i in range(3):
        solid(100 * i, mode="L").save(tmp_path / "flat" / f"{i}.png")
    return tmp_path / "flat"


def load(tmp_path: Path, needs_labels: bool = True, **settings) -> LabelledImages:
    config = DataConfig(**{"resolution": 8, "cache_dir": str(tmp_path / "cache"), **settings})
    return load_labelled_images(config, needs_labels)


def test_digits():
    images = load_labelled_images(DataConfig(resolution=8))
    assert (len(images), images.channels, images.id2label[3]) == (1797, 1, "three")
    data = stack_images(images, DataConfig(resolution=8), 1, show_progress=False)
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 255)


def test_a_folder_of_class_folders(folder, tmp_path):
    images = load(tmp_path, train_data_dir=str(folder))
    assert images.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert images.channels == 3
    data = stack_images(images, DataConfig(resolution=8), 3, show_progress=False)
    assert data.images.shape == (12, 3, 8, 8)
    assert torch.equal(data.images[:, 0, 0, 0] // 100, data.class_labels)


def test_dataset_in_the_hub_layout(tmp_path):
    source = save_dataset(tmp_path / "data", [0, 1, 1, -1], datasets.ClassLabel(names=["no", "yes"]))
    images = load(tmp_path, dataset_name=source)
    assert images.id2label == {0: "no", 1: "yes"}
    assert images.class_labels.tolist() == [0, 1, 1, -1]
    assert images.channels == 1
    assert np.asarray(images.open_image(2))[0, 0] == 20


def test_dataset_written_by_save_to_disk(tmp_path):
    dataset = datasets.load_dataset(save_dataset(tmp_path / "data", [0, 1]), cache_dir=str(tmp_path / "cache"))
    dataset.save_to_disk(tmp_path / "all")
    dataset["train"].save_to_disk(tmp_path / "one")
    for name in ("all", "one"):
        assert len(load(tmp_path, dataset_name=str(tmp_path / name))) == 2


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved split", "folder", "class folders", "digits"])
def test_names_of_splits(tmp_path, kind):
    """Those of one part of a dataset without splits are ["train"]."""
    parquet, saved, names = tmp_path / "data", tmp_path / "saved", ["train", "validation"]
    save_dataset(parquet, [0, 1])
    shutil.copy(parquet / "train-00000-of-00001.parquet", parquet / "validation-00000-of-00001.parquet")
    dataset = datasets.load_dataset(str(parquet), cache_dir=str(tmp_path / "cache"))
    settings: dict[str, Any] = {"dataset_name": str(saved)}
    if kind == "parquet":
        settings["dataset_name"] = str(parquet)
    elif kind == "saved":
        dataset.save_to_disk(saved)
    elif kind == "saved split":
        dataset["validation"].save_to_disk(saved)
    else:
        save_three_classes(saved / "train")
        save_three_classes(saved / "val")
        settings = {"train_data_dir": str(saved / "train" if kind == "class folders" else saved)}
    if kind == "digits":
        settings = {}
    expected = {"folder": {*names, "val"}, "parquet": {*names}, "saved": {*names}}.get(kind, {"train"})
    assert set(split_names(DataConfig(cache_dir=str(tmp_path / "cache"), **settings))) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "webdataset", "imagefolder"])
def test_every_layout_can_be_read_and_streamed(tmp_path, kind, streaming):
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    if kind == "parquet":
        settings["dataset_name"] = save_shards(tmp_path / "data", 6, 6)
    elif kind == "webdataset":
        settings |= {"dataset_name": save_tars(tmp_path / "data"), "image_column": "png", "label_column": "cls"}
        (tmp_path / "data" / "README.md").write_text(WEBDATASET_CARD)
    else:
        settings |= {"dataset_name": None, "train_data_dir": save_class_folders(tmp_path / "data")}
    if streaming:
        stream = open_stream(settings.pop("dataset_name"), **settings)
        assert sorted(numbers_of(stream, 3)) == list(range(12))
        images = stream.images
    else:
        images = load(tmp_path, **settings)
        assert len(images) == 12
    assert (images.channels, images.id2label) == (1, {0: "ant", 1: "bee"})


@pytest.mark.parametrize(
    "kind", ["16-bit grayscale", "palette of grays", "grayscale and alpha", "bits", "palette", "alpha"]
)
def test_dataset_is_grayscale_if_its_decoded_images_are(tmp_path, kind):
    data, expected = READABLE[kind]
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(data)
    images = load(tmp_path, train_data_dir=str(tmp_path / "data"))
    assert images.channels == (3 if isinstance(expected[0], tuple) else 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "species"}, r"no column 'species'.*Set --label_column to one of \['image', 'label'\]"),
        ({"image_column": "picture"}, r"no column 'picture'. Set --image_column to one of \['image'\]"),
        ({"image_column": "label"}, r"holds ClassLabel, not images.*\['image'\]"),
        ({"dataset_split": "test"}, "'test' is not a split of .*Use: train"),
        ({"train_data_dir": "/nowhere"}, "/nowhere is not a folder"),
        ({"train_data_dir": None, "dataset_name": "/nowhere/at/all"}, "'/nowhere/at/all' cannot be loaded"),
    ],
)
def test_missing_source_or_column_is_reported(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **{"train_data_dir": str(folder), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "species"}, r"no column 'species'.*\['image', 'label'\]"),
        ({"image_column": "label"}, r"holds ClassLabel, not images.*\['image'\]"),
        ({"dataset_split": "test"}, "cannot be loaded.*test"),
        ({"dataset_name": "/nowhere/at/all"}, "'/nowhere/at/all' cannot be loaded"),
    ],
)
def test_missing_source_or_column_of_a_stream_is_reported(tmp_path, settings, message):
    given: dict[str, Any] = {"dataset_name": save_shards(tmp_path / "data", 6), **settings}
    with pytest.raises(UserError, match=message):
        open_stream(given.pop("dataset_name"), **given)


def test_dataset_without_images_is_refused(tmp_path):
    message = "The dataset has no images. Check --dataset_split"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    dataset = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    with pytest.raises(UserError, match=message):
        ImageStream(datasets.IterableDataset.from_generator(list, features=features), DataConfig(), "label")
    with pytest.raises(UserError, match=message):
        DatasetImages(dataset, DataConfig(), "label")


def test_a_stream_of_plain_labels_is_refused(tmp_path):
    """The names of the classes would be known only after a whole epoch."""
    cases: list[tuple[str, dict[str, Any]]] = [
        (save_tars(tmp_path / "tars"), {"image_column": "png", "label_column": "cls"}),
        (save_shards(tmp_path / "plain", 6, feature=datasets.Value("int64")), {}),
    ]
    for source, columns in cases:
        with pytest.raises(
            UserError, match="holds plain values. Pass .* --class_names .*leave out --streaming.*ClassLabel.*README"
        ):
            open_stream(source, **columns)


def test_dataset_written_by_save_to_disk_cannot_be_streamed(tmp_path):
    dataset = datasets.load_dataset(save_shards(tmp_path / "data", 6), cache_dir=str(tmp_path / "cache"))
    dataset.save_to_disk(tmp_path / "all")
    with pytest.raises(UserError, match="written by save_to_disk.*Leave out --streaming"):
        open_stream(str(tmp_path / "all"))


def test_stream_length_comes_from_the_dataset_card(tmp_path):
    source = save_shards(tmp_path / "data", 6, 6)
    assert load(tmp_path, dataset_name=source, streaming=True).num_images is None
    (tmp_path / "data" / "README.md").write_text(SPLITS_CARD.format(num_examples=12))
    assert load(tmp_path, dataset_name=source, streaming=True).num_images == 12


def test_sorted_stream_logs_a_warning(tmp_path, caplog):
    source = save_shards(tmp_path / "data", 20, labels=lambda number: number // 10)
    open_stream(source, shuffle_buffer_size=20)
    assert caplog.text == ""
    open_stream(source)
    assert "first 5 images all have the same class" in caplog.text
    assert "--shuffle_buffer_size" in caplog.text


def test_stream_that_starts_without_labels_logs_a_warning(tmp_path, caplog):
    open_stream(save_shards(tmp_path / "data", 20, labels=lambda number: None))
    assert "first 5 images have no label. Check --label_column" in caplog.text
    assert "same class" not in caplog.text


def test_dataset_without_a_column_of_images_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\nx,0\n")
    with pytest.raises(UserError, match=r"has no images, only the columns \['label', 'text'\]"):
        load(tmp_path, dataset_name=str(tmp_path / "data"))


def test_require_classes_refuses_a_single_class(tmp_path):
    source = save_dataset(tmp_path / "data", [1, 1, -1], datasets.ClassLabel(names=["no", "yes"]))
    images = load(tmp_path, dataset_name=source)
    assert images.present_classes == [1]
    with pytest.raises(UserError, match=r"at least two classes, but the data has 1: \['yes'\]. Check --label_column"):
        require_classes(images)
    require_classes(load(tmp_path, dataset_name=save_dataset(tmp_path / "two", [0, 1])))


def test_classes_of_a_stream_are_those_with_a_name(tmp_path):
    """A stream does not know which classes have images, and its first images may all have one class."""
    one_class = datasets.ClassLabel(names=["ant"])
    with pytest.raises(UserError, match=r"at least two classes, but the data has 1: \['ant'\]"):
        require_classes(open_stream(save_shards(tmp_path / "1", 6, labels=lambda _: 0, feature=one_class)).images)
    require_classes(open_stream(save_shards(tmp_path / "2", 6, labels=lambda _: 0)).images)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_without_class_folders(tmp_path, flat_folder, streaming):
    settings = {"train_data_dir": str(flat_folder), "streaming": streaming}
    with pytest.raises(UserError, match="has no subfolders. Pass a folder with one subfolder per class"):
        load(tmp_path, **settings)
    images = load(tmp_path, needs_labels=False, **settings)
    assert (images.class_labels.tolist(), images.id2label) == ([-1] * 3, {})
    assert sorted(np.asarray(images.open_image(i))[0, 0] for i in range(3)) == [0, 100, 200]


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_without_labels(tmp_path, streaming, caplog):
    settings = {"dataset_name": save_shards(tmp_path / "data", 6, labels=None), "streaming": streaming}
    with pytest.raises(UserError, match=r"no column 'label'. Set --label_column to one of \['image'\]"):
        load(tmp_path, **settings)
    with caplog.at_level(logging.INFO, "diffusers_cfg"):
        images = load(tmp_path, needs_labels=False, **settings)
    assert caplog.messages == ["The dataset has no column 'label' (--label_column), so its images are unlabelled."]
    assert (images.class_labels.tolist(), images.id2label) == ([-1] * 6, {})
    assert images.class_labels.dtype == np.int64
    with pytest.raises(UserError, match=r"the data has 0: \[\]"):
        require_classes(images)


@pytest.mark.parametrize("streaming", [False, True])
def test_optional_labels_are_read(tmp_path, streaming):
    source = save_shards(tmp_path / "data", 6)
    images = load(tmp_path, needs_labels=False, dataset_name=source, streaming=streaming, shuffle_buffer_size=6)
    assert sorted(images.class_labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert images.id2label == {0: "ant", 1: "bee"}
    folders = load(tmp_path, needs_labels=False, train_data_dir=save_class_folders(tmp_path / "folders"))
    assert folders.id2label == {0: "ant", 1: "bee"}
    assert load_labelled_images(DataConfig(resolution=8), needs_labels=False).id2label[3] == "three"


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_without_a_name_are_refused(tmp_path, streaming):
    """Some writers do not check labels."""
    settings = {"streaming": streaming, "shuffle_buffer_size": 6}
    of_row = "label of row 3 of shard 0 .3.png. is" if streaming else "largest label is"
    with pytest.raises(UserError, match=rf"{of_row} 2, but .* from 0 to 1\. .*counted from 1\?.*-1 marks"):
        load(tmp_path, dataset_name=save_unchecked_label(tmp_path / "two", 2), **settings)
    of_row = "row 3 of shard 0 .* is 7" if streaming else "from 0 to 7"
    with pytest.raises(UserError, match=f"{of_row}, but the dataset names 2 classes"):
        load(tmp_path, dataset_name=save_unchecked_label(tmp_path / "seven", 7), **settings)


def break_parquet(folder: Path) -> None:
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50])


def break_column(folder: Path) -> None:
    path = folder / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\xff" * 260 + content[300:])


def card(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "README.md").write_text(f"---\n{text}\n---\n")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (card("foo: ["), "while parsing a flow node"),
        (card("dataset_info:\n  features:\n  - {name: image, dtype: foo}"), "Feature type 'Foo' not found"),
        (card("configs: 5"), "ValueError: Expected configs to be a list"),
        (break_parquet, "ArrowInvalid: Parquet magic bytes not found"),
        (break_column, "ArrowInvalid: Invalid or truncated"),
        (lambda folder: (folder / "state.json").write_text("{"), "(written by save_to_disk|cannot be loaded)"),
    ],
)
def test_damaged_datasets_are_named(tmp_path, streaming, damage, message):
    """`datasets` raises exceptions of many types."""
    source = save_shards(tmp_path / "data", 6)
    damage(tmp_path / "data")
    with pytest.raises(UserError, match=f"{source}.*{message}"):
        load(tmp_path, dataset_name=source, streaming=streaming)


def test_a_stream_that_breaks_later_is_named(tmp_path):
    source = save_shards(tmp_path / "data", 6, 6)
    stream = load(tmp_path, dataset_name=source, streaming=True, shuffle_buffer_size=6)
    assert isinstance(stream, ImageStream)
    for path in (tmp_path / "data").glob("*.parquet"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=f"The dataset '{source}' cannot be loaded: ArrowInvalid"):
        list(stream.rows(0, 0))


@pytest.mark.parametrize("streaming", [False, True])
def test_null_images_are_unreadable(tmp_path, caplog, streaming):
    source = save_null_image(tmp_path / "data")
    images = load(tmp_path, dataset_name=source, streaming=streaming)
    data = stack_images(images, DataConfig(resolution=8, max_unreadable_fraction=0.2), 1, show_progress=False)
    assert len(data) == 5
    assert re.search(r"Skipped unreadable image row 2( of shard 0)?: The image is null", caplog.text)
    with pytest.raises(UserError, match="1 of 6 images cannot be read.*: row 2"):
        stack_images(images, DataConfig(resolution=8), 1, show_progress=False)


def test_null_images_of_lazy_images_are_unreadable(tmp_path):
    images = load(tmp_path, dataset_name=save_null_image(tmp_path / "data"))
    batch = LazyImages(images, 8, 1, center_crop=True).__getitems__([1, 2])
    assert batch.unreadable == ["row 2"]
    assert batch.images[:, 0, 0, 0].tolist() == [1, 3]


def save_null_image(folder: Path) -> str:
    """Write six numbered images, of which number 2 is null."""
    folder.mkdir()
    rows = {"image": [{"bytes": numbered(i), "path": None} if i != 2 else None for i in range(6)], "label": [0, 1] * 3}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("split", ["test", "train[:50%]"])
@pytest.mark.parametrize("single", [False, True])
def test_a_split_that_save_to_disk_did_not_write_is_refused(tmp_path, single, split):
    dataset = datasets.load_dataset(save_shards(tmp_path / "data", 6), cache_dir=str(tmp_path / "cache"))
    (dataset["train"] if single else dataset).save_to_disk(tmp_path / "all")
    message = f"has no split {split!r}. Set --dataset_split to one of ['train']"
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path, dataset_name=str(tmp_path / "all"), dataset_split=split)


@pytest.mark.parametrize(("saved", "split"), [("test", "test"), ("test", "train"), (None, "train")])
def test_single_split_written_by_save_to_disk(tmp_path, saved, split):
    rows = {"image": [{"bytes": numbered(i), "path": None} for i in range(2)], "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict(rows, features=features, split=saved)
    dataset.save_to_disk(tmp_path / "one")
    assert len(load(tmp_path, dataset_name=str(tmp_path / "one"), dataset_split=split)) == 2


def test_fingerprint_of_a_dataset_covers_every_image(tmp_path):
    """The dataset is too large to decode at the start of a run."""

    def name(folder: str, **settings) -> str:
        images = load(tmp_path, dataset_name=folder, **settings)
        return fingerprint(LazyImages(images, 8, 1, center_crop=True))

    source = save_shards(tmp_path / "data", 40, 40)
    names = [name(source), name(source, dataset_split="train[:50%]")]
    assert name(source, cache_dir=str(tmp_path / "another")) == names[0]
    save_shards(tmp_path / "changed", 40, 40, broken=[57])
    shutil.copy(next((tmp_path / "changed").glob("train-00001*")), tmp_path / "data")
    names.append(name(source))
    assert len(set(names)) == 3


# The colors of 200 images, of which a sample of 32 sees every sixth, and the resulting number of channels
COLORS = {
    "gray": ([], "L", (9, 9, 9), 1),
    "one color": ([100], "RGB", (200, 0, 0), 3),
    "one palette": ([100], "P", (200, 0, 0), 3),
    "one transparent color": ([100], "RGBA", (200, 0, 0), 3),
    "one gray image with three channels": ([100], "RGB", (9, 9, 9), 1),
    "one almost gray image": ([100], "RGB", (9, 12, 7), 1),
    "the first is gray with three channels": ([0], "RGB", (9, 9, 9), 3),
}


def write_colors(folder: Path, name: str) -> Path:
    indices, mode, color, _ = COLORS[name]
    for i in range(200):
        path = folder / "ab"[i >= 100] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (4, 4), color).convert(mode) if i in indices else Image.new("L", (4, 4), 9)
        image.save(path)
    return folder


@pytest.mark.parametrize("name", COLORS)
def test_color_in_a_part_of_the_images_counts(tmp_path, name):
    images = load(tmp_path, train_data_dir=str(write_colors(tmp_path / "data", name)))
    assert images.channels == COLORS[name][3]


@pytest.mark.parametrize("kind", ["cached", "lazy", "streamed"])
def test_color_that_is_lost_is_logged(tmp_path, caplog, monkeypatch, kind):
    """The search for color stops at a limit, and at the start of a stream."""
    monkeypatch.setattr("diffusers_cfg.data.images.MAX_SEARCH", 32)
    monkeypatch.setattr(sources, "PROBE_SIZE", 10)
    folder = str(write_colors(tmp_path / "data", "one color"))
    if kind == "streamed":
        stream = open_stream(None, train_data_dir=folder, train_batch_size=200)
        assert stream.images.channels == 1
        next(iter(stream))
    else:
        images = load(tmp_path, train_data_dir=folder)
        assert images.channels == 1
        if kind == "cached":
            stack_images(images, DataConfig(resolution=4), 1, show_progress=False)
        else:
            LazyImages(images, 4, 1, center_crop=True).__getitems__([*range(200), 100])
    lost = [message for message in caplog.messages if "color, which is lost" in message]
    assert len(lost) == 1
    assert f"{folder}/b/100.png" in lost[0]
    assert lost[0].startswith("1 images have color" if kind == "cached" else "Some images have color")
