"""Declare the settings of training runs: those of all methods, and a dataclass for each method."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers_cfg.config import Config, UserError, fixed, free, read_yaml, recorded

CONFIG_FILE = "train_config.yaml"
# The standard errors of metrics need two images in each of ten blocks (`BLOCKS` in evaluation/statistics.py).
MIN_SAMPLES = 20
# Settings that a pretrained network or a network config replaces.
NETWORK_SETTINGS = {"block_out_channels", "layers_per_block", "attention_resolutions", "dropout"}
# Defaults for the built-in dataset, scikit-learn's 1,797 handwritten digits at 8×8: a few minutes on two CPU cores.
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
    """Settings of the dataset."""

    group = "data"

    dataset_name: str | None = recorded(None, "Dataset on the Hub, or a local folder or file that `datasets` can load.")
    dataset_config_name: str | None = recorded(None, "Configuration of the dataset, if it has several.")
    dataset_split: str = recorded("train", "Split of the dataset to train on.")
    train_data_dir: str | None = recorded(
        None, "Folder with one subfolder of images for each class, named after the class."
    )
    streaming: bool = fixed(False, "Stream the dataset instead of downloading it first.")
    shuffle_buffer_size: int = fixed(1000, "Number of images in the shuffle buffer of --streaming.", at_least=1)
    image_column: str = recorded("image", "Column of the dataset with the images.")
    label_column: str = recorded("label", "Column of the dataset with the class labels; -1 or null means no label.")
    cache_dir: str | None = free(None, "Folder for the downloads and caches of `datasets`.")
    resolution: int = fixed(
        64, "Height and width in pixels to which images are resized (antialiased) and cropped.", at_least=1
    )
    center_crop: bool = recorded(True, "Crop images at the center; with --no_center_crop, at the top left.")
    random_flip: bool = recorded(False, "Flip each image horizontally with probability 0.5 every time it is used.")
    max_unreadable_fraction: float = free(
        0.01, "Fraction of unreadable images above which the run stops.", at_least=0, at_most=1
    )
    dataloader_num_workers: int = free(
        0, "Number of worker processes per rank that decode images which do not fit in memory.", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Settings of the network and its autoencoder."""

    group = "model"

    model_config_name_or_path: str | None = recorded(
        None,
        "Config of a UNet2DModel, replacing the next four flags; channels and classes come from the data.",
        relative=True,
    )
    block_out_channels: list[int] = fixed(
        [128, 256, 256, 256], "Number of channels of each UNet level; each level halves the resolution.", at_least=1
    )
    layers_per_block: int = fixed(2, "Number of residual blocks in each UNet level.", at_least=1)
    attention_resolutions: list[int] = fixed(
        [16, 8], "Resolutions in pixels of the UNet levels with self-attention; 0 disables it."
    )
    dropout: float = fixed(0.0, "Dropout probability inside the residual blocks.", at_least=0, below=1)
    pretrained_model_name_or_path: str | None = recorded(
        None, "Pipeline on the Hub or in a folder whose network, noise process and autoencoder the run starts from."
    )
    pretrained_vae_model_name_or_path: str | None = recorded(
        None, "AutoencoderKL on the Hub or in a folder; the network is trained on its latents."
    )
    cache_latents: bool = recorded(
        False, "Encode every image once before the first step and cache the latents on disk."
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(Config):
    """Settings of the optimizer, its learning rate and the EMA weights."""

    group = "optimization"

    train_batch_size: int = free(16, "Number of images in a batch of one process.", at_least=1)
    gradient_accumulation_steps: int = free(
        1, "Number of batches per process that are accumulated in one optimizer step.", at_least=1
    )
    num_train_epochs: int = recorded(
        100, "Length of the run in epochs; ignored if --max_train_steps is given.", at_least=1
    )
    max_train_steps: int | None = recorded(None, "Length of the run in optimizer steps.", at_least=1)
    learning_rate: float = recorded(1e-4, "Peak learning rate.", above=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = recorded("cosine", "Schedule of the learning rate over the run.")
    lr_warmup_steps: int = recorded(500, "Number of optimizer steps of linear warmup.", at_least=0)
    adam_beta1: float = recorded(0.9, "β1 of AdamW, the decay rate of the first moment.", at_least=0, below=1)
    adam_beta2: float = recorded(0.999, "β2 of AdamW, the decay rate of the second moment.", at_least=0, below=1)
    adam_weight_decay: float = recorded(0.0, "Weight decay of AdamW.", at_least=0)
    adam_epsilon: float = recorded(1e-8, "ε of AdamW, added to the denominator.", above=0)
    max_grad_norm: float = recorded(
        1.0, "Maximum norm of the gradient; larger gradients are scaled down to it.", above=0
    )
    use_ema: bool = fixed(True, "Keep an exponential moving average (EMA) of the weights, which is sampled and saved.")
    ema_max_decay: list[float] = fixed(
        [0.9999],
        "Maximum decay of the EMA; several values keep several EMAs, of which the first is sampled.",
        at_least=0,
        below=1,
        scalar=True,
    )
    ema_inv_gamma: float = recorded(
        1.0, "γ of the EMA warmup: the decay at step n is 1 - (1 + n / γ)^-power, up to the maximum.", above=0
    )
    ema_power: float = recorded(0.75, "Power of the EMA warmup, see --ema_inv_gamma.", above=0)
    max_nonfinite_steps: int = free(
        10, "Number of consecutive steps with a non-finite loss or gradient after which the run stops.", at_least=1
    )
    gradient_checkpointing: bool = free(False, "Save memory by recomputing activations in the backward pass.")
    compile: bool = recorded(False, "Compile the network with torch.compile; the first step then takes minutes.")
    enable_xformers_memory_efficient_attention: bool = recorded(False, "Use the attention of xformers (GPU only).")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = recorded(
        None, "Precision of the forward pass; by default that of `accelerate config`, and always fp32 on a CPU."
    )
    allow_tf32: bool = recorded(False, "Allow TF32 matrix multiplications on Ampere and newer GPUs.")

    @property
    def ema_decays(self) -> list[float]:
        """The maximum decay of each EMA; an empty list without `use_ema`."""
        return self.ema_max_decay if self.use_ema else []


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Settings of the output folder, checkpoints, validation and logging."""

    group = "run"

    output_dir: str = free("cfg-model", "Folder for checkpoints, samples, logs and the trained pipeline.")
    dry_run: bool = free(False, "Check the settings, the data and the disk, and print the plan without training.")
    overwrite_output_dir: bool = free(False, "Delete the run in --output_dir and start from the first step.")
    seed: int = fixed(
        0,
        "Seed of the weights, the data order, the noise, the dropped labels and the samples.",
        at_least=0,
        at_most=2**63 - 1,
    )
    checkpointing_steps: int = free(500, "Number of steps between checkpoints; 0 disables them.", at_least=0)
    checkpoints_total_limit: int | None = free(
        None, "Number of checkpoints to keep; the oldest are deleted.", at_least=1
    )
    resume_from_checkpoint: str | None = free(None, 'Checkpoint to resume from: a checkpoint-STEP folder, or "latest".')
    validation_steps: int = free(
        1000, "Number of steps between grids of samples; 0 draws one at the end only.", at_least=0
    )
    num_inference_steps: int = free(12, "Number of sampling steps T per validation image.", at_least=1)
    eval_steps: int = free(
        0, "Number of steps between evaluations at each w of --validation_guidance_scales; 0 disables them.", at_least=0
    )
    num_eval_samples: int = free(500, "Number of samples in an evaluation, for each w.", at_least=MIN_SAMPLES)
    feature_extractor: str = free("small", "Feature extractor of the evaluations, see evaluate_cfg.py --help.")
    logging_steps: int = free(10, "Number of steps between logged values.", at_least=1)
    report_to: str = free(
        "tensorboard", "Trackers of Accelerate, separated by commas: tensorboard, wandb, trackio, …, all or none."
    )
    tracker_project_name: str = free("diffusers-cfg", "Name of the project in the trackers.")
    run_name: str | None = free(None, "Name of the run in the trackers; by default that of --output_dir.")
    logging_dir: str = free("logs", "Name of the folder in --output_dir that trackers write to.")
    ddp_timeout: int = free(
        1800, "Seconds that a process waits for the other processes before the run fails.", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class HubConfig(Config):
    """Settings of publishing on the Hugging Face Hub."""

    group = "Hub"

    push_to_hub: bool = free(False, "Push the trained model to the Hub.")
    hub_model_id: str | None = free(
        None, "Repository on the Hub, NAME or NAMESPACE/NAME; by default the name of --output_dir."
    )
    hub_private_repo: bool = free(False, "Create the repository as private.")
    hub_token: str | None = free(
        None, "Hub token with write access; by default that of `hf auth login`. It is never saved.", secret=True
    )
    hub_strategy: Literal["end", "checkpoint"] = free(
        "end", "Push at the end, or also at every checkpoint in the background."
    )
    overwrite_hub_repo: bool = free(False, "Push even if the repository contains something other than a pipeline.")
    license: str | None = free(None, "License of the model, such as apache-2.0, for the model card.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(HubConfig, RunConfig, OptimizationConfig, ModelConfig, DataConfig):
    """Settings shared by all methods: data, network, optimization, run and Hub."""

    group = "training"

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        for name in (
            "logging_dir",
            "tracker_project_name",
        ):  # TensorBoard writes to the project's folder in logging_dir.
            if not re.fullmatch(r"\w[\w. -]*", value := getattr(self, name)):
                raise UserError(f"{name} must be the name of a folder in --output_dir, but is {value!r}.")
        if len(set(self.ema_max_decay)) < len(self.ema_max_decay):
            raise UserError(f"ema_max_decay must not repeat a value, but is {self.ema_max_decay}.")
        if self.pretrained_model_name_or_path and (
            self.model_config_name_or_path or self.pretrained_vae_model_name_or_path
        ):
            raise UserError(
                "--pretrained_model_name_or_path already contains a network and an autoencoder. Leave out "
                "--model_config_name_or_path and --pretrained_vae_model_name_or_path."
            )
        if self.cache_latents and not (self.pretrained_vae_model_name_or_path or self.pretrained_model_name_or_path):
            raise UserError(
                "--cache_latents needs an autoencoder. Pass --pretrained_vae_model_name_or_path, or a "
                "--pretrained_model_name_or_path that has an autoencoder."
            )
        if self.cache_latents and self.streaming:
            raise UserError("--cache_latents caches the whole dataset and cannot be combined with --streaming.")
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise UserError("Pass either --dataset_name or --train_data_dir, not both.")
        if self.streaming and self.dataset_name is None and self.train_data_dir is None:
            raise UserError("--streaming needs a dataset. Pass --dataset_name or --train_data_dir.")
        if self.streaming and self.eval_steps:
            raise UserError(
                "--eval_steps compares samples with the whole dataset and cannot be combined with --streaming. Run "
                "evaluate_cfg.py after training instead."
            )
        self._check_resolution()

    def _check_resolution(self) -> None:
        """Check that every level but the last can halve the image. `networks` checks latents and other networks."""
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
                f"requires. Use a multiple of {2**halvings} (such as {fitting}), or fewer --block_out_channels."
            )

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings for the built-in digits if no dataset is given."""
        names_data = values["dataset_name"] is not None or values["train_data_dir"] is not None
        return {} if names_data else DIGITS

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Refuse settings of the network if a pretrained network or a network config replaces them."""
        for source in ("model_config_name_or_path", "pretrained_model_name_or_path"):
            given = flags if source in flags else flags | in_file
            if values[source] is not None and (useless := sorted(NETWORK_SETTINGS & given)):
                raise UserError(
                    f"{', '.join(useless)}: the network comes from --{source} {values[source]}. Leave out "
                    "one of the two."
                )

    def public(self) -> dict[str, Any]:
        """Return the settings by name, without secrets and without those that a pretrained network replaces."""
        replaced = self.model_config_name_or_path or self.pretrained_model_name_or_path
        return {name: value for name, value in super().public().items() if not (replaced and name in NETWORK_SETTINGS)}


@dataclass(frozen=True, kw_only=True)
class CFGConfig(TrainConfig):
    """Settings of classifier-free guidance, `ClassifierFreeGuidance`."""

    description: ClassVar[str] = (
        "Train a class-conditional diffusion model with classifier-free guidance (arXiv 2207.12598)."
    )
    group = "classifier-free guidance"

    conditioning_dropout_prob: float = recorded(
        0.1, "Probability p_uncond that a label is replaced by the null class.", at_least=0, below=1
    )
    # Not the paper's ε: x̃ = (z - σε)/α multiplies the network's error by up to 1/α = 22026, x̃ = αz - σv by at most 1.
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = fixed(
        "v_prediction", "Quantity that the network predicts: ε (as in the paper), v = αε - σx, or x."
    )
    log_snr_min: float = fixed(-20.0, "Log-SNR λ_min at the noisy end of the noise process.")
    log_snr_max: float = fixed(20.0, "Log-SNR λ_max at the clean end of the noise process.")
    validation_guidance_scales: list[float] = free(
        [0.0, 0.5, 1.0, 2.0, 4.0], "Guidance scales, the paper's w, of the columns of the validation grid."
    )

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        if not self.log_snr_min < self.log_snr_max:
            raise UserError(f"log_snr_min={self.log_snr_min} must be below log_snr_max={self.log_snr_max}.")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(CFGConfig):
    """Settings of guidance distillation, `GuidanceDistillation`."""

    description: ClassVar[str] = (
        "Distill guidance into a student that takes w as an input, then into fewer sampling steps (arXiv 2210.03142)."
    )
    group = "distillation"

    teacher: str = recorded(help="Pipeline to distill: the output folder of a run, or a repository on the Hub.")
    max_guidance_scale: float | None = fixed(
        None, "Largest w that the student learns; by default that of the teacher, or 4.", above=0
    )
    student_steps: int | None = fixed(
        None, "Number of DDIM steps of the student, a divisor of 1000; by default any sampler and number of steps."
    )
    teacher_steps: int = fixed(32, "Number of DDIM steps of the teacher, a multiple of --student_steps.")

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        steps = self.student_steps
        if steps is not None and (steps < 1 or self.teacher_steps < 1 or 1000 % steps or self.teacher_steps % steps):
            raise UserError(
                f"--student_steps must divide 1000 (for DDIM) and --teacher_steps {self.teacher_steps}, but is {steps}."
            )

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's data and optimization settings if its folder contains a train_config.yaml."""
        path, settings = Path(values["teacher"]) / CONFIG_FILE, {}
        if path.is_file():
            of_teacher = read_yaml(path, DistillationConfig)
            shared = {f.name for part in (DataConfig, OptimizationConfig) for f in fields(part)}
            settings = {n: v for n, v in of_teacher.items() if n in shared | {"conditioning_dropout_prob"}}
        values = {**values, **{n: v for n, v in settings.items() if values.get(n) is None}}
        return {**super().derived_defaults(values), **settings, "pretrained_model_name_or_path": values["teacher"]}

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Refuse settings that the student inherits from its teacher."""
        super().check_given(values, flags, in_file)
        of_teacher = {"prediction_type", "log_snr_min", "log_snr_max", "pretrained_model_name_or_path"}
        if useless := sorted(of_teacher & flags):
            raise UserError(
                f"{', '.join(useless)}: the student inherits this from --teacher {values['teacher']}. Leave it out."
            )
