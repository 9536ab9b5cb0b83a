"""Declare the settings of sampling and of evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers_cfg.config import CACHE_DIR, Config, UserError, flag
from diffusers_cfg.run_settings import MIN_SAMPLES

PAPER_SCALES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0, 3.0, 4.0]

# Far more than any use needs. Larger values are mistakes, which would fill the memory before an image is drawn.
MAX_STEPS, MAX_SAMPLES, MAX_DIFFUSION_STEPS = 100_000, 100_000_000, 1_000_000
# Of which a likelihood is evaluated by default. Its standard error is then well below 0.1 %.
MAX_IMAGES = 10_000


# The rules of guidance: the scales of classifier-free and of classifier guidance that each of them uses for a given w.
# With an exact classifier all of them draw the same images (Ho & Salimans 2022, section 3.1).
GUIDANCE: Mapping[str, Callable[[float], dict[str, float]]] = {
    "classifier_free": lambda w: {"guidance_scale": w},
    "classifier": lambda w: {"guidance_scale": -1.0, "classifier_guidance_scale": 1 + w},
    "conditional_classifier": lambda w: {"guidance_scale": 0.0, "classifier_guidance_scale": w},
    "both": lambda w: {"guidance_scale": w / 2, "classifier_guidance_scale": w / 2},
}


def format_number(value: float) -> str:
    """Format a number as short as possible without losing a digit, so that different numbers have different texts."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def sampler_folder(scheduler: str, steps: int, interval: list[float] | None) -> str:
    """Return the name of the output folder of a sampler with its number of steps and guidance interval."""
    return f"{scheduler}-{steps}" + (f"-interval={','.join(map(format_number, interval))}" if interval else "")


def refuse_flags(argv: list[str], hints: Mapping[str, str]) -> None:
    """Raise UserError for flags of another command that have no effect in this one. `hints` says what to do instead."""
    for name in (argument.split("=")[0] for argument in argv):
        if name in hints:
            raise UserError(f"{name} is not a flag of this command. {hints[name]}")


@dataclass(frozen=True, kw_only=True)
class SavedModelConfig(Config):
    """The settings of all commands that load a model."""

    group = "model"

    model: str = flag(help="The output folder of a training run, or a Hub repository.")
    variant: str | None = flag(None, "The variant of the weights to load, such as ema999.")
    seed: int = flag(0, "Random seed; each image depends on the seed and its index.", at_least=0)

    @property
    def model_name(self) -> str:
        """The last component of the model's path or repository, which names its results."""
        return Path(self.model).resolve().name


