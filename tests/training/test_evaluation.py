"""Evaluation: what is summed up, kept for the next time and refused; the sweep over w by its command line."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import evaluation
import feature_extractors
import numpy as np
import pytest
import sample
import torch
from ablate_dropout import ablate_dropout
from ablate_dropout import parse_args as parse_ablation_args
from accelerate import Accelerator
from config import TrainConfig, UserError
from tests.support.models import make_pipeline, make_unet
from data import CachedImages, Digits, stack_images
from evaluate_cfg import evaluate_cfg, parse_args
from evaluation import Evaluation, Summary, stratified_order
from PIL import Image
from report import metric_names
from test_feature_extractors import VIT, save
from test_train import TINY, TRAINING, train
from test_train import assert_same_tensors as assert_same_weights
from torch.utils.data import Dataset
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from diffusers_cfg import LogSNRScheduler

DIGIT_NAMES = {i: str(i) for i in range(10)}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A classifier of a few steps, kept in the test's own folder, and shards of eight images."""
    monkeypatch.setattr(feature_extractors.train_classifier, "__defaults__", (30, 64))
    monkeypatch.setattr(sample, "SHARD_SIZE", 8)
    monkeypatch.setattr(evaluation, "STATISTICS_DIR", tmp_path / "statistics")


@pytest.fixture(scope="module")
def digits() -> CachedImages:
    return stack_images(Digits(), TrainConfig(resolution=8), 1, show_progress=False)


def evaluation_of(
    dataset: Dataset, folder: Path, num_samples: int = 200, id2label=DIGIT_NAMES, **settings
) -> Evaluation:
    return Evaluation(Accelerator(cpu=True), dataset, id2label, "small", num_samples, folder, **settings)


# ----- sums -----


