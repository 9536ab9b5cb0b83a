"""Train a classifier of noisy images for classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4)."""

import json
import logging
from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from diffusers_cfg import CFGPipeline, NoisyClassifier2DModel
from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import training_dataset
from diffusers_cfg.data.images import UNLABELLED, LabelledImages, require_classes
from diffusers_cfg.data.labels import first_names
from diffusers_cfg.data.sources import load_held_out_images
from diffusers_cfg.engine.batches import probe_batches
from diffusers_cfg.engine.method import Batch, Networks, Objective, Terms
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.evaluation.settings import GUIDANCE
from diffusers_cfg.method_settings import ClassifierConfig
from diffusers_cfg.methods.guided import GuidedMethod
from diffusers_cfg.methods.networks import (
    CLASSES_WITHOUT_NAMES,
    NOISE_PROCESS,
    attention,
    check_sample_size,
    load_diffusion_model,
    normalization,
    warn_about_channels,
)
from diffusers_cfg.methods.objectives import NOISE_LEVELS, by_group, level_names, noise_level

logger = logging.getLogger(__name__)

# Number of held-out images whose accuracy is logged, each at all noise levels
MAX_HELD_OUT = 1000


class ClassifierGuidance(GuidedMethod):
    """
    A classifier p(c | z) of the noisy images of a diffusion model, which it guides.

    Attributes:
        held_out (`Dataset`, *optional*): labelled images whose accuracy is logged.
    """

    config: ClassifierConfig
    held_out: Dataset | None = None

    def __init__(
        self, config: ClassifierConfig, pipeline: CFGPipeline, present_classes: list[int] | None = None
    ) -> None:
        self.config, self.pipeline = config, pipeline
        self.present_classes = present_classes or list(range(pipeline.num_classes))
        # The predictions of a conditional network for the null class are worse, see training/RESULTS.md.
        is_unconditional = pipeline.unet.config.num_class_embeds is None
        self.guidance = "classifier" if is_unconditional else "conditional_classifier"
        self.scheduler = noise_process(pipeline)
        pipeline.unet.requires_grad_(False)
        leave_out_other_guidance(pipeline)
        pipeline.classifier = build_classifier(config, pipeline)
        self.modules, self.averaged = {"classifier": pipeline.classifier}, ("classifier",)
        self.objectives = [Objective("classifier", ("classifier",), self.loss)]
        self.guidance_scales = config.validation_guidance_scales
        self.num_inference_steps = pipeline.num_inference_steps
        self.losses, self.accuracies = (level_names(self.scheduler, value) for value in ("loss", "accuracy"))
        self.accuracy: dict[str, float] = {}

    @classmethod
    def build(cls, config: ClassifierConfig, images: LabelledImages) -> Self:
        """Return the method with a diffusion model to guide. Raise UserError if it does not fit the data."""
        require_classes(images)
        pipeline = load_diffusion_model(config)
        check_diffusion_model(config, pipeline, images)
        warn_about_channels(config, pipeline, images)
        method = cls(config, pipeline, images.present_classes)
        if config.train_val_split:
            held_out = load_held_out_images(config)
            if not held_out.present_classes:
                raise UserError(
                    f"--train_val_split {config.train_val_split:g} holds out {len(held_out)} images, none of which has "
                    "a label, so no accuracy can be measured. Raise it, or pass 0."
                )
            method.held_out = training_dataset(held_out, config, method.image_channels, show_progress=False)
        return method

    def loss(self, networks: Networks, batch: Batch) -> Terms:
        """Return -log p(c | z) of each sample of a batch (x, c); 0 of an unlabelled one."""
        u, noise = batch.draws.uniform("time"), batch.draws.normal("noise", *batch.x.shape[1:])
        loss, correct = self.errors(networks["classifier"], batch, u, noise)
        level = noise_level(u)
        logs = {**by_group(loss.detach(), level, self.losses), **by_group(correct, level, self.accuracies)}
        is_labelled = batch.class_labels != UNLABELLED
        return Terms(loss, {name: value.where(is_labelled, torch.nan) for name, value in logs.items()})

    def errors(
        self, classifier: torch.nn.Module, batch: Batch, u: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return -log p(c | z) at times u, and 1 where c is the most likely class: `(batch,)` each, float32."""
        t = self.scheduler.timestep(u)  # λ ~ p(λ) if u ~ U[0, 1), as for the diffusion model
        alpha, _ = self.scheduler.alpha_sigma(u)
        z = self.scheduler.add_noise(batch.x, noise, t)
        logits = classifier(alpha.view(-1, 1, 1, 1) * z, t).float()
        loss = F.cross_entropy(logits, batch.class_labels, ignore_index=UNLABELLED, reduction="none")
        return loss, (logits.argmax(1) == batch.class_labels).float()

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the loss and the accuracy on held-out images, over all noise levels and at each; empty without any."""
        if self.held_out is None:
            return {}
        classifier, losses, correct = self.pipeline.classifier, [], []
        for batch in probe_batches(self.config, self, self.held_out, classifier.device, MAX_HELD_OUT):
            found = []
            for level in range(NOISE_LEVELS):
                u = (level + batch.draws.uniform(f"time {level}")) / NOISE_LEVELS
                noise = batch.draws.normal(f"noise {level}", *batch.x.shape[1:])
                found.append(self.errors(classifier, batch, u, noise))
            losses.append(torch.stack([loss for loss, _ in found]))
            correct.append(torch.stack([is_correct for _, is_correct in found]))
        accuracy = torch.cat(correct, 1).mean(1).tolist()
        self.accuracy = dict(zip(self.accuracies, accuracy, strict=True))
        average = sum(accuracy) / NOISE_LEVELS
        text = "The classifier has an accuracy of %.1f %% on held-out images, and %.1f %% on the least noisy of them"
        logger.info(text, 100 * average, 100 * accuracy[0])
        logs = {"loss": torch.cat(losses, 1).mean().item(), "accuracy": average, **self.accuracy}
        return {f"held_out/{name}": value for name, value in logs.items()}

    def example(self) -> str:
        """Return a line of code that generates an image of the first present class and saves it."""
        name = self.pipeline.id2label.get(self.present_classes[0], self.present_classes[0])
        scales = GUIDANCE[self.guidance](1.0)
        call = ", ".join(f"{name}={value:g}" for name, value in scales.items())
        return f'pipe(class_labels={json.dumps(name, ensure_ascii=False)}, {call}).images[0].save("sample.png")'

    def facts(self) -> dict[str, Any]:
        """Return the facts of the diffusion model, and the accuracy on held-out images once it is measured."""
        accuracy = {name.removeprefix("accuracy/"): round(value, 4) for name, value in self.accuracy.items()}
        measured = {"classifier_accuracy": accuracy} if accuracy else {}
        return {"trained_network": "classifier", **super().facts(), **measured}


def check_diffusion_model(config: ClassifierConfig, pipeline: CFGPipeline, images: LabelledImages) -> None:
    """Raise UserError if a diffusion model cannot be guided by a classifier, or does not fit the data."""
    source = f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}"
    if pipeline.unet.max_guidance_scale is not None:
        raise UserError(f"{source} was trained to guide in one pass. Use a model that guides in two.")
    _, height, width = pipeline.image_shape
    if (height, width) != (config.resolution, config.resolution):
        solution = f"Set --resolution {height}." if height == width else "Only square images can be trained on."
        raise UserError(f"{source} has images of {height}×{width}, but --resolution is {config.resolution}. {solution}")
    ours, theirs = images.id2label, pipeline.id2label
    if not theirs:
        logger.warning(CLASSES_WITHOUT_NAMES)
    solution = "Pass the data that the model was trained on."
    if len(ours) != pipeline.num_classes:
        raise UserError(
            f"The data has {len(ours)} classes ({first_names(ours)}), but {source} has {pipeline.num_classes} "
            f"({first_names(theirs) or 'without names'}). {solution}"
        )
    if theirs and theirs != ours:
        class_id = min(class_id for class_id in ours if theirs.get(class_id) != ours[class_id])
        raise UserError(
            f"The classes of the data have other names or another order than those of {source}: class {class_id} is "
            f"{ours[class_id]!r} instead of {theirs.get(class_id)!r}. {solution}"
        )


