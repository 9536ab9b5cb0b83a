"""Test the interleaved timings and the measurement of memory."""

import mmap

import numpy as np

from diffusers_cfg.evaluation.timing import PairedTimings, peak_bytes, time_interleaved


def test_ratio_is_the_median_over_adjacent_pairs():
    timings = PairedTimings(ours=[1.0, 30.0, 2.0], peer=[2.0, 40.0, 2.0])
    assert timings.summary() == {"ours": 2.0, "peer": 2.0, "ratio": 0.75}


def test_sides_alternate_which_comes_first():
    calls = []
    timings = time_interleaved(lambda: calls.append("ours") or 1.0, lambda: calls.append("peer") or 2.0, repeats=2)
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert (timings.ours, timings.peer) == ([1.0, 1.0], [2.0, 2.0])


def test_peak_bytes_includes_the_memory_of_the_call():
    def allocate() -> np.ndarray:
        # Not with malloc, which may reuse memory that other tests have freed and that is still resident.
        memory = np.frombuffer(mmap.mmap(-1, 100_000_000), np.uint8)
        memory.fill(1)
        return memory

    assert peak_bytes(allocate) > 90_000_000
