"""Test the sweep over w: outputs, resuming, rejected settings, and the real data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import Dinov2Model, ViTConfig, ViTForImageClassification

from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import features, reports, sample_sets, sampling
from diffusers_cfg.evaluation.class_labels import choose_class_labels
from diffusers_cfg.evaluation.reports import metric_names, sweep_cells, sweep_curves, sweep_table
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.evaluation.sweep import output_folder, run_sweep
from tests.support.extractors import DINOV2, VIT, save_extractor
from tests.support.images import save_images
from tests.support.models import make_pipeline, make_unet


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_sets, "SHARD_SIZE", 8)
        yield


def make_model(folder: Path, **settings) -> Path:
    """Save a model whose record names the digits as training data."""
    pipeline = make_pipeline(make_unet(num_class_embeds=11, **settings), id2label=Digits().id2label)
    pipeline.save_pretrained(folder)
    (folder / "run.json").write_text('{"data": {"dataset_name": null}}')
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def abc(tmp_path_factory) -> tuple[Path, str]:
    """Return a model of the classes a, b and c, and a folder of images of these classes."""
    folder = tmp_path_factory.mktemp("abc")
    make_pipeline(id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(folder / "model")
    return folder / "model", save_images(folder / "gray", ["a", "b", "c"])


def config_of(model: Path | str, output_dir: Path, statistics_dir: Path, *argv: str) -> EvaluationConfig:
    flags = ["--model", str(model), "--num_samples", "20", "--num_inference_steps", "2", "--guidance_scales", "0", "1"]
    folders = ["--output_dir", str(output_dir), "--statistics_dir", str(statistics_dir)]
    return parse_config(EvaluationConfig, [*flags, *folders, *argv])


@pytest.fixture(scope="module")
def evaluate(statistics_dir) -> Callable[..., list[dict]]:
    """Return a function that runs a sweep without its slow figure and returns the rows."""

    def evaluate(model: Path | str, output_dir: Path, *argv: str) -> list[dict]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reports, "plot_curves", lambda *_: None)
            return run_sweep(config_of(model, output_dir, statistics_dir, *argv), Accelerator(cpu=True))["results"]

    return evaluate


@pytest.fixture(scope="module")
def one_sweep(model, evaluate, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "out"
    evaluate(model, folder)
    return folder


@pytest.fixture
def swept(one_sweep, tmp_path) -> Path:
    """Return a copy of the output folder of a completed sweep."""
    return Path(shutil.copytree(one_sweep, tmp_path / "swept"))


def shards(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): np.load(path)["arr_0"].tobytes() for path in sorted(folder.rglob("shard-*.npz"))
    }


def test_sweep_writes_its_report(trained_model, tmp_path, statistics_dir):
    """The data comes from the settings of the trained model."""
    out = tmp_path / "out"
    config = config_of(trained_model, out, statistics_dir, "--guidance_scales", "0", "1", "2.5")
    record = run_sweep(config, Accelerator(cpu=True))
    rows = record["results"]
    assert [row["guidance_scale"] for row in rows] == [0, 1, 2.5]
    assert [row["network_evaluations"] for row in rows] == [2, 4, 4]
    assert sorted(path.name for path in out.iterdir()) == [
        *("classes.md", "classes.png", "curves.png", "grid.png", "metrics.json", "metrics.md", "nearest.png", "samples")
    ]
    assert json.loads((out / "metrics.json").read_text()) == record
    assert (record["num_samples"], record["num_real"], record["num_neighbours"]) == (20, 1797, 20)
    assert record["best"]["frechet_distance"] == min(rows, key=lambda row: row["frechet_distance"])["guidance_scale"]
    assert record["best"]["recall"] == max(rows, key=lambda row: row["recall"])["guidance_scale"]
    assert record["dataset"] == "scikit-learn's digits"
    table = (out / "metrics.md").read_text()
    assert table == sweep_table(record)
    assert table.count("\n| ") == 5  # rows below the header
    for fact in (
        "20 samples for each w (balanced labels, seed 0), 2 steps of DPMSolverMultistepScheduler",
        "resize: none",
        "1797 real",
    ):
        assert fact in table
    assert str(tmp_path) not in (out / "metrics.json").read_text()
    grid = Image.open(out / "grid.png")
    assert grid.width > 8 * 64
    assert 3 * 64 < grid.height < 4 * 64


def test_shards_match_the_format_of_adm(swept):
    with np.load(swept / "samples" / "w=1" / "shard-00002.npz") as file:
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((4, 8, 8, 3), np.uint8)
        assert file["arr_1"].tolist() == [6, 7, 8, 9]


def test_interrupted_sweep_resumes(model, swept, evaluate, monkeypatch):
    before, images = json.loads((swept / "metrics.json").read_text())["results"], shards(swept)
    missing, damaged = (swept / "samples" / "w=1" / f"shard-0000{i}.npz" for i in (0, 1))
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-200])
    drawn = []
    draw_images = sampling.draw_images

    def recording(pipeline, class_labels, indices, *args, **call):
        drawn.extend(indices)
        return draw_images(pipeline, class_labels, indices, *args, **call)

    monkeypatch.setattr(sampling, "draw_images", recording)
    assert evaluate(model, swept) == before
    assert drawn == list(range(16))
    assert shards(swept) == images
    # With more samples the existing shards are reused, except for the last one, which was not full.
    drawn.clear()
    evaluate(model, swept, "--num_samples", "24")
    assert drawn == [*range(16, 24)] * 2
    more = shards(swept)
    assert all(more[name].startswith(data) for name, data in images.items())


@pytest.mark.parametrize(
    ("argv", "change"),
    [
        (["--seed", "1"], "seed 0, now 1"),
        (["--num_inference_steps", "3"], "num_inference_steps 2, now 3"),
        (["--scheduler", "DDIMScheduler"], "scheduler 'LogSNRScheduler', now 'DDIMScheduler'"),
        (["--class_labels", "random"], "class_labels 'balanced', now 'random'"),
        (["--guidance_interval", "1e-6", "9"], r"guidance_interval None, now \[1e-06, 9.0\]"),
    ],
)
def test_samples_with_different_settings_are_not_mixed(model, swept, evaluate, argv, change):
    with pytest.raises(UserError, match=f"samples holds results with different settings \\({change}\\)"):
        evaluate(model, swept, *argv)


def test_images_do_not_depend_on_the_batch_size(model, swept, tmp_path, evaluate):
    """A few pixels may differ by one level of 255, because sums depend on the batch size."""
    evaluate(model, tmp_path / "two", "--batch_size", "3")
    one, two = (np.frombuffer(b"".join(shards(d).values()), np.uint8) for d in (swept, tmp_path / "two"))
    difference = np.abs(one.astype(int) - two.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_noise_and_class_do_not_depend_on_w(model, tmp_path, evaluate):
    """The noise and the class of an image depend on its index, but not on w."""
    evaluate(model, tmp_path / "out", "--guidance_scales", "0", "1e-6")
    images = shards(tmp_path / "out" / "samples")
    a, b = (np.frombuffer(images[f"w={w}/shard-00000.npz"], np.uint8).astype(int) for w in ("0", "1e-06"))
    assert np.abs(a - b).max() <= 1


def test_scales_that_print_alike_do_not_share_samples(model, tmp_path, evaluate):
    rows = evaluate(model, tmp_path / "out", "--guidance_scales", "0.1234567", "0.1234568", "0.1", "100000")
    folders = {path.name for path in (tmp_path / "out" / "samples").iterdir() if path.is_dir()}
    assert folders == {"w=0.1234567", "w=0.1234568", "w=0.1", "w=100000"}
    assert [row["guidance_scale"] for row in rows] == [0.1234567, 0.1234568, 0.1, 100000]
    assert "| 0.1234567 | " in (tmp_path / "out" / "metrics.md").read_text()


def test_full_disk_keeps_the_samples(model, swept, evaluate, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = shards(swept)
    (swept / "samples" / "w=1" / "shard-00002.npz").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", lambda *_, **__: full())
        with pytest.raises(UserError, match="No space left on device. The results so far are kept in .*samples. R"):
            evaluate(model, swept)
    assert len(shards(swept)) == 5
    evaluate(model, swept)
    assert shards(swept) == before


def labels_of(
    how: Literal["balanced", "random", "data"], data_labels: torch.Tensor, num_classes: int, num_samples: int
) -> torch.Tensor:
    config = EvaluationConfig(model="m", class_labels=how, num_samples=num_samples)
    return choose_class_labels(config, data_labels)


@pytest.mark.parametrize("how", ["random", "data"])
def test_random_labels_do_not_depend_on_the_number_of_samples(digits, how):
    drawn = labels_of(how, digits.class_labels, 10, 40).tolist()
    assert len(drawn) == 40
    assert drawn != [i % 10 for i in range(40)]
    assert 5 < len(set(drawn)) <= 10
    assert labels_of(how, digits.class_labels, 10, 50).tolist()[:40] == drawn


def test_data_labels_have_the_proportions_of_the_data():
    chosen = labels_of("data", torch.tensor([0] * 9 + [1, -1, -1]), 2, 2000)
    assert chosen.double().mean().item() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guidance_scales", "nan"], r"guidance_scales must be finite, but is \[nan\]"),
        (["--num_samples", "0"], r"num_samples must lie in \[20, 100000000\], but is 0"),
        (["--batch_size", "-1"], "batch_size must be at least 1, but is -1"),
        (["--model", "/nowhere/at/all"], "--model /nowhere/at/all cannot be loaded"),
        (["--scheduler", "Nonsense"], "--scheduler Nonsense is not supported.*UniPCMultistepScheduler"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "is not supported"),
        (["--guider", "Nonsense"], "--guider Nonsense is not a guider of diffusers"),
        (["--guidance_rescale", "2"], r"guidance_rescale must lie in \[0, 1\]"),
        (["--train_data_dir", "/nowhere"], "--train_data_dir /nowhere is not a folder"),
        (["--scheduler", "DDIMScheduler", "--num_inference_steps", "3"], "DDIMScheduler cannot take 3 steps"),
        (["--guidance_scales", "1", "0", "1.0"], r"guidance_scales must not repeat a value, but is \[1.0, 0.0, 1.0\]"),
        (["--guider", "ClassifierFreeGuidance", "--guidance_rescale", "0.5"], "--guidance_rescale cannot be combined"),
        (["--statistics_dir", "/dev/null"], "--statistics_dir /dev/null cannot be a folder, because /dev/null is not"),
        (["--statistics_dir", "/proc/x"], "--statistics_dir '/proc/x' cannot be written"),
        (["--statistics_dir", "x" * 300], "--statistics_dir 'x+' cannot be written: .*File name too long"),
        (["--statistics_dir", ""], "statistics_dir must not be empty"),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x cannot be a folder, because /dev/null is not"),
        (["--output_dir", "a\0b"], r"--output_dir 'a\\x00b' cannot be written"),
        (["--output_dir", "MODEL"], "--output_dir .*model has files that no evaluation wrote"),
        (["--output_dir", "MODEL/unet"], "--output_dir .*unet has files that no evaluation wrote"),
        (["--output_dir", "DATA/out", "--train_data_dir", "DATA"], "--output_dir .*out lies in the data folder"),
        (["--feature_extractor", ""], "feature_extractor must not be empty"),
    ],
)
def test_invalid_settings_raise_before_real_images_are_read(model, tmp_path, evaluate, monkeypatch, argv, message):
    def never(*_):
        raise AssertionError("the real images were read")

    monkeypatch.setattr(features, "small_classifier", never)
    (tmp_path / "data").mkdir()
    argv = [argument.replace("MODEL", str(model)).replace("DATA", str(tmp_path / "data")) for argument in argv]
    with pytest.raises(UserError, match=message):
        evaluate(model, tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_network_evaluations_are_counted(model, tmp_path):
    def counted(*argv: str) -> list[float]:
        config = config_of(model, tmp_path / "out", tmp_path, *argv)
        pipeline = sampling.load_pipeline(config, "cpu")
        calls = [sampling.call_arguments(config, w) for w in sampling.guidance_scales(config, pipeline)]
        costs = [sampling.draw_images(pipeline, torch.arange(3), [0, 1, 2], 0, **call)[1] for call in calls]
        return [cost.network_evaluations for cost in costs]

    assert counted("--scheduler", "HeunDiscreteScheduler", "--num_inference_steps", "3") == [5, 10]
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(8)
    sigma = (-scheduler.log_snr(scheduler.u(scheduler.timesteps)) / 2).exp()
    inside = int(((sigma > 0.05) & (sigma <= 20)).sum())
    assert 0 < inside < 8
    paper = ["--scheduler", "LogSNRScheduler", "--num_inference_steps", "8"]
    assert counted(*paper, "--guidance_interval", "0.05", "20") == [8, 8 + inside]
    assert counted("--guider", "ClassifierFreeGuidance") == [2, 4]
    assert counted("--guide_model", str(model)) == [2, 4]


def test_model_without_a_null_class_is_evaluated_at_w_0_only(tmp_path, evaluate):
    model = make_model(tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "conditioning_dropout_prob": 0.0}))
    with pytest.raises(
        UserError, match=r"--guidance_scales \[1.0\].*conditioning_dropout_prob = 0.*Evaluate it at w = 0"
    ):
        evaluate(model, tmp_path / "out")
    assert len(evaluate(model, tmp_path / "out", "--guidance_scales", "0")) == 1


@pytest.mark.parametrize("knows_the_classes", [True, False])
def test_class_accuracy_requires_a_classifier_with_the_datas_classes(abc, tmp_path, evaluate, knows_the_classes):
    names = ["c", "b", "a"] if knows_the_classes else ["x", "y", "z"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    extractor = save_extractor(ViTForImageClassification(ViTConfig(**{**VIT.to_dict(), **labels})), tmp_path / "vit")
    flags = ["--train_data_dir", abc[1], "--feature_extractor", extractor, "--guidance_scales", "0"]
    (row,) = evaluate(abc[0], tmp_path / "out", *flags)
    assert ("class_accuracy" in row) == knows_the_classes
    assert 1 <= row["inception_score"] <= len(names)
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert "16 features; resize: by its ViTImageProcessor" in table
    assert ("class accuracy" in table) == knows_the_classes


def test_extractor_without_classes_gives_no_class_metrics(abc, tmp_path, evaluate, monkeypatch):
    monkeypatch.setattr(features, "DINOV2_MODEL", save_extractor(Dinov2Model(DINOV2), tmp_path / "dinov2"))
    flags = ["--train_data_dir", abc[1], "--feature_extractor", "dinov2", "--guidance_scales", "0"]
    (row,) = evaluate(abc[0], tmp_path / "out", *flags)
    assert {"inception_score", "class_accuracy"} & row.keys() == set()
    reports.plot_curves(json.loads((tmp_path / "out" / "metrics.json").read_text()), tmp_path / "curves.png")


def test_only_inception_metrics_are_called_fid_kid_and_is():
    assert list(metric_names("inception").values())[:3] == ["FID", "KID", "IS"]
    assert not {"FID", "KID", "IS"} & set(metric_names("small").values())


def test_rgb_model_is_evaluated_on_its_grayscale_data(tmp_path, evaluate):
    """The data is loaded with the model's number of channels."""
    model = make_model(tmp_path / "model", in_channels=3, out_channels=3)
    (row,) = evaluate(model, tmp_path / "out", "--guidance_scales", "1")
    assert 0 <= row["class_accuracy"] <= 1


