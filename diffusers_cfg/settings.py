"""Declare the settings of training runs: those of all methods, and a dataclass for each method."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers_cfg.config import Config, UserError, default_of, fixed, free, read_yaml, recorded
from diffusers_cfg.run_settings import HubConfig, ModelConfig, OptimizationConfig, RunConfig

CONFIG_FILE = "train_config.yaml"
# Settings that a pretrained network or a network config replaces.
NETWORK_SETTINGS = {"block_out_channels", "layers_per_block", "attention_resolutions", "dropout"}
# Settings of the noise process, which a pretrained model brings along.
PROCESS_SETTINGS = {"prediction_type", "log_snr_min", "log_snr_max"}
# Settings that have no effect unless another one is set.
NEED = {
    "use_ema": {"ema_max_decay", "ema_inv_gamma", "ema_power"},
    "eval_steps": {"num_eval_samples", "feature_extractor"},
    "push_to_hub": {"hub_model_id", "hub_private_repo", "hub_strategy", "overwrite_hub_repo"},
    "streaming": {"shuffle_buffer_size"},
}
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
# A variational diffusion model needs a network that keeps the resolution, and held-out images.
DIGITS_VDM = {
    **DIGITS,
    "block_out_channels": [32],
    "layers_per_block": 2,
    "attention_resolutions": [8],
    "learning_rate": 1e-3,
    "train_val_split": 0.15,
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
    train_val_split: float = fixed(
        0.0, "Fraction of the images that is held out from training, for evaluate_likelihood.py.", at_least=0, below=1
    )
    streaming: bool = fixed(False, "Stream the dataset instead of downloading it first.")
    shuffle_buffer_size: int = fixed(1000, "Number of images in the shuffle buffer of --streaming.", at_least=1)
    image_column: str = recorded("image", "Column of the dataset with the images.")
    label_column: str = recorded("label", "Column of the dataset with the class labels; -1 or null means no label.")
    class_names: str | None = recorded(
        None,
        "Names of the classes 0, 1, … of a column of plain labels: a text file with a name per line, a JSON file, or "
        "the number of classes.",
        relative=True,
    )
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

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise UserError("Pass either --dataset_name or --train_data_dir, not both.")
        if self.dataset_name is None and self.train_data_dir is None:
            for name in ("dataset_split", "streaming", "image_column", "label_column", "class_names"):
                if getattr(self, name) != getattr(DataConfig, name):
                    raise UserError(f"--{name} needs a dataset. Pass --dataset_name or --train_data_dir.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise UserError("--dataset_config_name needs --dataset_name. Pass both, or leave it out.")
        if self.train_val_split and self.streaming:
            raise UserError(
                f"--train_val_split {self.train_val_split:g} cannot be combined with --streaming, which does not know "
                "all images in advance. Leave it out, train on a --dataset_split without the held-out images, and "
                "name theirs to evaluate_likelihood.py with --dataset_split."
            )


def data_source(settings: Mapping[str, Any]) -> tuple[str, str | None, str]:
    """Return the source of the images that settings of `DataConfig` name: its path or name, configuration and split."""
    source = settings.get("train_data_dir") or settings.get("dataset_name")
    split = settings.get("dataset_split", DataConfig.dataset_split)
    # A path may be written in several ways. The names of two repositories differ as paths, too.
    return os.path.realpath(str(source)) if source else "", settings.get("dataset_config_name"), split


@dataclass(frozen=True, kw_only=True)
class TrainConfig(HubConfig, RunConfig, OptimizationConfig, ModelConfig, DataConfig):
    """
    Settings shared by all methods: data, network, optimization, run and Hub.

    Attributes:
        replaced (`Mapping[str, set[str]]`): the settings that a pretrained network or its config replaces, by the name
            of the setting that names it.
    """

    group = "training"
    replaced: ClassVar[Mapping[str, set[str]]] = {
        "model_config_name_or_path": NETWORK_SETTINGS,
        "pretrained_model_name_or_path": NETWORK_SETTINGS,
    }

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        # TensorBoard writes to the folder of the project in logging_dir.
        for name in ("logging_dir", "tracker_project_name"):
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
        """Refuse settings that have no effect, such as those of a network if a pretrained one replaces it."""
        for source, settings in cls.replaced.items():
            given = flags if source in flags else flags | in_file
            if values[source] is not None and (useless := sorted(settings & given)):
                raise UserError(
                    f"{', '.join(useless)}: the network comes from --{source} {values[source]}. Leave out "
                    "one of the two."
                )
        for needed, settings in NEED.items():
            if not values[needed] and (useless := sorted(settings & flags)):
                raise UserError(f"{', '.join(useless)}: no effect without --{needed}. Leave it out, or set --{needed}.")
        if "num_train_epochs" in flags and (steps := values["max_train_steps"]) is not None:
            raise UserError(f"num_train_epochs: no effect with max_train_steps {steps}. Set --max_train_steps instead.")

    def public(self) -> dict[str, Any]:
        """Return the settings by name, without secrets and without those that a pretrained network replaces."""
        replaced = set().union(*(names for source, names in self.replaced.items() if getattr(self, source)))
        return {name: value for name, value in super().public().items() if name not in replaced}


@dataclass(frozen=True, kw_only=True)
class CFGConfig(TrainConfig):
    """Settings of classifier-free guidance, `ClassifierFreeGuidance`."""

    description: ClassVar[str] = (
        "Train a class-conditional diffusion model with classifier-free guidance (arXiv 2207.12598)."
    )
    group = "classifier-free guidance"
    replaced = {
        "model_config_name_or_path": NETWORK_SETTINGS,
        "pretrained_model_name_or_path": NETWORK_SETTINGS | PROCESS_SETTINGS,
    }

    conditioning_dropout_prob: float = recorded(
        0.1, "Probability p_uncond that a label is replaced by the null class.", at_least=0, below=1
    )
    # Not the paper's ε: x̃ = (z - σε)/α multiplies the network's error by up to 1/α = 22026, x̃ = αz - σv by at most 1.
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = fixed(
        "v_prediction", "Quantity that the network predicts: ε (as in the paper), v = αε - σx, or x."
    )
    log_snr_min: float = fixed(-20.0, "Log-SNR λ_min at the noisy end of the noise process.", at_least=-60, at_most=60)
    log_snr_max: float = fixed(20.0, "Log-SNR λ_max at the clean end of the noise process.", at_least=-10, at_most=60)
    validation_guidance_scales: list[float] = free(
        [0.0, 0.5, 1.0, 2.0, 4.0], "Guidance scales, the paper's w, of the columns of the validation grid."
    )

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        if not self.log_snr_min < self.log_snr_max:
            raise UserError(f"log_snr_min={self.log_snr_min} must be below log_snr_max={self.log_snr_max}.")


@dataclass(frozen=True, kw_only=True)
class VDMConfig(CFGConfig):
    """Settings of variational diffusion models, `VariationalDiffusion`. Defaults that differ are the paper's."""

    description: ClassVar[str] = (
        "Train a class-conditional variational diffusion model: a bound on the likelihood as the loss, and a learned "
        "noise schedule (arXiv 2107.00630)."
    )
    group = "variational diffusion"
    replaced = {
        "model_config_name_or_path": NETWORK_SETTINGS | {"fourier_features"},
        "pretrained_model_name_or_path": NETWORK_SETTINGS | PROCESS_SETTINGS | {"fourier_features"},
    }

    noise_schedule: Literal["learned", "linear", "fixed"] = fixed(
        "learned",
        "What is learned of γ(t) = -log SNR. learned: its ends and its shape; linear: its ends; fixed: nothing, and "
        "it is linear.",
    )
    log_snr_min: float = fixed(
        -5.0, "Log-SNR λ_min at the noisy end of the noise process, at the start of the run.", at_least=-60, at_most=60
    )
    log_snr_max: float = fixed(
        13.3, "Log-SNR λ_max at the clean end of the noise process, at the start of the run.", at_least=-10, at_most=15
    )
    schedule_learning_rate: float = recorded(1e-2, "Peak learning rate of the noise schedule.", above=0)
    diffusion_steps: int = fixed(
        0, "Number of steps T of the bound that is minimised; 0 is continuous time.", at_least=0, at_most=1_000_000
    )
    fourier_features: list[int] = fixed(
        [3, 4, 5, 6, 7, 8],
        "Octaves n of the network's inputs sin(2ⁿπz) and cos(2ⁿπz), the paper's are 7 and 8; 0 for none.",
        at_least=0,
        at_most=12,
    )
    loss_weighting: Literal["bound", "sigmoid", "simple"] = fixed(
        "bound",
        "Weight of ‖ε - ε̂‖² over the log-SNR λ. bound: the likelihood's; sigmoid: the bound's times sigmoid(2 - λ); "
        "simple: equal at all steps of train_cfg.py's process.",
    )
    adam_beta2: float = recorded(0.99, "β2 of AdamW, the decay rate of the second moment.", at_least=0, below=1)
    adam_weight_decay: float = recorded(0.01, "Weight decay of AdamW, for the network only.", at_least=0)
    output_dir: str = free("vdm-model", "Folder for checkpoints, samples, logs and the trained pipeline.")
    num_inference_steps: int = free(100, "Number of sampling steps T per validation image.", at_least=1)

    @property
    def learns_ends(self) -> bool:
        """Whether the ends of the noise schedule are learned."""
        return self.noise_schedule != "fixed" and self.loss_weighting == "bound"

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        if self.random_flip:
            raise UserError(
                "--random_flip changes the distribution of the images, so the loss would not be their likelihood. "
                "Leave it out."
            )
        if self.pretrained_vae_model_name_or_path is not None:
            raise UserError(
                "--pretrained_vae_model_name_or_path: the likelihood of latents is not that of the images. Leave it "
                "out, or use train_cfg.py."
            )
        if self.log_snr_max - self.log_snr_min < 1 - 1e-6:  # less rounding, as of 0.3 and -0.7
            raise UserError(
                f"log_snr_min={self.log_snr_min} and log_snr_max={self.log_snr_max} must be at least 1 apart."
            )
        if self.loss_weighting != "bound" and self.noise_schedule == "linear":
            raise UserError(
                f"--noise_schedule linear learns its ends, which needs the bound, but --loss_weighting is "
                f"{self.loss_weighting}. Use learned or fixed, or --loss_weighting bound."
            )
        if self.loss_weighting != "bound" and self.diffusion_steps:
            raise UserError(
                f"--loss_weighting {self.loss_weighting} is defined in continuous time. Leave out --diffusion_steps "
                f"{self.diffusion_steps}."
            )
        if self.learns_ends and len(self.ema_decays) > 1:
            raise UserError(
                f"ema_max_decay {self.ema_max_decay}: each EMA of the network belongs to its own ends of the noise "
                "schedule, but a pipeline has one scheduler. Pass one value, or --noise_schedule fixed."
            )
        if 0 in self.fourier_features and self.fourier_features != [0]:
            raise UserError(f"fourier_features: 0 means none, but is {self.fourier_features}. Leave 0 out.")
        if len(set(self.fourier_features)) < len(self.fourier_features):
            raise UserError(f"fourier_features must not repeat a value, but is {self.fourier_features}.")

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings for the built-in digits if no dataset is given."""
        return DIGITS_VDM if super().derived_defaults(values) else {}

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Refuse settings that have no effect."""
        super().check_given(values, flags, in_file)
        if values["noise_schedule"] == "fixed" and "schedule_learning_rate" in flags:
            raise UserError("schedule_learning_rate: no effect with --noise_schedule fixed. Leave one of them out.")


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
        None,
        "Number of DDIM steps of the student, a divisor of 1000; by default any sampler and number of steps.",
        at_least=1,
    )
    teacher_steps: int = fixed(
        32, "Number of DDIM steps of the teacher, a multiple of --student_steps.", at_least=1, at_most=1000
    )

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        steps = self.student_steps
        if steps is not None and (1000 % steps or self.teacher_steps % steps):
            raise UserError(
                f"--student_steps must divide 1000 (for DDIM) and --teacher_steps {self.teacher_steps}, but is {steps}."
            )

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's data and optimization settings if its folder contains a train_config.yaml."""
        path, settings = Path(values["teacher"]).expanduser() / CONFIG_FILE, {}
        if path.is_file():
            of_teacher = read_yaml(path, DistillationConfig, ignored={f.name for f in fields(VDMConfig)})
            shared = {f.name for part in (DataConfig, OptimizationConfig) for f in fields(part)}
            settings = {n: v for n, v in of_teacher.items() if n in shared | {"conditioning_dropout_prob"}}
            given = {f.name: values[f.name] for f in fields(DataConfig) if values[f.name] != default_of(f)}
            if data_source({**settings, **given}) != data_source(settings):
                settings.pop("train_val_split", None)  # which images are held out is a matter of the teacher's data
        values = {**values, **{n: v for n, v in settings.items() if values.get(n) is None}}
        return {**super().derived_defaults(values), **settings, "pretrained_model_name_or_path": values["teacher"]}

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Refuse settings that have no effect, such as those that the student inherits from its teacher."""
        useless = PROCESS_SETTINGS & (flags | in_file)
        if values["pretrained_model_name_or_path"] != values["teacher"]:
            useless.add("pretrained_model_name_or_path")
        if useless:
            names = ", ".join(sorted(useless))
            raise UserError(f"{names}: the student inherits this from --teacher {values['teacher']}. Leave it out.")
        super().check_given(values, flags, in_file)
        if values["student_steps"] is None and "teacher_steps" in flags | in_file:
            raise UserError("teacher_steps: no effect without --student_steps. Leave it out, or set --student_steps.")
        if values["student_steps"] is not None and "num_inference_steps" in flags:
            raise UserError(
                f"num_inference_steps: the student samples in {values['student_steps']} steps. Leave it out."
            )
