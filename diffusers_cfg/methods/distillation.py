"""Distill guidance into a student that takes w as an input, and then into few steps (Meng et al. 2023)."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

import torch
from diffusers import DDIMScheduler

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.config import UserError
from diffusers_cfg.data.images import UNLABELLED, LabelledImages, require_classes
from diffusers_cfg.engine.method import Batch, Networks, Objective, Terms
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.method_settings import DistillationConfig
from diffusers_cfg.methods.guided import GuidedMethod, learned_scales
from diffusers_cfg.methods.networks import (
    NUM_INFERENCE_STEPS,
    SOLVER,
    load_pretrained,
    new_pipeline,
    one_pass_network,
)
from diffusers_cfg.methods.objectives import (
    draw_guidance_scales,
    drop_class_labels,
    level_names,
    loss_logs,
    prediction_target,
    squared_error,
)

logger = logging.getLogger(__name__)


class GuidanceDistillation(GuidedMethod):
    """
    Distillation of classifier-free guidance (Meng et al. 2023, arXiv 2210.03142).

    The student ε(z, c, w) learns to predict what the teacher predicts with guidance (section 3.1). With
    `student_steps`, it learns to reach in one DDIM step the point that the guided teacher reaches in several steps
    (section 3.2).
    """

    config: DistillationConfig

    def __init__(
        self, config: DistillationConfig, teacher: CFGPipeline, present_classes: list[int] | None = None
    ) -> None:
        check_teacher(config, teacher.unet)
        self.config, self.teacher = config, teacher
        self.present_classes = present_classes or list(range(teacher.unet.num_classes))
        self.scheduler, self.student_steps = noise_process(teacher), config.student_steps
        self.max_guidance_scale = teacher.unet.max_guidance_scale or config.max_guidance_scale or 4.0
        teacher.unet.requires_grad_(False)
        student = one_pass_network(teacher.unet, self.max_guidance_scale, config.seed)
        solver, steps = (DDIMScheduler, self.student_steps) if self.student_steps else (SOLVER, NUM_INFERENCE_STEPS)
        self.pipeline = new_pipeline(config, student, self.scheduler, teacher.vae, teacher.id2label, solver, steps)
        self.modules, self.averaged = {"unet": student}, ("unet",)
        self.objectives, self.levels = [Objective("unet", ("unet",), self.loss)], level_names(self.scheduler)
        self.guidance_scales = learned_scales(config.validation_guidance_scales, self.max_guidance_scale)
        self.num_inference_steps = self.student_steps or config.num_inference_steps

    @classmethod
    def build(cls, config: DistillationConfig, images: LabelledImages) -> Self:
        """Return the method with a student of `--teacher`. Raise UserError if the teacher does not fit."""
        require_classes(images)
        return cls(config, load_pretrained(config, images, "--teacher"), images.present_classes)

    def loss(self, networks: Networks, batch: Batch) -> Terms:
        """Return the student's squared error against the guided teacher, for each sample of a batch (x, c)."""
        x, draws, null = batch.x, batch.draws, self.teacher.unet.null_class_label
        c = drop_class_labels(batch.class_labels, self.config.conditioning_dropout_prob, null, draws.uniform("dropout"))
        w = draw_guidance_scales(draws, self.max_guidance_scale)
        u, noise, steps = draws.uniform("time"), draws.normal("noise", *x.shape[1:]), self.student_steps
        if steps is not None:  # round up to the start of a student step
            u = ((u * steps).floor().clamp(max=steps - 1) + 1) / steps
        t = self.scheduler.timestep(u)
        z = self.scheduler.add_noise(x, noise, t)
        guided = partial(self.guided, c=c, w=w)
        if steps is None:
            target = guided(z, t)
        else:
            target = few_step_target(self.scheduler, guided, z, u, u - 1 / steps, self.config.teacher_steps // steps)
        loss = squared_error(networks["unet"](z, t, class_labels=c, guidance_scale=w).sample, target)
        return Terms(loss, loss_logs(loss.detach(), u, (c == null) | (c == UNLABELLED), self.levels))

    @torch.no_grad()
    def guided(self, z: torch.Tensor, t: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return the teacher's guided prediction at z `(batch, …)` for t, c and w `(batch,)`, in the shape of z."""
        if self.teacher.unet.device != z.device:
            self.teacher.unet.to(z.device)
        null, scales = torch.full_like(c, self.teacher.unet.null_class_label), w.view(-1, 1, 1, 1)
        return self.teacher.guide(*self.teacher.predictions(z, t, c, null, scales), scales)

    def facts(self) -> dict[str, Any]:
        """Return the facts of `GuidedMethod`, and the number of steps."""
        return {**super().facts(), "student_steps": self.student_steps}


def check_teacher(config: DistillationConfig, unet: UNet2DCFGModel) -> None:
    """Raise UserError if the settings do not fit the teacher."""
    # `load_config` is annotated to return a tuple, but does so only with `return_unused_kwargs`.
    index = cast(dict[str, Any], CFGPipeline.load_config(config.teacher))
    teacher_scale = unet.max_guidance_scale
    if index["scheduler"][1] == "DDIMScheduler" and index["num_inference_steps"] != config.teacher_steps:
        raise UserError(
            f"--teacher_steps is {config.teacher_steps}, but the teacher was distilled to "
            f"{index['num_inference_steps']} steps. Set --teacher_steps {index['num_inference_steps']}."
        )
    if teacher_scale is not None and config.student_steps is None:
        raise UserError(
            f"--teacher {config.teacher} already guides in one pass. Set --student_steps to distill it to fewer steps."
        )
    if teacher_scale is not None and config.max_guidance_scale not in (None, teacher_scale):
        raise UserError(
            f"--max_guidance_scale is {config.max_guidance_scale:g}, but the teacher was trained with "
            f"{teacher_scale:g}. Leave out --max_guidance_scale."
        )
    if teacher_scale is None and index["conditioning_dropout_prob"] == 0:
        raise UserError(
            f"--teacher {config.teacher} was trained with conditioning_dropout_prob = 0, so it has no null class to "
            "guide away from. Train a teacher with 0.1 to 0.2."
        )


def few_step_target(
    scheduler: LogSNRScheduler,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    u: torch.Tensor,
    next_u: torch.Tensor,
    teacher_steps: int,
) -> torch.Tensor:
    """
    Return the prediction for which one DDIM step from u to next_u ends where `teacher_steps` steps of the teacher end
    (Salimans & Ho 2022, arXiv 2202.00512, appendix G, which takes two).

    Args:
        scheduler (`LogSNRScheduler`): the noise process, and the prediction type.
        predict (`Callable`): the teacher, `(z, timesteps) -> prediction`.
        z (`torch.Tensor` of shape `(batch, …)`): noisy samples at u.
        u, next_u (`torch.Tensor` of shape `(batch,)`): noise levels, 0 ≤ next_u < u ≤ 1.
        teacher_steps (`int`): number of teacher steps, of equal length in u.

    Returns:
        `torch.Tensor` of the shape of z.
    """
    next_z = z
    for step in range(teacher_steps):
        current, following = (torch.lerp(u, next_u, i / teacher_steps) for i in (step, step + 1))
        next_z = ddim_step(scheduler, predict(next_z, scheduler.timestep(current)), next_z, current, following)

    # z' = α'x + σ'(z - αx)/σ, solved for x
    (alpha, sigma), (next_alpha, next_sigma) = (alpha_sigma(scheduler, level, z) for level in (u, next_u))
    x = (next_z - next_sigma / sigma * z) / (next_alpha - next_sigma / sigma * alpha)
    return prediction_target(scheduler, x, (z - alpha * x) / sigma, scheduler.timestep(u))


def ddim_step(
    scheduler: LogSNRScheduler, pred: torch.Tensor, z: torch.Tensor, u: torch.Tensor, next_u: torch.Tensor
) -> torch.Tensor:
    """Return z at next_u, given the prediction at u: α'x̃ + σ'(z - αx̃)/σ (Song et al. 2021, arXiv 2010.02502, η = 0)."""
    (alpha, sigma), (next_alpha, next_sigma) = (alpha_sigma(scheduler, level, z) for level in (u, next_u))
    x = scheduler.predict_original_sample(pred, z, scheduler.log_snr(u).view_as(alpha))
    return next_alpha * x + next_sigma * (z - alpha * x) / sigma


def alpha_sigma(scheduler: LogSNRScheduler, u: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return α and σ at u, in a shape that broadcasts over z."""
    (alpha, sigma), shape = scheduler.alpha_sigma(u), (-1, *(1,) * (z.ndim - 1))
    return alpha.view(shape), sigma.view(shape)
