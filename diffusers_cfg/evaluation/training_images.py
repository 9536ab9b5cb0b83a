"""Compare samples with the images that a model was trained on, and with images that were held out from them."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import training_dataset
from diffusers_cfg.data.images import ImageSubset, LabelledImages
from diffusers_cfg.data.sources import load_labelled_images
from diffusers_cfg.evaluation.likelihood_data import choose_images, model_classes
from diffusers_cfg.evaluation.memorisation import (
    CLOSEST,
    MAX_COMPARED,
    MAX_SEARCHED,
    Neighbours,
    close_share,
    find_nearest,
    random_indices,
)
from diffusers_cfg.evaluation.records import data_config, names_data, recorded_data
from diffusers_cfg.evaluation.reference import ReferenceFile
from diffusers_cfg.evaluation.sample_sets import SampleSet
from diffusers_cfg.evaluation.settings import EvaluationConfig, LikelihoodConfig


class TrainingImages:
    """
    The images that a model was trained on, and images that were held out.

    Args:
        dataset (`Dataset`, *optional*): the decoded training images, if they are at hand.
        class_counts (`dict[str, int]`): the number of training images of each class; empty without a dataset.
        flips (`bool`): whether training mirrored images at random.
        held_out (`tuple[torch.Tensor, torch.Tensor]`, *optional*): the held-out images, `(images, 3, height, width)`,
            uint8, and their classes, `(images,)`.
        missing (`str`): why the dataset or the held-out images are missing, for the report.
        device (`torch.device`): the device of the search for the nearest images.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        class_counts: dict[str, int],
        flips: bool,
        held_out: tuple[torch.Tensor, torch.Tensor] | None,
        missing: str,
        device: torch.device,
    ) -> None:
        self.dataset, self.class_counts, self.flips = dataset, class_counts, flips
        self.held_out, self.missing, self.device = held_out, missing, device
        self._nearest: dict[Path, Neighbours] = {}

    @cached_property
    def held_out_neighbours(self) -> Neighbours | None:
        """The held-out images with their nearest training images."""
        if self.dataset is None or self.held_out is None:
            return None
        return find_nearest(*self.held_out, self.dataset, self.flips, self.device)

    def nearest(self, samples: SampleSet) -> Neighbours:
        """Find the nearest training images of the first `MAX_COMPARED` samples. The dataset must be at hand."""
        assert self.dataset is not None
        if samples.folder not in self._nearest:
            shards = [samples.load(shard) for shard in samples.shards if shard.start < MAX_COMPARED]
            images = torch.cat([torch.from_numpy(shard.images) for shard in shards]).movedim(-1, 1)[:MAX_COMPARED]
            labels = torch.cat([torch.from_numpy(shard.class_labels) for shard in shards])[:MAX_COMPARED]
            found = find_nearest(images, labels, self.dataset, self.flips, self.device)
            self._nearest[samples.folder] = found
        return self._nearest[samples.folder]

    def compare(self, sets: dict[float, SampleSet], record: dict[str, Any]) -> None:
        """
        Add to the record of a sweep the number of training images of each class, whether its samples are close to
        training images (`close_share`), and a text that explains it or says why it is not measured.

        Args:
            sets (`dict[float, SampleSet]`): the samples of each w.
            record (`dict[str, Any]`): the contents of metrics.json, with a row in `results` for each w.
        """
        if self.dataset is not None:
            record["training_images"] = self.class_counts
        if self.dataset is None or self.held_out_neighbours is None:
            record["memorisation"] = f"Memorisation is not measured: {self.missing}"
            return
        shares = [close_share(self.nearest(samples), self.held_out_neighbours) for samples in sets.values()]
        measured = [share for share in shares if not isinstance(share, str)]
        if reasons := [share for share in shares if isinstance(share, str)]:
            record["memorisation"] = f"Memorisation is not measured: {reasons[0]}"
            return
        for row, share in zip(record["results"], measured, strict=True):
            row["close_to_training"] = share["close_to_training"]
        first = measured[0]  # the floor and its interval are the same for all w, which have the same classes
        low, high = first["interval"]
        if record["floor"]:
            record["floor"] |= {"close_to_training": first["floor"], "close_to_training_interval": [low, high]}
        searched = min(len(self.dataset.class_labels), MAX_SEARCHED)
        record["memorisation"] = (
            f"Close to training: the share of {first['num_samples']} samples that are as close to one of "
            f"{searched:,} training images as the closest {CLOSEST:.0%} of {first['num_held_out']} held-out "
            f"images are (root mean square distance of pixels). A model that copies nothing has {low:.3f} to "
            f"{high:.3f} (95 % bootstrap interval), and one that copies all 1."
        )


