"""DataLoader workers that die are reported with the image they were reading."""

import os
import signal
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, Dataset

from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets as data
from diffusers_cfg.data.datasets import LazyImages, identity_collate, raise_for_dead_worker, training_dataset
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.data.workers import RECORD_SIZE, InFlightItems
from tests.support.images import open_stream, save_class_folders, stream_config
from tests.support.workers import deadly


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A loader waits this long for its other workers, of which the dead one may hold a lock; by default 5 s."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


def test_only_items_of_dead_workers_are_returned(monkeypatch):
    in_flight = InFlightItems(3)
    for number, item in enumerate(["first", "ä" * RECORD_SIZE, "done"]):
        monkeypatch.setattr("diffusers_cfg.data.workers.get_worker_info", lambda i=number: SimpleNamespace(id=i))
        monkeypatch.setattr("os.getpid", lambda i=number: 100 + i)
        in_flight.record(item)
    in_flight.record("")  # the last one has nothing to do
    assert in_flight.of_dead_workers(RuntimeError("DataLoader worker (pid 100) is killed by signal: 9.")) == ["first"]
    items = in_flight.of_dead_workers(RuntimeError("DataLoader worker (pid(s) 100, 101, 102, 103) exited unexpectedly"))
    assert [item[:5] for item in items] == ["first", "äääää"]
    assert in_flight.of_dead_workers(RuntimeError("DataLoader worker (pid 1) is killed by signal: 9.")) == []


def test_nothing_is_recorded_in_the_main_process():
    in_flight = InFlightItems(0)
    in_flight.record("item")
    assert in_flight.of_dead_workers(RuntimeError(f"pid {os.getpid()}")) == []


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dead_worker_is_reported_with_its_image(tmp_path, monkeypatch, streaming, how):
    monkeypatch.setattr(data, "MAX_CACHED_BYTES", 0)
    monkeypatch.setattr(data, "to_array", deadly(7, how))
    source = save_class_folders(tmp_path / "data")
    settings = {"train_data_dir": source, "cache_dir": str(tmp_path / "cache")}
    # A worker dies within its first batch: while it dies, the connection to an earlier batch's tensors may break first.
    if streaming:
        dataset = open_stream(None, num_workers=2, train_batch_size=100, **settings)
        loader = DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=identity_collate)
    else:
        config = stream_config(None, streaming=False, dataloader_num_workers=2, **settings)
        dataset = training_dataset(load_labelled_images(config), config, 1, show_progress=False)
        assert isinstance(dataset, LazyImages)
        loader = DataLoader(dataset, batch_size=12, num_workers=2, collate_fn=identity_collate)
    with pytest.raises(RuntimeError) as error:
        for _ in zip(range(100), loader, strict=False):
            pass
    message = rf"worker \(pid.*{source}/bee/7\.png.*--dataloader_num_workers.*--resume_from_checkpoint latest"
    with pytest.raises(UserError, match=message):
        raise_for_dead_worker(dataset, error.value)


def test_other_errors_are_not_about_dead_workers(tmp_path):
    class Failing(Dataset):
        in_flight = InFlightItems(1)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise RuntimeError("no memory")

    dataset = Failing()
    with pytest.raises(RuntimeError, match="in DataLoader worker process 0") as error:
        list(DataLoader(dataset, num_workers=1))
    raise_for_dead_worker(dataset, error.value)
    raise_for_dead_worker(dataset, RuntimeError("CUDA out of memory"))
