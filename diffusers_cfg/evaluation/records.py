"""Read what a training run recorded next to its model."""

import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from diffusers_cfg import CFGPipeline
from diffusers_cfg.model_files import RUN
from diffusers_cfg.settings import CONFIG_FILE, DataConfig

logger = logging.getLogger(__name__)


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


def read_if_intact(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the contents of a JSON or YAML file, empty if there is no file. Warn if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return dict(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        logger.warning("%s is damaged and not used: %s", path, error)
        return {}
