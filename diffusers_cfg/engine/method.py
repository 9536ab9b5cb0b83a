"""Define the interface of a training method: its modules, its losses, and what it samples and saves.

The engine provides the rest for all methods: batches, random numbers, accumulation, gradient clipping, skipping of
non-finite steps, EMA weights, checkpoints, exact resume, logging, samples and publishing. A complete method:

    @dataclass(frozen=True, kw_only=True)
    class DenoiserConfig(TrainConfig):
        antithetic: bool = recorded(False, "Draw the times of a batch in antithetic pairs.")

    class Denoiser(Method):
        needs_labels = False

        def __init__(self, config, pipeline):
            self.config, self.pipeline = config, pipeline
            self.modules, self.averaged = {"unet": pipeline.unet}, ("unet",)  # not copies of the pipeline's modules
            self.objectives = [Objective("unet", ("unet",), self.loss)]

        @classmethod
        def build(cls, config, images):
            unet = build_unet(config, None, images.channels, num_classes=1)
            return cls(config, CFGPipeline(unet, LogSNRScheduler(prediction_type="epsilon")))

        def loss(self, networks, batch):
            draws, scheduler = batch.draws, self.pipeline.scheduler
            u = draws.antithetic("time") if self.config.antithetic else draws.uniform("time")
            noise = draws.normal("noise", *batch.x.shape[1:])  # draws with different names are independent
            z = scheduler.add_noise(batch.x, noise, scheduler.timestep(u))
            return Terms(squared_error(networks["unet"](z, scheduler.timestep(u)).sample, noise))

        def example(self):
            return 'pipe(class_labels=-1, guidance_scale=-1.0).images[0].save("sample.png")'  # without a class

A command trains it with `Trainer(parse_config(DenoiserConfig), Denoiser).run()`. A method must move networks that are
not in its `modules` to the device of the batch.
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

from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.engine.muon import MuonAdamW, split_parameters
from diffusers_cfg.randomness import Draws
from diffusers_cfg.settings import TrainConfig


class Terms(NamedTuple):
    """The loss and logged values of each sample in a batch. NaN values are left out of the logged means."""

    loss: torch.Tensor  # (batch,), float32; its mean is minimised
    logs: Mapping[str, torch.Tensor] = MappingProxyType({})  # (batch,) each, detached


class Batch(NamedTuple):
    """One batch of this process, a part of the step's global batch. All objectives of a step get the same batches."""

    x: torch.Tensor  # (batch, channels, height, width) in [-1, 1], or latents
    class_labels: torch.Tensor  # (batch,), int64; -1 means unlabelled
    draws: Draws  # random numbers for these rows, by purpose
    step: int
    turn: int = 0  # index among the objectives with the same name


# The modules that a loss calls, by name: wrapped (DDP, torch.compile) if the objective trains them, otherwise frozen.
Networks = Mapping[str, torch.nn.Module]


class Objective(NamedTuple):
    """
    A loss and the modules that one optimizer step on it trains.

    Args:
        name (`str`): the name of its optimizer in checkpoints, and of its logs if the method has several objectives.
        trains (`tuple[str, ...]`): names of the modules to train. All other modules are frozen during the step.
        loss (`Callable`): the loss, `(networks, batch) -> Terms`.
    """

    name: str
    trains: tuple[str, ...]
    loss: Callable[[Networks, Batch], Terms]


def check_terms(objective: Objective, terms: Terms, batch: Batch) -> Terms:
    """Return `terms`. Raise ValueError unless they have one value for each sample and the loss is float32."""
    expected = batch.class_labels.shape
    if "loss" in terms.logs:
        raise ValueError(f"The objective {objective.name} returned a log named loss, which is reserved. Rename it.")
    for name, value in {"loss": terms.loss, **terms.logs}.items():
        if value.shape != expected:
            raise ValueError(
                f"The objective {objective.name} returned {name} of shape {tuple(value.shape)}, but must return one "
                f"value for each sample, shape {tuple(expected)}. Do not average over the batch."
            )
    if terms.loss.dtype != torch.float32:
        raise ValueError(
            f"The objective {objective.name} returned a loss in {terms.loss.dtype}. Compute it in float32."
        )
    return terms


