"""Determine the order of the data: the images of each step, in memory or streamed, and where a stream resumes."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Sampler

from diffusers_cfg.config import UserError
from diffusers_cfg.randomness import seeded_generator

# Shards can be empty, so a stream may have no rows in an epoch. After this many in a row, an error is raised.
EMPTY_EPOCHS = 10


class GlobalBatchSampler(Sampler[list[int]]):
    """
    A sampler that yields the data indices of this process's batches, a list of `batch_size` for each batch.

    Examples come from an endless sequence in which each epoch has its own permutation. A step takes the next
    `accumulation · world_size · batch_size` examples. They are divided in order into accumulated batches, and each
    accumulated batch is divided in order among the processes.

    Args:
        num_examples (`int`): number of examples in the dataset.
        batch_size (`int`): number of examples in a batch of one process.
        seed (`int`): the seed of the run, which determines the permutations.
        steps (`range`): the steps to yield batches for.
        rank (`int`), world_size (`int`): rank of this process, and number of processes.
        accumulation (`int`): number of batches of each process in a step.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        steps: range,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.num_examples, self.batch_size, self.seed, self.steps = num_examples, batch_size, seed, steps
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro_step in range(self.accumulation):
                batch = (step * self.accumulation + micro_step) * self.world_size + self.rank
                first = batch * self.batch_size
                yield [self._index(position) for position in range(first, first + self.batch_size)]

    def _index(self, position: int) -> int:
        epoch, index = divmod(position, self.num_examples)
        if epoch != self._epoch:
            generator = seeded_generator("cpu", self.seed, "order", epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.num_examples, generator=generator)
        return int(self._permutation[index])


class Shards(Protocol):
    """Data in shards, each of which can be read starting at any row."""

    num_shards: int

    def rows(self, shard: int, first: int) -> Iterable[Any]:
        """Yield the rows of a shard, starting at row `first`."""
        ...


class Position(NamedTuple):
    """The position of a stream: a block, identified by its first row, and the number of rows used from the block."""

    epoch: int = 0
    shard_index: int = 0  # index into the stream's shards, in this epoch's order
    row: int = 0  # index into the shard
    done: int = 0  # number of rows used, in the block's shuffled order


def shuffled_blocks(
    source: Shards, block_size: int, seed: int, stream: int, num_streams: int, position: Position
) -> Iterator[tuple[Position, list[Any]]]:
    """
    Yield the shuffled blocks of a stream, endlessly, starting at a position. Several streams divide the data.

    Each epoch has its own order of shards. A stream reads the rows of its shards in order and shuffles each block, so
    resuming means reading one block again. A shuffle buffer that is refilled while it is emptied would have to be
    stored in the checkpoint.

    Args:
        source (`Shards`): the data.
        block_size (`int`): number of rows that are shuffled at a time. A block ends at the end of an epoch.
        seed (`int`): the seed of the run, which determines the order of shards and rows.
        stream (`int`), num_streams (`int`): index of the stream, and number of streams.
        position (`Position`): the position from which to resume.

    Yields:
        The position of each block, and all of its rows, shuffled. The first block has the `done` of `position`, later
        blocks have 0.

    Raises:
        UserError: if the stream has no rows.
    """
    empty_epochs = 0
    while empty_epochs < EMPTY_EPOCHS:
        empty_epochs += 1
        rows = stream_rows(source, seed, stream, num_streams, position)
        while block := list(islice(rows, block_size)):
            position = Position(position.epoch, *block[0][:2], position.done)
            generator = seeded_generator("cpu", seed, "block", stream, *position[:3])
            yield position, [block[i][2] for i in torch.randperm(len(block), generator=generator).tolist()]
            shard_index, row, _ = block[-1]
            position, empty_epochs = Position(position.epoch, shard_index, row + 1), 0
        position = Position(position.epoch + 1)
    if num_streams == 1:
        raise UserError("The dataset has no images. Check --dataset_split.")
    raise UserError(
        f"The dataset has no images for stream {stream + 1} of {num_streams} (one for each worker of each process). "
        "Lower --dataloader_num_workers."
    )


def stream_rows(
    source: Shards, seed: int, stream: int, num_streams: int, position: Position
) -> Iterator[tuple[int, int, Any]]:
    """
    Yield the rows of a stream as (shard index, row, content), from a position to the end of its epoch.

    The streams divide the shards among themselves, or the rows of each shard if there are fewer shards than streams.
    """
    shards = torch.randperm(source.num_shards, generator=seeded_generator("cpu", seed, "shards", position.epoch))
    by_shard = source.num_shards >= num_streams
    shards = shards[stream::num_streams] if by_shard else shards
    first = position.row
    for shard_index in range(position.shard_index, len(shards)):
        for row, content in enumerate(source.rows(int(shards[shard_index]), first), first):
            if by_shard or row % num_streams == stream:
                yield shard_index, row, content
        first = 0
