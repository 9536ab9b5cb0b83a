"""Evaluate a model over guidance scales w: generate samples for each w and compare them with the model's data."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import training_dataset
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.data.labels import UNLABELLED, first_names
from diffusers_cfg.data.naming import local_name
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.evaluation.by_class import class_table, measure_classes
from diffusers_cfg.evaluation.class_labels import choose_class_labels, classes_of, parse_class_labels
from diffusers_cfg.evaluation.grids import MAX_CLASSES, left_out_note, make_grid
from diffusers_cfg.evaluation.guidance_rules import check_guidance, is_unconditional
from diffusers_cfg.evaluation.measure import measure, measure_floor
from diffusers_cfg.evaluation.pictures import class_grid, nearest_grid
from diffusers_cfg.evaluation.records import data_config, names_data, recorded_data
from diffusers_cfg.evaluation.reference import ReferenceFile, ReferenceStatistics, read_reference
from diffusers_cfg.evaluation.reports import LIKELIHOOD_FILE, METRICS_FILE, write_report, write_text
from diffusers_cfg.evaluation.sample_sets import SETTINGS_FILE, SampleSet, claimed
from diffusers_cfg.evaluation.sampling import (
    call_arguments,
    check_call,
    choose_scheduler,
    draw_sets,
    guidance_scales,
    load_pipeline,
    sampling_settings,
    with_model_defaults,
)
from diffusers_cfg.evaluation.settings import GUIDANCE, EvaluationConfig, LikelihoodConfig, format_number
from diffusers_cfg.evaluation.statistics import RealStatistics
from diffusers_cfg.evaluation.training_images import TrainingImages, load_training_images
from diffusers_cfg.files import check_writable, refuse_data_folder, save_image

# The folder of the samples in the output folder.
SAMPLES = "samples"


def run_sweep(
    config: EvaluationConfig, accelerator: Accelerator, on_start: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """
    Generate samples for each w, evaluate them, and write a report to `output_folder(config)`. Existing samples are
    reused, so that an interrupted sweep resumes.

    Args:
        config (`EvaluationConfig`): the settings of the command `evaluate_cfg.py`.
        accelerator (`Accelerator`): the processes that share the work.
        on_start (`Callable[[], None]`): called on all processes after all checks, before any image is generated.

    Returns:
        On the main process the contents of metrics.json, whose `results` have a row of metrics for each w; on the other
        processes an empty dictionary.

    Raises:
        UserError: if the settings do not fit the model, the data or the existing samples, or a file cannot be written.
    """
    pipeline = load_pipeline(config, accelerator.device)
    config = with_model_defaults(config, pipeline)
    check_sampling(config, pipeline)
    output_dir = output_folder(config)
    check_folders(config, {**(recorded_data(config.model, pipeline) or {}), **config.given_data})
    data = real_data(config, pipeline, accelerator)
    settings = {"class_labels": config.class_labels, **sampling_settings(config, pipeline)}
    with claimed(output_dir / SAMPLES, settings, accelerator):
        on_start()
        real = real_statistics(config, data, accelerator)
        floor = {}
        if accelerator.is_main_process and isinstance(real, RealStatistics):
            floor = measure_floor(real)
        class_labels = choose_class_labels(config, data.class_labels)
        sets = {w: sample_set(config, w) for w in guidance_scales(config, pipeline)}
        draw_sets(config, accelerator, pipeline, sets, class_labels)
        results = measure_sets(accelerator, real, sets, class_labels, data.id2label)
        if not accelerator.is_main_process:
            return {}
        if isinstance(real, RealStatistics):
            held_out = real.held_out.features, real.class_labels["held_out"]
            floor["by_class"] = measure_classes(*held_out, real, data.id2label)
        record = {"dataset": data.name, **real.record(), "floor": floor, **sampling_record(config, pipeline)}
        record["results"] = results
        training = load_training_images(config, pipeline, data.images, accelerator.device)
        training.compare(sets, record)
        record = write_report(output_dir, record, config.feature_extractor)
        if isinstance(real, RealStatistics):
            write_text(class_table(record), output_dir / "classes.md")
        save_pictures(output_dir, record, sets, class_labels, data.id2label, training)
    return record


class RealData(NamedTuple):
    """The data that samples are compared with: the images of a dataset, or reference statistics."""

    images: Dataset | ReferenceFile
    id2label: dict[int, str]
    class_labels: torch.Tensor  # (images,), -1 for unlabelled; of reference statistics one label of each class
    name: str


def real_data(config: EvaluationConfig, pipeline: CFGPipeline, accelerator: Accelerator) -> RealData:
    """Read the reference statistics, or load the images of the data. Raise UserError if they do not fit the model."""
    if config.reference is None:
        with accelerator.main_process_first():
            dataset, id2label, name = load_data(config.model, config.given_data, pipeline, accelerator.is_main_process)
        return RealData(dataset, id2label, dataset.class_labels, name)
    classes = parse_class_labels(None, pipeline)
    if classes == [UNLABELLED]:
        raise UserError(f"{config.model} was trained without classes, for which this evaluation draws samples.")
    file = read_reference(Path(config.reference), pipeline.image_shape[-1])
    return RealData(file, pipeline.id2label, torch.tensor(classes), file.path.name)


def real_statistics(
    config: EvaluationConfig, data: RealData, accelerator: Accelerator
) -> RealStatistics | ReferenceStatistics:
    """Return the statistics of the real images, which are computed or read from the cache."""
    num_samples, statistics_dir = config.num_samples, Path(config.statistics_dir)
    if isinstance(data.images, ReferenceFile):
        return ReferenceStatistics(accelerator, data.images, data.id2label, num_samples, statistics_dir)
    return RealStatistics(
        accelerator, data.images, data.id2label, config.feature_extractor, num_samples, statistics_dir
    )


def check_sampling(config: EvaluationConfig, pipeline: CFGPipeline) -> None:
    """Raise `UserError` for settings that do not fit the model or that its pipeline rejects, with their scheduler."""
    check_guidance(config, pipeline)
    check_scales(config, pipeline)
    original = pipeline.scheduler
    if config.scheduler is not None:
        pipeline.scheduler = choose_scheduler(config.scheduler, pipeline)
    for w in guidance_scales(config, pipeline):
        check_call(pipeline, **call_arguments(config, w))
    pipeline.scheduler = original


def check_folders(config: EvaluationConfig | LikelihoodConfig, data: dict[str, Any]) -> None:
    """Raise `UserError` if a folder cannot be written, or the output folder has other files."""
    output_dir = output_folder(config)
    check_writable(output_dir, "--output_dir")
    if isinstance(config, EvaluationConfig):
        check_writable(Path(config.statistics_dir), "--statistics_dir")
    if config.output_dir is not None:  # the default lies in the model's folder
        refuse_data_folder(output_dir, data)
    own = [path.is_file() for path in (output_dir / METRICS_FILE, output_dir / LIKELIHOOD_FILE)]
    if output_dir.is_dir() and any(output_dir.iterdir()) and not any([*own, *output_dir.glob(f"*/{SETTINGS_FILE}")]):
        raise UserError(f"--output_dir {output_dir} has files that no evaluation wrote. Choose a different folder.")


def output_folder(config: EvaluationConfig | LikelihoodConfig) -> Path:
    """Return the output folder of an evaluation, by default the model's folder `evaluation`, which its card shows."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    return (Path(config.model) if Path(config.model).is_dir() else Path()) / "evaluation"


