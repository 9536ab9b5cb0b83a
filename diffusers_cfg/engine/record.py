"""Write `run.json`, the facts about a training run that the model card shows, and say how to use its model."""

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator

import diffusers_cfg
from diffusers_cfg.config import UserError
from diffusers_cfg.data.naming import is_built_in, local_name, public_name
from diffusers_cfg.engine.method import Method
from diffusers_cfg.engine.plan import num_parameters
from diffusers_cfg.engine.state import TrainState
from diffusers_cfg.model_files import RUN, read_object
from diffusers_cfg.settings import TrainConfig

# The settings that are needed to load the same data.
DATA_SETTINGS = (
    *("dataset_name", "dataset_config_name", "dataset_split", "train_val_split"),
    *("stack", "image_column", "label_column", "center_crop"),
)


def write_run_record(
    folder: Path,
    config: TrainConfig,
    accelerator: Accelerator,
    method: Method,
    state: TrainState,
    num_images: int | None,
) -> None:
    """Write `run.json` to a folder, without secrets or local paths, since it is published."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    dataset = public_name(config.dataset_name)
    data = {setting: getattr(config, setting) for setting in DATA_SETTINGS}
    record = {
        "dataset": dataset or local_name(config),
        "dataset_id": dataset,
        "data": data if dataset or is_built_in(config) else None,
        "num_images": num_images,
        "base_model": public_name(config.pretrained_model_name_or_path),
        "license": config.license,
        "num_parameters": num_parameters(method, averaged=True),
        "steps": state.step,
        "batch_size": state.batch_size,
        "learning_rate": config.learning_rate,
        "ema": ", ".join(map(str, config.ema_decays)) or None,
        "mixed_precision": accelerator.mixed_precision,
        "hardware": f"{accelerator.num_processes} × {name}",
        "seconds": round(state.seconds),
        "seed": config.seed,
        "method": method.facts(),
        "command": public_command(config, sys.argv),
        "config": public_config(config),
        "versions": {
            module.__name__.replace("_", "-"): module.__version__ for module in (diffusers_cfg, diffusers, torch)
        },
        "history": [without_paths(change) for change in state.history] or None,
    }
    path = folder / RUN
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}, indent=2) + "\n", encoding="utf-8")


def is_completed(config: TrainConfig) -> bool:
    """
    Return whether the run of these settings has finished, for commands that skip completed runs.

    Raises:
        UserError: if a run with other settings has finished in the same folder, or its record is damaged.
    """
    path = Path(config.output_dir) / RUN
    if not path.is_file():
        return False
    repeat = f"Pass a different --output_dir, or delete {path.parent} to repeat the run."
    try:
        recorded = read_object(path).get("config")
    except ValueError as error:
        raise UserError(f"{error} {repeat}") from error
    if not isinstance(recorded, dict):
        raise UserError(f"{path} does not contain the settings of a run. {repeat}")
    fixed = {field.name for field in fields(config) if field.metadata.get("on_resume") != "free"}
    current = json.loads(json.dumps(public_config(config)))
    differs = [
        f"--{name} was {recorded[name]} and is {value}"
        for name, value in current.items()
        if name in fixed and name in recorded and recorded[name] != value
    ]
    if differs:
        raise UserError(f"The run in {path.parent} was completed with other settings: {'; '.join(differs)}. {repeat}")
    return True


def without_paths(change: dict[str, Any]) -> dict[str, Any]:
    """Return a change of settings with each local path replaced by its last component."""
    return {
        name: value if name == "from_step" else [without_path(old_or_new) for old_or_new in value]
        for name, value in change.items()
    }


def public_config(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that affect the weights, without local paths."""
    names = {field.name for field in fields(config) if field.metadata.get("on_resume") != "free"}
    names |= {"train_batch_size", "gradient_accumulation_steps"}
    return {name: without_path(value) for name, value in config.public().items() if name in names}


def public_command(config: TrainConfig, argv: list[str]) -> str | None:
    """
    Return the command line of a run without secrets and local paths, or `None` if no command of `training` started it.

    Args:
        config (`TrainConfig`): the settings of the run, which tell which flags are secret.
        argv (`list[str]`): the script and its arguments, as in `sys.argv`.
    """
    path = Path(argv[0]).resolve()
    folder = path.parent.parent if path.parent.name == "studies" else path.parent
    if folder.name != "training":
        return None
    secrets = {field.name for field in fields(config) if field.metadata.get("secret")}
    shown, flag = [], ""
    for argument in argv[1:]:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            flag = name.removeprefix("--").replace("-", "_")
            argument = name if not equals else f"{name}={without_path(value)}"
        else:
            argument = without_path(argument)
        if flag not in secrets:
            shown.append(argument)
    return shlex.join(["python", path.relative_to(folder.parent).as_posix(), *shown])


def without_path(value: Any) -> Any:
    """Return a value, or its last component if it is a local path."""
    return value if not isinstance(value, str) or public_name(value) else Path(value).name


def describe_saved(output_dir: str, example: str) -> str:
    """Return the message at the end of a run: where the model is, and code that loads it and runs the example."""
    shown = json.dumps(output_dir, ensure_ascii=False)
    return (
        f"\nSaved the pipeline to {output_dir}, and samples to {output_dir}/samples. Generate an image with:\n\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({shown}, trust_remote_code=True)\n"
        f"{example}"
    )


def describe_demo(output_dir: str) -> str:
    """Return the command that shows the model of a run in the browser."""
    return f"\nTry the model in the browser:\n\npython training/demo.py --model {shlex.quote(output_dir)}"
