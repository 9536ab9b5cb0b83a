"""Measure the samples of a model while it is trained."""

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import CACHE_DIR
from diffusers_cfg.evaluation.measure import measure
from diffusers_cfg.evaluation.sampling import draw_images
from diffusers_cfg.evaluation.statistics import BATCH_SIZE, RealStatistics
from diffusers_cfg.settings import TrainConfig


class SampledMethod(Protocol):
    """A method of training with what its samples are drawn by."""

    pipeline: CFGPipeline
    guidance_scales: list[float]
    num_inference_steps: int


def training_evaluation(
    method: SampledMethod, config: TrainConfig, accelerator: Accelerator, dataset: Dataset
) -> Callable[[CFGPipeline], dict[str, float]]:
    """
    Prepare a small evaluation for a run to measure itself.

    Args:
        method (`SampledMethod`): its pipeline names the classes.
        config (`TrainConfig`): has `feature_extractor`, `num_eval_samples` and `seed`.
        accelerator (`Accelerator`): the processes that share the work.
        dataset (`Dataset`): the real images, uint8, with their `class_labels`.

    Returns:
        A function that draws with a pipeline and returns the metrics of each w by name, such as
        `"frechet_distance/w=1"`; on the main process, the others get none.
    """
    id2label = method.pipeline.id2label
    real = RealStatistics(accelerator, dataset, id2label, config.feature_extractor, config.num_eval_samples, CACHE_DIR)
    class_labels = torch.arange(config.num_eval_samples) % len(id2label)
    batches = torch.arange(config.num_eval_samples).split(BATCH_SIZE)
    mine = batches[accelerator.process_index :: accelerator.num_processes]

    def evaluate(pipeline: CFGPipeline) -> dict[str, float]:
        metrics = {}
        for w in method.guidance_scales:
            call = {"guidance_scale": w, "num_inference_steps": method.num_inference_steps}
            summary = real.summarizer.new_summary(config.num_eval_samples)
            for places in mine:
                labels = class_labels[places]
                images, _ = draw_images(pipeline, labels, places.tolist(), config.seed, **call)
                real.summarizer.add(summary, places, images, labels)
            summary.reduce(accelerator)
            if accelerator.is_main_process:
                row = measure(summary, real.reference, real.extractor.id2label)
                metrics |= {f"{name}/w={w:g}": value for name, value in row.items() if isinstance(value, float)}
        return metrics

    return evaluate
