"""Record which item each DataLoader worker is processing, so that a crash can be reported with its cause."""

import os
import re

import numpy as np
import torch
from torch.utils.data import get_worker_info

# Bytes for the process id and the item of a worker; longer records are truncated.
RECORD_SIZE = 512


class InFlightItems:
    """
    The items that DataLoader workers are processing, in shared memory, which outlives a crashed worker.

    Args:
        num_workers (`int`): number of workers of the DataLoader.
    """

    def __init__(self, num_workers: int) -> None:
        self._records = torch.zeros(max(1, num_workers), RECORD_SIZE, dtype=torch.uint8).share_memory_()

    def record(self, item: str) -> None:
        """Record the current item, or "" for none. Do nothing in the main process."""
        worker = get_worker_info()
        if worker is not None:
            record = f"{os.getpid()} {item}".encode()[:RECORD_SIZE].ljust(RECORD_SIZE, b"\0")
            self._records.numpy()[worker.id] = np.frombuffer(record, np.uint8)

    def of_dead_workers(self, error: RuntimeError) -> list[str]:
        """Return the items of the workers whose process ids appear in `error`, torch's error about dead workers."""
        records = [bytes(record).rstrip(b"\0").decode(errors="replace") for record in self._records.numpy()]
        items = dict(record.split(" ", 1) for record in records if record)
        return [items[pid] for pid in re.findall(r"\d+", str(error)) if items.get(pid)]
