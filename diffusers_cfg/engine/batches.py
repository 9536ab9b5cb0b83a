"""Load the batches of each step, on the device and with their random numbers."""

import multiprocessing
import time
from collections.abc import Iterator, Sized
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import (
    MIN_SEEN,
    CachedImages,
    ImageBatch,
    StreamedImages,
    identity_collate,
)
from diffusers_cfg.data.latents import LatentBatch
from diffusers_cfg.data.order import GlobalBatchSampler
from diffusers_cfg.data.sources import UNLABELLED
from diffusers_cfg.data.unreadable import check_unreadable, warn_about_unreadable
from diffusers_cfg.engine.method import Batch, Method
from diffusers_cfg.engine.preemption import ignore_signals
from diffusers_cfg.randomness import Draws, seeded_generator
from diffusers_cfg.settings import TrainConfig


class StepBatches:
    """
    An iterable over the steps of a run that yields the batches of this process.

    Args:
        config (`TrainConfig`): seed, batch size, flips and workers.
        accelerator (`Accelerator`): the processes that share each global batch.
        dataset (`Dataset`): images, or their cached latents.
        method (`Method`): the method, whose autoencoder, if any, encodes the images.
        steps (`range`): the steps of the run.
        accumulation (`int`): number of batches per process and step.

    Attributes:
        wait (`float`): seconds spent waiting for data.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        dataset: Dataset,
        method: Method,
        steps: range,
        accumulation: int,
    ) -> None:
        self.config, self.accelerator, self.dataset, self.method = config, accelerator, dataset, method
        self.steps, self.accumulation, self.wait = steps, accumulation, 0.0
        self.stream = dataset if isinstance(dataset, StreamedImages) else None
        self.unreadable, self.seen, self._ending = set(), 0, multiprocessing.Event()

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the list of batches of each step. Raise UserError if too many images cannot be read."""
        self._loaded = iter(self._loader())
        for step in self.steps:
            yield [self._batch(self._next(), step, micro_step) for micro_step in range(self.accumulation)]
        self.close()
        warn_about_unreadable(self.unreadable)

    def close(self) -> None:
        """
        Stop the workers. They ignore SIGTERM until then, so the process would otherwise wait for them forever when it
        exits.
        """
        self._ending.set()
        self._loaded = None

    def _loader(self) -> DataLoader:
        config, rank, world_size = self.config, self.accelerator.process_index, self.accelerator.num_processes
        order: dict[str, Any] = {"batch_size": None}
        if self.stream is None:
            assert isinstance(self.dataset, Sized)
            sampler = GlobalBatchSampler(
                len(self.dataset),
                config.train_batch_size,
                config.seed,
                self.steps,
                rank,
                world_size,
                self.accumulation,
            )
            order = {"batch_sampler": sampler}
        return DataLoader(
            self.dataset,
            **order,
            collate_fn=identity_collate,
            num_workers=0 if isinstance(self.dataset, CachedImages) else config.dataloader_num_workers,
            worker_init_fn=partial(ignore_signals, self._ending),
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _batch(self, images: ImageBatch | LatentBatch, step: int, micro_step: int) -> Batch:
        config, accelerator = self.config, self.accelerator
        first = (micro_step * accelerator.num_processes + accelerator.process_index) * config.train_batch_size
        rows = range(first, first + config.train_batch_size)
        total = config.train_batch_size * accelerator.num_processes * self.accumulation
        draws = Draws(config.seed, step, rows, total, accelerator.device)
        flip = draws.uniform("flip") < 0.5 if config.random_flip else None
        return make_batch(self.method, images, draws, flip)

    def _next(self) -> ImageBatch | LatentBatch:
        started = time.perf_counter()
        assert self._loaded is not None
        try:
            images = next(self._loaded)
        except UserError as error:  # raised in a worker: torch adds the worker's traceback to the text
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        self.wait += time.perf_counter() - started
        if self.stream is not None:
            self.stream.mark_used(images)
        self.seen += len(images.class_labels) + len(images.unreadable)
        if images.unreadable:
            self.unreadable.update(images.unreadable)
            if self.stream is None:
                assert isinstance(self.dataset, Sized)
                check_unreadable(self.unreadable, len(self.dataset), self.config.max_unreadable_fraction)
            elif self.seen >= MIN_SEEN:
                check_unreadable(self.unreadable, self.seen, self.config.max_unreadable_fraction)
        return images


@torch.no_grad()
def make_batch(
    method: Method, images: ImageBatch | LatentBatch, draws: Draws, flip: torch.Tensor | None = None
) -> Batch:
    """Return a batch on the device of `draws`: images in [-1, 1], flipped where `flip` is true, or their latents."""
    x = images.training_input(draws.device, flip)
    pipeline = method.pipeline
    if getattr(pipeline, "vae", None) is not None:
        encode = pipeline.draw_latents if isinstance(images, LatentBatch) else pipeline.encode
        x = encode(x, draws.generators("posterior"))
    return Batch(x, images.class_labels.to(draws.device, non_blocking=True), draws, draws.step)


def probe_batches(
    config: TrainConfig, method: Method, dataset: Dataset, device: torch.device, num_images: int = 256
) -> Iterator[Batch]:
    """Yield up to `num_images` images for `Method.probe`, the same in every call: labelled ones if there are any."""
    assert isinstance(dataset, Sized)
    candidates = (dataset.class_labels != UNLABELLED).nonzero().flatten()
    if not len(candidates):
        candidates = torch.arange(len(dataset))
    order = torch.randperm(len(candidates), generator=seeded_generator("cpu", config.seed, "probe"))
    chosen = candidates[order[:num_images]]
    for first in range(0, len(chosen), config.train_batch_size):
        rows = range(first, min(first + config.train_batch_size, len(chosen)))
        images = dataset.__getitems__(chosen[list(rows)].tolist())
        yield make_batch(method, images, Draws(config.seed, -1, rows, len(chosen), device))
