"""Time the settings that speed up sampling and training on a GPU, and run the tests that need one."""

import copy
import gc
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDIMScheduler, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation.benchmark import hand_written_loop, stock_copy
from diffusers_cfg.evaluation.reports import table
from diffusers_cfg.evaluation.timing import PairedTimings, describe_machine, now, peak_bytes, time_interleaved, timed

# The whole command takes less than ten minutes: the tests are stopped after the first limit, and no row starts after
# the second one. The slowest rows compile a network, which takes about a minute.
TEST_SECONDS, BUDGET_SECONDS = 240, 480
DTYPES = {"fp32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16}
CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True)
class Variant:
    """Settings of a row. `compile` is a mode of torch.compile; "reduce-overhead" uses CUDA graphs."""

    precision: str
    channels_last: bool = False
    compile: str | None = None
    xformers: bool = False

    def __str__(self) -> str:
        compiled = {None: "", "default": ", compiled", "reduce-overhead": ", compiled with CUDA graphs"}[self.compile]
        channels_last = ", channels_last" if self.channels_last else ""
        return f"{self.precision}{channels_last}{compiled}{', xformers' if self.xformers else ''}"

    @property
    def training_settings(self) -> dict[str, Any]:
        """The settings of a training run."""
        return {
            "allow_tf32": self.precision == "TF32",
            "mixed_precision": "bf16" if self.precision == "bf16" else "no",
            "compile": self.compile is not None,
            "enable_xformers_memory_efficient_attention": self.xformers,
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Apply the settings that are global to torch and to Accelerate, and free what the row leaves."""
        matmul, cudnn, mode = torch.backends.cuda.matmul, torch.backends.cudnn, "ACCELERATE_DYNAMO_MODE"
        before = matmul.allow_tf32, cudnn.allow_tf32, os.environ.get(mode)
        matmul.allow_tf32 = cudnn.allow_tf32 = self.precision != "fp32"
        os.environ[mode] = self.compile or "default"
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, name = before
            os.environ.pop(mode)
            if name is not None:
                os.environ[mode] = name
            torch.compiler.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


# In the order of their use: the last ones are left out if the time is up.
VARIANTS = [
    Variant("fp32"),
    Variant("TF32"),
    Variant("bf16"),
    Variant("bf16", compile="default"),
    Variant("bf16", channels_last=True),
    Variant("bf16", xformers=True),
    Variant("bf16", compile="reduce-overhead"),
    Variant("bf16", channels_last=True, compile="default"),
]


def require_gpu() -> torch.device:
    """Return the GPU. Raise UserError if there is none."""
    if not torch.cuda.is_available():
        raise UserError(
            f"There is no GPU that torch {torch.__version__} can use, and this command measures one. Run it on a "
            "machine with a GPU and a CUDA build of torch. On a CPU, use training/studies/benchmark.py."
        )
    return torch.device("cuda")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return the name of a device and the versions of the software, for JSON; `None` for what is not known."""
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        driver = found.stdout.split("\n")[0].strip() or None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            **describe_machine()["versions"],
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "driver": driver,
            **{name: version(name) for name in ("diffusers", "accelerate")},
            "xformers": version("xformers") if find_spec("xformers") else None,
        },
    }


def run_tests(file: Path, seconds: float, *argv: str) -> dict[str, Any]:
    """
    Run a file of tests in another process.

    Args:
        file (`Path`): the file.
        seconds (`float`): the time after which the tests are stopped.
        argv (`str`): other arguments of pytest.

    Returns:
        The seconds taken, the number of tests by outcome, the reason of each failure by name, and `stopped`, why not
        all tests have run, or `None`.
    """
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", str(file), *argv]
    started, stopped = time.perf_counter(), None
    # A wide terminal, because pytest cuts the reasons of failures.
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        result = subprocess.run(
            command, **pipes, timeout=seconds, check=False, cwd=file.parents[2], env={**os.environ, "COLUMNS": "300"}
        )
        output = result.stdout
        # Without pytest, Python ends with 1 too.
        if result.returncode not in (0, 1) or b"::" not in output:
            stopped = f"pytest ended with exit code {result.returncode}: {output.decode().strip()[-300:]}"
    except subprocess.TimeoutExpired as error:
        output, stopped = error.stdout or b"", f"stopped after {seconds:.0f} s"
    text = output.decode(errors="replace")
    outcomes = re.findall(r"^\S+::.+ (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", text, re.MULTILINE)
    failures = re.findall(r"^(?:FAILED|ERROR) \S+::(.+?)(?: - (.*))?$", text, re.MULTILINE)
    return {
        "seconds": time.perf_counter() - started,
        "outcomes": {name.lower(): outcomes.count(name) for name in sorted(set(outcomes))},
        "failures": dict(failures),
        "stopped": stopped,
    }


