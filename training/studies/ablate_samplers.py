# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Compare samplers, and kinds of models, by Fréchet distance, network evaluations and time.

python training/studies/ablate_samplers.py --model cfg-model --output_dir samplers
python training/studies/ablate_samplers.py --model teacher student --output_dir samplers --guidance_interval 0.2 5
python training/studies/ablate_samplers.py --model cfg-model eight-steps ddgan-model --output_dir trilemma \
  --samplers DPMSolverMultistepScheduler:4,12 --guidance_scales 0 0.1 0.3

A denoising diffusion GAN, or a student that was distilled to few steps, is evaluated with its own sampler alone, and
the GAN at w = 0. Other flags are those of evaluate_cfg.py. If the command is run again, it reuses existing samples.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from diffusers_cfg.config import UserError, parse_config, run_command
from diffusers_cfg.evaluation.settings import EvaluationConfig, sampler_folder

SAMPLERS = [
    "LogSNRScheduler:256",
    "DDIMScheduler:10,20,50",
    "DPMSolverMultistepScheduler:5,8,12,16,20,25",
    "UniPCMultistepScheduler:5,8,12,16,20,25",
]


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command. Return them, and the remaining flags for evaluate_cfg.py."""
    parser = ArgumentParser(
        prog="ablate_samplers.py",
        description="Compare samplers on a trained model by Fréchet distance and number of network evaluations. Other "
        "flags are those of evaluate_cfg.py.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", nargs="+", required=True, help="Output folders of training runs, or Hub repositories."
    )
    parser.add_argument(
        "--output_dir", required=True, help="Output folder for table.md, samplers.json, curves.png and samples."
    )
    parser.add_argument(
        "--samplers",
        nargs="+",
        default=SAMPLERS,
        help="Samplers as CLASS:STEPS,STEPS. Models that were trained for their own sampler take no other.",
    )
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        help="Also evaluate each sampler with guidance only where σ_lo < σ/α ≤ σ_hi.",
    )
    parser.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        default=[0.1, 0.2, 0.3],
        help="Guidance scales w; the best one is reported. A denoising diffusion GAN is evaluated at 0 alone.",
    )
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    args, evaluation_argv = parse_args(argv)
    configs = configs_of(args, evaluation_argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.ablations import check_settings, combine, plot_quality, samplers_table
    from diffusers_cfg.evaluation.reports import write_json, write_text
    from diffusers_cfg.evaluation.sweep import run_sweep

    accelerator = make_accelerator()
    configs = check_settings(configs)
    records = [run_sweep(config, accelerator) for config in configs]
    if accelerator.is_main_process:
        output_dir, record = Path(args.output_dir), combine(configs, records)
        write_json(record, output_dir / "samplers.json")
        text = samplers_table(record)
        write_text(text, output_dir / "table.md")
        plot_quality(record, output_dir / "curves.png")
        print(text)


def configs_of(args: Namespace, evaluation_argv: list[str]) -> list[EvaluationConfig]:
    """Return the evaluation settings of each model, sampler and interval. Raise `UserError` for invalid flags."""
    base = parse_config(EvaluationConfig, [*evaluation_argv, "--model", args.model[0]])
    for name in ("scheduler", "num_inference_steps"):
        if getattr(base, name) is not None:
            raise UserError(f"--{name} is not a flag of this command. Set samplers and their steps with --samplers.")
    if base.reference is not None:
        raise UserError("--reference is not a flag of this command, which compares with the training data.")
    model_configs = [replace(base, model=model) for model in args.model]
    if len({config.model_name for config in model_configs}) < len(model_configs):
        raise UserError(
            f"--model {' '.join(args.model)}: two models have the same name, which identifies their results. Rename a "
            "folder."
        )
    intervals = [None] if args.guidance_interval is None else [None, args.guidance_interval]
    configs = [
        replace(
            config,
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_interval=interval,
            guidance_scales=args.guidance_scales,
            output_dir=Path(args.output_dir) / config.model_name / sampler_folder(scheduler, steps, interval),
        )
        for config in model_configs
        for scheduler, step_counts in map(parse_sampler, args.samplers)
        for interval in intervals
        for steps in step_counts
    ]
    return list({config.output_dir: config for config in configs}.values())


def parse_sampler(text: str) -> tuple[str, list[int]]:
    """Parse "CLASS:STEPS,STEPS". Return the class and the step counts. Raise `UserError` if the format is invalid."""
    scheduler, _, steps = text.partition(":")
    try:
        return scheduler, [int(count) for count in steps.split(",")]
    except ValueError:
        raise UserError(f"--samplers {text} must have the form CLASS:STEPS,STEPS, such as {SAMPLERS[1]}.") from None


if __name__ == "__main__":
    run_command(main)
