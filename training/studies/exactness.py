# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Show that guidance and its samplers are right where the truth is known, and draw figures of it.

python training/studies/exactness.py --output_dir figures
python training/studies/exactness.py --output_dir figures --model cfg-model --guide_model weak-model

The truth is a mixture of three Gaussians, a class each, whose ε(z, c) and ε(z) are closed forms. With --model the rules
of guidance are compared on a trained model. Tables are printed, and written to tables.md with the figures.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from diffusers_cfg.config import CACHE_DIR, run_command


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Return the flags of this command."""
    parser = ArgumentParser(
        prog="exactness.py",
        description="Show that guidance and its samplers are right where the truth is known, and draw figures of it.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", required=True, help="Where to write the figures and tables.md.")
    parser.add_argument("--model", help="The output folder of a training run, to compare the rules of guidance on.")
    parser.add_argument("--guide_model", help="That of a weaker one for the same data, for autoguidance.")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="The w at which the rules are compared.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Samples of each rule.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="Steps of each rule.")
    parser.add_argument("--seed", type=int, default=0, help="Each sample is determined by this and its index.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Here and not above: torch takes seconds, which --help and a wrong flag need not wait for.
    import diffusers

    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation import exactness
    from diffusers_cfg.evaluation.reports import write_text

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    diffusers.utils.logging.set_verbosity_error()
    parts = [exactness.mixture_figure, exactness.convergence, exactness.stochastic, exactness.network_error]
    if args.model is not None:
        settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
        parts.append(lambda folder: exactness.rules(folder, make_accelerator(), CACHE_DIR, **settings))
    sections = []
    for part in parts:
        sections.append(part(output_dir))
        print(f"\n{sections[-1]}", flush=True)
    write_text("\n\n".join(sections) + "\n", output_dir / "tables.md")


if __name__ == "__main__":
    run_command(main)
