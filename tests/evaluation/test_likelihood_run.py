"""Test the evaluation of likelihoods: which images, the report, resuming, and rejected models, settings and files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import likelihood_data, likelihood_run
from diffusers_cfg.evaluation.likelihood import ImageTerms, estimate
from diffusers_cfg.evaluation.likelihood_data import held_out_split, load_images
from diffusers_cfg.evaluation.likelihood_reports import likelihood_table, logged_bounds, plot_training
from diffusers_cfg.evaluation.likelihood_run import TermSet, run_likelihood
from diffusers_cfg.evaluation.settings import LikelihoodConfig
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.model_card import model_card
from diffusers_cfg.noise_schedule import NoiseSchedule
from diffusers_cfg.settings import DataConfig
from diffusers_cfg.variational_bound import bits_per_dim
from tests.support.images import save_images
from tests.support.models import make_pipeline, make_unet, vdm
from tests.support.runs import reset_accelerate

SCHEDULE = "noise_schedule.safetensors"


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood_run, "SHARD_SIZE", 8)
        yield


@pytest.fixture(scope="module", autouse=True)
def without_figures(once):
    """Leave out the slow figures in all evaluations but that of `once`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_schedules", "plot_variance"):
            patch.setattr(likelihood_run, name, lambda *_: None)
        yield


def save_model(folder: Path, pipeline: CFGPipeline | None = None, **recorded: Any) -> Path:
    """Save a model of the digits as a training run saves it, by default with 18 held-out images."""
    (pipeline or vdm(conditioning_dropout_prob=0.1)).save_pretrained(folder)
    CFGConfig(**{"train_val_split": 0.01, **recorded}).save(folder / "train_config.yaml")
    torch.manual_seed(0)
    schedule = NoiseSchedule(-13.3, 5.0, hidden_size=16)
    schedule.w3.data *= torch.rand(16) * 100
    save_file(schedule.state_dict(), folder / SCHEDULE)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


def run(model: Path | str, *argv: str) -> dict[str, Any]:
    """Evaluate a model at four times per image."""
    reset_accelerate()
    config = parse_config(LikelihoodConfig, ["--model", str(model), "--times_per_image", "4", *argv])
    return run_likelihood(config, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def once(tmp_path_factory, small_shards) -> Path:
    """Return the folder of a model with the report of a finished evaluation."""
    folder = save_model(tmp_path_factory.mktemp("once") / "model")
    run(folder, "--diffusion_steps", "0", "10")
    return folder


@pytest.fixture
def evaluated(once, tmp_path) -> Path:
    """Return a copy of the folder of a model with the report of a finished evaluation."""
    return Path(shutil.copytree(once, tmp_path / "model"))


def test_report(evaluated):
    folder = evaluated / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("likelihood", "likelihood.json", "likelihood.md", "loss_variance.png", "noise_schedule.png")
    ]
    record = json.loads((folder / "likelihood.json").read_text())
    assert (record["num_images"], record["num_available"]) == (18, 18)
    assert record["images"] == "held out by --train_val_split 0.01"
    ten, infinite = record["results"]
    assert (ten["diffusion_steps"], infinite["diffusion_steps"]) == (10, 0)
    for row in (ten, infinite):
        assert row["network_evaluations"] == 18 * 4 * 2
        for name, parts in (
            ("conditional", ("prior", "reconstruction", "diffusion")),
            ("null", ("prior", "reconstruction", "diffusion")),
            ("labels", ("conditional", "class")),
        ):
            assert row[name]["bits_per_dim"] == pytest.approx(sum(row[name][part] for part in parts), rel=1e-9)
            assert row[name]["bits_per_dim_error"] > 0
        assert row["labels"]["conditional"] == pytest.approx(row["conditional"]["bits_per_dim"], rel=1e-9)
        assert row["labels"]["class"] == pytest.approx(np.log2(10) / 64, rel=0.02)  # nearly equal frequencies
    assert ten["conditional"]["bits_per_dim"] > infinite["conditional"]["bits_per_dim"]
    assert sum(row["num_images"] for row in record["by_class"].values()) == 18
    of_classes = sum(row["num_images"] * row["bits_per_dim"] for row in record["by_class"].values()) / 18
    assert of_classes == pytest.approx(infinite["conditional"]["bits_per_dim"])
    variance = record["variance"]
    assert list(variance) == ["learned", "linear", "cosine", "β-linear", "least possible"]
    assert min(variance.values()) == variance["least possible"] > 0

    table = (folder / "likelihood.md").read_text()
    assert table == likelihood_table(record)
    assert table.startswith("| T | p(x\\|c) | p(x), null class | p(x), by the labels | prior |")
    assert f"| ∞ | {infinite['conditional']['bits_per_dim']:.3f} ± " in table
    for text in ("held out by --train_val_split 0.01", "13.3 to -5", "| least possible |", "schedule (linear)"):
        assert text in table
    assert "resized" not in table
    for name in ("noise_schedule.png", "loss_variance.png"):
        assert Image.open(folder / name).width > 500


