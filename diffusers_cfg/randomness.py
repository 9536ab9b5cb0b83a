"""Draw every random number as a function of the seed and of where in the run it is used. Nothing random is stored.

So a resumed run continues exactly, and the same global batch, with the same noise, is trained on whatever number of
processes and accumulated batches it is divided into.
"""

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """Return a seed for one purpose, named by its key, such as `(seed, "order", epoch)`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Return a generator with the seed of a key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class Draws:
    """
    The random numbers of some rows of a step's global batch, by purpose. They depend on (seed, step, purpose, row)
    alone, so they are the same however the global batch is divided.

    Args:
        seed (`int`), step (`int`): of the run.
        rows (`range`): the rows of the global batch that are asked for.
        batch_size (`int`): rows of the global batch.
        device (`torch.device`): where the numbers are drawn. The CPU and a GPU draw different ones.
    """

    def __init__(self, seed: int, step: int, rows: range, batch_size: int, device: torch.device | str = "cpu"):
        self.seed, self.step, self.rows, self.batch_size, self.device = seed, step, rows, batch_size, device

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return draws from N(0, 1), `(rows, *shape)`, float32."""
        return self._mine(torch.randn(self.batch_size, *shape, generator=self._generator(purpose), device=self.device))

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return draws from U[0, 1), `(rows, *shape)`, float32."""
        return self._mine(torch.rand(self.batch_size, *shape, generator=self._generator(purpose), device=self.device))

    def antithetic(self, purpose: str) -> torch.Tensor:
        """Return (u + i/k) mod 1 for row i of the k rows of the global batch, with one u ~ U[0, 1): `(rows,)`."""
        u = torch.rand((), generator=self._generator(purpose), device=self.device)
        return self._mine((u + torch.arange(self.batch_size, device=self.device) / self.batch_size) % 1)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return a generator for each row, for code that draws by itself, such as an autoencoder's posterior."""
        return [seeded_generator(self.device, self.seed, self.step, purpose, row) for row in self.rows]

    def _generator(self, purpose: str) -> torch.Generator:
        return seeded_generator(self.device, self.seed, self.step, purpose)

    def _mine(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.rows.start : self.rows.stop]
