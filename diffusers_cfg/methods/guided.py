"""Define the base class of methods that sample with a `CFGPipeline`."""

import json
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.engine.method import Batch, Method
from diffusers_cfg.evaluation.grids import sample_grid
from diffusers_cfg.randomness import seeded_generator

logger = logging.getLogger(__name__)


class GuidedMethod(Method):
    """
    A method whose pipeline samples classes with guidance.

    Attributes:
        scheduler (`LogSNRScheduler`): the noise process used in training.
        present_classes (`list[int]`): the ids of the classes that have images; only these are sampled and recommended.
        guidance_scales (`list[float]`), num_inference_steps (`int`): settings of the samples drawn during training.
        guidance (`str`): the rule of their guidance, one of `GUIDANCE`.
    """

    pipeline: CFGPipeline
    scheduler: LogSNRScheduler
    present_classes: list[int]
    guidance_scales: list[float]
    num_inference_steps: int
    guidance: str = "classifier_free"

    def sampling_pipeline(self) -> CFGPipeline:
        """Return the pipeline that is sampled, saved and published."""
        return self.pipeline

    def preview(self, accelerator: Accelerator) -> Image.Image:
        """Return a grid of samples, with a row for each present class and a column for each w."""
        return sample_grid(
            self.sampling_pipeline(),
            accelerator,
            self.present_classes,
            self.guidance_scales,
            self.num_inference_steps,
            self.config.seed,
            self.guidance,
        )

    def label_gain(self, batches: Iterable[Batch], error: Callable[..., torch.Tensor]) -> dict[str, float]:
        """
        Return by how many standard errors the mean error is lower with correct labels than with wrong labels. Warn
        below 3: the network then ignores its labels, and guidance has no effect.

        Args:
            batches (`Iterable[Batch]`): labelled images.
            error (`Callable`): the error of each sample, `(x, class labels, times in [0, 1), noise) -> (batch,)`.
        """
        present, gains = torch.tensor(self.present_classes), []
        generator = seeded_generator("cpu", self.config.seed, "wrong labels")
        for batch in batches:
            x, labels, draws = batch.x, batch.class_labels, batch.draws
            offset = torch.randint(1, len(present), labels.shape, generator=generator)
            wrong = present[(torch.searchsorted(present, labels.cpu()) + offset) % len(present)].to(labels.device)
            u, noise = draws.uniform("time"), draws.normal("noise", *x.shape[1:])
            wrong_error, right_error = (error(x, c, u, noise) for c in (wrong, labels))
            gains.append(wrong_error - right_error)
        gain = torch.cat(gains)
        if len(gain) < 2:  # no standard error
            return {}
        standard_errors = (gain.mean() / (gain.std() / len(gain) ** 0.5)).item()
        if standard_errors < 3:
            logger.warning(
                "The network does not predict better with correct labels than with wrong labels (difference: %.1f "
                "standard errors). Early in a run this is normal. Later, check that the labels match the images.",
                standard_errors,
            )
        return {"label_gain": standard_errors}

    def example(self) -> str:
        """Return a line of code that generates an image of the first present class and saves it."""
        name = self.pipeline.id2label[self.present_classes[0]]
        label = json.dumps(name, ensure_ascii=False)
        unet = self.pipeline.unet
        guided = f", guidance_scale={min(0.5, unet.max_guidance_scale or 0.5)}" if unet.latent_dim is None else ""
        file = re.sub(r"\W+", "-", name)
        return f'pipe(class_labels={label}{guided}).images[0].save("{file}.png")'

    def facts(self) -> dict[str, Any]:
        """
        Return the prediction type, the probability that a label is dropped, the classes without images, and the largest
        w of a network that takes w.
        """
        absent = sorted({*range(self.pipeline.num_classes)} - {*self.present_classes})
        largest = self.pipeline.unet.max_guidance_scale
        return {
            "prediction_type": self.pipeline.scheduler.config.prediction_type,
            "conditioning_dropout_prob": self.pipeline.config.conditioning_dropout_prob,
            **({"classes_without_images": absent} if absent else {}),
            **({} if largest is None else {"max_guidance_scale": largest}),
        }

    def identity(self) -> dict[str, Any]:
        """Return the noise process, which may come from a pretrained pipeline instead of the settings."""
        names = ("prediction_type", "log_snr_min", "log_snr_max", "log_snr_schedule")
        return {name: self.scheduler.config[name] for name in names}


def learned_scales(scales: list[float], max_guidance_scale: float | None) -> list[float]:
    """
    Return the guidance scales that a network which takes w learns, or 0 if there are none. Warn of the others. All are
    supported by a network that does not take w, whose largest w is `None`.
    """
    if max_guidance_scale is None:
        return scales
    learned = [w for w in scales if 0 <= w <= max_guidance_scale]
    if left_out := [w for w in scales if w not in learned]:
        logger.warning("The samples leave out w = %s: the network learns 0 to %g.", left_out, max_guidance_scale)
    return learned or [0.0]
