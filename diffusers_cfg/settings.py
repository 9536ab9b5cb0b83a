"""Declare the settings of the data, and those of the training runs of all methods."""

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
        0.0,
        "Fraction of the images that is held out from training, for evaluate_cfg.py and evaluate_likelihood.py.",
        at_least=0,
        below=1,
    )
    stack: Literal[1, 3] = fixed(
        1,
        "3: train on 120,000 images whose channels are three grayscale images of the data, without labels (stacked "
        "MNIST).",
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
        if self.stack > 1 and self.streaming:
            raise UserError(
                f"--stack {self.stack} chooses among all images, which --streaming does not know in advance. Leave out "
                "one of them."
            )
        if self.stack > 1 and self.train_val_split:
            raise UserError(
                f"--stack {self.stack} cannot be combined with --train_val_split {self.train_val_split:g}. Leave it "
                "out: stacked images are evaluated by the modes that samples reach, without held-out images."
            )
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
        digits (`Mapping[str, Any]`): the defaults for the built-in digits.
        replaced (`Mapping[str, set[str]]`): the settings that a pretrained network or its config replaces, by the name
            of the setting that names it.
    """

    group = "training"
    digits: ClassVar[Mapping[str, Any]] = DIGITS
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
        if self.stack > 1 and self.eval_steps:
            raise UserError(
                f"--eval_steps evaluates samples of each class, but the images of --stack {self.stack} have none. "
                "Leave it out, or use studies/modes.py."
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
        return {} if names_data else {**cls.digits}

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


def settings_of_run(
    folder: str, config_class: type[DataConfig], names: set[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Return settings of the run in a folder, if it contains a train_config.yaml.

    Args:
        folder (`str`): the output folder of a run of any method, or the name of a repository, which has no such file.
        config_class (`type[DataConfig]`): the settings to read. Those that only other classes have are ignored.
        names (`set[str]`): the names of the settings to return.
        values (`Mapping[str, Any]`): the settings of this run. If they name other data, `train_val_split` is left out:
            which images are held out is a matter of the data.
    """
    path = Path(folder).expanduser() / CONFIG_FILE
    if not path.is_file():
        return {}
    of_run = read_yaml(
        path, config_class, ignored={f.name for config in methods_of(TrainConfig) for f in fields(config)}
    )
    settings = {name: value for name, value in of_run.items() if name in names}
    given = {f.name: values[f.name] for f in fields(DataConfig) if values[f.name] != default_of(f)}
    if "train_data_dir" in given:
        settings |= {"dataset_name": None, "dataset_config_name": None}
    elif "dataset_name" in given:
        settings["train_data_dir"] = None
    if data_source({**settings, **given}) != data_source(settings):
        settings.pop("train_val_split", None)
    return settings


def methods_of(config_class: type[TrainConfig]) -> list[type[TrainConfig]]:
    """Return the settings of all methods: a class and its subclasses."""
    return [config_class, *(config for subclass in config_class.__subclasses__() for config in methods_of(subclass))]
