"""Test that the recipes for CIFAR-10 and ImageNet pass `--dry_run`, and that each says what it is based on."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from tests.support.commands import load_command
from tests.support.latents import make_deterministic_vae
from tests.support.runs import TRAINING, reset_accelerate

CONFIGS = TRAINING / "configs"
RECIPES = sorted(path.name for path in [*CONFIGS.glob("cifar10*.yaml"), *CONFIGS.glob("imagenet*.yaml")])
# The networks of ImageNet have 300 to 420 M parameters, which take seconds to initialize.
SIZES = [pytest.param(name, marks=pytest.mark.slow) if name.startswith("imagenet") else name for name in RECIPES]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder of color images of two classes, as many as a batch has."""
    folder = tmp_path_factory.mktemp("data") / "images"
    pixels = np.random.default_rng(0).integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def sd_autoencoder() -> AutoencoderKL:
    """Return an autoencoder with random weights and the latents of Stable Diffusion's: 4 channels, 8 times smaller."""
    levels: dict[str, Any] = {
        "block_out_channels": (4,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(norm_num_groups=4, latent_channels=4, **levels)


@pytest.mark.parametrize("name", SIZES)
def test_recipe_passes_a_dry_run(name, images, tmp_path, capsys):
    """The data and the autoencoder are local ones; all other settings are the recipe's."""
    text = (CONFIGS / name).read_text(encoding="utf-8")
    argv = ["--config", str(CONFIGS / name), "--dataset_name", str(images), "--image_column", "image", "--dry_run"]
    argv += ["--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    samples = {"cifar10": "3×32×32", "imagenet64": "3×64×64", "imagenet128": "3×128×128"}
    if "latents" in name:
        (make_deterministic_vae(3, 6, 32) if "512" in name else sd_autoencoder()).save_pretrained(tmp_path / "vae")
        argv += ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae")]
        samples |= {"imagenet256": "4×32×32", "imagenet512": "32×16×16"}
    reset_accelerate()
    load_command("train_ddgan" if "ddgan" in name else "train_cfg").main(argv)
    plan = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert plan["samples"] == samples[re.split(r"[-.]", name)[0]]
    if stated := re.search(r"([\d.]+) M parameters", text):
        settings = yaml.safe_load(text)
        if network := settings.get("model_config_name_or_path"):
            settings = json.loads((CONFIGS / network).read_text())
        # The images have two classes. Each row of the class embedding has four times the channels of the first level.
        missing = ((10 if "cifar" in name else 1000) - 2) * 4 * settings["block_out_channels"][0] / 1e6
        number = float(plan["generator" if "ddgan" in name else "unet"].split()[0])
        assert number + missing == pytest.approx(float(stated[1]), abs=0.11)  # the plan has one decimal
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_its_sources_cost_and_target(name):
    head = (CONFIGS / name).read_text(encoding="utf-8").split("\ndataset_name")[0]
    assert re.search(r"arXiv \d{4}\.\d{5}|cifar10\.yaml", head)
    assert "ot run" in head or "only been run for" in head or "not been run" in head
    assert "ost: " in head
    assert "arget" in head


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_in_the_documents(name):
    assert f"configs/{name}" in (TRAINING / "README.md").read_text(encoding="utf-8")
