"""Derive every random number from the seed and from its purpose, without storing generator states.

A resumed run therefore continues exactly. The global batch and its noise are the same for every number of processes and
of accumulated batches.
"""

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """Return the seed for a key, such as `(seed, "order", epoch)`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Return a generator seeded with `seed_of(*key)`."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class Draws:
    """
    The random numbers for some rows of a step's global batch, by purpose. They depend only on (seed, step, purpose,
    row) and not on how the global batch is divided.

    Args:
        seed (`int`): the seed of the run.
        step (`int`): the step.
        rows (`range`): the rows of the global batch to draw for.
        batch_size (`int`): number of rows in the global batch.
        device (`torch.device` or `str`): the device to draw on. A CPU and a GPU give different numbers.
    """

    def __init__(self, seed: int, step: int, rows: range, batch_size: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.rows, self.batch_size = seed, step, rows, batch_size
        self.device = torch.device(device)

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return samples of N(0, 1), `(rows, *shape)`, float32."""
        return self._select(
            torch.randn(self.batch_size, *shape, generator=self._generator(purpose), device=self.device)
        )

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return samples of U[0, 1), `(rows, *shape)`, float32."""
        return self._select(torch.rand(self.batch_size, *shape, generator=self._generator(purpose), device=self.device))

    def antithetic(self, purpose: str) -> torch.Tensor:
        """Return (u + i/k) mod 1 for row i of the k rows in the global batch, with a single u ~ U[0, 1): `(rows,)`."""
        u = torch.rand((), generator=self._generator(purpose), device=self.device)
        return self._select((u + torch.arange(self.batch_size, device=self.device) / self.batch_size) % 1)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return a generator for each row, for code that takes generators, such as an autoencoder's posterior."""
        return [seeded_generator(self.device, self.seed, self.step, purpose, row) for row in self.rows]

    def _generator(self, purpose: str) -> torch.Generator:
        return seeded_generator(self.device, self.seed, self.step, purpose)

    def _select(self, all_rows: torch.Tensor) -> torch.Tensor:
        return all_rows[self.rows.start : self.rows.stop]
