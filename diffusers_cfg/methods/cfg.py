"""Train one network for ε(z, c) and ε(z): classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Iterable
from functools import partial
from typing import Self

import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.data.images import UNLABELLED, LabelledImages, require_classes
from diffusers_cfg.engine.method import Batch, Networks, Objective, Terms
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.guided import GuidedMethod
from diffusers_cfg.methods.networks import build_pipeline
from diffusers_cfg.methods.objectives import drop_class_labels, level_names, loss_logs, prediction_target, squared_error


class ClassifierFreeGuidance(GuidedMethod):
    """Algorithm 1 of Ho & Salimans (2022), with the noise process λ ~ p(λ) of section 3."""

    config: CFGConfig

    def __init__(self, config: CFGConfig, pipeline: CFGPipeline, present_classes: list[int] | None = None) -> None:
        self.config, self.pipeline = config, pipeline
        self.present_classes = present_classes or list(range(pipeline.unet.num_classes))
        self.scheduler = noise_process(pipeline)
        self.modules, self.averaged = {"unet": pipeline.unet}, ("unet",)
        self.objectives = [Objective("unet", ("unet",), self.loss)]
        self.guidance_scales, self.num_inference_steps = config.validation_guidance_scales, config.num_inference_steps
        self.levels = level_names(self.scheduler)

    @classmethod
    def build(cls, config: CFGConfig, images: LabelledImages) -> Self:
        """Return the method with a new or pretrained pipeline. Raise UserError if it does not fit the data."""
        require_classes(images)
        return cls(config, build_pipeline(config, images), images.present_classes)

    def loss(self, networks: Networks, batch: Batch) -> Terms:
        """Return the loss of each sample of a batch (x, c), by Algorithm 1."""
        x, draws, null = batch.x, batch.draws, self.pipeline.unet.null_class_label
        c = drop_class_labels(batch.class_labels, self.config.conditioning_dropout_prob, null, draws.uniform("dropout"))
        u, noise = draws.uniform("time"), draws.normal("noise", *x.shape[1:])
        loss = self.denoising_error(networks["unet"], x, c, u, noise)
        return Terms(loss, loss_logs(loss.detach(), u, (c == null) | (c == UNLABELLED), self.levels))

    def denoising_error(
        self, unet: torch.nn.Module, x: torch.Tensor, c: torch.Tensor, u: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Return ‖prediction - target‖² of each sample, averaged over its elements: `(batch,)`."""
        t = self.scheduler.timestep(u)  # λ ~ p(λ), since u ~ U[0, 1)
        z = self.scheduler.add_noise(x, noise, t)  # z = αx + σε
        pred = unet(z, t, class_labels=c).sample
        return squared_error(pred, prediction_target(self.scheduler, x, noise, t))

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return `label_gain` of the training loss."""
        return self.label_gain(batches, partial(self.denoising_error, self.pipeline.unet))
