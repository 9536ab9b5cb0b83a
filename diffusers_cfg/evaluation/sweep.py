"""Evaluate a model over guidance scales w: generate samples for each w and compare them with the model's data."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import training_dataset
from diffusers_cfg.data.naming import local_name
from diffusers_cfg.data.sources import LabelledImages, load_labelled_images
from diffusers_cfg.evaluation.grids import make_grid
from diffusers_cfg.evaluation.measure import measure, measure_floor
from diffusers_cfg.evaluation.reports import write_report
from diffusers_cfg.evaluation.sample_sets import SampleSet, claim_folder
from diffusers_cfg.evaluation.sampling import (
    call_arguments,
    check_call,
    draw_sets,
    load_pipeline,
    sampling_settings,
    with_model_defaults,
)
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.evaluation.statistics import RealStatistics
from diffusers_cfg.randomness import seeded_generator
from diffusers_cfg.settings import CONFIG_FILE, DataConfig

DATA_SETTINGS = [
    *("dataset_name", "dataset_config_name", "dataset_split"),
    *("train_data_dir", "image_column", "label_column"),
]


def run_sweep(config: EvaluationConfig, accelerator: Accelerator) -> dict[str, Any]:
    """
    Generate samples for each w, evaluate them, and write a report to `output_folder(config)`. Existing samples are
    reused, so that an interrupted sweep resumes.

    Args:
        config (`EvaluationConfig`): the settings of the command `evaluate_cfg.py`.
        accelerator (`Accelerator`): the processes that share the work.

    Returns:
        On the main process the contents of metrics.json, whose `results` have a row of metrics for each w; on the other
        processes an empty dictionary.

    Raises:
        UserError: if the settings do not fit the model, the data or the existing samples.
    """
    pipeline = load_pipeline(config, accelerator.device)
    config = with_model_defaults(config, pipeline)
    check_scales(config, pipeline)
    for w in config.guidance_scales:
        check_call(pipeline, **call_arguments(config, w))
    given = {name: getattr(config, name) for name in DATA_SETTINGS if getattr(config, name) is not None}
    with accelerator.main_process_first():
        dataset, id2label, data_name = load_data(config.model, given, pipeline, accelerator.is_main_process)
    real = RealStatistics(
        accelerator, dataset, id2label, config.feature_extractor, config.num_samples, Path(config.statistics_dir)
    )
    floor = measure_floor(real) if accelerator.is_main_process else {}

    output_dir = output_folder(config)
    class_labels = choose_class_labels(config, dataset.class_labels, pipeline.unet.num_classes)
    sets = {w: SampleSet(output_dir / "samples" / f"w={w:g}", config.num_samples) for w in config.guidance_scales}
    if accelerator.is_main_process:
        settings = {"class_labels": config.class_labels, **sampling_settings(config, pipeline)}
        claim_folder(output_dir / "samples", settings)
    draw_sets(config, accelerator, pipeline, sets, class_labels)
    results = measure_sets(accelerator, real, sets)
    if not accelerator.is_main_process:
        return {}

    record = {"dataset": data_name, **real.record(), "floor": floor, **sampling_record(config, pipeline)}
    record = write_report(output_dir, {**record, "results": results}, config.feature_extractor)
    columns = [id2label[class_id] for class_id in class_labels[: min(pipeline.unet.num_classes, 10)].tolist()]
    rows = [samples.first_images(len(columns)) for samples in sets.values()]
    make_grid(torch.stack(rows), [f"w = {w:g}" for w in sets], columns).save(output_dir / "grid.png")
    return record


def output_folder(config: EvaluationConfig) -> Path:
    """Return the output folder of a sweep. The default is the model's folder `evaluation`, which its card shows."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    return (Path(config.model) if Path(config.model).is_dir() else Path()) / "evaluation"


def measure_sets(accelerator: Accelerator, real: RealStatistics, sets: dict[float, SampleSet]) -> list[dict[str, Any]]:
    """Return a row of metrics for each w, on the main process only. The processes share the shards."""
    results = []
    for w, samples in tqdm(sets.items(), "Measuring", leave=False, disable=not accelerator.is_main_process):
        summary = real.summarizer.new_summary(samples.num_samples)
        for shard in samples.shards[accelerator.process_index :: accelerator.num_processes]:
            content = samples.load(shard)
            images = torch.from_numpy(content.images).movedim(-1, 1)
            real.summarizer.add(summary, torch.tensor(shard), images, torch.from_numpy(content.class_labels))
        summary.reduce(accelerator)
        if accelerator.is_main_process:
            row = measure(summary, real.reference, real.extractor.id2label)
            evaluations = samples.load(samples.shards[0]).network_evaluations
            results.append({"guidance_scale": w, "network_evaluations": evaluations, **row})
    return results


