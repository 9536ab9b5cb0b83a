"""Define a toy method that uses what the other methods do not: no labels, and an optimizer that is not fused."""

from typing import Self

import torch

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.engine.method import Batch, Method, Networks, Objective, Terms
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods.networks import build_unet
from diffusers_cfg.methods.objectives import squared_error


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
