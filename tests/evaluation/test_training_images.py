"""Test what evaluate_cfg.py tells about memorisation and classes: which images are compared, tables and pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from torchmetrics.image.kid import poly_mmd

from diffusers_cfg.config import parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import pictures, reports, training_images
from diffusers_cfg.evaluation.by_class import class_table
from diffusers_cfg.evaluation.metrics import polynomial_mmd
from diffusers_cfg.evaluation.sample_sets import SampleSet, Shard
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.evaluation.sweep import run_sweep
from diffusers_cfg.method_settings import CFGConfig
from tests.support.images import save_images
from tests.support.models import make_pipeline, make_unet

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module", autouse=True)
def without_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "plot_curves", lambda *_: None)
        yield


def evaluate(model: Path, folder: Path, *argv: str) -> dict[str, Any]:
    flags = ["--model", str(model), "--num_samples", "20", "--num_inference_steps", "1", "--guidance_scales", "0", "1"]
    folders = ["--output_dir", str(folder / "out"), "--statistics_dir", str(folder / "statistics")]
    return run_sweep(parse_config(EvaluationConfig, [*flags, *folders, *argv]), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> str:
    """Return a folder of 360 training images and 180 test images of other pixels, in three classes."""
    folder = tmp_path_factory.mktemp("splits")
    save_images(folder / "train", NAMES, n=120)
    save_images(folder / "test", NAMES, n=60)
    for path in folder.glob("test/*/*.png"):  # otherwise the first images of both are the same
        ImageOps.invert(Image.open(path)).save(path)
    return str(folder)


@pytest.fixture(scope="module")
def model(splits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_pipeline(id2label=dict(enumerate(NAMES))).save_pretrained(folder)
    CFGConfig(train_data_dir=splits, resolution=8).save(folder / "train_config.yaml")
    return folder


def change_run(model: Path, folder: Path, **settings: Any) -> Path:
    """Return a copy of a model whose run has other settings."""
    shutil.copytree(model, folder / "model")
    CFGConfig(**{"resolution": 8, **settings}).save(folder / "model" / "train_config.yaml")
    return folder / "model"


def test_test_split_is_held_out_and_the_training_images_are_searched(model, tmp_path):
    record = evaluate(model, tmp_path)
    text = (
        "Close to training: the share of 20 samples that are as close to one of 360 training images as the closest 5% "
        "of 180 held-out images are"
    )
    assert text in record["memorisation"]
    assert record["floor"]["close_to_training"] == pytest.approx(0.05, abs=0.01)
    assert [row["close_to_training"] for row in record["results"]] == [0, 0]  # samples of random weights
    assert "close_to_training" not in record["best"]
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert record["memorisation"] in table
    assert "| close to training |" in table
    assert record["training_images"] == {"a": 120, "b": 120, "c": 120}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == record


@pytest.mark.parametrize("flags", [["--dataset_split", "test"], ["--dataset_split", "train"]])
def test_evaluated_split_does_not_change_what_was_trained_on(model, tmp_path, flags):
    record = evaluate(model, tmp_path, *flags)
    assert "one of 360 training images as the closest 5% of 180 held-out" in record["memorisation"]
    assert record["training_images"] == {"a": 120, "b": 120, "c": 120}


def test_copies_have_the_share_1(model, tmp_path, splits):
    """The samples on disk are replaced by training images."""
    evaluate(model, tmp_path)
    for w in "01":
        (path,) = (tmp_path / "out" / "samples" / f"w={w}").glob("shard-*.npz")
        with np.load(path) as file:
            content = dict(file)
        for index, class_id in enumerate(content["arr_1"]):
            image = Image.open(Path(splits) / "train" / NAMES[class_id] / f"{index}.png")
            content["arr_0"][index] = np.asarray(image.convert("RGB"))
        np.savez_compressed(path, **content)
    record = evaluate(model, tmp_path)
    assert [row["close_to_training"] for row in record["results"]] == [1, 1]


def test_held_out_fraction_of_the_run_is_used(tmp_path, model):
    """The digits have no test split: without held-out images the report says how to get some."""
    pipeline = make_pipeline(make_unet(num_class_embeds=11), id2label=Digits().id2label)
    pipeline.save_pretrained(tmp_path / "model")
    CFGConfig(train_val_split=0.1).save(tmp_path / "model" / "train_config.yaml")
    record = evaluate(tmp_path / "model", tmp_path, "--guidance_scales", "0")
    assert "one of 1,617 training images as the closest 5% of 180 held-out" in record["memorisation"]
    assert sum(record["training_images"].values()) == 1617
    CFGConfig().save(tmp_path / "model" / "train_config.yaml")
    record = evaluate(tmp_path / "model", tmp_path, "--guidance_scales", "0")
    assert record["memorisation"].startswith("Memorisation is not measured: ")
    assert "Train with --train_val_split, or name held-out data" in record["memorisation"]
    assert "close_to_training" not in record["results"][0]
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert "close to training" not in table
    assert record["memorisation"] in table
    assert (tmp_path / "out" / "nearest.png").is_file()  # without held-out images


def test_split_that_was_trained_on_is_not_held_out(model, splits, tmp_path):
    record = evaluate(change_run(model, tmp_path, train_data_dir=splits, dataset_split="train+test"), tmp_path)
    assert "was trained on all images" in record["memorisation"]
    part = evaluate(model, tmp_path / "part", "--dataset_split", "train[:90%]")
    assert "equally close to training images. Were they trained on?" in part["memorisation"]


def test_training_images_that_are_gone_are_reported(model, splits, tmp_path):
    moved = change_run(model, tmp_path, train_data_dir=str(tmp_path / "gone"))
    record = evaluate(moved, tmp_path, "--train_data_dir", splits)
    assert "the training images cannot be read. --train_data_dir" in record["memorisation"]
    assert "training_images" not in record
    assert not (tmp_path / "out" / "nearest.png").exists()
    assert "| training images |" not in (tmp_path / "out" / "classes.md").read_text()


def test_mirrored_training_images_are_searched_after_random_flips(model, splits, tmp_path, monkeypatch):
    seen = []
    find_nearest = training_images.find_nearest
    monkeypatch.setattr(training_images, "find_nearest", lambda *args: seen.append(args[3]) or find_nearest(*args))
    evaluate(change_run(model, tmp_path, train_data_dir=splits, random_flip=True), tmp_path)
    assert seen == [True] * 3  # two w and the held-out images


def test_polynomial_mmd_is_that_of_torchmetrics_and_has_no_bias():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    assert polynomial_mmd(real, fake) == pytest.approx(poly_mmd(real, fake).item(), rel=1e-9)
    assert polynomial_mmd(real, fake + 1) > 10 * abs(polynomial_mmd(real, fake))
    small = [
        polynomial_mmd(*(torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (20, 3)))
        for _ in range(2000)
    ]
    mean, error = np.mean(small), np.std(small) / 2000**0.5
    assert abs(mean) < 4 * error
    assert abs(polynomial_mmd(real, fake + 1)) > 10 * error


def test_class_table_sorts_by_training_images_and_leaves_out_what_is_unknown():
    def row(w: float, **by_class: Any) -> dict[str, Any]:
        return {"guidance_scale": w, "accuracy_by_class": {"a": 0.5, "b": 0.25}, "by_class": by_class}

    small = {"num_images": 1}
    large = {"num_images": 1200, "kernel_distance": 0.5, "kernel_distance_error": 0.1}
    record = {
        "results": [row(0, a=small, b=small), row(1, a=small, b=large)],
        "floor": {"by_class": {"a": small, "b": {"num_images": 30, "kernel_distance": -0.01}}},
        "best": {"frechet_distance": 1},
        "training_images": {"a": 26, "b": 1318},
        "num_samples": 1201,
        "class_labels": "data",
        "feature_extractor": {"name": "small-0"},
    }
    header, _, b, a = class_table(record).splitlines()[:4]
    assert header == "| class | training images | samples | accuracy | kernel distance | real |"
    assert b == "| b | 1,318 | 1,200 | 0.250 | 0.5000 ± 0.1960 | -0.0100 |"
    assert a == "| a | 26 | 1 | 0.500 |  |  |"


def test_classes_of_the_report_are_measured(model, tmp_path):
    record = evaluate(model, tmp_path)
    for row in (*record["results"], record["floor"]):
        assert set(row["by_class"]) == set(NAMES)
    assert sum(row["num_images"] for row in record["results"][0]["by_class"].values()) == 20
    assert record["results"][0]["by_class"]["a"]["kernel_distance"] > 0
    table = (tmp_path / "out" / "classes.md").read_text()
    assert table.count("\n| ") == 4
    assert "| a | 120 | 7 |" in table


def test_class_grid_pads_rare_classes_and_names_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_CLASSES", 2)
    samples = SampleSet(tmp_path, 13)
    labels = np.array([0] * 12 + [1])
    samples.save(range(13), Shard(np.zeros((13, 64, 64, 3), np.uint8), labels, 1.0))
    notes = []
    make_grid = pictures.make_grid
    monkeypatch.setattr(pictures, "make_grid", lambda *args, note: notes.append(note) or make_grid(*args, note=note))
    grid = np.asarray(pictures.class_grid(samples, [0, 1, 2], NAMES, 0.5))
    assert notes == ["w = 0.5; 1 of 3 classes are not shown"]
    black = (grid == 0).all(-1)
    assert black[30:80].any(0).sum() >= 640  # ten samples of the first class
    assert 64 <= black[110:140].any(0).sum() < 128  # one of the second
