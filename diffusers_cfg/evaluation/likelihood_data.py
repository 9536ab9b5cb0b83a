"""Choose the images of a likelihood: held out from training unless the settings ask for the training images."""

import hashlib
import logging
import re
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import training_dataset
from diffusers_cfg.data.images import ImageSubset, LabelledImages, require_8_bits, split_images
from diffusers_cfg.data.labels import listed
from diffusers_cfg.data.naming import local_name
from diffusers_cfg.data.sources import load_all_images, load_labelled_images, split_names
from diffusers_cfg.evaluation.records import data_config, names_data, recorded_data, run_record
from diffusers_cfg.evaluation.settings import MAX_IMAGES, LikelihoodConfig
from diffusers_cfg.randomness import seeded_generator
from diffusers_cfg.settings import DataConfig, data_source

logger = logging.getLogger(__name__)

# The splits of a dataset that are held out from training by convention.
HELD_OUT_SPLITS = ("test", "validation")
# The settings that name the data, apart from its split
SOURCES = ("dataset_name", "train_data_dir", "dataset_config_name")


class EvaluatedImages(NamedTuple):
    """The images of a likelihood."""

    dataset: Dataset  # whose `class_labels` are the ids of the data
    class_labels: torch.Tensor  # (images,), int64: the ids of the model; -1 means unlabelled
    class_log_probs: torch.Tensor  # (num_classes,), float64: log p(c)
    facts: dict[str, Any]  # for the report
    fingerprint: str  # changes with any image, and with how they are decoded


class Chosen(NamedTuple):
    """The images that the settings choose, before they are decoded."""

    images: LabelledImages
    training: LabelledImages | None  # the training images, if they are known
    config: DataConfig
    part: str  # which images of the data these are, for the report


def load_images(config: LikelihoodConfig, pipeline: CFGPipeline, show_progress: bool) -> EvaluatedImages:
    """
    Load the images of a likelihood with the channels and the resolution of the model.

    Args:
        config (`LikelihoodConfig`): the settings.
        pipeline (`CFGPipeline`): the model.
        show_progress (`bool`): whether to show a progress bar while the images are decoded.

    Raises:
        UserError: if no held-out images are known, or the images do not fit the model or have more than 8 bits.
    """
    images, training, settings, part = choose_images(config, pipeline)
    channels, resolution, _ = pipeline.image_shape
    ids = model_classes(images, pipeline, config.model)
    chosen = random_part(images, config.num_images or MAX_IMAGES)
    require_8_bits(chosen)
    dataset = training_dataset(chosen, settings, channels, show_progress)
    facts = {
        "dataset": local_name(settings),
        "images": part,
        "num_images": len(dataset.class_labels),
        "num_available": len(images),
        "resized": is_resized(chosen, resolution),
        "trained_with_flips": bool((recorded_data(config.model, pipeline) or {}).get("random_flip")),
        "class_frequencies": "taken as equal" if training is None else "those of the training images",
    }
    decoded = (resolution, channels, settings.center_crop)
    return EvaluatedImages(
        dataset=dataset,
        class_labels=torch.where(dataset.class_labels < 0, -1, ids[dataset.class_labels]),
        class_log_probs=class_log_probs(training, pipeline, config.model),
        facts=facts,
        fingerprint=hashlib.sha256(
            f"{images.fingerprint()} {images.class_labels.tolist()} {decoded}".encode()
        ).hexdigest(),
    )


def class_log_probs(training: LabelledImages | None, pipeline: CFGPipeline, model: str) -> torch.Tensor:
    """Return log p(c) from the frequencies of the classes in training, or of equal ones if they are not known."""
    counts = torch.ones(pipeline.unet.num_classes, dtype=torch.float64)
    if training is not None:
        labels = torch.from_numpy(training.class_labels)
        ids = model_classes(training, pipeline, model)
        # One more than counted: a class without training images has no infinite term.
        counts += torch.bincount(ids[labels[labels >= 0]], minlength=len(counts))
    return (counts / counts.sum()).log()


def random_part(images: LabelledImages, number: int) -> LabelledImages:
    """Return up to `number` images, drawn at random. Those of a smaller number are the first of a larger one."""
    order = torch.randperm(len(images), generator=seeded_generator("cpu", "likelihood images"))
    return ImageSubset(images, order[:number].numpy())


def choose_images(config: LikelihoodConfig, pipeline: CFGPipeline) -> Chosen:
    """
    Choose the images by the settings, and never the training images without being asked.

    Args:
        config (`LikelihoodConfig`): the settings.
        pipeline (`CFGPipeline`): the model.

    Raises:
        UserError: if the settings contradict each other, or no held-out images are known.
    """
    model, recorded = config.model, recorded_data(config.model, pipeline)
    given = without_source_of(recorded, config.given_data)
    other = [name for name in SOURCES if name in given]
    if not other:
        return images_of_run(config, given, pipeline)
    if config.images == "training":
        raise UserError(
            f"--images training are those of the training run, but --{other[0]} names other data. Leave out one of the "
            "two."
        )
    settings = data_config(model, given, pipeline)
    images = load_labelled_images(settings, needs_labels="label_column" in given)
    channels, kinds = pipeline.image_shape[0], {1: "grayscale", 3: "RGB"}
    if images.channels != channels:
        raise UserError(
            f"The data has {kinds[images.channels]} images, but {model} models {kinds[channels]} images. Pass data of "
            "the same kind."
        )
    training = None if recorded is None else training_images(data_config(model, {}, pipeline), recorded)
    return Chosen(images, training, settings, f"other data, split {settings.dataset_split}")


