# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Measure a model by several samplers: how close to the data they come for how many evaluations of the network.

python training/studies/ablate_samplers.py --model cfg-model --output_dir samplers
python training/studies/ablate_samplers.py --model teacher student --output_dir samplers --guidance_interval 0.2 5

Flags that are not listed below are evaluate_cfg.py's. Run again, it resumes with what is missing.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from diffusers_cfg.config import UserError, parse_config, run_command
from diffusers_cfg.evaluation.settings import EvaluationConfig

SAMPLERS = [
    "LogSNRScheduler:256",
    "DDIMScheduler:10,20,50",
    "DPMSolverMultistepScheduler:5,8,12,16,20,25",
    "UniPCMultistepScheduler:5,8,12,16,20,25",
]


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Return the flags of this command, and those that are evaluate_cfg.py's."""
    parser = ArgumentParser(
        prog="ablate_samplers.py",
        description="Measure a model by several samplers: how close to the data they come for how many evaluations of "
        "the network.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", nargs="+", required=True, help="Output folders of training runs, or repositories.")
    parser.add_argument(
        "--output_dir", required=True, help="A folder for table.md, samplers.json, curves.png and samples."
    )
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, help="Classes, and their numbers of steps.")
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, help="Measure each also with guidance where σ_lo < σ/α ≤ σ_hi only."
    )
    parser.add_argument(
        "--guidance_scales", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="The paper's w; the best counts."
    )
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, evaluation_argv = parse_args(argv)
    configs = configs_of(args, evaluation_argv)
    # Here and not above: torch takes seconds, which --help and a wrong flag need not wait for.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.ablations import check_settings, combine, draw_quality, samplers_table
    from diffusers_cfg.evaluation.reports import write_json, write_text
    from diffusers_cfg.evaluation.sweep import run_sweep

    check_settings(configs)
    accelerator = make_accelerator()
    records = [run_sweep(config, accelerator) for config in configs]
    if accelerator.is_main_process:
        output_dir, record = Path(args.output_dir), combine(configs, records)
        write_json(record, output_dir / "samplers.json")
        text = samplers_table(record)
        write_text(text, output_dir / "table.md")
        draw_quality(record, output_dir / "curves.png")
        print(text)


def configs_of(args: Namespace, evaluation_argv: list[str]) -> list[EvaluationConfig]:
    """Return the settings of an evaluation for each way to draw. Raises UserError for wrong or misplaced flags."""
    base = parse_config(EvaluationConfig, [*evaluation_argv, "--model", args.model[0]])
    for name in ("scheduler", "num_inference_steps"):
        if getattr(base, name) is not None:
            raise UserError(f"--{name} is not a flag of this command: give the samplers and their steps by --samplers.")
    models = [replace(base, model=model) for model in args.model]
    if len({of_model.model_name for of_model in models}) < len(models):
        raise UserError(
            f"--model {' '.join(args.model)}: two have the same name, which identifies their results. Rename a folder."
        )
    intervals = [None] if args.guidance_interval is None else [None, args.guidance_interval]
    configs = [
        replace(
            of_model,
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_interval=interval,
            guidance_scales=args.guidance_scales,
            output_dir=Path(args.output_dir) / of_model.model_name / folder_name(scheduler, steps, interval),
        )
        for of_model in models
        for scheduler, numbers in map(parse_sampler, args.samplers)
        for interval in intervals
        for steps in numbers
    ]
    return list({config.output_dir: config for config in configs}.values())


def folder_name(scheduler: str, steps: int, interval: list[float] | None) -> str:
    """Return the name of the folder of a way to draw."""
    return f"{scheduler}-{steps}" + ("-interval={:g},{:g}".format(*interval) if interval else "")


def parse_sampler(text: str) -> tuple[str, list[int]]:
    """Return the class and the numbers of steps of "CLASS:STEPS,STEPS". Raises UserError."""
    scheduler, _, numbers = text.partition(":")
    try:
        return scheduler, [int(number) for number in numbers.split(",")]
    except ValueError:
        raise UserError(f"--samplers {text} must be a class and its numbers of steps, as {SAMPLERS[1]}.") from None


if __name__ == "__main__":
    run_command(main)
