"""Find operations that wait for a GPU, without one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_cfg import CFGPipeline, UNet2DCFGModel
from diffusers_cfg.engine.batches import StepBatches
from diffusers_cfg.engine.trainer import Trainer

# Operations that return a value, or a tensor whose shape depends on values
READS = {
    "_linalg_check_errors",
    "_local_scalar_dense",  # item, bool, float, int and use as an index
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# Functions that cause no operation if the tensor is on the CPU already
COPIES_TO_THE_CPU = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


@contextmanager
def synchronizations(device: str, found: list[str]) -> Iterator[None]:
    """
    Record the operations in the block that would wait for a GPU if `device` was one: reads of values of its tensors,
    and copies to it that are not `non_blocking`.

    Args:
        device (`str`): "cpu" for code whose tensors are all on the device, or "meta" for code that reads values of
            tensors on the CPU too. torch raises an error for most reads from "meta".
        found (`list[str]`): receives the name of each of them.
    """
    with _Functions(device, found), _Operations(device, found):
        yield


class _Functions(TorchFunctionMode):
    def __init__(self, device: str, found: list[str]) -> None:
        super().__init__()
        self.device, self.found = device, found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_read = func in COPIES_TO_THE_CPU and args[0].device.type == self.device
        is_created = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if is_read or (is_created and torch.device(kwargs["device"]).type == self.device):
            self.found.append(func.__name__)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, device: str, found: list[str]) -> None:
        super().__init__()
        self.device, self.found = device, found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if self._waits(name, args, kwargs):
            self.found.append(name)
        return func(*args, **kwargs)

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
            if target is None or source.device == torch.device(target):
                return False
            return not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if not any(tensor.device.type == self.device for tensor in tensors):
            return False
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_"):  # a mask is filled with one value without reading it
            is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            return is_mask and (name == "index" or args[2].ndim > 0)
        return name in READS


def guard_steps(monkeypatch: pytest.MonkeyPatch, guard: Callable[[], AbstractContextManager]) -> list[str]:
    """
    Run what a training run does in each step inside a context: the copy of a batch, the step, and what follows it,
    except for that of the last step. Return a list that receives the names of the calls.
    """
    calls: list[str] = []

    def guarded(original: Callable) -> Callable:
        def call(self, *args):
            is_last = original is after_step and self.state.step == self.plan.total_steps
            if is_last:
                return original(self, *args)
            calls.append(original.__name__)
            with guard():
                return original(self, *args)

        return call

    after_step = Trainer._after_step
    for owner, method in ((StepBatches, StepBatches._batch), (Trainer, Trainer.train_step), (Trainer, after_step)):
        monkeypatch.setattr(owner, method.__name__, guarded(method))
    return calls


def leave_out_checks_on_the_cpu(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    """Remove from `found` what `UNet2DCFGModel.forward` reads of labels and of w only if they are on the CPU."""

    def unrecorded(original: Callable) -> Callable:
        def call(*args):
            count = len(found)
            try:
                return original(*args)
            finally:
                del found[count:]

        return call

    for name in ("_fill_class_labels", "_embed_guidance_scale"):
        monkeypatch.setattr(UNet2DCFGModel, name, unrecorded(getattr(UNet2DCFGModel, name)))


def move_to_meta(pipeline: CFGPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pipeline run on the meta device, and return black images instead of those that have no values."""
    for name in ("unet", "guide_unet", "classifier"):
        if (network := getattr(pipeline, name)) is not None:
            network.to("meta")
    monkeypatch.setattr(CFGPipeline, "_check_networks", lambda self, **_: None)  # refuses the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # so does this
    monkeypatch.setattr(CFGPipeline, "decode", lambda self, latents: torch.full(latents.shape, -1.0))
