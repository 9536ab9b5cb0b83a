"""Nothing random is stored: every draw is a function of the seed and of where in the run it is made.

So a run that was stopped goes on as if it had not been, and the same global batch, with the same noise, is trained on
whatever number of processes and accumulated batches it is cut into.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


def seed_of(*key: int | str) -> int:
    """A seed for one purpose, named by its key, such as `(seed, "noise", step)`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator with the seed of a key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@dataclass
class Draws:
    """The random numbers of a batch, a row for each example."""

    u: torch.Tensor  # (batch,)  U[0, 1], the noise level
    noise: torch.Tensor  # (batch, channels, height, width)  ε ~ N(0, I)
    dropout: torch.Tensor  # (batch,)  U[0, 1), whether the label is dropped
    flip: torch.Tensor  # (batch,)  bool, whether the image is flipped
    key: tuple[int, int]  # (seed, step)
    rows: range  # of the global batch

    @classmethod
    def of_step(cls, seed: int, step: int, shape: tuple[int, ...], device: torch.device) -> "Draws":
        """Those of a step's whole global batch, of the given shape."""
        generator = seeded_generator(device, seed, "draws", step)
        u, dropout, flip = torch.rand(3, shape[0], generator=generator, device=device)
        noise = torch.randn(shape, generator=generator, device=device)
        return cls(u, noise, dropout, flip < 0.5, (seed, step), range(shape[0]))

    def __getitem__(self, rows: slice) -> "Draws":
        return Draws(self.u[rows], self.noise[rows], self.dropout[rows], self.flip[rows], self.key, self.rows[rows])

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One for each row, for what else is random about it, such as the draw from an autoencoder's posterior."""
        return [seeded_generator(self.u.device, purpose, *self.key, row) for row in self.rows]

    def uniform(self, purpose: str) -> torch.Tensor:
        """U[0, 1) for each row, `(batch,)`, for what else is random about it."""
        rows = [torch.rand(1, generator=generator, device=self.u.device) for generator in self.generators(purpose)]
        return torch.cat(rows)


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
