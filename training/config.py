"""The settings of a training run: one flag each, also read from and written to YAML.

Nothing heavy is imported here, so that `--help` and a wrong flag are answered before torch is loaded.
"""

import dataclasses
import math
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

CONFIGS = Path(__file__).parent / "configs"
# Where evaluations keep what they know of the real images, and --cache_latents what it encodes
STATISTICS_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "diffusers-cfg"
LATENTS_DIR = STATISTICS_DIR / "latents"
# What a file for the network, or a pretrained one, says instead
NETWORK_SETTINGS = {"block_out_channels", "layers_per_block", "attention_resolutions", "dropout"}


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message names it and the way out."""


def flag(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DataConfig:
    _argument_group_name = "data"

    dataset_name: str | None = flag(None, "A data set of the Hub, or a local folder or file that `datasets` reads.")
    dataset_config_name: str | None = flag(None, "The configuration of the data set.")
    dataset_split: str = flag("train", "The split to train on.")
    train_data_dir: str | None = flag(None, "A folder with one folder of images for each class, named after it.")
    streaming: bool = flag(False, "Read the data set as it is used, without downloading it first.")
    shuffle_buffer_size: int = flag(1000, "With --streaming, the images that are shuffled at a time.")
    image_column: str = flag("image", "The column with the images.")
    label_column: str = flag("label", "The column with the class labels. -1 or null is an image without a label.")
    cache_dir: str | None = flag(None, "Where `datasets` keeps what it downloads.")
    resolution: int = flag(64, "Height and width of the images. Others are resized (antialiased) and cropped to it.")
    center_crop: bool = flag(True, "Crop at the center; with --no_center_crop at the top left.")
    random_flip: bool = flag(False, "Flip half of the images horizontally, drawn anew each time.")
    max_unreadable_fraction: float = flag(0.01, "Stop if more than this share of the images cannot be read.")
    dataloader_num_workers: int = flag(0, "Processes that decode images, for data too large to be kept in memory.")


@dataclass
class ModelConfig:
    _argument_group_name = "model"

    model_config_name_or_path: str | None = flag(
        None, "The config of a UNet2DModel, instead of the four flags below. Channels and classes come from the data."
    )
    block_out_channels: list[int] = flag([128, 256, 256, 256], "Channels of each level; a level halves the resolution.")
    layers_per_block: int = flag(2, "Residual blocks in each level.")
    attention_resolutions: list[int] = flag([16, 8], "Resolutions with self-attention; 0 for none.")
    dropout: float = flag(0.0, "Dropout inside the residual blocks.")
    pretrained_model_name_or_path: str | None = flag(
        None, "Go on from this pipeline, of the Hub or a folder: its network, noise process and autoencoder."
    )
    pretrained_vae_model_name_or_path: str | None = flag(None, "Train on the latents of this AutoencoderKL.")
    cache_latents: bool = flag(False, "Encode each image once, before the first step, and keep its latents on disk.")
    # Not the paper's ε: x̃ = (z - σε)/α multiplies the network's error by up to 1/α = 22026, x̃ = αz - σv by at most 1.
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = flag(
        "v_prediction", "What the network predicts: ε (as in the paper), v = αε - σx, or x."
    )
    log_snr_min: float = flag(-20.0, "λ_min, the noisy end of the noise process.")
    log_snr_max: float = flag(20.0, "λ_max, its clean end.")


@dataclass
class OptimizationConfig:
    _argument_group_name = "optimization"

    conditioning_dropout_prob: float = flag(0.1, "p_uncond: probability that a label is replaced by the null class.")
    train_batch_size: int = flag(16, "Images a step on each process, before accumulation.")
    gradient_accumulation_steps: int = flag(1, "Batches whose gradients make one step.")
    num_train_epochs: int = flag(100, "Length of the run, unless --max_train_steps is given.")
    max_train_steps: int | None = flag(None, "Length of the run in optimizer steps.")
    learning_rate: float = flag(1e-4, "Peak learning rate.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = flag("cosine", "Learning rate over the run.")
    lr_warmup_steps: int = flag(500, "Steps of linear warm-up.")
    adam_beta1: float = flag(0.9, "Adam's first decay.")
    adam_beta2: float = flag(0.999, "Adam's second decay.")
    adam_weight_decay: float = flag(0.0, "AdamW's weight decay.")
    adam_epsilon: float = flag(1e-8, "Adam's epsilon.")
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this norm.")
    use_ema: bool = flag(True, "Keep a moving average of the weights; it is what is sampled and saved.")
    ema_max_decay: list[float] = flag(
        [0.9999], "The largest decay of the average. Several keep as many averages: the first is what is sampled."
    )
    ema_inv_gamma: float = flag(
        1.0, "The decay at step n is 1 - (1 + n / ema_inv_gamma)^-ema_power, up to the largest."
    )
    ema_power: float = flag(0.75, "See --ema_inv_gamma.")
    max_nonfinite_steps: int = flag(
        10, "Stop if so many steps in a row had to be skipped, because their loss or gradient was not finite."
    )
    gradient_checkpointing: bool = flag(False, "Save memory by computing activations twice.")
    compile: bool = flag(False, "Compile the network for training. The first step then takes minutes.")
    enable_xformers_memory_efficient_attention: bool = flag(False, "Use xformers' attention (GPU only).")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Precision of the network's passes; by default what `accelerate config` says. Always fp32 on a CPU."
    )
    allow_tf32: bool = flag(False, "Allow TF32 matrix products on Ampere GPUs and later.")


@dataclass
class RunConfig:
    _argument_group_name = "run"

    output_dir: str = flag("cfg-model", "Where the run is written. At its end the folder is a pipeline that loads.")
    dry_run: bool = flag(False, "Check everything and say what the run would do and need, but do not run it.")
    overwrite_output_dir: bool = flag(False, "Delete the run that --output_dir holds, and start anew.")
    seed: int = flag(0, "Determines everything: weights, order of the data, noise, dropped labels, samples.")
    checkpointing_steps: int = flag(500, "Write a checkpoint every so many steps; 0 for none.")
    checkpoints_total_limit: int | None = flag(None, "Keep only so many checkpoints, the newest.")
    resume_from_checkpoint: str | None = flag(None, 'A checkpoint-STEP folder, or "latest".')
    validation_steps: int = flag(1000, "Draw the grid of samples every so many steps; 0 for the end only.")
    validation_guidance_scales: list[float] = flag([0.0, 0.5, 1.0, 2.0, 4.0], "The columns of the grid: the paper's w.")
    num_inference_steps: int = flag(12, "Sampling steps T of the grid.")
    eval_steps: int = flag(
        0, "Measure samples every so many steps, at each w of --validation_guidance_scales; 0 for never."
    )
    num_eval_samples: int = flag(500, "Samples that are measured, for each w.")
    feature_extractor: str = flag("small", "What they are measured with, see evaluate_cfg.py.")
    logging_steps: int = flag(10, "Log every so many steps.")
    report_to: str = flag("tensorboard", "Trackers of accelerate: tensorboard, wandb, …, all, or none.")
    logging_dir: str = flag("logs", "Where trackers write, inside --output_dir.")
    ddp_timeout: int = flag(1800, "Seconds that a process waits for the others before it gives the run up.")


@dataclass
class HubConfig:
    _argument_group_name = "Hub"

    push_to_hub: bool = flag(False, "Publish the model when the run ends.")
    hub_model_id: str | None = flag(None, "The repository, NAMESPACE/NAME. By default the name of --output_dir.")
    hub_private_repo: bool = flag(False, "Make the repository a private one, if it is made.")
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "A token that can write; by default that of `hf auth login`. Never written down."},
    )
    hub_strategy: Literal["end", "checkpoint"] = flag(
        "end", "Publish at the end, or in the background at every checkpoint too."
    )
    overwrite_hub_repo: bool = flag(False, "Publish into a repository that holds something else.")
    license: str | None = flag(None, "The license of the model, for its card, such as apache-2.0.")


@dataclass
class TrainConfig(HubConfig, RunConfig, OptimizationConfig, ModelConfig, DataConfig):
    """All settings of a run. Raises UserError for one that cannot work; the message names it."""

    def __post_init__(self) -> None:
        if isinstance(self.ema_max_decay, (int, float)):  # as one writes it in a file
            self.ema_max_decay = [self.ema_max_decay]
        self._check_types()
        self._check_ranges()
        self._check_resolution()

    def _check_types(self) -> None:
        for name in ("block_out_channels", "attention_resolutions", "validation_guidance_scales", "ema_max_decay"):
            if not isinstance(getattr(self, name), list):
                raise UserError(f"{name} must be a list, but is {getattr(self, name)!r}.")

    def _check_ranges(self) -> None:
        at_least = {
            1: "resolution layers_per_block train_batch_size gradient_accumulation_steps num_train_epochs "
            "num_inference_steps logging_steps max_nonfinite_steps shuffle_buffer_size ddp_timeout",
            0: "lr_warmup_steps checkpointing_steps validation_steps eval_steps dataloader_num_workers "
            "adam_weight_decay seed",
        }
        for low, names in at_least.items():
            for name in names.split():
                if not getattr(self, name) >= low:
                    raise UserError(f"{name} must be at least {low}, but is {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "ema_inv_gamma", "ema_power"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a positive number, but is {getattr(self, name)}.")
        for name in ("conditioning_dropout_prob", "dropout", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), but is {getattr(self, name)}.")
        decays = self.ema_max_decay
        if not decays or len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            raise UserError(f"ema_max_decay must be one or more different numbers in [0, 1), but is {decays}.")
        for name in ("max_train_steps", "checkpoints_total_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if not all(math.isfinite(w) for w in self.validation_guidance_scales):
            raise UserError(f"validation_guidance_scales must be finite, but are {self.validation_guidance_scales}.")
        if not self.log_snr_min < self.log_snr_max:
            raise UserError(f"log_snr_min={self.log_snr_min} must be below log_snr_max={self.log_snr_max}.")
        if self.pretrained_model_name_or_path and (
            self.model_config_name_or_path or self.pretrained_vae_model_name_or_path
        ):
            raise UserError(
                "--pretrained_model_name_or_path brings its own network and autoencoder: give no "
                "--model_config_name_or_path and no --pretrained_vae_model_name_or_path with it."
            )
        if self.cache_latents and not (self.pretrained_vae_model_name_or_path or self.pretrained_model_name_or_path):
            raise UserError(
                "--cache_latents needs an autoencoder: give --pretrained_vae_model_name_or_path, or a "
                "--pretrained_model_name_or_path that has one."
            )
        if self.cache_latents and self.streaming:
            raise UserError(
                "--cache_latents keeps the whole data set, which --streaming does not: leave out one of them."
            )
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise UserError("Give --dataset_name or --train_data_dir, not both.")
        if self.streaming and self.dataset_name is None and self.train_data_dir is None:
            raise UserError("--streaming needs a data set to read: give --dataset_name or --train_data_dir.")
        if self.streaming and self.eval_steps:
            raise UserError(
                "--eval_steps measures against the whole data set, which --streaming does not have: leave it out, and "
                "run evaluate_cfg.py when the model is trained."
            )

    def _check_resolution(self) -> None:
        """Each level but the last halves the image. (With a VAE or a config file the size is known only later.)"""
        if self.model_config_name_or_path or self.pretrained_vae_model_name_or_path:
            return
        if self.pretrained_model_name_or_path:
            return
        halvings = len(self.block_out_channels) - 1
        if self.resolution % 2**halvings:
            fitting = max(2**halvings, self.resolution // 2**halvings * 2**halvings)
            raise UserError(
                f"resolution {self.resolution} cannot be halved {halvings} times, as a UNet of {halvings + 1} levels "
                f"does: use a multiple of {2**halvings} (such as {fitting}), or fewer --block_out_channels."
            )

    @property
    def ema_decays(self) -> list[float]:
        """The decay of each average of the weights, none without `use_ema`."""
        return self.ema_max_decay if self.use_ema else []

    def public(self) -> dict[str, Any]:
        """The settings by name, without the one that is a secret, and those of a network that comes from elsewhere."""
        elsewhere = self.model_config_name_or_path or self.pretrained_model_name_or_path
        left_out = {"hub_token"} | (NETWORK_SETTINGS if elsewhere else set())
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def save(self, path: Path) -> None:
        """Write the settings as YAML, for `--config`."""
        path.write_text(yaml.safe_dump(self.public(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Read what `save` wrote."""
        return cls(**read_yaml(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """
    The settings in a YAML file, by name. It may name a file for the network that lies beside it. Raises UserError if it
    is missing, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"--config {path} does not exist.")
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold settings as `name: value`, but holds a {type(settings).__name__}.")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UserError(f"{path} has unknown settings {unknown}; --help lists those that exist.")
    network = settings.get("model_config_name_or_path")
    if network is not None and (path.parent / str(network)).exists():
        settings["model_config_name_or_path"] = str((path.parent / str(network)).resolve())
    return settings


def parse_config(argv: list[str] | None = None, defaults: dict[str, Any] | None = None) -> TrainConfig:
    """
    Flags, then the file of `--config`, then `defaults`, then the fields' own. Where none of the first three names a
    data set, the last are those of `configs/digits.yaml`, for scikit-learn's digits.
    """
    # From its module: importing it from `transformers` itself would take half a second longer.
    from transformers.hf_argparser import HfArgumentParser

    argv = sys.argv[1:] if argv is None else argv
    groups = [DataConfig, ModelConfig, OptimizationConfig, RunConfig, HubConfig]
    parser = HfArgumentParser(
        groups,
        prog="train_cfg.py",
        description="Train a class-conditional diffusion model with classifier-free guidance (arXiv 2207.12598).",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="A YAML file of settings, by the names of these flags; flags override it.")

    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    settings = {**(defaults or {}), **(read_yaml(Path(path)) if path else {})}
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    if args.dataset_name is None and args.train_data_dir is None:
        parser.set_defaults(**{**read_yaml(CONFIGS / "digits.yaml"), **settings})
        args = parser.parse_args(argv)
    flags = {arg.removeprefix("--").split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    for source in ("model_config_name_or_path", "pretrained_model_name_or_path"):
        given = flags if source in flags else flags | settings.keys()
        if getattr(args, source) is not None and (useless := sorted(NETWORK_SETTINGS & given)):
            raise UserError(
                f"{', '.join(useless)}: the network is that of --{source} {getattr(args, source)}. Leave one of the "
                "two out."
            )
    values = vars(args)
    del values["config"]
    return TrainConfig(**values)