def features_of(n: int, d: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, logits = torch.randn(n, d, generator=generator), torch.randn(n, classes, generator=generator)
    return features, logits, torch.arange(n) % classes


def summary_of(order: torch.Tensor, batch_size: int) -> Summary:
    features, logits, labels = features_of(100)
    summary = Summary(100, 6, 3)
    for rows in order.split(batch_size):
        summary.add(rows, features[rows], logits[rows], labels[rows])
    return summary


def test_a_summary_does_not_depend_on_order_and_batches():
    one, two = summary_of(torch.arange(100), 100), summary_of(torch.arange(100).flip(0), 7)
    for name in one.sums:
        torch.testing.assert_close(one.sums[name], two.sums[name], rtol=1e-12, atol=1e-12)
    assert torch.equal(one.features, two.features)
    features, logits, labels = features_of(100)
    mean, covariance = one.moments()
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(covariance, features.double().T.cov())
    torch.testing.assert_close(one.moments(torch.arange(10) != 0)[1], features[10:].double().T.cov())
    right = (logits.argmax(1) == labels).double()
    torch.testing.assert_close(one.sums["right"].sum(), right.sum())
    assert one.sums["asked"].sum(0).tolist() == [34, 33, 33]


def test_what_a_summary_holds_does_not_grow(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEIGHBOURS", 20)
    features, logits, labels = features_of(1000)
    summary = Summary(1000, 6, 3)
    for rows in torch.arange(1000).split(100):
        summary.add(rows, features[rows], logits[rows], labels[rows])
    assert torch.equal(summary.features, features[:20])
    assert sum(value.numel() for value in summary.sums.values()) == 10 * (1 + 6 + 36 + 1 + 3 + 1 + 3 + 3)


def test_features_that_are_not_finite():
    features, logits, labels = features_of(100)
    features[3] = torch.nan
    features[5, 2] = torch.inf
    with pytest.raises(UserError, match="^2 images have features that are not finite"):
        Summary(100, 6, 3).add(torch.arange(100), features, logits, labels)


def test_every_beginning_of_the_order_has_the_classes_in_proportion():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels)
    assert order.sort().values.tolist() == list(range(100))
    for beginning in (10, 20, 50):
        counts = labels[order[:beginning]].bincount(minlength=3)
        assert (counts - torch.tensor([0.6, 0.3, 0.1]) * beginning).abs().max() < 1
    assert order[:60].tolist() != sorted(order[:60].tolist())


# ----- the real images -----


def test_real_images_are_as_good_as_real_images(digits, tmp_path):
    measured = evaluation_of(digits, tmp_path, num_samples=400)
    summary = measured.new_summary()
    chosen = stratified_order(digits.class_labels)[:400]
    batch = digits.__getitems__(chosen.tolist())
    measured.add(summary, torch.arange(400), batch.images_rgb, batch.class_labels)
    row = measured.measure(summary)
    assert (
        row["frechet_distance"] < measured.floor["frechet_distance"]
    )  # these 400 are among those it is measured against
    assert row["precision"] == pytest.approx(measured.floor["precision"], abs=1e-12)

    noise = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worse = measured.new_summary()
    measured.add(worse, torch.arange(400), noise, batch.class_labels)
    worse = measured.measure(worse)
    assert worse["frechet_distance"] > 10 * row["frechet_distance"]
    assert worse["kernel_distance"] > row["kernel_distance"]
    assert worse["coverage"] < 0.1 * row["coverage"]
    assert worse["class_accuracy"] < 0.2
    assert row["class_accuracy"] > 0.5
    assert set(row["accuracy_by_class"]) == set(DIGIT_NAMES.values())
    assert row["class_accuracy"] == pytest.approx(np.mean(list(row["accuracy_by_class"].values())), abs=0.02)


def test_samples_are_measured_against_all_real_images(digits, tmp_path):
    measured = evaluation_of(digits, tmp_path, num_samples=400)
    features, _ = measured.extractor(digits.images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(measured.reference[0], features.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(measured.reference[1], features.double().T.cov(), rtol=1e-5, atol=1e-6)


def test_classes_that_are_missing_cost_recall_and_not_precision(digits, tmp_path):
    measured = evaluation_of(digits, tmp_path, num_samples=400)
    few, summary = (digits.class_labels < 5).nonzero().flatten()[:400], measured.new_summary()
    batch = digits.__getitems__(few.tolist())
    measured.add(summary, torch.arange(400), batch.images_rgb, batch.class_labels)
    row = measured.measure(summary)
    assert row["precision"] > measured.floor["precision"] - 0.05
    assert row["recall"] < 0.7 * measured.floor["recall"]
    assert row["coverage"] < 0.7 * measured.floor["coverage"]


def test_the_statistics_are_kept(digits, tmp_path, monkeypatch):
    first = evaluation_of(digits, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 2

    def again(*_):
        raise AssertionError("summed up again")

    monkeypatch.setattr(Evaluation, "_sum_up", again)
    monkeypatch.setattr(feature_extractors, "train_classifier", again)
    second = evaluation_of(digits, tmp_path)
    assert second.floor == first.floor
    assert torch.equal(second.reference[1], first.reference[1])
    assert torch.equal(second.neighbours, first.neighbours)
    with pytest.raises(AssertionError, match="summed up again"):
        evaluation_of(digits, tmp_path, num_samples=300)  # another floor


def test_statistics_of_other_data_are_refused(digits, tmp_path):
    evaluation_of(digits, tmp_path)
    (mine,) = tmp_path.glob("statistics-*")
    other = CachedImages(digits.images.flip(-1), digits.class_labels)
    evaluation_of(other, tmp_path)
    (theirs,) = set(tmp_path.glob("statistics-*")) - {mine}
    mine.replace(theirs)
    with pytest.raises(UserError, match=f"{theirs.name} holds the statistics of something else"):
        evaluation_of(other, tmp_path)


def test_images_without_a_label_are_left_out(digits, tmp_path):
    labels = digits.class_labels.clone()
    labels[::2] = -1
    assert evaluation_of(CachedImages(digits.images, labels), tmp_path).num_real == len(labels[1::2])


def test_too_few_images(digits, tmp_path, caplog):
    with pytest.raises(UserError, match="19 samples are too few to be measured: at least 20 are needed"):
        evaluation_of(digits, tmp_path, num_samples=19)
    with pytest.raises(UserError, match="39 labelled images are too few"):
        evaluation_of(CachedImages(digits.images[:39], digits.class_labels[:39]), tmp_path)
    evaluation_of(digits, tmp_path, num_samples=64)
    assert "64 samples are no more than the 64 features of small-" in caplog.text
    caplog.clear()
    evaluation_of(digits, tmp_path, num_samples=65)
    assert "full rank" not in caplog.text


# ----- the command -----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "out"
    train(folder, "--conditioning_dropout_prob", "0.2")
    return folder


def evaluate(model: Path | str, output_dir: Path, *argv: str) -> list[dict]:
    flags = ["--model", str(model), "--num_samples", "20", "--num_inference_steps", "2", "--guidance_scales", "0", "1"]
    folders = ["--output_dir", str(output_dir), "--statistics_dir", str(output_dir.parent / "statistics")]
    return evaluate_cfg(parse_args([*flags, *folders, *argv]))


def shards(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): np.load(path)["arr_0"].tobytes() for path in sorted(folder.rglob("shard-*.npz"))
    }


def test_a_sweep(model, tmp_path, capsys):
    rows = evaluate(model, tmp_path / "out", "--guidance_scales", "0", "1", "2.5")
    assert [row["guidance_scale"] for row in rows] == [0, 1, 2.5]
    assert [row["network_evaluations"] for row in rows] == [2, 4, 4]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.png", "grid.png", "metrics.json", "metrics.md", "samples",
    ]  # fmt: skip
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["results"] == rows
    assert (record["num_samples"], record["num_real"], record["num_neighbours"]) == (20, 1797, 20)
    assert record["best"]["frechet_distance"] == min(rows, key=lambda row: row["frechet_distance"])["guidance_scale"]
    assert record["best"]["recall"] == max(rows, key=lambda row: row["recall"])["guidance_scale"]
    assert record["dataset"] == "scikit-learn's digits"
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert table.count("\n| ") == 5  # under the header
    for fact in (
        "20 samples for each w (balanced labels, seed 0), 2 steps of DPMSolverMultistepScheduler",
        "resize: none",
        "1797 real",
    ):
        assert fact in table
    assert table in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "metrics.json").read_text()
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.width > 8 * 64
    assert 3 * 64 < grid.height < 4 * 64


def test_only_what_is_written_into_the_model_is_for_its_card(tmp_path):
    make_pipeline(make_unet(num_class_embeds=4), id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path / "abc")
    data = save_images(tmp_path / "data", ["a", "b", "c"])
    evaluate(tmp_path / "abc", tmp_path / "out", "--train_data_dir", data)
    assert not (tmp_path / "abc" / "evaluation").exists()
    flags = ["--num_samples", "20", "--num_inference_steps", "2", "--statistics_dir", str(tmp_path / "statistics")]
    evaluate_cfg(parse_args(["--model", str(tmp_path / "abc"), "--train_data_dir", data, *flags]))
    assert (tmp_path / "abc" / "evaluation" / "metrics.json").is_file()


def test_shards_are_as_adm_has_them(model, tmp_path):
    evaluate(model, tmp_path / "out")
    with np.load(tmp_path / "out" / "samples" / "w=1" / "shard-00002.npz") as file:
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((4, 8, 8, 3), np.uint8)
        assert file["arr_1"].tolist() == [6, 7, 8, 9]


def test_a_sweep_that_was_stopped_goes_on(model, tmp_path, monkeypatch):
    before = evaluate(model, tmp_path / "out")
    images = shards(tmp_path / "out")
    missing, damaged = (tmp_path / "out" / "samples" / "w=1" / f"shard-0000{i}.npz" for i in (0, 1))
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-200])
    drawn = []
    draw_images = sample.draw_images

    def watched(pipeline, class_labels, indices, *args, **call):
        drawn.extend(indices)
        return draw_images(pipeline, class_labels, indices, *args, **call)

    monkeypatch.setattr(sample, "draw_images", watched)
    assert evaluate(model, tmp_path / "out") == before
    assert drawn == list(range(16))
    assert shards(tmp_path / "out") == images
    # More of them: what is there is kept, but for the last shard, which was not full
    drawn.clear()
    evaluate(model, tmp_path / "out", "--num_samples", "24")
    assert drawn == [*range(16, 24)] * 2
    more = shards(tmp_path / "out")
    assert all(more[name].startswith(data) for name, data in images.items())