class Method(ABC):
    """
    A training method. Each method is a subclass in a separate file, which follows the notation of its paper.

    Attributes:
        config (`TrainConfig`): the settings of the run.
        pipeline (`DiffusionPipeline`): the pipeline to sample, save and publish. Its `vae`, if any, encodes the images.
            Like `CFGPipeline` it has a `sample_shape` and an `image_shape`.
        modules (`dict[str, torch.nn.Module]`): the modules to train and to checkpoint, by name.
        averaged (`tuple[str, ...]`): names of the modules with EMA weights, which are sampled and saved.
        objectives (`list[Objective]`): the objectives, minimised in this order in every step. For several critic steps,
            list the objective several times: the entries share an optimizer and differ in `Batch.turn`.
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
        """Build the method for a dataset. Raise UserError if the settings do not match the data."""

    @property
    def compiled(self) -> tuple[str, ...]:
        """The names of the modules to compile with `--compile`. torch.compile does not support second derivatives."""
        return tuple(self.modules)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape of a sample, `(channels, height, width)`: of an image, or of its latents."""
        return self.pipeline.sample_shape

    @property
    def image_channels(self) -> int:
        """The number of channels of the images, before an autoencoder encodes them."""
        return self.pipeline.image_shape[0]

    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        """Return the optimizer of an objective, with all parameters of the modules that it trains."""
        config, modules = self.config, [self.modules[name] for name in objective.trains]
        options: dict[str, Any] = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            "eps": config.adam_epsilon,
            "fused": True,
        }
        if config.optimizer == "muon":
            return MuonAdamW(*split_parameters(modules), **options)
        return torch.optim.AdamW([parameter for module in modules for parameter in module.parameters()], **options)

    def max_grad_norm(self, objective: Objective) -> float:
        """Return the maximum gradient norm of each module; `inf` disables clipping."""
        return self.config.max_grad_norm

    def sampling_pipeline(self) -> DiffusionPipeline:
        """Return the pipeline to sample, save and publish. Called with the EMA weights in place."""
        return self.pipeline

    def save(self, folder: Path) -> None:
        """Save the result of the run. Called once, at the end, with the EMA weights in place."""
        self.sampling_pipeline().save_pretrained(folder)

    def preview(self, accelerator: Accelerator) -> Image.Image | None:
        """Return an image of samples, by default None. Called on all processes, with the EMA weights in place."""
        return None

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return metrics of a fixed set of images to log, by default none. Called with the EMA weights in place."""
        return {}

    def watch(self, step: int, values: Mapping[str, float]) -> None:  # noqa: B027 (optional)
        """Warn if the values that are logged at a step show that training fails. By default do nothing."""

    def example(self) -> str:
        """Return a line of code that generates an image with the saved pipeline `pipe`, and saves or shows it."""
        return 'pipe().images[0].save("sample.png")'

    def facts(self) -> dict[str, Any]:
        """Return facts for the plan and `run.json`. They come from the pipeline, since it may be pretrained."""
        return {}

    def identity(self) -> dict[str, Any]:
        """
        Return values other than settings that must be the same when the run is resumed, such as a pretrained noise
        process. They must not change during training.
        """
        return {}


def check_method(method: Method) -> None:
    """Raise ValueError if the modules, the averaged modules and the objectives of a method are inconsistent."""
    known, trains = set(method.modules), {}
    for name in [*known, *(objective.name for objective in method.objectives)]:
        if not re.fullmatch(r"\w+", name) or name.removesuffix("_ema") in known - {name}:
            raise ValueError(f"{name!r} cannot name a module or an objective. Use letters, digits and _, without _ema.")
    for objective in method.objectives:
        if unknown := set(objective.trains) - known:
            raise ValueError(
                f"The objective {objective.name} trains {sorted(unknown)}, but the modules are {sorted(known)}."
            )
        if trains.setdefault(objective.name, objective.trains) != objective.trains:
            raise ValueError(
                f"The objectives named {objective.name} train different modules. Give them different names."
            )
    if unknown := set(method.averaged) - known:
        raise ValueError(f"{sorted(unknown)} are averaged, but the modules are {sorted(known)}.")
