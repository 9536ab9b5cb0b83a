# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Measure the cost of sampling, training and startup, compared with hand-written code.

python training/studies/benchmark.py
python training/studies/benchmark.py --config training/configs/mnist.yaml --output benchmark.json
python training/studies/benchmark.py --busy 3
torchrun --nproc_per_node 2 training/studies/benchmark.py --rates

With --busy, it measures instead what training and sampling keep of their speed beside busy processes, and with --rates
only the speed of this process, or of all processes of `torchrun` together.

Other flags are those of train_cfg.py, such as network, data and batch size. To compare the quality of samplers, see
ablate_samplers.py.
"""

import io
import logging
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from diffusers_cfg.config import UserError, parse_config, run_command
from diffusers_cfg.evaluation.settings import refuse_flags
from diffusers_cfg.method_settings import CFGConfig

# Flags of train_cfg.py that this command sets itself.
REFUSED = {
    **dict.fromkeys(("--output_dir", "--resume_from_checkpoint"), "The trained models are deleted."),
    **dict.fromkeys(("--dry_run", "--push_to_hub"), "Pass it to train_cfg.py."),
    "--optimizer": "It is AdamW, as in the hand-written loop.",
}
TRAIN_COMMAND = Path(__file__).parents[1] / "train_cfg.py"


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, CFGConfig]:
    """Parse the flags of this command. Return them, and the training settings without trackers."""
    parser = ArgumentParser(
        prog="benchmark.py",
        description="Measure the cost of sampling, training and startup. Other flags are those of train_cfg.py.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="Batch sizes for sampling.")
    parser.add_argument("--sampling_steps", type=int, default=20, help="Number of sampling steps T, a divisor of 1000.")
    parser.add_argument("--training_steps", type=int, default=30, help="Number of training steps per timed call.")
    parser.add_argument("--repeats", type=int, default=5, help="Number of timed calls of each side.")
    parser.add_argument("--output", help="JSON file for the measurements.")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--busy", type=int, help="Measure alone and beside this number of busy processes instead.")
    instead.add_argument(
        "--rates", action="store_true", help="Print only images/s of training and of sampling instead, as JSON."
    )
    args, train_argv = parser.parse_known_args(argv)
    if args.rates and args.output is not None:
        raise UserError("--output is for the other measurements: --rates prints its JSON.")
    refuse_flags(train_argv, REFUSED)
    for name in ("batch_sizes", "sampling_steps", "training_steps", "repeats", "busy"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"--{name} must be at least 1, but is {value}.")
    if 1000 % args.sampling_steps:
        raise UserError(f"--sampling_steps must be a divisor of 1000, but is {args.sampling_steps}.")
    steps = ["--sampling_steps", str(args.sampling_steps), "--training_steps", str(args.training_steps)]
    args.rates_argv = [*train_argv, *steps, "--batch_sizes", str(args.batch_sizes[-1]), "--rates"]
    return args, replace(parse_config(CFGConfig, train_argv), report_to="none", push_to_hub=False)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    args, config = parse_args(argv)
    steps, repeats = args.training_steps, args.repeats
    short = replace(config, max_train_steps=steps, checkpointing_steps=0, validation_steps=0, eval_steps=0)
    short = replace(short, optimizer="adamw", validation_guidance_scales=[0.0], num_inference_steps=1)  # cheap samples
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.data.sources import load_labelled_images
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.evaluation import benchmark, busy
    from diffusers_cfg.evaluation.reports import write_json
    from diffusers_cfg.evaluation.timing import describe_machine
    from diffusers_cfg.files import check_writable
    from diffusers_cfg.methods.cfg import ClassifierFreeGuidance

    if args.output is not None:
        check_writable(Path(args.output).parent, "The folder of --output")
        if Path(args.output).is_dir():
            raise UserError(f"--output {args.output} is a folder. Pass a file.")

    def train() -> float:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            trainer = Trainer(replace(short, output_dir=folder), ClassifierFreeGuidance)
            trainer.run()
            return trainer.state.seconds

    logging.disable(logging.WARNING)
    if args.busy is not None:
        record = describe_machine() | busy.compare_busy([__file__, *args.rates_argv], args.busy, repeats)
        print(busy.report(record))
    else:
        accelerator, images = make_accelerator(config), load_labelled_images(config)
        pipeline = ClassifierFreeGuidance.build(config, images).pipeline.to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        num_images = steps * config.train_batch_size
        if args.rates:
            sides = {"training": train, "sampling": busy.sampling(pipeline, args.batch_sizes[-1], args.sampling_steps)}
            counts = {"training": num_images, "sampling": args.batch_sizes[-1]}
            return busy.print_rates(sides, counts, accelerator)
        peer = benchmark.unconditional_training(config, images, pipeline, accelerator)
        record = {
            **describe_machine(),
            "parameters": pipeline.unet.num_parameters(),
            "sampling": benchmark.compare_sampling(pipeline, args.batch_sizes, args.sampling_steps, repeats),
            "training": benchmark.compare_training(train, lambda: peer(steps), num_images, repeats),
            "starting": benchmark.compare_starting(TRAIN_COMMAND, repeats),
        }
        print(benchmark.tables(record))
    if args.output is not None:
        write_json(record, Path(args.output))


if __name__ == "__main__":
    run_command(main)