def test_model_card_shows_the_likelihood(evaluated):
    (evaluated / "run.json").write_text('{"dataset": "digits"}')
    card = model_card(evaluated, "me/digits")
    metadata = yaml.safe_load(card.split("---\n")[1])
    record = json.loads((evaluated / "evaluation" / "likelihood.json").read_text())
    value = record["results"][-1]["conditional"]["bits_per_dim"]
    assert metadata["model-index"][0]["results"][0]["metrics"] == [
        {
            "type": "bits_per_dimension",
            "value": round(value, 4),
            "name": "bits per dimension of p(x|c), T = ∞, 18 images, held out by --train_val_split 0.01",
        }
    ]
    assert (evaluated / "evaluation" / "likelihood.md").read_text().strip() in card
    for figure in ("noise_schedule.png", "loss_variance.png"):
        assert f"](evaluation/{figure})" in card
    assert "bits_per_dim.png" not in card
    assert "A class-conditional [variational diffusion model]" in card
    assert "@article{kingma2021variational" in card


def test_interrupted_evaluation_resumes(evaluated, monkeypatch):
    folder = evaluated / "evaluation"
    before = json.loads((folder / "likelihood.json").read_text())
    shards = sorted((folder / "likelihood").rglob("shard-*.npz"))
    assert [path.relative_to(folder).as_posix() for path in shards] == [
        f"likelihood/T={steps}/shard-0000{i}.npz" for steps in ("10", "inf") for i in range(3)
    ]
    shards[1].unlink()
    shards[2].write_bytes(b"damaged")
    shards[5].rename(shards[3])  # the shard of two images in place of another
    computed = []
    monkeypatch.setattr(
        likelihood_run,
        "estimate",
        lambda *args, estimate=likelihood_run.estimate, **settings: (
            computed.append((settings["diffusion_steps"], settings["first_index"])) or estimate(*args, **settings)
        ),
    )
    after = run(evaluated, "--diffusion_steps", "0", "10")
    assert computed == [(10, 8), (10, 16), (0, 0), (0, 16)]
    assert after["results"] == before["results"]
    # More steps, and fewer images, need what is missing only.
    computed.clear()
    fewer = run(evaluated, "--diffusion_steps", "0", "--num_images", "16")
    assert computed == []
    assert (fewer["num_images"], fewer["num_available"]) == (16, 18)
    assert "16 images, drawn at random from 18, of scikit-learn's digits" in likelihood_table(fewer)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, lambda values: values[:3]) for name in ImageTerms._fields),
        *((name, lambda values: values[..., None]) for name in ImageTerms._fields),
        *((name, lambda values: np.full_like(values, np.nan)) for name in ImageTerms._fields),
        *((name, lambda values: np.full_like(values, np.inf)) for name in ImageTerms._fields),
    ],
)
def test_damaged_shard_is_computed_again(once, name, damage):
    folder = once / "evaluation" / "likelihood" / "T=inf"
    terms, labels = TermSet(folder, 18), torch.zeros(8, dtype=torch.int64)
    intact = terms.load(terms.shards[0])
    assert TermSet.is_intact(intact, labels, 4)
    damaged = intact._replace(**{name: torch.from_numpy(damage(getattr(intact, name).numpy()))})
    assert not TermSet.is_intact(damaged, labels, 4)


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        (["--seed", "1"], "seed 0, now 1"),
        (["--times_per_image", "2"], "times_per_image 4, now 2"),
        (["--log_snr_max", "13"], "log_snr_max 13.3, now 13.0"),
        (["--noise_schedule", "learned"], "noise_schedule 'linear', now 'learned'.*shape None"),
        (["--images", "training", "--num_images", "2"], "images 'held_out', now 'training'"),
    ],
)
def test_changed_settings_are_refused(evaluated, flags, change):
    with pytest.raises(UserError, match=f"holds results with different settings \\(.*{change}"):
        run(evaluated, *flags)


