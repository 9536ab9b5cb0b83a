"""Provide classifier-free guidance (Ho & Salimans 2022) for Hugging Face Diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier_2d import NoisyClassifier2DModel
    from .hub import CFGPipeline
    from .scheduling_log_snr import LogSNRScheduler
    from .unet_2d_cfg import UNet2DCFGModel

__version__ = "0.1.0"

__all__ = ["CFGPipeline", "LogSNRScheduler", "NoisyClassifier2DModel", "UNet2DCFGModel"]

# Imported lazily (PEP 562): torch and diffusers take seconds to import, and a command's `--help` needs neither.
_MODULES = {
    "CFGPipeline": "hub",
    "LogSNRScheduler": "scheduling_log_snr",
    "NoisyClassifier2DModel": "classifier_2d",
    "UNet2DCFGModel": "unet_2d_cfg",
}


def __getattr__(name: str) -> Any:
    """Import a public class at first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names in the module, including classes that are not imported yet."""
    return sorted({*globals(), *__all__})