def test_cells_and_curves_have_the_numbers_of_the_table(one_sweep):
    record = json.loads((one_sweep / "metrics.json").read_text())
    columns, rows = sweep_cells(record)
    assert [row[0] for row in rows] == ["0", "1", "real"]
    cells = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    measured = [*record["results"], record["floor"]]
    assert cells["Fréchet distance"] == [row["frechet_distance"] for row in measured]
    assert cells["kernel distance, standard error"] == [row["kernel_distance_error"] for row in measured]
    assert cells["evaluations"] == [2, 4, None]
    assert "gradients" not in columns
    record["results"].reverse()
    curves = sweep_curves(record, "a/")
    assert [point["a/w"] for point in curves] == [0, 1]
    assert [point["a/frechet_distance"] for point in curves] == cells["Fréchet distance"][:2]
    assert not {"a/gradients", "a/guidance_scale", "a/accuracy_by_class"} & curves[0].keys()
    # Reference statistics have no row of real images
    assert [row[0] for row in sweep_cells({**record, "floor": {}})[1]] == ["1", "0"]


def test_output_folder_defaults_to_the_models_folder(abc):
    assert output_folder(EvaluationConfig(model=str(abc[0]))) == abc[0] / "evaluation"
    assert output_folder(EvaluationConfig(model=str(abc[0]), output_dir="out")) == Path("out")
    assert output_folder(EvaluationConfig(model="me/model")) == Path("evaluation")