def test_changed_model_is_refused(evaluated):
    path = evaluated / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: value + 1e-3 for name, value in weights.items()}, path)
    with pytest.raises(UserError, match="holds results with different settings \\(network "):
        run(evaluated)


def test_changed_data_is_refused(evaluated):
    CFGConfig(train_val_split=0.02).save(evaluated / "train_config.yaml")
    with pytest.raises(UserError, match="holds results with different settings \\(data "):
        run(evaluated)


def test_result_does_not_depend_on_batches_and_processes(evaluated, tmp_path, monkeypatch):
    expected = json.loads((evaluated / "evaluation" / "likelihood.json").read_text())["results"][1]
    out, flags = tmp_path / "out", ["--model", str(evaluated), "--times_per_image", "4", "--batch_size", "3"]
    config = parse_config(LikelihoodConfig, [*flags, "--output_dir", str(out)])
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    with monkeypatch.context() as second:  # which leaves two of the three shards to the first process
        for name, value in (("process_index", 1), ("num_processes", 2), ("is_main_process", False)):
            second.setattr(Accelerator, name, property(lambda _, value=value: value))
        assert run_likelihood(config, accelerator) == {}
    assert [path.name for path in out.rglob("shard-*.npz")] == ["shard-00001.npz"]
    settings = Path("likelihood", "settings.json")
    shutil.copy(evaluated / "evaluation" / settings, out / settings)
    (row,) = run_likelihood(config, accelerator)["results"]
    for name in ("conditional", "null", "labels"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5)

    # The shards are those of one set of images.
    pipeline = CFGPipeline.from_pretrained(evaluated)
    images = load_images(config, pipeline, show_progress=False)
    batch = images.dataset.__getitems__([*range(18)])
    terms = estimate(pipeline, batch.images, batch.class_labels, times_per_image=4)
    found = bits_per_dim(pipeline.image_shape) * terms.given_class
    assert found.mean().item() == pytest.approx(expected["conditional"]["bits_per_dim"], rel=1e-5)


def test_learned_schedule(saved, tmp_path):
    """Its bound with few steps differs from that of the linear one; in continuous time its mean does not."""
    flags, found = ["--diffusion_steps", "10", "0", "--times_per_image", "32", "--num_images", "8"], {}
    for name in ("linear", "learned"):
        found[name] = run(saved, *flags, "--noise_schedule", name, "--output_dir", str(tmp_path / name))["results"]
    linear, learned = found["linear"], found["learned"]
    assert abs(linear[0]["null"]["bits_per_dim"] / learned[0]["null"]["bits_per_dim"] - 1) > 0.05
    assert learned[1]["null"]["bits_per_dim"] == pytest.approx(linear[1]["null"]["bits_per_dim"], rel=0.03)


def test_ends_of_the_settings(saved, tmp_path):
    record = run(saved, "--log_snr_max", "8", "--log_snr_min", "-4", "--output_dir", str(tmp_path / "out"))
    assert (record["log_snr_max"], record["log_snr_min"]) == (8, -4)
    assert record["results"][0]["null"]["reconstruction"] > 0.1
    assert "learned" not in record["variance"]  # which has other ends


def test_schedule_without_a_learned_shape(tmp_path):
    model = save_model(tmp_path / "model")
    save_file(NoiseSchedule(-13.3, 5.0, learn_shape=False).state_dict(), model / SCHEDULE)
    assert "learned" not in run(model, "--num_images", "2")["variance"]


def test_model_of_train_cfg(tmp_path):
    """The arctan process from 20 to -20, without a noise schedule beside it."""
    unet, id2label = make_unet(num_class_embeds=11), Digits().id2label
    pipeline = make_pipeline(unet, LogSNRScheduler(), id2label=id2label, conditioning_dropout_prob=0.1)
    save_model(tmp_path / "model", pipeline)
    (tmp_path / "model" / SCHEDULE).unlink()
    record = run(tmp_path / "model")
    assert (record["log_snr_max"], record["log_snr_min"]) == (20, -20)
    assert next(iter(record["variance"])) == "linear"
    with pytest.raises(UserError, match="learned needs the file noise_schedule.safetensors"):
        run(tmp_path / "model", "--noise_schedule", "learned")