def leave_out_other_guidance(pipeline: CFGPipeline) -> None:
    """Remove the guider and the guide network of a pipeline, which are not used together with the classifier."""
    if found := [name for name in ("guider", "guide_unet") if getattr(pipeline, name) is not None]:
        logger.warning("Leaving out the %s of the diffusion model, which the classifier replaces.", " and ".join(found))
        pipeline.guider = pipeline.guide_unet = None


def build_classifier(config: ClassifierConfig, pipeline: CFGPipeline) -> NoisyClassifier2DModel:
    """
    Return a new classifier for a diffusion model, with weights determined by the seed. Raise UserError if it cannot be
    built with the settings.
    """
    torch.manual_seed(config.seed)
    channels, size, _ = pipeline.sample_shape
    check_sample_size(config.block_out_channels, size)
    layers = attention(config.attention_resolutions, size, config.block_out_channels)
    layers.pop("up_block_types")
    process = noise_process(pipeline).config
    settings = {
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "dropout": config.dropout,
        **layers,
        **normalization(config.block_out_channels),
    }
    try:
        return NoisyClassifier2DModel(
            sample_size=size,
            in_channels=channels,
            num_classes=pipeline.num_classes,
            **settings,
            id2label={str(class_id): name for class_id, name in pipeline.id2label.items()} or None,
            noise_process={name: process[name] for name in NOISE_PROCESS if name != "prediction_type"},
        )
    except Exception as error:  # layers that are too large raise exceptions of many types
        raise UserError(f"Failed to build a classifier with the settings {settings}: {error}") from error
