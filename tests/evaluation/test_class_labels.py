"""Test the choice of classes: classes without images are neither drawn, measured, recommended nor used as labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_cfg.config import parse_config
from diffusers_cfg.data.datasets import CachedImages
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.method import Batch
from diffusers_cfg.evaluation import in_training
from diffusers_cfg.evaluation.class_labels import balanced_class_labels, choose_class_labels, parse_class_labels
from diffusers_cfg.evaluation.grids import make_grid, sample_grid
from diffusers_cfg.evaluation.in_training import training_evaluation
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.cfg import ClassifierFreeGuidance
from diffusers_cfg.randomness import Draws
from tests.support.models import make_pipeline, make_unet
from tests.support.runs import train

PRESENT = [1, 4, 7]


def few_classes(images: Digits) -> None:
    """Leave out the images of all classes but `PRESENT`."""
    kept = np.isin(images.class_labels, PRESENT)
    images.images, images.class_labels = images.images[kept], images.class_labels[kept]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, str]:
    """Return the folder of a model that was trained on three of ten classes, and what its training printed."""
    folder, init = tmp_path_factory.mktemp("few") / "model", Digits.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "__init__", lambda self: (init(self), few_classes(self))[0])
        printed = []
        patch.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(map(str, args))))
        train(folder, "--num_inference_steps", "1")
    return folder, "\n".join(printed)


def test_trained_model_knows_which_classes_have_images(model):
    folder, printed = model
    facts = json.loads((folder / "run.json").read_text())["method"]
    assert facts["classes_without_images"] == [0, 2, 3, 5, 6, 8, 9]
    assert 'pipe(class_labels="one", guidance_scale=0.5).images[0].save("one.png")' in printed


def test_model_with_all_classes_records_no_missing_ones(trained_model):
    assert "classes_without_images" not in json.loads((trained_model / "run.json").read_text())["method"]


@pytest.mark.parametrize(
    ("record", "names", "expected"),
    [
        (None, None, [0, 1, 2]),
        ('{"method": {"classes_without_images": [0, 2]}}', None, [1]),
        ('{"method": {"classes_without_images": [0, 2]}}', ["zero", "1"], [0, 1]),  # as requested, with a warning
        ('{"method": {}}', None, [0, 1, 2]),
        ('{"method": 3}', None, [0, 1, 2]),
        ('{"method": {"classes_without_images": 3}}', None, [0, 1, 2]),
        ("[1]", None, [0, 1, 2]),
        ("{", None, [0, 1, 2]),
        ("", ["two", "two", "-1"], [2, 2, -1]),
    ],
)
def test_sampled_classes_default_to_those_with_images(tmp_path, caplog, record, names, expected):
    pipeline = make_pipeline()
    pipeline.register_to_config(_name_or_path=str(tmp_path))
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    assert parse_class_labels(names, pipeline) == expected
    assert ("had no images of these classes: zero" in caplog.text) == (names == ["zero", "1"])


@pytest.mark.parametrize("how", ["balanced", "random", "data"])
def test_evaluation_draws_only_classes_with_images(how):
    data_labels = torch.tensor([4, 4, 1, 7, 7, 7, -1])
    drawn = choose_class_labels(EvaluationConfig(model="m", class_labels=how, num_samples=60), data_labels).tolist()
    assert set(drawn) == set(PRESENT)
    assert (drawn == PRESENT * 20) == (how == "balanced")


@pytest.mark.parametrize(("num_samples", "warns"), [(2, True), (3, False), (4, False)])
def test_fewer_samples_than_classes_are_warned_of(caplog, num_samples, warns):
    assert balanced_class_labels(torch.tensor(PRESENT), num_samples).tolist() == [1, 4, 7, 1][:num_samples]
    assert ("Only the first 2 of 3 classes are drawn" in caplog.text) == warns


def test_grid_has_a_row_for_each_class_with_images(monkeypatch):
    captions = {}
    monkeypatch.setattr("diffusers_cfg.evaluation.grids.make_grid", lambda images, **names: captions.update(names))
    sample_grid(make_pipeline(), Accelerator(cpu=True), [2, 0], [0.0, 0.1234567, 0.1234568], 1, 0)
    columns = ["w = 0", "w = 0.1234567", "w = 0.1234568"]
    assert captions == {"rows": ["two", "zero"], "columns": columns, "note": None}


def test_grid_says_how_many_classes_it_leaves_out(monkeypatch):
    captions = {}
    pipeline = make_pipeline(make_unet(num_class_embeds=26), id2label=None)
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_cfg.evaluation.grids.make_grid", lambda images, **names: captions.update(names))
        sample_grid(pipeline, Accelerator(cpu=True), list(range(25)), [0.0], 1, 0)
    assert captions["rows"] == [str(class_id) for class_id in range(20)]
    assert captions["note"] == "5 of 25 classes are not shown"

    images = torch.zeros(1, 1, 1, 8, 8)
    without, with_note = (np.asarray(make_grid(images, ["0"], ["w"], note=note)) for note in (None, captions["note"]))
    height, width, _ = without.shape
    assert (with_note[:height, :width] == without).all()
    assert (with_note[height:] != 255).any()


def test_evaluation_during_training_draws_only_classes_with_images(digits, statistics_dir, monkeypatch):
    monkeypatch.setattr(in_training, "CACHE_DIR", statistics_dir)
    drawn = []

    def draw_images(_pipeline, labels, indices, *_, **__):
        drawn.extend(labels.tolist())
        return torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8), 1.0

    monkeypatch.setattr(in_training, "draw_images", draw_images)
    kept = torch.isin(digits.class_labels, torch.tensor(PRESENT))
    method = ClassifierFreeGuidance(
        parse_config(
            CFGConfig,
            ["--eval_steps", "1", "--num_eval_samples", "21", "--validation_guidance_scales", "0.1234567", "0.1234568"],
        ),
        make_pipeline(make_unet(num_class_embeds=11), id2label=Digits().id2label),
    )
    dataset = CachedImages(digits.images[kept], digits.class_labels[kept])
    metrics = training_evaluation(method, method.config, Accelerator(cpu=True), dataset)(method.pipeline)
    assert drawn == PRESENT * 7 * 2
    assert {name.partition("/")[2] for name in metrics} == {"w=0.1234567", "w=0.1234568"}


@pytest.mark.parametrize("present", [None, PRESENT, [0, 9]])
def test_wrong_labels_of_the_probe_are_other_classes_with_images(present):
    pipeline = make_pipeline(make_unet(num_class_embeds=11), id2label=Digits().id2label)
    method = ClassifierFreeGuidance(parse_config(CFGConfig, []), pipeline, present)
    present, seen = present or list(range(10)), []
    method.denoising_error = lambda _unet, x, c, *_: (seen.append(c), torch.arange(len(x)).float())[1]
    labels = torch.tensor(present).repeat(40)
    draws = Draws(0, -1, range(len(labels)), len(labels))
    method.probe([Batch(torch.zeros(len(labels), 1, 8, 8), labels, draws, -1)])
    wrong, right = seen
    assert torch.equal(right, labels)
    assert (wrong != labels).all()
    assert set(wrong.tolist()) == set(present)
