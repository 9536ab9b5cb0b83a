"""Stop when asked to: SIGTERM and SIGUSR1, which the schedulers of clusters send before they kill.

Nothing heavy is imported here, so that the handlers are in place before torch loads.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Self

from diffusers_cfg.config import CommandError

# "Resume me", as HTCondor has it
EXIT_RESUME = 85
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(CommandError):
    """The run was asked to stop, and has saved a checkpoint."""

    exit_code = EXIT_RESUME

    def __str__(self) -> str:
        return "Stopped and saved. Resume with the same command and --resume_from_checkpoint latest."


class NotSaved(CommandError):
    """The run was asked to stop, and could not save where it was."""


class Preemption:
    """
    Handle a signal by where in the run it arrives. Before the first step it ends the process, which has nothing to
    save; in a step it is noted, and the step is finished; in `interruptible` work, such as sampling, it ends that work.
    A second signal ends the process at once.

    Attributes:
        running (`bool`): whether there is something to save.
        requested (`bool`): whether the run was asked to stop.
    """

    def __init__(self):
        self.requested = self.running = self._interruptible = False

    def install(self) -> Self:
        """Handle the signals of this process from now on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested or not self.running:
            print(f"{name}: exiting immediately.", file=sys.stderr, flush=True)
            os._exit(EXIT_RESUME)
        self.requested = True
        print(f"{name}: finishing the step, then saving.", file=sys.stderr, flush=True)
        if self._interruptible:
            raise Preempted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark work between two steps that may be left unfinished: a signal raises Preempted in it."""
        self._interruptible = True
        try:
            if self.requested:
                raise Preempted
            yield
        finally:
            self._interruptible = False


def ignore_signals(ending: Event, _worker: int) -> None:
    """
    Ignore SIGTERM and SIGUSR1 in a DataLoader worker until the event is set. Clusters signal every process of a job,
    and the current step still needs its data; but at the end of the run torch itself terminates workers by SIGTERM.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        if ending.is_set():
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, handle)