def matmul_rate(device: torch.device, precision: str, size: int = 8192, repeats: int = 10) -> float:
    """Return the FLOP/s of the product of two square matrices, the rate that `MFU` is a fraction of."""
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    product = timed(lambda: a @ b)
    with Variant(precision).active():
        product()  # warm-up
        return 2 * size**3 / statistics.median(product() for _ in range(repeats))


def count_flops(unet: UNet2DModel, batch_size: int) -> tuple[int, int]:
    """Return the FLOPs of an evaluation and of a training step: of convolutions, matrix products and attention."""
    z = torch.randn(batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    z, t = z.to(unet.device), torch.zeros(batch_size, device=unet.device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=unet.device)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        unet(z, t, class_labels=labels)
    with FlopCounterMode(display=False) as training:
        F.mse_loss(unet(z, t, class_labels=labels).sample, z).backward()
    unet.zero_grad()
    return forward.get_total_flops(), training.get_total_flops()


def measured_rows(
    measures: Mapping[str, Callable[[Variant], dict[str, Any]]], deadline: float
) -> dict[str, list[dict[str, Any]]]:
    """
    Return the measurements of each variant, by the name of what is measured. One that fails, or that would start after
    the deadline, has a `reason`.

    Args:
        measures (`Mapping[str, Callable]`): functions that measure a variant. They take turns.
        deadline (`float`): a time of `time.perf_counter`.
    """
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for variant, (name, measure) in itertools.product(VARIANTS, measures.items()):
        row: dict[str, Any] = {"variant": str(variant), "precision": variant.precision}
        rows[name].append(row)
        if time.perf_counter() > deadline:
            row["reason"] = f"left out: {BUDGET_SECONDS} s have passed"
            continue
        print(f"{name.capitalize()} with {variant} …", flush=True)
        try:
            with variant.active():
                row |= measure(variant)
        except Exception as error:  # such as no compiler, no xformers, or out of memory
            lines = str(error).strip().splitlines() or [""]
            row["reason"] = f"{type(error).__name__}: {lines[0][:200]}"
    return rows


def time_sampling(pipeline: CFGPipeline, variant: Variant, batch_size: int, steps: int, repeats: int) -> dict[str, Any]:
    """
    Compare the pipeline with a hand-written loop over a stock network in the same precision, both with DDIM and w = 1.

    Args:
        pipeline (`CFGPipeline`): a pipeline in float32, not modified.
        variant (`Variant`): its settings. Only the precision applies to the loop.
        batch_size (`int`): number of images.
        steps (`int`): T, a divisor of 1000.
        repeats (`int`): timed calls of each side.

    Returns:
        The seconds of both sides, the peak memory, and the mean difference of their images.
    """
    unet, device, dtype = copy.deepcopy(pipeline.unet).eval(), pipeline.device, DTYPES[variant.precision]
    stock = stock_copy(unet)
    for network in (stock, unet):
        network.to(device, dtype)  # pyright: ignore  (diffusers' wrapper of `to` hides its signature)
    if variant.channels_last:
        unet.to(memory_format=CHANNELS_LAST)  # pyright: ignore
    if variant.xformers:
        unet.enable_xformers_memory_efficient_attention()
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert isinstance(scheduler, DDIMScheduler)
    drawn_by = CFGPipeline(unet, scheduler)
    drawn_by.set_progress_bar_config(disable=True)
    if variant.compile:
        drawn_by.unet = torch.compile(unet, mode=variant.compile)
    noise = torch.randn(batch_size, *pipeline.sample_shape, device=device)
    labels = torch.arange(batch_size) % pipeline.num_classes

    def ours() -> torch.Tensor:
        images = drawn_by(labels, 1.0, steps, latents=noise, output_type="pt").images
        assert isinstance(images, torch.Tensor)
        return images

    def peer() -> torch.Tensor:
        return hand_written_loop(stock, scheduler, labels, 1.0, steps, noise)

    difference = (ours() - peer()).abs().mean().item()
    seconds = time_interleaved(timed(ours), timed(peer), repeats).summary()
    return {"seconds": seconds, "peak_bytes": peak_bytes(ours), "difference": difference}


class StepClock:
    """
    A clock of training steps that runs another loop between segments of them, so that both loops see the same machine.

    Args:
        peer (`Callable`): takes a number of steps of the other loop and returns the seconds taken.
        warm_up (`int`): steps before the first segment.
        steps (`int`): steps of a segment.
        segments (`int`): number of segments.
    """

    def __init__(self, peer: Callable[[int], float], warm_up: int, steps: int, segments: int) -> None:
        self.peer, self.warm_up, self.steps = peer, warm_up, steps
        self.total_steps, self.taken = warm_up + steps * segments, 0
        self.timings, self.started = PairedTimings(), 0.0

    def step(self) -> None:
        """Count a step that was taken."""
        self.taken += 1
        done = self.taken - self.warm_up
        if done < 0 or done % self.steps:
            return
        if done:
            self.timings.ours.append(now() - self.started)
            self.timings.peer.append(self.peer(self.steps))
        else:
            self.peer(self.warm_up)
        self.started = now()


def forget_accelerator() -> None:
    """Let the next `Accelerator` of the process have another precision. Accelerate assumes one for each process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()


def add_mfu(rows: list[dict[str, Any]], flops: float, rates: dict[str, float]) -> None:
    """Add to each row the FLOP/s as a fraction of the measured rate of matrix products in its precision."""
    for row in rows:
        if "seconds" in row:
            row["mfu"] = flops / row["seconds"]["ours"] / rates[row["precision"]]


def report(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items() if value is not None)
    tests, rates = record["tests"], record["matmul_rates"]
    counts = ", ".join(f"{count} {name}" for name, count in tests["outcomes"].items()) or "none ran"
    failures = [f"- `{name}`: {reason}" for name, reason in tests["failures"].items()]
    if tests["stopped"]:
        failures.append(f"- {tests['stopped']}")
    texts = [
        f"{record['device']}, {versions}. A network of {record['parameters'] / 1e6:.1f} M parameters for images of "
        f"{record['resolution']}×{record['resolution']}.",
        "\n".join([f"Tests that need a GPU, in {tests['seconds']:.0f} s: {counts}.", *failures]),
        "MFU is the fraction of the measured rate of large matrix products: "
        + ", ".join(f"{rate / 1e12:.1f} TFLOP/s in {precision}" for precision, rate in rates.items())
        + ". Ratios are ours / theirs, each in the same precision; the other settings apply to ours only. Peak memory "
        "is that of a call or of a training step, beside the weights, their averages and the state of the optimizer.",
    ]
    for name, title in (
        ("sampling", "ms/image, ours / a hand-written loop"),
        ("training", "ms/image, ours / train_unconditional.py"),
    ):
        settings = ", ".join(f"{value} {key}" for key, value in record[f"{name}_settings"].items())
        header = [f"{name} ({settings})", title, "ratio", "speed", "MFU", "peak GiB"]
        rows = record[name]
        first = next((row["seconds"]["ours"] for row in rows if "seconds" in row), None)
        texts.append(table(header, [_cells(row, record[f"{name}_images"], first) for row in rows]))
    return "\n\n".join(texts) + "\n"


def _cells(row: dict[str, Any], images: int, first: float | None) -> list[str]:
    """Return the cells of a row. Speed is relative to the first row that was measured."""
    if "seconds" not in row or first is None:
        return [row["variant"], row["reason"].replace("|", "\\|"), "", "", "", ""]
    seconds = row["seconds"]
    return [
        row["variant"],
        " / ".join(f"{1000 * seconds[side] / images:.3f}" for side in ("ours", "peer")),
        f"{seconds['ratio']:.3f}",
        f"{first / seconds['ours']:.2f}×",
        f"{row['mfu']:.1%}",
        f"{row['peak_bytes'] / 2**30:.1f}",
    ]
