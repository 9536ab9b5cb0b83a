"""Test the lazy imports of the package: importing it is fast, and its public classes can be found and pickled."""

import importlib
import pickle
import subprocess
import sys
import time

import pytest

import diffusers_cfg

SCRIPT = """
import sys
import diffusers_cfg
import diffusers_cfg.model_card

assert {"CFGPipeline", "LogSNRScheduler", "UNet2DCFGModel"} <= set(dir(diffusers_cfg))
heavy = {"torch", "diffusers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_loads_neither_torch_nor_diffusers():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_classes_add_little_to_the_import_time_of_diffusers(monkeypatch):
    _ = diffusers_cfg.CFGPipeline  # imports diffusers and the modules that the package needs
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_cfg"]:
        monkeypatch.delitem(sys.modules, name)
    then = time.process_time()  # CPU time, so that other processes do not count
    again = importlib.import_module("diffusers_cfg")
    assert again.CFGPipeline is not diffusers_cfg.CFGPipeline
    assert time.process_time() - then < 0.3


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


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="module 'diffusers_cfg' has no attribute 'UNet'"):
        _ = diffusers_cfg.UNet
    assert set(diffusers_cfg.__all__) == set(diffusers_cfg._MODULES)
