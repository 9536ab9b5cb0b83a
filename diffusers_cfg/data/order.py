"""The order of the data: which images a step takes, in memory and streamed, and the place in a stream."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Sampler

from diffusers_cfg.config import UserError
from diffusers_cfg.randomness import seeded_generator

# Shards can be empty, so a stream may have nothing in an epoch; in so many in a row, it never will.
EMPTY_EPOCHS = 10


class GlobalBatchSampler(Sampler[list[int]]):
    """
    The data indices of this process's batches, from one step of the run to another.

    Examples come in the order of an endless sequence, each epoch a permutation of its own. A step takes the next
    `accumulation · world_size · batch_size` of them; its batches run through them in order, and the processes divide
    each batch in order.
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
    ):
        self.num_examples, self.batch_size, self.seed, self.steps = num_examples, batch_size, seed, steps
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self._epoch, self._permutation = None, None

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro_step in range(self.accumulation):
                batch = (step * self.accumulation + micro_step) * self.world_size + self.rank
                first = batch * self.batch_size
                yield [self._index(position) for position in range(first, first + self.batch_size)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.num_examples)
        if epoch != self._epoch:
            generator = seeded_generator("cpu", self.seed, "order", epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.num_examples, generator=generator)
        return self._permutation[place].item()


class Shards(Protocol):
    """What can be read: shards, each from any of its rows on."""

    num_shards: int

    def rows(self, shard: int, first: int) -> Iterable[Any]: ...


class Position(NamedTuple):
    """Where a stream goes on: a block of it, named by its first row, and how many of its rows are done."""

    epoch: int = 0
    place: int = 0  # in the stream's shards of the epoch, in their order
    row: int = 0  # in the shard
    done: int = 0


def shuffled_blocks(
    source: Shards, block_size: int, seed: int, stream: int, num_streams: int, position: Position
) -> Iterator[tuple[Position, list[Any]]]:
    """
    One of several streams that share the data, from a position on and without end: blocks of rows, each in an order of
    its own and with its position. Raises UserError for a stream that has no rows.

    Every epoch has its own order of shards. A stream reads the rows of its shards in their order, so a block that was
    begun is read again to go on with it; a buffer that is refilled as it is emptied would have to be kept.
    """
    empty_epochs = 0
    while empty_epochs < EMPTY_EPOCHS:
        empty_epochs += 1
        rows = stream_rows(source, seed, stream, num_streams, position)
        while block := list(islice(rows, block_size)):
            position = Position(position.epoch, *block[0][:2], position.done)
            generator = seeded_generator("cpu", seed, "block", stream, *position[:3])
            yield position, [block[i][2] for i in torch.randperm(len(block), generator=generator).tolist()]
            place, row, _ = block[-1]
            position, empty_epochs = Position(position.epoch, place, row + 1), 0
        position = Position(position.epoch + 1)
    raise UserError(
        f"The data set has no images for stream {stream + 1} of {num_streams}, one for each worker of each process: "
        "lower --dataloader_num_workers."
    )


def stream_rows(
    source: Shards, seed: int, stream: int, num_streams: int, position: Position
) -> Iterator[tuple[int, int, Any]]:
    """
    The rows of a stream from the block of a position to the end of its epoch, each with its place. The streams share
    the shards, or where there are fewer shards than streams, the rows of each.
    """
    shards = torch.randperm(source.num_shards, generator=seeded_generator("cpu", seed, "shards", position.epoch))
    by_shard = source.num_shards >= num_streams
    shards = shards[stream::num_streams] if by_shard else shards
    first = position.row
    for place in range(position.place, len(shards)):
        for row, content in enumerate(source.rows(shards[place].item(), first), first):
            if by_shard or row % num_streams == stream:
                yield place, row, content
        first = 0
