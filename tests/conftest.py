"""Provide fixtures that several folders of tests share."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_cfg.config import bound_spinning

# As in the commands. The processes that tests start inherit it.
if "torch" not in sys.modules:
    bound_spinning()
else:
    raise RuntimeError("A plugin of pytest has imported torch, so that OpenMP's threads spin without a bound.")
# Each worker of `pytest -n` is pinned to one core, together with the processes that its tests start.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

from diffusers_cfg import CFGPipeline, UNet2DCFGModel
from diffusers_cfg.engine.preemption import SIGNALS
from tests.support.hub_server import Hub
from tests.support.models import make_pipeline, make_unet
from tests.support.runs import train


@pytest.fixture(autouse=True)
def restore_process_state():
    """Restore the signal handlers and the logging after a test that runs a command in this process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.disable(logging.NOTSET)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Yield a local server in place of the Hub."""
    with Hub().serve() as hub:
        yield hub


@pytest.fixture
def unet() -> UNet2DCFGModel:
    """Return a tiny network with random weights."""
    return make_unet()


@pytest.fixture
def pipeline() -> CFGPipeline:
    """Return a tiny pipeline with random weights."""
    return make_pipeline()


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory) -> Path:
    """Return the output folder of a tiny run of classifier-free guidance. All tests share it: copy it to change it."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    train(folder, "--conditioning_dropout_prob", "0.2")
    return folder