@dataclass(frozen=True, kw_only=True)
class EvaluatedDataConfig(Config):
    """The settings that name the data of an evaluation, as those of `DataConfig` name the data of a training run."""

    group = "data; by default that of the training run"

    dataset_name: str | None = flag(None, "A dataset on the Hub, or a local folder or file that `datasets` can load.")
    dataset_config_name: str | None = flag(None, "The configuration of the dataset.")
    dataset_split: str | None = flag(None, "The split of the dataset.")
    train_data_dir: str | None = flag(None, "A folder with one subfolder of images per class, named after the class.")
    image_column: str | None = flag(None, "The dataset column with the images.")
    label_column: str | None = flag(None, "The dataset column with the class labels.")
    class_names: str | None = flag(None, "Names of the classes of plain labels, as for training.", relative=True)

    @property
    def given_data(self) -> dict[str, Any]:
        """The settings of the data that are set, which override those of the training run."""
        names = [setting.name for setting in fields(EvaluatedDataConfig)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SavedModelConfig):
    """The settings of sampling, which `sample.py` and `evaluate_cfg.py` share."""

    group = "sampling"

    num_inference_steps: int | None = flag(
        None, "Number of sampling steps T; defaults to the model's own.", at_least=1, at_most=MAX_STEPS
    )
    scheduler: str | None = flag(
        None, "A scheduler class of diffusers, or LogSNRScheduler; defaults to the model's own."
    )
    guidance: Literal["classifier_free", "classifier", "conditional_classifier", "both"] = flag(
        "classifier_free",
        "Rule of guidance: classifier_free; classifier, the unconditional model with a classifier at scale 1 + w; "
        "conditional_classifier, the conditional model with a classifier at scale w; or both, each at scale w/2. With "
        "an exact classifier all of them draw the same images. All but the first need a model with a classifier.",
    )
    guidance_interval: list[float] | None = flag(None, "Guide only where σ_lo < σ/α ≤ σ_hi.", length=2)
    guidance_rescale: float = flag(
        0.0,
        "Guidance rescale φ in [0, 1] of classifier-free guidance, which reduces saturation.",
        at_least=0,
        at_most=1,
    )
    guide_model: str | None = flag(None, "A weaker model of the same classes, for autoguidance.")
    guider: str | None = flag(
        None, "A guider class of diffusers to use instead of the pipeline's own guidance, at scale w."
    )
    batch_size: int = flag(250, "Number of images that each process generates at a time.", at_least=1)

    @property
    def guidance_flags(self) -> list[str]:
        """The given flags that change guidance."""
        given = {
            "--guidance": self.guidance != "classifier_free",
            "--guidance_interval": self.guidance_interval is not None,
            "--guidance_rescale": self.guidance_rescale > 0,
            "--guide_model": self.guide_model is not None,
            "--guider": self.guider is not None,
        }
        return [name for name, is_given in given.items() if is_given]

    def check(self) -> None:
        if self.guider is not None and (given := [name for name in self.guidance_flags if name != "--guider"]):
            raise UserError(
                f"{', '.join(given)} cannot be combined with --guider {self.guider}, which has its own guidance rule. "
                "Omit one of the two."
            )
        has_free_part = self.guidance in ("classifier_free", "both")
        for name in ("--guidance_rescale", "--guide_model"):
            if name in self.guidance_flags and not has_free_part:
                raise UserError(
                    f"{name} changes classifier-free guidance, which --guidance {self.guidance} does not use. Omit one "
                    "of the two, or pass --guidance both."
                )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """The settings of `sample.py`."""

    description: ClassVar[str] = (
        "Generate images with a trained model as a folder of PNGs, a grid, or an npz file for ADM's evaluator."
    )
    group = "images"

    class_labels: list[str] | None = flag(None, "Class names or ids to cycle through; defaults to all classes.")
    guidance_scale: float | None = flag(
        None, "Guidance scale w, as defined in the paper; defaults to 1, or to 0 for a denoising diffusion GAN."
    )
    num_samples: int = flag(20, "Number of images.", at_least=1, at_most=MAX_SAMPLES)
    output_dir: str = flag("images", "Output folder.")
    format: Literal["png", "grid", "npz"] = flag(
        "png",
        "Output format: CLASS/INDEX.png, grid.png, or samples.npz with arr_0 (uint8 NHWC) and arr_1 (class ids).",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SamplingConfig, EvaluatedDataConfig):
    """The settings of a sweep over w, by `evaluate_cfg.py` and studies."""

    description: ClassVar[str] = (
        "Evaluate a trained model over guidance scales w, as in the paper's tables 1 and 2 and figure 4."
    )
    group = "evaluation"

    guidance_scales: list[float] | None = flag(
        None,
        f"Guidance scales w, as defined in the paper; defaults to its {' '.join(map(format_number, PAPER_SCALES))}, or "
        "to 0 alone for a denoising diffusion GAN.",
    )
    num_samples: int = flag(
        2000, "Number of samples for each w; the paper uses 50,000.", at_least=MIN_SAMPLES, at_most=MAX_SAMPLES
    )
    class_labels: Literal["balanced", "random", "data"] = flag(
        "balanced", "Sample classes equally often, uniformly at random, or in the proportions of the data."
    )
    feature_extractor: str = flag(
        "small",
        "Feature extractor: small (a classifier trained on the data), inception (FID, sFID and IS; needs "
        "torch-fidelity), dinov2, or an image classifier on the Hub.",
    )
    reference: str | None = flag(
        None,
        "Statistics of real images to compare with instead of the training data: a reference batch of ADM's evaluator, "
        "or statistics of EDM, as an npz file with mu and sigma of Inception's features, and optionally mu_s and "
        "sigma_s of its spatial features and images, arr_0. Needs --feature_extractor inception.",
        relative=True,
    )
    output_dir: str | None = flag(None, "Output folder; defaults to MODEL/evaluation, which the model card shows.")
    statistics_dir: str = flag(str(CACHE_DIR), "Folder that caches the statistics of the real images.")

    def check(self) -> None:
        super().check()
        scales = self.guidance_scales or []
        if len(set(scales)) < len(scales):
            raise UserError(f"guidance_scales must not repeat a value, but is {scales}.")
        if self.reference is not None:
            self._check_reference()

    def _check_reference(self) -> None:
        """Raise UserError for settings that do not go with reference statistics."""
        if self.feature_extractor != "inception":
            raise UserError(
                f"--reference {self.reference} has statistics of Inception's features, which cannot be compared with "
                f"those of --feature_extractor {self.feature_extractor}. Pass --feature_extractor inception."
            )
        if given := [f"--{name}" for name in self.given_data]:
            raise UserError(
                f"{', '.join(given)} cannot be combined with --reference {self.reference}, which replaces the data. "
                "Omit one of the two."
            )
        if self.class_labels == "data":
            raise UserError(
                f"--class_labels data needs the labels of the data, which --reference {self.reference} replaces. Pass "
                "--class_labels balanced or random."
            )


