"""Hold all that changes during a run: modules, EMA weights, optimizers, learning rates, step."""

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
        ema (`dict[str, list[EMAModel]]`): the moving averages of each averaged module, one for each decay. The first is
            sampled, the others are saved as variants.
        optimizers (`dict[str, torch.optim.Optimizer]`), lr_schedulers: by objective.
        batch_size (`int`): images in a step, on all processes and accumulated.
        num_processes (`int`): that share a step.
        scaler (`torch.amp.GradScaler`, *optional*): in fp16.
        step (`int`), seconds (`float`): how far the run is.
        stream (`dict`, *optional*): the place in streamed data.
        history (`list[dict]`): the settings, and from which step on they changed.
    """

    modules: dict[str, torch.nn.Module]
    ema: dict[str, list[EMAModel]]
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
    """Return the modules ready to train, their EMA weights and optimizers, before the first step."""
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
    ema = {
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
    return TrainState(method.modules, ema, optimizers, batch_size, num_processes)


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
def ema_weights(state: TrainState, index: int = 0) -> Iterator[None]:
    """Give the averaged modules the EMA weights of one decay, and put all modules into eval mode, inside the block."""
    was_training = {name: module.training for name, module in state.modules.items()}
    ema = {name: models[index] for name, models in state.ema.items() if models}
    for module in state.modules.values():
        module.eval()
    for name, model in ema.items():
        model.store(state.modules[name].parameters())
        model.copy_to(state.modules[name].parameters())
    try:
        yield
    finally:
        for name, model in ema.items():
            model.restore(state.modules[name].parameters())
        for name, module in state.modules.items():
            module.train(was_training[name])


def variant_of(ema: EMAModel) -> str:
    """Return the variant name of EMA weights: ema999 for a decay of 0.999, as variant names cannot contain dots."""
    return "ema" + str(ema.decay).removeprefix("0.")


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
    """Save the EMA weights of a module for each decay but the first, as variants such as `ema999`."""
    for index, ema in enumerate(state.ema.get(name, [])[1:], start=1):
        with ema_weights(state, index):
            save_module(state.modules[name], folder, variant_of(ema))


def parameter_names(modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> Sequence[str]:
    """Return the name of each of an optimizer's parameters, in the order of its state: `MODULE.PARAMETER`."""
    names = {id(p): f"{module}.{name}" for module in modules for name, p in modules[module].named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
