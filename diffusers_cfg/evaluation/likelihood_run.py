"""Evaluate the likelihood bound of a model: estimate the terms of all images, and write a report."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError
from diffusers_cfg.data.unreadable import warn_about_unreadable
from diffusers_cfg.evaluation.likelihood import (
    END_TOLERANCE,
    ImageTerms,
    check_ends,
    check_model,
    estimate,
    has_null_class,
)
from diffusers_cfg.evaluation.likelihood_data import EvaluatedImages, load_images
from diffusers_cfg.evaluation.likelihood_reports import (
    TRAINING_FIGURE,
    VARIANCE_FIGURE,
    logged_bounds,
    plot_training,
    steps_text,
    write_likelihood,
)
from diffusers_cfg.evaluation.likelihood_summary import error_moments, summarize
from diffusers_cfg.evaluation.loss_variance import variances
from diffusers_cfg.evaluation.records import noise_process, recorded_data
from diffusers_cfg.evaluation.sample_sets import claimed
from diffusers_cfg.evaluation.sampling import check_call, load_model
from diffusers_cfg.evaluation.schedule_figures import plot_schedules, plot_variance, schedules_between
from diffusers_cfg.evaluation.settings import LikelihoodConfig
from diffusers_cfg.evaluation.sweep import check_folders, output_folder
from diffusers_cfg.files import atomic_write, digest, read_safetensors
from diffusers_cfg.model_files import NOISE_SCHEDULE, SCHEDULE_PICTURE
from diffusers_cfg.noise_schedule import NoiseSchedule, Schedule, linear
from diffusers_cfg.variational_bound import bits_per_dim

logger = logging.getLogger(__name__)

# The folder of the terms in the output folder.
TERMS = "likelihood"
# Images per shard. A killed process loses at most one shard, which takes some thousand network evaluations.
SHARD_SIZE = 32


class TermSet:
    """
    The terms of the bound with T steps of all images on disk, in shards such as `shard-00000.npz`.

    Args:
        folder (`Path`): the folder of the shards.
        num_images (`int`): the number of images. A smaller set can reuse the shards of a larger one.
    """

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder, self.shards = folder, [*torch.arange(num_images).split(SHARD_SIZE)]

    def path(self, shard: torch.Tensor) -> Path:
        """Return the path of a shard, which is given by the indices of its images."""
        return self.folder / f"shard-{int(shard[0]) // SHARD_SIZE:05}.npz"

    def has(self, shard: torch.Tensor, class_labels: torch.Tensor, times_per_image: int) -> bool:
        """Return whether a shard exists, is intact, and has as many times and the same labelled images."""
        if not self.path(shard).is_file():
            return False
        try:
            terms = self.load(shard)
            is_intact = self.is_intact(terms, class_labels, times_per_image)
        except Exception as error:  # a damaged file raises exceptions of many types
            logger.warning("%s is damaged (%s) and computed again.", self.path(shard), error)
            return False
        return is_intact

    @staticmethod
    def is_intact(terms: ImageTerms, class_labels: torch.Tensor, times_per_image: int) -> bool:
        """Return whether terms have the shapes of these images, and are finite except where a class is unknown."""
        images, errors = len(class_labels), (len(class_labels), times_per_image, 2)
        shapes = [tuple(values.shape) for values in terms]
        if shapes != [(images,), (images,), (images, 2), errors[:2], errors]:
            return False
        known = ~terms.diffusion.isnan()
        return (
            torch.equal(known[:, 0], class_labels >= 0)
            and torch.equal(terms.diffusion.isfinite(), known)
            and torch.equal(terms.error.isfinite(), known[:, None].expand(errors))
            and all(bool(values.isfinite().all()) for values in (terms.prior, terms.reconstruction, terms.gamma))
        )

    def save(self, shard: torch.Tensor, terms: ImageTerms) -> None:
        """Write a shard atomically."""
        with atomic_write(self.path(shard)) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **{name: value.numpy() for name, value in terms._asdict().items()})

    def load(self, shard: torch.Tensor) -> ImageTerms:
        """Read a shard. A missing or damaged one raises an exception of any type."""
        with np.load(self.path(shard)) as file:
            return ImageTerms(*(torch.from_numpy(file[name][: len(shard)]) for name in ImageTerms._fields))

    def load_all(self) -> ImageTerms:
        """Read all shards."""
        return ImageTerms.concatenate(map(self.load, self.shards))


def term_folder(output_dir: Path, steps: int) -> Path:
    """Return the folder of the terms with T steps in an output folder; 0 is continuous time."""
    return output_dir / TERMS / f"T={steps or 'inf'}"


def run_likelihood(config: LikelihoodConfig, accelerator: Accelerator) -> dict[str, Any]:
    """
    Estimate the bound of a model with each number of steps, and write a report to `output_folder(config)`. Existing
    terms are reused, so that an interrupted evaluation resumes.

    Args:
        config (`LikelihoodConfig`): the settings of the command `evaluate_likelihood.py`.
        accelerator (`Accelerator`): the processes that share the work.

    Returns:
        On the main process the contents of likelihood.json; on the other processes an empty dictionary.

    Raises:
        UserError: if the settings do not fit the model, the data or the existing terms, or a file cannot be written.
    """
    pipeline = load_model(config).to(accelerator.device)
    check_model(pipeline)
    check_call(pipeline, guidance_scale=0.0)  # whether the noise process of the network is known
    process, learned = noise_process(pipeline), load_schedule(pipeline)
    ends = ends_of(config, process)
    schedule = choose_schedule(config, ends, learned)
    check_ends(process, schedule)
    output_dir = output_folder(config)
    check_folders(config, {**(recorded_data(config.model, pipeline) or {}), **config.given_data})
    with accelerator.main_process_first():
        images = load_images(config, pipeline, accelerator.is_main_process)
    check_labels(config, images, pipeline)
    measured = {
        **{name: getattr(config, name) for name in ("times_per_image", "seed", "noise_schedule")},
        "log_snr_max": -ends[0],
        "log_snr_min": -ends[1],
    }
    contents = {
        "images": config.images,
        "data": images.fingerprint,
        "network": digest(pipeline.unet.state_dict()),
        "shape": digest(learned.state_dict()) if learned is not None and schedule is learned else None,
    }
    with claimed(output_dir / TERMS, {**measured, **contents}, accelerator):
        # Finite numbers of steps first
        order = sorted(config.diffusion_steps, key=lambda steps: steps or float("inf"))
        sets = {steps: TermSet(term_folder(output_dir, steps), len(images.class_labels)) for steps in order}
        estimate_sets(config, accelerator, pipeline, schedule, images, sets)
        if not accelerator.is_main_process:
            return {}
        terms = {steps: term_set.load_all() for steps, term_set in sets.items()}
        shape = pipeline.image_shape
        record = {
            **images.facts,
            **measured,
            "image_shape": list(shape),
            "prediction_type": process.config.prediction_type,
            **summarize(terms, images.class_labels, images.class_log_probs, pipeline.id2label, shape),
        }
        has_shape = learned is not None and learned.learn_shape and are_same(ends, learned.ends())
        schedules = schedules_between(ends, learned if has_shape else None)
        plot_schedules(schedules, output_dir / SCHEDULE_PICTURE)
        if 0 in terms:
            moments = error_moments(terms[0], images.class_labels, ends)
            record["variance"] = variances(moments, schedules, bits_per_dim(shape))
            plot_variance(moments, schedules, record["variance"], bits_per_dim(shape), output_dir / VARIANCE_FIGURE)
        if logged := logged_bounds(Path(config.model)):
            plot_training(logged, output_dir / TRAINING_FIGURE)
        write_likelihood(output_dir, record)
    return record


def ends_of(config: LikelihoodConfig, process: LogSNRScheduler) -> tuple[float, float]:
    """Return the ends γ₀ and γ₁ of the bound: those of the noise process unless the settings name others."""
    first = process.config.log_snr_max if config.log_snr_max is None else config.log_snr_max
    last = process.config.log_snr_min if config.log_snr_min is None else config.log_snr_min
    return -first, -last


def load_schedule(pipeline: CFGPipeline) -> NoiseSchedule | None:
    """
    Load the noise schedule that a training run has saved beside its model, in float64. Return `None` if there is none.

    Raises:
        UserError: if the file is damaged, or has other ends than the model.
    """
    path = Path(pipeline.name_or_path) / NOISE_SCHEDULE
    if not path.is_file():
        return None
    try:
        tensors, _ = read_safetensors(path)
        ends = tensors["gamma_0"].item(), tensors["gamma_1"].item()
        hidden = {"hidden_size": len(tensors["w2"])} if "w2" in tensors else {}
        schedule = NoiseSchedule(*ends, learn_ends=False, learn_shape=bool(hidden), **hidden)
        schedule.load_state_dict(tensors)
        if not schedule(torch.linspace(0, 1, 101)).gamma_slope.isfinite().all():
            raise ValueError("its γ(t) is not finite")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(" .")  # PyTorch describes wrong tensors in several lines
        raise UserError(f"{path} cannot be read: {reason}. Restore the file, or remove it.") from error
    process = noise_process(pipeline).config
    expected = -process.log_snr_max, -process.log_snr_min
    if not are_same(ends, expected):
        raise UserError(
            f"{path} belongs to another model: its γ goes from {ends[0]:g} to {ends[1]:g}, but that of the model from "
            f"{expected[0]:g} to {expected[1]:g}. Restore the file of this model, or remove it."
        )
    return schedule.double().requires_grad_(False)


def are_same(ends: tuple[float, float], others: tuple[float, float]) -> bool:
    """Return whether two pairs of ends differ by rounding only."""
    return max(abs(end - other) for end, other in zip(ends, others, strict=True)) <= END_TOLERANCE


def choose_schedule(config: LikelihoodConfig, ends: tuple[float, float], learned: NoiseSchedule | None) -> Schedule:
    """Return the schedule of the settings. Raise `UserError` if there is no learned one."""
    if config.noise_schedule == "linear":
        return linear(*ends)
    if learned is None:
        raise UserError(
            f"--noise_schedule learned needs the file {NOISE_SCHEDULE}, which train_vdm.py writes beside the model and "
            f"which is not published, but {config.model} has none. Pass --noise_schedule linear."
        )
    return learned


def check_labels(config: LikelihoodConfig, images: EvaluatedImages, pipeline: CFGPipeline) -> None:
    """Raise `UserError` if the images have no labels and the model no null class."""
    if bool((images.class_labels < 0).all()) and not has_null_class(pipeline):
        raise UserError(
            f"The images have no labels, but {config.model} was trained with conditioning_dropout_prob = 0 and models "
            "images of a class only. Pass labelled images, or --label_column."
        )


def estimate_sets(
    config: LikelihoodConfig,
    accelerator: Accelerator,
    pipeline: CFGPipeline,
    schedule: Schedule,
    images: EvaluatedImages,
    sets: dict[int, TermSet],
) -> None:
    """
    Compute the missing shards of each number of steps.

    Args:
        config (`LikelihoodConfig`): the settings.
        accelerator (`Accelerator`): the processes that share the shards.
        pipeline (`CFGPipeline`), schedule (`Schedule`), images (`EvaluatedImages`): what to evaluate.
        sets (`dict[int, TermSet]`): the terms by the number of steps.
    """
    accelerator.wait_for_everyone()  # so that all processes find the same shards missing
    missing = [
        (steps, shard)
        for steps, terms in sets.items()
        for shard in terms.shards
        if not terms.has(shard, images.class_labels[shard], config.times_per_image)
    ]
    accelerator.wait_for_everyone()
    assigned = missing[accelerator.process_index :: accelerator.num_processes]
    labelled, null_class = images.class_labels >= 0, has_null_class(pipeline)
    total = sum(int(labelled[shard].sum()) + null_class * len(shard) for _, shard in assigned) * config.times_per_image
    disable = None if accelerator.is_main_process and assigned else True  # None hides the bar unless in a terminal
    with tqdm(total=total, unit="evaluation", unit_scale=True, desc="Evaluating", disable=disable) as progress:
        for number, (steps, shard) in enumerate(assigned, 1):
            progress.set_postfix_str(f"T = {steps_text(steps)}")
            if progress.disable:
                logger.info("Evaluating shard %d of %d, T = %s", number, len(assigned), steps_text(steps))
            batch = images.dataset.__getitems__(shard.tolist())
            warn_about_unreadable(set(batch.unreadable))
            terms = estimate(
                pipeline,
                batch.images,
                images.class_labels[shard],
                seed=config.seed,
                first_index=int(shard[0]),
                times_per_image=config.times_per_image,
                diffusion_steps=steps,
                schedule=schedule,
                batch_size=config.batch_size,
                null_class=null_class,
                progress=progress.update,
            )
            sets[steps].save(shard, terms)
    accelerator.wait_for_everyone()
