"""Measure how fast a command trains and samples while other processes keep the CPUs busy."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from diffusers_cfg import CFGPipeline
from diffusers_cfg.evaluation.reports import table
from diffusers_cfg.evaluation.timing import timed

# What decides how many threads a command uses and how they wait. Each side starts without them, and adds its own.
THREAD_VARIABLES = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
# The package's defaults; and as many threads as CPUs, which spin as long as GNU OpenMP lets them by default
SIDES = {"default": {}, "torch": {"OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": "300000"}}
# The sampling calls that are timed together
CALLS = 3


def sampling(pipeline: CFGPipeline, batch_size: int, steps: int) -> Callable[[], float]:
    """Return a function that samples a batch at w = 1, `CALLS` times, and returns the mean seconds."""
    labels = torch.arange(batch_size) % pipeline.unet.num_classes
    calls = timed(lambda: [pipeline(labels, 1.0, steps, output_type="pt") for _ in range(CALLS)])
    return lambda: calls() / CALLS


def print_rates(sides: Mapping[str, Callable[[], float]], counts: Mapping[str, int], accelerator: Accelerator) -> None:
    """
    Time functions after a call for warming up, and print the number of threads and the images per second of all
    processes together as a line of JSON.

    Args:
        sides (`Mapping[str, Callable]`): functions that return seconds, by name.
        counts (`Mapping[str, int]`): images of a call in each process, by name.
        accelerator (`Accelerator`): the processes.
    """
    rates: dict[str, float] = {"threads": torch.get_num_threads()}
    for name, side in sides.items():
        side()
        rates[name] = counts[name] * accelerator.num_processes / side()
    if accelerator.is_main_process:
        print(json.dumps(rates))


def run_rates(command: Sequence[str], variables: Mapping[str, str]) -> dict[str, float]:
    """
    Run a command that calls `print_rates` in a new process, and return what it prints. Raise RuntimeError if it fails.

    Args:
        command (`Sequence[str]`): the arguments of Python.
        variables (`Mapping[str, str]`): environment variables in place of `THREAD_VARIABLES`.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    result = subprocess.run(
        [sys.executable, *command], env={**inherited, **variables}, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"python {' '.join(command)} failed with exit code {result.returncode}.")
    return json.loads(result.stdout.splitlines()[-1])


# Ends when its parent has ended, even if that was killed
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(1_000_000))"


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run Python processes that compute without a pause until the end of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare_busy(command: Sequence[str], num_busy: int, repeats: int) -> dict[str, Any]:
    """
    Measure both `SIDES` alone and beside busy processes, in alternating new processes.

    Args:
        command (`Sequence[str]`): the arguments of Python for a command that calls `print_rates`.
        num_busy (`int`): number of busy processes.
        repeats (`int`): measurements of each side alone and beside.

    Returns:
        `"runs"`: the side, the number of busy processes and the rates of each measurement. `"rows"`: for each rate and
        side the medians, alone and beside, and both as a fraction of the rate of torch's threads alone.
    """
    runs = []
    for repeat in range(repeats):
        for busy in (0, num_busy):
            with busy_processes(busy):
                for side in list(SIDES)[:: -1 if repeat % 2 else 1]:
                    runs.append({"side": side, "busy": busy, **run_rates(command, SIDES[side])})

    def median(name: str, side: str, busy: int) -> float:
        return statistics.median(run[name] for run in runs if (run["side"], run["busy"]) == (side, busy))

    rows = []
    for name in ("training", "sampling"):
        idle = median(name, "torch", 0)
        for side in SIDES:
            alone, beside = median(name, side, 0), median(name, side, num_busy)
            fractions = {"alone_fraction": alone / idle, "beside_fraction": beside / idle}
            rows.append({"measured": name, "side": side, "alone": alone, "beside": beside, **fractions})
    return {"cpus": os.cpu_count(), "busy": num_busy, "rows": rows, "runs": runs}


def report(record: Mapping[str, Any]) -> str:
    """Return what `compare_busy` has measured as a Markdown table. Pairs read alone / beside the busy processes."""
    labels = {"default": "the package's", "torch": "torch's, one per CPU"}
    rows = []
    for row in record["rows"]:
        runs = [run for run in record["runs"] if run["side"] == row["side"]]
        numbers = [
            "-".join(map(str, sorted({run["threads"] for run in runs if run["busy"] == busy})))
            for busy in (0, record["busy"])
        ]
        rates = [
            f"{row['alone']:.0f} / {row['beside']:.0f}",
            f"{row['alone_fraction']:.2f} / {row['beside_fraction']:.2f}",
        ]
        rows.append([row["measured"], labels[row["side"]], " / ".join(numbers), *rates])
    header = ["rate", "threads", "number", "images/s", "of torch's threads alone"]
    return (
        f"{record['cpus']} CPUs, {record['versions']}, alone / beside {record['busy']} busy processes\n\n"
        f"{table(header, rows)}"
    )
