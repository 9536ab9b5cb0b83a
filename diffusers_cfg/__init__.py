"""Classifier-free guidance (Ho & Salimans 2022) for Hugging Face Diffusers."""

from .hub import CFGPipeline
from .scheduling_log_snr import LogSNRScheduler
from .unet_2d_cfg import UNet2DCFGModel

__version__ = "0.1.0"

__all__ = ["CFGPipeline", "LogSNRScheduler", "UNet2DCFGModel"]
