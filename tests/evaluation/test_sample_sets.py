"""Test sets of samples on disk: the names of class folders, damage, locks, full disks, and what is never deleted."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.evaluation import sample_sets, sampling
from diffusers_cfg.evaluation.sample_sets import SampleSet, Shard, claim_folder, folder_names
from diffusers_cfg.evaluation.sampling import draw_to_folder
from diffusers_cfg.evaluation.settings import SampleConfig
from diffusers_cfg.settings import DataConfig
from tests.support.commands import locked_elsewhere
from tests.support.models import make_pipeline, make_unet

LONG = "ü" * 200  # 400 bytes
# Names of classes, and the names of their folders
FOLDERS = {
    ("cat", "dog", "Große Katze"): ["cat", "dog", "Große Katze"],
    ("0", "1", "10"): ["0", "1", "10"],
    ("train", "test"): ["train", "test"],
    ("shards", ".samples"): ["shards", "samples_1"],
    ("a/b", "a_b", "a_b_0"): ["a_b_0_", "a_b", "a_b_0"],
    ("", "."): ["0", "1"],
    ("..", "../../x"): ["0", ".._x_1"],
    ("Cat", "cat", "CAT"): ["Cat", "cat_1", "CAT_2"],
    ("caf\u00e9", "cafe\u0301"): ["caf\u00e9", "cafe\u0301_1"],
    ("x.", "x ", "x"): ["x_0", "x_1", "x"],
    ("a\0b", "a:b", "a\\b"): ["a_b_0", "a_b_1", "a_b_2"],
    (LONG, f"{LONG}2"): ["ü" * 63 + "_0", "ü" * 63 + "_1"],
    ("x" * 255, "x" * 256): ["x" * 255, "x" * 127 + "_1"],
    ("checkpoint-1", "model_index.json", "__MACOSX"): ["checkpoint-1_0", "model_index.json_1", "MACOSX_2"],
    ("CAFÉ\n", "?"): ["CAFÉ__0", "1"],
    ("unconditional", "x"): ["unconditional", "x"],
}


@pytest.mark.parametrize("names", FOLDERS)
def test_folders_have_the_names_of_the_classes_where_possible(names):
    folders = folder_names({**dict(enumerate(names)), -1: "unconditional"})
    assert [folders[class_id] for class_id in range(len(names))] == FOLDERS[names]
    assert folders[-1] == ("unconditional_-1" if "unconditional" in names else "unconditional")


def draw(model: Path, *argv: str) -> Path:
    flags = ["--model", str(model), "--output_dir", str(model.parent / "images"), "--num_inference_steps", "1"]
    config = parse_config(SampleConfig, [*flags, "--num_samples", "6", *argv])
    draw_to_folder(config, Accelerator(cpu=True))
    return Path(config.output_dir)


def labels_by_file(source: Path, flag: str) -> dict[str, str | None]:
    """Return the class of each image as training reads it."""
    settings: dict[str, Any] = {flag: str(source)}
    images = load_labelled_images(DataConfig(**settings))
    names = {-1: None, **images.id2label}
    return {
        images.name_image(i).rpartition("/")[2][:6]: names[class_id] for i, class_id in enumerate(images.class_labels)
    }


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("names", FOLDERS)
def test_what_is_written_is_read_back_with_the_same_classes(tmp_path, names, flag):
    pipeline = make_pipeline(make_unet(num_class_embeds=len(names) + 1), id2label=dict(enumerate(names)))
    samples = SampleSet(tmp_path / "shards", 2 * len(names))
    class_labels = np.arange(2 * len(names)) % len(names)
    images = np.zeros((2 * len(names), 8, 8, 3), np.uint8)
    (shard,) = samples.shards
    samples.save(shard, Shard(images, class_labels, 1.0))
    (tmp_path / "out").mkdir()
    sample_sets.write_png(samples, tmp_path / "out", pipeline)
    expected = {f"{index:06}": names[class_id] for index, class_id in enumerate(class_labels)}
    assert labels_by_file(tmp_path / "out", flag) == expected


def test_images_of_the_null_class_are_unlabelled_in_the_metadata(tmp_path):
    make_pipeline(id2label={0: "unconditional", 1: "a/b", 2: "c"}).save_pretrained(tmp_path / "model")
    folder = draw(tmp_path / "model", "--class_labels", "-1", "0", "a/b")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("a_b_1", "metadata.jsonl", "unconditional", "unconditional_-1")
    ]
    labels = labels_by_file(folder, "train_data_dir")
    assert [labels[f"{i:06}"] for i in range(6)] == [None, "unconditional", "a/b"] * 2


# Content of a shard of four images of 8×8 with the classes 0 … 3
SHARD = {"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.arange(4), "network_evaluations": 2.0}


@pytest.mark.parametrize(
    ("changes", "usable"),
    [
        ({}, True),
        ({"arr_0": np.zeros((5, 8, 8, 3), np.uint8), "arr_1": np.arange(5)}, True),  # of a larger set
        ({"arr_0": SHARD["arr_0"][:3]}, False),
        ({"arr_0": SHARD["arr_0"][:3], "arr_1": np.arange(3)}, False),
        ({"arr_0": np.zeros((4, 16, 16, 3), np.uint8)}, False),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, False),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, False),
        ({"arr_0": np.array([None] * 4)}, False),
        ({"arr_1": np.array([0, 1, 3, 2])}, False),
        ({"arr_1": np.int64(3)}, False),
        ({"network_evaluations": np.nan}, False),
        ({"network_evaluations": None}, False),
        ({"arr_1": None}, False),
    ],
)
def test_only_intact_shards_are_used(tmp_path, changes, usable):
    content = {name: value for name, value in {**SHARD, **changes}.items() if value is not None}
    np.savez(tmp_path / "shard-00000.npz", **content)
    assert SampleSet(tmp_path, 4).has(range(4), np.arange(4), (8, 8)) == usable


@pytest.mark.parametrize("position", [0, 5, 30, 60, 100, 200, 300, -60, -1])
def test_flipped_byte_in_a_shard_is_drawn_again(tmp_path, position):
    samples = SampleSet(tmp_path, 4)
    samples.save(range(4), Shard(SHARD["arr_0"], np.arange(4), 2.0))
    content = bytearray(samples.path(range(4)).read_bytes())
    content[position] ^= 0xFF
    samples.path(range(4)).write_bytes(content)
    try:
        same = all(np.array_equal(a, b) for a, b in zip(samples.load(range(4)), SHARD.values(), strict=False))
    except Exception:  # of any type
        same = False
    assert samples.has(range(4), np.arange(4), (8, 8)) == same


def test_settings_of_a_command_that_drew_nothing_are_replaced(tmp_path):
    claim_folder(tmp_path, {"seed": 1})
    claim_folder(tmp_path, {"seed": 0})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0}


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3", '{"seed": 1}'])
def test_samples_of_unknown_settings_are_drawn_again(tmp_path, content, caplog):
    samples = SampleSet(tmp_path / "w=1", 4)
    samples.save(range(4), Shard(SHARD["arr_0"], np.arange(4), 2.0))
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    if content == '{"seed": 1}':
        with pytest.raises(UserError, match="different settings .seed 1, now 0"):
            claim_folder(tmp_path, {"seed": 0})
        assert samples.path(range(4)).is_file()
        return
    claim_folder(tmp_path, {"seed": 0})
    assert "1 shards in" in caplog.text
    assert not samples.path(range(4)).exists()
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0}


@pytest.mark.parametrize(
    ("output_dir", "message"),
    [
        ("", "output_dir must not be empty"),
        (".", "--output_dir . is not empty"),
        ("/dev/null", "--output_dir /dev/null cannot be a folder, because /dev/null is not one"),
        ("/dev/null/x", "--output_dir /dev/null/x cannot be a folder, because /dev/null is not one"),
        ("/proc/x", "--output_dir '/proc/x' cannot be written"),
        ("x" * 300, "--output_dir 'x+' cannot be written: .*File name too long"),
        ("a\0b", r"--output_dir 'a\\x00b' cannot be written"),
        ("MODEL", "--output_dir .*model is not empty"),
        ("MODEL/unet", "--output_dir .*unet is not empty"),
        ("DATA/images", "--output_dir .*images lies in the data folder .*data, where its images would be read as data"),
        ("DATA", "--output_dir .*data lies in the data folder"),
    ],
)
def test_output_folder_is_checked_before_drawing(model, tmp_path, monkeypatch, output_dir, message):
    monkeypatch.chdir(model)
    monkeypatch.setattr(sampling, "draw_sets", None)
    (tmp_path / "data").mkdir()
    (model / "train_config.yaml").write_text(f"train_data_dir: {tmp_path / 'data'}\n")
    before = sorted(tmp_path.rglob("*"))
    output_dir = output_dir.replace("MODEL", str(model)).replace("DATA", str(tmp_path / "data"))
    with pytest.raises(UserError, match=message):
        draw(model, "--output_dir", output_dir)
    assert sorted(tmp_path.rglob("*")) == before


def fail_after(number: int, function: Callable, error: Exception) -> Callable:
    """Return a function that raises an error after a number of calls."""
    calls = []

    def failing(*args, **settings):
        calls.append(args)
        if len(calls) > number:
            raise error
        return function(*args, **settings)

    return failing


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("image_format", "owner", "name", "number"),
    [
        ("png", np, "savez_compressed", 1),  # in the second shard
        *[(image_format, SampleSet, "load", 2) for image_format in ("png", "npz", "grid")],  # while images are written
        ("png", SampleSet, "delete", 0),
    ],
)
def test_full_disk_ends_with_one_line_and_the_repeated_command_goes_on(
    model, monkeypatch, image_format, owner, name, number
):
    monkeypatch.setattr(sample_sets, "SHARD_SIZE", 2)
    argv = ["--format", image_format]
    expected = draw(model, *argv).rename(model.parent / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_after(number, getattr(owner, name), FULL))
        with pytest.raises(UserError, match="No space left on device. The results so far are kept in .*samples"):
            draw(model, *argv)
    kept = {path: path.stat().st_mtime_ns for path in (model.parent / "images" / ".samples").glob("shard-*.npz")}
    assert len(kept) == (1 if name == "savez_compressed" else 3)
    with pytest.raises(UserError, match=r"different settings \(seed 0, now 1\)"):
        draw(model, *argv, "--seed", "1")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    folder = draw(model, *argv)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} == {
        path.relative_to(expected): path.read_bytes() for path in expected.rglob("*.*")
    }


def test_second_command_in_one_folder_is_refused(model):
    folder = model.parent / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "draw_sets", fail_after(0, draw, FULL))
        with pytest.raises(UserError, match="No space left"):
            draw(model)
    lock = folder / ".samples" / ".lock"
    with locked_elsewhere(lock), pytest.raises(UserError, match="is in use by process 7 on elsewhere"):
        draw(model)
    draw(model)  # the lock of a dead process does not count


def test_files_of_others_are_not_deleted(model):
    folder, precious = model.parent / "images", model.parent / "precious"
    precious.mkdir()
    (precious / "shard-00000.npz").write_bytes(b"mine")
    (precious / "settings.json").write_text("{}")
    folder.mkdir()
    (folder / ".samples").symlink_to(precious)
    with pytest.raises(UserError, match="images is not empty"):
        draw(model)
    assert (precious / "shard-00000.npz").read_bytes() == b"mine"

    samples = SampleSet(model.parent / "shards", 4)
    samples.save(range(4), Shard(SHARD["arr_0"], np.arange(4), 2.0))
    (samples.folder / "shard-00001.tmp-1").write_bytes(b"of a killed process")
    (samples.folder / "notes.txt").write_text("mine")
    samples.delete()
    assert [path.name for path in samples.folder.iterdir()] == ["notes.txt"]


def test_progress_is_no_bar_in_a_file(model, capfd, caplog):
    caplog.set_level("INFO")
    draw(model)
    assert "pass" not in capfd.readouterr().err
    assert "Sampling shard 1 of 1, w = 1" in caplog.text


def test_image_is_not_left_half_written(tmp_path, monkeypatch):
    samples = SampleSet(tmp_path / "shards", 4)
    samples.save(range(4), Shard(SHARD["arr_0"], np.arange(4) % 3, 2.0))
    save = Image.Image.save

    def half(self, path, *args, **settings):
        save(self, path, *args, **settings)
        Path(path).write_bytes(Path(path).read_bytes()[:50])
        raise FULL

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left"):
        sample_sets.write_grid(samples, tmp_path, make_pipeline())
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert torch.equal(samples.first_images(4), torch.zeros(4, 3, 8, 8))
