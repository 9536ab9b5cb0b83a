"""Test that DataLoader workers that die are reported with the image they were reading."""

import os
import re
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_cfg.data import datasets as data
from diffusers_cfg.data.datasets import (
    CachedImages,
    LazyImages,
    StreamedImages,
    identity_collate,
    raise_for_dead_worker,
    training_dataset,
)
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.data.workers import RECORD_SIZE, InFlightItems
from tests.support.images import save_class_folders, stream_config
from tests.support.workers import error_in_process, killing_decoder


def test_only_items_of_dead_workers_are_returned(monkeypatch):
    in_flight = InFlightItems(3)
    for number, item in enumerate(["first", "ä" * RECORD_SIZE, "done"]):
        monkeypatch.setattr("diffusers_cfg.data.workers.get_worker_info", lambda i=number: SimpleNamespace(id=i))
        monkeypatch.setattr("os.getpid", lambda i=number: 100 + i)
        in_flight.record(item)
    in_flight.record("")  # the last worker is idle
    assert in_flight.of_dead_workers(RuntimeError("DataLoader worker (pid 100) is killed by signal: 9.")) == ["first"]
    items = in_flight.of_dead_workers(RuntimeError("DataLoader worker (pid(s) 100, 101, 102, 103) exited unexpectedly"))
    assert [item[:5] for item in items] == ["first", "äääää"]
    assert in_flight.of_dead_workers(RuntimeError("DataLoader worker (pid 1) is killed by signal: 9.")) == []


def test_nothing_is_recorded_in_the_main_process():
    in_flight = InFlightItems(0)
    in_flight.record("item")
    assert in_flight.of_dead_workers(RuntimeError(f"pid {os.getpid()}")) == []


def read_until_death(settings: dict[str, Any], signal_number: int) -> None:
    """Read data until image 7 of the first batch kills its worker."""
    data.MAX_CACHED_BYTES, data.to_array = 0, killing_decoder(7, signal_number)
    config = stream_config(None, train_batch_size=12, dataloader_num_workers=2, **settings)
    dataset = training_dataset(load_labelled_images(config), config, 1, show_progress=False)
    assert isinstance(dataset, StreamedImages if config.streaming else LazyImages)
    if config.streaming:
        dataset.divide(0, 1)
    batch_size = None if config.streaming else config.train_batch_size
    try:
        for _ in DataLoader(dataset, batch_size=batch_size, num_workers=2, collate_fn=identity_collate):
            pass
    except RuntimeError as error:
        raise_for_dead_worker(dataset, error)
        raise


@pytest.mark.parametrize("signal_number", [signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dead_worker_is_reported_with_its_image(tmp_path, streaming, signal_number):
    source = save_class_folders(tmp_path / "data")
    settings = {"train_data_dir": source, "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    error = error_in_process(read_until_death, settings, signal_number, start_method="fork")
    message = rf"worker \(pid.*{source}/bee/7\.png.*--dataloader_num_workers.*--resume_from_checkpoint latest"
    assert re.search(message, error), error


def test_other_errors_are_not_reported_as_dead_workers():
    dataset = CachedImages(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    for message in (
        "CUDA out of memory",
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last): …",
    ):
        raise_for_dead_worker(dataset, RuntimeError(message))
