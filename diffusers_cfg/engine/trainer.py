"""Run a training job from its settings to a saved and published model, for any `Method`."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm.contrib.logging import logging_redirect_tqdm

from diffusers_cfg.config import UserError, say
from diffusers_cfg.data.datasets import StreamedImages, describe_data, raise_for_dead_worker, training_dataset
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.data.latents import cache_latents
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.engine.accelerator import make_accelerator, make_vote, prepare_module
from diffusers_cfg.engine.batches import StepBatches, probe_batches
from diffusers_cfg.engine.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    match_batch_size,
    reuse_num_threads,
    save_checkpoint,
)
from diffusers_cfg.engine.history import check_resumed, identity_of, settings_of
from diffusers_cfg.engine.log import Log, is_due
from diffusers_cfg.engine.method import Batch, Method, Objective, check_method, check_terms
from diffusers_cfg.engine.output import check_output_dir, prepare_output_dir, saved_together, unfinished_error
from diffusers_cfg.engine.plan import check_disk, describe_plan, make_plan
from diffusers_cfg.engine.posthoc_ema import save_snapshot
from diffusers_cfg.engine.preemption import NotSaved, Preempted, Preemption
from diffusers_cfg.engine.publishing import BackgroundPublisher, check_hub, publish_run
from diffusers_cfg.engine.record import describe_demo, describe_saved, write_run_record
from diffusers_cfg.engine.state import (
    check_xformers,
    component_names,
    count_step,
    ema_weights,
    frozen,
    make_state,
    save_variants,
    set_learning_rates,
)
from diffusers_cfg.engine.tracking import Trackers
from diffusers_cfg.files import locked
from diffusers_cfg.randomness import seed_of
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)

# (method, config, accelerator, dataset) -> a function that maps a pipeline to metrics by name
Evaluation = Callable[[Any, TrainConfig, Accelerator, Dataset], Callable[[Any], dict[str, float]]]


class Trainer:
    """
    A trainer that runs a method on one or several processes.

    Args:
        config (`TrainConfig`): the settings of the run.
        method_class (`type[Method]`): the class of the method to train.
        preemption (`Preemption`, *optional*): the signal handler that stops the run.
        evaluation (`Callable`, *optional*): builds the function that evaluates samples every `eval_steps`.
    """

    def __init__(
        self,
        config: TrainConfig,
        method_class: type[Method],
        preemption: Preemption | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.config, self.method_class, self.evaluation = config, method_class, evaluation
        self.preemption = preemption or Preemption()

    def run(self) -> None:
        """
        Train, save and publish. With `--dry_run`, only check the settings and print the plan.

        Raises:
            UserError: if a setting or the data is invalid. Nothing has been written.
            Preempted: if a signal stopped the run. A checkpoint of the last step has been written.
            Diverged: if too many consecutive steps had a non-finite loss or gradient.
            NotSaved: if a signal stopped the run and the checkpoint could not be written.
            Unfinished: if a file could not be read or written. The text says what is safe.
            NotPublished: if the model is trained and saved, but could not be published.
        """
        images = self._prepare()
        if self.config.dry_run:
            if self.config.eval_steps and self.evaluation is not None:
                self.evaluation(self.method, self.config, self.accelerator, self.dataset)  # only checks
            self._print_plan(images)
            return
        output_dir = Path(self.config.output_dir)
        with logging_redirect_tqdm(), ExitStack() as self.stack:  # prints log lines above the progress bar
            self._start(images)
            try:
                self.train()
            except OSError as error:
                raise unfinished_error(output_dir, f"Stopped at step {self.state.step}: {error}.") from error
            finally:
                self.log.close()
            self._save()
        self._publish()

    def train(self) -> None:
        """Take all remaining steps. On return, the averaged modules hold their first EMA weights."""
        self.preemption.running, self.saved_step = True, self.state.step
        try:
            for batches in self.batches:
                self.train_step(batches)
                self._after_step()
            self.validate(draw=True, measure=True)
        except Preempted:
            if self.state.step > self.saved_step and not self._save_checkpoint():
                raise NotSaved(
                    f"Stopped at step {self.state.step}, whose checkpoint could not be written (see above). The steps "
                    "since the last valid checkpoint are lost. Resume with --resume_from_checkpoint latest."
                ) from None
            raise
        except RuntimeError as error:  # torch raises the error of a dead worker anywhere in the main process
            raise_for_dead_worker(self.dataset, error)
            raise
        finally:
            self.batches.close()
        for name, ema in self.state.ema.items():
            if ema:
                ema[0].copy_to(self.state.modules[name].parameters())
        for module in self.state.modules.values():
            module.eval()

    def train_step(self, batches: Sequence[Batch]) -> None:
        """Take one step: minimise the objectives in order, then update the learning rates and the EMA weights."""
        state = self.state
        turns = Counter()
        for objective in self.method.objectives:
            self.minimise(objective, [batch._replace(turn=turns[objective.name]) for batch in batches])
            turns[objective.name] += 1
        for lr_scheduler in state.lr_schedulers.values():
            lr_scheduler.step()
        count_step(state)

    def minimise(self, objective: Objective, batches: Sequence[Batch]) -> None:
        """
        Take one optimizer step on the mean of an objective's loss over the batches. A non-finite gradient changes
        neither the weights nor the moments.

        Args:
            objective (`Objective`): the objective.
            batches (`Sequence[Batch]`): the batches of this process, whose gradients are accumulated.
        """
        accelerator, modules, optimizer = self.accelerator, self.method.modules, self.optimizers[objective.name]
        trained = {name: self.prepared[name] for name in objective.trains}
        with frozen([module for name, module in modules.items() if name not in objective.trains]):
            for micro_step, batch in enumerate(batches):
                # Dropout inside the networks draws from the global generator of torch.
                key = self.config.seed, "network", batch.step, objective.name, batch.turn, micro_step
                torch.manual_seed(seed_of(*key, accelerator.process_index))
                with accelerator.accumulate(*trained.values()):
                    terms = check_terms(objective, objective.loss({**modules, **trained}, batch), batch)
                    accelerator.backward(terms.loss.mean())
                    if accelerator.sync_gradients:
                        finite = self._clip(objective)
                        self._skip_unless(finite, optimizer)
                    optimizer.step()
                    optimizer.zero_grad()
                self.log.log_terms(objective, terms)

    def validate(self, draw: bool, measure: bool) -> None:
        """Draw validation samples and compute metrics with the EMA weights. A signal interrupts it with `Preempted`."""
        state, method, accelerator = self.state, self.method, self.accelerator
        self._sync_stream_state()
        with ema_weights(state), self.preemption.interruptible(), torch.no_grad():
            disable = None if accelerator.is_local_main_process else True  # None hides the bar unless in a terminal
            method.sampling_pipeline().set_progress_bar_config(desc="Sampling", leave=False, disable=disable)
            if draw:
                self._draw_samples()
                images = self.stream.probe if self.stream is not None else self.dataset
                metrics = method.probe(probe_batches(self.config, method, images, accelerator.device))
                self.log.trackers.log(metrics, state.step)
            if measure and self.evaluate is not None:
                self.log.trackers.log(self.evaluate(method.sampling_pipeline()), state.step)

    def _prepare(self) -> LabelledImages:
        """Check everything before anything is written, and return the images."""
        config = self.config
        check_output_dir(config)
        check_xformers(config)
        self.accelerator = accelerator = make_accelerator(config)
        self.checkpoint = find_checkpoint(config)
        self.repo_id = check_hub(config) if config.push_to_hub and accelerator.is_main_process else None
        with accelerator.main_process_first():  # Other processes then read the data from the cache.
            images = load_labelled_images(config, self.method_class.needs_labels)
        self.method = method = self.method_class.build(config, images)
        check_method(method)
        self.dataset = training_dataset(images, config, method.image_channels, accelerator.is_main_process)
        accumulation = config.gradient_accumulation_steps
        if self.checkpoint is not None:
            accumulation = match_batch_size(self.checkpoint, config, accelerator.num_processes)
            reuse_num_threads(self.checkpoint, accelerator)
        self.plan = make_plan(config, accelerator.num_processes, accumulation, self.dataset)
        check_disk(config, method, self.plan.total_steps)
        self.data, self.identity, self.history = describe_data(images, self.dataset), identity_of(method), []
        if self.checkpoint is not None:
            self.history = self._check_resumed(self.checkpoint)
        return images

    def _check_resumed(self, checkpoint: Checkpoint) -> list[dict[str, Any]]:
        """Compare the run with its checkpoint, and return its history. Raise UserError if it cannot be resumed."""
        history = check_resumed(checkpoint, self.config, self.identity, self.data)
        path, record = checkpoint
        step, total_steps = record["step"], self.plan.total_steps
        if step > total_steps:
            raise UserError(
                f"{path} is from step {step}, but the run has only {total_steps} steps. Raise "
                "--max_train_steps, or resume an earlier checkpoint."
            )
        # A finished run takes no step with the changed settings.
        return history if step < total_steps else record["history"]

    def _print_plan(self, images: LabelledImages) -> None:
        if self.accelerator.is_main_process:
            run = self.config, self.accelerator, self.dataset, self.method, self.plan
            print(describe_plan(*run, images, self.checkpoint, self.repo_id))

    def _start(self, images: LabelledImages) -> None:
        """Move everything to the device, and create the state or load it from the checkpoint."""
        config, accelerator, method, plan = self.config, self.accelerator, self.method, self.plan
        self.evaluate = None
        if config.eval_steps and self.evaluation is not None:
            self.evaluate = self.evaluation(method, config, accelerator, self.dataset)
        if config.cache_latents:
            self.dataset = cache_latents(config, accelerator, self.dataset, method.pipeline.vae, method.sample_shape)
        self.stream = self.dataset if isinstance(self.dataset, StreamedImages) else None
        accelerator.gradient_accumulation_steps = plan.accumulation
        method.pipeline.to(accelerator.device)
        for module in method.modules.values():
            module.to(accelerator.device)

        self.state = state = make_state(config, method, plan.batch_size, accelerator)
        state.history = self.history
        if self.checkpoint is not None:
            state.step, state.trackers = self.checkpoint.record["step"], self.checkpoint.record.get("trackers", {})
        set_learning_rates(config, state, plan.total_steps)
        self.prepared = {
            name: prepare_module(accelerator, module, name in method.compiled)
            for name, module in method.modules.items()
        }
        self.optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in state.optimizers.items()}
        state.scaler = accelerator.scaler
        if self.stream is not None:
            self.stream.divide(accelerator.process_index, accelerator.num_processes)
        if self.checkpoint is not None:
            load_checkpoint(self.checkpoint, state)
            if self.stream is not None and state.stream is not None:
                self.stream.load_state_dict(state.stream)
            logger.info("Resumed from %s", self.checkpoint.path)
        self._check_same_step()
        self.facts = {"settings": settings_of(config), "identity": self.identity, "data": self.data}

        if accelerator.is_main_process:
            try:
                self.stack.enter_context(locked(Path(config.output_dir), "--output_dir"))
                prepare_output_dir(config, self.checkpoint)
            except OSError as error:
                raise UserError(f"--output_dir {config.output_dir} cannot be written: {error}.") from error
        self.publisher = None
        if self.repo_id is not None and config.hub_strategy == "checkpoint":
            self.publisher = BackgroundPublisher(self.repo_id, config.hub_token)
        steps = range(state.step, plan.total_steps)
        self.batches = StepBatches(config, accelerator, self.dataset, method, steps, plan.accumulation)
        trackers = Trackers(config, accelerator, config.public())
        trackers.start(state.trackers, state.step)
        self.log = Log(config, accelerator, trackers, method, state.step, plan.total_steps, plan.batch_size)
        self.any_process = make_vote(accelerator, config.ddp_timeout)
        self.started = time.perf_counter() - state.seconds
        logger.info(
            "%s images%s, %d classes, %.1f M parameters, %d steps of %d images%s on %d × %s",
            plan.num_images or "Streamed",
            f" ({images.num_held_out} held out)" if images.num_held_out else "",
            len(images.present_classes),
            state.num_parameters / 1e6,
            plan.total_steps,
            plan.batch_size,
            f" ({plan.epochs})" if plan.epochs else "",
            accelerator.num_processes,
            accelerator.device.type,
        )

    def _check_same_step(self) -> None:
        step = torch.tensor([self.state.step], device=self.accelerator.device)
        steps = self.accelerator.gather(step).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"The processes would resume from different steps, {steps}. --output_dir {self.config.output_dir} must "
                "be a folder that all machines share."
            )

    def _after_step(self) -> None:
        """Log the step, save a checkpoint and validate if they are due, and stop if any process got a signal."""
        config, state, last = self.config, self.state, self.state.step == self.plan.total_steps
        state.seconds = time.perf_counter() - self.started
        rates = {name: float(scheduler.get_last_lr()[0]) for name, scheduler in state.lr_schedulers.items()}
        self.log.log_step(state.step, rates, self.batches.wait)
        # Before the checkpoint: a run that resumes it has the snapshot.
        if state.posthoc is not None and (is_due(config.posthoc_ema_steps, state.step) or last):
            save_snapshot(state.posthoc, Path(config.output_dir), state.step)
        if is_due(config.checkpointing_steps, state.step) or (config.checkpointing_steps and last):
            self._sync_stream_state()
            if self._save_checkpoint():
                self.saved_step = state.step
            self.accelerator.wait_for_everyone()
        draw, measure = is_due(config.validation_steps, state.step), is_due(config.eval_steps, state.step)
        if self.any_process(self.preemption.requested, at_once=draw or measure or last):
            self._sync_stream_state()
            raise Preempted
        if (draw or measure) and not last:
            self.validate(draw, measure)

    def _clip(self, objective: Objective) -> torch.Tensor:
        """Clip the gradient norm of each module. Return whether all norms are finite, `()`, bool."""
        max_norm = self.method.max_grad_norm(objective)
        # Not with accelerate's clipping, which would unscale fp16 gradients once for each module.
        self.accelerator.unscale_gradients(self.optimizers[objective.name])
        norms = {
            name: torch.nn.utils.clip_grad_norm_(self.prepared[name].parameters(), max_norm).to(self.accelerator.device)
            for name in objective.trains
        }
        finite = torch.stack([torch.isfinite(norm) for norm in norms.values()]).all()
        self.log.log_gradient(objective, norms, finite)
        return finite

    def _skip_unless(self, finite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """
        Make an optimizer skip its step unless the gradient is finite. A fused optimizer does this without synchronizing
        the device. All processes take the same decision, because their gradients are averaged.
        """
        if self.state.scaler is not None:  # In fp16, the scaler skips the step.
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
        elif not finite:
            optimizer.zero_grad()  # A step without gradients changes nothing.

    def _sync_stream_state(self) -> None:
        """Gather the positions of all processes in streamed data. Called by all processes."""
        if self.stream is not None:
            self.state.stream = self.stream.state_dict(gather_object([self.stream.reached]))

    def _save_checkpoint(self) -> bool:
        """Save a checkpoint on the main process, and publish it if requested. Return False if saving failed."""
        if not self.accelerator.is_main_process:
            return True
        saved = save_checkpoint(self.config, self.state, self.facts)
        if saved and self.publisher is not None and self.state.step < self.plan.total_steps:
            with ema_weights(self.state):
                self.publisher.publish(self.method.sampling_pipeline(), self.state.step)
        return saved

    def _draw_samples(self) -> None:
        logger.info("Drawing samples at step %d", self.state.step)
        image = self.method.preview(self.accelerator)
        if image is not None and self.accelerator.is_main_process:
            self.log.trackers.log_samples(image, self.state.step)

    def _save(self) -> None:
        """Save the pipeline and `run.json`, and print how to load the pipeline."""
        config, accelerator, method = self.config, self.accelerator, self.method
        if accelerator.is_main_process:
            with saved_together(Path(config.output_dir)) as folder:
                method.save(folder)
                for name, component in component_names(method).items():
                    save_variants(self.state, name, folder / component)
                write_run_record(folder, config, accelerator, method, self.state, self.plan.num_images)
            say(describe_saved(config.output_dir, method.example()))
        accelerator.wait_for_everyone()  # until the model is saved, but not until it is uploaded

    def _publish(self) -> None:
        """Publish the saved pipeline if requested, and print how to open its demo."""
        if self.publisher is not None:
            self.publisher.close()
        if self.repo_id is not None:
            publish_run(self.config, self.repo_id)
        if self.accelerator.is_main_process:
            say(describe_demo(self.config.output_dir))
