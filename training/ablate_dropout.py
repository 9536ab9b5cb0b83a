"""Train the same model at several p_uncond, and measure each over w: the paper's table 1.

python training/ablate_dropout.py --output_dir ablation
python training/ablate_dropout.py --output_dir ablation --num_samples 5000 --config training/configs/mnist.yaml

Flags that are not listed below are train_cfg.py's. Run again, it goes on with what is missing.
"""

import json
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from config import UserError
from evaluate_cfg import PAPERS_SCALES

TRAINING = Path(__file__).parent


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    parser = ArgumentParser(
        prog="ablate_dropout.py",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, help="A folder for the models, table.md and curves.png.")
    parser.add_argument(
        "--conditioning_dropout_probs", type=float, nargs="+", default=[0.1, 0.2, 0.5], help="The values of p_uncond."
    )
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=PAPERS_SCALES, help="The paper's w.")
    parser.add_argument("--num_samples", type=int, default=2000, help="Samples for each p_uncond and w.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="Sampling steps.")
    parser.add_argument("--scheduler", default="UniPCMultistepScheduler", help="Sampler, a class of diffusers.")
    return parser.parse_known_args(argv)


def ablate_dropout(args: Namespace, train_argv: list[str]) -> str:
    """The table, FID and inception score by w (rows) and p_uncond (columns). Raises UserError if a part fails."""
    output_dir = Path(args.output_dir)
    records = {}
    for p in args.conditioning_dropout_probs:
        model = output_dir / f"p={p:g}"
        if not (model / "run.json").is_file():
            flags = ["--conditioning_dropout_prob", str(p), "--output_dir", str(model), *train_argv]
            if list(model.glob("checkpoint-*")):
                flags += ["--resume_from_checkpoint", "latest"]
            run(["-m", "accelerate.commands.launch", str(TRAINING / "train_cfg.py"), *flags])
        names = ("num_samples", "num_inference_steps", "scheduler")
        flags = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
        scales = map(str, args.guidance_scales)
        run([str(TRAINING / "evaluate_cfg.py"), "--model", str(model), *flags, "--guidance_scales", *scales])
        records[p] = json.loads((model / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    table = markdown(records)
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    draw_curves(records, output_dir / "curves.png")
    return table


def run(argv: list[str]) -> None:
    if subprocess.run([sys.executable, *argv]).returncode != 0:
        raise UserError(f"`python {' '.join(argv)}` failed, see above.")


def markdown(records: dict[float, dict]) -> str:
    from report import caption, cell, table

    first = next(iter(records.values()))
    metrics = [metric for metric in ("frechet_distance", "inception_score") if metric in first["results"][0]]
    names = [f"{first['metric_names'][metric]}, p = {p:g}" for metric in metrics for p in records]
    rows = []
    for i, row in enumerate(first["results"]):
        cells = [
            cell(record["results"][i], metric, record["best"]) for metric in metrics for record in records.values()
        ]
        rows.append([f"{row['guidance_scale']:g}", *cells])
    rows.append(["real", *(cell(record["floor"], metric, {}) for metric in metrics for record in records.values())])
    return f"{table(['w', *names], rows)}\n\n{caption(first)}\n"


def draw_curves(records: dict[float, dict], path: Path) -> None:
    """Figure 1 of the paper: a trade-off curve for each p_uncond."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for p, record in records.items():
        rows = record["results"]
        axis.plot(
            [row["inception_score"] for row in rows],
            [row["frechet_distance"] for row in rows],
            "o-",
            label=f"p = {p:g}",
        )
    axis.set(xlabel=record["metric_names"]["inception_score"], ylabel=record["metric_names"]["frechet_distance"])
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    try:
        print(ablate_dropout(*parse_args()))
    except UserError as error:
        sys.exit(f"ablate_dropout.py: error: {error}")
