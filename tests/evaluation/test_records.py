"""Test which data a model is compared with, from what its training run recorded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.records import data_config
from diffusers_cfg.method_settings import CFGConfig

PETS = {"dataset_name": "pets", "dataset_split": "all", "train_val_split": 0.25}


def config_of(folder: Path, recorded: dict[str, Any], given: dict[str, Any], pipeline: CFGPipeline) -> dict[str, Any]:
    """Return the data settings of a model with a train_config.yaml."""
    CFGConfig(**recorded).save(folder / "train_config.yaml")
    return vars(data_config(str(folder), given, pipeline))


@pytest.mark.parametrize(
    ("recorded", "given", "held_out"),
    [
        ({"train_val_split": 0.1}, {}, 0.1),  # the digits
        (PETS, {}, 0.25),
        (PETS, {"label_column": "species"}, 0.25),
        (PETS, {"dataset_name": "pets", "dataset_split": "all"}, 0.25),
        (PETS, {"dataset_split": "all"}, 0.25),
        (PETS, {"dataset_split": "test"}, 0.0),
        (PETS, {"dataset_config_name": "large"}, 0.0),
        (PETS, {"dataset_name": "pets"}, 0.0),  # the split "train"
        (PETS, {"dataset_name": "cars", "dataset_split": "all"}, 0.0),
        ({"train_val_split": 0.1}, {"dataset_name": "pets"}, 0.0),
        ({"train_data_dir": "pets", "train_val_split": 0.1}, {"train_data_dir": "cars"}, 0.0),
        ({"train_data_dir": "pets", "train_val_split": 0.1}, {"train_data_dir": os.path.abspath("pets")}, 0.1),
        ({"dataset_name": "pets", "streaming": True}, {}, 0.0),
    ],
)
def test_the_recorded_split_applies_to_the_recorded_data(tmp_path, pipeline, recorded, given, held_out):
    config = config_of(tmp_path, recorded, given, pipeline)
    assert config["train_val_split"] == held_out
    assert config.items() >= {**given, "streaming": False, "resolution": 8}.items()


def test_settings_of_the_recorded_data_do_not_apply_to_other_data(tmp_path, pipeline):
    recorded = {"dataset_name": "pets", "label_column": "species", "center_crop": False}
    config = config_of(tmp_path, recorded, {"dataset_split": "test"}, pipeline)
    assert config.items() >= {**recorded, "dataset_split": "test"}.items()
    config = config_of(tmp_path, recorded, {"dataset_name": "cars"}, pipeline)
    assert (config["dataset_name"], config["label_column"], config["center_crop"]) == ("cars", "label", True)


def test_the_split_of_a_published_model_is_read_from_its_record(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    saved = CFGPipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="The training data of .* is unknown or not public. Pass --dataset_name"):
        data_config(str(tmp_path), {}, saved)
    (tmp_path / "run.json").write_text(json.dumps({"data": {**PETS, "center_crop": False}}))
    config = data_config(str(tmp_path), {}, saved)
    assert (config.dataset_name, config.train_val_split, config.center_crop) == ("pets", 0.25, False)
    assert data_config(str(tmp_path), {"dataset_split": "test"}, saved).train_val_split == 0
    (tmp_path / "run.json").write_text(json.dumps({"data": {"dataset_name": "pets"}}))  # of an older version
    assert data_config(str(tmp_path), {}, saved).train_val_split == 0
