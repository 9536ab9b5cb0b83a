"""Evaluate the samples and the likelihood of a model during training."""

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import CACHE_DIR
from diffusers_cfg.data.datasets import StreamedImages, training_dataset
from diffusers_cfg.data.sources import load_held_out_images
from diffusers_cfg.evaluation.class_labels import balanced_class_labels, classes_of
from diffusers_cfg.evaluation.features import SMALL, pretrained_extractor
from diffusers_cfg.evaluation.likelihood import PARTS, ImageTerms, estimate, has_null_class
from diffusers_cfg.evaluation.likelihood_data import random_part
from diffusers_cfg.evaluation.likelihood_summary import bounds
from diffusers_cfg.evaluation.measure import measure
from diffusers_cfg.evaluation.sampling import draw_images
from diffusers_cfg.evaluation.settings import GUIDANCE, format_number
from diffusers_cfg.evaluation.statistics import BATCH_SIZE, RealStatistics, labelled_images
from diffusers_cfg.files import check_writable
from diffusers_cfg.settings import TrainConfig
from diffusers_cfg.variational_bound import bits_per_dim

# K of the likelihood, with which its standard error is mostly that over images.
TIMES_PER_IMAGE = 8


class SampledMethod(Protocol):
    """A training method, with the pipeline and settings for generating its validation samples."""

    pipeline: CFGPipeline
    guidance_scales: list[float]
    num_inference_steps: int
    guidance: str


def training_evaluation(
    method: SampledMethod, config: TrainConfig, accelerator: Accelerator, dataset: Dataset
) -> Callable[[CFGPipeline], dict[str, float]]:
    """
    Return a function that evaluates a pipeline during training, on a small number of samples. With `--dry_run`, only
    check that this is possible, without the minutes that the real images take.

    Args:
        method (`SampledMethod`): the training method; its pipeline gives the class names.
        config (`TrainConfig`): the settings, of which `feature_extractor`, `num_eval_samples` and `seed` are used.
        accelerator (`Accelerator`): the processes that share the work.
        dataset (`Dataset`): the real images, uint8, with their `class_labels`.

    Returns:
        A function that maps a pipeline to the metrics of each w, such as `"frechet_distance/w=1"`. Only the main
        process gets metrics; the dictionaries of the other processes are empty.
    """
    check_writable(CACHE_DIR, "XDG_CACHE_HOME")
    if config.dry_run:
        labelled_images(dataset, config.num_eval_samples)
        if config.feature_extractor != SMALL:
            pretrained_extractor(config.feature_extractor)
        return lambda _: {}
    id2label = method.pipeline.id2label
    real = RealStatistics(accelerator, dataset, id2label, config.feature_extractor, config.num_eval_samples, CACHE_DIR)
    class_labels = balanced_class_labels(classes_of(dataset.class_labels), config.num_eval_samples)
    batches = torch.arange(config.num_eval_samples).split(BATCH_SIZE)
    process_batches = batches[accelerator.process_index :: accelerator.num_processes]

    def evaluate(pipeline: CFGPipeline) -> dict[str, float]:
        metrics = {}
        for w in method.guidance_scales:
            call = {**GUIDANCE[method.guidance](w), "num_inference_steps": method.num_inference_steps}
            summary = real.summarizer.new_summary(config.num_eval_samples)
            for indices in process_batches:
                labels = class_labels[indices]
                images, _ = draw_images(pipeline, labels, indices.tolist(), config.seed, **call)
                real.summarizer.add(summary, indices, images, labels)
            summary.reduce(accelerator)
            if accelerator.is_main_process:
                row = measure(summary, real.reference, real.extractor.id2label)
                metrics |= {
                    f"{name}/w={format_number(w)}": value for name, value in row.items() if isinstance(value, float)
                }
        return metrics

    return evaluate


def likelihood_evaluation(
    method: SampledMethod, config: TrainConfig, accelerator: Accelerator, dataset: Dataset
) -> Callable[[CFGPipeline], dict[str, float]]:
    """
    Return a function that evaluates a pipeline during training like `training_evaluation`, and its likelihood bound in
    continuous time. The arguments are those of `training_evaluation`. Without `train_val_split` there is no bound.

    Returns:
        A function that maps a pipeline to metrics. Those of the bound, in bits per dimension of up to
        `num_eval_samples` held-out images, are `"validation/bits_per_dim"` and its parts with the class of each image,
        and `"validation/bits_per_dim_null"` and its parts with the null class.
    """
    evaluate_samples = training_evaluation(method, config, accelerator, dataset)
    if config.dry_run or not config.train_val_split:
        return evaluate_samples
    channels = method.pipeline.image_shape[0]
    with accelerator.main_process_first():
        held_out = random_part(load_held_out_images(config), config.num_eval_samples)
        images = training_dataset(held_out, config, channels, show_progress=False)
    assert not isinstance(images, StreamedImages)
    class_labels = images.class_labels
    rows = torch.arange(len(class_labels)).tensor_split(accelerator.num_processes)[accelerator.process_index]

    def evaluate(pipeline: CFGPipeline) -> dict[str, float]:
        metrics = evaluate_samples(pipeline)
        own = []
        if len(rows):
            terms = estimate(
                pipeline,
                images.__getitems__(rows.tolist()).images,
                class_labels[rows],
                seed=config.seed,
                first_index=int(rows[0]),
                times_per_image=TIMES_PER_IMAGE,
                null_class=has_null_class(pipeline),
            )
            own.append(terms)
        terms = ImageTerms.concatenate(gather_object(own))
        if accelerator.is_main_process:
            found = bounds(terms, class_labels, bits_per_dim(pipeline.image_shape))
            for bound, suffix in (("conditional", ""), ("null", "_null")):
                if bound in found:
                    metrics |= {f"validation/{part}{suffix}": found[bound][part] for part in ("bits_per_dim", *PARTS)}
        return metrics

    return evaluate
