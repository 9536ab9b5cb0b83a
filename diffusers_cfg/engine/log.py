"""Log the progress of a run and its samples."""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_cfg.config import CommandError
from diffusers_cfg.engine.method import Method, Objective, Terms
from diffusers_cfg.engine.tracking import Trackers
from diffusers_cfg.model_files import checkpoints
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# The interval between progress lines, which replace the progress bar if the output is not a terminal.
SECONDS_BETWEEN_LINES = 10


class Diverged(CommandError, FloatingPointError):
    """An error that ends a run after too many consecutive steps with a non-finite loss or gradient."""


def is_due(every: int, step: int) -> bool:
    """Return whether a periodic action is due at a step; `every=0` disables it."""
    return every > 0 and step % every == 0


class Log:
    """
    A log of losses and other terms of the objectives, gradient norms, learning rates and throughput. Trackers get the
    values every `logging_steps`. A terminal shows a progress bar, other outputs a line every `SECONDS_BETWEEN_LINES`.
    Values are read from the device only when they are logged.

    Args:
        config (`TrainConfig`): the settings.
        accelerator (`Accelerator`): the processes whose losses are averaged.
        trackers (`Trackers`): the trackers.
        method (`Method`): the method, which sees the logged values. If it has several objectives, their names prefix
            the names of the values.
        first_step (`int`), total_steps (`int`): the step that the run starts from and the length of the run.
        batch_size (`int`): number of images in a step.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trackers: Trackers,
        method: Method,
        first_step: int,
        total_steps: int,
        batch_size: int,
    ) -> None:
        self.config, self.accelerator, self.trackers, self.batch_size = config, accelerator, trackers, batch_size
        self.total_steps, self.last_line_time = total_steps, -math.inf
        self.last_step, self.last_time, self.last_waited = first_step, time.perf_counter(), 0.0
        self.method, objectives = method, method.objectives
        several = len({objective.name for objective in objectives}) > 1
        self.turns = Counter(objective.name for objective in objectives)
        self.prefixes = {objective.name: f"{objective.name}/" if several else "" for objective in objectives}
        # Sums and counts of the terms and of the gradient norms, by name.
        self.terms: dict[tuple[str, ...], torch.Tensor] = {}
        self.norms: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, device=accelerator.device))
        self.skipped_in_a_row: dict[str, torch.Tensor] = {}
        self.progress = tqdm(
            total=total_steps,
            initial=first_step,
            desc="Training",
            unit="step",
            disable=None if accelerator.is_main_process else True,  # None hides the bar unless the output is a terminal
        )

    @torch.no_grad()
    def log_terms(self, objective: Objective, terms: Terms) -> None:
        """Accumulate the terms of a batch. Values that are not finite are left out of the means."""
        prefix = self.prefixes[objective.name]
        names = tuple(f"{prefix}{name}" for name in ("loss", *terms.logs))
        values = torch.stack([terms.loss, *terms.logs.values()])
        finite = torch.isfinite(values)
        sums = torch.stack([torch.where(finite, values, 0.0).sum(1), finite.sum(1)], dim=1)
        self.terms[names] = self.terms[names] + sums if names in self.terms else sums

    def log_gradient(self, objective: Objective, norms: Mapping[str, torch.Tensor], finite: torch.Tensor) -> None:
        """Accumulate the gradient norms of an objective by module, and count skipped steps."""
        prefix, several, turns = self.prefixes[objective.name], len(norms) > 1, self.turns[objective.name]
        for module, norm in norms.items():
            name = f"{prefix}grad_norm/{module}" if several else f"{prefix}grad_norm"
            self.norms[name] += torch.stack([torch.where(finite, norm, 0.0), finite.float()])
        self.norms[f"{prefix}skipped_steps"] += torch.stack(
            [(1 - finite.float()) / turns, torch.zeros_like(finite.float())]
        )
        before = self.skipped_in_a_row.get(objective.name, torch.zeros_like(finite.float()))
        self.skipped_in_a_row[objective.name] = torch.where(finite, 0.0, before + 1 / turns)

    def log_step(self, step: int, learning_rates: Mapping[str, float], waited: float) -> None:
        """
        Advance the progress bar, and log the accumulated values every `logging_steps`.

        Args:
            step (`int`): number of completed steps.
            learning_rates (`Mapping[str, float]`): the learning rate of each objective.
            waited (`float`): seconds spent waiting for data since the start of the run.

        Raises:
            Diverged: if too many consecutive steps were skipped.
        """
        self.progress.update()
        if is_due(self.config.logging_steps, step) or step == self.total_steps:
            self._write(step, learning_rates, waited)

    def _write(self, step: int, learning_rates: Mapping[str, float], waited: float) -> None:
        self._stop_if_not_finite(step)
        steps, now = step - self.last_step, time.perf_counter()
        values = {**self._means_of_terms(), **self._means_of_norms()}
        values |= {f"{self.prefixes[name]}lr": rate for name, rate in learning_rates.items()}
        values["images_per_second"] = steps * self.batch_size / (now - self.last_time)
        values["data_wait"] = (waited - self.last_waited) / (now - self.last_time)
        left = timedelta(seconds=round((self.total_steps - step) * (now - self.last_time) / steps))
        losses = {name: f"{value:.4f}" for name, value in values.items() if name.split("/")[-1] == "loss"}
        if self.progress.disable and (now - self.last_line_time >= SECONDS_BETWEEN_LINES or step == self.total_steps):
            self.last_line_time = now
            logger.info(
                "step %d of %d, %s, %.0f images/s, %s left",
                step,
                self.total_steps,
                ", ".join(f"{name} {loss}" for name, loss in losses.items()),
                values["images_per_second"],
                left,
            )
        self.last_step, self.last_time, self.last_waited = step, now, waited
        self.progress.set_postfix({"images_per_second": f"{values['images_per_second']:.0f}", **losses})
        self.trackers.log(values, step)
        self.method.watch(step, values)
        for name, skipped in values.items():
            if name.endswith("skipped_steps") and skipped:
                logger.warning("Skipped %.0f of the last %d steps, whose gradient was not finite.", skipped, steps)

    def _means_of_terms(self) -> dict[str, float]:
        totals: dict[str, torch.Tensor] = {}
        for names in sorted(self.terms):  # the same order on all processes
            sums = self.accelerator.reduce(self.terms[names], reduction="sum").cpu()
            for name, pair in zip(names, sums, strict=True):
                totals[name] = totals.get(name, 0) + pair
        self.terms.clear()
        return {name: (total / count).item() for name, (total, count) in totals.items() if count > 0}

    def _means_of_norms(self) -> dict[str, float]:
        if not self.norms:
            return {}
        sums = dict(zip(self.norms, torch.stack(list(self.norms.values())).tolist(), strict=True))
        self.norms.clear()
        return {
            name: total if name.endswith("skipped_steps") else total / max(1.0, count)
            for name, (total, count) in sums.items()
        }

    def _stop_if_not_finite(self, step: int) -> None:
        in_a_row = max((round(skipped.item()) for skipped in self.skipped_in_a_row.values()), default=0)
        if in_a_row >= self.config.max_nonfinite_steps:
            existing = [path.name for path in checkpoints(Path(self.config.output_dir))]
            restart = f"resume with --resume_from_checkpoint {existing[-1]}" if existing else "restart"
            names = [name for name in vars(self.config) if name.startswith("learning_rate")]
            rates = " or ".join(f"--{name} (now {getattr(self.config, name)})" for name in names)
            raise Diverged(
                f"The loss or its gradient was not finite in the last {in_a_row} steps, up to step {step}. Lower "
                f"{rates} and {restart}."
            )

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self.progress.close()
        self.trackers.finish()
