# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Train one model for each of several p_uncond, and evaluate each over w, as in the paper's table 1.

python training/studies/ablate_dropout.py --output_dir ablation
accelerate launch training/studies/ablate_dropout.py --output_dir ablation --config training/configs/mnist.yaml

Other flags are those of train_cfg.py. If the command is run again, it skips completed runs and resumes the rest.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from diffusers_cfg.config import UserError, parse_config, run_command
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.evaluation.settings import PAPER_SCALES, EvaluationConfig, format_number, refuse_flags
from diffusers_cfg.method_settings import CFGConfig

# Flags of train_cfg.py that this command sets itself or that several runs cannot share.
REFUSED = {
    "--conditioning_dropout_prob": "Pass --conditioning_dropout_probs.",
    "--resume_from_checkpoint": "Runs are resumed automatically.",
    "--overwrite_output_dir": "Pass a different --output_dir, or delete the folder of a run to repeat it.",
    "--dry_run": "Pass it to train_cfg.py.",
    "--push_to_hub": "Publish one of the models with publish.py.",
}


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command. Return them, and the remaining flags for train_cfg.py."""
    parser = ArgumentParser(
        prog="ablate_dropout.py",
        description="Train one model for each of several p_uncond, and evaluate each over w. Other flags are those of "
        "train_cfg.py.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, help="Output folder for the models, table.md and curves.png.")
    parser.add_argument(
        "--conditioning_dropout_probs", type=float, nargs="+", default=[0.1, 0.2, 0.5], help="Values of p_uncond."
    )
    parser.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        default=PAPER_SCALES,
        help="Guidance scales w, as defined in the paper.",
    )
    parser.add_argument("--num_samples", type=int, default=2000, help="Number of samples for each p_uncond and w.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="Number of sampling steps.")
    parser.add_argument("--scheduler", default="UniPCMultistepScheduler", help="Scheduler class of diffusers.")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    preemption = Preemption().install()
    args, train_argv = parse_args(argv)
    refuse_flags(train_argv, REFUSED)
    runs = {p: configs_of(p, args, train_argv) for p in args.conditioning_dropout_probs}
    if len(runs) < len(args.conditioning_dropout_probs):
        raise UserError(f"--conditioning_dropout_probs must not repeat a value: {args.conditioning_dropout_probs}.")
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.data.sources import load_labelled_images
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.engine.record import is_completed
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.evaluation.ablations import dropout_table, plot_tradeoff
    from diffusers_cfg.evaluation.in_training import training_evaluation
    from diffusers_cfg.evaluation.reports import write_text
    from diffusers_cfg.evaluation.sweep import check_folders, check_sampling, run_sweep
    from diffusers_cfg.methods.cfg import ClassifierFreeGuidance

    images, records = load_labelled_images(next(iter(runs.values()))[0]), {}
    for train_config, evaluation_config in runs.values():  # all before the first run starts
        is_completed(train_config)
        check_sampling(evaluation_config, ClassifierFreeGuidance.build(train_config, images).pipeline)
        check_folders(evaluation_config, vars(train_config))
    for p, (train_config, evaluation_config) in runs.items():
        if not is_completed(train_config):
            Trainer(train_config, ClassifierFreeGuidance, preemption, training_evaluation).run()
        accelerator = make_accelerator(replace(train_config, report_to="none"))
        records[p] = run_sweep(evaluation_config, accelerator)

    if accelerator.is_main_process:
        output_dir, text = Path(args.output_dir), dropout_table(records)
        write_text(text, output_dir / "table.md")
        plot_tradeoff(records, output_dir / "curves.png")
        print(text)


def configs_of(p: float, args: Namespace, train_argv: list[str]) -> tuple[CFGConfig, EvaluationConfig]:
    """Return the training and evaluation settings for one p_uncond. Raise `UserError` if a setting is invalid."""
    model = Path(args.output_dir) / f"p={format_number(p)}"
    started = model.is_dir() and any(model.iterdir())
    train_config = replace(
        parse_config(CFGConfig, train_argv),
        conditioning_dropout_prob=p,
        output_dir=str(model),
        resume_from_checkpoint="latest" if started else None,
    )
    evaluation_config = EvaluationConfig(
        model=str(model),
        output_dir=str(model / "evaluation"),
        guidance_scales=args.guidance_scales,
        num_samples=args.num_samples,
        num_inference_steps=args.num_inference_steps,
        scheduler=args.scheduler,
    )
    return train_config, evaluation_config


if __name__ == "__main__":
    run_command(main)
