# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Count the modes that denoising diffusion GANs cover with different numbers of steps T (Xiao et al. 2021).

python training/studies/modes.py --output_dir modes
python training/studies/modes.py --output_dir modes --parts stacked --num_timesteps 1 4 --seeds 0 1

The Gaussians are 25 in the plane. The stacked images have three grayscale images of the data as their channels, by
default of scikit-learn's digits. Other flags are those of train_ddgan.py. If the command is run again, it skips
completed runs and resumes the rest.
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import mean

from diffusers_cfg.config import UserError, check_range, parse_config, run_command, say
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.evaluation.settings import MAX_SAMPLES, refuse_flags
from diffusers_cfg.method_settings import DDGANConfig

PARTS = ("gaussians", "stacked")
# Flags of train_ddgan.py that this command sets itself or that several runs cannot share.
REFUSED = {
    "--seed": "Pass --seeds.",
    "--resume_from_checkpoint": "Runs are resumed automatically.",
    "--overwrite_output_dir": "Pass a different --output_dir, or delete the folder of a run to repeat it.",
    "--dry_run": "Pass it to train_ddgan.py.",
    "--push_to_hub": "Publish one of the models with publish.py.",
}


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """Parse the flags of this command. Return them, and the remaining flags for train_ddgan.py."""
    parser = ArgumentParser(
        prog="modes.py",
        description="Count the modes that denoising diffusion GANs cover with different numbers of steps T, of 25 "
        "Gaussians and of stacked images. Other flags are those of train_ddgan.py, for the stacked images.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, help="Output folder for models, tables and pictures.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="Data to train on.")
    parser.add_argument("--num_timesteps", type=int, nargs="+", default=[1, 2, 4, 8], help="Numbers of steps T.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds to train with for each T.")
    parser.add_argument(
        "--num_samples", type=int, default=10_000, help="Number of samples of each model; 26,000 are usual."
    )
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    preemption = Preemption().install()
    args, train_argv = parse_args(argv)
    configs = configs_of(args, train_argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.data.images import require_classes
    from diffusers_cfg.data.sources import load_labelled_images
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.engine.record import is_completed
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.evaluation.gaussian_grid import compare_on_grid
    from diffusers_cfg.evaluation.mode_coverage import StackedModes, compare_stacks, draw_stacks
    from diffusers_cfg.evaluation.mode_reports import gaussians_text, stacked_text
    from diffusers_cfg.evaluation.reports import write_json, write_text
    from diffusers_cfg.files import check_writable
    from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN

    base, output_dir, record, texts = configs[0], Path(args.output_dir), {}, []
    check_writable(output_dir, "--output_dir")
    accelerator = make_accelerator(replace(base, report_to="none"))
    if "stacked" in args.parts:  # all before the first run starts
        single, stacks = load_labelled_images(replace(base, stack=1)), load_labelled_images(base)
        require_classes(single)
        for config in configs:
            is_completed(config)
            DenoisingDiffusionGAN.build(config, stacks)
    if "gaussians" in args.parts and accelerator.is_main_process:
        record["gaussians"] = compare_on_grid(args.num_timesteps, args.seeds, args.num_samples, output_dir)
        texts.append(gaussians_text(record["gaussians"]))
        say(texts[-1])
    accelerator.wait_for_everyone()
    if "stacked" in args.parts:
        durations = []
        for number, config in enumerate(configs, 1):
            left = timedelta(seconds=round((len(configs) - number + 1) * mean(durations))) if durations else "unknown"
            if accelerator.is_main_process:
                run = f"T = {config.num_timesteps}, seed {config.seed}"
                say(f"Run {number} of {len(configs)}: {run} (time left: {left})")
            started = time.monotonic()
            if not is_completed(config):
                Trainer(config, DenoisingDiffusionGAN, preemption).run()
            draw_stacks(config, args.num_samples, accelerator)
            durations.append(time.monotonic() - started)
        modes = StackedModes.of(base, single, stacks, accelerator)
        if accelerator.is_main_process:
            record["stacked"] = compare_stacks(configs, modes, args.num_samples, output_dir)
            texts.append(stacked_text(record["stacked"]))
            say(texts[-1])
    if accelerator.is_main_process:
        write_json(record, output_dir / "modes.json")
        write_text("\n".join(texts), output_dir / "table.md")
        say(f"The tables, the pictures and the models are in {output_dir}.")


def configs_of(args: Namespace, train_argv: list[str]) -> list[DDGANConfig]:
    """Return the training settings of the stacked images for each T and seed. Raise `UserError` if one is invalid."""
    refuse_flags(train_argv, REFUSED)
    for name in ("parts", "num_timesteps", "seeds"):
        if len(set(values := getattr(args, name))) < len(values):
            raise UserError(f"--{name} must not repeat a value: {values}.")
    check_range("num_samples", args.num_samples, {"at_least": 1, "at_most": MAX_SAMPLES})
    base = parse_config(DDGANConfig, ["--stack", "3", *train_argv])
    if base.stack == 1:
        raise UserError("--stack 1 trains on images with labels, of which each has its own class. Pass --stack 3.")
    if train_argv and "stacked" not in args.parts:
        raise UserError(f"{train_argv[0]}: no effect on the Gaussians. Leave it out, or pass --parts stacked.")
    configs = []
    for num_timesteps in args.num_timesteps:
        for seed in args.seeds:
            model = Path(args.output_dir) / "stacked" / f"T={num_timesteps}" / f"seed={seed}"
            resumed = "latest" if model.is_dir() and any(model.iterdir()) else None
            configs.append(
                replace(
                    base,
                    num_timesteps=num_timesteps,
                    seed=seed,
                    output_dir=str(model),
                    resume_from_checkpoint=resumed,
                )
            )
    return configs


if __name__ == "__main__":
    run_command(main)
