"""Train one network for ε(z, c) and ε(z): classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

import logging
from collections.abc import Iterable
from typing import Self

import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.data.sources import UNLABELLED, LabelledImages, require_classes
from diffusers_cfg.engine.method import Batch, Networks, Objective, Terms
from diffusers_cfg.methods.guided import GuidedMethod
from diffusers_cfg.methods.networks import build_pipeline, noise_process
from diffusers_cfg.methods.objectives import drop_class_labels, level_names, loss_logs, prediction_target, squared_error
from diffusers_cfg.randomness import seeded_generator
from diffusers_cfg.settings import CFGConfig

logger = logging.getLogger(__name__)


class ClassifierFreeGuidance(GuidedMethod):
    """Algorithm 1 of Ho & Salimans (2022), with the noise process λ ~ p(λ) of its section 3."""

    config: CFGConfig

    def __init__(self, config: CFGConfig, pipeline: CFGPipeline):
        self.config, self.pipeline = config, pipeline
        self.scheduler = noise_process(pipeline)
        self.modules, self.averaged = {"unet": pipeline.unet}, ("unet",)
        self.objectives = [Objective("unet", ("unet",), self.loss)]
        self.guidance_scales, self.num_inference_steps = config.validation_guidance_scales, config.num_inference_steps
        self.levels = level_names(self.scheduler)

    @classmethod
    def build(cls, config: CFGConfig, images: LabelledImages) -> Self:
        require_classes(images)
        return cls(config, build_pipeline(config, images))

    def loss(self, networks: Networks, batch: Batch) -> Terms:
        """Return the loss of each sample of a batch (x, c): Algorithm 1."""
        x, draws, null = batch.x, batch.draws, self.pipeline.unet.null_class_label
        c = drop_class_labels(batch.class_labels, self.config.conditioning_dropout_prob, null, draws.uniform("dropout"))
        u, noise = draws.uniform("time"), draws.normal("noise", *x.shape[1:])
        loss = self.denoising_error(networks["unet"], x, c, u, noise)
        return Terms(loss, loss_logs(loss.detach(), u, (c == null) | (c == UNLABELLED), self.levels))

    def denoising_error(
        self, unet: torch.nn.Module, x: torch.Tensor, c: torch.Tensor, u: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Return ‖prediction - target‖² for each sample of a batch, averaged over its elements: `(batch,)`."""
        t = self.scheduler.timestep(u)  # λ ~ p(λ), by way of u ~ U[0, 1)
        z = self.scheduler.add_noise(x, noise, t)  # z = αx + σε
        pred = unet(z, t, class_labels=c).sample
        return squared_error(pred, prediction_target(self.scheduler, x, noise, t))

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """
        Return how much better the network predicts with the right labels than with wrong ones, in standard errors of
        the mean. Warn below 3: such a network ignores its labels, and guidance has nothing to work with.
        """
        num_classes, gains = self.pipeline.unet.num_classes, []
        generator = seeded_generator("cpu", self.config.seed, "wrong labels")
        for batch in batches:
            x, right, draws = batch.x, batch.class_labels, batch.draws
            offset = torch.randint(1, num_classes, right.shape, generator=generator).to(right.device)
            u, noise = draws.uniform("time"), draws.normal("noise", *x.shape[1:])
            errors = [
                self.denoising_error(self.pipeline.unet, x, labels, u, noise)
                for labels in ((right + offset) % num_classes, right)
            ]
            gains.append(errors[0] - errors[1])
        gain = torch.cat(gains)
        standard_errors = (gain.mean() / (gain.std() / len(gain) ** 0.5)).item()
        if standard_errors < 3:
            logger.warning(
                "The network does not predict better with the right labels than with wrong ones (by %.1f standard "
                "errors). Early in a run that is normal; later check that --label_column is what the images show.",
                standard_errors,
            )
        return {"label_gain": standard_errors}