def load_training_images(
    config: EvaluationConfig, pipeline: CFGPipeline, dataset: Dataset | ReferenceFile, device: torch.device
) -> TrainingImages:
    """
    Load the training images of a model, and up to `MAX_COMPARED` images that were held out from them: those of
    `--train_val_split`, of the split or dataset that the settings name, or of the split test or validation.

    Args:
        config (`EvaluationConfig`): the settings.
        pipeline (`CFGPipeline`): the model.
        dataset (`Dataset` or `ReferenceFile`): the decoded images that samples are compared with, which may be the
            training images. With reference statistics no image is read.
        device (`torch.device`): the device of the search for the nearest images.
    """
    if isinstance(dataset, ReferenceFile):
        return TrainingImages(None, {}, False, None, "with --reference, training images are not read.", device)
    recorded = recorded_data(config.model, pipeline) or {}
    if not recorded or recorded.get("streaming"):
        why = "on a stream" if recorded else "on unknown images"
        return TrainingImages(None, {}, False, None, f"{config.model} was trained {why}.", device)
    held_out, missing = None, ""
    try:
        trained = data_config(config.model, {}, pipeline)
        images = load_labelled_images(trained)
        is_evaluated = not names_data(config.given_data) and "dataset_split" not in config.given_data
        counts = count_classes(images, pipeline, config.model)
        training = dataset if is_evaluated else training_dataset(images, trained, pipeline.image_shape[0], True)
    except UserError as error:
        return TrainingImages(None, {}, False, None, f"the training images cannot be read. {error}", device)
    try:
        held_out = load_held_out(config, pipeline, recorded)
    except UserError as error:
        missing = str(error)
    return TrainingImages(training, counts, bool(recorded.get("random_flip")), held_out, missing, device)


def load_held_out(
    config: EvaluationConfig, pipeline: CFGPipeline, recorded: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return held-out images, uint8 RGB, and their classes. Raise `UserError` if none are known."""
    given = dict(config.given_data)
    if given.get("dataset_split") == recorded.get("dataset_split"):
        given.pop("dataset_split", None)  # that of the training images, which samples are compared with
    images, _, settings, _ = choose_images(LikelihoodConfig(model=config.model, **given), pipeline)
    ids = model_classes(images, pipeline, config.model)
    chosen = ImageSubset(images, random_indices(len(images), MAX_COMPARED, "held out").numpy())
    decoded = training_dataset(chosen, settings, pipeline.image_shape[0], show_progress=True)
    batch = decoded.__getitems__(list(range(len(decoded.class_labels))))
    return batch.images_rgb, torch.where(batch.class_labels < 0, -1, ids[batch.class_labels])


def count_classes(images: LabelledImages, pipeline: CFGPipeline, model: str) -> dict[str, int]:
    """Return the number of images of each class of the model, by name."""
    labels = torch.from_numpy(images.class_labels)
    ids = model_classes(images, pipeline, model)[labels[labels >= 0]]
    counts = torch.bincount(ids, minlength=pipeline.num_classes).tolist()
    return {pipeline.id2label.get(class_id, str(class_id)): count for class_id, count in enumerate(counts)}
