"""Stop when asked to: SIGTERM and SIGUSR1, as the schedulers of clusters send them before they kill."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# "Resume me", as HTCondor has it
EXIT_RESUME = 85
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was asked to stop, and has saved what it can go on from."""


class Preemption:
    """
    What a signal does depends on where in the run it comes: before the first step it ends the process, which has
    nothing to save; in a step it is noted, and the step is finished; in `interruptible` work, such as sampling, it ends
    that work. A second signal ends the process at once.

    Attributes:
        running (`bool`): whether there is something to save.
        requested (`bool`): whether the run was asked to stop.
    """

    def __init__(self):
        self.requested = self.running = self._interruptible = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested or not self.running:
            print(f"{name}: leaving at once.", file=sys.stderr, flush=True)
            os._exit(EXIT_RESUME)
        self.requested = True
        print(f"{name}: finishing the step, then saving.", file=sys.stderr, flush=True)
        if self._interruptible:
            raise Preempted(name)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work between two steps that can be left half done: a signal raises Preempted in it."""
        self._interruptible = True
        try:
            if self.requested:
                raise Preempted
            yield
        finally:
            self._interruptible = False


def leave_signals_to_the_parent(_worker: int) -> None:
    """For the workers of a data loader: clusters signal all processes of a job, but these serve the step to its end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
