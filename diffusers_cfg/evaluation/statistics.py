"""Accumulate statistics of image sets: sums over the features of samples, and of the real images, kept on disk."""

import json
import logging
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import fingerprint
from diffusers_cfg.evaluation.features import SMALL, FeatureExtractor, pretrained_extractor, small_classifier
from diffusers_cfg.evaluation.metrics import matrix_sqrt, mean_and_covariance
from diffusers_cfg.files import write_safetensors
from diffusers_cfg.randomness import seed_of, seeded_generator

logger = logging.getLogger(__name__)

# Splits of the inception score, and blocks that the standard errors leave out one at a time.
BLOCKS = 10
# Images of a set whose features are kept, for metrics of neighbours and kernels.
MAX_NEIGHBOURS = 10_000
# Images that pass through the extractor at a time.
BATCH_SIZE = 250


class Summary:
    """
    Statistics of a set of images: sums over their features in float64, and the features of the first of them. Its size
    does not grow with the number of images.

    Args:
        num_images (`int`): of the whole set.
        num_features (`int`), num_classes (`int`): of the extractor.
        moment_blocks (`int`): the number of blocks, in order, for which the sums of features are kept separately.
    """

    def __init__(self, num_images: int, num_features: int, num_classes: int, moment_blocks: int = BLOCKS):
        self.num_images, self.num_classes, self.moment_blocks = num_images, num_classes, moment_blocks
        self.sums = {
            "count": torch.zeros(moment_blocks),
            "total": torch.zeros(moment_blocks, num_features),
            "outer": torch.zeros(moment_blocks, num_features, num_features),
            "split_count": torch.zeros(BLOCKS),
            "probabilities": torch.zeros(BLOCKS, num_classes),
            "negative_entropy": torch.zeros(BLOCKS),
            # Images by split and requested class, and how many of them are classified as requested
            "right": torch.zeros(BLOCKS, num_classes),
            "asked": torch.zeros(BLOCKS, num_classes),
        }
        self.sums = {name: value.double() for name, value in self.sums.items()}
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(
        self, indices: torch.Tensor, features: torch.Tensor, logits: torch.Tensor | None, class_labels: torch.Tensor
    ) -> None:
        """
        Add images.

        Args:
            indices (`torch.Tensor` of shape `(images,)`): their places in the set, `0 … num_images - 1`.
            features (`torch.Tensor` of shape `(images, features)`): the extractor's.
            logits (`torch.Tensor` of shape `(images, classes)`, *optional*): the extractor's.
            class_labels (`torch.Tensor` of shape `(images,)`): the requested classes in the extractor's ids, or -1.

        Raises:
            UserError: features are not finite.
        """
        if not torch.isfinite(features).all():
            raise UserError(f"{(~torch.isfinite(features)).any(1).sum()} images have features that are not finite.")
        indices, features, class_labels = indices.cpu(), features.double().cpu(), class_labels.cpu()
        kept = indices < MAX_NEIGHBOURS
        if kept.any():
            self.kept.append((indices[kept], features[kept].float()))
        for block, rows in self._blocks(indices, self.moment_blocks):
            self.sums["count"][block] += len(rows)
            self.sums["total"][block] += features[rows].sum(0)
            self.sums["outer"][block] += features[rows].T @ features[rows]
        if logits is None:
            return
        log_probabilities = logits.double().cpu().log_softmax(1)
        probabilities, right = log_probabilities.exp(), log_probabilities.argmax(1) == class_labels
        for split, rows in self._blocks(indices, BLOCKS):
            self.sums["split_count"][split] += len(rows)
            self.sums["probabilities"][split] += probabilities[rows].sum(0)
            self.sums["negative_entropy"][split] += (probabilities[rows] * log_probabilities[rows]).sum()
            asked = rows[class_labels[rows] >= 0]
            self.sums["asked"][split].index_add_(0, class_labels[asked], torch.ones(len(asked)).double())
            self.sums["right"][split].index_add_(0, class_labels[asked], right[asked].double())

    def _blocks(self, indices: torch.Tensor, blocks: int) -> Iterable[tuple[int, torch.Tensor]]:
        block_of = indices * blocks // self.num_images
        return [(block, (block_of == block).nonzero().flatten()) for block in block_of.unique().tolist()]

    def reduce(self, accelerator: Accelerator) -> "Summary":
        """Combine the parts that the processes have added. Returns the summary itself."""
        if accelerator.num_processes > 1:
            for name, value in self.sums.items():
                self.sums[name] = accelerator.reduce(value.to(accelerator.device), reduction="sum").cpu()
            self.kept = gather_object(self.kept)
        return self

    @property
    def features(self) -> torch.Tensor:
        """The features of the first images, `(up to MAX_NEIGHBOURS, features)`, in the order of their places."""
        places, features = (torch.cat(column) for column in zip(*self.kept, strict=True))
        return features[places.argsort()]

    def moments(self, blocks: torch.Tensor | slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the covariance of the features, of all blocks or of some."""
        return mean_and_covariance(*(self.sums[name][blocks].sum(0) for name in ("count", "total", "outer")))


class Summarizer:
    """
    Add images to summaries by way of a feature extractor.

    Args:
        extractor (`FeatureExtractor`): on `device`.
        id2label (`dict[int, str]`): the names of the data's classes.
        device (`torch.device`): where features are extracted.
    """

    def __init__(self, extractor: FeatureExtractor, id2label: dict[int, str], device: torch.device):
        self.extractor, self.device = extractor.to(device), device
        theirs = {label: class_id for class_id, label in (extractor.id2label or {}).items()}
        # The extractor's id of each of the data's classes and, last, of -1; -1 for a class that it does not have.
        self.class_map = torch.tensor([*(theirs.get(id2label[class_id], -1) for class_id in sorted(id2label)), -1])

    def new_summary(self, num_images: int, moment_blocks: int = BLOCKS) -> Summary:
        """Return an empty summary."""
        return Summary(num_images, self.extractor.num_features, self.extractor.num_classes, moment_blocks)

    @torch.no_grad()
    def add(self, summary: Summary, places: torch.Tensor, images: torch.Tensor, class_labels: torch.Tensor) -> None:
        """
        Add images to a summary.

        Args:
            summary (`Summary`): from `new_summary`.
            places (`torch.Tensor` of shape `(images,)`): places in the set.
            images (`torch.Tensor` of shape `(images, 3, height, width)`): uint8.
            class_labels (`torch.Tensor` of shape `(images,)`): the requested classes in the data's ids, or -1.
        """
        for rows in torch.arange(len(places)).split(BATCH_SIZE):
            features, logits = self.extractor(images[rows].to(self.device))
            summary.add(places[rows], features, logits, self.class_map[class_labels[rows]])


class Reference(NamedTuple):
    """Statistics of real images that a set of images is measured against."""

    moments: tuple[torch.Tensor, torch.Tensor]  # mean (features,) and covariance (features, features)
    sqrt_covariance: torch.Tensor  # (features, features)
    neighbours: torch.Tensor  # (images, features): for the metrics of neighbours and kernels


class RealStatistics:
    """
    Statistics of the real images under one feature extractor. They are read from a file if a former run wrote it.

    The images are split at random, with the classes in proportion, into a held-out part and the others. The held-out
    part stands in for samples: measured against the others it gives the floor, the values of a perfect model. It has as
    many images as there are samples, but at most half of all. Samples are measured against all real images, except by
    precision, recall, density, coverage and the kernel distance: these compare as many samples with as many of the
    others as there are images in the held-out part.

    Args:
        accelerator (`Accelerator`): the processes that share the work.
        dataset (`Dataset`): the real images, uint8, with their `class_labels`; unlabelled images are left out.
        id2label (`dict[int, str]`): the names of its classes.
        feature_extractor (`str`): "small", "inception", "dinov2", or an image classifier of transformers by its name.
        num_samples (`int`): images in a set of samples, at least 20.
        statistics_dir (`Path`): where the statistics and the small classifier are kept.

    Attributes:
        summarizer (`Summarizer`): adds samples to summaries.
        held_out (`Summary`), others (`Summary`): the two parts.
        num_real (`int`), num_held_out (`int`): the number of all images, and of those in the held-out part.

    Raises:
        UserError: there are too few images, the extractor cannot be loaded, or the file is of other data.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: Dataset,
        id2label: dict[int, str],
        feature_extractor: str,
        num_samples: int,
        statistics_dir: Path,
    ):
        labelled = (dataset.class_labels >= 0).nonzero().flatten()
        for number, low, kind in ((num_samples, 2 * BLOCKS, "samples"), (len(labelled), 4 * BLOCKS, "labelled images")):
            if number < low:
                raise UserError(f"{number} {kind} are too few to be measured: at least {low} are needed.")
        self.accelerator, self.num_samples = accelerator, num_samples
        self.num_real = len(labelled)
        self.num_held_out = min(num_samples, self.num_real // 2)

        data_name = fingerprint(dataset)
        if feature_extractor == SMALL:
            with accelerator.main_process_first():  # the others find it in the folder
                self.extractor = small_classifier(dataset, data_name, id2label, statistics_dir)
        else:
            self.extractor = pretrained_extractor(feature_extractor)
        self._warn_of_rank()
        self.summarizer = Summarizer(self.extractor, id2label, accelerator.device)

        order = labelled[stratified_order(dataset.class_labels[labelled])]
        parts = {"held_out": order[: self.num_held_out], "others": order[self.num_held_out :]}
        summaries = {part: self.summarizer.new_summary(len(places), moment_blocks=1) for part, places in parts.items()}
        identity = {"data": data_name, "feature_extractor": self.extractor.name, "held_out": str(self.num_held_out)}
        path = statistics_dir / f"statistics-{seed_of(*identity.values()):016x}.safetensors"
        if path.is_file():
            read_summaries(path, identity, summaries)
        else:
            for part, places in parts.items():
                self._sum_up(dataset, places, summaries[part])
            if accelerator.is_main_process:
                write_summaries(path, identity, summaries)
        accelerator.wait_for_everyone()
        self.held_out, self.others = summaries["held_out"], summaries["others"]

    def _warn_of_rank(self) -> None:
        for kind, number in (("samples", self.num_samples), ("real images", self.num_real)):
            if number <= self.extractor.num_features:
                logger.warning(
                    "%d %s are no more than the %d features of %s: the covariance does not have full rank, and the "
                    "Fréchet distance is far too large. Draw more, or use an extractor with fewer features.",
                    *(number, kind, self.extractor.num_features, self.extractor.name),
                )

    def _sum_up(self, dataset: Dataset, indices: torch.Tensor, summary: Summary) -> None:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        places = torch.arange(len(indices)).split(BATCH_SIZE)
        for mine in tqdm(places[rank::world_size], "Real images", leave=False, disable=rank != 0):
            batch = dataset.__getitems__(indices[mine].tolist())
            self.summarizer.add(summary, mine, batch.images_rgb, batch.class_labels)
        summary.reduce(self.accelerator)

    @cached_property
    def neighbours(self) -> torch.Tensor:
        """The features of some of the others, `(at most num_held_out, features)`, on the accelerator's device."""
        features = self.others.features
        return features[: min(len(features), len(self.held_out.features))].to(self.accelerator.device)

    @cached_property
    def reference(self) -> Reference:
        """All real images, for samples to be measured against."""
        names = ("count", "total", "outer")
        moments = mean_and_covariance(*((self.others.sums[n] + self.held_out.sums[n]).sum(0) for n in names))
        return Reference(moments, matrix_sqrt(moments[1]), self.neighbours)

    @property
    def reference_without_held_out(self) -> Reference:
        """The others, for the held-out part to be measured against."""
        moments = self.others.moments()
        return Reference(moments, matrix_sqrt(moments[1]), self.neighbours)

    def record(self) -> dict[str, Any]:
        """Return how metrics are measured, for JSON. Two values are comparable if this is the same for both."""
        return {
            "num_samples": self.num_samples,
            "feature_extractor": {
                "name": self.extractor.name,
                "resize": self.extractor.resize,
                "num_features": self.extractor.num_features,
                "accuracy": self.extractor.accuracy,
            },
            "num_real": self.num_real,
            "num_neighbours": len(self.neighbours),
            "num_held_out": self.num_held_out,
        }


def stratified_order(class_labels: torch.Tensor) -> torch.Tensor:
    """Return a random order of images, `(images,)`, in which every prefix has the classes in proportion."""
    order = torch.randperm(len(class_labels), generator=seeded_generator("cpu", "order of the real images"))
    place = torch.empty(len(order), dtype=torch.float64)
    for class_id in class_labels.unique():
        members = class_labels[order] == class_id
        place[members] = (torch.arange(int(members.sum())) + 0.5).double() / members.sum()
    return order[place.argsort(stable=True)]


def write_summaries(path: Path, identity: dict[str, str], summaries: dict[str, Summary]) -> None:
    """Write summaries of the real images, by part, with what they are of."""
    tensors = {}
    for part, summary in summaries.items():
        tensors |= {f"{part}.{name}": value for name, value in summary.sums.items()}
        tensors[f"{part}.features"] = summary.features
    write_safetensors(tensors, identity, path)


def read_summaries(path: Path, identity: dict[str, str], summaries: dict[str, Summary]) -> None:
    """Fill summaries from a file of `write_summaries`. Raises UserError if it has another identity."""
    with safe_open(path, "pt") as file:
        found = file.metadata()
        if found != identity:
            raise UserError(
                f"{path} holds the statistics of something else ({json.dumps(found)}) than what is evaluated "
                f"({json.dumps(identity)}): delete it."
            )
        for part, summary in summaries.items():
            summary.sums = {name: file.get_tensor(f"{part}.{name}") for name in summary.sums}
            features = file.get_tensor(f"{part}.features")
            summary.kept = [(torch.arange(len(features)), features)]
