"""Save the model of a finished run with an average of another length, fitted to the snapshots of its post-hoc EMA."""

import json
import logging
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.engine.output import moved_together
from diffusers_cfg.engine.posthoc_ema import SIGMA_RELS, fit_profile, gamma_of, snapshot_steps
from diffusers_cfg.files import LOCK_FILE, check_unlocked, check_writable, digest, locked, read_safetensors
from diffusers_cfg.loading import check_pipeline_folder
from diffusers_cfg.model_files import NOISE_SCHEDULE, RUN, SCHEDULE_PICTURE, read_object, snapshots
from diffusers_cfg.settings import CONFIG_FILE

logger = logging.getLogger(__name__)

# The relative error of a profile above which a fit is reported with a warning, and above which it is refused
LARGE_RESIDUAL, MAX_RESIDUAL = 0.05, 0.25

# Files that do not depend on the average: the settings, which name local data for evaluations, and a noise schedule
# that is not learned
COPIED = (CONFIG_FILE, NOISE_SCHEDULE, SCHEDULE_PICTURE)
# (folder of the run, pipeline, parameters of the module, folder to save to) -> None
Saver = Callable[[Path, CFGPipeline, dict[str, torch.Tensor], Path], None]


def reconstruct(model: str, sigma_rel: float, output_dir: str, savers: Mapping[str, Saver]) -> float:
    """
    Save the pipeline of a run with the averages of length σ_rel at its last step.

    Args:
        model (`str`): the output folder of a run with `posthoc_ema_steps`.
        sigma_rel (`float`): the length σ_rel, in (0, 1/√12).
        output_dir (`str`): the folder to save to, which must be empty if it exists.
        savers (`Mapping[str, Saver]`): functions that save a pipeline with an averaged module that is no component of
            it, by the name of the module.

    Returns:
        `float`: the error of the profile, relative to its L2 norm.

    Raises:
        UserError: if the length cannot be represented, a folder is wrong, the run has not finished, or its snapshots
            are missing, damaged or of another network.
    """
    source, output = Path(model), Path(output_dir)
    try:
        gamma_of(sigma_rel)
    except ValueError as error:
        raise UserError(f"--{error} The snapshots have {' and '.join(map(str, SIGMA_RELS))}.") from error
    check_folders(source, output)
    try:
        run = read_object(source / RUN)
        found, missing = snapshots_of(source, run)
        fit = fit_profile(list(found), sigma_rel, run["steps"])
        check_residual(sigma_rel, fit.residual, missing)
        pipeline = CFGPipeline.from_pretrained(source)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--model {source}: {error}") from error
    averages = combine(list(found.values()), fit.coefficients)
    save = load_averages(source, pipeline, averages, savers)
    with locked(output, "--output_dir"), moved_together(output) as folder:
        save(folder)
        record = reconstructed_record(run, source, output, sigma_rel, fit.residual)
        (folder / RUN).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for name in COPIED:
            if (source / name).is_file() and not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)
    return fit.residual


def check_folders(source: Path, output: Path) -> None:
    """Raise UserError if the folder of the run has no finished model, or the output folder cannot be written to."""
    if not source.is_dir():
        raise UserError(f"--model {source} is not a folder. Pass the output folder of a run with --posthoc_ema_steps.")
    try:
        check_pipeline_folder(source, f"--model {source}")
    except OSError as error:
        raise UserError(str(error)) from error
    check_writable(output, "--output_dir")
    if output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir()):
        raise UserError(f"--output_dir {output} is not empty. Pass a different folder.")
    check_unlocked(output, "--output_dir")


def snapshots_of(source: Path, run: Mapping[str, Any]) -> tuple[dict[int, Path], list[int]]:
    """Return the snapshots of a run by step, and the steps of those that are missing. Raise UserError without any."""
    steps, interval = run.get("steps"), (run.get("config") or {}).get("posthoc_ema_steps", 0)
    if not isinstance(steps, int):
        raise UserError(f"--model {source} has no number of steps in its {RUN}. Pass the output folder of a run.")
    found = {step: path for step, path in snapshots(source).items() if step <= steps}
    if not found:
        raise UserError(
            f"--model {source} has no snapshots. Train with --posthoc_ema_steps, such as {steps // 15 or 1}."
        )
    missing = [step for step in snapshot_steps(interval, steps) if step not in found]
    if missing:
        logger.warning("Snapshots are missing in %s, those of the steps: %s", source, ", ".join(map(str, missing)))
    return found, missing


