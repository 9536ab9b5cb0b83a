"""Train a variational diffusion model (Kingma et al. 2021, arXiv 2107.00630), whose loss is a bound on the likelihood,
and whose noise schedule is learned.
"""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, cast

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError
from diffusers_cfg.data.images import UNLABELLED, LabelledImages, require_8_bits, require_classes
from diffusers_cfg.engine.method import Batch, Networks, Objective, Terms
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.evaluation.schedule_figures import plot_schedules, schedules_between
from diffusers_cfg.method_settings import VDMConfig
from diffusers_cfg.methods.guided import GuidedMethod
from diffusers_cfg.methods.networks import (
    build_unet,
    load_pretrained,
    new_pipeline,
    record_process,
    refuse_one_pass,
)
from diffusers_cfg.methods.objectives import NOISE_LEVELS, by_group, drop_class_labels, level_names
from diffusers_cfg.model_files import NOISE_SCHEDULE, SCHEDULE_PICTURE
from diffusers_cfg.noise_schedule import MIN_RANGE, TOLERANCE, NoiseSchedule, linear
from diffusers_cfg.settings import CONFIG_FILE
from diffusers_cfg.variational_bound import (
    bits_per_dim,
    continuous_weight,
    diffuse,
    discrete_times,
    discrete_weight,
    minimise_variance,
    noise_error,
    prior_term,
    reconstruction_term,
)

# The saved pipeline samples with the model's own posterior, which is closer to the data than an ODE solver.
NUM_INFERENCE_STEPS = 100
# b of the weight sigmoid(b - λ) (Kingma & Gao 2023, arXiv 2303.00848)
SIGMOID_BIAS = 2.0


