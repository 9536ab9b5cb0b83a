"""Measure the time and the memory of code, compared with equivalent code."""

import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import torch


@dataclass
class PairedTimings:
    """The seconds of alternating calls of two functions."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return the medians, and the median ratio of adjacent (ours, peer) pairs, which cancels slow drifts."""
        ratios = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
        medians = {name: statistics.median(values) for name, values in vars(self).items()}
        return {**medians, "ratio": statistics.median(ratios)}


def time_interleaved(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> PairedTimings:
    """
    Call two functions that return seconds, alternating which comes first. The first call of each is a warm-up.

    Args:
        ours, peer (`Callable`): the functions to compare.
        repeats (`int`): recorded calls of each function.
    """
    ours()
    peer()
    timings = PairedTimings()
    for i in range(repeats):
        sides = [(timings.ours, ours), (timings.peer, peer)]
        for seconds, side in sides if i % 2 else reversed(sides):
            seconds.append(side())
    return timings


def now() -> float:
    """Synchronize the GPU, if there is one, and return the time in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that calls `function` and returns the seconds taken, including work on the GPU."""

    def seconds() -> float:
        start = now()
        function()
        return now() - start

    return seconds


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the peak memory increase of a call: torch's memory on a GPU if there is one, else the process's memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    process, done, increases = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def sample() -> None:
        increases.append(process.memory_info().rss - before)

    def watch() -> None:
        while not done.wait(0.002):
            sample()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = function()
        sample()  # before the result is freed: on a busy machine, the thread may not have run
        del result
    finally:
        done.set()
        watcher.join()
    return max(increases)


class FreshProcess(NamedTuple):
    """The cost of a process from start to end."""

    seconds: float
    peak_bytes: int


def run_python(*argv: str) -> FreshProcess:
    """Run Python with the given arguments. Return its wall time and its peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"python {' '.join(argv)} failed with exit code {process.returncode}.")
    return FreshProcess(seconds, usage.ru_maxrss * 1024)


def describe_machine() -> dict[str, Any]:
    """Return the device that torch uses and the versions of Python and torch, for JSON."""
    on_gpu = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
