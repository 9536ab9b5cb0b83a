"""Test cached latents: the posteriors, the files on disk, and when images are encoded again."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import Dataset

from diffusers_cfg import files
from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets as data
from diffusers_cfg.data import latents
from diffusers_cfg.data.datasets import CachedImages, training_dataset
from diffusers_cfg.data.latents import CachedLatents, LatentBatch, cache_latents
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.settings import TrainConfig
from tests.support.images import save_folder_with_broken_image
from tests.support.latents import CLOSE, count_encoded, few_digits, make_vae

SHAPE = (2, 4, 4)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    """Return the cache folder of a test, which has 40 images per file."""
    monkeypatch.setattr(latents, "LATENTS_DIR", tmp_path / "latents")
    monkeypatch.setattr(latents, "FILE_SIZE", 40)
    return tmp_path / "latents"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Return a list that receives the number of images in each encoded batch."""
    return count_encoded(monkeypatch)


def make_config(**settings) -> TrainConfig:
    settings = {"resolution": 8, "train_batch_size": 8, "pretrained_vae_model_name_or_path": "a folder", **settings}
    return TrainConfig(cache_latents=True, **settings)


def digits(config: TrainConfig) -> Dataset:
    return training_dataset(few_digits(), config, 1, show_progress=False)


def process(index: int = 0, num_processes: int = 1) -> Accelerator:
    """Return a stand-in for an accelerator that does not wait for the other processes."""
    attributes = SimpleNamespace(
        process_index=index,
        num_processes=num_processes,
        is_main_process=index == 0,
        device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )
    return cast(Accelerator, attributes)


def cache(config: TrainConfig | None = None, dataset: Dataset | None = None, vae_seed: int = 0) -> CachedLatents:
    """Cache the latents of 100 digits, or of another dataset, in one process."""
    config = config or make_config()
    return cache_latents(config, process(), dataset or digits(config), make_vae(vae_seed), SHAPE)


def posteriors(images: torch.Tensor) -> torch.Tensor:
    return make_vae().encode(images.float() / 127.5 - 1).latent_dist.parameters


def test_cache_holds_posteriors_of_images_and_mirror_images(folder):
    config = make_config(random_flip=True)
    cached, images = cache(config), digits(config)
    assert len(cached) == 100
    everything = list(range(100))
    batch = cached.__getitems__(everything)
    assert batch.moments.shape == (100, 2, 4, 4, 4)
    for view, moments in zip((images.images, images.images.flip(-1)), batch.moments.unbind(1), strict=True):
        torch.testing.assert_close(moments, posteriors(view), **CLOSE)
    assert torch.equal(batch.class_labels, images.class_labels)
    assert torch.equal(cached.class_labels, images.class_labels)
    assert batch.unreadable == []
    assert {path.name for path in folder.glob("*/*")} == {f"{rows}.safetensors" for rows in ("0-39", "40-79", "80-99")}
    kept = load_file(next(folder.glob("*/40-79.safetensors")))
    assert torch.equal(kept["moments"], batch.moments[40:80])
    assert torch.equal(kept["class_labels"], images.class_labels[40:80])


def test_latents_are_fetched_in_any_order():
    cached = cache()
    whole = cached.__getitems__(list(range(100)))
    subset = cached.__getitems__([99, 0, 40, 39, 40])
    assert torch.equal(subset.moments, whole.moments[[99, 0, 40, 39, 40]])
    assert torch.equal(subset.class_labels, whole.class_labels[[99, 0, 40, 39, 40]])
    assert whole.moments.shape == (100, 1, 4, 4, 4)


def test_training_input_selects_the_view():
    batch = LatentBatch(torch.randn(3, 2, 4, 4, 4), torch.zeros(3, dtype=torch.int64), [])
    device = torch.device("cpu")
    assert torch.equal(batch.training_input(device), batch.moments[:, 0])
    flipped = batch.training_input(device, flip=torch.tensor([True, False, True]))
    assert torch.equal(flipped, torch.stack([batch.moments[0, 1], batch.moments[1, 0], batch.moments[2, 1]]))


def test_latents_are_encoded_once(encoded):
    first = cache()
    assert sum(encoded) == 100
    assert max(encoded) == 8
    encoded.clear()
    again = cache()
    assert encoded == []
    everything = list(range(100))
    assert torch.equal(first.__getitems__(everything).moments, again.__getitems__(everything).moments)


def test_encoding_with_an_unfrozen_autoencoder_keeps_no_graph():
    config = make_config()
    cached = cache_latents(config, process(), digits(config), make_vae().requires_grad_(True), SHAPE)
    assert not cached.moments[0].requires_grad


