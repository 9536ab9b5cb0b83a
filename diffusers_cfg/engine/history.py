"""Compare a run with the checkpoint that it resumes: what must match, and what is logged and recorded."""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers_cfg.config import Config, UserError
from diffusers_cfg.engine.method import Method

logger = logging.getLogger(__name__)


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that a checkpoint remembers: those that are fixed or recorded."""
    return {
        setting.name: getattr(config, setting.name)
        for setting in fields(config)
        if setting.metadata.get("on_resume") in ("fixed", "recorded")
    }


def identity_of(method: Method) -> dict[str, dict[str, Any]]:
    """Return what must be the same for a checkpoint to fit: the config of each module, and what the method adds."""
    configs = {
        name: {key: value for key, value in module.config.items() if not key.startswith("_")}
        for name, module in method.modules.items()
        if hasattr(module, "config")
    }
    parts = {
        "name": type(method).__name__,
        "modules": sorted(method.modules),
        "averaged": sorted(method.averaged),
        "objectives": [objective.name for objective in method.objectives],
        **method.identity(),
    }
    return json.loads(json.dumps({**configs, "method": parts}))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) for each name in both that differs. What a later version added or removed is not compared."""
    return {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}


def check_resumed(
    path: Path, record: Mapping[str, Any], config: Config, identity: Mapping[str, Any], data: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """
    Compare a run with the checkpoint that it resumes, and log what changed.

    Args:
        path (`Path`): the checkpoint, for messages.
        record (`Mapping`): its `state.json`.
        config (`Config`), identity (`Mapping`): of the run that resumes, the latter from `identity_of`.
        data (`Mapping`): its `describe_data`.

    Returns:
        `list[dict]`: the history of the run, `{"from_step": …, NAME: [old, new], …}` for each change.

    Raises:
        UserError: something that is fixed has changed; the message names both values.
    """
    changed = differences(record["settings"], json.loads(json.dumps(settings_of(config))))
    on_resume = {setting.name: setting.metadata.get("on_resume") for setting in fields(config)}
    refused = {f"--{name}": values for name, values in changed.items() if on_resume[name] == "fixed"}
    for part, new in identity.items():
        differing = differences(record["identity"].get(part, new), new)
        refused |= {f"{name} of the {part}": values for name, values in differing.items()}
    if record["data"]["class_names"] != data["class_names"]:
        refused["classes of the data"] = (record["data"]["class_names"], data["class_names"])
    if refused:
        listed = "; ".join(f"{name} was {shorten(old)} and is {shorten(new)}" for name, (old, new) in refused.items())
        raise UserError(
            f"{path} cannot be resumed: {listed}. These are fixed for a run: go back to the old values, or start "
            "another run in another --output_dir."
        )
    recorded = {name: list(values) for name, values in changed.items()}
    for name in ("num_images", "fingerprint"):
        if record["data"][name] != data[name]:
            recorded[f"data.{name}"] = [record["data"][name], data[name]]
    if not recorded:
        return record["history"]
    listed = "; ".join(f"{name} was {shorten(old)} and is {shorten(new)}" for name, (old, new) in recorded.items())
    logger.warning("From step %d on the run differs from the one in %s: %s.", record["step"], path, listed)
    return [*record["history"], {"from_step": record["step"], **recorded}]


def shorten(value: Any, length: int = 200) -> str:
    """Return a value as text of limited length."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
