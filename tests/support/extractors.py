"""Make tiny feature extractors of transformers, which run in milliseconds."""

import json
from pathlib import Path

from transformers import Dinov2Config, PreTrainedModel, ViTConfig

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
