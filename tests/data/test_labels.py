"""Test labels: their class ids, the names of the classes, and columns that cannot hold labels."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from diffusers_cfg.config import UserError
from diffusers_cfg.data.labels import class_ids, read_class_names
from diffusers_cfg.data.sources import ImageStream, load_labelled_images
from diffusers_cfg.settings import DataConfig, TrainConfig
from tests.support.images import numbered, save_shards


@pytest.mark.parametrize(
    ("labels", "names", "ids", "id2label", "warning"),
    [
        ([0, 1, 1], ["a", "b"], [0, 1, 1], {0: "a", 1: "b"}, ""),
        ([0, 2, 1], None, [0, 2, 1], {0: "0", 1: "1", 2: "2"}, ""),
        ([1, 2], None, [0, 1], {0: "1", 1: "2"}, "1 -> 0, 2 -> 1"),
        ([3, 7, 3], None, [0, 1, 0], {0: "3", 1: "7"}, "3 -> 0, 7 -> 1"),
        (["b", "a"], None, [1, 0], {0: "a", 1: "b"}, "'a' -> 0, 'b' -> 1"),
        ([True, False], None, [1, 0], {0: "False", 1: "True"}, ""),
        ([0, -1, None, 1], None, [0, -1, -1, 1], {0: "0", 1: "1"}, "2 of 4 images have no label"),
        ([0, 0, 2], ["a", "b", "c"], [0, 0, 2], {0: "a", 1: "b", 2: "c"}, "1 of 3 classes have no image: b"),
        ([0], list("abcdefghijkl"), [0], dict(enumerate("abcdefghijkl")), "11 of 12 .*: b, c, .*, k, …"),
        ([0, 1], ["1", "2"], [0, 1], {0: "1", 1: "2"}, "mapped to class ids: '1' -> 0, '2' -> 1"),
        ([0, 1], ["cat", "7"], [0, 1], {0: "cat", 1: "7"}, "'cat' -> 0, '7' -> 1"),
        ([0, 1], ["0", "1"], [0, 1], {0: "0", 1: "1"}, ""),
        (["b", "a", None], ["b", "a"], [0, 1, -1], {0: "b", 1: "a"}, "1 of 3 images have no label"),
        (["1", "0"], ["0", "1"], [1, 0], {0: "0", 1: "1"}, ""),
        ([True, False], ["no", "yes"], [1, 0], {0: "no", 1: "yes"}, ""),
    ],
)
def test_labels_are_mapped_to_ids(labels, names, ids, id2label, warning, caplog):
    class_labels, actual = class_ids(labels, names)
    assert class_labels.tolist() == ids
    assert class_labels.dtype == np.int64
    assert actual == id2label
    assert re.search(warning, caplog.text)
    assert bool(caplog.text) == bool(warning)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0.0, 1.0], None, r"but are float \(0.0, 1.0"),
        ([0, "a"], None, "int, str"),
        ([0, 5], ["a", "b"], "range from 0 to 5, but the dataset names 2 classes"),
        ([0, 2, 5], ["a", "b"], "range from 0 to 5, but the dataset names 2 classes"),
        ([-2, 2], ["a", "b"], "range from -2 to 2, but the dataset names 2 classes"),
        ([1, 2], ["a", "b"], r"label is 2, but the 2 classes are numbered from 0 to 1\. .*counted from 1\?.*-1 marks"),
        ([0, -1, 2], ["a", "b"], r"counted from 1\?.*-1 marks an unlabelled image"),
        (["a", "z"], ["a", "b"], "labels z are not class names, but the dataset names 2 classes"),
        ([[0, 1], [1, 0]], None, r"but are list \(\[0, 1\], "),
        ([{"id": 1}], None, "but are dict"),
    ],
)
def test_invalid_labels_are_refused(labels, names, message):
    with pytest.raises(UserError, match=message):
        class_ids(labels, names)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("3", ["0", "1", "2"]),
        (("names.txt", "cat\ndog \n"), ["cat", "dog"]),
        (("names.txt", "日本\r\na, b\r\n"), ["日本", "a, b"]),
        (("names.txt", "\ufeffcat\r\ndog\r\n"), ["cat", "dog"]),
        (("names.json", '["cat", "dog"]'), ["cat", "dog"]),
        (("names.json", '\ufeff["cat", "dog"]'), ["cat", "dog"]),
        (("names.JSON", '{"1": "dog", "0": "cat"}'), ["cat", "dog"]),
    ],
)
def test_class_names_are_read(tmp_path, content, names):
    assert read_class_names(write_names(tmp_path, content)) == names


def write_names(folder: Path, content: str | tuple[str, str]) -> str:
    """Return a setting: a text as it is, or the path of a file, which is written."""
    if isinstance(content, str):
        return content
    path = folder / content[0]
    path.write_bytes(content[1].encode("utf-8" if content[1] != "ÿ" else "latin-1"))
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0", "must contain a list of names, but contains '\\[\\]'"),
        ("-1", "--class_names -1 is neither a file .* nor a number of classes"),
        ("2.5", "--class_names 2.5 is neither"),
        ("nowhere.txt", "--class_names nowhere.txt is neither"),
        (("x.txt", ""), "must contain a list of names"),
        (("x.txt", "a\n\nb\n"), "x.txt: the name of class 1 is '', not text"),
        (("x.txt", "a\nb\na\n"), "x.txt gives the classes 0 and 2 the same name 'a'"),
        (("x.txt", "ÿ"), "x.txt cannot be read: 'utf-8' codec"),
        (("x.json", "["), "x.json cannot be read"),
        (("x.json", "3"), "x.json must contain a list of names, but contains '3'"),
        (("x.json", '[["a"], "b"]'), r"the name of class 0 is \['a'\]"),
        (("x.json", '["a", null]'), "the name of class 1 is None"),
        (("x.json", '{"1": "a", "2": "b"}'), "must name the ids 0 … 1, but names 1, 2"),
        (("x.json", '{"cat": 0, "dog": 1}'), "must name the ids 0 … 1, but names cat, dog"),
    ],
)
def test_wrong_class_names_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_class_names(write_names(tmp_path, content))


def save_webdataset(folder: Path, **columns) -> str:
    """Write a WebDataset of six numbered images. Each column is a function from the number to its content."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(6):
            contents = {"png": numbered(number), **{name: value(number) for name, value in columns.items()}}
            for kind, content in contents.items():
                member = tarfile.TarInfo(f"{number:06d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(folder)


def cls(number: int) -> bytes:
    return str(number % 3).encode()


def as_json(number: int) -> bytes:
    content = {
        "label": number % 3,
        "name": "abc"[number % 3],
        "many": [number, 1],
        "score": 0.5,
        "a": {"b": number % 3},
    }
    return json.dumps(content).encode()


def load(source: str, tmp_path: Path, streaming: bool, **settings):
    given = {"image_column": "png", "cache_dir": str(tmp_path / "cache"), "streaming": streaming, **settings}
    return load_labelled_images(DataConfig(dataset_name=source, resolution=8, **given))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "class_names", "names"),
    [
        ("cls", "3", ["0", "1", "2"]),
        ("cls", ("names.txt", "x\ny\nz\n"), ["x", "y", "z"]),
        ("cls", ("names.json", '{"0": "x", "1": "y", "2": "z"}'), ["x", "y", "z"]),
        ("json.label", "3", ["0", "1", "2"]),
        ("json.a.b", "3", ["0", "1", "2"]),
        ("json.name", ("names.txt", "a\nb\nc\n"), ["a", "b", "c"]),
    ],
)
def test_class_names_of_a_webdataset(tmp_path, streaming, column, class_names, names):
    source = save_webdataset(tmp_path / "data", cls=cls, json=as_json)
    images = load(source, tmp_path, streaming, label_column=column, class_names=write_names(tmp_path, class_names))
    assert isinstance(images, ImageStream) == streaming
    assert images.id2label == dict(enumerate(names))
    numbers = [int(np.asarray(images.open_image(i))[0, 0]) for i in range(6)]
    assert [number % 3 for number in numbers] == images.class_labels.tolist()
    assert sorted(numbers) == list(range(6))