def test_model_without_null_class(tmp_path):
    save_model(tmp_path / "model", vdm(conditioning_dropout_prob=0.0))
    record = run(tmp_path / "model")
    (row,) = record["results"]
    assert "null" not in row
    assert row["network_evaluations"] == 18 * 4
    table = likelihood_table(record)
    assert "p(x), null class" not in table
    assert "no bound by the null class, because the model was trained without label dropout" in table


def test_training_curve(tmp_path):
    """The figure shows what the run has logged, and is left out if that is nothing."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "logs" / "diffusers-cfg")) as writer:
        for step in (1, 2):
            writer.add_scalar("bits_per_dim/conditional", 5 - step, step)
            writer.add_scalar("loss", 1, step)
    assert logged_bounds(tmp_path) == {"bits_per_dim/conditional": [(1, 4.0), (2, 3.0)]}
    plot_training(logged_bounds(tmp_path), tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 500
    assert logged_bounds(tmp_path / "logs" / "diffusers-cfg" / "none") == {}


class TestImages:
    """Which images are evaluated."""

    def test_training_images_on_request(self, saved, tmp_path):
        record = run(saved, "--images", "training", "--num_images", "3", "--output_dir", str(tmp_path / "out"))
        assert (record["images"], record["num_images"], record["num_available"]) == ("training images", 3, 1779)

    @pytest.mark.parametrize(
        ("recorded", "flags", "message"),
        [
            ({"train_val_split": 0.0}, [], "trained on all images of scikit-learn's digits.*--train_val_split"),
            ({}, ["--dataset_split", "train"], "--dataset_split train is the split that .* was trained on"),
            ({}, ["--images", "training", "--train_data_dir", "DATA"], "--train_data_dir names other data"),
            ({}, ["--train_data_dir", "DATA"], "classes that .* does not know: a, b. Its classes are zero, one"),
            (
                {"train_data_dir": "DATA", "train_val_split": 0.0},
                ["--train_data_dir", "DATA"],
                "no split of it is held out",
            ),
            ({"dataset_name": "DATA", "train_val_split": 0.0, "streaming": True}, [], "no split of it is held out"),
        ],
    )
    def test_unclear_data_is_refused(self, tmp_path, recorded, flags, message):
        data = save_images(tmp_path / "data", ["a", "b"], n=6)
        settings: dict[str, Any] = {name: data if value == "DATA" else value for name, value in recorded.items()}
        model = save_model(tmp_path / "model", **settings)
        with pytest.raises(UserError, match=message):
            run(model, *(data if flag == "DATA" else flag for flag in flags))
        assert not (model / "evaluation").exists()

    def test_unknown_training_data(self, saved, tmp_path):
        model = Path(shutil.copytree(saved, tmp_path / "model"))
        (model / "train_config.yaml").unlink()
        with pytest.raises(UserError, match="training data of .* is unknown or not public. Pass --dataset_name"):
            run(model)
        data = save_images(tmp_path / "data", ["two", "seven"], n=6)
        record = run(model, "--train_data_dir", data)
        assert record["class_frequencies"] == "taken as equal"
        assert record["results"][0]["labels"]["class"] == pytest.approx(np.log2(10) / 64)
        assert list(record["by_class"]) == ["two", "seven"]  # the ids of the model, not of the data

    @pytest.mark.parametrize(
        ("names", "trained", "expected"),
        [
            (["train", "validation", "test"], "train", "test"),
            (["train", "validation"], "train[:90%]", "validation"),
            (["train", "validation", "test"], "train+test", "validation"),
            (["test"], "test", None),
            (["train"], "train", None),
        ],
    )
    def test_a_split_that_was_trained_on_is_not_held_out(self, monkeypatch, names, trained, expected):
        monkeypatch.setattr(likelihood_data, "split_names", lambda _: names)
        assert held_out_split(DataConfig(dataset_name="pets", dataset_split=trained)) == expected

    @pytest.mark.parametrize(("split", "expected"), [("test", "test"), ("val", "validation")])
    def test_held_out_split_of_the_training_data(self, tmp_path, split, expected):
        names = ["a", "b", "c"]
        for part, n in (("train", 4), (split, 2)):
            save_images(tmp_path / "data" / part, names, n=n)
        pipeline = make_pipeline(conditioning_dropout_prob=0.1, id2label=dict(enumerate(names)))
        model = save_model(tmp_path / "model", pipeline, train_data_dir=str(tmp_path / "data"), train_val_split=0.0)
        (model / SCHEDULE).unlink()
        record = run(model)
        assert (record["images"], record["num_images"]) == (f"split {expected}", 6)
        assert record["class_frequencies"] == "those of the training images"

    def test_unlabelled_images_count_for_the_null_class(self, saved, tmp_path):
        data = Path(save_images(tmp_path / "data", ["x"], n=6)) / "x"
        record = run(saved, "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"))
        (row,) = record["results"]
        assert "conditional" not in row
        assert "labels" not in row
        assert row["null"]["num_images"] == 6
        assert record["by_class"] == {}
        assert "p(x\\|c)" not in likelihood_table(record)
        model = save_model(tmp_path / "model", vdm(conditioning_dropout_prob=0.0))
        with pytest.raises(UserError, match="no labels, but .* conditioning_dropout_prob = 0"):
            run(model, "--dataset_name", str(data))

    def test_resized_images_and_flips_are_noted(self, tmp_path):
        names = [*Digits().id2label.values()]
        model = save_model(tmp_path / "model", random_flip=True)
        record = run(model, "--train_data_dir", save_images(tmp_path / "data", names, size=10, n=1))
        table = likelihood_table(record)
        assert "The images were resized or cropped" in table
        assert "trained with random flips" in table

    @pytest.mark.parametrize(("mode", "message"), [("I;16", "more than 8 bits"), ("RGB", "The data has RGB images")])
    def test_other_images_are_refused(self, saved, tmp_path, mode, message):
        data = Path(save_images(tmp_path / "data", ["one", "two"], n=6))
        values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(values) if mode == "RGB" else Image.fromarray(values[..., 0].astype(np.uint16) * 99)
        image.save(data / "one" / "0.png")
        with pytest.raises(UserError, match=message):
            run(saved, "--train_data_dir", str(data), "--output_dir", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--diffusion_steps", "0", "0"], "diffusion_steps must not repeat a value"),
        (["--diffusion_steps", "-1"], "diffusion_steps must lie in \\[0, 1000000\\], but is \\[-1\\]"),
        (["--log_snr_max", "-3", "--log_snr_min", "2"], "log_snr_min=2.0 must be below log_snr_max=-3.0"),
        (["--log_snr_max", "9", "--noise_schedule", "learned"], "log_snr_max: the learned schedule has its own ends"),
        (["--log_snr_max", "14"], "from log-SNR 14 to -5, but must go down, and the model knows only 13.3 … -5"),
        (["--log_snr_min", "13.5"], "from log-SNR 13.3 to 13.5"),
        (["--times_per_image", "0"], "times_per_image must"),
    ],
)
def test_wrong_settings_are_refused(saved, flags, message):
    with pytest.raises(UserError, match=message):
        run(saved, *flags)
    assert not (saved / "evaluation").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: {**tensors, "gamma_0": torch.tensor(-12.0)}, "belongs to another model: its γ goes from -12"),
        (lambda tensors: {name: tensors[name] for name in tensors if name != "w1"}, "cannot be read: .*w1"),
        (lambda tensors: {name: tensors[name] for name in tensors if name != "gamma_1"}, "cannot be read: .*gamma_1"),
        (lambda tensors: {**tensors, "gamma_1": torch.tensor(-99.0)}, "cannot be read: gamma_0 must lie in"),
        (lambda tensors: {**tensors, "w1": tensors["w1"] * math.nan}, r"cannot be read: its γ\(t\) is not finite"),
        (lambda tensors: {**tensors, "w1": 0 * tensors["w1"], "w3": 0 * tensors["w3"]}, "is not finite"),
        (lambda tensors: None, "cannot be read"),
    ],
)
def test_wrong_noise_schedule_is_refused(saved, tmp_path, damage, message):
    model = Path(shutil.copytree(saved, tmp_path / "model"))
    tensors = damage(load_file(model / SCHEDULE))
    if tensors is None:
        (model / SCHEDULE).write_bytes(b"damaged")
    else:
        save_file(tensors, model / SCHEDULE)
    with pytest.raises(UserError, match=message):
        run(model)


def test_folder_of_other_files_is_refused(saved, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has files that no evaluation wrote"):
        run(saved, "--output_dir", str(tmp_path))
