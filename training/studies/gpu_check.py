# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[test]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "../..", editable = true }
# ///
"""Check a GPU in less than ten minutes: run the tests that need one, and time sampling and training.

python training/studies/gpu_check.py --output_dir gpu-check

Each setting (fp32, TF32, bf16, torch.compile, channels_last, CUDA graphs, xformers) is compared with a hand-written
loop, or with diffusers' train_unconditional.py, in the same precision and alternating with it. A setting that fails has
a row with the reason. The tables are in gpu_check.md, and gpu_check.json has all measurements.
"""

import io
import logging
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers_cfg.config import run_command
from diffusers_cfg.method_settings import CFGConfig

GPU_TESTS = Path(__file__).parents[2] / "tests" / "engine" / "test_gpu.py"
# Timed calls of each side, and their lengths: sampling steps, training steps before the first call and of each call.
# The size of the matrices whose product gives the rate that MFU refers to.
SIZES = {"repeats": 5, "sampling_steps": 20, "warm_up": 5, "training_steps": 10, "matmul": 8192}


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags of this command."""
    parser = ArgumentParser(
        prog="gpu_check.py",
        description="Run the tests that need a GPU, and time sampling and training on it, in less than ten minutes.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default="gpu-check", help="Output folder for the tables.")
    return parser.parse_args(argv)


def check(output_dir: Path, config: CFGConfig, sizes: dict[str, int], device: Any = None) -> None:
    """
    Run the tests, time everything, and write the tables.

    Args:
        output_dir (`Path`): the folder for the tables.
        config (`CFGConfig`): the settings of training, whose batch size is also that of sampling.
        sizes (`dict[str, int]`): as in `SIZES`.
        device (`torch.device`, *optional*): the device to measure, by default the GPU.
    """
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.data.sources import load_labelled_images
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.evaluation import gpu_check
    from diffusers_cfg.evaluation.benchmark import unconditional_training
    from diffusers_cfg.evaluation.reports import write_json, write_text
    from diffusers_cfg.evaluation.timing import peak_bytes
    from diffusers_cfg.files import check_writable
    from diffusers_cfg.methods.cfg import ClassifierFreeGuidance

    started = time.perf_counter()
    device = device or gpu_check.require_gpu()
    check_writable(output_dir, "--output_dir")
    logging.disable(logging.WARNING)
    print("Running the tests that need a GPU …", flush=True)
    tests = gpu_check.run_tests(GPU_TESTS, gpu_check.TEST_SECONDS, "-m", "gpu")
    images = load_labelled_images(config)
    pipeline = ClassifierFreeGuidance.build(config, images).pipeline.to(device)
    batch_size, deadline = config.train_batch_size, started + gpu_check.BUDGET_SECONDS

    def sample(variant: gpu_check.Variant) -> dict[str, Any]:
        return gpu_check.time_sampling(pipeline, variant, batch_size, sizes["sampling_steps"], sizes["repeats"])

    def train(variant: gpu_check.Variant) -> dict[str, Any]:
        gpu_check.forget_accelerator()
        settings = replace(config, **variant.training_settings)
        # The accelerator of the other loop does not compile. That of the trainer does, so it must be a new one.
        accelerator = make_accelerator(replace(settings, compile=False))
        peer = unconditional_training(settings, images, pipeline, accelerator)
        gpu_check.forget_accelerator()
        clock = gpu_check.StepClock(peer, sizes["warm_up"], sizes["training_steps"], sizes["repeats"])
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            settings = replace(settings, output_dir=folder, max_train_steps=clock.total_steps)
            trainer = Trainer(settings, ClassifierFreeGuidance)
            take_step, peaks = trainer.train_step, []

            def timed_step(batches: Any) -> None:
                if variant.channels_last and not clock.taken:
                    trainer.method.pipeline.unet.to(memory_format=gpu_check.CHANNELS_LAST)
                if clock.taken == clock.warm_up - 1:  # with the state of the optimizer, and compiled
                    peaks.append(peak_bytes(lambda: take_step(batches)))
                else:
                    take_step(batches)
                clock.step()

            trainer.train_step = timed_step
            trainer.run()
        return {"seconds": clock.timings.summary(), "peak_bytes": peaks[0]}

    rates = {precision: gpu_check.matmul_rate(device, precision, sizes["matmul"]) for precision in gpu_check.DTYPES}
    forward, step = gpu_check.count_flops(pipeline.unet, batch_size)
    record = {
        **gpu_check.describe_device(device),
        "parameters": pipeline.unet.num_parameters(),
        "resolution": config.resolution,
        "tests": tests,
        "matmul_rates": rates,
        "sampling_settings": {
            "images": batch_size,
            "steps of DDIM": sizes["sampling_steps"],
            "evaluations per step": 2,
        },
        "sampling_images": batch_size,
        "training_settings": {"images per step": batch_size},
        "training_images": batch_size * sizes["training_steps"],
        **gpu_check.measured_rows({"sampling": sample, "training": train}, deadline),
    }
    gpu_check.add_mfu(record["sampling"], 2 * forward * sizes["sampling_steps"], rates)
    gpu_check.add_mfu(record["training"], step * sizes["training_steps"], rates)
    record["total_seconds"] = time.perf_counter() - started
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(record, output_dir / "gpu_check.json")
    write_text(gpu_check.report(record), output_dir / "gpu_check.md")
    print(gpu_check.report(record))


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    args = parse_args(argv)
    silent = {"report_to": "none", "checkpointing_steps": 0, "validation_steps": 0, "logging_steps": 50}
    cheap_samples = {"validation_guidance_scales": [0.0], "num_inference_steps": 1}
    # The hand-written loop uses AdamW, and Muon needs weights in the default memory format.
    config = CFGConfig(train_batch_size=64, optimizer="adamw", **silent, **cheap_samples)
    check(Path(args.output_dir), config, SIZES)


if __name__ == "__main__":
    run_command(main)
