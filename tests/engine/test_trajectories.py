"""Test that equivalent settings reproduce the recorded trajectory of each method."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.runs import ROOT, WEIGHTS, assert_same_tensors, launch
from tests.support.trajectories import METHODS, expected, train_trajectory, trajectory_of

# Each compiles for half a minute, or starts processes.
SLOW = {(method, how) for method in METHODS for how in ("two processes", "compile")}
# Those of "adamw" are compared with a smaller tolerance.
SLOW |= {(method, "accumulation") for method in ("cfg", "one_pass", "unlabelled")}
CASES = [
    pytest.param(method, how, marks=[pytest.mark.slow] * ((method, how) in SLOW))
    for method in METHODS
    for how in ("plain", "resume", "accumulation", "two processes", "compile")
    if (method, how) != ("unlabelled", "compile")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the folder of the plain runs, one for each method."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Run all methods on two processes, and return their folder."""
    folder = tmp_path_factory.mktemp("two")
    launch(str(folder), cwd=ROOT, processes=2, script="tests.support.two_processes")
    return folder


@pytest.mark.parametrize(("method", "how"), CASES)
def test_equivalent_settings_reproduce_the_trajectory(request, runs, tmp_path, method, how):
    whole, out, first = runs / method, tmp_path / "out", 1
    if not whole.exists():
        train_trajectory(method, whole)
    if how == "plain":
        out = whole
    elif how == "resume":
        shutil.copytree(whole / "checkpoint-10", out / "checkpoint-10")
        train_trajectory(method, out, "--resume_from_checkpoint", "latest")
        first = 11
        # The last checkpoint is the same bit for bit.
        for file in (whole / "checkpoint-20").rglob("*.safetensors"):
            assert_same_tensors(file, out / "checkpoint-20" / file.relative_to(whole / "checkpoint-20"))
    elif how == "accumulation":
        train_trajectory(method, out, "--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    elif how == "compile":
        torch.compiler.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        train_trajectory(method, out, "--compile")
        assert graphs["unique_graphs"] > before
    else:
        out = request.getfixturevalue("two_processes") / method
    logged = trajectory_of(out)
    for tag, values in expected(method).items():
        # The gradient of the noise schedule is a small difference of large terms. Muon computes in bfloat16.
        rel = 5e-3 if method in ("cfg", "one_pass") else 1e-3 if tag == "grad_norm/noise_schedule" else 1e-4
        assert logged[tag] == pytest.approx({s: v for s, v in values.items() if s >= first}, rel=rel), tag
    if method == "vdm":
        for module in ("unet", "noise_schedule"):
            files = (folder / "checkpoint-20" / module / WEIGHTS for folder in (whole, out))
            assert_same_tensors(*files, rtol=0, atol=3e-5)
    else:  # Where the gradient is rounding noise, such as for the bias of the keys, weights differ by steps of Adam.
        module = "classifier" if method == "classifier" else "unet"
        assert_same_tensors(whole / module / WEIGHTS, out / module / WEIGHTS, rtol=1e-3, atol=2e-3)
