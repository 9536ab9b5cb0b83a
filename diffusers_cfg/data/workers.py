"""Record which item each DataLoader worker is processing, so that a crash can be reported with the item that caused it."""

import os
import re

import numpy as np
import torch
from torch.utils.data import get_worker_info

NOTE_SIZE = 512  # bytes


class InFlightItems:
    """What each worker has in its hands, in memory that outlives it."""

    def __init__(self, num_workers: int):
        self._notes = torch.zeros(max(1, num_workers), NOTE_SIZE, dtype=torch.uint8).share_memory_()

    def record(self, item: str) -> None:
        """Called in a worker, or in the main process, whose end needs no explanation."""
        worker = get_worker_info()
        if worker is not None:
            note = f"{os.getpid()} {item}".encode()[:NOTE_SIZE].ljust(NOTE_SIZE, b"\0")
            self._notes.numpy()[worker.id] = np.frombuffer(note, np.uint8)

    def of_dead_workers(self, error: RuntimeError) -> list[str]:
        """What those workers held whose process ids are in an error of torch's."""
        notes = [bytes(note).rstrip(b"\0").decode(errors="replace") for note in self._notes.numpy()]
        held = dict(note.split(" ", 1) for note in notes if note)
        return [held[pid] for pid in re.findall(r"\d+", str(error)) if held.get(pid)]
