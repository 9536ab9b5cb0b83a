"""Test the check of a GPU on the CPU, with tiny sizes."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation import gpu_check
from diffusers_cfg.evaluation.gpu_check import StepClock, Variant, count_flops, measured_rows, run_tests
from diffusers_cfg.method_settings import CFGConfig
from tests.support.commands import load_command
from tests.support.models import make_unet
from tests.support.runs import ROOT, reset_accelerate

command = load_command("studies/gpu_check")
SIZES = {"repeats": 1, "sampling_steps": 2, "warm_up": 1, "training_steps": 1, "matmul": 16}
TINY = CFGConfig(
    optimizer="adamw",
    resolution=8,
    block_out_channels=[8],
    layers_per_block=1,
    attention_resolutions=[8],
    train_batch_size=2,
    report_to="none",
    checkpointing_steps=0,
    validation_steps=0,
    validation_guidance_scales=[0.0],
    num_inference_steps=1,
)


class Collected:
    """A pytest plugin that keeps the collected tests."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def test_the_tests_that_need_a_gpu_are_collected():
    collected = Collected()
    argv = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(command.main.__globals__["GPU_TESTS"])]
    assert pytest.main(argv, plugins=[collected]) == 0
    assert len(collected.items) >= 50
    assert {marker.name for item in collected.items for marker in item.iter_markers()} >= {"gpu", "skipif", "slow"}


def test_without_a_gpu_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "run_tests", None)
    with pytest.raises(UserError, match="There is no GPU that torch .* can use"):
        command.main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_end_to_end_on_the_cpu(tmp_path, monkeypatch, capsys):
    """Variants that cannot run have a row with the reason."""
    reset_accelerate()
    tests = {"seconds": 1.0, "outcomes": {"passed": 2}, "failures": {"test_a": "assert 1 == 2"}, "stopped": None}
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: tests)
    variants = [Variant("fp32"), Variant("TF32", channels_last=True), Variant("fp32", xformers=True)]
    monkeypatch.setattr(gpu_check, "VARIANTS", variants)
    command.check(tmp_path, TINY, SIZES, torch.device("cpu"))
    reset_accelerate()
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    for rows in (record["sampling"], record["training"]):
        assert [row["variant"] for row in rows] == ["fp32", "TF32, channels_last", "fp32, xformers"]
        for row in rows[:2]:
            assert min(row["seconds"].values()) > 0
            assert row["mfu"] > 0
        assert "xformers" in rows[2]["reason"]
    assert [row["difference"] < 1e-5 for row in record["sampling"][:2]] == [True, True]
    report = (tmp_path / "gpu_check.md").read_text()
    assert "2 passed" in report
    assert "`test_a`: assert 1 == 2" in report
    assert report in capsys.readouterr().out


def test_rows_after_the_deadline_are_left_out():
    rows = measured_rows({"sampling": lambda variant: pytest.fail("measured")}, deadline=0)["sampling"]
    assert {row["reason"] for row in rows} == {"left out: 480 s have passed"}
    assert len({row["variant"] for row in rows}) == len(gpu_check.VARIANTS)


def test_settings_of_a_variant_end_with_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    before = torch.backends.cudnn.allow_tf32
    with Variant("fp32", compile="reduce-overhead").active():
        assert not torch.backends.cudnn.allow_tf32
        assert gpu_check.os.environ["ACCELERATE_DYNAMO_MODE"] == "reduce-overhead"
    assert torch.backends.cudnn.allow_tf32 == before
    assert gpu_check.os.environ["ACCELERATE_DYNAMO_MODE"] == "max-autotune"


def test_clock_alternates_segments_with_the_other_loop():
    peer_steps = []
    clock = StepClock(lambda steps: peer_steps.append(steps) or 1.0, warm_up=2, steps=3, segments=2)
    for _ in range(clock.total_steps):
        clock.step()
    assert clock.total_steps == 8
    assert peer_steps == [2, 3, 3]
    assert [len(values) for values in vars(clock.timings).values()] == [2, 2]


def test_flops_of_a_convolution_and_its_gradients():
    """A training step takes three times those of an evaluation, but the first layer needs no gradient of its input."""
    forward, step = count_flops(make_unet(), 2)
    assert forward > 2 * 2 * 64 * 9 * 8  # the first convolution alone
    assert 2.5 * forward < step < 3 * forward
    assert count_flops(make_unet(), 4) == (2 * forward, 2 * step)


@pytest.mark.slow
def test_outcomes_of_tests_are_counted(tmp_path):
    file = tmp_path / "tests" / "engine" / "test_example.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('x', ['a b', 2])\n"
        "def test_good(x): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
        "def test_slow(): time.sleep(30)\n"
    )
    found = run_tests(file, 60, "-k", "not slow")
    assert found["outcomes"] == {"failed": 1, "passed": 2, "skipped": 1}
    assert found["failures"] == {"test_bad": "assert 1 == 2"}
    assert found["stopped"] is None
    found = run_tests(file, 6)
    assert found["outcomes"] == {"failed": 1, "passed": 2, "skipped": 1}
    assert found["stopped"] == "stopped after 6 s"
    assert "exit code 5" in run_tests(file, 60, "-k", "nothing")["stopped"]


def test_missing_pytest_is_reported(tmp_path, monkeypatch):
    result = subprocess.CompletedProcess([], 1, b"python: No module named pytest")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    assert "exit code 1: python: No module named pytest" in run_tests(tmp_path / "a" / "b" / "c.py", 60)["stopped"]


def test_tests_are_where_the_command_looks_for_them():
    assert command.main.__globals__["GPU_TESTS"] == Path(ROOT / "tests" / "engine" / "test_gpu.py")
