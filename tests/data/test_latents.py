"""Latents that are encoded once: the same training as without, and nobody else's latents."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import data
import diffusers
import evaluation
import feature_extractors
import latents
import numpy as np
import pytest
import torch
from config import UserError, parse_config
from data import Digits, training_dataset
from latents import CachedLatents, cache_latents
from model import load_vae
from PIL import Image
from safetensors.torch import load_file
from test_train import TINY, WEIGHTS, assert_same_tensors, launch, train

from diffusers_cfg import CFGPipeline

WEIGHTS = Path("unet") / WEIGHTS
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    """A folder of the test's own, for a hundred digits, 40 in a file."""
    few = Digits()
    few.images, few.class_labels = few.images[:100], few.class_labels[:100]
    monkeypatch.setattr(data, "Digits", lambda: few)
    monkeypatch.setattr(latents, "LATENTS_DIR", tmp_path / "latents")
    monkeypatch.setattr(latents, "FILE_SIZE", 40)
    return tmp_path / "latents"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images the autoencoder encodes, a number for each batch."""
    counts, encode = [], diffusers.AutoencoderKL.encode

    def count(self, x, *args):
        counts.append(len(x))
        return encode(self, x, *args)

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", count)
    return counts


def vae_flags(path: Path, seed: int = 0) -> list[str]:
    """To train on the latents of an autoencoder of random weights."""
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    ).save_pretrained(path)  # fmt: skip
    return ["--pretrained_vae_model_name_or_path", str(path)]


def differ(first: Path, second: Path) -> bool:
    return (load_file(first)["conv_in.weight"] - load_file(second)["conv_in.weight"]).abs().max() > 1e-4


# ----- the same training -----


@pytest.mark.parametrize("flip", [[], ["--random_flip"]])
def test_training_is_the_same_with_and_without(tmp_path, encoded, flip):
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
    """What is drawn from the posterior belongs to the image, however the step is cut up."""
    flags = [*vae_flags(tmp_path / "vae"), *cache]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "parts" / WEIGHTS, **CLOSE)


def test_a_resumed_run_with_latents_is_the_run_that_never_stopped(tmp_path):
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "resumed" / WEIGHTS)


def test_what_is_kept_is_the_posterior(tmp_path, folder):
    train(tmp_path / "out", *vae_flags(tmp_path / "vae"), "--cache_latents", "--random_flip")
    kept, digits = load_file(next(folder.glob("*/40-79.safetensors"))), data.Digits()
    images = torch.from_numpy(digits.images[40:80]).unsqueeze(1) / 127.5 - 1
    vae = CFGPipeline.from_pretrained(tmp_path / "out").vae
    for view, moments in zip((images, images.flip(-1)), kept["moments"].unbind(1), strict=True):
        torch.testing.assert_close(moments, vae.encode(view).latent_dist.parameters, **CLOSE)
    assert kept["class_labels"].tolist() == digits.class_labels[40:80].tolist()
    assert {path.name for path in folder.glob("*/*")} == {f"{rows}.safetensors" for rows in ("0-39", "40-79", "80-99")}


def test_images_that_are_decoded_as_they_are_used(tmp_path, monkeypatch, caplog):
    """One cannot be read: it is replaced as it is without the cache, and named by every run."""
    for label, name in enumerate("ab"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "a" / "9.png").write_bytes(b"no image")
    monkeypatch.setattr("data.MAX_CACHED_BYTES", 0)
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
    monkeypatch.setattr(feature_extractors.train_classifier, "__defaults__", (30, 64))
    monkeypatch.setattr(evaluation, "STATISTICS_DIR", tmp_path / "statistics")
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "without", *flags)
    train(tmp_path / "with", *flags, "--eval_steps", "2", "--num_eval_samples", "20")
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "without" / WEIGHTS)
    assert len(list((tmp_path / "statistics").iterdir())) == 2


def test_processes_share_the_work(tmp_path, encoded):
    config = parse_config([*TINY, *vae_flags(tmp_path / "vae"), "--cache_latents"])
    dataset, vae = training_dataset(data.Digits(), config, 1, show_progress=False), load_vae(config)

    def process(index: int) -> CachedLatents:
        accelerator = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=index == 0, device="cpu", wait_for_everyone=int
        )
        return cache_latents(config, accelerator, dataset, vae)

    # It does not wait, as here, or it does not see what the other wrote
    with pytest.raises(UserError, match="where every process has to write and read: No such file .*0-39.safetensors"):
        process(1)
    assert sum(encoded) == 40
    assert len(process(0)) == sum(encoded) == 100
    assert len(process(1)) == sum(encoded) == 100


@pytest.mark.slow
def test_two_processes_train_the_same_with_and_without(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [*TINY, *vae_flags(tmp_path / "vae"), "--random_flip", "--train_batch_size", "4"]
    for name, flag in (("without", []), ("with", ["--cache_latents"])):
        done = launch(*flags, *flag, "--output_dir", name, cwd=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "diffusers-cfg" / "latents").glob("*/*"))) == 4
    assert_same_tensors(tmp_path / "with" / WEIGHTS, tmp_path / "without" / WEIGHTS, **CLOSE)


# ----- nobody else's -----


def test_latents_of_something_else_are_not_taken(tmp_path, folder, encoded):
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


def test_damaged_and_foreign_files_are_written_anew(tmp_path, folder, encoded, caplog):
    flags = [*vae_flags(tmp_path / "vae"), "--cache_latents"]
    train(tmp_path / "out", *flags)
    files = sorted(folder.glob("*/*"))
    good = [path.read_bytes() for path in files]
    train(tmp_path / "another", *flags, *vae_flags(tmp_path / "other", seed=1))
    (foreign,) = set(folder.glob("*/80-99.safetensors")) - set(files)

    files[0].write_bytes(good[0][:-1000])
    files[1].write_bytes(good[1][:-1000] + bytes([good[1][-1000] ^ 1]) + good[1][-999:])
    shutil.copy(foreign, files[2])
    encoded.clear()
    train(tmp_path / "again", *flags)
    assert sum(encoded) == 100
    for path in files:
        assert f"{path} is damaged, or of something else: its images are encoded anew." in caplog.text
    assert_same_tensors(tmp_path / "out" / WEIGHTS, tmp_path / "again" / WEIGHTS)

    files[1].unlink()
    encoded.clear()
    train(tmp_path / "and_again", *flags)
    assert sum(encoded) == 40


# ----- what cannot work -----


def test_a_disk_without_room_is_named_before_anything_is_encoded(tmp_path, folder, encoded, monkeypatch):
    flags, left = [*vae_flags(tmp_path / "vae"), "--cache_latents"], [25_599]

    def disk_usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=left[0] if folder in [path, *path.parents] else 1e9)

    monkeypatch.setattr(latents.shutil, "disk_usage", disk_usage)
    # 100 images · 4 × 4 · 2 channels · 2 moments · 4 bytes
    with pytest.raises(UserError, match=r"needs 0\.03 MB for the latents of 100 images, but .* has 0\.03 MB left"):
        train(tmp_path / "out", *flags)
    assert (encoded, list(folder.rglob("*.*")), (tmp_path / "out").exists()) == ([], [], False)
    left[0] = 25_600
    train(tmp_path / "out", *flags)
    # What is there needs no room
    left[0] = 0
    train(tmp_path / "again", *flags)


def test_a_disk_that_fills_up_while_latents_are_written(tmp_path, folder, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_extractors, "save_file", full)
    with pytest.raises(UserError, match="--cache_latents cannot keep latents in .*No space left on device"):
        train(tmp_path / "out", *vae_flags(tmp_path / "vae"), "--cache_latents")
    assert list(folder.rglob("*.*")) == []
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_an_autoencoder_has_no_latents(tmp_path):
    train(tmp_path / "out")
    with pytest.raises(UserError, match=f"--cache_latents: {tmp_path}/out has no autoencoder"):
        train(tmp_path / "on", "--pretrained_model_name_or_path", str(tmp_path / "out"), "--cache_latents")
