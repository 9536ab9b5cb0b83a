"""Define toy methods that use what classifier-free guidance does not: two networks, and no labels."""

from typing import Self

import torch
import torch.nn.functional as F

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.engine.method import Batch, Method, Networks, Objective, Terms
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.networks import build_unet
from diffusers_cfg.methods.objectives import squared_error


class Critic(torch.nn.Module):
    """A critic that scores pairs of a clean and a noisy image."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(2 * channels, 8, 3, padding=1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, z], 1)).flatten(1).mean(1)


class Adversarial(Method):
    """Alternating training of a generator that denoises images and a critic, with a lazy R1 penalty."""

    lazy_penalty = 2

    def __init__(self, config: CFGConfig, pipeline: CFGPipeline):
        self.config, self.pipeline, self.scheduler = config, pipeline, pipeline.scheduler
        torch.manual_seed(config.seed)
        self.modules = {"generator": pipeline.unet, "critic": Critic(pipeline.unet.config.in_channels)}
        self.averaged = ("generator",)
        self.objectives = [
            Objective("critic", ("critic",), self.critic_loss),
            Objective("generator", ("generator",), self.generator_loss),
        ]

    @classmethod
    def build(cls, config: CFGConfig, images: LabelledImages) -> Self:
        unet = build_unet(config, None, images.channels, len(images.id2label))
        return cls(config, CFGPipeline(unet, LogSNRScheduler(prediction_type="sample"), id2label=images.id2label))

    def pair(self, generator: torch.nn.Module, batch: Batch, turn: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noisy images and the generator's clean images from them."""
        t = self.scheduler.timestep(batch.draws.uniform(f"{turn} time"))
        z = self.scheduler.add_noise(batch.x, batch.draws.normal(f"{turn} noise", *batch.x.shape[1:]), t)
        return z, generator(z, t, class_labels=batch.class_labels).sample

    def critic_loss(self, networks: Networks, batch: Batch) -> Terms:
        with torch.no_grad():
            z, fake = self.pair(networks["generator"], batch, f"critic {batch.turn}" if batch.turn else "critic")
        real = batch.x.clone().requires_grad_()
        on_real, on_fake = networks["critic"](real, z), networks["critic"](fake, z)
        loss, logs = F.softplus(-on_real) + F.softplus(on_fake), {"real": on_real.detach(), "fake": on_fake.detach()}
        if batch.step % self.lazy_penalty == 0:
            (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            penalty = slope.square().flatten(1).sum(1)
            loss, logs["r1"] = loss + penalty, penalty.detach()
        return Terms(loss, logs)

    def generator_loss(self, networks: Networks, batch: Batch) -> Terms:
        z, fake = self.pair(networks["generator"], batch, "generator")
        return Terms(F.softplus(-networks["critic"](fake, z)) + squared_error(fake, batch.x))

    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        rates = {"generator": 1e-3, "critic": 2e-3}
        parameters = [p for name in objective.trains for p in self.modules[name].parameters()]
        return torch.optim.Adam(parameters, lr=rates[objective.name], betas=(0.5, 0.9), fused=True)

    def max_grad_norm(self, objective: Objective) -> float:
        return float("inf")

    @property
    def compiled(self) -> tuple[str, ...]:
        return ("generator",)  # The penalty needs second derivatives of the critic.


class Unlabelled(Method):
    """Denoising without labels, by a network and a learned scale, with an optimizer that is not fused."""

    needs_labels = False

    def __init__(self, config: CFGConfig, pipeline: CFGPipeline):
        self.config, self.pipeline, self.scheduler = config, pipeline, pipeline.scheduler
        scale = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(scale.weight)
        self.modules = {"unet": pipeline.unet, "scale": scale}
        self.averaged = ("unet", "scale")
        self.objectives = [Objective("denoising", ("unet", "scale"), self.loss)]

    @classmethod
    def build(cls, config: CFGConfig, images: LabelledImages) -> Self:
        unet = build_unet(config, None, images.channels, num_classes=1)
        return cls(config, CFGPipeline(unet, LogSNRScheduler(prediction_type="epsilon")))

    def loss(self, networks: Networks, batch: Batch) -> Terms:
        t = self.scheduler.timestep(batch.draws.antithetic("time"))
        noise = batch.draws.normal("noise", *batch.x.shape[1:])
        z = self.scheduler.add_noise(batch.x, noise, t)
        scale = networks["scale"](torch.ones(1, 1, device=z.device)).view(1, 1, 1, 1)
        return Terms(squared_error(scale * networks["unet"](z, t).sample, noise))

    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        groups = [
            {"params": list(self.modules["unet"].parameters()), "lr": 1e-3},
            {"params": list(self.modules["scale"].parameters()), "lr": 1e-2},
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0, foreach=True)
