"""The settings of a training: what all methods share, and a dataclass for each method."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers_cfg.config import Config, UserError, fixed, free, read_yaml, recorded

CONFIG_FILE = "train_config.yaml"
# Settings that a pretrained network, or a file that describes one, replaces.
NETWORK_SETTINGS = {"block_out_channels", "layers_per_block", "attention_resolutions", "dropout"}
# Where no dataset is named: scikit-learn's 1,797 handwritten digits at 8×8, a few minutes on two CPU cores.
DIGITS = {
    "resolution": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_resolutions": [0],
    "train_batch_size": 64,
    "max_train_steps": 1500,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 200,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": 1,
    "validation_steps": 500,
}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    group = "data"

    dataset_name: str | None = recorded(None, "A dataset of the Hub, or a local folder or file that `datasets` reads.")
    dataset_config_name: str | None = recorded(None, "The configuration of the dataset.")
    dataset_split: str = recorded("train", "The split to train on.")
    train_data_dir: str | None = recorded(None, "A folder with one folder of images for each class, named after it.")
    streaming: bool = fixed(False, "Read the dataset while it is used, without downloading it first.")
    shuffle_buffer_size: int = fixed(1000, "With --streaming, how many images are shuffled at a time.", at_least=1)
    image_column: str = recorded("image", "The column with the images.")
    label_column: str = recorded("label", "The column with the class labels. -1 or null is an image without a label.")
    cache_dir: str | None = free(None, "Where `datasets` keeps what it downloads.")
    resolution: int = fixed(
        64, "Height and width of the images. Others are resized (antialiased) and cropped to it.", at_least=1
    )
    center_crop: bool = recorded(True, "Crop at the center; with --no_center_crop at the top left.")
    random_flip: bool = recorded(False, "Flip half of the images horizontally, drawn again at every use.")
    max_unreadable_fraction: float = free(
        0.01, "Stop if more than this share of the images cannot be read.", at_least=0, at_most=1
    )
    dataloader_num_workers: int = free(0, "Workers that decode images, for data too large for memory.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    group = "model"

    model_config_name_or_path: str | None = recorded(
        None,
        "The config of a UNet2DModel, instead of the four flags below. Channels and classes come from the data.",
        relative=True,
    )
    block_out_channels: list[int] = fixed(
        [128, 256, 256, 256], "Channels of each level; a level halves the resolution.", at_least=1
    )
    layers_per_block: int = fixed(2, "Residual blocks in each level.", at_least=1)
    attention_resolutions: list[int] = fixed([16, 8], "Resolutions with self-attention; 0 for none.")
    dropout: float = fixed(0.0, "Dropout inside the residual blocks.", at_least=0, below=1)
    pretrained_model_name_or_path: str | None = recorded(
        None, "Start from this pipeline, of the Hub or a folder: its network, noise process and autoencoder."
    )
    pretrained_vae_model_name_or_path: str | None = recorded(None, "Train on the latents of this AutoencoderKL.")
    cache_latents: bool = recorded(
        False, "Encode each image once, before the first step, and keep the latents on disk."
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(Config):
    group = "optimization"

    train_batch_size: int = free(16, "Images in a batch of each process.", at_least=1)
    gradient_accumulation_steps: int = free(1, "Batches whose gradients make one step.", at_least=1)
    num_train_epochs: int = recorded(100, "Length of the run, unless --max_train_steps is given.", at_least=1)
    max_train_steps: int | None = recorded(None, "Length of the run in optimizer steps.", at_least=1)
    learning_rate: float = recorded(1e-4, "Peak learning rate.", above=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = recorded("cosine", "Learning rate over the run.")
    lr_warmup_steps: int = recorded(500, "Steps of linear warm-up.", at_least=0)
    adam_beta1: float = recorded(0.9, "Adam's first decay.", at_least=0, below=1)
    adam_beta2: float = recorded(0.999, "Adam's second decay.", at_least=0, below=1)
    adam_weight_decay: float = recorded(0.0, "AdamW's weight decay.", at_least=0)
    adam_epsilon: float = recorded(1e-8, "Adam's epsilon.", above=0)
    max_grad_norm: float = recorded(1.0, "Gradients are scaled down to this norm.", above=0)
    use_ema: bool = fixed(True, "Keep a moving average of the weights (EMA); it is what is sampled and saved.")
    ema_max_decay: list[float] = fixed(
        [0.9999],
        "The largest decay of the EMA. Several values keep several EMAs, of which the first is sampled.",
        at_least=0,
        below=1,
        scalar=True,
    )
    ema_inv_gamma: float = recorded(
        1.0, "The decay at step n is 1 - (1 + n / ema_inv_gamma)^-ema_power, up to the largest.", above=0
    )
    ema_power: float = recorded(0.75, "See --ema_inv_gamma.", above=0)
    max_nonfinite_steps: int = free(
        10, "Stop after this many skipped steps in a row, whose loss or gradient was not finite.", at_least=1
    )
    gradient_checkpointing: bool = free(False, "Save memory by computing activations twice.")
    compile: bool = recorded(False, "Compile the network for training. The first step then takes minutes.")
    enable_xformers_memory_efficient_attention: bool = recorded(False, "Use xformers' attention (GPU only).")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = recorded(
        None, "Precision of the network's passes; by default what `accelerate config` says. Always fp32 on a CPU."
    )
    allow_tf32: bool = recorded(False, "Allow TF32 matrix products on Ampere GPUs and later.")

    @property
    def ema_decays(self) -> list[float]:
        """The largest decay of each EMA; none without `use_ema`."""
        return self.ema_max_decay if self.use_ema else []


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    group = "run"

    output_dir: str = free("cfg-model", "Where the run is written. At its end the folder is a pipeline that loads.")
    dry_run: bool = free(False, "Check everything, print what the run would do and need, and do not run it.")
    overwrite_output_dir: bool = free(False, "Delete the run in --output_dir, and start from the beginning.")
    seed: int = fixed(
        0,
        "Determines everything: weights, order of the data, noise, dropped labels, samples.",
        at_least=0,
        at_most=2**63 - 1,
    )
    checkpointing_steps: int = free(500, "Write a checkpoint every this many steps; 0 for none.", at_least=0)
    checkpoints_total_limit: int | None = free(None, "How many checkpoints to keep, the newest.", at_least=1)
    resume_from_checkpoint: str | None = free(None, 'A checkpoint-STEP folder, or "latest".')
    validation_steps: int = free(
        1000, "Draw the grid of samples every this many steps; 0 for the end only.", at_least=0
    )
    num_inference_steps: int = free(12, "Sampling steps T of the grid.", at_least=1)
    eval_steps: int = free(
        0, "Measure samples every this many steps, at each w of --validation_guidance_scales; 0 for never.", at_least=0
    )
    num_eval_samples: int = free(500, "Samples that are measured, for each w.", at_least=1)
    feature_extractor: str = free("small", "What they are measured with, see evaluate_cfg.py.")
    logging_steps: int = free(10, "Log every this many steps.", at_least=1)
    report_to: str = free("tensorboard", "Trackers of accelerate: tensorboard, wandb, …, all, or none.")
    logging_dir: str = free("logs", "Where trackers write, inside --output_dir.")
    ddp_timeout: int = free(1800, "Seconds that a process waits for the others before it ends the run.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class HubConfig(Config):
    group = "Hub"

    push_to_hub: bool = free(False, "Publish the model when the run ends.")
    hub_model_id: str | None = free(None, "The repository, NAMESPACE/NAME. By default the name of --output_dir.")
    hub_private_repo: bool = free(False, "Create the repository as a private one.")
    hub_token: str | None = free(
        None, "A token that can write; by default that of `hf auth login`. Never written down.", secret=True
    )
    hub_strategy: Literal["end", "checkpoint"] = free(
        "end", "Publish at the end, or in the background at every checkpoint too."
    )
    overwrite_hub_repo: bool = free(False, "Publish into a repository that holds something else.")
    license: str | None = free(None, "The license of the model, for its card, such as apache-2.0.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(HubConfig, RunConfig, OptimizationConfig, ModelConfig, DataConfig):
    """The settings that all methods share: data, network, optimization, run and Hub."""

    group = "training"

    def check(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.logging_dir):
            raise UserError(f"logging_dir must be the name of a folder in --output_dir, but is {self.logging_dir!r}.")
        if len(set(self.ema_max_decay)) < len(self.ema_max_decay):
            raise UserError(f"ema_max_decay must be different numbers in [0, 1), but is {self.ema_max_decay}.")
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
                "--cache_latents keeps the whole dataset, which --streaming does not: leave out one of them."
            )
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise UserError("Give --dataset_name or --train_data_dir, not both.")
        if self.streaming and self.dataset_name is None and self.train_data_dir is None:
            raise UserError("--streaming needs a dataset to read: give --dataset_name or --train_data_dir.")
        if self.streaming and self.eval_steps:
            raise UserError(
                "--eval_steps measures against the whole dataset, which --streaming does not have: leave it out, and "
                "run evaluate_cfg.py when the model is trained."
            )
        self._check_resolution()

    def _check_resolution(self) -> None:
        """Check that each level but the last can halve the image. (With a VAE or another network, see `networks`.)"""
        if (
            self.model_config_name_or_path
            or self.pretrained_vae_model_name_or_path
            or self.pretrained_model_name_or_path
        ):
            return
        halvings = len(self.block_out_channels) - 1
        if self.resolution % 2**halvings:
            fitting = max(2**halvings, self.resolution // 2**halvings * 2**halvings)
            raise UserError(
                f"resolution {self.resolution} cannot be halved {halvings} times, as a UNet of {halvings + 1} levels "
                f"does: use a multiple of {2**halvings} (such as {fitting}), or fewer --block_out_channels."
            )

    @classmethod
    def underlying(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        names_data = values["dataset_name"] is not None or values["train_data_dir"] is not None
        return {} if names_data else DIGITS

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        for source in ("model_config_name_or_path", "pretrained_model_name_or_path"):
            given = flags if source in flags else flags | in_file
            if values[source] is not None and (useless := sorted(NETWORK_SETTINGS & given)):
                raise UserError(
                    f"{', '.join(useless)}: the network is that of --{source} {values[source]}. Leave one of the two "
                    "out."
                )

    def public(self) -> dict[str, Any]:
        """Return the settings by name, without secrets, and without those of a network that comes from elsewhere."""
        elsewhere = self.model_config_name_or_path or self.pretrained_model_name_or_path
        return {name: value for name, value in super().public().items() if not (elsewhere and name in NETWORK_SETTINGS)}


@dataclass(frozen=True, kw_only=True)
class CFGConfig(TrainConfig):
    description: ClassVar[str] = (
        "Train a class-conditional diffusion model with classifier-free guidance (arXiv 2207.12598)."
    )
    group = "classifier-free guidance"

    conditioning_dropout_prob: float = recorded(
        0.1, "p_uncond: probability that a label is replaced by the null class.", at_least=0, below=1
    )
    # Not the paper's ε: x̃ = (z - σε)/α multiplies the network's error by up to 1/α = 22026, x̃ = αz - σv by at most 1.
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = fixed(
        "v_prediction", "What the network predicts: ε (as in the paper), v = αε - σx, or x."
    )
    log_snr_min: float = fixed(-20.0, "λ_min, the noisy end of the noise process.")
    log_snr_max: float = fixed(20.0, "λ_max, its clean end.")
    validation_guidance_scales: list[float] = free([0.0, 0.5, 1.0, 2.0, 4.0], "The columns of the grid: the paper's w.")

    def check(self) -> None:
        super().check()
        if not self.log_snr_min < self.log_snr_max:
            raise UserError(f"log_snr_min={self.log_snr_min} must be below log_snr_max={self.log_snr_max}.")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(CFGConfig):
    description: ClassVar[str] = (
        "Distill guidance into one pass: a student that takes w as an input; then one of few steps (arXiv 2210.03142)."
    )
    group = "distillation"

    teacher: str = recorded(help="The output folder of a training run, or a repository.")
    max_guidance_scale: float | None = fixed(
        None, "The student learns w in 0 … this; by default what its teacher did, or 4.", above=0
    )
    student_steps: int | None = fixed(
        None, "Sample in this many steps of DDIM, a divisor of 1000; by default with any sampler."
    )
    teacher_steps: int = fixed(32, "DDIM steps of the teacher over the whole range, a multiple of --student_steps.")

    def check(self) -> None:
        super().check()
        steps = self.student_steps
        if steps is not None and (steps < 1 or self.teacher_steps < 1 or 1000 % steps or self.teacher_steps % steps):
            raise UserError(
                f"--student_steps must divide 1000 (for DDIM) and --teacher_steps {self.teacher_steps}, but is {steps}."
            )

    @classmethod
    def underlying(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's data and optimization, if its folder has a train_config.yaml."""
        path, settings = Path(values["teacher"]) / CONFIG_FILE, {}
        if path.is_file():
            of_teacher = read_yaml(path, DistillationConfig)
            shared = {f.name for part in (DataConfig, OptimizationConfig) for f in fields(part)}
            settings = {n: v for n, v in of_teacher.items() if n in shared | {"conditioning_dropout_prob"}}
        values = {**values, **{n: v for n, v in settings.items() if values.get(n) is None}}
        return {**super().underlying(values), **settings, "pretrained_model_name_or_path": values["teacher"]}

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        super().check_given(values, flags, in_file)
        of_teacher = {"prediction_type", "log_snr_min", "log_snr_max", "pretrained_model_name_or_path"}
        if useless := sorted(of_teacher & flags):
            raise UserError(f"{', '.join(useless)}: that is the teacher's, {values['teacher']}. Leave it out.")
