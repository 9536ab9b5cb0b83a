"""Train networks of 20 thousand parameters on the digits at 8×8, in seconds."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_cfg.config import parse_config
from diffusers_cfg.engine.method import Method
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.engine.trainer import Trainer
from diffusers_cfg.evaluation.in_training import training_evaluation
from diffusers_cfg.method_settings import (
    CFGConfig,
    ClassifierConfig,
    DDGANConfig,
    DiffusionConfig,
    DistillationConfig,
    VDMConfig,
)
from diffusers_cfg.methods.cfg import ClassifierFreeGuidance
from diffusers_cfg.methods.classifier import ClassifierGuidance
from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN
from diffusers_cfg.methods.distillation import GuidanceDistillation
from diffusers_cfg.methods.vdm import VariationalDiffusion
from diffusers_cfg.settings import TrainConfig

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "training"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORK = ["--block_out_channels", "8", "16"]
# After the flags of `TINY`: half the time, for tests of what does not depend on the network
ONE_LEVEL = ["--block_out_channels", "8"]
SMALLEST = [*ONE_LEVEL, "--layers_per_block", "1", "--attention_resolutions", "0"]
# Two tiny networks of a GAN, whose penalty is due at every third step, with optimizers that no default changes
SMALLEST_GAN = [
    *SMALLEST, "--discriminator_channels", "8", "8", "--latent_dim", "4", "--r1_gamma", "0.05", "--lazy_reg", "3",
    "--learning_rate_discriminator", "2e-3", "--adam_beta1", "0", "--adam_beta2", "0.99", "--lr_scheduler", "cosine",
]  # fmt: skip
REPLACE_NETWORK = {"--pretrained_model_name_or_path", "--model_config_name_or_path"}
SHARED = [
    "--train_batch_size", "8", "--max_train_steps", "4", "--lr_warmup_steps", "1",
    "--learning_rate", "1e-3", "--checkpointing_steps", "2", "--validation_steps", "0", "--logging_steps", "1",
    "--report_to", "none", "--checkpoints_total_limit", "9",
]  # fmt: skip
SETTINGS = [*SHARED, "--num_inference_steps", "2", "--validation_guidance_scales", "0", "1"]
TINY = [*NETWORK, *SETTINGS]
# Logged values that depend on time and differ between equal runs
TIMES = {"images_per_second", "data_wait"}


def reset_accelerate() -> None:
    """Reset the global state of accelerate, which assumes one run per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(
    output_dir: Path,
    *argv: str,
    method: type[Method] = ClassifierFreeGuidance,
    config_class: type[TrainConfig] = CFGConfig,
    preemption: Preemption | None = None,
) -> TrainConfig:
    """Train a method, by default classifier-free guidance, with the flags of `TINY` followed by `argv`."""
    reset_accelerate()
    has_network = not REPLACE_NETWORK & set(argv)
    tiny = TINY if has_network else SETTINGS
    if not issubclass(config_class, DiffusionConfig):
        tiny = [*NETWORK, *SHARED] if has_network else SHARED
    config = parse_config(config_class, [*tiny, "--output_dir", str(output_dir), *argv])
    Trainer(config, method, preemption, training_evaluation).run()
    return config


def train_vdm(output_dir: Path, *argv: str, preemption: Preemption | None = None) -> VDMConfig:
    """Train a variational diffusion model with a network of one level without attention, with `train`."""
    network = [] if "--pretrained_model_name_or_path" in argv else SMALLEST
    config = train(
        output_dir, *network, *argv, method=VariationalDiffusion, config_class=VDMConfig, preemption=preemption
    )
    assert isinstance(config, VDMConfig)
    return config


def train_ddgan(output_dir: Path, *argv: str, preemption: Preemption | None = None) -> DDGANConfig:
    """Train a denoising diffusion GAN with two tiny networks, with `train`."""
    flags = SMALLEST_GAN[len(SMALLEST) :] if REPLACE_NETWORK & set(argv) else SMALLEST_GAN
    config = train(
        output_dir, *flags, *argv, method=DenoisingDiffusionGAN, config_class=DDGANConfig, preemption=preemption
    )
    assert isinstance(config, DDGANConfig)
    return config


def distill(teacher: Path, output_dir: Path, *argv: str) -> DistillationConfig:
    """Distill guidance from a teacher, with the flags of `SETTINGS` followed by `argv`."""
    reset_accelerate()
    settings = " ".join(SETTINGS)
    if "--student_steps" in argv:  # It decides the number of sampling steps.
        settings = settings.replace("--num_inference_steps 2 ", "")
    flags = ["--teacher", str(teacher), *settings.split(), "--output_dir", str(output_dir), *argv]
    config = parse_config(DistillationConfig, flags)
    Trainer(config, GuidanceDistillation, None, training_evaluation).run()
    return config


def train_classifier(
    output_dir: Path, model: Path, *argv: str, preemption: Preemption | None = None
) -> ClassifierConfig:
    """Train a classifier of one level for a diffusion model, with `train`."""
    flags = ["--pretrained_model_name_or_path", str(model), *SMALLEST, "--validation_guidance_scales", "0", "1"]
    config = train(
        output_dir, *flags, *argv, method=ClassifierGuidance, config_class=ClassifierConfig, preemption=preemption
    )
    assert isinstance(config, ClassifierConfig)
    return config


def printed_code(output: str) -> str:
    """Return the Python code that a run prints at its end, before the command of the demo."""
    return output[output.index("from diffusers import DiffusionPipeline") : output.index("\nTry the model")]


def start(output_dir: Path, preemption: Preemption, *argv: str) -> None:
    """Train with a `Preemption` that can stop the run."""
    train(output_dir, *argv, preemption=preemption)


def launch(
    *argv: str, cwd: Path, processes: int = 1, fails: bool = False, script: Path | str = TRAINING / "train_cfg.py"
) -> subprocess.CompletedProcess:
    """Run a file or a module with `accelerate launch`, or with torchrun on several processes, as CPUs require."""
    launcher = ["accelerate.commands.launch", "--num_processes", "1"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *(["-m", script] if isinstance(script, str) else [str(script)]), *argv],
        cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0 or fails, result.stderr
    return result


def assert_same_tensors(first: Path, second: Path, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert that two safetensors files have the same tensors, by default bit for bit."""
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=name)


def events(output_dir: Path) -> EventAccumulator:
    """Load the TensorBoard events of a run."""
    return EventAccumulator(str(output_dir / "logs" / "diffusers-cfg")).Reload()


def scalars(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the TensorBoard scalars of a run by name, as lists of (step, value)."""
    logged = events(output_dir)
    return {tag: [(e.step, e.value) for e in logged.Scalars(tag)] for tag in logged.Tags()["scalars"]}
