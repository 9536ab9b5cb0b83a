"""The settings of sampling and of evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from diffusers_cfg.config import CACHE_DIR, Config, UserError, flag

PAPER_SCALES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0, 3.0, 4.0]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How images are drawn."""

    group = "sampling"

    model: str = flag(help="The output folder of a training run, or a repository.")
    variant: str | None = flag(None, "Other weights of the network that the model holds, such as ema999.")
    num_inference_steps: int | None = flag(None, "Sampling steps T; by default the model's own.", at_least=1)
    scheduler: str | None = flag(
        None, "A class of diffusers to sample with, or LogSNRScheduler; by default the model's own."
    )
    guidance_interval: list[float] | None = flag(None, "Guide only where σ_lo < σ/α ≤ σ_hi.", length=2)
    guidance_rescale: float = flag(0.0, "φ in [0, 1], against saturation.", at_least=0, at_most=1)
    guide_model: str | None = flag(None, "A weaker model for the same classes, for autoguidance.")
    guider: str | None = flag(None, "One of diffusers' guiders, made with w, instead of the pipeline's own rule.")
    batch_size: int = flag(250, "Images drawn at a time on each process.", at_least=1)
    seed: int = flag(0, "An image is determined by this and its index.", at_least=0)

    @property
    def model_name(self) -> str:
        """The last part of the model's path or repository, by which its results are called."""
        return Path(self.model).resolve().name

    def check(self) -> None:
        own = {
            "--guidance_interval": self.guidance_interval is not None,
            "--guidance_rescale": self.guidance_rescale > 0,
            "--guide_model": self.guide_model is not None,
        }
        if self.guider is not None and (useless := [name for name, is_given in own.items() if is_given]):
            raise UserError(
                f"{', '.join(useless)} cannot be combined with --guider {self.guider}, which brings its own rule: "
                "leave out one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    description: ClassVar[str] = (
        "Draw images with a trained model: a folder of PNGs, a grid, or an npz file as ADM's evaluator reads it."
    )
    group = "images"

    class_labels: list[str] | None = flag(None, "Class names or ids, drawn in turn; by default all of them.")
    guidance_scale: float = flag(1.0, "The paper's w.")
    num_samples: int = flag(20, "How many images.", at_least=1)
    output_dir: str = flag("images", "Where to write them.")
    format: Literal["png", "grid", "npz"] = flag(
        "png", "CLASS/INDEX.png; grid.png, at most 10 in a row; or samples.npz with arr_0, uint8 NHWC, and arr_1, ids."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SamplingConfig):
    description: ClassVar[str] = (
        "Measure a trained model over guidance scales w: the paper's tables 1 and 2 and figure 4, for any model."
    )
    group = "evaluation; the data is by default that of the training"

    guidance_scales: list[float] = flag(PAPER_SCALES, "The paper's w.")
    num_samples: int = flag(2000, "Samples for each w; the paper takes 50,000.", at_least=1)
    class_labels: Literal["balanced", "random", "data"] = flag(
        "balanced", "Classes in turn, at random, or in the proportions of the data."
    )
    feature_extractor: str = flag(
        "small",
        "small: a classifier that is trained on the data; inception (needs torch-fidelity); dinov2; or an image "
        "classifier of the Hub.",
    )
    output_dir: str | None = flag(None, "Where to write; by default MODEL/evaluation, which the model card shows.")
    statistics_dir: str = flag(str(CACHE_DIR), "Where to keep the statistics of the real images.")
    dataset_name: str | None = flag(None, "A dataset of the Hub, or a local folder or file that `datasets` reads.")
    dataset_config_name: str | None = flag(None, "The configuration of the dataset.")
    dataset_split: str | None = flag(None, "The split to compare with.")
    train_data_dir: str | None = flag(None, "A folder with one folder of images for each class, named after it.")
    image_column: str | None = flag(None, "The column with the images.")
    label_column: str | None = flag(None, "The column with the class labels.")