class VariationalDiffusion(GuidedMethod):
    """
    The class-conditional variational diffusion model, in continuous time or with T steps.

    The network's time is linear in γ = -log SNR, so that the learned shape of γ(t) determines how often a noise level
    is drawn, and nothing else. Only the ends of γ are saved in the pipeline, as those of its scheduler.

    Attributes:
        minimises_variance (`bool`): whether a learned shape minimises the variance of the loss in continuous time, as
            in the paper. Otherwise it minimises the loss like everything else, for comparison.
    """

    config: VDMConfig
    minimises_variance = True

    def __init__(self, config: VDMConfig, pipeline: CFGPipeline, present_classes: list[int] | None = None) -> None:
        self.config, self.pipeline = config, pipeline
        self.present_classes = present_classes or list(range(pipeline.unet.num_classes))
        self.scheduler = noise_process(pipeline)
        self.noise_schedule = NoiseSchedule(
            -self.scheduler.config.log_snr_max,
            -self.scheduler.config.log_snr_min,
            learn_ends=config.learns_ends,
            learn_shape=config.noise_schedule == "learned",
        )
        self.modules: dict[str, torch.nn.Module] = {"unet": pipeline.unet}
        if config.noise_schedule != "fixed":  # DDP refuses modules without parameters
            self.modules["noise_schedule"] = self.noise_schedule
        self.averaged = tuple(self.modules)
        self.objectives = [Objective("vdm", tuple(self.modules), self.loss)]
        self.guidance_scales, self.num_inference_steps = config.validation_guidance_scales, config.num_inference_steps
        self.levels = level_names(self.scheduler)

    @classmethod
    def build(cls, config: VDMConfig, images: LabelledImages) -> Self:
        """Return the method with a new or pretrained pipeline. Raise UserError if it does not fit the data."""
        require_classes(images)
        require_8_bits(images)
        pipeline = build_pipeline(config, images)
        precision = AcceleratorState().mixed_precision
        if precision != "no" and pipeline.unet.config.get("fourier_frequencies") is None:
            raise UserError(
                f"--mixed_precision {precision} rounds the images by more than the noise of the clean end. Use "
                "--mixed_precision no, or a network with --fourier_features, whose first layer stays in float32."
            )
        return cls(config, pipeline, images.present_classes)

    @property
    def compiled(self) -> tuple[str, ...]:
        """The network; the noise schedule is small."""
        return ("unet",)

    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        """Return the optimizer; the noise schedule has its own rate, and no weight decay, which would move its ends."""
        optimizer, config = super().optimizer(objective._replace(trains=("unet",))), self.config
        if "noise_schedule" in objective.trains:
            schedule = {"params": list(self.noise_schedule.parameters()), "lr": config.schedule_learning_rate}
            optimizer.add_param_group({**schedule, "weight_decay": 0.0})
        return optimizer

    def loss(self, networks: Networks, batch: Batch) -> Terms:
        """Return the bound in bits per dimension, or the weighted loss, of each sample of a batch (x, c)."""
        x, draws, null, steps = batch.x, batch.draws, self.pipeline.unet.null_class_label, self.config.diffusion_steps
        c = drop_class_labels(batch.class_labels, self.config.conditioning_dropout_prob, null, draws.uniform("dropout"))
        u = draws.antithetic("time")
        noise, noise_0 = (draws.normal(name, *x.shape[1:]) for name in ("noise", "noise of z_0"))

        schedule = networks.get("noise_schedule") or self.noise_schedule.to(x.device)
        values = schedule(torch.stack(discrete_times(u, steps)) if steps else u)
        n, gamma = (values.n[1], values.gamma[1]) if steps else (values.n, values.gamma)
        weight = discrete_weight(values.gamma[0], gamma, steps) if steps else continuous_weight(values.gamma_slope)
        error = self.error(networks["unet"], x, c, n, gamma, noise)
        bits = bits_per_dim(x.shape[1:])
        parts = {
            "prior": bits * prior_term(x, values.gamma_1),
            "reconstruction": bits * reconstruction_term(x, noise_0, values.gamma_0),
            "diffusion": bits * weight * error,
        }
        parts["bits_per_dim"] = bound = torch.stack(list(parts.values())).sum(0)
        is_bound = self.config.loss_weighting == "bound"
        diffusion = parts["diffusion"] if is_bound else parts["diffusion"] * self.loss_weight(-gamma)
        # With steps, the bound depends on the shape, so the shape minimises the bound.
        if self.minimises_variance and not steps:
            minimise_variance(diffusion, n, values.slope)
        logs = self.logs(parts, gamma.detach(), (c == null) | (c == UNLABELLED))
        logs |= {name: getattr(values, name).detach().expand(len(x)) for name in ("gamma_0", "gamma_1")}
        return Terms(bound if is_bound else diffusion, logs)

    def logs(
        self, parts: dict[str, torch.Tensor], gamma: torch.Tensor, is_null: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return each part of the bound by the kind of label, and the diffusion term by noise level, `(batch,)`."""
        parts = {part: values.detach() for part, values in parts.items()}
        logs = {
            f"{part}/{kind}": values
            for part, value in parts.items()
            for kind, values in by_group(value, is_null.long(), ["conditional", "null"]).items()
        }
        level = (self.scheduler.u_at(-gamma) * NOISE_LEVELS).long().clamp(0, NOISE_LEVELS - 1)
        return {**logs, **by_group(parts["diffusion"], level, self.levels), "dropout_rate": is_null.float()}

    def error(
        self,
        unet: torch.nn.Module,
        x: torch.Tensor,
        c: torch.Tensor,
        n: torch.Tensor,
        gamma: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Return ‖ε - ε̂‖² of each sample `(batch,)` at γ, and the network's time n in [0, 1]."""
        pred = unet(diffuse(x, noise, gamma), self.scheduler.timestep(n), class_labels=c).sample
        return noise_error(self.scheduler.config.prediction_type, pred, x, noise, gamma)

    def loss_weight(self, log_snr: torch.Tensor) -> torch.Tensor:
        """Return the weight w(λ) of ‖ε - ε̂‖² relative to the bound, in the shape of λ."""
        if self.config.loss_weighting == "sigmoid":
            return (SIGMOID_BIAS - log_snr).sigmoid()
        # 2 p(λ), with the density p(λ) = ασ / 2a of Ho & Salimans (2022): importance sampling of their Algorithm 1
        a = math.atan(math.exp(10)) - math.atan(math.exp(-10))
        return (log_snr.sigmoid() * (-log_snr).sigmoid()).sqrt() / a

    def probe(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return `label_gain` of the diffusion term, with a linear schedule."""
        schedule = linear(*self.noise_schedule.ends())

        def error(x: torch.Tensor, c: torch.Tensor, u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return self.error(self.pipeline.unet, x, c, u, schedule(u).gamma, noise)

        return self.label_gain(batches, error)

    def sampling_pipeline(self) -> CFGPipeline:
        """Return the pipeline, with the current ends of the noise schedule in its scheduler."""
        gamma_0, gamma_1 = self.noise_schedule.ends()
        # Without the range of the solvers that step in σ/α, which the first ends may have narrowed
        config = {k: value for k, value in self.scheduler.config.items() if k not in ("sigma_min", "sigma_max")}
        config |= {"log_snr_min": -gamma_1, "log_snr_max": -gamma_0}
        scheduler = cast(LogSNRScheduler, LogSNRScheduler.from_config(config))
        record_process(self.pipeline.unet, scheduler)
        self.pipeline.register_modules(scheduler=scheduler)
        return self.pipeline

    def save(self, folder: Path) -> None:
        """Save the pipeline, and the noise schedule, which samples and the bound in continuous time do not need."""
        super().save(folder)
        save_file(self.noise_schedule.state_dict(), folder / NOISE_SCHEDULE)
        learned = copy.deepcopy(self.noise_schedule).cpu() if self.noise_schedule.learn_shape else None
        with torch.no_grad():
            plot_schedules(schedules_between(self.noise_schedule.ends(), learned), folder / SCHEDULE_PICTURE)

    def facts(self) -> dict[str, Any]:
        """Return the facts of `GuidedMethod`, and the settings of the bound."""
        names = ("noise_schedule", "diffusion_steps", "loss_weighting")
        return {**super().facts(), **{name: getattr(self.config, name) for name in names}}


def save_with_schedule(source: Path, pipeline: CFGPipeline, schedule: dict[str, torch.Tensor], folder: Path) -> None:
    """
    Save a pipeline of a finished run with another average of its noise schedule, whose ends its scheduler gets.

    Args:
        source (`Path`): the output folder of the run, with its settings.
        pipeline (`CFGPipeline`): the pipeline, with the average of the same length of its network.
        schedule (`dict[str, torch.Tensor]`): the parameters of the noise schedule.
        folder (`Path`): the folder to save to.

    Raises:
        UserError: if the settings are missing or those of another noise schedule.
    """
    method = VariationalDiffusion(VDMConfig.load(source / CONFIG_FILE), pipeline)
    parameters = dict(method.noise_schedule.named_parameters())
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in schedule.items()}:
        raise UserError(f"The snapshots in {source} have another noise schedule than {CONFIG_FILE} describes.")
    method.noise_schedule.load_state_dict({**method.noise_schedule.state_dict(), **schedule})
    method.save(folder)


def check_pretrained(config: VDMConfig, pipeline: CFGPipeline) -> None:
    """Raise UserError if a pretrained pipeline is no variational diffusion model of images."""
    source, scheduler = config.pretrained_model_name_or_path, noise_process(pipeline)
    if pipeline.vae is not None:
        raise UserError(
            f"--pretrained_model_name_or_path {source} models latents, which have no likelihood of images. Start "
            "from a model of images."
        )
    refuse_one_pass(config, pipeline.unet)
    if scheduler.config.log_snr_schedule != "linear":
        raise UserError(
            f"--pretrained_model_name_or_path {source} was trained with another noise process (log_snr_schedule "
            f"{scheduler.config.log_snr_schedule}), in which the network's time has another meaning. Start from a "
            "model of train_vdm.py, or train a new one."
        )
    low, high = scheduler.config.log_snr_min, scheduler.config.log_snr_max
    if high - low < MIN_RANGE - TOLERANCE:
        raise UserError(
            f"--pretrained_model_name_or_path {source} has the log-SNR {low:g} … {high:g}, but a schedule needs "
            f"ends at least {MIN_RANGE:g} apart. Start from another model."
        )


def build_pipeline(config: VDMConfig, images: LabelledImages) -> CFGPipeline:
    """Return a new or pretrained pipeline to train. Raise UserError if it does not fit the data or the method."""
    if config.pretrained_model_name_or_path is not None:
        pretrained = load_pretrained(config, images)
        check_pretrained(config, pretrained)
        unet, scheduler = pretrained.unet, noise_process(pretrained)
    else:
        frequencies = [2.0**n * math.pi for n in config.fourier_features if n]
        extra: dict[str, Any] = {"fourier_frequencies": frequencies} if frequencies else {}
        unet = build_unet(config, None, images.channels, num_classes=len(images.id2label), **extra)
        scheduler = LogSNRScheduler(
            log_snr_min=config.log_snr_min,
            log_snr_max=config.log_snr_max,
            log_snr_schedule="linear",
            prediction_type=config.prediction_type,
            variance_interpolation=0.0,  # the variance of the model's posterior
        )
    return new_pipeline(config, unet, scheduler, None, images.id2label, LogSNRScheduler, NUM_INFERENCE_STEPS)
