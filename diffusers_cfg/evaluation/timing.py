"""Time code and measure its memory, compared with other code that does the same."""

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
    """Seconds of both sides, in turn."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return the medians, and the median ratio of adjacent (ours, peer) pairs, which cancels slow drifts."""
        ratios = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
        medians = {name: statistics.median(values) for name, values in vars(self).items()}
        return {**medians, "ratio": statistics.median(ratios)}


def time_interleaved(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> PairedTimings:
    """
    Call two functions that return seconds in turn, the other one first each time. The first call of each does not
    count.
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
    """Return the time in seconds, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that calls another and returns its seconds, including the device's work."""

    def seconds() -> float:
        then = now()
        function()
        return now() - then

    return seconds


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return by how much a call raises the memory of the process at most; on a GPU, torch's memory there."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    process, done, grown = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            grown.append(process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(grown)


class FreshProcess(NamedTuple):
    seconds: float
    peak_bytes: int


def run_python(*argv: str) -> FreshProcess:
    """Run Python with some arguments. Return the seconds until it ends, and its largest memory."""
    then = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - then
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"python {' '.join(argv)} failed.")
    return FreshProcess(seconds, usage.ru_maxrss * 1024)


def describe_machine() -> dict[str, Any]:
    """Return the name of the processor that torch uses, and the versions, for JSON."""
    on_gpu = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
