"""What a run has to say about itself, for the model card."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from checkpoint import TrainState
from config import DataConfig, TrainConfig


def write_run_record(config: TrainConfig, accelerator: Accelerator, state: TrainState, num_images: int | None) -> None:
    """Write `run.json`: facts that others may know, so no paths of this machine and no secrets."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    dataset = public_name(config.dataset_name)
    record = {
        "dataset": dataset or local_name(config),
        "dataset_id": dataset,
        "data": data_settings(config) if dataset or is_built_in(config) else None,
        "num_images": num_images,
        "base_model": public_name(config.pretrained_model_name_or_path),
        "license": config.license,
        "num_parameters": state.unet.num_parameters(),
        "steps": state.step,
        "batch_size": state.batch_size,
        "learning_rate": config.learning_rate,
        "ema": ", ".join(map(str, config.ema_decays)) or None,
        "mixed_precision": accelerator.mixed_precision,
        "hardware": f"{accelerator.num_processes} × {name}",
        "seconds": round(state.seconds),
        "seed": config.seed,
    }
    path = Path(config.output_dir) / "run.json"
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}, indent=2) + "\n", encoding="utf-8")


def is_built_in(config: DataConfig) -> bool:
    return config.dataset_name is None and config.train_data_dir is None


def data_settings(config: TrainConfig) -> dict[str, Any]:
    """How the data was read, for those who want to read it in the same way."""
    names = ["dataset_name", "dataset_config_name", "dataset_split", "image_column", "label_column", "center_crop"]
    return {name: getattr(config, name) for name in names}


def public_name(name_or_path: str | None) -> str | None:
    """A name on the Hub, if it is one and not a path."""
    if name_or_path is None or Path(name_or_path).exists() or name_or_path.count("/") > 1 or name_or_path[0] in "./~":
        return None
    return name_or_path


def local_name(config: DataConfig) -> str:
    """What to call data that is not on the Hub: the last part of its path."""
    if is_built_in(config):
        return "scikit-learn's digits"
    return Path(config.dataset_name or config.train_data_dir).resolve().name
