"""Equivalent settings give one trajectory: the one that was recorded of each method."""

import shutil
from pathlib import Path

import pytest

from tests.support.runs import ROOT, WEIGHTS, assert_same_tensors, launch
from tests.support.trajectories import METHODS, expected, follow, trajectory_of

COMPILED = pytest.param("compile", marks=pytest.mark.slow)
TWO_PROCESSES = pytest.param("two processes", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """All methods on two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(str(folder), cwd=ROOT, processes=2, script=ROOT / "tests" / "support" / "two_processes.py")
    return folder


@pytest.mark.parametrize("how", ["plain", "resume", "accumulation", COMPILED, TWO_PROCESSES])
@pytest.mark.parametrize("method", METHODS)
def test_the_trajectory_is_the_recorded_one(request, runs, tmp_path, method, how):
    whole, out, first = runs / method, tmp_path / "out", 1
    if not whole.exists():
        follow(method, whole)
    if how == "plain":
        out = whole
    elif how == "resume":
        shutil.copytree(whole / "checkpoint-10", out / "checkpoint-10")
        follow(method, out, "--resume_from_checkpoint", "latest")
        first = 11
        # The whole state, bit for bit
        for file in (whole / "checkpoint-20").rglob("*.safetensors"):
            assert_same_tensors(file, out / "checkpoint-20" / file.relative_to(whole / "checkpoint-20"))
    elif how == "accumulation":
        follow(method, out, "--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    elif how == "compile":
        follow(method, out, "--compile")
    else:
        out = request.getfixturevalue("two_processes") / method
    logged = trajectory_of(out)
    for tag, values in expected(method).items():
        assert logged[tag] == pytest.approx({s: v for s, v in values.items() if s >= first}, rel=1e-4), tag
    # 20 steps of a rate of at most 1e-2; gradients that are all rounding, such as the keys' bias, make steps of Adam too
    assert_same_tensors(whole / "unet" / WEIGHTS, out / "unet" / WEIGHTS, rtol=1e-3, atol=2e-3)