@dataclass(frozen=True, kw_only=True)
class TrackedEvaluationConfig(EvaluationConfig):
    """The settings of `evaluate_cfg.py`."""

    group = "trackers"

    report_to: str = flag(
        "none", "Trackers that get the results, separated by commas: tensorboard, wandb, trackio, …, all or none."
    )
    tracker_project_name: str = flag("diffusers-cfg", "Name of the project in the trackers.")
    run_name: str | None = flag(None, "Name of the run in the trackers; by default that of the model with -evaluation.")


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(SavedModelConfig, EvaluatedDataConfig):
    """The settings of `evaluate_likelihood.py`."""

    description: ClassVar[str] = (
        "Evaluate the variational bound of a trained model on held-out images, in bits per dimension "
        "(arXiv 2107.00630)."
    )
    group = "likelihood"

    images: Literal["held_out", "training"] = flag(
        "held_out",
        "The images of the training run's data: those of --train_val_split, or without it of its split test or "
        "validation; or those that the model was trained on, for comparison.",
    )
    num_images: int | None = flag(
        None, f"Number of images, drawn at random; by default all, at most {MAX_IMAGES:,}.", at_least=1
    )
    diffusion_steps: list[int] = flag(
        [0], "Numbers of steps T of the bound; 0 is continuous time.", at_least=0, at_most=MAX_DIFFUSION_STEPS
    )
    times_per_image: int = flag(
        64, "Number of times in [0, 1] at which each image is evaluated, stratified.", at_least=1, at_most=MAX_STEPS
    )
    noise_schedule: Literal["linear", "learned"] = flag(
        "linear",
        "The shape of the log-SNR over time, on which the bound of T steps depends and that in continuous time does "
        "not: linear, or that of the training run's noise_schedule.safetensors.",
    )
    log_snr_max: float | None = flag(
        None,
        "Log-SNR λ_max at the clean end of the bound, by default that of the model. Any value in the model's range "
        "gives a bound. The best is near 13, where the 256 levels become distinct: the 20 of train_cfg.py costs bits.",
        at_least=-60,
        at_most=60,
    )
    log_snr_min: float | None = flag(
        None, "Log-SNR λ_min at the noisy end of the bound, by default that of the model.", at_least=-60, at_most=60
    )
    batch_size: int = flag(
        250, "Number of noisy images that the network of each process evaluates at a time.", at_least=1
    )
    output_dir: str | None = flag(None, "Output folder; defaults to MODEL/evaluation, which the model card shows.")

    def check(self) -> None:
        if len(set(self.diffusion_steps)) < len(self.diffusion_steps):
            raise UserError(f"diffusion_steps must not repeat a value, but is {self.diffusion_steps}.")
        low, high = self.log_snr_min, self.log_snr_max
        if low is not None and high is not None and low >= high:
            raise UserError(f"log_snr_min={low} must be below log_snr_max={high}.")
        ends = [name for name in ("log_snr_max", "log_snr_min") if getattr(self, name) is not None]
        if ends and self.noise_schedule == "learned":
            raise UserError(
                f"{', '.join(ends)}: the learned schedule has its own ends. Leave it out, or pass --noise_schedule "
                "linear."
            )
