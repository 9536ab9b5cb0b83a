"""
Train one network for ε(z, c) and ε(z): classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598). Or train it for
the guided prediction itself, which then takes one pass (guidance-free training, Chen et al. 2025, arXiv 2501.15420).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Self

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import CFGPipeline
from diffusers_cfg.data.images import UNLABELLED, LabelledImages, require_classes
from diffusers_cfg.engine.method import Batch, Networks, Objective, Terms
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.guided import GuidedMethod, learned_scales
from diffusers_cfg.methods.networks import build_pipeline
from diffusers_cfg.methods.objectives import (
    draw_guidance_scales,
    drop_class_labels,
    level_names,
    loss_logs,
    prediction_target,
    squared_error,
)

# One image in five is trained at w = 0 exactly. Draws of w from a continuous distribution alone leave w = 0 to the
# dropped labels, and the network then guides a little even there.
UNGUIDED = 5


class ClassifierFreeGuidance(GuidedMethod):
    """
    Algorithm 1 of Ho & Salimans (2022), with the noise process λ ~ p(λ) of section 3.

    With `max_guidance_scale`, the network ε(z, c, w) learns to guide in one pass: ε(z, c) in the same loss is what it
    implies, (ε(z, c, w) + w ε(z)) / (1 + w) (Chen et al. 2025, equation 8).
    """

    config: CFGConfig

    def __init__(self, config: CFGConfig, pipeline: CFGPipeline, present_classes: list[int] | None = None) -> None:
        self.config, self.pipeline = config, pipeline
        self.present_classes = present_classes or list(range(pipeline.unet.num_classes))
        self.scheduler = noise_process(pipeline)
        self.modules, self.averaged = {"unet": pipeline.unet}, ("unet",)
        self.objectives = [Objective("unet", ("unet",), self.loss)]
        self.max_guidance_scale, self.num_inference_steps = pipeline.unet.max_guidance_scale, config.num_inference_steps
        self.guidance_scales = learned_scales(config.validation_guidance_scales, self.max_guidance_scale)
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
        is_null = (c == null) | (c == UNLABELLED)
        predict = networks["unet"]
        if self.max_guidance_scale is not None:
            predict = partial(self.implied_prediction, networks["unet"], batch, is_null)
        loss = self.denoising_error(predict, x, c, u, noise)
        return Terms(loss, loss_logs(loss.detach(), u, is_null, self.levels))

    def denoising_error(
        self,
        predict: Callable[..., UNet2DOutput],
        x: torch.Tensor,
        c: torch.Tensor,
        u: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Return ‖prediction - target‖² of each sample, averaged over its elements: `(batch,)`."""
        t = self.scheduler.timestep(u)  # λ ~ p(λ), since u ~ U[0, 1)
        z = self.scheduler.add_noise(x, noise, t)  # z = αx + σε
        return squared_error(predict(z, t, class_labels=c).sample, prediction_target(self.scheduler, x, noise, t))

    def implied_prediction(
        self,
        unet: torch.nn.Module,
        batch: Batch,
        is_null: torch.Tensor,
        z: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor,
    ) -> UNet2DOutput:
        """
        Return β ε(z, c, w) + (1 - β) ε(z), with β = 1/(1 + w) and no gradient for ε(z): the prediction without guidance
        that the network implies at a random w.

        Args:
            unet (`torch.nn.Module`): the network.
            batch (`Batch`): the batch, whose step and rows decide which images are trained at w = 0.
            is_null (`torch.Tensor` of shape `(batch,)`): bool, whether the class is ∅. The network then predicts ε(z).
            z (`torch.Tensor` of shape `(batch, …)`), t (`torch.Tensor` of shape `(batch,)`): noisy samples, timesteps.
            class_labels (`torch.Tensor` of shape `(batch,)`): c.
        """
        assert self.max_guidance_scale is not None
        w = draw_guidance_scales(batch.draws, self.max_guidance_scale).masked_fill(is_null, 0.0)
        # Known without reading the device: the rows of the other images, which alone need the second pass.
        rows = [i for i, row in enumerate(batch.draws.rows) if (batch.step + row) % UNGUIDED]
        guided = torch.tensor(rows, dtype=torch.long).to(z.device, non_blocking=True)
        w = torch.zeros_like(w).index_copy(0, guided, w[guided])
        pred = unet(z, t, class_labels=class_labels, guidance_scale=w).sample
        if not rows:
            return UNet2DOutput(sample=pred)
        with torch.no_grad():
            null = torch.full_like(guided, self.pipeline.unet.null_class_label)
            pred_null = unet(z[guided], t[guided], class_labels=null, guidance_scale=torch.zeros_like(w[guided])).sample
        pred_null = pred.detach().index_copy(0, guided, pred_null)
        beta = 1 / (1 + w).view(-1, *(1,) * (z.ndim - 1))
        return UNet2DOutput(sample=beta * pred + (1 - beta) * pred_null)

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return `label_gain` of the training loss."""
        return self.label_gain(batches, partial(self.denoising_error, self.pipeline.unet))