@pytest.mark.parametrize(
    ("argv", "change"),
    [
        (["--seed", "1"], "seed 0, now 1"),
        (["--num_inference_steps", "3"], "num_inference_steps 2, now 3"),
        (["--scheduler", "DDIMScheduler"], "scheduler 'DPMSolverMultistepScheduler', now 'DDIMScheduler'"),
        (["--class_labels", "random"], "class_labels 'balanced', now 'random'"),
        (["--guidance_interval", "0.1", "9"], r"guidance_interval None, now \[0.1, 9.0\]"),
    ],
)
def test_samples_that_were_drawn_otherwise_are_not_mixed(model, tmp_path, argv, change):
    evaluate(model, tmp_path / "out")
    with pytest.raises(UserError, match=f"samples holds samples that were drawn otherwise \\({change}\\)"):
        evaluate(model, tmp_path / "out", *argv)


def test_batches_of_any_size_give_the_same_images(model, tmp_path):
    """To one level of 255 at very few pixels: a batch of another size may be summed in another order."""
    evaluate(model, tmp_path / "one" / "out")
    evaluate(model, tmp_path / "two" / "out", "--batch_size", "3")
    one, two = (np.frombuffer(b"".join(shards(tmp_path / d / "out").values()), np.uint8) for d in ("one", "two"))
    difference = np.abs(one.astype(int) - two.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_the_same_noise_down_each_column(model, tmp_path):
    """The image at an index starts from the same noise and has the same class whatever w."""
    evaluate(model, tmp_path / "out", "--guidance_scales", "0", "1e-6")
    images = shards(tmp_path / "out" / "samples")
    a, b = (np.frombuffer(images[f"w={w}/shard-00000.npz"], np.uint8).astype(int) for w in ("0", "1e-06"))
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("sampling", ["random", "data"])
def test_labels_at_random(model, tmp_path, sampling):
    evaluate(model, tmp_path / "out", "--class_labels", sampling, "--guidance_scales", "0", "--num_samples", "40")
    drawn = np.concatenate([np.load(p)["arr_1"] for p in sorted((tmp_path / "out").rglob("shard-*.npz"))])
    assert len(drawn) == 40
    assert drawn.tolist() != [i % 10 for i in range(40)]
    assert 5 < len(set(drawn.tolist())) <= 10


def test_labels_as_often_as_in_the_data():
    from evaluate_cfg import choose_class_labels

    args = parse_args(["--model", "m", "--class_labels", "data", "--num_samples", "2000"])
    chosen = choose_class_labels(args, torch.tensor([0] * 9 + [1, -1, -1]), 2)
    assert chosen.double().mean().item() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guidance_scales", "nan"], r"--guidance_scales must be finite, but has \[nan\]"),
        (["--num_samples", "0"], "--num_samples must be at least 1, but is 0"),
        (["--batch_size", "-1"], "--batch_size must be at least 1, but is -1"),
        (["--model", "/nowhere/at/all"], "A model cannot be loaded"),
        (["--scheduler", "Nonsense"], "--scheduler Nonsense cannot sample this model.*UniPCMultistepScheduler"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "cannot sample this model"),
        (["--guider", "Nonsense"], "--guider Nonsense is none of diffusers' guiders"),
        (["--guidance_rescale", "2"], "guidance_rescale must be in"),
        (["--train_data_dir", "/nowhere"], "--train_data_dir /nowhere is not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_named(model, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, tmp_path / "out", *argv)


def test_evaluations_are_counted(model, tmp_path):
    def counted(*argv: str) -> list[float]:
        output_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        return [row["network_evaluations"] for row in evaluate(model, output_dir, *argv)]

    assert counted("--scheduler", "HeunDiscreteScheduler", "--num_inference_steps", "3") == [5, 10]
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(8)
    sigma = (-scheduler.log_snr(scheduler.u(scheduler.timesteps)) / 2).exp()
    inside = int(((sigma > 0.05) & (sigma <= 20)).sum())
    assert 0 < inside < 8
    paper = ["--scheduler", "LogSNRScheduler", "--num_inference_steps", "8"]
    assert counted(*paper, "--guidance_interval", "0.05", "20") == [8, 8 + inside]
    assert counted(*paper, "--guidance_tolerance", "1e9") == [8, 9]  # guidance ends after the first step
    assert counted("--guider", "ClassifierFreeGuidance") == [2, 4]
    assert counted("--guide_model", str(model)) == [2, 4]


def test_a_model_without_a_null_class(tmp_path):
    train(tmp_path / "model", "--conditioning_dropout_prob", "0", "--max_train_steps", "1")
    with pytest.raises(UserError, match=r"--guidance_scales \[1.0\].*conditioning_dropout_prob = 0.*Measure it at 0"):
        evaluate(tmp_path / "model", tmp_path / "out")
    assert len(evaluate(tmp_path / "model", tmp_path / "out", "--guidance_scales", "0")) == 1


@pytest.mark.parametrize("knows_the_classes", [True, False])
def test_features_of_another_classifier(model, tmp_path, knows_the_classes):
    names = list(Digits().id2label.values()) if knows_the_classes else ["a", "b", "c"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    vit = ViTConfig(**{**VIT.to_dict(), **labels})
    extractor = save(ViTForImageClassification(vit), tmp_path / "vit")
    (row,) = evaluate(model, tmp_path / "out", "--feature_extractor", extractor, "--guidance_scales", "0")
    assert ("class_accuracy" in row) == knows_the_classes
    assert 1 <= row["inception_score"] <= len(names)
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert "16 features; resize: as its ViTImageProcessor" in table
    assert ("class accuracy" in table) == knows_the_classes


def test_features_without_classes(model, tmp_path, monkeypatch):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    monkeypatch.setattr(feature_extractors, "DINOV2_MODEL", save(Dinov2Model(config), tmp_path / "dinov2"))
    (row,) = evaluate(model, tmp_path / "out", "--feature_extractor", "dinov2", "--guidance_scales", "0")
    assert {"inception_score", "class_accuracy"} & row.keys() == set()
    assert (tmp_path / "out" / "curves.png").is_file()


def test_only_inceptions_are_called_fid():
    assert list(metric_names("inception").values())[:3] == ["FID", "KID", "IS"]
    assert not {"FID", "KID", "IS"} & set(metric_names("small").values())


def test_a_colour_model_is_evaluated_on_its_own_grey_data(tmp_path):
    """The data is read as the model draws, not as it is stored."""
    make_pipeline(make_unet(in_channels=3, out_channels=3)).save_pretrained(tmp_path / "base")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base")]
    train(tmp_path / "model", *base, "--max_train_steps", "1")
    (row,) = evaluate(tmp_path / "model", tmp_path / "out", "--guidance_scales", "1")
    assert 0 <= row["class_accuracy"] <= 1


def save_images(folder: Path, names: list[str], mode: str = "L", size: int = 8, n: int = 20) -> str:
    values = np.random.default_rng(0).integers(0, 256, (len(names), n, size, size), np.uint8)
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for j in range(n):
            Image.fromarray(values[i, j]).convert(mode).save(folder / name / f"{j}.png")
    return str(folder)


def test_other_data(model, tmp_path):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    make_pipeline(make_unet(num_class_embeds=4), id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path / "abc")
    abc, grey = tmp_path / "abc", save_images(tmp_path / "grey", ["a", "b", "c"])

    (row,) = evaluate(abc, tmp_path / "out", "--train_data_dir", grey, "--guidance_scales", "1")
    assert 0 <= row["class_accuracy"] <= 1
    for data, message in {
        save_images(tmp_path / "two", names[:2]): r"2 classes \(one, zero\), but .* draws 3 \(a, b, c\)",
        save_images(tmp_path / "other", ["a", "b", "d"]): r"3 classes \(a, b, d\), but .* draws 3 \(a, b, c\)",
        save_images(tmp_path / "rgb", ["a", "b", "c"], "RGB"): "The data has colour images, but .* draws grey ones",
        save_images(tmp_path / "tiny", ["a", "b", "c"], size=4): "images of 4×4, but .* draws 8×8",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluate(abc, tmp_path / "refused", "--train_data_dir", data)
    assert not (tmp_path / "refused").exists()


def test_a_published_model_knows_its_data(model, tmp_path):
    """Without train_config.yaml, which stays at home, run.json says it; if the data is public."""
    pipeline = make_pipeline(make_unet(num_class_embeds=11), id2label=Digits().id2label)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="It is not known what .* was trained on, or the data is not public: give"):
        evaluate(tmp_path / "model", tmp_path / "out")
    record = json.loads((model / "run.json").read_text())
    assert record["data"]["dataset_name"] is None
    (tmp_path / "model" / "run.json").write_text(json.dumps(record))
    assert len(evaluate(tmp_path / "model", tmp_path / "out")) == 2


def test_data_of_this_machine_stays_at_home(tmp_path):
    data = save_images(tmp_path / "private", ["a", "b"])
    train(tmp_path / "model", "--train_data_dir", data, "--resolution", "8", "--attention_resolutions", "0")
    assert "data" not in json.loads((tmp_path / "model" / "run.json").read_text())


def test_images_that_are_not_finite_are_counted(tmp_path):
    unet = make_unet(num_class_embeds=11)
    unet.class_embedding.weight.data[3] = torch.nan
    pipeline = make_pipeline(unet, id2label=Digits().id2label)
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "run.json").write_text(json.dumps({"data": {}}))
    with pytest.raises(UserError, match=r"^1 of 8 images are not finite \(indices \[3\]\)"):
        evaluate(tmp_path / "model", tmp_path / "out", "--guidance_scales", "0")
    assert list((tmp_path / "out").rglob("shard-*")) == []


# ----- on several processes -----


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(model, tmp_path):
    """With the script's own shards and classifier: 1,100 images in three shards."""
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += [str(TRAINING / "evaluate_cfg.py"), "--model", str(model), "--num_samples", "1100"]
        command += ["--num_inference_steps", "2", "--guidance_scales", "0", "2", "--output_dir", f"out{processes}"]
        # The second run trains no classifier of its own, but sums up the real images itself
        for file in (tmp_path / "statistics").glob("statistics-*"):
            file.unlink()
        result = subprocess.run(
            [*command, "--statistics_dir", "statistics"], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stderr
    assert shards(tmp_path / "out1") == shards(tmp_path / "out2")
    one, two = (json.loads((tmp_path / f"out{n}" / "metrics.json").read_text()) for n in (1, 2))
    for a, b in zip([one["floor"], *one["results"]], [two["floor"], *two["results"]], strict=True):
        by_class = [row.pop("accuracy_by_class", {}) for row in (a, b)]
        assert by_class[0] == pytest.approx(by_class[1], rel=1e-6, abs=1e-6)
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(model, tmp_path):
    command = [sys.executable, str(TRAINING / "evaluate_cfg.py"), "--model", str(model), "--num_samples", "1500"]
    command += ["--num_inference_steps", "8", "--guidance_scales", "0", "1", "--output_dir", "out"]
    command += ["--statistics_dir", "statistics"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        first = tmp_path / "out" / "samples" / "w=0" / "shard-00000.npz"
        while process.poll() is None and not first.is_file():
            time.sleep(0.05)
        process.kill()
    drawn = first.stat().st_mtime_ns
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert first.stat().st_mtime_ns == drawn
    assert len(shards(tmp_path / "out")) == 6
    assert "Sampling" in result.stderr


# ----- while training -----


def test_a_run_measures_itself(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--eval_steps", "2", "--num_eval_samples", "20", "--report_to", "tensorboard"]
    train(tmp_path / "with", *flags)
    train(tmp_path / "without")
    events = EventAccumulator(str(tmp_path / "with" / "logs" / "train_cfg")).Reload()
    for tag in ("frechet_distance/w=0", "frechet_distance/w=1", "class_accuracy/w=1", "recall/w=0"):
        assert [event.step for event in events.Scalars(tag)] == [2, 4]
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert_same_weights(tmp_path / "with" / weights, tmp_path / "without" / weights)


# ----- the ablation -----


@pytest.mark.slow
def test_the_ablation_of_dropout(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = ["--output_dir", str(tmp_path / "out"), "--conditioning_dropout_probs", "0.1", "0.5", "--num_samples", "20"]
    argv += ["--num_inference_steps", "2", "--guidance_scales", "0", "1", *TINY]
    table = ablate_dropout(*parse_ablation_args(argv))
    assert table == (tmp_path / "out" / "table.md").read_text()
    assert re.match(
        r"\| w \| Fréchet distance, p = 0.1 \| Fréchet distance, p = 0.5 \| classifier score, p = 0.1", table
    )
    assert (tmp_path / "out" / "curves.png").is_file()
    for p in ("0.1", "0.5"):
        config = TrainConfig.load(tmp_path / "out" / f"p={p}" / "train_config.yaml")
        assert (config.conditioning_dropout_prob, config.max_train_steps) == (float(p), 4)
    trained = os.stat(tmp_path / "out" / "p=0.1" / "run.json").st_mtime_ns
    assert ablate_dropout(*parse_ablation_args(argv)) == table
    assert os.stat(tmp_path / "out" / "p=0.1" / "run.json").st_mtime_ns == trained
    with pytest.raises(UserError, match="train_cfg.py .*failed, see above"):
        ablate_dropout(*parse_ablation_args([*argv, "--conditioning_dropout_probs", "1.5"]))
