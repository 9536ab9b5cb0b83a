"""Say what is trained, on which losses, and what is saved: the interface of a method.

Batches, randomness, accumulation, clipping, skipping of steps that are not finite, averages (EMA), checkpoints, exact
resume, logs, samples and publishing are the engine's, and the same for all methods. A method is a file such as

    class Denoiser(Method):
        def __init__(self, config, pipeline):
            self.config, self.pipeline = config, pipeline
            self.modules, self.averaged = {"unet": pipeline.unet}, ("unet",)  # the very modules of the pipeline
            self.objectives = [Objective("unet", ("unet",), self.loss)]

        @classmethod
        def build(cls, config, images):
            return cls(config, build_pipeline(config, images))

        def loss(self, networks, batch):
            noise = batch.draws.normal("noise", *batch.x.shape[1:])  # any name; it makes the numbers this use's own
            t = self.pipeline.scheduler.timestep(batch.draws.uniform("time"))
            z = self.pipeline.scheduler.add_noise(batch.x, noise, t)
            return Terms(squared_error(networks["unet"](z, t, batch.class_labels).sample, noise))

with a subclass of `TrainConfig` for its settings, each declared by `fixed`, `recorded` or `free`, and a command that
calls `Trainer(parse_config(DenoiserConfig), Denoiser).run()`. Networks that are not among its modules it moves to the
device of the batch itself.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_cfg.data.sources import LabelledImages
from diffusers_cfg.randomness import Draws
from diffusers_cfg.settings import TrainConfig


class Terms(NamedTuple):
    """A loss and what else is logged, a row for each sample of the batch. NaN in the logs is left out of their mean."""

    loss: torch.Tensor  # (batch,) float32; the mean is minimised
    logs: Mapping[str, torch.Tensor] = MappingProxyType({})  # (batch,) each, detached


class Batch(NamedTuple):
    """The rows of a step's global batch that a loss is given at a time. All objectives of a step get the same ones."""

    x: torch.Tensor  # (batch, channels, height, width) in [-1, 1], or latents
    class_labels: torch.Tensor  # (batch,) int64; -1 is unlabelled
    draws: Draws  # the step's random numbers, by purpose
    step: int
    turn: int = 0  # which of the objectives with one name it is, in their order


# What a loss calls, by name: wrapped (DDP, compiled) if it is being trained, else plain and frozen.
Networks = Mapping[str, torch.nn.Module]


class Objective(NamedTuple):
    """
    One optimizer step.

    Args:
        name (`str`): names its optimizer in checkpoints, and its logs where a method has several objectives.
        trains (`tuple[str, ...]`): the modules that it trains. All others are frozen while it is minimised.
        loss (`Callable`): `(networks, batch) -> Terms`.
    """

    name: str
    trains: tuple[str, ...]
    loss: Callable[[Networks, Batch], Terms]


def check_terms(objective: Objective, terms: Terms, batch: Batch) -> Terms:
    """Return the terms of a loss. Raise ValueError unless they are a value for each sample, and the loss is float32."""
    expected = batch.class_labels.shape
    if "loss" in terms.logs:
        raise ValueError(f"The objective {objective.name} returned a log called loss: that is the name of its loss.")
    for name, value in {"loss": terms.loss, **terms.logs}.items():
        if value.shape != expected:
            raise ValueError(
                f"The objective {objective.name} returned {name} of shape {tuple(value.shape)}, but must return one "
                f"value for each sample, shape {tuple(expected)}: do not average over the batch."
            )
    if terms.loss.dtype != torch.float32:
        raise ValueError(
            f"The objective {objective.name} returned a loss in {terms.loss.dtype}: compute it in float32."
        )
    return terms


class Method(ABC):
    """
    What a training run trains and saves. A method is one file, with one subclass that reads like its paper.

    Attributes:
        config (`TrainConfig`): the settings of the run.
        pipeline (`DiffusionPipeline`): what is sampled, saved and published. Its `vae`, if it has one, encodes the
            images. Like `CFGPipeline` it has a `sample_shape` and an `image_shape`.
        modules (`dict[str, torch.nn.Module]`): what is trained and checkpointed, by name.
        averaged (`tuple[str, ...]`): those with moving averages, which are what is sampled and saved.
        objectives (`list[Objective]`): taken in this order in every step. Several critic steps are several entries
            with one name: they share an optimizer, and differ by `Batch.turn`.
        needs_labels (`bool`): whether the data must have labels.
    """

    needs_labels: ClassVar[bool] = True
    config: TrainConfig
    pipeline: DiffusionPipeline
    modules: dict[str, torch.nn.Module]
    averaged: tuple[str, ...]
    objectives: list[Objective]

    @classmethod
    @abstractmethod
    def build(cls, config: TrainConfig, images: LabelledImages) -> Self:
        """Return the method for a dataset. Raises UserError if the settings do not fit it."""

    @property
    def compiled(self) -> tuple[str, ...]:
        """The modules that `--compile` compiles. (torch.compile knows no second derivatives.)"""
        return tuple(self.modules)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what is modelled: images, or their latents."""
        return self.pipeline.sample_shape

    @property
    def image_channels(self) -> int:
        """Channels of the images, before an autoencoder encodes them."""
        return self.pipeline.image_shape[0]

    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        """Return the optimizer of an objective, for all parameters of the modules that it trains."""
        config = self.config
        return torch.optim.AdamW(
            [parameter for name in objective.trains for parameter in self.modules[name].parameters()],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )

    def max_grad_norm(self, objective: Objective) -> float:
        """Return the norm that each module's gradient is scaled down to; `inf` only measures it."""
        return self.config.max_grad_norm

    def sampling_pipeline(self) -> DiffusionPipeline:
        """Return the pipeline that is sampled, saved and published. Called while the averaged weights are in place."""
        return self.pipeline

    def save(self, folder: Path) -> None:
        """Save what the run is for. Called once, at its end, with the averaged weights in place."""
        self.sampling_pipeline().save_pretrained(folder)

    def preview(self, accelerator: Accelerator) -> Image.Image | None:
        """Return a picture of samples. Called on all processes, with the averaged weights; by default there is none."""
        return None

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return figures of the averaged network on some fixed images, for the log; by default there are none."""
        return {}

    def example(self) -> str:
        """Return a line of code that generates an image with the saved pipeline `pipe`, and saves or shows it."""
        return 'pipe().images[0].save("sample.png")'

    def facts(self) -> dict[str, Any]:
        """Return what the plan and `run.json` say of the method, read from the pipeline and not from flags."""
        return {}

    def identity(self) -> dict[str, Any]:
        """
        Return what a resumed run must find unchanged besides its settings, such as a pretrained noise process. It must
        be nothing that is trained.
        """
        return {}


def check_method(method: Method) -> None:
    """Raise ValueError for a method whose modules and objectives do not fit each other."""
    known, trains = set(method.modules), {}
    for name in [*known, *(objective.name for objective in method.objectives)]:
        if not re.fullmatch(r"\w+", name) or name.removesuffix("_ema") in known - {name}:
            raise ValueError(f"{name!r} cannot name a module or an objective: use letters, digits and _, and no _ema.")
    for objective in method.objectives:
        if unknown := set(objective.trains) - known:
            raise ValueError(f"The objective {objective.name} trains {sorted(unknown)}, which are no modules: {known}.")
        if trains.setdefault(objective.name, objective.trains) != objective.trains:
            raise ValueError(f"The objectives called {objective.name} train different modules: give them two names.")
    if unknown := set(method.averaged) - known:
        raise ValueError(f"{sorted(unknown)} are averaged, but are no modules: {known}.")
