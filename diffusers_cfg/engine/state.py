"""Hold all that changes during a run: modules, averages, optimizers, learning rates, step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import is_xformers_available
from safetensors.torch import load_file, save_file

from diffusers_cfg.config import UserError
from diffusers_cfg.engine.method import Method
from diffusers_cfg.settings import TrainConfig

WEIGHTS = "diffusion_pytorch_model"


@dataclass
class TrainState:
    """
    All that changes during a run, and that a checkpoint holds.

    Attributes:
        modules (`dict[str, torch.nn.Module]`): the method's, by name.
        averages (`dict[str, list[EMAModel]]`): of each averaged module one for each decay. The first is sampled, the
            others are kept as variants.
        optimizers (`dict[str, torch.optim.Optimizer]`), lr_schedulers: by objective.
        batch_size (`int`): images in a step, on all processes and accumulated.
        num_processes (`int`): that share a step.
        scaler (`torch.amp.GradScaler`, *optional*): in fp16.
        step (`int`), seconds (`float`): how far the run is.
        stream (`dict`, *optional*): the place in streamed data.
        history (`list[dict]`): the settings, and from which step on they changed.
    """

    modules: dict[str, torch.nn.Module]
    averages: dict[str, list[EMAModel]]
    optimizers: dict[str, torch.optim.Optimizer]
    batch_size: int
    num_processes: int
    lr_schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler] = field(default_factory=dict)
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    seconds: float = 0.0
    stream: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Parameters of all modules."""
        return sum(parameter.numel() for module in self.modules.values() for parameter in module.parameters())


def make_state(config: TrainConfig, method: Method, batch_size: int, num_processes: int) -> TrainState:
    """Return the modules ready to train, their averages and optimizers, before the first step."""
    for module in method.modules.values():
        module.train()
        if config.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        if config.enable_xformers_memory_efficient_attention:
            if not (is_xformers_available() and torch.cuda.is_available()):
                raise UserError(
                    "--enable_xformers_memory_efficient_attention needs a GPU and xformers (pip install -e "
                    '".[xformers]"); leave it out to use torch\'s own attention.'
                )
            if hasattr(module, "enable_xformers_memory_efficient_attention"):
                module.enable_xformers_memory_efficient_attention()
    averages = {
        name: [
            EMAModel(
                method.modules[name].parameters(),
                decay=decay,
                use_ema_warmup=True,
                inv_gamma=config.ema_inv_gamma,
                power=config.ema_power,
                foreach=any(parameter.requires_grad for parameter in method.modules[name].parameters()),
            )
            for decay in config.ema_decays
        ]
        for name in method.averaged
    }
    # Several objectives of one name share an optimizer.
    optimizers = {objective.name: objective for objective in method.objectives}
    optimizers = {name: method.optimizer(objective) for name, objective in optimizers.items()}
    return TrainState(method.modules, averages, optimizers, batch_size, num_processes)


def set_learning_rates(config: TrainConfig, state: TrainState, total_steps: int) -> None:
    """
    Give each optimizer the learning rates of the run from the state's step on. They are a function of the step and of
    the settings alone, so nothing of them is stored.
    """
    for name, optimizer in state.optimizers.items():
        # accelerate wraps optimizers, and would step a learning rate that it wrapped once for each process.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        state.lr_schedulers[name] = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=total_steps,
            last_epoch=state.step - 1,
        )


@contextmanager
def averaged_weights(state: TrainState, index: int = 0) -> Iterator[None]:
    """Give the averaged modules the weights of one average, and put all modules into eval mode, inside the block."""
    was_training = {name: module.training for name, module in state.modules.items()}
    averages = {name: averages[index] for name, averages in state.averages.items() if averages}
    for module in state.modules.values():
        module.eval()
    for name, average in averages.items():
        average.store(state.modules[name].parameters())
        average.copy_to(state.modules[name].parameters())
    try:
        yield
    finally:
        for name, average in averages.items():
            average.restore(state.modules[name].parameters())
        for name, module in state.modules.items():
            module.train(was_training[name])


def variant_of(average: EMAModel) -> str:
    """Return the variant that an average is saved as: 0.999 is ema999, since the names of variants have no dots."""
    return "ema" + str(average.decay).removeprefix("0.")


def save_module(module: torch.nn.Module, folder: Path, variant: str | None = None) -> None:
    """Save a module's weights, and its config if it has one, under the file names of diffusers."""
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder, variant=variant)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        save_file(tensors, folder / weights_file(variant))


def load_weights(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """Read what `save_module` wrote."""
    return load_file(folder / weights_file(variant))


def weights_file(variant: str | None = None) -> str:
    """Return the name of a file of weights."""
    return f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"


def save_variants(state: TrainState, name: str, folder: Path) -> None:
    """Save each average of a module but the first as a variant, such as `ema999`."""
    for index, average in enumerate(state.averages.get(name, [])[1:], start=1):
        with averaged_weights(state, index):
            save_module(state.modules[name], folder, variant_of(average))


def parameter_names(modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> Sequence[str]:
    """Return the name of each of an optimizer's parameters, in the order of its state: `MODULE.PARAMETER`."""
    names = {id(p): f"{module}.{name}" for module in modules for name, p in modules[module].named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
