"""Fixtures that several folders of tests share."""

import logging
import os
import signal
from pathlib import Path

import pytest

# Before torch is imported: OpenMP's threads spin less while they wait, which costs 1 % on an idle machine and doubles
# the rate when other processes are running. Processes that tests start inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# The workers of `pytest -n` have a core each, and so have the processes that their tests start.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

from diffusers_cfg import CFGPipeline, UNet2DCFGModel
from diffusers_cfg.engine.preemption import SIGNALS
from tests.support.hub_server import Hub
from tests.support.models import make_pipeline, make_unet
from tests.support.runs import train


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Take back the signal handlers and the logging of a command, whose process would end with it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.disable(logging.NOTSET)


@pytest.fixture
def hub():
    with Hub().serve() as hub:
        yield hub


@pytest.fixture
def unet() -> UNet2DCFGModel:
    return make_unet()


@pytest.fixture
def pipeline() -> CFGPipeline:
    return make_pipeline()


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory) -> Path:
    """One tiny run of classifier-free guidance for all tests. Copy it to write into it."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    train(folder, "--conditioning_dropout_prob", "0.2")
    return folder
