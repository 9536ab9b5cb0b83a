"""Choose the classes of samples. Classes without images in the data are not drawn, since no model knows them."""

import logging

import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.labels import UNLABELLED, listed
from diffusers_cfg.evaluation.records import run_record
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.randomness import seeded_generator

logger = logging.getLogger(__name__)


def classes_of(class_labels: torch.Tensor) -> torch.Tensor:
    """Return the ids of the classes among the labels of images, in ascending order, without -1."""
    return class_labels[class_labels >= 0].unique()


def balanced_class_labels(classes: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Return the class of each sample, `(num_samples,)`: the classes in turn. Warn if there are more classes."""
    if num_samples < len(classes):
        logger.warning(
            "Only the first %d of %d classes are drawn, because there are %d samples. Raise the number of samples.",
            num_samples,
            len(classes),
            num_samples,
        )
    return classes[torch.arange(num_samples) % len(classes)]


def choose_class_labels(config: EvaluationConfig, data_labels: torch.Tensor) -> torch.Tensor:
    """
    Choose the class of each sample by `config.class_labels`. The classes are the same for every w.

    Args:
        config (`EvaluationConfig`): the settings, of which `class_labels`, `num_samples` and `seed` are used.
        data_labels (`torch.Tensor` of shape `(images,)`): the labels of the real images, -1 for unlabelled images.

    Returns:
        `torch.Tensor` of shape `(num_samples,)`: class ids, int64.
    """
    classes = classes_of(data_labels)
    if config.class_labels == "balanced":
        return balanced_class_labels(classes, config.num_samples)
    labels = data_labels[data_labels >= 0] if config.class_labels == "data" else classes
    chosen = [
        torch.randint(len(labels), (), generator=seeded_generator("cpu", config.seed, "class label", index))
        for index in range(config.num_samples)
    ]
    return labels[torch.stack(chosen)]


def parse_class_labels(names: list[str] | None, pipeline: CFGPipeline) -> list[int]:
    """
    Return the ids of classes that are given by name or id. A name takes precedence over an id.

    Args:
        names (`list[str]`, *optional*): the names or ids, where -1 is the null class. By default all classes that had
            images in training, or the null class if none had.
        pipeline (`CFGPipeline`): the pipeline with the classes.

    Raises:
        UserError: if a class is unknown.
    """
    num_classes = pipeline.num_classes
    absent = classes_without_images(pipeline)
    if names is None:
        return [class_id for class_id in range(num_classes) if class_id not in absent] or [UNLABELLED]
    label2id = {name: class_id for class_id, name in pipeline.id2label.items()}
    ids = {str(class_id): class_id for class_id in range(-1, num_classes)} | label2id
    unknown = [name for name in names if name not in ids]
    if unknown:
        hint = " Ids start at 0, and the null class is -1." if str(num_classes) in unknown else ""
        raise UserError(
            f"--class_labels has unknown classes: {' '.join(name or repr(name) for name in unknown)}. The classes are "
            f"{listed([*ids], 50)}.{hint}"
        )
    if untrained := [name for name in names if ids[name] in absent]:
        logger.warning("The training data had no images of these classes: %s", ", ".join(untrained))
    return [ids[name] for name in names]


def classes_without_images(pipeline: CFGPipeline) -> set[int]:
    """Return the ids of the classes of a model that had no images in training, as far as its run.json says."""
    facts = run_record(pipeline).get("method")
    absent = facts.get("classes_without_images") if isinstance(facts, dict) else None
    return set(absent) if isinstance(absent, list) else set()
