"""Test reference statistics: what is measured with them, and which files are refused."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import reference as reference_module
from diffusers_cfg.evaluation import reports
from diffusers_cfg.evaluation.features import pretrained_extractor
from diffusers_cfg.evaluation.reference import read_images, read_reference
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.evaluation.sweep import run_sweep
from tests.support.commands import load_command
from tests.support.extractors import TinyInception, use_tiny_inception
from tests.support.models import make_pipeline, make_unet

NUM_IMAGES, SIZE = 60, 8
D, S = TinyInception.num_features, TinyInception.num_spatial_features


@pytest.fixture(scope="module", autouse=True)
def inception():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_inception(patch)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return the folder of a model of the digits, whose training data nothing names."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_pipeline(make_unet(num_class_embeds=11), id2label=Digits().id2label).save_pretrained(folder)
    return folder


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def features_of(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the features and the spatial features of images, `(images, height, width, 3)`, in float64."""
    extractor = pretrained_extractor("inception")
    features, _ = extractor(torch.from_numpy(images).movedim(-1, 1))
    assert extractor.spatial_features is not None
    return features.double().numpy(), extractor.spatial_features.double().numpy()


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Return the arrays of a reference batch like ADM's: statistics of 600 images, and every tenth image."""
    images = np.random.default_rng(0).integers(0, 256, (10 * NUM_IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    features, spatial = features_of(images)
    arrays = dict(zip(("mu", "sigma"), moments(features), strict=True))
    arrays |= dict(zip(("mu_s", "sigma_s"), moments(spatial), strict=True))
    return {**arrays, "arr_0": images[::10], "arr_1": np.zeros(NUM_IMAGES, np.int64)}


def save(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def config_of(model: Path, folder: Path, file: Path, *argv: str) -> EvaluationConfig:
    flags = ["--model", str(model), "--num_samples", "20", "--num_inference_steps", "2", "--guidance_scales", "0"]
    folders = ["--output_dir", str(folder / "out"), "--statistics_dir", str(folder / "statistics")]
    extractor = ["--feature_extractor", "inception", "--reference", str(file)]
    return parse_config(EvaluationConfig, [*flags, *folders, *extractor, *argv])


def evaluate(model: Path, folder: Path, file: Path, *argv: str) -> dict[str, Any]:
    return run_sweep(config_of(model, folder, file, *argv), Accelerator(cpu=True))


def samples_of(folder: Path) -> np.ndarray:
    """Return the samples of an evaluation, which are stored as RGB images."""
    images = [np.load(path)["arr_0"] for path in sorted(folder.rglob("shard-*.npz"))]
    return np.concatenate(images)


def numpy_distance(fake: tuple[np.ndarray, np.ndarray], mean: np.ndarray, covariance: np.ndarray) -> float:
    """Return the Fréchet distance by the eigenvalues of the product, as torch-fidelity computes it."""
    root = np.sqrt(np.linalg.eigvals(fake[1] @ covariance).astype(complex)).real.sum()
    return ((fake[0] - mean) ** 2).sum() + np.trace(fake[1] + covariance) - 2 * root


def test_reference_batch_of_adm(model, batch, tmp_path):
    """The training data is not needed. The distances are those of another formula, from the same features."""
    number = ["--num_samples", "40"]  # more than there are features, for a covariance of full rank
    record = evaluate(model, tmp_path, save(tmp_path / "VIRTUAL_digits.npz", batch), *number)
    (row,) = record["results"]
    features, spatial = (moments(values) for values in features_of(samples_of(tmp_path)))
    expected = numpy_distance(features, batch["mu"], batch["sigma"])
    assert row["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    expected = numpy_distance(spatial, batch["mu_s"], batch["sigma_s"])
    assert row["spatial_frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert {"precision", "recall", "density", "coverage", "kernel_distance", "inception_score"} <= row.keys()
    assert (record["dataset"], record["floor"], record["num_neighbours"]) == ("VIRTUAL_digits.npz", {}, 40)
    assert record["memorisation"] == "Memorisation is not measured: with --reference, training images are not read."
    assert (tmp_path / "out" / "classes.png").is_file()
    assert not {"classes.md", "nearest.png"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert record["reference"]["num_images"] == NUM_IMAGES
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert "| w | FID | KID | IS | sFID | precision |" in table
    assert "the statistics in VIRTUAL_digits.npz (SHA-256 " in table
    assert "compare 40 samples with 40 of its images" in table
    assert "real |" not in table
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0


def test_statistics_of_edm_have_distances_only(model, batch, tmp_path):
    file = save(tmp_path / "cifar10.npz", {name: batch[name].astype(np.float32) for name in ("mu", "sigma")})
    record = evaluate(model, tmp_path, file)
    (row,) = record["results"]
    assert {"frechet_distance", "inception_score"} <= row.keys()
    left_out = {"precision", "recall", "density", "coverage", "kernel_distance", "spatial_frechet_distance"}
    assert not left_out & row.keys()
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert "| w | FID | IS | evaluations |" in table
    assert "no images, and therefore no precision, recall, density, coverage or KID" in table
    assert "no spatial features, and therefore no sFID" in table
    assert not list((tmp_path / "statistics").glob("*"))


def test_samples_are_reused_and_images_cached(model, batch, tmp_path, monkeypatch):
    file = save(tmp_path / "reference.npz", batch)
    first = evaluate(model, tmp_path, file)
    assert len(list((tmp_path / "statistics").glob("reference-*.safetensors"))) == 1

    def never(*_):
        raise AssertionError("the images were read again")

    monkeypatch.setattr(reference_module, "read_images", never)
    assert evaluate(model, tmp_path, file) == first
    # Other statistics of the same images have other features in the cache.
    with pytest.raises(AssertionError, match="read again"):
        evaluate(model, tmp_path, save(tmp_path / "other.npz", {**batch, "mu": batch["mu"] + 1e-3}))


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_read_by_index(batch, tmp_path, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "reference.npz", **batch)
    rows = torch.tensor([0, 7, 8, NUM_IMAGES - 1])
    images = read_images(tmp_path / "reference.npz", rows)
    assert np.array_equal(images.movedim(1, -1).numpy(), batch["arr_0"][rows])


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batch: {name: value for name, value in batch.items() if name not in names}


def changed(**arrays: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a change of a batch: new arrays, or functions of the old ones."""
    return lambda batch: batch | {n: v(batch[n]) if callable(v) else v for n, v in arrays.items()}


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flat[3] = np.nan
    return values


def asymmetric(values: np.ndarray) -> np.ndarray:
    return values + np.triu(np.ones_like(values), 1) * 1e-3 * np.abs(values).max()


INVALID = {
    "samples": (without("mu", "sigma", "mu_s", "sigma_s"), "has no mu and sigma. It has images only, like a set"),
    "no covariance": (without("sigma"), "has no sigma. Reference statistics have the mean mu"),
    "no spatial covariance": (without("sigma_s"), "has one of mu_s and sigma_s without the other"),
    "nothing": (lambda _: {"x": np.zeros(3)}, "has no mu and sigma. Reference"),
    "other width": (
        changed(mu=np.zeros(D + 1), sigma=np.eye(D + 1)),
        r"has mu of shape \(17,\), but that of Inception's features is \(16,\): they are statistics of another network",
    ),
    "matrix as mean": (changed(mu=np.eye(D)), r"has mu of shape \(16, 16\)"),
    "variances": (changed(sigma=np.ones(D)), r"has sigma of shape \(16,\), but .* is \(16, 16\)"),
    "other spatial width": (changed(mu_s=np.zeros(D)), r"has mu_s of shape \(16,\), but .* is \(28,\)"),
    "NaN mean": (changed(mu=with_nan), "values in mu that are not finite"),
    "NaN covariance": (changed(sigma=with_nan), "values in sigma that are not finite"),
    "infinite spatial mean": (changed(mu_s=np.full(S, np.inf)), "values in mu_s that are not finite"),
    "not symmetric": (changed(sigma=asymmetric), "has a sigma that is not symmetric"),
    "spatial not symmetric": (changed(sigma_s=asymmetric), "has a sigma_s that is not symmetric"),
    "negative": (changed(sigma=np.negative), "has a sigma with eigenvalues from -"),
    "indefinite": (changed(sigma=lambda s: s - 0.1 * np.trace(s) * np.eye(D)), "has a sigma with eigenvalues from -"),
    "zero": (changed(sigma=np.zeros((D, D))), "has a sigma with eigenvalues from 0 to 0"),
    "integers": (changed(mu=np.zeros(D, int)), "has mu of type int64 instead of floating-point numbers"),
    "complex": (changed(sigma=np.eye(D) + 0j), "has sigma of type complex128"),
    "objects": (changed(mu=np.array([None] * D)), "has Python objects in mu, which can run code"),
    "object images": (changed(arr_0=np.array([{}] * 30)), "has Python objects in arr_0"),
    "other resolution": (
        changed(arr_0=np.zeros((30, 16, 16, 3), np.uint8)),
        "has images of 16×16, but the model generates 8×8",
    ),
    "channels first": (changed(arr_0=np.zeros((30, 3, 8, 8), np.uint8)), "instead of uint8 images of shape"),
    "float images": (changed(arr_0=np.zeros((30, 8, 8, 3))), "has arr_0 of type float64"),
    "Fortran order": (changed(arr_0=np.asfortranarray(np.zeros((30, 8, 8, 3), np.uint8))), "in C order"),
    "few images": (changed(arr_0=lambda images: images[:19]), "has 19 images in arr_0. At least 20"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_arrays_raise(batch, tmp_path, kind):
    change, message = INVALID[kind]
    with pytest.raises(UserError, match=f"^--reference .*reference.npz .*{message}"):
        read_reference(save(tmp_path / "reference.npz", change(batch)), SIZE)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damaged_data(content: bytes) -> bytes:
    """Change a byte of the data of `sigma`, which its checksum tells."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = archive.getinfo("sigma.npy")
    at = info.header_offset + 30 + len("sigma.npy") + 400
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("edm2.pkl", lambda _: pickle.dumps({"fid": {}}), "is a pickle, which can run code .* For EDM2: import pickle"),
        ("renamed.npz", lambda _: pickle.dumps({"fid": {}}), "is a pickle"),
        ("text.npz", lambda _: b"<html>Not found</html>", "is not an npz file"),
        ("empty.npz", lambda _: b"", "is not an npz file"),
        ("truncated.npz", truncated, "cannot be read .*Download it again"),
        ("damaged.npz", damaged_data, "cannot be read .*Download it again"),
    ],
)
def test_other_files_raise(batch, tmp_path, name, damage, message):
    content = save(tmp_path / "whole.npz", batch).read_bytes()
    (tmp_path / name).write_bytes(damage(content))
    with pytest.raises(UserError, match=f"^--reference .*{name} {message}"):
        read_reference(tmp_path / name, SIZE)


def test_the_pickles_of_edm2_are_converted_as_the_message_says(batch, tmp_path, monkeypatch):
    """Run the line of the message."""
    monkeypatch.chdir(tmp_path)
    statistics = {"num_images": 600, "fid": {name: batch[name] for name in ("mu", "sigma")}, "fd_dinov2": {}}
    Path("FILE.pkl").write_bytes(pickle.dumps(statistics))
    with pytest.raises(UserError) as error:
        read_reference(Path("FILE.pkl"), SIZE)
    exec(str(error.value).split("For EDM2: ")[1])
    assert read_reference(Path("reference.npz"), SIZE).num_images == 0


def test_missing_file_raises(tmp_path):
    for path in (tmp_path / "nowhere.npz", tmp_path):
        with pytest.raises(UserError, match="is not a file. Download the reference statistics first"):
            read_reference(path, SIZE)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mu_s", "sigma_s")])
def test_statistics_of_another_network_of_the_same_width_raise(model, batch, tmp_path, names):
    """The images tell: here the order of the features is another one, as between two implementations of the sFID."""
    mean, covariance = (batch[name] for name in names)
    order = np.argsort(mean)
    other = {**batch, names[0]: mean[order], names[1]: covariance[order][:, order]}
    with pytest.raises(UserError, match=f"do not fit {names[0]} and {names[1]}: .* of another network"):
        evaluate(model, tmp_path, save(tmp_path / "other.npz", other))
    assert not list(tmp_path.rglob("shard-*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--feature_extractor", "small"],
            "Inception's features, which cannot be .* those of --feature_extractor small",
        ),
        (["--feature_extractor", "dinov2"], "Pass --feature_extractor inception"),
        (["--train_data_dir", "x", "--label_column", "y"], "--train_data_dir, --label_column cannot be combined with"),
        (["--class_labels", "data"], "Pass --class_labels balanced or random"),
    ],
)
def test_settings_without_effect_raise(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        config_of(Path("model"), tmp_path, Path("reference.npz"), *argv)


def test_reference_is_checked_before_an_image_is_drawn(model, batch, tmp_path):
    file = save(tmp_path / "reference.npz", {**batch, "mu": batch["mu"][:-1]})
    with pytest.raises(UserError, match="another network"):
        evaluate(model, tmp_path, file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("study", ["studies/ablate_samplers", "studies/compare_guidance"])
def test_studies_refuse_a_reference(tmp_path, study):
    flags = ["--model", "model", "--output_dir", str(tmp_path), "--feature_extractor", "inception"]
    with pytest.raises(UserError, match="--reference is not a flag of this command"):
        load_command(study).main([*flags, "--reference", "reference.npz"])


def test_card_shows_the_table(model, batch, tmp_path, monkeypatch):
    """The results of the card read what the evaluation wrote, without a row of real images."""
    monkeypatch.setattr(reports, "plot_curves", lambda *_: None)
    record = evaluate(model, tmp_path, save(tmp_path / "reference.npz", batch))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == record
    assert record["best"].keys() >= {"frechet_distance", "spatial_frechet_distance"}
