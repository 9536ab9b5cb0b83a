"""Test that training on cached latents equals training without the cache."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets, latents, sources
from diffusers_cfg.evaluation import features, in_training
from tests.support.images import save_folder_with_broken_image
from tests.support.latents import CLOSE, count_encoded, few_digits, make_deterministic_vae, vae_flags
from tests.support.runs import TINY, WEIGHTS, assert_same_tensors, launch, train

WEIGHTS = Path("unet") / WEIGHTS


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    """Cache the latents of 100 digits in a temporary folder, with 40 in each file. Return the folder."""
    digits = few_digits()
    monkeypatch.setattr(sources, "Digits", lambda: digits)
    monkeypatch.setattr(latents, "LATENTS_DIR", tmp_path / "latents")
    monkeypatch.setattr(latents, "FILE_SIZE", 40)
    return tmp_path / "latents"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Return a list that receives the number of images in each encoded batch."""
    return count_encoded(monkeypatch)


def differ(first: Path, second: Path) -> bool:
    return bool((load_file(first)["conv_in.weight"] - load_file(second)["conv_in.weight"]).abs().max() > 1e-4)


@pytest.mark.parametrize(
    ("argv", "num_encoded"), [([], 100), (["--random_flip"], 200), (["--train_val_split", "0.3"], 70)]
)
def test_training_is_the_same_with_and_without_the_cache(tmp_path, encoded, argv, num_encoded):
    flags = [*vae_flags(tmp_path / "vae"), *argv]
    train(tmp_path / "without", *flags)
    encoded.clear()
    train(tmp_path / "with", *flags, "--cache_latents")
    assert sum(encoded) == num_encoded
    assert_same_tensors(tmp_path / "without" / WEIGHTS, tmp_path / "with" / WEIGHTS, **CLOSE)
    encoded.clear()
    train(tmp_path / "again", *flags, "--cache_latents")
    assert encoded == []
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "again" / WEIGHTS)


def test_latents_without_a_posterior(tmp_path, folder):
    """An AutoencoderDC has latents instead of a mean and a log-variance."""
    make_deterministic_vae().save_pretrained(tmp_path / "vae")
    flags = ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae"), "--optimizer", "adamw", "--random_flip"]
    train(tmp_path / "without", *flags)
    train(tmp_path / "with", *flags, "--cache_latents")
    assert_same_tensors(tmp_path / "without" / WEIGHTS, tmp_path / "with" / WEIGHTS, **CLOSE)
    moments = load_file(next(folder.rglob("0-39.safetensors")))["moments"]
    assert moments.shape == (40, 2, 2, 4, 4)  # images, views, channels, height, width
    pipe = CFGPipeline.from_pretrained(tmp_path / "with")
    assert type(pipe.vae) is AutoencoderDC
    assert pipe.image_shape == (1, 8, 8)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(pipe.encode(images), pipe.vae.encode(images).latent * 0.5)
    torch.testing.assert_close(pipe.decode(pipe.encode(images)), pipe.vae.decode(pipe.vae.encode(images).latent).sample)
    drawn: Any = pipe(
        [0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert drawn.shape == (2, 1, 8, 8)
    # Saved again, the folder loads with plain diffusers and its own code.
    pipe.save_pretrained(tmp_path / "again")
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(plain.vae) is AutoencoderDC
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(plain([0, 1], num_inference_steps=2, generator=generator, output_type="pt").images, drawn)


@pytest.mark.parametrize("cache", [[], ["--cache_latents"]])
def test_accumulation_does_not_change_the_weights(tmp_path, cache):
    """The posterior noise of an image does not depend on how the global batch is divided."""
    flags = [*vae_flags(tmp_path / "vae"), *cache]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "parts" / WEIGHTS, **CLOSE)


def test_resume_with_cached_latents_is_bit_exact(tmp_path):
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "resumed" / WEIGHTS)


def test_latents_of_lazily_decoded_images(tmp_path, monkeypatch, caplog):
    """An unreadable image is replaced by the same image as without the cache, and every run reports it."""
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


def test_evaluation_with_cached_latents_uses_images(tmp_path, monkeypatch):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    monkeypatch.setattr(in_training, "CACHE_DIR", tmp_path / "cache")
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "without", *flags)
    train(tmp_path / "with", *flags, "--eval_steps", "2", "--num_eval_samples", "20")
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "without" / WEIGHTS)
    assert (
        len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    )  # the classifier and the statistics of the images


@pytest.mark.slow
def test_training_on_two_processes_is_the_same_with_and_without_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [*TINY, *vae_flags(tmp_path / "vae"), "--random_flip", "--train_batch_size", "4"]
    for name, flag in (("without", []), ("with", ["--cache_latents"])):
        done = launch(*flags, *flag, "--output_dir", name, cwd=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "diffusers-cfg" / "latents").glob("*/*"))) == 4
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "without" / WEIGHTS, **CLOSE)


def test_latents_of_different_images_or_encoders_are_not_used(tmp_path, folder, encoded):
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


def test_damaged_and_foreign_files_are_encoded_again(tmp_path, folder, encoded):
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


def test_too_little_disk_space_for_latents_raises_before_the_run(tmp_path, folder, encoded, monkeypatch):
    flags, disk_usage = [*vae_flags(tmp_path / "vae"), "--cache_latents"], shutil.disk_usage

    def full(path: Path):
        usage = disk_usage(path)
        return usage._replace(free=0) if folder in [path, *path.parents] else usage

    with monkeypatch.context() as patch:
        patch.setattr(latents.shutil, "disk_usage", full)
        with pytest.raises(UserError, match="needs 0.03 MB for the latents of 100 images"):
            train(tmp_path / "out", *flags)
    assert (encoded, list(folder.rglob("*.*")), (tmp_path / "out").exists()) == ([], [], False)


def test_cache_latents_without_an_autoencoder_raises(tmp_path):
    train(tmp_path / "out")
    with pytest.raises(UserError, match=f"--cache_latents needs an autoencoder, but {tmp_path}/out has none"):
        train(tmp_path / "latents", "--pretrained_model_name_or_path", str(tmp_path / "out"), "--cache_latents")
