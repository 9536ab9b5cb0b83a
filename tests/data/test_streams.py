"""Test streamed images: the batches of processes and workers, positions, unreadable images."""

import json
import shutil
from itertools import islice

import pytest
import torch

from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets as data
from tests.support.images import numbers_of, open_stream, save_shards


def test_stream_yields_every_image_once_per_epoch(tmp_path):
    numbers = numbers_of(open_stream(save_shards(tmp_path / "data", 9, 4, 7)), 10)
    assert sorted(numbers[:20]) == sorted(numbers[20:]) == list(range(20))
    assert numbers[:20] != numbers[20:]


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (16, 16), (32,)])
def test_processes_and_workers_read_separate_streams(tmp_path, caplog, sizes):
    source = save_shards(tmp_path / "data", *sizes)
    by_process = torch.tensor([numbers_of(open_stream(source, rank, 2, num_workers=2), 4) for rank in range(2)])
    assert (f"{len(sizes)} shards for 4 streams" in caplog.text) == (len(sizes) < 4)
    assert by_process.flatten().sort().values.tolist() == list(range(32))
    # The same streams, all in one process
    interleaved = by_process.view(2, 4, 4).transpose(0, 1).flatten().tolist()
    assert numbers_of(open_stream(source, num_workers=4), 8) == interleaved


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_resumes_from_its_state(tmp_path, num_workers, rank):
    source = save_shards(tmp_path / "data", 9, 4, 7)
    processes = [open_stream(source, index, 2, num_workers) for index in range(2)]
    before = [numbers_of(images, 3) for images in processes]
    state = json.loads(json.dumps(processes[0].state_dict([images.reached for images in processes])))
    resumed = open_stream(source, rank, 2, num_workers)
    resumed.load_state_dict(state)
    assert before[rank] + numbers_of(resumed, 9) == numbers_of(open_stream(source, rank, 2, num_workers), 12)
    assert resumed.state_dict([])["batches"] == 24


def test_state_of_different_data_or_streams_is_refused(tmp_path):
    source = save_shards(tmp_path / "data", 6, 6)
    images = open_stream(source, num_workers=2)
    state = json.loads(json.dumps(images.state_dict([images.reached])))
    open_stream(source, 1, 2).load_state_dict(state)
    with pytest.raises(UserError, match="positions of 2 streams.*1 processes with --dataloader_num_workers 0"):
        open_stream(source).load_state_dict(state)
    with pytest.raises(UserError, match="--train_batch_size is 3, but .* batches of 4. Resume with .*_size 4"):
        open_stream(source, num_workers=2, train_batch_size=3).load_state_dict(state)
    with pytest.raises(UserError, match="has 3 shards, but had 2 .*--overwrite_output_dir"):
        open_stream(save_shards(tmp_path / "more", 6, 6, 6), num_workers=2).load_state_dict(state)


def test_unreadable_streamed_images_are_skipped_and_reported(tmp_path):
    images = open_stream(save_shards(tmp_path / "data", 9, 4, broken=[2, 11]))
    batches = list(islice(images, 6))
    names = {name for batch in batches for name in batch.unreadable}
    assert names == {"row 2 of shard 0 (2.png)", "row 2 of shard 1 (11.png)"}
    seen = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist()
    assert sorted(set(seen)) == sorted(set(range(13)) - {2, 11})
    assert images.probe.images[:, 0, 0, 0].tolist() != []


def test_stream_without_readable_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIN_SEEN", 30)
    images = open_stream(save_shards(tmp_path / "data", 6))
    shutil.rmtree(tmp_path / "data")
    source = save_shards(tmp_path / "data", 6, broken=range(6))
    with pytest.raises(UserError, match="5 of 5 images cannot be read"):
        open_stream(source)
    with pytest.raises(UserError, match=r"30 images in a row cannot be read, starting with row \d of shard 0"):
        next(iter(images))


def test_missing_labels_become_minus_1(tmp_path):
    source = save_shards(tmp_path / "data", 8, labels=lambda number: [0, 1, -1, None][number % 4])
    batch = next(iter(open_stream(source, train_batch_size=8)))
    by_number = dict(zip(batch.images[:, 0, 0, 0].tolist(), batch.class_labels.tolist(), strict=True))
    assert [by_number[number] for number in range(4)] == [0, 1, -1, -1]


def test_stream_without_labels_yields_the_same_images(tmp_path):
    def batch(labels):
        source = save_shards(tmp_path / ("with" if labels else "without"), 9, 4, 7, labels=labels)
        return next(iter(open_stream(source, needs_labels=False, train_batch_size=20)))

    labelled, unlabelled = batch(lambda number: number % 2), batch(None)
    assert torch.equal(unlabelled.images, labelled.images)
    assert unlabelled.class_labels.tolist() == [-1] * 20
    assert unlabelled.class_labels.dtype == torch.int64
