"""Provide fixtures for the evaluation tests."""

from pathlib import Path

import pytest

from diffusers_cfg.data.datasets import CachedImages, stack_images
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import features
from diffusers_cfg.settings import DataConfig
from tests.support.models import make_pipeline


@pytest.fixture(scope="module", autouse=True)
def quick_classifier():
    """Train the classifier of the dataset for only a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.train_classifier, "__defaults__", (30, 64))
        yield


@pytest.fixture
def model(tmp_path) -> Path:
    """Return the folder of a saved pipeline with random weights."""
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def digits() -> CachedImages:
    return stack_images(Digits(), DataConfig(resolution=8), 1, show_progress=False)


@pytest.fixture(scope="session")
def statistics_dir(tmp_path_factory) -> Path:
    """Return a folder that caches the digits' statistics under the quick classifier."""
    return tmp_path_factory.mktemp("statistics")
