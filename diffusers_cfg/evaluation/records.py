"""Read what a training run recorded next to its model."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError
from diffusers_cfg.model_files import RUN
from diffusers_cfg.settings import CONFIG_FILE, DataConfig, data_source

logger = logging.getLogger(__name__)


def noise_process(pipeline: CFGPipeline) -> LogSNRScheduler:
    """
    Return the noise process that a pipeline's network was trained with; the scheduler's, if it records none.

    Raises:
        UserError: if the network is a generator, whose process has no log-SNR in continuous time.
    """
    if pipeline.unet.latent_dim is not None:
        name = pipeline.name_or_path or "The model"
        raise UserError(
            f"{name} is a denoising diffusion GAN: its generator draws images in {pipeline.num_inference_steps} steps "
            "and predicts at no other noise level. Use a model of train_cfg.py or train_vdm.py."
        )
    process = pipeline.unet.noise_process or {}
    # `from_config` is annotated to return a tuple as well, but does so only with `return_unused_kwargs`.
    return cast(LogSNRScheduler, LogSNRScheduler.from_config(pipeline.scheduler.config, **process))


def run_record(pipeline: CFGPipeline) -> dict[str, Any]:
    """Return the contents of the run.json of a model, empty if there is none. Warn if it is damaged."""
    return read_if_intact(Path(pipeline.name_or_path) / RUN, json.loads) if pipeline.name_or_path else {}


def recorded_data(model: str, pipeline: CFGPipeline) -> dict[str, Any] | None:
    """Return the data settings of the training run, from its config or its record, or `None` if they are unknown."""
    # The data settings have the same names in the configs of all methods.
    known = read_if_intact(Path(model) / CONFIG_FILE, yaml.safe_load) or run_record(pipeline).get("data")
    if not isinstance(known, dict):
        return None
    names = {setting.name for setting in fields(DataConfig)}
    return {name: value for name, value in known.items() if name in names}


def names_data(settings: Mapping[str, Any]) -> bool:
    """Return whether settings name a dataset or a folder."""
    return "dataset_name" in settings or "train_data_dir" in settings


def data_config(model: str, given: Mapping[str, Any], pipeline: CFGPipeline) -> DataConfig:
    """
    Return the settings of the data of a model: those of its training run, unless others are given.

    Args:
        model (`str`): the folder or repository of the model.
        given (`Mapping[str, Any]`): settings of `DataConfig` that override the training settings. If they name a
            dataset, the training settings are ignored.
        pipeline (`CFGPipeline`): the pipeline of the model, which determines the resolution.

    Returns:
        The settings. `train_val_split` is that of the training run for the same data, and 0 for other data, such as
        another split.

    Raises:
        UserError: if the training data is unknown, or a setting is wrong.
    """
    recorded = recorded_data(model, pipeline)
    if recorded is None and not names_data(given):
        raise UserError(
            f"The training data of {model} is unknown or not public. Pass --dataset_name or --train_data_dir."
        )
    recorded = recorded or {}
    settings = {**({} if names_data(given) else recorded), **given}
    is_same = data_source(settings) == data_source(recorded)
    settings["train_val_split"] = recorded.get("train_val_split", 0.0) if is_same else 0.0
    return DataConfig(**{**settings, "resolution": pipeline.image_shape[1], "streaming": False})


def read_if_intact(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the contents of a JSON or YAML file, empty if there is no file. Warn if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return dict(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return {}