def without_source_of(recorded: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return given settings of the data, without those that name the dataset that the training run has recorded."""
    if recorded is None:
        return given
    named = {"dataset_config_name": recorded.get("dataset_config_name"), **given}
    is_same = not names_data(given) or data_source(named)[:2] == data_source(recorded)[:2]
    unchanged = {name for name in SOURCES if is_same and named.get(name) == recorded.get(name)}
    if is_same and names_data(given):
        unchanged |= {"dataset_name", "train_data_dir"}
    return {name: value for name, value in given.items() if name not in unchanged}


def images_of_run(config: LikelihoodConfig, given: dict[str, Any], pipeline: CFGPipeline) -> Chosen:
    """
    Choose images of the dataset of the training run.

    Args:
        config (`LikelihoodConfig`), pipeline (`CFGPipeline`): as in `choose_images`.
        given (`dict[str, Any]`): the given settings of the data, which do not name it.
    """
    model, recorded = config.model, recorded_data(config.model, pipeline) or {}
    if run_record(pipeline).get("method", {}).get("trained_network") == "classifier":
        raise UserError(
            f"{model} was saved by the run of its classifier, whose held-out images the diffusion model may have been "
            "trained on. Evaluate the diffusion model that the run started from, or name held-out data with "
            "--dataset_name or --train_data_dir."
        )
    trained, split = data_config(model, {}, pipeline), given.pop("dataset_split", None)
    if split == trained.dataset_split and config.images == "held_out":
        raise UserError(
            f"--dataset_split {split} is the split that {model} was trained on. Leave it out to evaluate held-out "
            "images, or pass --images training to evaluate those it was trained on."
        )
    if split not in (None, trained.dataset_split) and config.images == "training":
        raise UserError(
            f"--images training are those of the split {trained.dataset_split}. Leave out --dataset_split {split}, or "
            "--images training."
        )
    settings, fraction = data_config(model, given, pipeline), trained.train_val_split
    if config.images == "training":
        images = load_labelled_images(settings, needs_labels=False)
        return Chosen(images, images, settings, "training images")
    if split is None and fraction:
        training, images = split_images(load_all_images(settings, needs_labels=False), fraction)
        return Chosen(images, training, settings, f"held out by --train_val_split {fraction:g}")
    split = split or held_out_split(trained)
    if split is None:
        raise UserError(
            f"{model} was trained on all images of {local_name(trained)}, and no split of it is held out. Train with "
            "--train_val_split, or name held-out data with --dataset_split, --dataset_name or --train_data_dir. "
            "--images training evaluates the training images."
        )
    settings = data_config(model, {**given, "dataset_split": split}, pipeline)
    images = load_labelled_images(settings, needs_labels=False)
    return Chosen(images, training_images(trained, recorded), settings, f"split {split}")


def held_out_split(config: DataConfig) -> str | None:
    """Return the first of `HELD_OUT_SPLITS` that the training data has, and that the run was not trained on."""
    names = split_names(config)
    trained = re.findall(r"\w+", config.dataset_split)
    return next((name for name in HELD_OUT_SPLITS if name in names and name not in trained), None)


def training_images(trained: DataConfig, recorded: dict[str, Any]) -> LabelledImages | None:
    """Return the images of the training run, for the frequencies of its classes, or `None` if they are not at hand."""
    if recorded.get("streaming"):
        return None
    try:
        return load_labelled_images(trained, needs_labels=False)
    except UserError as error:
        logger.warning("The frequencies of the classes in training are not known, and taken as equal: %s", error)
        return None


def model_classes(images: LabelledImages, pipeline: CFGPipeline, model: str) -> torch.Tensor:
    """Return the model's id of each class of the data, by name. Raise `UserError` if the model does not know one."""
    if not pipeline.id2label and len(images.id2label) <= pipeline.unet.num_classes:
        return torch.arange(pipeline.unet.num_classes)
    known = {name: class_id for class_id, name in pipeline.id2label.items()}
    unknown = [name for class_id, name in sorted(images.id2label.items()) if name not in known]
    if unknown:
        raise UserError(
            f"The data has classes that {model} does not know: {listed(unknown)}. Its classes are "
            f"{listed([*known]) or f'0 … {pipeline.unet.num_classes - 1}'}. Pass data with these classes."
        )
    return torch.tensor([known[images.id2label[class_id]] for class_id in range(len(images.id2label))] or [-1])


def is_resized(images: LabelledImages, resolution: int) -> bool:
    """Return whether images have another size in their files than that of the model."""
    for index in range(len(images)):
        with suppress(Exception):  # unreadable images are counted when the dataset is decoded
            if images.open_image(index).size != (resolution, resolution):
                return True
    return False
