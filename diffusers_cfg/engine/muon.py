"""Optimize the weights of linear and convolutional layers with Muon, and all other parameters with AdamW."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices, and AdamW for all other
    parameters, as one optimizer. The weight of a convolution is the matrix `(out_channels, in_channels * height *
    width)`.

    Muon's update is close to an orthogonal matrix, scaled to the size of an update of AdamW (Liu et al. 2025, arXiv
    2502.16982), so that both use the same learning rate and the same weight decay.

    Args:
        matrices (`Sequence[torch.nn.Parameter]`): parameters of two or more dimensions, in the default memory format.
        others (`Sequence[torch.nn.Parameter]`): all other parameters.
        lr (`float`): learning rate.
        options: other arguments of `torch.optim.AdamW`.
    """

    # A step reads `found_inf` on the device. The scaler of fp16 would otherwise read it on the CPU, which waits.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        matrices: Sequence[torch.nn.Parameter],
        others: Sequence[torch.nn.Parameter],
        lr: float,
        **options: Any,
    ) -> None:
        self.options = ("lr", *options)
        groups = [{"params": matrices, "is_muon": True}, {"params": others, "is_muon": False}]
        super().__init__(groups, {"lr": lr, "is_muon": False, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Take a step. Like torch's fused AdamW, it changes nothing if `found_inf` is set and not zero."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                step = self._step_muon if group["is_muon"] else self._step_adamw
                step(parameters, {name: group[name] for name in self.options}, skip)
        return loss

    # The optimizers of torch are made for each step, and share the state of their parameters with this one.

    def _step_adamw(
        self, parameters: list[torch.nn.Parameter], options: dict[str, Any], skip: torch.Tensor | None
    ) -> None:
        """Take a step of AdamW."""
        adamw = torch.optim.AdamW(parameters, **options)
        adamw.state.update({parameter: self.state[parameter] for parameter in parameters})
        if skip is not None:
            adamw.found_inf = skip
        adamw.step()

    def _step_muon(
        self, parameters: list[torch.nn.Parameter], options: dict[str, Any], skip: torch.Tensor | None
    ) -> None:
        """Take a step of Muon, whose parameters are matrices that share the memory of the parameters."""
        matrices = [torch.nn.Parameter(parameter.view(len(parameter), -1)) for parameter in parameters]
        muon = torch.optim.Muon(
            matrices, lr=options["lr"], weight_decay=options["weight_decay"], adjust_lr_fn="match_rms_adamw"
        )
        kept: list[torch.Tensor] = []
        for matrix, parameter in zip(matrices, parameters, strict=True):
            assert parameter.grad is not None
            matrix.grad, muon.state[matrix] = parameter.grad.view_as(matrix), self.state[parameter]
            if skip is not None:
                matrix.grad = matrix.grad.where(skip == 0, 0.0)
                kept += [matrix.data, *muon.state[matrix].values()]
        before = [tensor.clone() for tensor in kept]
        muon.step()
        # Restored on the device, where the flag is, because reading it would stall every step.
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(torch.where(skip == 0, tensor, value))


def split_parameters(
    modules: Iterable[torch.nn.Module],
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the weights of all linear and convolutional layers of modules, and all other parameters."""
    modules, layers = list(modules), (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    weights = {id(m.weight) for module in modules for m in module.modules() if isinstance(m, layers)}
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    matrices = [parameter for key, parameter in parameters.items() if key in weights]
    return matrices, [parameter for key, parameter in parameters.items() if key not in weights]