def test_metadata_is_streamed_with_class_names(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(numbered(number))
    rows = "".join(f"{number}.png,{number % 3}\n" for number in range(6))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}")
    config = DataConfig(train_data_dir=str(tmp_path), resolution=8, streaming=True, class_names="3")
    images = load_labelled_images(config)
    assert images.id2label == {0: "0", 1: "1", 2: "2"}
    assert sorted(images.class_labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_nested_labels_without_class_names(tmp_path):
    source = save_webdataset(tmp_path / "data", json=as_json)
    assert load(source, tmp_path, False, label_column="json.name").id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "class_names", "message"),
    [
        ("json", "3", r"several values per image. Set --label_column to one of \['json.a.b', 'json.label', "),
        ("json.many", "3", "must be integers or strings, one for each image, but .* 'json.many' holds List"),
        ("json.score", "3", "'json.score' holds Value..float64"),
        ("json.a", "3", r"'json.a' holds several values per image. .*\['json.a.b'\]"),
        ("json.x", "3", r"no column 'json.x'. Set --label_column to one of \[.*'cls', 'json.a.b', .*'png'\]"),
        ("png", "3", "'png' holds Image"),
        ("cls", "2", r"label .*is 2, but the 2 classes are numbered from 0 to 1\. Are the labels counted from 1"),
        ("cls", "1", "(is 2|is 1|from 0 to 2), but the (dataset names 1|1 classes)"),
        ("json.name", "3", "(labels a, b, c are not class names|is '[abc]'), but the dataset names 3 classes"),
        ("cls", "names.txt", "--class_names names.txt is neither a file"),
    ],
)
def test_columns_that_hold_no_labels_are_refused(tmp_path, streaming, column, class_names, message):
    source = save_webdataset(tmp_path / "data", cls=cls, json=as_json)
    with pytest.raises(UserError, match=message):
        load(source, tmp_path, streaming, label_column=column, class_names=class_names)


