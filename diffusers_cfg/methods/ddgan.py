"""Train a denoising diffusion GAN (Xiao et al. 2021, arXiv 2112.07804): a generator of images from noisier images and a
latent vector, against a discriminator of pairs of noisy images.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import pairwise
from statistics import mean
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from PIL import Image

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.images import UNLABELLED, LabelledImages, StackedImages, require_classes
from diffusers_cfg.data.sources import ImageStream
from diffusers_cfg.denoising_gan import (
    DenoisingSteps,
    discriminator_loss,
    generator_loss,
    squared_gradient,
    vp_betas,
)
from diffusers_cfg.engine.method import Batch, Networks, Objective, Terms
from diffusers_cfg.evaluation.grids import sample_grid
from diffusers_cfg.method_settings import FP16_REFUSED, GROUP_SIZE, DDGANConfig
from diffusers_cfg.methods.guided import GuidedMethod
from diffusers_cfg.methods.networks import build_unet
from diffusers_cfg.methods.objectives import by_group, drop_class_labels, squared_error
from diffusers_cfg.randomness import seeded_generator

logger = logging.getLogger(__name__)

# Number of columns of the grid of samples
PREVIEW_IMAGES = 5
# The discriminator does not halve images any further.
SMALLEST_SIZE = 4
# Number of steps for which a network must have been losing before a warning
WATCHED_STEPS = 200
# A discriminator has died if D(real) - D(fake) is this close to 0 at every t and ‖∇D‖² is this small. It wins outright
# if D(real) - D(fake) is this large.
DEAD_MARGIN, DEAD_GRADIENT, WINNING_MARGIN = 0.02, 1e-3, 10.0


class DenoisingDiffusionGAN(GuidedMethod):
    """The class-conditional denoising diffusion GAN, whose two networks are trained in turn."""

    config: DDGANConfig

    def __init__(self, config: DDGANConfig, pipeline: CFGPipeline, present_classes: list[int] | None = None) -> None:
        self.config, self.pipeline = config, pipeline
        self.present_classes = present_classes or list(range(pipeline.unet.num_classes))
        torch.manual_seed(config.seed + 1)  # not the random numbers of the generator's weights
        channels, size, _ = pipeline.sample_shape
        widths = config.discriminator_channels
        try:
            self.discriminator = Discriminator(channels, size, pipeline.unet.num_classes, config.num_timesteps, widths)
        except RuntimeError as error:
            raise UserError(f"Failed to build a network with --discriminator_channels {widths}: {error}") from error
        self.steps = DenoisingSteps(pipeline.scheduler.config["trained_betas"]).float()  # MPS has no float64
        self.modules = {"generator": pipeline.unet, "discriminator": self.discriminator}
        self.averaged = ("generator",)
        self.objectives = [
            Objective("discriminator", ("discriminator",), self.discriminator_loss),
            Objective("generator", ("generator",), self.generator_loss),
        ]
        self.guidance_scales, self.num_inference_steps = [0.0], config.num_timesteps
        self.last_healthy: dict[str, int] = {}

    @classmethod
    def build(cls, config: DDGANConfig, images: LabelledImages) -> Self:
        """Return the method with a new pipeline. Raise UserError if the settings do not fit the data."""
        if not isinstance(images, StackedImages):
            require_classes(images)
        if not isinstance(images, ImageStream) and len(images) < GROUP_SIZE:
            raise UserError(
                f"The dataset has {len(images)} images, but the discriminator compares {GROUP_SIZE} at a time. Add "
                "images."
            )
        if AcceleratorState().mixed_precision == "fp16":
            raise UserError(FP16_REFUSED)
        return cls(config, build_pipeline(config, images), images.present_classes or [UNLABELLED])

    @property
    def compiled(self) -> tuple[str, ...]:
        """The generator; R1 needs second derivatives of the discriminator."""
        return ("generator",)

    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        """Return the optimizer with the learning rate of the network."""
        optimizer = super().optimizer(objective)
        if objective.name == "discriminator":
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate_discriminator
        return optimizer

    def max_grad_norm(self, objective: Objective) -> float:
        """Return the maximum gradient norm of the network."""
        config = self.config
        return config.max_grad_norm_discriminator if objective.name == "discriminator" else config.max_grad_norm

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Terms:
        """Return the loss of the discriminator of each sample of a batch (x, c), with R1 every `lazy_reg` steps."""
        config, discriminator = self.config, networks["discriminator"]
        t, c, real, x_next = self.draw_pairs(batch, "discriminator")
        fake = self.generate(networks["generator"], batch, "discriminator", t, c, x_next)
        is_penalised = config.r1_gamma > 0 and batch.step % config.lazy_reg == 0
        is_relativistic = config.loss == "relativistic"
        real.requires_grad_(is_penalised)
        fake.requires_grad_(is_penalised and is_relativistic)
        on_real, on_fake = (discriminator(x, x_next, t, c, float32=x.requires_grad).float() for x in (real, fake))
        loss = discriminator_loss(config.loss, on_real, on_fake)
        margin = (on_real - on_fake).detach()
        logs = {"real": on_real.detach(), "fake": on_fake.detach()}
        logs |= by_group(margin, t, [f"real_minus_fake/t_{i}" for i in range(config.num_timesteps)])
        logs["dropout_rate"] = (c == self.pipeline.unet.null_class_label).float()
        if is_penalised:
            penalty = squared_gradient(on_real, real)
            logs["r1"] = penalty.detach()
            if is_relativistic:
                on_fake_penalty = squared_gradient(on_fake, fake)
                logs["r2"] = on_fake_penalty.detach()
                penalty = penalty + on_fake_penalty
            loss = loss + config.r1_gamma / 2 * penalty
        return Terms(loss, logs)

    def generator_loss(self, networks: Networks, batch: Batch) -> Terms:
        """Return the loss of the generator of each sample of a batch (x, c), with other noise than above."""
        config, discriminator = self.config, networks["discriminator"]
        t, c, real, x_next = self.draw_pairs(batch, "generator")
        fake = self.generate(networks["generator"], batch, "generator", t, c, x_next)
        on_fake = discriminator(fake, x_next, t, c).float()
        on_real = discriminator(real, x_next, t, c).float() if config.loss == "relativistic" else None
        return Terms(generator_loss(config.loss, on_real, on_fake))

    def draw_pairs(self, batch: Batch, purpose: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return steps t, the classes c after label dropout, which both networks share, and real x_prev and x_next."""
        x, draws, config, shape = batch.x, batch.draws, self.config, batch.x.shape[1:]
        null, uniform = self.pipeline.unet.null_class_label, draws.uniform("dropout")
        c = drop_class_labels(batch.class_labels, config.conditioning_dropout_prob, null, uniform)
        c = torch.where(c < 0, null, c)
        t = self.step_at(draws.uniform(f"{purpose} time"))
        noise, next_noise = (draws.normal(f"{purpose} noise of {name}", *shape) for name in ("x_prev", "x_next"))
        steps = self.steps.to(x.device, non_blocking=True)
        return t, c, *steps.diffuse(x, t, noise, next_noise)

    def step_at(self, u: torch.Tensor) -> torch.Tensor:
        """Return the step t of each time in [0, 1), in the shape of u. All steps are equally likely."""
        return (u * self.config.num_timesteps).long()

    def generate(
        self,
        generator: torch.nn.Module,
        batch: Batch,
        purpose: str,
        t: torch.Tensor,
        c: torch.Tensor,
        x_next: torch.Tensor,
    ) -> torch.Tensor:
        """Return generated x_prev, of the shape of x_next."""
        draws, latent_dim = batch.draws, self.config.latent_dim
        latent = draws.normal(f"{purpose} latent", latent_dim) if latent_dim else None
        x = generator(x_next, t, class_labels=c, latent=latent).sample.float()
        return self.steps.denoise(x, x_next, t, draws.normal(f"{purpose} posterior", *x.shape[1:]))

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return `label_gain` of the generator's x, which are closer to the images of their own class, if labelled."""
        if not self.pipeline.id2label:
            return {}
        latent_dim, seed, scheduler = self.config.latent_dim, self.config.seed, self.pipeline.scheduler

        def error(x: torch.Tensor, c: torch.Tensor, u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            t, generator = self.step_at(u), seeded_generator(x.device, seed, "probe latent")
            latent = torch.randn(len(x), latent_dim, generator=generator, device=x.device) if latent_dim else None
            x_next = scheduler.add_noise(x, noise, t)
            return squared_error(self.pipeline.unet(x_next, t, class_labels=c, latent=latent).sample, x)

        return self.label_gain(batches, error)

    def preview(self, accelerator: Accelerator) -> Image.Image:
        """Return a grid of samples, with a row for each present class."""
        scales, seed = self.guidance_scales * PREVIEW_IMAGES, self.config.seed
        return sample_grid(self.pipeline, accelerator, self.present_classes, scales, self.num_inference_steps, seed)

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """Warn if one network has beaten the other for `WATCHED_STEPS`."""
        # Not by the logits of each kind: those of a relativistic loss may all be shifted.
        margins = [value for name, value in values.items() if name.startswith("discriminator/real_minus_fake/")]
        if not margins:  # None was finite, which ends the run.
            return
        is_flat = values.get("discriminator/r1", 0.0) < DEAD_GRADIENT  # R1 is not in the log of every step.
        problems = {
            "The discriminator has died: it cannot tell real images from generated ones, and its gradient is 0, so "
            "that the generator learns nothing. Start again with a lower --learning_rate, a higher "
            "--learning_rate_discriminator or a lower --r1_gamma.": max(map(abs, margins)) < DEAD_MARGIN and is_flat,
            "The discriminator wins outright: it tells all images apart, and the generator hardly learns. Start again "
            "with a lower --learning_rate_discriminator or a higher --r1_gamma.": mean(margins) > WINNING_MARGIN,
        }
        for text, is_wrong in problems.items():
            last = self.last_healthy.setdefault(text, step)
            if not is_wrong:
                self.last_healthy[text] = step
            elif step - last >= WATCHED_STEPS:
                logger.warning("%s (since step %d)", text, last)
                self.last_healthy[text] = step

    def example(self) -> str:
        """Return a line of code that generates an image of the first present class, or of the null class."""
        if not self.pipeline.id2label:
            return 'pipe(class_labels=-1).images[0].save("sample.png")'
        return super().example()

    def facts(self) -> dict[str, Any]:
        """Return the facts of `GuidedMethod`, and those of the steps and the discriminator."""
        names = ("num_timesteps", "latent_dim", "loss", "r1_gamma", "lazy_reg", "learning_rate_discriminator")
        return {**super().facts(), **{name: getattr(self.config, name) for name in names}}

    def identity(self) -> dict[str, Any]:
        """Return the noise process."""
        return dict(self.pipeline.unet.noise_process or {})


def build_pipeline(config: DDGANConfig, images: LabelledImages) -> CFGPipeline:
    """Return a new pipeline to train. Raise UserError if it does not fit the data."""
    unet = build_unet(
        config,
        None,
        images.channels,
        num_classes=len(images.id2label) or 1,  # of unlabelled images, a class that never occurs
        latent_dim=config.latent_dim,
        resnet_time_scale_shift="scale_shift",  # adaptive group norm
    )
    for parameter in unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)  # starts with x = 0, the middle of the range of the data
    betas = vp_betas(config.num_timesteps)
    scheduler = DDPMScheduler(
        num_train_timesteps=config.num_timesteps,
        trained_betas=betas,
        prediction_type="sample",
        variance_type="fixed_small",
        clip_sample=True,
        timestep_spacing="trailing",
    )
    unet.noise_process = {
        "prediction_type": "sample",
        "num_train_timesteps": config.num_timesteps,
        "trained_betas": betas,
    }
    return CFGPipeline(
        unet,
        scheduler,
        None,
        images.id2label,
        config.conditioning_dropout_prob if images.id2label else 1.0,
        num_inference_steps=config.num_timesteps,
    )