def sample_set(config: EvaluationConfig, w: float) -> SampleSet:
    """Return the samples of a sweep at one w, which may not be drawn yet."""
    return SampleSet(output_folder(config) / SAMPLES / f"w={format_number(w)}", config.num_samples)


def save_pictures(
    output_dir: Path,
    record: dict[str, Any],
    sets: dict[float, SampleSet],
    class_labels: torch.Tensor,
    id2label: dict[int, str],
    training: TrainingImages,
) -> None:
    """
    Write the pictures of a sweep: grid.png with all w, and at the w with the best Fréchet distance classes.png, with
    samples of each class, and nearest.png, with the samples that are closest to training images.

    Args:
        output_dir (`Path`): the folder.
        record (`dict[str, Any]`): the contents of metrics.json.
        sets (`dict[float, SampleSet]`), class_labels (`torch.Tensor`), id2label (`dict[int, str]`): as in
            `measure_sets`.
        training (`TrainingImages`): the training images.
    """
    classes = classes_of(class_labels).tolist()
    columns = [id2label[class_id] for class_id in class_labels[: min(len(classes), MAX_CLASSES)].tolist()]
    images = torch.stack([samples.first_images(len(columns)) for samples in sets.values()])
    note = left_out_note(len(set(columns)), len(classes))
    save_image(
        make_grid(images, [f"w = {format_number(w)}" for w in sets], columns, note=note), output_dir / "grid.png"
    )
    w = record["best"]["frechet_distance"]
    names = [id2label[class_id] for class_id in classes]
    save_image(class_grid(sets[w], classes, names, w), output_dir / "classes.png")
    if training.dataset is not None:
        nearest = nearest_grid(training.nearest(sets[w]), training.held_out_neighbours, w)
        save_image(nearest, output_dir / "nearest.png")


