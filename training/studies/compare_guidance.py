# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Compare classifier guidance, classifier-free guidance and both on one model with one classifier.

python training/studies/compare_guidance.py --model classifier-model --output_dir guidance
python training/studies/compare_guidance.py --model classifier-model --output_dir guidance --num_samples 10000 \
  --num_inference_steps 25 --guidance_scales 0 0.5 1 2 4

The model is one of train_classifier.py. Each rule is evaluated with equal seeds and steps, at the same w: if the
classifier were exact, all rules would draw the same images. Other flags are those of evaluate_cfg.py. If the command is
run again, it reuses existing samples.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from diffusers_cfg.config import UserError, parse_config, run_command
from diffusers_cfg.evaluation.settings import GUIDANCE, EvaluationConfig, refuse_flags

# Flags of evaluate_cfg.py that this command sets itself.
REFUSED = {
    "--guidance": "It compares all rules of guidance. Leave it out.",
    "--guider": "A guider has its own rule of guidance. Leave it out, or pass it to evaluate_cfg.py.",
    "--guide_model": "A classifier has no guide model. Leave it out, or pass it to evaluate_cfg.py.",
    "--guidance_rescale": "It changes classifier-free guidance alone. Leave it out, or pass it to evaluate_cfg.py.",
}


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command. Return them, and the remaining flags for evaluate_cfg.py."""
    parser = ArgumentParser(
        prog="compare_guidance.py",
        description="Compare classifier guidance, classifier-free guidance and both on one model with one classifier. "
        "Other flags are those of evaluate_cfg.py.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="The output folder of train_classifier.py, or a Hub repository.")
    parser.add_argument(
        "--output_dir", required=True, help="Output folder for table.md, guidance.json, tradeoff.png and samples."
    )
    parser.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        default=[0.0, 0.5, 1.0, 2.0, 4.0],
        help="Guidance scales w, as defined in the paper, of each rule.",
    )
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    args, evaluation_argv = parse_args(argv)
    configs = configs_of(args, evaluation_argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.ablations import check_sweeps
    from diffusers_cfg.evaluation.guidance_comparison import compare, guidance_table, plot_guidance
    from diffusers_cfg.evaluation.reports import write_json, write_text
    from diffusers_cfg.evaluation.sweep import run_sweep

    accelerator = make_accelerator()
    check_sweeps(configs)
    records = [run_sweep(config, accelerator) for config in configs]
    record = compare(configs, records, accelerator)
    if accelerator.is_main_process:
        output_dir, text = Path(args.output_dir), guidance_table(record)
        write_json(record, output_dir / "guidance.json")
        write_text(text, output_dir / "table.md")
        plot_guidance(record, output_dir / "tradeoff.png")
        print(text)


def configs_of(args: Namespace, evaluation_argv: list[str]) -> list[EvaluationConfig]:
    """Return the evaluation settings of each rule. Raise `UserError` for invalid flags."""
    refuse_flags(evaluation_argv, REFUSED)
    base = parse_config(EvaluationConfig, [*evaluation_argv, "--model", args.model])
    if base.reference is not None:
        raise UserError("--reference is not a flag of this command, which compares with the training data.")
    return [
        replace(base, guidance=rule, guidance_scales=args.guidance_scales, output_dir=str(Path(args.output_dir) / rule))
        for rule in GUIDANCE
    ]


if __name__ == "__main__":
    run_command(main)
