"""Order the data: the images of each step, in memory and streamed, and the position in a stream."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Sampler

from diffusers_cfg.config import UserError
from diffusers_cfg.randomness import seeded_generator

# Shards can be empty, so a stream may have no rows in an epoch. After this many such epochs in a row it never has any.
EMPTY_EPOCHS = 10


class GlobalBatchSampler(Sampler[list[int]]):
    """
    Yield the data indices of this process's batches, a list of `batch_size` for each.

    Examples come from an endless sequence in which each epoch has its own permutation. A step takes the next
    `accumulation · world_size · batch_size` of them, which are divided in order into accumulated batches, and each of
    these in order among the processes.

    Args:
        num_examples (`int`): examples in the dataset.
        batch_size (`int`): examples in a batch of one process.
        seed (`int`): of the run. It determines the permutations.
        steps (`range`): the steps of the run to yield batches for.
        rank (`int`), world_size (`int`): of this process, and their number.
        accumulation (`int`): batches of each process in a step.
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
    """Data in shards, each of which can be read from any of its rows on."""

    num_shards: int

    def rows(self, shard: int, first: int) -> Iterable[Any]:
        """Yield the rows of a shard, from row `first` on."""
        ...


class Position(NamedTuple):
    """Position from which a stream resumes: a block, identified by its first row, and the rows of it that are done."""

    epoch: int = 0
    place: int = 0  # index into the stream's shards, in their order in this epoch
    row: int = 0  # index into the shard
    done: int = 0  # rows of the block, in its shuffled order


def shuffled_blocks(
    source: Shards, block_size: int, seed: int, stream: int, num_streams: int, position: Position
) -> Iterator[tuple[Position, list[Any]]]:
    """
    Yield the blocks of one of several streams that share the data, from a position on and without end.

    Every epoch has its own order of shards. A stream reads the rows of its shards in their order and shuffles each
    block, so it resumes by reading one block again. A shuffle buffer that is refilled while it is emptied would have
    to be stored instead.

    Args:
        source (`Shards`): the data.
        block_size (`int`): rows that are shuffled at a time. A block does not extend over the end of an epoch.
        seed (`int`): of the run. It determines the orders of shards and rows.
        stream (`int`), num_streams (`int`): the stream, from 0, and the number of streams.
        position (`Position`): the position from which to resume.

    Yields:
        The position of a block and all of its rows, shuffled. `done` of the first is that of `position`, then 0.

    Raises:
        UserError: the stream has no rows.
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
    if num_streams == 1:
        raise UserError("The dataset has no images: check --dataset_split.")
    raise UserError(
        f"The dataset has no images for stream {stream + 1} of {num_streams} (there is one for each worker of each "
        "process): lower --dataloader_num_workers."
    )


def stream_rows(
    source: Shards, seed: int, stream: int, num_streams: int, position: Position
) -> Iterator[tuple[int, int, Any]]:
    """
    Yield the rows of a stream, from the block of a position to the end of its epoch, as (place, row, content).

    The streams divide the shards among them, or the rows of each shard if there are fewer shards than streams.
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
