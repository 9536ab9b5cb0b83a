"""Test how many threads a process uses, and what counts as a number that the user has set."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from diffusers_cfg.engine import processes
from diffusers_cfg.engine.accelerator import make_accelerator
from diffusers_cfg.engine.checkpoint import Checkpoint, reuse_num_threads
from diffusers_cfg.engine.processes import cpu_quota, idle_cpus, num_threads, threads_are_set
from tests.support.runs import reset_accelerate


@pytest.fixture(autouse=True)
def forget_the_number():
    """Forget the number between tests: a process chooses it once."""
    num_threads.cache_clear()
    yield
    num_threads.cache_clear()


@pytest.mark.parametrize(
    ("cpus", "quota", "idle", "local_processes", "expected"),
    [
        (2, math.inf, 1.96, 1, 2),  # an idle machine
        (2, math.inf, 0.9, 1, 1),  # one busy process
        (2, math.inf, 0.0, 1, 1),  # several
        (16, math.inf, 15.4, 1, 15),
        (16, math.inf, 13.2, 4, 3),
        (16, math.inf, 1.0, 4, 1),
        (16, 4.0, 16.0, 1, 4),  # the limit of a container
        (16, 4.0, 16.0, 2, 2),
        (16, 3.5, 16.0, 1, 4),
        (16, 4.0, 2.0, 1, 2),
        (2, 0.5, 2.0, 1, 1),
        (2, math.inf, 2.0, 3, 1),  # more processes than CPUs
    ],
)
def test_number_of_threads_is_what_is_free(monkeypatch, cpus, quota, idle, local_processes, expected):
    monkeypatch.setattr(processes, "available_cpus", lambda: set(range(cpus)))
    monkeypatch.setattr(processes, "cpu_quota", lambda: quota)
    monkeypatch.setattr(processes, "idle_cpus", lambda cpus: idle)
    assert num_threads(local_processes) == expected


def test_a_process_decides_once(monkeypatch):
    monkeypatch.setattr(processes, "available_cpus", lambda: set(range(8)))
    monkeypatch.setattr(processes, "cpu_quota", lambda: math.inf)
    numbers = iter([3.0, 8.0])
    monkeypatch.setattr(processes, "idle_cpus", lambda cpus: next(numbers))
    assert [num_threads(1), num_threads(1)] == [3, 3]


def test_fewer_threads_are_reported(monkeypatch, caplog):
    monkeypatch.setattr(processes, "available_cpus", lambda: set(range(4)))
    monkeypatch.setattr(processes, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(processes, "idle_cpus", lambda cpus: 1.1)
    with caplog.at_level("INFO"):
        num_threads(1)
    assert "Using 1 of 4 threads, because other processes are busy. Set OMP_NUM_THREADS" in caplog.text


@pytest.mark.parametrize(
    ("cpus", "intervals", "expected", "calls"),
    [
        ({0, 1}, [[0.0, 5.0]], 1.95, 1),  # idle: the first interval is enough
        ({0, 1}, [[100.0, 100.0], [60.0, 100.0], [0.0, 10.0]], 1.9, 3),  # a burst that ends
        ({0, 1}, [[100.0, 100.0]] * 5, 0.0, 5),
        ({2}, [[100.0, 100.0, 0.0]], 1.0, 1),  # only the CPUs of this process
        ({0, 9}, [[0.0, 100.0]], 2.0, 1),  # unknown CPUs are taken as idle
    ],
)
def test_idle_cpus_takes_the_quietest_interval(monkeypatch, cpus, intervals, expected, calls):
    remaining = iter(intervals)
    monkeypatch.setattr(processes.psutil, "cpu_percent", lambda interval, percpu: next(remaining))
    assert idle_cpus(cpus) == pytest.approx(expected)
    assert len(list(remaining)) == len(intervals) - calls


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, math.inf),  # a machine without a limit
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),  # a container sees its own group at the top
        ("0::/job/task", {"job/task/cpu.max": "max 100000", "job/cpu.max": "200000 100000"}, 2.0),
        ("0::/job/task", {"job/task/cpu.max": "100000 100000", "job/cpu.max": "200000 100000"}, 1.0),
        ("0::/a", {"b/cpu.max": "100000 100000"}, math.inf),  # the group of another process
        ("0::/a", {"a/cpu.max": "damaged"}, math.inf),
        ("4:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/docker/1", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        (None, {"cpu.max": "100000 100000"}, math.inf),  # not Linux
    ],
)
def test_quota_is_the_smallest_limit_of_the_groups(tmp_path, groups, files, expected):
    if groups is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"{groups}\n")
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert cpu_quota(tmp_path) == expected


TORCHRUN = [sys.executable, "/venv/bin/torchrun", "--nproc_per_node", "2", "train_cfg.py"]
ACCELERATE = [sys.executable, "/venv/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("variables", "launcher", "given", "expected"),
    [
        ({}, ["bash"], {}, False),
        ({"OMP_NUM_THREADS": "1"}, ["bash"], {}, True),  # exported in the shell, or in a script of a cluster
        ({"MKL_NUM_THREADS": "1"}, ["bash"], {}, True),
        ({"OMP_NUM_THREADS": "1"}, TORCHRUN, {}, False),  # torchrun sets 1 for several processes
        ({"OMP_NUM_THREADS": "1"}, TORCHRUN, {"OMP_NUM_THREADS": "1"}, True),
        ({"OMP_NUM_THREADS": "1"}, [*ACCELERATE, "train_cfg.py"], {}, False),
        ({"OMP_NUM_THREADS": "8"}, [*ACCELERATE, "--cpu", "train_cfg.py"], {}, False),  # all cores
        ({"OMP_NUM_THREADS": "8"}, [*ACCELERATE, "--cpu", "train_cfg.py"], {"OMP_NUM_THREADS": "8"}, True),
        ({"OMP_NUM_THREADS": "1"}, [*ACCELERATE, "--num_cpu_threads_per_process", "1", "x.py"], {}, True),
        ({"OMP_NUM_THREADS": "1"}, [*ACCELERATE, "--num-cpu-threads-per-process=1", "x.py"], {}, True),
    ],
)
def test_numbers_of_the_user_are_told_from_those_of_launchers(monkeypatch, variables, launcher, given, expected):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: launcher)
    monkeypatch.setattr(psutil.Process, "environ", lambda self: given)
    assert threads_are_set() == expected


@pytest.mark.parametrize(("number", "expected"), [("1", False), ("3", True)])
def test_launcher_whose_environment_is_hidden(monkeypatch, number, expected):
    def denied(_process):
        raise psutil.AccessDenied

    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", number)
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: TORCHRUN)
    monkeypatch.setattr(psutil.Process, "environ", denied)
    assert threads_are_set() == expected


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the number of threads matters on a CPU")
@pytest.mark.parametrize("user_set", [False, True])
def test_accelerator_keeps_the_number_of_the_user(monkeypatch, user_set):
    reset_accelerate()
    before = torch.get_num_threads()
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if user_set:
        monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    monkeypatch.setattr("diffusers_cfg.engine.accelerator.num_threads", lambda local_processes: 5)
    try:
        make_accelerator()
        assert torch.get_num_threads() == (before if user_set else 5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("saved", "processes_before", "device", "variables", "expected"),
    [
        (3, 1, "cpu", {}, 3),
        (3, 1, "cpu", {"OMP_NUM_THREADS": "2"}, 2),
        (3, 2, "cpu", {}, 2),
        (3, 1, "cuda", {}, 2),
        (9, 1, "cpu", {}, 2),  # more than this machine has
        (None, 1, "cpu", {}, 2),  # a checkpoint of an earlier version
    ],
)
def test_resumed_run_keeps_its_number_of_threads(monkeypatch, saved, processes_before, device, variables, expected):
    """The number decides the rounding of sums, so a resumed run would not equal an uninterrupted one bit for bit."""
    before, record = torch.get_num_threads(), {"num_processes": processes_before}
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=1)
    monkeypatch.setattr(processes, "available_cpus", lambda: set(range(4)))
    monkeypatch.setattr(processes, "cpu_quota", lambda: 8.0)
    try:
        torch.set_num_threads(2)
        reuse_num_threads(Checkpoint(Path(), record | ({"num_threads": saved} if saved else {})), accelerator)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_available_cpus_are_those_of_the_affinity():
    assert processes.available_cpus() <= set(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        assert processes.available_cpus() == os.sched_getaffinity(0)
