"""Declare the settings of each method, in a dataclass for each."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from diffusers_cfg.config import UserError, fixed, free, recorded
from diffusers_cfg.run_settings import OPTIMIZER_HELP, OptimizationConfig
from diffusers_cfg.settings import DIGITS, NETWORK_SETTINGS, DataConfig, TrainConfig, settings_of_run

# Settings of the noise process, which a pretrained model brings along.
PROCESS_SETTINGS = {"prediction_type", "log_snr_min", "log_snr_max"}
# A variational diffusion model needs a network that keeps the resolution, and held-out images.
DIGITS_VDM = {
    **DIGITS,
    "block_out_channels": [32],
    "layers_per_block": 2,
    "attention_resolutions": [8],
    "learning_rate": 1e-3,
    "train_val_split": 0.15,
}

# Two networks in turn, of which the discriminator learns faster.
DIGITS_DDGAN = {
    **DIGITS,
    "train_batch_size": 32,
    "max_train_steps": 1000,
    "learning_rate": 2e-4,
    "learning_rate_discriminator": 1e-3,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "adam_beta1": 0.0,
    "adam_beta2": 0.99,
    "r1_gamma": 0.2,
    "lazy_reg": 4,
    "discriminator_channels": [32, 64, 64],
    "ema_max_decay": [0.995],
}
DIGITS_CLASSIFIER = {**DIGITS, "validation_steps": 750}
# With more steps, a step is close to a Gaussian, which diffusion models learn.
MAX_TIMESTEPS = 8
# Fraction of the images that is held out from the training of a classifier
HELD_OUT = 0.1
# Number of images that the minibatch standard deviation of a discriminator compares
GROUP_SIZE = 4
FP16_REFUSED = (
    "--mixed_precision fp16 is not supported: the gradients of the two networks differ too much for its range. Use "
    "bf16 or no."
)


@dataclass(frozen=True, kw_only=True)
class LabelDropoutConfig(TrainConfig):
    """Settings of methods whose networks also learn the null class."""

    group = "label dropout"

    conditioning_dropout_prob: float = recorded(
        0.1, "Probability p_uncond that a label is replaced by the null class.", at_least=0, below=1
    )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(LabelDropoutConfig):
    """Settings of methods whose networks predict at every noise level of a noise process."""

    group = "diffusion"
    replaced = {
        "model_config_name_or_path": NETWORK_SETTINGS,
        "pretrained_model_name_or_path": NETWORK_SETTINGS | PROCESS_SETTINGS,
    }

    # Not the paper's ε: x̃ = (z - σε)/α multiplies the network's error by up to 1/α = 22026, x̃ = αz - σv by at most 1.
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = fixed(
        "v_prediction", "Quantity that the network predicts: ε (as in the paper), v = αε - σx, or x."
    )
    log_snr_min: float = fixed(-20.0, "Log-SNR λ_min at the noisy end of the noise process.", at_least=-60, at_most=60)
    log_snr_max: float = fixed(20.0, "Log-SNR λ_max at the clean end of the noise process.", at_least=-10, at_most=60)
    validation_guidance_scales: list[float] = free(
        [0.0, 0.5, 1.0, 2.0, 4.0], "Guidance scales, the paper's w, of the columns of the validation grid."
    )
    num_inference_steps: int = free(12, "Number of sampling steps T per validation image.", at_least=1)

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        if not self.log_snr_min < self.log_snr_max:
            raise UserError(f"log_snr_min={self.log_snr_min} must be below log_snr_max={self.log_snr_max}.")


@dataclass(frozen=True, kw_only=True)
class CFGConfig(DiffusionConfig):
    """Settings of classifier-free guidance, `ClassifierFreeGuidance`."""

    description: ClassVar[str] = (
        "Train a class-conditional diffusion model with classifier-free guidance (arXiv 2207.12598)."
    )
    group = "classifier-free guidance"

    optimizer: Literal["adamw", "muon"] = fixed("muon", OPTIMIZER_HELP)
    max_guidance_scale: float | None = fixed(
        None,
        "Largest guidance scale w of a network that takes w as an input and guides in one pass (arXiv 2501.15420); by "
        "default guidance takes two.",
        above=0,
    )

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        if self.max_guidance_scale is not None and self.conditioning_dropout_prob == 0:
            raise UserError(
                "--max_guidance_scale needs a null class to guide away from, but --conditioning_dropout_prob is 0. Use "
                "0.1 to 0.2."
            )


@dataclass(frozen=True, kw_only=True)
class VDMConfig(DiffusionConfig):
    """Settings of variational diffusion models, `VariationalDiffusion`. Defaults that differ are the paper's."""

    description: ClassVar[str] = (
        "Train a class-conditional variational diffusion model: a bound on the likelihood as the loss, and a learned "
        "noise schedule (arXiv 2107.00630)."
    )
    group = "variational diffusion"
    digits = DIGITS_VDM
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
    adam_weight_decay: float = recorded(0.01, "Weight decay of AdamW and Muon, for the network only.", at_least=0)
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
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Refuse settings that have no effect."""
        super().check_given(values, flags, in_file)
        if values["noise_schedule"] == "fixed" and "schedule_learning_rate" in flags:
            raise UserError("schedule_learning_rate: no effect with --noise_schedule fixed. Leave one of them out.")


@dataclass(frozen=True, kw_only=True)
class DDGANConfig(LabelDropoutConfig):
    """Settings of denoising diffusion GANs, `DenoisingDiffusionGAN`. Defaults are those of the paper for CIFAR-10."""

    description: ClassVar[str] = (
        "Train a class-conditional denoising diffusion GAN, which generates in at most eight steps (arXiv 2112.07804)."
    )
    group = "denoising diffusion GAN"
    digits = DIGITS_DDGAN

    num_timesteps: int = fixed(
        4, "Number T of denoising steps, each of which evaluates the generator once.", at_least=1, at_most=MAX_TIMESTEPS
    )
    latent_dim: int = fixed(
        100, "Size of the latent vector z of the generator; 0 trains it without.", at_least=0, at_most=65_536
    )
    discriminator_channels: list[int] = fixed(
        [128, 128, 256, 512, 512],
        "Number of channels of the discriminator's first convolution, and of each of its residual blocks.",
        at_least=1,
    )
    loss: Literal["non_saturating", "relativistic"] = recorded(
        "non_saturating",
        "non_saturating: the paper's; relativistic: of D(real) - D(fake), with the penalty on both (arXiv 2501.05441).",
    )
    r1_gamma: float = recorded(0.02, "γ of the R1 penalty γ/2 ‖∇D‖² on the discriminator.", at_least=0)
    lazy_reg: int = recorded(15, "Number of steps between R1 penalties.", at_least=1)
    learning_rate_discriminator: float = recorded(1.25e-4, "Peak learning rate of the discriminator.", above=0)
    max_grad_norm_discriminator: float = recorded(
        100.0, "Maximum norm of the gradient of the discriminator; larger gradients are scaled down to it.", above=0
    )
    max_grad_norm: float = recorded(
        100.0, "Maximum norm of the gradient of the generator; larger gradients are scaled down to it.", above=0
    )
    learning_rate: float = recorded(1.6e-4, "Peak learning rate of the generator.", above=0)
    lr_warmup_steps: int = recorded(0, "Number of optimizer steps of linear warmup.", at_least=0)
    adam_beta1: float = recorded(0.5, "β1 of AdamW, the decay rate of the first moment.", at_least=0, below=1)
    adam_beta2: float = recorded(0.9, "β2 of AdamW, the decay rate of the second moment.", at_least=0, below=1)
    output_dir: str = free("ddgan-model", "Folder for checkpoints, samples, logs and the trained pipeline.")

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        super().check()
        if self.pretrained_model_name_or_path is not None:
            raise UserError(
                f"--pretrained_model_name_or_path {self.pretrained_model_name_or_path}: a generator cannot be trained "
                "further without its discriminator, which is not published, nor start from a diffusion model. Leave it "
                "out, or continue a run with --resume_from_checkpoint."
            )
        if self.pretrained_vae_model_name_or_path is not None:
            raise UserError(
                "--pretrained_vae_model_name_or_path: the generator's output is in [-1, 1], which latents exceed. "
                "Leave it out, or use train_cfg.py."
            )
        if self.mixed_precision == "fp16":
            raise UserError(FP16_REFUSED)
        if self.train_batch_size % GROUP_SIZE:
            raise UserError(
                f"--train_batch_size must be a multiple of {GROUP_SIZE}, because the discriminator compares "
                f"{GROUP_SIZE} images at a time, but is {self.train_batch_size}."
            )

    @classmethod
    def check_given(cls, values: Mapping[str, Any], flags: set[str], in_file: set[str]) -> None:
        """Refuse settings that have no effect."""
        super().check_given(values, flags, in_file)
        if not values["r1_gamma"] and "lazy_reg" in flags:
            raise UserError("lazy_reg: no effect with --r1_gamma 0. Leave one of them out.")
        if values["stack"] > 1 and "conditioning_dropout_prob" in flags:
            raise UserError("conditioning_dropout_prob: no effect with --stack, whose images have no labels.")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(DiffusionConfig):
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
        shared = {f.name for part in (DataConfig, OptimizationConfig) for f in fields(part)} - {"posthoc_ema_steps"}
        settings = settings_of_run(values["teacher"], cls, shared | {"conditioning_dropout_prob"}, values)
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


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(TrainConfig):
    """Settings of classifiers of noisy images, `ClassifierGuidance`."""

    description: ClassVar[str] = (
        "Train a classifier of noisy images, for classifier guidance of a diffusion model (arXiv 2105.05233)."
    )
    group = "classifier"
    digits = DIGITS_CLASSIFIER
    replaced = {}  # the network of the classifier is new

    pretrained_model_name_or_path: str = recorded(
        help="Diffusion model to guide, on the Hub or in a folder. The classifier has its noise process, its classes "
        "and by default its data. Both are saved together."
    )
    train_val_split: float = fixed(
        HELD_OUT,
        "Fraction of the images that is held out from training, for the logged accuracy. By default that of the "
        "diffusion model, if it holds out any; 0 with --streaming.",
        at_least=0,
        below=1,
    )
    adam_weight_decay: float = recorded(0.01, "Weight decay of AdamW and Muon.", at_least=0)
    output_dir: str = free(
        "classifier-model", "Folder for checkpoints, samples, logs and the pipeline with both models."
    )
    validation_guidance_scales: list[float] = free(
        [0.0, 0.5, 1.0, 2.0, 4.0],
        "Scales of the classifier, which guides the conditional model, of the columns of the validation grid.",
    )

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the data of the diffusion model if its folder contains a train_config.yaml."""
        names = {f.name for f in fields(DataConfig)} - {"stack"}  # only generators are trained on stacks
        settings = settings_of_run(values["pretrained_model_name_or_path"], DataConfig, names, values)
        values = {**values, **{n: v for n, v in settings.items() if values.get(n) is None}}
        is_streamed = values["streaming"] or settings.get("streaming")
        settings["train_val_split"] = 0.0 if is_streamed else settings.get("train_val_split") or HELD_OUT
        return {**super().derived_defaults(values), **settings}

    def check(self) -> None:
        """Check combinations of settings. Raise UserError."""
        if self.stack > 1:
            raise UserError(f"--stack {self.stack} makes images without classes to tell apart. Leave it out.")
        for name in ("model_config_name_or_path", "pretrained_vae_model_name_or_path"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name}: a classifier has its own layers and its model's autoencoder. Leave it out.")
        super().check()