def test_lazily_decoded_images_are_cached(tmp_path, monkeypatch, caplog):
    """One image cannot be read. It is replaced as without the cache, and reported by every run."""
    save_folder_with_broken_image(tmp_path / "data")
    monkeypatch.setattr(data, "MAX_CACHED_BYTES", 0)
    monkeypatch.setattr(latents, "FILE_SIZE", 7)
    settings = {"train_data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    config = make_config(max_unreadable_fraction=0.1, **settings)
    dataset = training_dataset(load_labelled_images(config), config, 1, show_progress=False)
    everything = list(range(20))
    batch = dataset.__getitems__(everything)
    assert len(batch.unreadable) == 1
    for _ in range(2):
        caplog.clear()
        cached = cache(config, dataset)
        assert "1 images could not be read: row 9 (" in caplog.text
        moments, class_labels, unreadable = cached.__getitems__(everything)
        torch.testing.assert_close(moments[:, 0], posteriors(batch.images), **CLOSE)
        assert torch.equal(class_labels, batch.class_labels)
        assert unreadable == []
    with pytest.raises(UserError, match="1 of 20 images cannot be read.*row 9"):
        cache(make_config(max_unreadable_fraction=0.01, **settings), dataset)


def test_processes_divide_the_encoding(encoded):
    config = make_config()

    def latents_of(index: int) -> CachedLatents:
        return cache_latents(config, process(index, 2), digits(config), make_vae(), SHAPE)

    # Process 1 does not see the files of process 0
    with pytest.raises(
        UserError, match="cannot store latents in .*0-39.safetensors.*Every process must be able to read"
    ):
        latents_of(1)
    assert sum(encoded) == 40
    assert len(latents_of(0)) == sum(encoded) == 100
    assert len(latents_of(1)) == sum(encoded) == 100


def test_different_data_or_settings_are_encoded_separately(folder, encoded):
    plain, flipped, coarse = make_config(), make_config(random_flip=True), make_config(resolution=16)
    changed = digits(plain)
    changed.images[-1, 0, 0, 0] ^= 1
    relabelled = digits(plain)
    relabelled.class_labels[-1] = -1
    cases = [(plain, None, 0), (plain, None, 1), (flipped, None, 0), (plain, changed, 0), (plain, relabelled, 0)]
    for i, (config, dataset, seed) in enumerate(cases, start=1):
        encoded.clear()
        cache(config, dataset, seed)
        assert sum(encoded) == (200 if config is flipped else 100)
        assert len(list(folder.iterdir())) == i
    encoded.clear()
    assert cache_latents(coarse, process(), digits(coarse), make_vae(), (2, 8, 8)).moments[0].shape[-1] == 8
    assert sum(encoded) == 100
    assert len(list(folder.iterdir())) == 6


def test_each_dtype_is_encoded_separately(folder, encoded):
    cache()
    encoded.clear()
    config = make_config()
    cached = cache_latents(config, process(), digits(config), make_vae().bfloat16(), SHAPE)
    assert sum(encoded) == 100
    assert cached.moments[0].dtype == torch.bfloat16
    assert len(list(folder.iterdir())) == 2


def test_damaged_and_foreign_files_are_encoded_again(folder, encoded, caplog):
    everything = list(range(100))
    first = cache().__getitems__(everything)  # a copy, since the cache is memory-mapped
    paths = sorted(folder.glob("*/*"))
    good = [path.read_bytes() for path in paths]
    cache(vae_seed=1)
    (foreign,) = set(folder.glob("*/80-99.safetensors")) - set(paths)

    paths[0].write_bytes(good[0][:-1000])
    paths[1].write_bytes(good[1][:-1000] + bytes([good[1][-1000] ^ 1]) + good[1][-999:])
    shutil.copy(foreign, paths[2])
    encoded.clear()
    again = cache()
    assert sum(encoded) == 100
    for path in paths:
        assert f"{path} is damaged or holds different latents. Encoding its images again." in caplog.text
    assert torch.equal(again.__getitems__(everything).moments, first.moments)

    paths[1].unlink()
    encoded.clear()
    cache()
    assert sum(encoded) == 40


def test_insufficient_disk_space_is_reported_before_encoding(folder, encoded, monkeypatch):
    left = [25_599]

    def disk_usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=left[0] if folder in [path, *path.parents] else 1e9)

    monkeypatch.setattr(latents.shutil, "disk_usage", disk_usage)
    # 100 images · 4 × 4 · 2 channels · 2 moments · 4 bytes
    with pytest.raises(UserError, match=r"needs 0\.03 MB for the latents of 100 images, but .* has 0\.03 MB free"):
        cache()
    assert (encoded, list(folder.rglob("*.*"))) == ([], [])
    left[0] = 25_600
    cache()
    # Files that exist need no space
    left[0] = 0
    cache()
    assert sum(encoded) == 100


def test_disk_that_fills_up_during_encoding_is_reported(folder, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match="--cache_latents cannot store latents in .*No space left on device"):
        cache()
    assert list(folder.rglob("*.*")) == []


def test_caching_without_an_autoencoder_is_refused():
    config = TrainConfig(resolution=8, pretrained_model_name_or_path="a/model", cache_latents=True)
    dataset = CachedImages(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="--cache_latents needs an autoencoder, but a/model has none"):
        cache_latents(config, process(), dataset, None, SHAPE)
