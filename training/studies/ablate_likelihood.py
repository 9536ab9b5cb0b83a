# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Train variants of a variational diffusion model, and compare their likelihoods and their samples.

python training/studies/ablate_likelihood.py --output_dir ablation
python training/studies/ablate_likelihood.py --output_dir ablation --seeds 0 1 2 --variants learned fixed

Other flags are those of train_vdm.py. If the command is run again, it skips completed runs and resumes the rest.
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import Any

from diffusers_cfg.config import UserError, parse_config, run_command, say
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.evaluation.settings import EvaluationConfig, LikelihoodConfig, refuse_flags
from diffusers_cfg.method_settings import CFGConfig, DiffusionConfig, VDMConfig

# By variant, the settings that differ from those of train_vdm.py
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "linear": {"noise_schedule": "linear"},
    "fixed": {"noise_schedule": "fixed"},
    "by_the_bound": {},
    "no_fourier_features": {"fourier_features": [0]},
    "sigmoid": {"loss_weighting": "sigmoid"},
    "simple": {"loss_weighting": "simple"},
    "train_cfg": {},
}
# The variants whose samples are evaluated, and their samplers
SAMPLED = ("learned", "sigmoid", "simple", "train_cfg")
NETWORK = "network"
SAMPLERS = {"DPMSolverMultistepScheduler": 12, "LogSNRScheduler": 100}
# Flags of train_vdm.py that this command sets itself or that several runs cannot share.
REFUSED = {
    "--noise_schedule": "Pass --variants.",
    "--loss_weighting": "Pass --variants.",
    "--seed": "Pass --seeds.",
    "--model_config_name_or_path": "Networks of the variants differ. Pass --block_out_channels and so on.",
    "--pretrained_model_name_or_path": "Networks of the variants differ, so all start from new ones.",
    "--resume_from_checkpoint": "Runs are resumed automatically.",
    "--overwrite_output_dir": "Pass a different --output_dir, or delete the folder of a run to repeat it.",
    "--dry_run": "Pass it to train_vdm.py.",
    "--push_to_hub": "Publish one of the models with publish.py.",
}


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command. Return them, and the remaining flags for train_vdm.py."""
    parser = ArgumentParser(
        prog="ablate_likelihood.py",
        description="Train variants of a variational diffusion model, and compare the bounds on their likelihoods and "
        "their samples. Other flags are those of train_vdm.py.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, help="Output folder for the models, tables and the figure.")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[*VARIANTS],
        help="Models to train: learned is the default of train_vdm.py, by_the_bound trains its shape of γ(t) without "
        "variance minimisation, train_cfg is classifier-free guidance with the same network.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds to train each variant with.")
    parser.add_argument("--num_images", type=int, default=1000, help="Largest number of held-out images to evaluate.")
    parser.add_argument("--times_per_image", type=int, default=64, help="Number of times at which to evaluate each.")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[0.0, 1.0], help="Guidance scales w.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Number of samples for each sampler and w.")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    preemption = Preemption().install()
    args, train_argv = parse_args(argv)
    refuse_flags(train_argv, REFUSED)
    base = parse_config(VDMConfig, train_argv)
    runs = configs_of(args, base)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.data.sources import load_labelled_images
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.engine.record import is_completed
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.evaluation.in_training import training_evaluation
    from diffusers_cfg.evaluation.likelihood_ablation import check_evaluation, evaluations_of, measure, write_ablation
    from diffusers_cfg.methods.cfg import ClassifierFreeGuidance
    from diffusers_cfg.methods.vdm import VariationalDiffusion

    class ShapeByTheBound(VariationalDiffusion):
        minimises_variance = False

    methods = {"by_the_bound": ShapeByTheBound, "train_cfg": ClassifierFreeGuidance}
    images, accelerator = load_labelled_images(base), make_accelerator(replace(base, report_to="none"))
    likelihood, samples = evaluation_settings(args, base, images.num_held_out)
    evaluations = {
        config.output_dir: evaluations_of(variant, config, likelihood, samples, SAMPLERS if variant in SAMPLED else {})
        for variant, config in runs
    }
    for _, config in runs:  # all before the first run starts
        is_completed(config)
        pipeline = VariationalDiffusion.build(config if isinstance(config, VDMConfig) else base, images).pipeline
        for evaluation in evaluations[config.output_dir]:
            check_evaluation(evaluation, pipeline, config)
    if accelerator.is_main_process:
        VariationalDiffusion.build(base, images).pipeline.unet.save_config(Path(args.output_dir) / NETWORK)
    accelerator.wait_for_everyone()

    measurements, durations = [], []
    for number, (variant, config) in enumerate(runs, 1):
        left = timedelta(seconds=round((len(runs) - number + 1) * mean(durations))) if durations else "unknown"
        if accelerator.is_main_process:
            say(f"Run {number} of {len(runs)}: {variant}, seed {config.seed} (time left: {left})")
        started = time.monotonic()
        if not is_completed(config):
            Trainer(config, methods.get(variant, VariationalDiffusion), preemption, training_evaluation).run()
        measurements += [measure(evaluation, accelerator) for evaluation in evaluations[config.output_dir]]
        durations.append(time.monotonic() - started)
    if accelerator.is_main_process:
        say(write_ablation(measurements, likelihood, Path(args.output_dir)))
        say(f"The tables, the figure and the models are in {args.output_dir}.")


def configs_of(args: Namespace, base: VDMConfig) -> list[tuple[str, DiffusionConfig]]:
    """Return the variant and the training settings of each run. Raise `UserError` if a setting is invalid."""
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        raise UserError(f"--variants {' '.join(unknown)}: unknown. Choose from {', '.join(VARIANTS)}.")
    for name in ("variants", "seeds"):
        if len(set(values := getattr(args, name))) < len(values):
            raise UserError(f"--{name} must not repeat a value: {values}.")
    if not base.train_val_split:
        raise UserError("--train_val_split is 0, but likelihoods are compared on held-out images. Pass 0.15, say.")
    return [
        (variant, config_of(variant, replace(base, seed=seed), Path(args.output_dir)))
        for variant in args.variants
        for seed in args.seeds
    ]


def evaluation_settings(
    args: Namespace, base: VDMConfig, num_held_out: int
) -> tuple[LikelihoodConfig, EvaluationConfig]:
    """Return the settings that all bounds share, and those that all samples share."""
    likelihood = LikelihoodConfig(
        model=args.output_dir,
        num_images=min(args.num_images, num_held_out),
        times_per_image=args.times_per_image,
        log_snr_max=base.log_snr_max,
        log_snr_min=base.log_snr_min,
    )
    samples = EvaluationConfig(
        model=args.output_dir, guidance_scales=args.guidance_scales, num_samples=args.num_samples
    )
    return likelihood, samples


def config_of(variant: str, base: VDMConfig, output_dir: Path) -> DiffusionConfig:
    """Return the training settings of a variant. Raise `UserError` if one is invalid."""
    model = output_dir / f"seed={base.seed}" / variant
    started = model.is_dir() and any(model.iterdir())
    folder = {"output_dir": str(model), "resume_from_checkpoint": "latest" if started else None}
    if variant != "train_cfg":
        return replace(base, **VARIANTS[variant], **folder)
    # The network of the others, with the noise process and the sampler of train_cfg.py
    own = {"log_snr_min", "log_snr_max", "num_inference_steps", "model_config_name_or_path", *folder}
    shared = {
        setting.name: getattr(base, setting.name) for setting in fields(DiffusionConfig) if setting.name not in own
    }
    return CFGConfig(**shared, **folder, model_config_name_or_path=str(output_dir / NETWORK))


if __name__ == "__main__":
    run_command(main)