def sampling_record(config: EvaluationConfig, pipeline: CFGPipeline) -> dict[str, Any]:
    """Return the sampling settings for JSON, without local paths."""
    return {
        **{name: getattr(config, name) for name in ("class_labels", "num_inference_steps", "seed")},
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance": {
            "interval": config.guidance_interval,
            "rescale": config.guidance_rescale,
            "guider": config.guider,
            "guide": config.guide_model and Path(config.guide_model).name,
        },
    }


def check_scales(config: EvaluationConfig, pipeline: CFGPipeline) -> None:
    """Raise `UserError` for guidance scales that the model was not trained for."""
    largest = pipeline.unet.max_guidance_scale
    if largest is not None and (invalid := [w for w in config.guidance_scales if not 0 <= w <= largest]):
        raise UserError(
            f"--guidance_scales {invalid} are out of range: {config.model} was distilled for w from 0 to {largest:g}."
        )
    guided = [w for w in config.guidance_scales if w != 0]
    if guided and pipeline.config.conditioning_dropout_prob == 0 and pipeline.guide_unet is None:
        raise UserError(
            f"--guidance_scales {guided} need a null class, but {config.model} was trained with "
            "conditioning_dropout_prob = 0. Evaluate it at w = 0, or train with 0.1 to 0.2."
        )


def load_data(
    model: str, given: dict[str, Any], pipeline: CFGPipeline, show_progress: bool
) -> tuple[Dataset, dict[int, str], str]:
    """
    Load the real images, with the channels and the resolution of the model's samples.

    Args:
        model (`str`): the folder or repository of the model.
        given (`dict[str, Any]`): settings of `DataConfig` that override the training settings. If they name a dataset,
            the training settings are ignored.
        pipeline (`CFGPipeline`): the pipeline of the model.
        show_progress (`bool`): whether to show a progress bar while the images are decoded.

    Returns:
        The images, the names of their classes, and the name of the dataset.

    Raises:
        UserError: if the training data is unknown, or the data does not match the classes, channels or resolution of
            the model.
    """
    is_other_data = "dataset_name" in given or "train_data_dir" in given
    settings = {} if is_other_data else recorded_data(model, pipeline)
    channels, resolution, _ = pipeline.image_shape
    config = DataConfig(**{**settings, **given, "resolution": resolution, "streaming": False})
    images = load_labelled_images(config)

    names = pipeline.id2label or images.id2label
    if len(images.id2label) != pipeline.unet.num_classes or names != images.id2label:
        raise UserError(
            f"The data has {len(images.id2label)} classes ({first_names(images.id2label)}), but {model} has "
            f"{pipeline.unet.num_classes} ({first_names(names)}). Pass the data that the model was trained on."
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


def recorded_data(model: str, pipeline: CFGPipeline) -> dict[str, Any]:
    """Return the data settings of the training run, from its config or its record. Raise `UserError` if unknown."""
    names = {setting.name for setting in fields(DataConfig)}
    settings = Path(model) / CONFIG_FILE
    if settings.is_file():
        # The data settings have the same names in the configs of all methods.
        try:
            known = yaml.safe_load(settings.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{settings} is not valid YAML: {error}") from error
        return {name: value for name, value in known.items() if name in names}
    record = Path(pipeline.name_or_path) / "run.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if "data" not in known:
        raise UserError(
            f"The training data of {model} is unknown or not public. Pass --dataset_name or --train_data_dir."
        )
    return {name: value for name, value in known["data"].items() if name in names}


def first_names(id2label: dict[int, str]) -> str:
    """Return the names of the first five classes, for a message."""
    return ", ".join([name for _, name in sorted(id2label.items())][:5]) + (", …" if len(id2label) > 5 else "")


def smaller_size(images: LabelledImages, resolution: int) -> tuple[int, int] | None:
    """Return the size of the first image if it is smaller than the resolution, otherwise `None`."""
    size = images.open_image(0).size
    return size if min(size) < resolution else None


def choose_class_labels(config: EvaluationConfig, data_labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    Choose the class of each sample by `config.class_labels`. The classes are the same for every w.

    Args:
        config (`EvaluationConfig`): the settings, of which `class_labels`, `num_samples` and `seed` are used.
        data_labels (`torch.Tensor` of shape `(images,)`): the labels of the real images, -1 for unlabelled images.
        num_classes (`int`): the number of classes of the model.

    Returns:
        `torch.Tensor` of shape `(num_samples,)`: class ids, int64.
    """
    indices = torch.arange(config.num_samples)
    if config.class_labels == "balanced":
        return indices % num_classes
    labels = data_labels[data_labels >= 0] if config.class_labels == "data" else torch.arange(num_classes)
    chosen = [
        torch.randint(len(labels), (), generator=seeded_generator("cpu", config.seed, "class label", index))
        for index in indices.tolist()
    ]
    return labels[torch.stack(chosen)]
