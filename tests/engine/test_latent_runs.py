"""Runs on cached latents: the same training as without the cache, and on nothing but the latents of its own images."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets, latents, sources
from diffusers_cfg.evaluation import features, in_training
from tests.support.images import save_folder_with_broken_image
from tests.support.latents import CLOSE, count_encoded, few_digits, vae_flags
from tests.support.runs import TINY, WEIGHTS, assert_same_tensors, launch, train

WEIGHTS = Path("unet") / WEIGHTS


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    """A folder of the test's own, for a hundred digits, 40 in a file."""
    digits = few_digits()
    monkeypatch.setattr(sources, "Digits", lambda: digits)
    monkeypatch.setattr(latents, "LATENTS_DIR", tmp_path / "latents")
    monkeypatch.setattr(latents, "FILE_SIZE", 40)
    return tmp_path / "latents"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of images in each batch that was encoded."""
    return count_encoded(monkeypatch)


def differ(first: Path, second: Path) -> bool:
    return (load_file(first)["conv_in.weight"] - load_file(second)["conv_in.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("flip", [[], ["--random_flip"]])
def test_training_is_the_same_with_and_without_the_cache(tmp_path, encoded, flip):
    flags = [*vae_flags(tmp_path / "vae"), *flip]
    train(tmp_path / "without", *flags)
    encoded.clear()
    train(tmp_path / "with", *flags, "--cache_latents")
    assert sum(encoded) == (2 if flip else 1) * 100
    assert_same_tensors(tmp_path / "without" / WEIGHTS, tmp_path / "with" / WEIGHTS, **CLOSE)
    encoded.clear()
    train(tmp_path / "again", *flags, "--cache_latents")
    assert encoded == []
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "again" / WEIGHTS)


@pytest.mark.parametrize("cache", [[], ["--cache_latents"]])
def test_accumulated_batches_are_one_batch(tmp_path, cache):
    """Draws from the posterior belong to the image, however the step is divided."""
    flags = [*vae_flags(tmp_path / "vae"), *cache]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "parts" / WEIGHTS, **CLOSE)


def test_a_resumed_run_with_latents_equals_one_that_never_stopped(tmp_path):
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "resumed" / WEIGHTS)


def test_images_that_are_decoded_lazily(tmp_path, monkeypatch, caplog):
    """One cannot be read: it is replaced as it is without the cache, and named by every run."""
    save_folder_with_broken_image(tmp_path / "data")
    monkeypatch.setattr(datasets, "MAX_CACHED_BYTES", 0)
    monkeypatch.setattr(latents, "FILE_SIZE", 7)
    flags = [*vae_flags(tmp_path / "vae"), "--train_data_dir", str(tmp_path / "data"), "--resolution", "8"]
    flags += ["--cache_dir", str(tmp_path / "cache"), "--max_unreadable_fraction"]
    train(tmp_path / "without", *flags, "0.1")
    for run in ("with", "again"):
        caplog.clear()
        train(tmp_path / run, *flags, "0.1", "--cache_latents")
        assert "1 images could not be read: row 9 (" in caplog.text
        assert_same_tensors(tmp_path / "without" / WEIGHTS, tmp_path / run / WEIGHTS, **CLOSE)
    with pytest.raises(UserError, match="1 of 20 images cannot be read.*row 9"):
        train(tmp_path / "strict", *flags, "0.01", "--cache_latents")


def test_a_run_with_latents_measures_itself_by_images(tmp_path, monkeypatch):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    monkeypatch.setattr(in_training, "CACHE_DIR", tmp_path / "cache")
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "without", *flags)
    train(tmp_path / "with", *flags, "--eval_steps", "2", "--num_eval_samples", "20")
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "without" / WEIGHTS)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2  # the classifier, and the images' statistics


@pytest.mark.slow
def test_two_processes_train_the_same_with_and_without_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [*TINY, *vae_flags(tmp_path / "vae"), "--random_flip", "--train_batch_size", "4"]
    for name, flag in (("without", []), ("with", ["--cache_latents"])):
        done = launch(*flags, *flag, "--output_dir", name, cwd=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "diffusers-cfg" / "latents").glob("*/*"))) == 4
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "without" / WEIGHTS, **CLOSE)


def test_latents_of_something_else_are_not_used(tmp_path, folder, encoded):
    flags = vae_flags(tmp_path / "vae")
    train(tmp_path / "out", *flags, "--cache_latents")
    for i, other in enumerate((vae_flags(tmp_path / "other", seed=1), ["--resolution", "16"], ["--random_flip"])):
        train(tmp_path / f"without-{i}", *flags, *other)
        encoded.clear()
        train(tmp_path / f"with-{i}", *flags, *other, "--cache_latents")
        assert sum(encoded) >= 100
        assert_same_tensors(tmp_path / f"without-{i}" / WEIGHTS, tmp_path / f"with-{i}" / WEIGHTS, **CLOSE)
        assert differ(tmp_path / f"with-{i}" / WEIGHTS, tmp_path / "out" / WEIGHTS)
    assert len(list(folder.iterdir())) == 4


def test_a_run_with_damaged_and_foreign_files_is_the_same(tmp_path, folder, encoded):
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "out", *flags)
    paths = sorted(folder.glob("*/*"))
    train(tmp_path / "another", *flags, *vae_flags(tmp_path / "other", seed=1))
    (foreign,) = set(folder.glob("*/80-99.safetensors")) - set(paths)
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[:-1000])
    paths[1].unlink()
    shutil.copy(foreign, paths[2])
    encoded.clear()
    train(tmp_path / "again", *flags)
    assert sum(encoded) == 100
    assert_same_tensors(tmp_path / "out" / WEIGHTS, tmp_path / "again" / WEIGHTS)


def test_latents_that_cannot_be_kept_leave_no_run(tmp_path, folder, encoded, monkeypatch):
    flags, disk_usage = [*vae_flags(tmp_path / "vae"), "--cache_latents"], shutil.disk_usage

    def full(path: Path):
        usage = disk_usage(path)
        return usage._replace(free=0) if folder in [path, *path.parents] else usage

    with monkeypatch.context() as patch:
        patch.setattr(latents.shutil, "disk_usage", full)
        with pytest.raises(UserError, match="needs 0.03 MB for the latents of 100 images"):
            train(tmp_path / "out", *flags)
    assert (encoded, list(folder.rglob("*.*")), (tmp_path / "out").exists()) == ([], [], False)


def test_a_pipeline_without_an_autoencoder_has_no_latents(tmp_path):
    train(tmp_path / "out")
    with pytest.raises(UserError, match=f"--cache_latents needs an autoencoder, but {tmp_path}/out has none"):
        train(tmp_path / "latents", "--pretrained_model_name_or_path", str(tmp_path / "out"), "--cache_latents")
