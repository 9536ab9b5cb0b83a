"""Create and save the state of a run: modules, EMA weights, optimizers, learning rates and step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import is_xformers_available
from safetensors.torch import load_file, save_file

from diffusers_cfg.config import UserError
from diffusers_cfg.engine.method import Method
from diffusers_cfg.engine.posthoc_ema import PowerAverages
from diffusers_cfg.settings import TrainConfig

WEIGHTS = "diffusion_pytorch_model"


@dataclass
class TrainState:
    """
    The state of a run, which checkpoints save.

    Attributes:
        modules (`dict[str, torch.nn.Module]`): the modules of the method, by name.
        ema (`dict[str, list[EMAModel]]`): the EMA weights of each averaged module, one `EMAModel` for each decay. The
            first is sampled, the rest are saved as variants.
        optimizers (`dict[str, torch.optim.Optimizer]`): the optimizers, by objective.
        batch_size (`int`): number of images in a step, over all processes and accumulated batches.
        num_processes (`int`): number of processes.
        posthoc (`PowerAverages`, *optional*): the averages of `posthoc_ema_steps`, on the main process only.
        lr_schedulers (`dict[str, torch.optim.lr_scheduler.LRScheduler]`): the learning rate schedulers, by objective.
        scaler (`torch.amp.GradScaler`, *optional*): the gradient scaler of fp16.
        step (`int`): number of completed steps.
        seconds (`float`): training time in seconds.
        stream (`dict`, *optional*): the position in streamed data.
        history (`list[dict]`): the changes of settings, each with the step from which it applies.
        trackers (`dict[str, str]`): the id or the name of the run in each tracker, for one curve over resumed runs.
    """

    modules: dict[str, torch.nn.Module]
    ema: dict[str, list[EMAModel]]
    optimizers: dict[str, torch.optim.Optimizer]
    batch_size: int
    num_processes: int
    posthoc: PowerAverages | None = None
    lr_schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler] = field(default_factory=dict)
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    seconds: float = 0.0
    stream: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    trackers: dict[str, str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """The number of parameters of all modules."""
        return sum(parameter.numel() for module in self.modules.values() for parameter in module.parameters())


def check_xformers(config: TrainConfig) -> None:
    """Raise UserError if `--enable_xformers_memory_efficient_attention` cannot work."""
    if config.enable_xformers_memory_efficient_attention and not (
        is_xformers_available() and torch.cuda.is_available()
    ):
        raise UserError(
            "--enable_xformers_memory_efficient_attention needs a GPU and xformers (pip install -e "
            '".[xformers]"). Leave it out to use the attention of torch.'
        )


def make_state(config: TrainConfig, method: Method, batch_size: int, accelerator: Accelerator) -> TrainState:
    """Prepare the modules for training, and return the state before the first step."""
    for module in method.modules.values():
        module.train()
        enable_checkpointing = getattr(module, "enable_gradient_checkpointing", None)
        if config.gradient_checkpointing and enable_checkpointing is not None:
            enable_checkpointing()
        enable_xformers = getattr(module, "enable_xformers_memory_efficient_attention", None)
        if config.enable_xformers_memory_efficient_attention and enable_xformers is not None:
            enable_xformers()
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
    # Objectives with the same name share an optimizer.
    optimizers = {objective.name: objective for objective in method.objectives}
    optimizers = {name: method.optimizer(objective) for name, objective in optimizers.items()}
    components, posthoc = component_names(method), None
    if config.posthoc_ema_steps and accelerator.is_main_process:
        posthoc = PowerAverages({components.get(name, name): method.modules[name] for name in method.averaged})
    return TrainState(method.modules, ema, optimizers, batch_size, accelerator.num_processes, posthoc)


def component_names(method: Method) -> dict[str, str]:
    """Return the name in the pipeline of each averaged module that is one of its components."""
    components = method.pipeline.components.items()
    return {
        name: component
        for name in method.averaged
        for component, module in components
        if module is method.modules[name]
    }


def count_step(state: TrainState) -> None:
    """Count a step that the optimizers have taken, and include its weights in all averages."""
    state.step += 1
    for name, models in state.ema.items():
        for ema in models:
            ema.step(state.modules[name].parameters())
    if state.posthoc is not None:
        state.posthoc.update(state.step)


def set_learning_rates(config: TrainConfig, state: TrainState, total_steps: int) -> None:
    """
    Create the learning rate schedulers, starting at the state's step. Learning rates depend only on the step and the
    settings, so checkpoints do not store the schedulers.
    """
    for name, optimizer in state.optimizers.items():
        # Unwrapped, because accelerate steps a scheduler of a wrapped optimizer once for each process.
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
    """Use the EMA weights of one decay, and put all modules into eval mode, inside the block."""
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


@contextmanager
def frozen(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Disable gradients for the parameters of modules inside the block."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def variant_of(ema: EMAModel) -> str:
    """Return the variant name of EMA weights, such as ema999 for a decay of 0.999. It cannot contain dots."""
    return "ema" + str(ema.decay).removeprefix("0.")


def save_module(module: torch.nn.Module, folder: Path, variant: str | None = None) -> None:
    """Save the weights of a module, and its config if it has one, with the file names of diffusers."""
    save_pretrained = getattr(module, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(folder, variant=variant)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        save_file(tensors, folder / weights_file(variant))


def load_weights(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """Load weights written by `save_module`."""
    return load_file(folder / weights_file(variant))


def weights_file(variant: str | None = None) -> str:
    """Return the file name of the weights of a variant."""
    return f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"


def save_variants(state: TrainState, name: str, folder: Path) -> None:
    """Save the EMA weights of a module for all decays but the first, as variants such as `ema999`."""
    for index, ema in enumerate(state.ema.get(name, [])[1:], start=1):
        with ema_weights(state, index):
            save_module(state.modules[name], folder, variant_of(ema))


def parameter_names(modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> Sequence[str]:
    """Return the names `MODULE.PARAMETER` of an optimizer's parameters, in the order of its state."""
    names = {id(p): f"{module}.{name}" for module in modules for name, p in modules[module].named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
