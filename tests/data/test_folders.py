"""Test folders of images: trees of files, and the classes, numbers and messages that they give, for both flags."""

import json
import logging
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import LazyImages, fingerprint, stack_images
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.data.labels import UNLABELLED
from diffusers_cfg.data.sources import ImageStream, load_labelled_images
from diffusers_cfg.evaluation.sweep import smaller_size
from diffusers_cfg.settings import DataConfig
from tests.support.images import numbered


def write_tree(root: Path, *files: str | tuple[str, str]) -> Path:
    """
    Write a tree of files. `a/{0..3}.png` stands for three files, and `(path, text)` for a file with a text. The images
    are numbered 1, 2, … in the order of the list.
    """
    number = 0
    for file in files:
        name, text = (file, None) if isinstance(file, str) else file
        head, _, rest = name.partition("{0..")
        count, _, tail = rest.partition("}")
        for path in [root / f"{head}{i}{tail}" for i in range(int(count))] if rest else [root / name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            elif text is not None:
                path.write_text(text, encoding="utf-8")
            elif path.suffix.lower() in (".png", ".jpg"):
                path.write_bytes(numbered(number := number + 1))
            else:
                path.write_bytes(b"?")
    return root


def load(root: Path, flag: str = "train_data_dir", needs_labels: bool = True, **settings) -> LabelledImages:
    config = DataConfig(**{"resolution": 8, flag: str(root), "max_unreadable_fraction": 0.5, **settings})
    return load_labelled_images(config, needs_labels)


def counts(images: LabelledImages) -> dict[str, int]:
    """Return the number of images of each class, in the order of the ids."""
    labels = Counter(images.class_labels.tolist())
    return {name: labels[class_id] for class_id, name in images.id2label.items()}


DIGITS = {str(i): 1 for i in range(12)}
CSV = "file_name,label\n0.png,cat\n1.png,dog\n2.png,cat\n"
JSONL = "".join(json.dumps({"file_name": f"{i}.png", "label": "cat" if i % 2 else "dog"}) + "\n" for i in range(3))
NESTED = "".join(json.dumps({"file_name": f"{i}.png", "json": {"label": i % 2}}) + "\n" for i in range(4))
# Trees, the settings, and the number of images of each class by id. Words from public reports stand in names.
TREES = {
    "class folders": (["dog/{0..3}.png", "cat/{0..2}.png"], {}, {"cat": 2, "dog": 3}),
    "upper-case suffixes": (["a/0.PNG", "b/0.JPG"], {}, {"a": 1, "b": 1}),
    "words in names of classes": (
        ["bus/{0..6}.png", "car/{0..6}.png", "bullet-train/{0..6}.png", "steam-train/{0..6}.png"],
        {},
        {"bullet-train": 6, "bus": 6, "car": 6, "steam-train": 6},
    ),
    "words in names of files": (
        ["cat/cat_{0..9}.png", "cat/cat_train_0.png", "dog/{0..3}.png", "dog/dog_train_1.png"],
        {},
        {"cat": 10, "dog": 4},
    ),
    "one such file in each class": (
        ["cat/{0..5}.png", "cat/by the train.png", "dog/blood test 3.png", "dog/{0..5}.png"],
        {},
        {"cat": 6, "dog": 6},
    ),
    "a class called train": (["train/{0..2}.png", "bus/{0..2}.png"], {}, {"bus": 2, "train": 2}),
    "a class called test": (["test/{0..2}.png", "bus/{0..2}.png"], {}, {"bus": 2, "test": 2}),
    "a class called val": (["val/{0..2}.png", "bus/{0..2}.png"], {}, {"bus": 2, "val": 2}),
    "a class called dev": (["dev/{0..2}.png", "ops/{0..2}.png"], {}, {"dev": 2, "ops": 2}),
    "a class called eval": (["eval/{0..2}.png", "exec/{0..2}.png"], {}, {"eval": 2, "exec": 2}),
    "a class called evaluation": (["evaluation/0.png", "x/0.png"], {}, {"evaluation": 1, "x": 1}),
    "a class called Testing": (["Testing/0.png", "x/0.png"], {}, {"Testing": 1, "x": 1}),
    "words in folders below": (["cat/train/0.png", "cat/test/1.png", "dog/val/0.png"], {}, {"cat": 2, "dog": 1}),
    "split words and another folder": (
        ["train/0.png", "test/0.png", "extra/0.png"],
        {},
        {"extra": 1, "test": 1, "train": 1},
    ),
    "samples of classes called like splits": (["train/{0..2}.png", "test/0.png"], {}, {"test": 1, "train": 2}),
    "folders below": (
        ["cat/indoor/{0..2}.png", "cat/outdoor/0.png", "dog/indoor/0.png"],
        {},
        {"cat": 3, "dog": 1},
    ),
    "folders of the same name below": (["animals/bat/0.png", "sports/bat/0.png"], {}, {"animals": 1, "sports": 1}),
    "a folder below in one class": (["cat/0.png", "cat/old/1.png", "dog/0.png"], {}, {"cat": 2, "dog": 1}),
    "Tiny ImageNet": (
        ["train/n01/images/{0..2}.png", "train/n02/images/0.png", "val/images/0.png", "test/images/0.png"],
        {},
        {"n01": 2, "n02": 1},
    ),
    "splits": (["train/a/0.png", "train/b/0.png", "test/a/{0..3}.png", "test/b/0.png"], {}, {"a": 1, "b": 1}),
    "splits, of which test": (
        ["train/a/0.png", "train/b/0.png", "test/a/{0..3}.png", "test/b/0.png"],
        {"dataset_split": "test"},
        {"a": 3, "b": 1},
    ),
    "splits with capitals": (["Train/a/0.png", "Train/b/0.png", "Test/a/{0..3}.png"], {}, {"a": 1, "b": 1}),
    "a split by its own name": (["Train/a/0.png", "TEST/a/{0..3}.png"], {"dataset_split": "TEST"}, {"a": 3}),
    "a split by another name": (["train/a/0.png", "val/a/{0..3}.png"], {"dataset_split": "validation"}, {"a": 3}),
    "a class that a split lacks": (
        ["train/a/0.png", "train/b/0.png", "test/b/0.png"],
        {"dataset_split": "test"},
        {"a": 0, "b": 1},
    ),
    "a single split": (["training/a/0.png", "training/b/0.png"], {}, {"a": 1, "b": 1}),
    "a part of a split": (
        ["train/a/{0..4}.png", "train/b/{0..4}.png"],
        {"dataset_split": "train[2:6]"},
        {"a": 2, "b": 2},
    ),
    "two splits": (
        ["train/a/{0..4}.png", "train/b/{0..4}.png", "test/a/0.png"],
        {"dataset_split": "train[:50%]+test"},
        {"a": 5, "b": 0},
    ),
    "a part of class folders": (["a/{0..4}.png", "b/{0..4}.png"], {"dataset_split": "train[50%:]"}, {"a": 0, "b": 4}),
    "numbers": ([f"{i}/0.png" for i in range(12)], {}, DIGITS),
    "numbers from 1": ([f"{i}/0.png" for i in range(1, 11)], {}, {str(i): 1 for i in range(1, 11)}),
    "numbers with zeros": ([f"{i:03}/0.png" for i in range(12)], {}, {f"{i:03}": 1 for i in range(12)}),
    "numbers and names": (["10/0.png", "2/0.png", "cat/0.png"], {}, {"10": 1, "2": 1, "cat": 1}),
    "unusual names": (["日本/0.png", "b [2]/*.png", "c*d/0.png"], {}, {"b [2]": 1, "c*d": 1, "日本": 1}),
    "hidden files": (
        ["a/0.png", "a/.1.png", "b/0.png", ".ipynb_checkpoints/0.png", "__MACOSX/a/._0.png", "a/.DS_Store"],
        {},
        {"a": 1, "b": 1},
    ),
    "thumbnails and bins of file servers": (
        ["a/0.png", "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "b/0.png", "@eaDir/x.jpg", "$RECYCLE.BIN/S-1/0.png"],
        {},
        {"a": 1, "b": 1},
    ),
    "companions": (["a/0.png", "a/0.txt", "a/0.json", "b/0.png", "b/Thumbs.db", "README.md"], {}, {"a": 1, "b": 1}),
    "metadata.csv": (["{0..3}.png", ("metadata.csv", CSV)], {}, {"cat": 2, "dog": 1}),
    "metadata.jsonl": (["{0..3}.png", ("metadata.jsonl", JSONL)], {}, {"cat": 1, "dog": 2}),
    "metadata of folders": (
        ["a/0.png", "b/0.png", ("metadata.csv", "file_name,label\na/0.png,7\nb/0.png,8\n")],
        {},
        {"7": 1, "8": 1},
    ),
    "metadata of splits": (
        ["train/{0..3}.png", ("train/metadata.csv", CSV), "test/{0..3}.png", ("test/metadata.csv", CSV)],
        {"dataset_split": "test"},
        {"cat": 2, "dog": 1},
    ),
    "metadata in each folder": (
        [
            *("a/0.png", "b/0.png"),
            ("a/metadata.csv", "file_name,label\n0.png,7\n"),
            ("b/metadata.csv", "file_name,label\n0.png,8\n"),
        ],
        {},
        {"7": 1, "8": 1},
    ),
    "another column of metadata": (
        ["{0..2}.png", ("metadata.csv", "file_name,label,species\n0.png,0,x\n1.png,0,y\n")],
        {"label_column": "species"},
        {"x": 1, "y": 1},
    ),
    "another column of images": (
        ["{0..2}.png", ("metadata.csv", "front_file_name,label\n0.png,x\n1.png,y\n")],
        {"image_column": "front"},
        {"x": 1, "y": 1},
    ),
    "a nested column of metadata": (
        ["{0..4}.png", ("metadata.jsonl", NESTED)],
        {"label_column": "json.label"},
        {"0": 2, "1": 2},
    ),
    "captions and class folders": (
        ["a/0.png", "b/0.png", ("metadata.csv", "file_name,text\na/0.png,x\nb/0.png,y\n")],
        {},
        {"a": 1, "b": 1},
    ),
}
FLAGS = ["train_data_dir", "dataset_name"]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", TREES)
def test_classes_of_a_folder(tmp_path, flag, name):
    files, settings, expected = TREES[name]
    images = load(write_tree(tmp_path / "photos [2024]", *files), flag, **settings)
    assert counts(images) == expected
    assert [*counts(images)] == [*expected]
    assert len(stack_images(images, DataConfig(resolution=8), 1, show_progress=False)) == sum(expected.values())


STREAMABLE = [name for name in TREES if "metadata" not in name and "column" not in name]


@pytest.mark.parametrize("name", STREAMABLE)
def test_classes_of_a_streamed_folder(tmp_path, name):
    files, settings, expected = TREES[name]
    images = load(write_tree(tmp_path / "photos", *files), streaming=True, **settings)
    assert isinstance(images, ImageStream)
    assert counts(images) == expected
    assert images.num_images == sum(expected.values())


# Trees, and what must be logged about them
WARNINGS = {
    "class folders": (["a/0.png", "b/0.png"], ""),
    "numbers": ([f"{i}/0.png" for i in range(12)], ""),
    "numbers from 1": ([f"{i}/0.png" for i in range(1, 11)], "Labels were mapped to class ids: '1' -> 0, '2' -> 1"),
    "numbers with a gap": (["0/0.png", "2/0.png"], "'2' -> 1"),
    "numbers with zeros": ([f"{i:03}/0.png" for i in range(12)], ""),
    "numbers and names": (["10/0.png", "cat/0.png"], "'10' -> 0, 'cat' -> 1"),
    "unknown kinds": (
        ["cat/{0..9}.png", "cat/IMG_{0..5}.HEIC", "dog/{0..9}.png", "dog/{0..2}.jxl"],
        r"Files left out, because PIL cannot read them: 7 \(.HEIC 5, .jxl 2\). Convert them to PNG or JPEG.",
    ),
    "an image beside": (["a/0.png", "b/0.png", "cover.png"], "left out: {root}/cover.png. Put images into"),
    "an archive beside": (["a/0.png", "b/0.png", "all.zip"], "left out: {root}/all.zip. .*unpack archives"),
    "an archive beside splits": (["train/a/0.png", "train/b/0.png", "x.tar"], "left out: {root}/x.tar"),
    "metadata beside splits": (["train/a/0.png", "train/b/0.png", "metadata.csv"], "left out: {root}/metadata.csv"),
    "a run": (
        ["a/0.png", "b/0.png", "model/model_index.json", "model/samples/0.png"],
        "{root}/model is the output folder of a run, so its images are left out",
    ),
    "an unfinished run": (
        ["a/0.png", "b/0.png", "a/out/checkpoint-50/state.json", "a/out/samples/0.png"],
        "{root}/a/out is",
    ),
    "captions": (
        ["a/0.png", "b/0.png", ("metadata.csv", "file_name,text\na/0.png,x\n")],
        r"{root}/metadata.csv has no column 'label' \(--label_column\), so the class folders label the images",
    ),
    "metadata of a part": (
        ["{0..5}.png", ("metadata.csv", CSV)],
        "{root}/metadata.csv: 3 of the 5 images in .* are listed, so 2 are left out: {root}/3.png, {root}/4.png",
    ),
    "metadata with an empty cell": (
        ["{0..3}.png", ("metadata.csv", "file_name,label\n0.png,0\n1.png,\n2.png,1\n")],
        "1 of 3 images have no label",
    ),
    "split words and another folder": (
        ["train/0.png", "test/0.png", "extra/0.png"],
        "test, train of {root} are taken as classes, not as splits, because extra is beside them",
    ),
    "split words without class folders": (["train/0.png", "test/0.png"], "because they have no subfolders"),
    "a class that a split lacks": (["train/a/0.png", "train/c/0.png", "test/a/0.png", "test/b/0.png"], "1 of 3 .*: b$"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_logged_about_a_folder(tmp_path, caplog, name):
    files, warning = WARNINGS[name]
    root = write_tree(tmp_path / "data", *files)
    load(root)
    assert_logged(caplog, warning.replace("{root}", str(root)))


def assert_logged(caplog, pattern: str) -> None:
    """Assert that a warning matches a pattern, or that there is none for an empty pattern."""
    assert any(re.search(pattern, message) for message in caplog.messages) if pattern else not caplog.messages


# Trees, settings and the error
REFUSED = {
    "no images": (["notes.txt"], {}, "{root} has no subfolders. Pass a folder with one subfolder per class"),
    "only an archive": (["photos.zip"], {}, "has no subfolders.* Unpack {root}/photos.zip"),
    "a Parquet dataset": (["data/train-00000-of-00001.parquet"], {}, "{root}/data.*.parquet 1.* with --dataset_name"),
    "an empty class": (
        ["cat/0.png", "dog/0.png", "empty/"],
        {},
        "no image that PIL can read: {root}/empty. Add images",
    ),
    "a class of unknown kinds": (
        ["cat/{0..4}.png", "owl/{0..2}.HEIC", "owl/0.CR2"],
        {},
        r"{root}/owl \(but .HEIC 2, .CR2 1\)",
    ),
    "too many of unknown kinds": (
        ["cat/{0..4}.png", "cat/IMG_{0..10}.HEIC", "dog/{0..4}.png", "dog/{0..4}.jxl"],
        {},
        r"14 of the 22 files in {root} are not images that PIL can read \(.HEIC 10, .jxl 4\), .*0.5 allows: .*_0.HEIC",
    ),
    "none of them allowed": (["a/0.png", "b/{0..9}.png", "b/x"], {"max_unreadable_fraction": 0}, r"\(no suffix 1\)"),
    "a flat folder": (["{0..3}.png"], {}, "has no subfolders"),
    "captions without class folders": (
        ["{0..3}.png", ("metadata.csv", "file_name,text\n0.png,x\n")],
        {},
        r"{root}/metadata.csv has no column 'label'. Set --label_column to one of \['file_name', 'text'\]",
    ),
    "metadata without names of files": (
        ["0.png", ("metadata.csv", "path,label\n0.png,x\n")],
        {},
        "no column 'file_name'",
    ),
    "metadata that is damaged": (["0.png", ("metadata.jsonl", "{")], {}, "{root}/metadata.jsonl cannot be read"),
    "metadata that is empty": (["0.png", ("metadata.csv", "")], {}, "{root}/metadata.csv cannot be read"),
    "metadata of other types": (
        [
            "a/0.png",
            ("a/metadata.csv", "file_name,label\n0.png,1\n"),
            "b/0.png",
            ("b/metadata.csv", "file_name,label\n0.png,x\n"),
        ],
        {},
        "'label' has different types in {root}/a/metadata.csv, {root}/b/metadata.csv",
    ),
    "metadata with floats": (
        ["0.png", ("metadata.csv", "file_name,label\n0.png,0.5\n")],
        {},
        "'label' holds Value..float64",
    ),
    "metadata with lists": (
        ["0.png", ("metadata.jsonl", '{"file_name": "0.png", "label": [0, 1]}')],
        {},
        "one for each image, but the column 'label' holds List.*argmax",
    ),
    "metadata with objects": (
        ["0.png", ("metadata.jsonl", '{"file_name": "0.png", "label": {"id": 1, "name": "x"}}')],
        {},
        r"several values per image. Set --label_column to one of \['label.id', 'label.name'\]",
    ),
    "metadata of files elsewhere": (
        ["a/0.png", ("a/metadata.csv", "file_name,label\n../x.png,1\n")],
        {},
        "names '../x.png'",
    ),
    "metadata of absolute paths": (["0.png", ("metadata.csv", "file_name,label\n/x.png,1\n")], {}, "names '/x.png'"),
    "metadata of URLs": (
        ["0.png", ("metadata.csv", "file_name,label\nhttp://x/y.png,1\n")],
        {},
        "names 'http://x/y.png'",
    ),
    "a folder of a run": (["a/0.png", "b/0.png", "train_config.yaml"], {}, "{root} is the output folder of a run"),
    "no such split": (["a/0.png", "b/0.png"], {"dataset_split": "test"}, "'test' is not a split of .*Use: train.$"),
    "no such split among splits": (
        ["train/a/0.png", "test/a/0.png"],
        {"dataset_split": "val"},
        "'val' is not a split of .*Use: test, train.$",
    ),
    "two folders for a split": (["test/a/0.png", "eval/a/0.png"], {}, "'train' is not a split of .*Use: eval, test.$"),
    "a wrong part of a split": (["a/0.png", "b/0.png"], {"dataset_split": "train[:x]"}, "nor a part .*Use: train.$"),
    "splits with capitals": (["Train/a/0.png", "Test/a/0.png"], {"dataset_split": "val"}, "Use: Test, Train.$"),
    "a column that is missing": (["a/0.png", "b/0.png"], {"label_column": "species"}, "no column 'species'"),
    "class names of class folders": (
        ["a/0.png", "b/0.png"],
        {"class_names": "2"},
        "already names its classes: a, b. Leave",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_folders(tmp_path, name, streaming):
    files, settings, message = REFUSED[name]
    root = write_tree(tmp_path / "data", *files)
    with pytest.raises(UserError, match=message.replace("{root}", str(root))):
        load(root, streaming=streaming, **settings)


def test_symbolic_links_are_followed(tmp_path):
    elsewhere = write_tree(tmp_path / "elsewhere", "{0..3}.png")
    root = write_tree(tmp_path / "data", "dog/0.png")
    (root / "cat").symlink_to(elsewhere)
    (root / "dog" / "1.png").symlink_to(elsewhere / "1.png")
    (root / "dog" / "all").symlink_to(root)  # back to the folder itself
    images = load(root)
    assert counts(images) == {"cat": 3, "dog": 2}
    assert [images.name_image(i) for i in (0, 4)] == [f"row 0 ({root}/cat/0.png)", f"row 4 ({root}/dog/1.png)"]


def test_a_broken_link_counts_as_unreadable(tmp_path, caplog):
    root = write_tree(tmp_path / "data", "cat/{0..3}.png", "dog/{0..3}.png")
    (root / "dog" / "9.png").symlink_to(tmp_path / "nowhere.png")
    assert len(stack_images(load(root), DataConfig(max_unreadable_fraction=0.5), 1, show_progress=False)) == 6
    assert "Skipped unreadable image" in caplog.text


def test_names_that_are_not_utf8_are_refused(tmp_path):
    """Archives of other systems contain such names."""
    root = write_tree(tmp_path / "data", "a/0.png", "b/0.png")
    (root / "a" / "0.png").rename(os.fsdecode(os.fsencode(root / "a") + b"/\xff.png"))
    with pytest.raises(UserError, match=rf"{root} contains 'a/\\udcff.png', whose name is not UTF-8. Rename it"):
        load(root)


def test_a_folder_of_parquet_metadata_keeps_its_class_names(tmp_path):
    root = write_tree(tmp_path / "data", "{0..3}.png")
    label = datasets.ClassLabel(names=["no", "yes", "never"])
    table = {"file_name": [f"{i}.png" for i in range(3)], "label": [1, 0, 1]}
    features = datasets.Features({"file_name": datasets.Value("string"), "label": label})
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "metadata.parquet")
    for flag in FLAGS:
        assert counts(load(root, flag)) == {"no": 1, "yes": 2, "never": 0}


def test_images_of_a_class_that_cannot_be_read_are_an_error(tmp_path):
    root = write_tree(tmp_path / "data", "cat/{0..9}.png", ("dog/0.png", "broken"))
    with pytest.raises(UserError, match="No image of these classes can be read: dog"):
        stack_images(load(root), DataConfig(max_unreadable_fraction=0.5), 1, show_progress=False)


def test_size_of_the_first_readable_image(tmp_path):
    """An evaluation compares it with the resolution of the model."""
    images = load(write_tree(tmp_path / "data", ("a/0.png", "broken"), "a/1.png", "b/0.png"))
    assert [smaller_size(images, resolution) for resolution in (8, 9)] == [None, (8, 8)]
    images = load(write_tree(tmp_path / "broken", ("a/0.png", "broken"), ("b/0.png", "broken")))
    assert smaller_size(images, 8) is None


def test_files_left_out_count_with_those_that_cannot_be_decoded(tmp_path):
    root = write_tree(tmp_path / "data", "cat/{0..8}.png", "cat/0.HEIC", "dog/0.png", ("dog/1.png", "broken"))
    images = load(root, max_unreadable_fraction=0.1)
    with pytest.raises(UserError, match="2 of 11 images cannot be read.*dog/1.png.*cat/0.HEIC"):
        stack_images(images, DataConfig(max_unreadable_fraction=0.1), 1, show_progress=False)


def test_a_folder_without_labels(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "diffusers_cfg"):
        images = load(write_tree(tmp_path / "flat", "2023/a/0.png", "0.png", "1.png"), needs_labels=False)
    assert (images.class_labels.tolist(), images.id2label) == ([UNLABELLED] * 3, {})
    assert "its images are unlabelled" in caplog.text
    splits = load(write_tree(tmp_path / "splits", "train/{0..2}.png", "test/0.png"), needs_labels=False)
    assert len(splits) == 2
    with pytest.raises(UserError, match="has no images"):
        load(write_tree(tmp_path / "empty", "0.txt"), needs_labels=False)


def lazy_fingerprint(root: Path, **settings) -> str:
    return fingerprint(LazyImages(load(root, **settings), 8, 1, center_crop=True))


def test_fingerprint_of_lazy_images_covers_every_file(tmp_path):
    root = write_tree(tmp_path / "data", "cat/{0..20}.png", "dog/{0..20}.png")
    for path in root.glob("*/*.png"):
        os.utime(path, (0, 0))
    name = lazy_fingerprint(root)
    shutil.copytree(root, tmp_path / "moved")
    assert lazy_fingerprint(tmp_path / "moved") == lazy_fingerprint(root, dataset_split="train") == name
    for change in ("content", "time", "name"):
        changed = tmp_path / change
        shutil.copytree(root, changed)
        path = changed / "cat" / "7.png"
        if change == "content":
            path.write_bytes(numbered(7) + b" ")
            os.utime(path, (0, 0))
        elif change == "time":
            os.utime(path, (0, 1))
        else:
            path.rename(changed / "cat" / "7b.png")
        assert lazy_fingerprint(changed) != name, change


def test_local_folders_of_datasets_are_left_to_datasets(tmp_path):
    """A card, or files of a dataset, decide what the folder contains, even with images beside them."""
    root = write_tree(tmp_path / "data", "assets/0.png", "assets/1.png")
    dataset = datasets.Dataset.from_dict({"image": [str(root / "assets" / "0.png")] * 2, "label": [0, 1]})
    dataset.cast_column("image", datasets.Image()).to_parquet(root / "train-00000-of-00001.parquet")
    assert counts(load(root, "dataset_name", cache_dir=str(tmp_path / "cache"))) == {"0": 1, "1": 1}
    card = "---\nconfigs:\n- config_name: default\n  data_files: x/**\n---\n"
    root = write_tree(tmp_path / "card", "x/a/0.png", "x/b/0.png", "y/c/0.png", ("README.md", card))
    assert counts(load(root, "dataset_name", cache_dir=str(tmp_path / "cache"))) == {"a": 1, "b": 1}


def test_a_configuration_that_a_folder_lacks_is_refused(tmp_path):
    root = write_tree(tmp_path / "data", "a/0.png", "b/0.png")
    with pytest.raises(UserError, match="'x' not found"):
        load(root, "dataset_name", dataset_config_name="x", cache_dir=str(tmp_path / "cache"))


def test_batches_of_a_folder_are_those_of_its_files(tmp_path):
    root = write_tree(tmp_path / "data", "b/{0..2}.png", "a/x/{0..2}.png", "a/y.png")
    data = stack_images(load(root), DataConfig(resolution=8), 1, show_progress=False)
    assert data.images[:, 0, 0, 0].tolist() == [3, 4, 5, 1, 2]
    assert torch.equal(data.class_labels, torch.tensor([0, 0, 0, 1, 1]))