def test_different_data_must_match_the_model(abc, tmp_path, evaluate):
    abc, gray = abc
    (row,) = evaluate(abc, tmp_path / "out", "--train_data_dir", gray, "--guidance_scales", "1")
    assert 0 <= row["class_accuracy"] <= 1
    for data, message in {
        save_images(tmp_path / "two", ["one", "zero"]): r"2 classes \(one, zero\), but .* has 3 \(a, b, c\)",
        save_images(tmp_path / "other", ["a", "b", "d"]): r"3 classes \(a, b, d\), but .* has 3 \(a, b, c\)",
        save_images(
            tmp_path / "rgb", ["a", "b", "c"], "RGB"
        ): "The data has RGB images, but .* generates grayscale images",
        save_images(tmp_path / "tiny", ["a", "b", "c"], size=4): "images of 4×4, but .* generates 8×8",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluate(abc, tmp_path / "refused", "--train_data_dir", data)
    assert not (tmp_path / "refused").exists()


def test_unknown_training_data_raises(tmp_path, evaluate):
    """A published model has no train_config.yaml, and its run.json names only public data."""
    model = make_model(tmp_path / "model")
    for record in ("{}", None):
        (model / "run.json").unlink() if record is None else (model / "run.json").write_text(record)
        with pytest.raises(UserError, match="The training data of .* is unknown or not public. Pass"):
            evaluate(model, tmp_path / "out")


def test_non_finite_images_raise_with_their_indices(tmp_path, evaluate):
    unet = make_unet(num_class_embeds=11)
    unet.get_parameter("class_embedding.weight").data[3] = torch.nan
    make_pipeline(unet, id2label=Digits().id2label).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "run.json").write_text('{"data": {}}')
    with pytest.raises(UserError, match=r"^1 of 8 images are not finite \(indices \[3\]\)"):
        evaluate(tmp_path / "model", tmp_path / "out", "--guidance_scales", "0")
    assert list((tmp_path / "out").rglob("shard-*")) == []
