"""Distil guidance into one pass: a student that takes w as an input; then one of few steps (Meng et al. 2023).

accelerate launch training/distill_guidance.py --teacher cfg-model --output_dir one-pass
accelerate launch training/distill_guidance.py --teacher one-pass --student_steps 8 --output_dir eight-steps

Further flags are those of train_cfg.py. Data and optimization are the teacher's, where its folder says what they were.
"""

import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path

from config import DataConfig, OptimizationConfig, TrainConfig, UserError, parse_config
from preemption import Preemption
from run import as_script, run


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, TrainConfig]:
    parser = ArgumentParser(
        prog="distill_guidance.py", formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False,
        description=__doc__.splitlines()[0] + " Further flags are those of train_cfg.py: data, optimization, run, Hub.",
    )  # fmt: skip
    parser.add_argument("--teacher", required=True, help="The output folder of a training run, or a repository.")
    parser.add_argument(
        "--max_guidance_scale",
        type=float,
        help="The student learns w in 0 … this; by default what its teacher did, or 4.",
    )
    parser.add_argument(
        "--student_steps", type=int, help="Sample in so many steps of DDIM, a divisor of 1000; by default in any way."
    )
    parser.add_argument(
        "--teacher_steps", type=int, default=32, help="How many the teacher takes meanwhile, a multiple of them."
    )
    args, rest = parser.parse_known_args(argv)
    steps = args.student_steps
    if steps is not None and (steps < 1 or args.teacher_steps < 1 or 1000 % steps or args.teacher_steps % steps):
        raise UserError(
            f"--student_steps must divide 1000, as DDIM wants, and --teacher_steps, but is {steps}, and "
            f"--teacher_steps {args.teacher_steps}."
        )
    if args.max_guidance_scale is not None and not 0 < args.max_guidance_scale < math.inf:
        raise UserError(f"--max_guidance_scale must be a positive number, but is {args.max_guidance_scale}.")
    config = parse_config(rest, {**settings_of(args.teacher), "pretrained_model_name_or_path": args.teacher})
    config.num_inference_steps = steps or config.num_inference_steps
    return args, config


def settings_of(teacher: str) -> dict:
    """How a teacher was trained, where its folder says so."""
    path = Path(teacher) / "train_config.yaml"
    if not path.is_file():
        return {}
    config = TrainConfig.load(path)
    return {
        field.name: getattr(config, field.name) for part in (DataConfig, OptimizationConfig) for field in fields(part)
    }


def distill_guidance(args: Namespace, config: TrainConfig, preemption: Preemption | None = None) -> None:
    # Imported here and not above: they take seconds, which --help and a wrong flag need not wait for.
    import torch
    from conditioning import drop_class_labels
    from diffusers import DDIMScheduler
    from distillation import few_step_target
    from model import load_pipeline, new_pipeline, noise_process
    from objectives import squared_error

    from diffusers_cfg import UNet2DCFGModel

    def prepare(images):
        teacher = load_pipeline(config, images)
        check_teacher(args, teacher.unet)
        teacher.unet.requires_grad_(False)
        largest = teacher.unet.max_guidance_scale or args.max_guidance_scale or 4.0
        # The grid is one that the student can draw
        config.validation_guidance_scales = [w for w in config.validation_guidance_scales if 0 <= w <= largest] or [0.0]
        torch.manual_seed(config.seed)
        unet = UNet2DCFGModel.from_config(teacher.unet.config, max_guidance_scale=largest)
        unet.load_state_dict(teacher.unet.state_dict(), strict=False)  # a teacher without w has no embedding of it
        sampler = (DDIMScheduler, args.student_steps) if args.student_steps else ()
        student = new_pipeline(config, unet, noise_process(teacher), teacher.vae, teacher.id2label, *sampler)
        return student, distillation(teacher, largest)

    def distillation(teacher, largest):
        scheduler, null_class_label = noise_process(teacher), teacher.unet.null_class_label

        def loss_of(unet, x, c, draws):
            """The student's distance from the guided teacher, for each sample of a batch."""
            if teacher.unet.device != x.device:
                teacher.unet.to(x.device)
            c = drop_class_labels(c, config.conditioning_dropout_prob, null_class_label, draws.dropout)
            # Uniform in its root: between 0 and 0.5 the samples change as much as between 1 and 4.
            w = largest * draws.uniform("guidance scale").square()
            null = torch.full_like(c, null_class_label)

            @torch.no_grad()
            def guided(z, t):
                scales = w.view(-1, 1, 1, 1)
                return teacher.guide(*teacher.predictions(z, t, c, null, scales), scales)

            u, steps = draws.u, args.student_steps
            if steps is not None:  # the start of one of the student's steps
                u = ((u * steps).floor().clamp(max=steps - 1) + 1) / steps
            t = scheduler.timestep(u)
            z = scheduler.add_noise(x, draws.noise, t)
            if steps is None:
                target = guided(z, t)
            else:
                target = few_step_target(scheduler, guided, z, u, u - 1 / steps, args.teacher_steps // steps)
            return squared_error(unet(z, t, class_labels=c, guidance_scale=w).sample, target)

        return loss_of

    run(config, prepare, preemption, probe_labels=False)


def check_teacher(args: Namespace, unet) -> None:
    """Raises UserError if the student cannot learn from it what it is asked to."""
    from diffusers_cfg import CFGPipeline

    index = CFGPipeline.load_config(args.teacher)
    if index["scheduler"][1] == "DDIMScheduler" and index["num_inference_steps"] != args.teacher_steps:
        raise UserError(
            f"--teacher_steps {args.teacher_steps}: the teacher was itself made for {index['num_inference_steps']}."
        )
    known = unet.max_guidance_scale
    if known is not None and args.student_steps is None:
        raise UserError(
            f"--teacher {args.teacher} guides in one pass already: give --student_steps to make them fewer."
        )
    if known is not None and args.max_guidance_scale not in (None, known):
        raise UserError(f"--max_guidance_scale {args.max_guidance_scale:g}: leave it at the teacher's own, {known:g}.")
    if known is None and index["conditioning_dropout_prob"] == 0:
        raise UserError(
            f"--teacher {args.teacher} was trained with conditioning_dropout_prob = 0: it has no null class to guide "
            "away from."
        )


if __name__ == "__main__":
    as_script("distill_guidance.py", lambda preemption: distill_guidance(*parse_args(), preemption))
