"""Test the order of the data: permutations in memory, and shuffled streams that resume at any row."""

from collections.abc import Iterator
from itertools import chain, islice

import pytest

from diffusers_cfg.config import UserError
from diffusers_cfg.data.order import GlobalBatchSampler, Position, shuffled_blocks


def indices(**settings) -> list[list[int]]:
    return list(GlobalBatchSampler(**{"num_examples": 10, "batch_size": 4, "seed": 0, "steps": range(6), **settings}))


def test_each_epoch_has_its_own_permutation():
    flat = list(chain.from_iterable(indices(batch_size=5)))
    epochs = [flat[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_determined_by_the_seed():
    """Changing these indices would change the batches of every resumed run."""
    assert indices(steps=range(2)) == [[5, 1, 0, 6], [3, 9, 7, 2]]
    assert indices(seed=1) != indices()


def test_order_resumes_at_any_step():
    assert indices(steps=range(3, 6)) == indices()[3:]


def test_order_is_independent_of_accumulation_and_world_size():
    whole = indices()
    accumulated = indices(batch_size=2, accumulation=2)
    assert [a + b for a, b in zip(accumulated[::2], accumulated[1::2], strict=True)] == whole
    ranks = [indices(batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


def test_sampler_length_is_its_number_of_batches():
    sampler = GlobalBatchSampler(10, 4, 0, range(3, 6), accumulation=2)
    assert len(sampler) == len(list(sampler)) == 6


class Shards:
    """Shards of different sizes, whose rows are (shard, row)."""

    sizes = [7, 1, 0, 12]
    num_shards = len(sizes)

    def rows(self, shard: int, first: int) -> Iterator[tuple[int, int]]:
        yield from [(shard, row) for row in range(first, self.sizes[shard])]


def take(stream: int, num_streams: int, position: Position, count: int, block_size: int = 5) -> list:
    """Return the next rows of a stream, each with the position after the row."""
    blocks = shuffled_blocks(Shards(), block_size, 0, stream, num_streams, position)
    rows = (
        (row, start._replace(done=done))
        for start, block in blocks
        for done, row in enumerate(block[start.done :], start.done + 1)
    )
    return list(islice(rows, count))


@pytest.mark.parametrize("num_streams", [1, 2, 3, 6])
def test_streams_partition_each_epoch(num_streams):
    everything = sorted((shard, row) for shard, size in enumerate(Shards.sizes) for row in range(size))
    epochs = [[], []]
    for stream in range(num_streams):
        for row, position in take(stream, num_streams, Position(), 60):
            if position.epoch < 2:
                epochs[position.epoch].append(row)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    assert epochs[0] != everything


def test_shard_order_changes_each_epoch():
    orders = [[], [], [], []]
    for (shard, _), position in take(0, 1, Position(), 80, block_size=1):
        if shard not in orders[position.epoch]:
            orders[position.epoch].append(shard)
    assert all(sorted(order) == [0, 1, 3] for order in orders)
    assert len(set(map(tuple, orders))) > 1


@pytest.mark.parametrize(("stream", "num_streams"), [(0, 1), (1, 2), (4, 6)])
def test_a_stream_resumes_after_any_row(stream, num_streams):
    rows = take(stream, num_streams, Position(), 50)
    for i, (_, position) in enumerate(rows):
        assert take(stream, num_streams, position, 50 - i - 1) == rows[i + 1 :]


def test_a_stream_without_rows_is_refused(monkeypatch):
    with pytest.raises(UserError, match="no images for stream 26 of 30.*--dataloader_num_workers"):
        take(25, 30, Position(), 1)
    monkeypatch.setattr(Shards, "sizes", [0, 0, 0, 0])
    with pytest.raises(UserError, match="The dataset has no images. Check --dataset_split"):
        take(0, 1, Position(), 1)