@pytest.mark.parametrize("streaming", [False, True])
def test_class_names_of_a_column_that_names_them_are_refused(tmp_path, streaming):
    source = save_shards(tmp_path / "data", 6)
    with pytest.raises(UserError, match="--class_names 2 .* 'label' already names its classes: ant, bee. Leave it out"):
        load(source, tmp_path, streaming, image_column="image", class_names="2")


@pytest.mark.parametrize("streaming", [False, True])
def test_class_names_that_are_numbers_other_than_the_ids_are_logged(tmp_path, streaming, caplog):
    source = save_shards(tmp_path / "data", 6, feature=datasets.ClassLabel(names=["1", "2"]))
    load(source, tmp_path, streaming, image_column="image", shuffle_buffer_size=6)
    assert caplog.messages == ["Labels were mapped to class ids: '1' -> 0, '2' -> 1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": ""}, "dataset_name must not be empty. Leave out --dataset_name"),
        ({"train_data_dir": ""}, "train_data_dir must not be empty"),
        ({"dataset_name": "x", "dataset_config_name": ""}, "dataset_config_name must not be empty"),
        ({"dataset_name": "x", "class_names": ""}, "class_names must not be empty"),
        ({"dataset_name": "x", "train_data_dir": "y"}, "either --dataset_name or --train_data_dir"),
        ({"streaming": True}, "--streaming needs a dataset"),
        ({"class_names": "3"}, "--class_names needs a dataset"),
        ({"dataset_split": "test"}, "--dataset_split needs a dataset"),
        ({"label_column": "species"}, "--label_column needs a dataset"),
        ({"image_column": "picture"}, "--image_column needs a dataset"),
        ({"train_data_dir": "x", "dataset_config_name": "y"}, "--dataset_config_name needs --dataset_name"),
        ({"max_unreadable_fraction": -0.1}, r"max_unreadable_fraction must lie in \[0, 1\], but is -0.1"),
        ({"max_unreadable_fraction": 1.1}, r"must lie in \[0, 1\], but is 1.1"),
        ({"max_unreadable_fraction": float("nan")}, r"must lie in \[0, 1\], but is nan"),
    ],
)
@pytest.mark.parametrize("kind", [DataConfig, TrainConfig])
def test_settings_of_data_that_do_not_fit_are_refused(kind, settings: dict[str, Any], message):
    with pytest.raises(UserError, match=message):
        kind(**settings)
