"""Compare a run with the checkpoint that it resumes: refuse some changes, and log and record others."""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from diffusers_cfg.config import Config, UserError
from diffusers_cfg.engine.checkpoint import Checkpoint
from diffusers_cfg.engine.method import Method

logger = logging.getLogger(__name__)

# What runs did before these settings existed
EARLIER = {"optimizer": "adamw", "posthoc_ema_steps": 0}


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that are saved in a checkpoint: the fixed and the recorded ones."""
    return {
        setting.name: getattr(config, setting.name)
        for setting in fields(config)
        if setting.metadata.get("on_resume") in ("fixed", "recorded")
    }


def identity_of(method: Method) -> dict[str, dict[str, Any]]:
    """Return what a resumed run must share with its checkpoint: each module's config and facts about the method."""
    configs = {
        name: {key: value for key, value in config.items() if not key.startswith("_")}
        for name, module in method.modules.items()
        if (config := getattr(module, "config", None)) is not None
    }
    facts = {
        "name": type(method).__name__,
        "modules": sorted(method.modules),
        "averaged": sorted(method.averaged),
        "objectives": [objective.name for objective in method.objectives],
        **method.identity(),
    }
    return json.loads(json.dumps({**configs, "method": facts}))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) for each name whose value differs. Names in only one of the mappings are ignored."""
    return {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}


def check_resumed(
    checkpoint: Checkpoint, config: Config, identity: Mapping[str, Any], data: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """
    Compare a run with the checkpoint that it resumes, and log the changes.

    Args:
        checkpoint (`Checkpoint`): the checkpoint.
        config (`Config`): the settings of the resumed run.
        identity (`Mapping`): the result of `identity_of` for the resumed run.
        data (`Mapping`): the result of `describe_data` for the resumed run.

    Returns:
        `list[dict]`: the history of the run, with `{"from_step": …, NAME: [old, new], …}` for each change.

    Raises:
        UserError: if a fixed setting, the data or the model has changed. The message names both values.
    """
    path, record = checkpoint
    changed = differences(EARLIER | record["settings"], json.loads(json.dumps(settings_of(config))))
    on_resume = {setting.name: setting.metadata.get("on_resume") for setting in fields(config)}
    if unknown := sorted(record["settings"].keys() - on_resume.keys()):
        logger.warning("%s has settings of a newer version, which are ignored: %s.", path, ", ".join(unknown))
    refused = {f"--{name}": values for name, values in changed.items() if on_resume[name] == "fixed"}
    for part, new in identity.items():
        differing = differences(record["identity"].get(part, new), new)
        refused |= {f"{name} of the {part}": values for name, values in differing.items()}
    if record["data"]["class_names"] != data["class_names"]:
        refused["classes of the data"] = (record["data"]["class_names"], data["class_names"])
    if refused:
        listed = "; ".join(f"{name} was {shorten(old)} and is {shorten(new)}" for name, (old, new) in refused.items())
        raise UserError(
            f"{path} cannot be resumed: {listed}. These values cannot change during a run. Restore the old values, or "
            "start a new run in a different --output_dir."
        )
    recorded = {name: list(values) for name, values in changed.items()}
    for name in ("num_images", "fingerprint"):
        if record["data"][name] != data[name]:
            recorded[f"data.{name}"] = [record["data"][name], data[name]]
    if not recorded:
        return record["history"]
    listed = "; ".join(f"{name} was {shorten(old)} and is {shorten(new)}" for name, (old, new) in recorded.items())
    logger.warning("From step %d on, the settings differ from %s: %s.", record["step"], path, listed)
    return [*record["history"], {"from_step": record["step"], **recorded}]


def shorten(value: Any, length: int = 200) -> str:
    """Return the `repr` of a value, shortened to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