class Discriminator(torch.nn.Module):
    """
    A discriminator D(x_prev, x_next, t, c), a residual network with a projection head (Miyato & Koyama 2018,
    arXiv 1802.05637). Samples are compared by their standard deviation only: no layer normalizes over the batch.

    Args:
        in_channels (`int`), size (`int`): channels and height of the images.
        num_classes (`int`): number of classes without the null class, the last label.
        num_timesteps (`int`): T.
        channels (`list[int]`): channels of the first convolution, and of each residual block.
    """

    class Block(torch.nn.Module):
        """Two convolutions and a bias for each t, at half the resolution if `halves`."""

        def __init__(self, in_channels: int, out_channels: int, num_timesteps: int, halves: bool) -> None:
            super().__init__()
            self.conv_1 = torch.nn.Conv2d(in_channels, in_channels, 3, padding=1)
            self.conv_2 = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)
            self.skip = torch.nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.time = torch.nn.Embedding(num_timesteps, in_channels)
            self.halves = halves

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            h = self.conv_1(activation(x)) + self.time(t)[:, :, None, None]
            h = (self.conv_2(activation(h)) + self.skip(x)) / 2**0.5
            return torch.nn.functional.avg_pool2d(h, 2) if self.halves else h

    def __init__(self, in_channels: int, size: int, num_classes: int, num_timesteps: int, channels: list[int]) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(2 * in_channels, channels[0], 3, padding=1)
        blocks = []
        for inputs, outputs in pairwise(channels):
            halves = size > SMALLEST_SIZE and size % 2 == 0
            blocks.append(self.Block(inputs, outputs, num_timesteps, halves))
            size = size // 2 if halves else size
        self.blocks = torch.nn.ModuleList(blocks)
        self.conv_out = torch.nn.Conv2d(channels[-1] + 1, channels[-1], 3, padding=1)
        self.linear = torch.nn.Linear(channels[-1], 1)
        self.class_embedding = torch.nn.Embedding(num_classes + 1, channels[-1])
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, a=0.2)
        # The sum over pixels is large. Without zeros, the discriminator has to unlearn random logits first.
        for head in (self.linear.weight, self.linear.bias, self.class_embedding.weight):
            torch.nn.init.zeros_(head)

    def forward(
        self,
        x_prev: torch.Tensor,
        x_next: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor,
        float32: bool = False,
    ) -> torch.Tensor:
        """
        Return the logit that x_prev is real, given the rest: `(batch,)`.

        Args:
            x_prev, x_next (`torch.Tensor` of shape `(batch, channels, height, width)`): the ends of a step.
            t (`torch.Tensor` of shape `(batch,)`): the step, int64.
            class_labels (`torch.Tensor` of shape `(batch,)`): int64, `0 … num_classes`.
            float32 (`bool`): whether to compute in float32 also under autocast, which a gradient penalty needs.
        """
        with torch.autocast(x_prev.device.type, enabled=False) if float32 else nullcontext():
            h = self.conv_in(torch.cat([x_prev, x_next], dim=1))
            for block in self.blocks:
                h = block(h, t)
            h = self.conv_out(torch.cat([h, minibatch_std(h)], dim=1))
            h = activation(h).sum((2, 3))
            return self.linear(h).squeeze(1) + (self.class_embedding(class_labels) * h).sum(1)


def activation(x: torch.Tensor) -> torch.Tensor:
    """Return the leaky ReLU of the discriminator."""
    return torch.nn.functional.leaky_relu(x, 0.2)


def minibatch_std(h: torch.Tensor) -> torch.Tensor:
    """
    Return the standard deviation over groups of consecutive samples, averaged over channels and pixels (Karras et al.
    2018, arXiv 1710.10196).

    Args:
        h (`torch.Tensor` of shape `(batch, channels, height, width)`): features. If `GROUP_SIZE` does not divide the
            batch, groups are smaller.

    Returns:
        `torch.Tensor` of shape `(batch, 1, height, width)`, constant over the pixels and over each group.
    """
    group = next(size for size in range(GROUP_SIZE, 0, -1) if len(h) % size == 0)
    groups = h.float().unflatten(0, (-1, group))
    std = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    std = std[:, None].expand(-1, group).reshape(-1, 1, 1, 1)
    return std.expand(-1, 1, *h.shape[2:]).to(h.dtype)