def check_residual(sigma_rel: float, residual: float, missing: Sequence[int]) -> None:
    """Warn if the error of a fitted profile is large. Raise UserError if it is too large."""
    if residual <= LARGE_RESIDUAL:
        return
    text = f"The snapshots represent the profile of --sigma_rel {sigma_rel:g} with an error of {residual:.1%}"
    advice = (
        "Restore the missing snapshots, or train again."
        if missing
        else f"A length closer to {' or '.join(map(str, SIGMA_RELS))}, or a run with a smaller --posthoc_ema_steps, "
        "has a smaller error."
    )
    if residual > MAX_RESIDUAL:
        raise UserError(f"{text}; at most {MAX_RESIDUAL:.0%} are accepted. {advice}")
    logger.warning("%s, so its average is less exact. %s", text, advice)


def combine(paths: Sequence[Path], coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """
    Return a linear combination of snapshots, summed in float64.

    Args:
        paths (`Sequence[Path]`): the files of the snapshots.
        coefficients (`np.ndarray`): the coefficients, `(snapshots, lengths)`.

    Raises:
        UserError: if a snapshot is damaged, or not of the same network as the others.
    """
    total: dict[str, torch.Tensor] = {}
    shapes: dict[str, torch.Size] | None = None
    for path, row in zip(paths, coefficients, strict=True):
        tensors, weights = read_snapshot(path), dict(zip(map("{:g}".format, SIGMA_RELS), row.tolist(), strict=True))
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if (shapes := shapes or found) != found or {name.partition("/")[0] for name in found} != weights.keys():
            raise UserError(f"{path} is of another network or version than {paths[0]}. Remove the one that is wrong.")
        for name, tensor in tensors.items():
            length, _, parameter = name.partition("/")
            if parameter not in total:
                total[parameter] = torch.zeros_like(tensor, dtype=torch.float64)
            total[parameter].add_(tensor, alpha=weights[length])
    return total


def read_snapshot(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a snapshot. Raise UserError if it is damaged."""
    try:
        tensors, metadata = read_safetensors(path)
        damage = None if digest(tensors) == metadata.get("digest") else "its contents do not match its checksum"
    except OSError as error:
        damage = str(error)
    if damage is not None:
        raise UserError(f"{path} is damaged ({damage}). Delete it to use the others, with a larger error.")
    return tensors


@torch.no_grad()
def load_averages(
    source: Path, pipeline: CFGPipeline, averages: Mapping[str, torch.Tensor], savers: Mapping[str, Saver]
) -> Callable[[Path], None]:
    """
    Load averages into the components of a pipeline, and return the function that saves it to a folder.

    Raises:
        UserError: if they are of another network.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, average in averages.items():
        module, _, parameter = name.partition(".")
        modules.setdefault(module, {})[parameter] = average.float()
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for name in (loaded := networks.keys() & modules.keys()):
        parameters = dict(networks[name].named_parameters())
        if {key: p.shape for key, p in parameters.items()} != {key: p.shape for key, p in modules[name].items()}:
            raise UserError(f"The snapshots in {source} are not of its {name}. They are of another run.")
        for key, parameter in parameters.items():
            parameter.copy_(modules[name][key])
    if not loaded:
        raise UserError(f"The snapshots in {source} have {', '.join(modules)}, but its pipeline {', '.join(networks)}.")
    for name in modules.keys() & savers.keys():
        return partial(savers[name], source, pipeline, modules[name])
    return pipeline.save_pretrained


def reconstructed_record(
    run: Mapping[str, Any], source: Path, output: Path, sigma_rel: float, residual: float
) -> dict[str, Any]:
    """Return the record of a run with the length of another average in place of what holds for the saved one."""
    record = {name: value for name, value in run.items() if name != "ema"}
    record["posthoc_ema"] = {"sigma_rel": sigma_rel, "relative_error": round(residual, 6)}
    # Measured with the weights that the run has saved
    record["method"] = {name: value for name, value in run.get("method", {}).items() if name != "classifier_accuracy"}
    if "command" in run:
        flags = {
            "--model": source.resolve().name,
            "--sigma_rel": f"{sigma_rel:g}",
            "--output_dir": output.resolve().name,
        }
        words = ["python", "training/reconstruct_ema.py", *(word for flag in flags.items() for word in flag)]
        record["command"] = f"{run['command']}\n{shlex.join(words)}"
    return record
