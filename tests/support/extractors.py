"""Make tiny feature extractors of transformers and of torch-fidelity, which run in milliseconds."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Config, PreTrainedModel, ViTConfig

from diffusers_cfg.evaluation.features import Inception

CLASSES = {0: "a", 1: "b", 2: "c"}
LABELS = {"id2label": CLASSES, "label2id": {name: i for i, name in CLASSES.items()}}
VIT = ViTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=32,
    patch_size=8,
    **LABELS,
)
DINOV2 = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)


def save_extractor(model: PreTrainedModel, folder: Path, size: int = 32) -> str:
    """Save a network with an image processor. Return the folder."""
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": size, "width": size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


class TinyInception(nn.Module):
    """
    Stand in for torch-fidelity's Inception, whose weights are a download: 16 features, 5 logits and spatial features of
    2×2 positions.
    """

    num_features, num_classes, num_spatial_features = 16, 5, 2 * 2 * 7

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Conv2d(3, 9, 1)})
            self.features, self.fc = nn.Linear(3 * 4 * 4, self.num_features), nn.Linear(self.num_features, 5)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.uint8
        pixels = images.float() / 255
        self.Mixed_6d["branch1x1"](F.adaptive_avg_pool2d(pixels, 2))
        features = self.features(F.adaptive_avg_pool2d(pixels, 4).flatten(1)).relu()
        return features, self.fc(features)


def use_tiny_inception(patch: pytest.MonkeyPatch) -> None:
    """Make `--feature_extractor inception` load a `TinyInception` in place of torch-fidelity's network."""
    mock_torch_fidelity(patch, TinyInception)
    for name in ("num_features", "num_classes", "num_spatial_features"):
        patch.setattr(Inception, name, getattr(TinyInception, name))


def mock_torch_fidelity(patch: pytest.MonkeyPatch, network: Callable) -> None:
    """Replace torch-fidelity, which need not be installed, by a module with the given network."""
    package = types.ModuleType("torch_fidelity")
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = network
    patch.setitem(sys.modules, "torch_fidelity", package)
    patch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