def measure_sets(
    accelerator: Accelerator,
    real: RealStatistics | ReferenceStatistics,
    sets: dict[float, SampleSet],
    class_labels: torch.Tensor,
    id2label: dict[int, str],
) -> list[dict[str, Any]]:
    """
    Return a row of metrics for each w, on the main process only. The processes share the shards.

    Args:
        accelerator (`Accelerator`): the processes.
        real (`RealStatistics` or `ReferenceStatistics`): the statistics of the real images.
        sets (`dict[float, SampleSet]`): the samples of each w.
        class_labels (`torch.Tensor` of shape `(images,)`): the classes of the samples, the same for each w.
        id2label (`dict[int, str]`): the names of the classes.
    """
    results = []
    for w, samples in tqdm(
        sets.items(), "Measuring", leave=False, disable=None if accelerator.is_main_process else True
    ):
        summary = real.summarizer.new_summary(samples.num_samples)
        for shard in samples.shards[accelerator.process_index :: accelerator.num_processes]:
            content = samples.load(shard)
            images = torch.from_numpy(content.images).movedim(-1, 1)
            real.summarizer.add(summary, torch.tensor(shard), images, torch.from_numpy(content.class_labels))
        summary.reduce(accelerator)
        if accelerator.is_main_process:
            row = measure(summary, real.reference, real.extractor.id2label)
            first = samples.load(samples.shards[0])
            cost = {"network_evaluations": first.network_evaluations, "gradients": first.gradients}
            if isinstance(real, RealStatistics):
                features = summary.features
                row["by_class"] = measure_classes(features, class_labels[: len(features)], real, id2label)
            results.append({"guidance_scale": w, **cost, **row})
    return results


def sampling_record(config: EvaluationConfig, pipeline: CFGPipeline) -> dict[str, Any]:
    """Return the sampling settings for JSON, without local paths."""
    return {
        **{name: getattr(config, name) for name in ("class_labels", "num_inference_steps", "seed")},
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance": {
            "rule": None if config.guidance == "classifier_free" else config.guidance,
            "interval": config.guidance_interval,
            "rescale": config.guidance_rescale,
            "guider": config.guider,
            "guide": config.guide_model and Path(config.guide_model).name,
        },
    }


def check_scales(config: EvaluationConfig, pipeline: CFGPipeline) -> None:
    """Raise `UserError` for guidance scales that the model was not trained for."""
    scales, largest = guidance_scales(config, pipeline), pipeline.unet.max_guidance_scale
    if largest is not None and (invalid := [w for w in scales if not 0 <= w <= largest]):
        raise UserError(
            f"--guidance_scales {invalid} are out of range: {config.model} was trained for w from 0 to {largest:g}."
        )
    guided = [w for w in scales if GUIDANCE[config.guidance](w)["guidance_scale"] != 0]
    is_trained = is_unconditional(pipeline) or pipeline.config.conditioning_dropout_prob != 0
    if guided and not is_trained and pipeline.guide_unet is None:
        raise UserError(
            f"--guidance_scales {guided} need a null class, but {config.model} was trained with "
            "conditioning_dropout_prob = 0. Evaluate it at w = 0, or by --guidance conditional_classifier, or train "
            "with 0.1 to 0.2."
        )


def load_data(
    model: str, given: dict[str, Any], pipeline: CFGPipeline, show_progress: bool
) -> tuple[Dataset, dict[int, str], str]:
    """
    Load the real images, with the channels and the resolution of the model's samples.

    Args:
        model (`str`): the folder or repository of the model.
        given (`dict[str, Any]`): settings that override the training settings, as in `data_config`.
        pipeline (`CFGPipeline`): the pipeline of the model.
        show_progress (`bool`): whether to show a progress bar while the images are decoded.

    Returns:
        The images, the names of their classes, and the name of the dataset.

    Raises:
        UserError: if the training data is unknown, or the data does not match the classes, channels or resolution of
            the model.
    """
    config = data_config(model, given, pipeline)
    if config.stack > 1:
        raise UserError(
            f"{model} was trained with --stack {config.stack} on images without classes, which this evaluation "
            "compares. Count the modes that its samples reach with studies/modes.py."
        )
    images = load_labelled_images(config)
    channels, resolution, _ = pipeline.image_shape
    is_other_data = names_data(given)

    names = pipeline.id2label or images.id2label
    if len(images.id2label) != pipeline.num_classes or names != images.id2label:
        raise UserError(
            f"The data has {len(images.id2label)} classes ({first_names(images.id2label)}), but {model} has "
            f"{pipeline.num_classes} ({first_names(names)}). Pass the data that the model was trained on."
        )
    if is_other_data and images.channels != channels:
        kinds = {1: "grayscale", 3: "RGB"}
        raise UserError(
            f"The data has {kinds[images.channels]} images, but {model} generates {kinds[channels]} images. Pass data "
            "of the same kind."
        )
    if is_other_data and (smaller := smaller_size(images, resolution)):
        raise UserError(
            f"The data has images of {smaller[0]}×{smaller[1]}, but {model} generates {resolution}×{resolution}. "
            "Enlarged images would be blurred: pass data of at least that size."
        )
    return training_dataset(images, config, channels, show_progress), images.id2label, local_name(config)


def smaller_size(images: LabelledImages, resolution: int) -> tuple[int, int] | None:
    """Return the size of the first readable image if it is smaller than the resolution, otherwise `None`."""
    for index in range(len(images)):
        with suppress(Exception):  # unreadable images are counted when the dataset is decoded
            size = images.open_image(index).size
            return size if min(size) < resolution else None
