"""Tell how many processes the launcher has started on this machine, and how many threads each should use."""

import functools
import logging
import math
import os
from pathlib import Path, PurePosixPath

import psutil

from diffusers_cfg.config import UserError

logger = logging.getLogger(__name__)

LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}


def is_launcher(pid: int) -> bool:
    """Return whether a process is `accelerate launch` or `torchrun`."""
    try:
        return not LAUNCHERS.isdisjoint(Path(argument).name for argument in psutil.Process(pid).cmdline()[:4])
    except psutil.Error:
        return False


def local_world_size() -> int:
    """Return the number of processes on this machine, which the launcher sets. Raise UserError if it is invalid."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) == 0:
        raise UserError(
            f"The environment variable LOCAL_WORLD_SIZE must be a positive integer, but is {value!r}. Unset it."
        )
    return int(value)


def threads_are_set() -> bool:
    """
    Return whether the user has set the number of threads, with `OMP_NUM_THREADS`, `MKL_NUM_THREADS` or `accelerate
    launch --num_cpu_threads_per_process`.

    `accelerate launch` and `torchrun` set `OMP_NUM_THREADS` themselves if the user has not, to 1 unless `--cpu` is
    passed. What a launcher was given is in the environment and in the arguments with which it was started.
    """
    if "MKL_NUM_THREADS" in os.environ:
        return True
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    launcher = os.getppid()
    if not is_launcher(launcher):
        return True
    try:
        process = psutil.Process(launcher)
        flag = "--num_cpu_threads_per_process"
        # argparse accepts --num-cpu-threads-per-process too.
        given = [argument.split("=")[0].replace("-", "_") for argument in process.cmdline()]
        return "OMP_NUM_THREADS" in process.environ() or flag.replace("-", "_") in given
    except psutil.Error:  # The system does not show the environment of another process.
        return os.environ["OMP_NUM_THREADS"] != "1"


@functools.cache  # The runs that one command compares use the same number.
def num_threads(local_processes: int) -> int:
    """
    Return the number of threads that each process should use, at least 1: the CPUs that are free when it is called,
    divided by the processes of this run on this machine.

    A CPU is not free if the affinity of this process or the quota of its container excludes it, or if another process
    keeps it busy. Threads of a layer wait for each other, so one on a busy CPU delays all.

    Args:
        local_processes (`int`): processes of this run on this machine.
    """
    most = most_threads(local_processes)
    if most == 1:
        return 1
    threads = min(most, max(1, round(idle_cpus(available_cpus())) // local_processes))
    if threads < most:
        logger.info(
            "Using %d of %d threads, because other processes are busy. Set OMP_NUM_THREADS to use another number.",
            threads,
            most,
        )
    return threads


def most_threads(local_processes: int) -> int:
    """Return the CPUs that each process may use, at least 1: those of its affinity and of its container's quota."""
    return max(1, math.ceil(min(len(available_cpus()), cpu_quota())) // local_processes)


def available_cpus() -> set[int]:
    """Return the CPUs on which this process may run, all those of the machine if the system has no CPU affinity."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float:
    """
    Return the CPU time per second that the control groups of this process may use, in CPUs. It is the smallest limit
    of the process's group and of all groups above it, and infinite without a limit, as on systems other than Linux.

    Args:
        root (`Path`): the folder that contains `proc` and `sys`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    # In a container, the path may be the host's. Then the container's own group is at the top.
    paths = [PurePosixPath(line.split(":", 2)[2].lstrip("/")) for line in lines]
    groups = {group for path in paths for group in (path, *path.parents)}
    mounts = ("", "unified", "cpu", "cpu,cpuacct")  # version 2 (alone or beside version 1), then version 1
    return min(group_quota(root / "sys/fs/cgroup" / mount / group) for mount in mounts for group in groups)


def group_quota(folder: Path) -> float:
    """Return the limit of one control group in CPUs, infinite without a limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text(encoding="utf-8") for name in names)
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # not mounted, or "max"
        return math.inf


def idle_cpus(cpus: set[int]) -> float:
    """
    Return how many of the given CPUs are idle while this process sleeps: the most in five intervals of 0.2 seconds, so
    that a short burst of work does not count. It returns at once when all are idle.
    """
    most = 0.0
    for _ in range(5):
        busy = psutil.cpu_percent(interval=0.2, percpu=True)
        # In some containers the list is not of all CPUs of the machine. The others are taken as idle.
        most = max(most, sum(1 - busy[cpu] / 100 if cpu < len(busy) else 1 for cpu in cpus))
        if round(most) == len(cpus):
            break
    return most
