# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Measure the cost of sampling, training and starting, compared with hand-written code: medians and ratios, in turn.

python training/studies/benchmark.py
python training/studies/benchmark.py --config training/configs/mnist.yaml --output benchmark.json

Flags that are not listed below are train_cfg.py's: network, data, batch. The quality of samplers over their cost is
measured by ablate_samplers.py.
"""

import io
import logging
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.settings import CFGConfig

TRAIN_COMMAND = Path(__file__).parents[1] / "train_cfg.py"


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, CFGConfig]:
    """Return the flags of this command, and the settings of the training, of which there are no other logs."""
    parser = ArgumentParser(
        prog="benchmark.py",
        description="Measure the cost of sampling, training and starting. Further flags are train_cfg.py's.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="Images that are drawn at once.")
    parser.add_argument("--sampling_steps", type=int, default=20, help="Sampling steps T; a divisor of 1000.")
    parser.add_argument("--training_steps", type=int, default=30, help="Training steps that are timed at a time.")
    parser.add_argument("--repeats", type=int, default=5, help="How often each side has its turn.")
    parser.add_argument("--output", help="A JSON file for the figures.")
    args, train_argv = parser.parse_known_args(argv)
    return args, replace(parse_config(CFGConfig, train_argv), report_to="none")


def main(argv: list[str] | None = None) -> None:
    args, config = parse_args(argv)
    steps, repeats = args.training_steps, args.repeats
    short = replace(config, max_train_steps=steps, checkpointing_steps=0, validation_steps=0, eval_steps=0)
    short = replace(short, validation_guidance_scales=[0.0], num_inference_steps=1)  # of the samples after the steps
    # Here and not above: torch takes seconds, which --help and a wrong flag need not wait for.
    from diffusers_cfg.data.sources import load_labelled_images
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.evaluation import benchmark
    from diffusers_cfg.evaluation.reports import write_json
    from diffusers_cfg.evaluation.timing import describe_machine
    from diffusers_cfg.methods.cfg import ClassifierFreeGuidance

    def train() -> float:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            trainer = Trainer(replace(short, output_dir=folder), ClassifierFreeGuidance)
            trainer.run()
            return trainer.state.seconds

    logging.disable(logging.WARNING)
    accelerator, images = make_accelerator(config), load_labelled_images(config)
    pipeline = ClassifierFreeGuidance.build(config, images).pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    sampling = benchmark.compare_sampling(pipeline, args.batch_sizes, args.sampling_steps, repeats)
    peer = benchmark.unconditional_training(config, images, pipeline, accelerator)
    num_images = steps * config.train_batch_size
    record = {
        **describe_machine(),
        "parameters": pipeline.unet.num_parameters(),
        "sampling": sampling,
        "training": benchmark.compare_training(train, lambda: peer(steps), num_images, repeats),
        "starting": benchmark.compare_starting(TRAIN_COMMAND, repeats),
    }
    print(benchmark.tables(record))
    if args.output:
        write_json(record, Path(args.output))


if __name__ == "__main__":
    run_command(main)
