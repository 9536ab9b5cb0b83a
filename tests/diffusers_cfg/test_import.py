"""The package is lazy: importing it is cheap, and its public classes are where they were."""

import pickle
import subprocess
import sys

import pytest

import diffusers_cfg

SCRIPT = """
import sys, time
import diffusers_cfg
import diffusers_cfg.model_card

assert {"CFGPipeline", "LogSNRScheduler", "UNet2DCFGModel"} <= set(dir(diffusers_cfg))
heavy = {"torch", "diffusers"} & set(sys.modules)
assert not heavy, heavy

# What the package adds to the classes of diffusers that it is made of; CPU time of this process, whatever else runs
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DModel
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor

then = time.process_time()
from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
assert time.process_time() - then < 0.3, time.process_time() - then
"""


def test_importing_loads_neither_torch_nor_diffusers():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "module"),
    [("CFGPipeline", "hub"), ("LogSNRScheduler", "scheduling_log_snr"), ("UNet2DCFGModel", "unet_2d_cfg")],
)
def test_public_classes_are_found_by_name(name, module):
    cls = getattr(diffusers_cfg, name)
    assert name in diffusers_cfg.__all__
    assert name in dir(diffusers_cfg)
    assert cls.__module__ == f"diffusers_cfg.{module}"
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert cls is getattr(sys.modules[cls.__module__], name)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="module 'diffusers_cfg' has no attribute 'UNet'"):
        _ = diffusers_cfg.UNet
    assert set(diffusers_cfg.__all__) == set(diffusers_cfg._HOMES)
