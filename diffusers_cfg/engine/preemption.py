"""Handle the signals that stop a run: of cluster schedulers, of Ctrl-C, and of a terminal that closes.

This module imports nothing heavy, so that the handlers are installed before torch is imported.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Self

from diffusers_cfg.config import CommandError, say
from diffusers_cfg.engine.processes import is_launcher

# The exit code with which a job asks HTCondor to resume it.
EXIT_RESUME = 85
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Preempted(CommandError):
    """An exit after a signal, with a checkpoint saved."""

    exit_code = EXIT_RESUME

    def __str__(self) -> str:
        return "Stopped and saved. Resume with the same command and --resume_from_checkpoint latest."


class NotSaved(CommandError):
    """An error that ends a run after a signal if its checkpoint could not be saved."""


class Preemption:
    """
    A handler of signals that stop the run. Before the first step, a signal exits immediately, since there is nothing to
    save. During a step, it sets `requested`, and the step is finished. During `interruptible` work, such as sampling,
    it raises `Preempted`. A second signal always exits immediately.

    Attributes:
        running (`bool`): whether training has started, so that there is something to save.
        requested (`bool`): whether a signal has requested the run to stop.
    """

    def __init__(self) -> None:
        self.requested = self.running = self._interruptible = False

    def install(self) -> Self:
        """
        Install the handler for this process, and return it. Signals that are ignored remain ignored, as with `nohup`.
        `accelerate launch` of one process ends on a signal without passing it on, so its end counts as a SIGTERM.
        """
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        if is_launcher(launcher := os.getppid()):
            threading.Thread(target=self._watch, args=(launcher,), daemon=True).start()
        return self

    def _watch(self, launcher: int) -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        if not self.requested:
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested or not self.running:
            say(f"{name}: exiting immediately.", sys.stderr)
            os._exit(EXIT_RESUME)
        self.requested = True
        say(f"{name}: finishing the step, then saving.", sys.stderr)
        if self._interruptible:
            raise Preempted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals raise `Preempted` inside the block, for work between two steps that may remain unfinished."""
        self._interruptible = True
        try:
            if self.requested:
                raise Preempted
            yield
        finally:
            self._interruptible = False


def ignore_signals(ending: Event, _worker: int) -> None:
    """
    Ignore `SIGNALS` in a DataLoader worker until the event is set. Clusters and terminals signal every process of a
    job, and the current step still needs its data. At the end of the run, torch terminates workers with SIGTERM.

    Args:
        ending (`Event`): set at the end of the run.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        if ending.is_set():
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, handle)
