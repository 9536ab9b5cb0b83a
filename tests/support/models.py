"""Make tiny models, which run in milliseconds."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from diffusers_cfg import CFGPipeline, LogSNRScheduler, NoisyClassifier2DModel, UNet2DCFGModel
from diffusers_cfg.config import parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.method_settings import DDGANConfig
from diffusers_cfg.methods.ddgan import Discriminator
from diffusers_cfg.methods.ddgan import build_pipeline as build_ddgan
from diffusers_cfg.methods.networks import NOISE_PROCESS

NAMES = {0: "zero", 1: "one", 2: "two"}


def make_unet(**settings) -> UNet2DCFGModel:
    """Return a network for 8×8 grayscale images of three classes."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "num_class_embeds": len(NAMES) + 1,
        **settings,
    }
    return UNet2DCFGModel(**settings).eval()


def make_pipeline(
    unet: UNet2DCFGModel | None = None, scheduler: SchedulerMixin | None = None, **settings
) -> CFGPipeline:
    """Return a pipeline, by default with the network of `make_unet` and the paper's sampler."""
    settings = {"id2label": NAMES, **settings}
    pipeline = CFGPipeline(unet or make_unet(), scheduler or LogSNRScheduler(), **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_classifier(num_classes: int = len(NAMES), **settings) -> NoisyClassifier2DModel:
    """Return a classifier of noisy 8×8 grayscale images with random weights, for the pipeline of `make_pipeline`."""
    torch.manual_seed(1)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "noise_process": {name: LogSNRScheduler().config[name] for name in NOISE_PROCESS if name != "prediction_type"},
        **settings,
    }
    return NoisyClassifier2DModel(num_classes=num_classes, **settings).eval()


def save_classified_digits(folder: Path, num_class_embeds: int | None = 11, **settings) -> Path:
    """Save a model of the digits with random weights and a classifier, and a record that names its training data."""
    settings = {"classifier": make_classifier(10), "id2label": Digits().id2label, **settings}
    make_pipeline(make_unet(num_class_embeds=num_class_embeds), **settings).save_pretrained(folder)
    (folder / "run.json").write_text('{"data": {"dataset_name": null}}')
    return folder


def vdm(prediction_type: str = "v_prediction", ends: tuple[float, float] = (-13.3, 5.0), **settings) -> CFGPipeline:
    """Return a variational diffusion model of the digits between two ends of γ, with random weights."""
    scheduler = LogSNRScheduler(
        log_snr_schedule="linear", log_snr_max=-ends[0], log_snr_min=-ends[1], prediction_type=prediction_type
    )
    return make_pipeline(make_unet(num_class_embeds=11), scheduler, id2label=Digits().id2label, **settings)


def ddgan(*argv: str) -> CFGPipeline:
    """Return a denoising diffusion GAN of the digits with random weights, by flags of train_ddgan.py."""
    network = ["--block_out_channels", "8", "--layers_per_block", "1", "--latent_dim", "6", "--num_timesteps", "2"]
    pipeline = build_ddgan(parse_config(DDGANConfig, [*network, *argv]), Digits())
    torch.nn.init.normal_(pipeline.unet.conv_out.weight, std=0.1)  # not 0, as at the start of a run
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomize_head(discriminator: Discriminator) -> None:
    """Replace the zeros of the head, with which all logits are 0 at the start of a run."""
    for weight in (discriminator.linear.weight, discriminator.class_embedding.weight):
        torch.nn.init.normal_(weight, std=0.1)


def load_saved(folder: Path, remote_code: bool) -> Any:
    """Load a saved pipeline with the code in its folder, or with the package."""
    if remote_code:
        loaded: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded.unet) is not UNet2DCFGModel
    else:
        loaded = CFGPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generators(*seeds: int) -> list[torch.Generator]:
    """Return one generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
