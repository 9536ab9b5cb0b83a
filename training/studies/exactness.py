# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Compare guidance and its samplers with a known exact solution, and plot the results.

python training/studies/exactness.py --output_dir figures
python training/studies/exactness.py --output_dir figures --model cfg-model --guide_model weak-model

The exact model is a mixture of three Gaussians, one per class, whose ε(z, c) and ε(z) are closed forms. Classifiers
that are trained on its samples are compared with its exact classifier. With --model, guidance rules are compared on a
trained model. Tables are printed and written to tables.md, next to the figures.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from diffusers_cfg.config import UserError, run_command
from diffusers_cfg.evaluation.settings import EvaluationConfig


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, EvaluationConfig | None]:
    """Parse the flags of this command. Return them, and the settings of the rules on a trained model, if any."""
    parser = ArgumentParser(
        prog="exactness.py",
        description="Compare guidance and its samplers with a known exact solution, and plot the results.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", required=True, help="Output folder for the figures and tables.md.")
    parser.add_argument("--model", help="The output folder of a training run, to compare guidance rules on.")
    parser.add_argument("--guide_model", help="The output folder of a weaker model of the same data, for autoguidance.")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="Guidance scale w of all rules.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Number of samples for each rule.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="Number of sampling steps for each rule.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Random seed; each sample depends on the seed and its index."
    )
    args = parser.parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "model")}
    if args.model is None:
        if useless := [f"--{name}" for name, value in settings.items() if value != parser.get_default(name)]:
            raise UserError(f"{', '.join(useless)} has an effect only with --model.")
        return args, None
    return args, EvaluationConfig(model=args.model, guidance_scales=[settings.pop("guidance_scale")], **settings)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    args, config = parse_args(argv)
    # Imported here so that --help and flag errors do not wait for torch.
    import diffusers

    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation import exactness
    from diffusers_cfg.evaluation.exact_classifier import trained_classifier
    from diffusers_cfg.evaluation.reports import write_text
    from diffusers_cfg.files import check_writable

    output_dir = Path(args.output_dir)
    check_writable(output_dir, "--output_dir")
    if config is not None:
        exactness.check_rules(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    diffusers.utils.logging.set_verbosity_error()
    experiments: list[Callable[[Path], str]] = [
        exactness.mixture_figure,
        exactness.convergence,
        exactness.stochastic,
        exactness.network_error,
        trained_classifier,
    ]
    if config is not None:
        experiments.append(lambda folder: exactness.rules(folder, make_accelerator(), config))
    sections = []
    for experiment in experiments:
        sections.append(experiment(output_dir))
        print(f"\n{sections[-1]}", flush=True)
    write_text("\n\n".join(sections) + "\n", output_dir / "tables.md")


if __name__ == "__main__":
    run_command(main)
