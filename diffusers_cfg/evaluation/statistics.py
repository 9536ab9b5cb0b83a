"""Accumulate feature statistics of samples and real images, and cache those of the real images on disk."""

import logging
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_cfg.config import UserError
from diffusers_cfg.data.datasets import fingerprint
from diffusers_cfg.evaluation.features import SMALL, FeatureExtractor, pretrained_extractor, small_classifier
from diffusers_cfg.evaluation.metrics import matrix_sqrt, mean_and_covariance
from diffusers_cfg.files import read_safetensors, write_safetensors
from diffusers_cfg.randomness import seed_of, seeded_generator
from diffusers_cfg.run_settings import MIN_SAMPLES

logger = logging.getLogger(__name__)

# Splits of the inception score, and blocks of the jackknife that gives standard errors.
BLOCKS = 10
# Images of a set whose features are stored, for the metrics of neighbours and kernels.
MAX_NEIGHBOURS = 10_000
# Images per batch of the feature extractor.
BATCH_SIZE = 250


class Summary:
    """
    Statistics of a set of images: sums over the features in float64, and the features of the first `MAX_NEIGHBOURS`
    images. Memory does not grow with the number of images.

    Args:
        num_images (`int`): the number of images in the whole set.
        num_features (`int`), num_classes (`int`): the numbers of features and classes of the extractor.
        moment_blocks (`int`): the number of consecutive blocks of images with separate sums of features.
        num_spatial_features (`int`): the number of spatial features of the extractor.
    """

    def __init__(
        self,
        num_images: int,
        num_features: int,
        num_classes: int,
        moment_blocks: int = BLOCKS,
        num_spatial_features: int = 0,
    ) -> None:
        self.num_images, self.num_classes, self.moment_blocks = num_images, num_classes, moment_blocks
        self.sums = {
            "count": torch.zeros(moment_blocks),
            "total": torch.zeros(moment_blocks, num_features),
            "outer": torch.zeros(moment_blocks, num_features, num_features),
            "split_count": torch.zeros(BLOCKS),
            "probabilities": torch.zeros(BLOCKS, num_classes),
            "negative_entropy": torch.zeros(BLOCKS),
            # Correctly classified images and all images, by split and requested class
            "right": torch.zeros(BLOCKS, num_classes),
            "asked": torch.zeros(BLOCKS, num_classes),
        }
        if num_spatial_features:
            self.sums["spatial_total"] = torch.zeros(moment_blocks, num_spatial_features)
            self.sums["spatial_outer"] = torch.zeros(moment_blocks, num_spatial_features, num_spatial_features)
        self.sums = {name: value.double() for name, value in self.sums.items()}
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(
        self,
        indices: torch.Tensor,
        features: torch.Tensor,
        logits: torch.Tensor | None,
        class_labels: torch.Tensor,
        spatial_features: torch.Tensor | None = None,
    ) -> None:
        """
        Add images to the statistics.

        Args:
            indices (`torch.Tensor` of shape `(images,)`): the indices of the images in the set, `0 … num_images - 1`.
            features (`torch.Tensor` of shape `(images, features)`): the features of the images.
            logits (`torch.Tensor` of shape `(images, classes)`, *optional*): the class logits of the images.
            class_labels (`torch.Tensor` of shape `(images,)`): the requested classes as ids of the extractor, or -1.
            spatial_features (`torch.Tensor` of shape `(images, spatial features)`, *optional*): the spatial features
                of the images.

        Raises:
            UserError: if some features are not finite.
        """
        finite = torch.isfinite(features).all(1)
        if spatial_features is not None:
            finite &= torch.isfinite(spatial_features).all(1)
        if not finite.all():
            count = int((~finite).sum())
            raise UserError(
                f"The feature extractor returned values that are not finite for {count} of {len(features)} images. Use "
                "a different --feature_extractor."
            )
        indices, features, class_labels = indices.cpu(), features.double().cpu(), class_labels.cpu()
        kept = indices < MAX_NEIGHBOURS
        if kept.any():
            self.kept.append((indices[kept], features[kept].float()))
        moments = {"": features}
        if spatial_features is not None:
            moments["spatial_"] = spatial_features.double().cpu()
        for block, rows in self._blocks(indices, self.moment_blocks):
            self.sums["count"][block] += len(rows)
            for kind, values in moments.items():
                self.sums[f"{kind}total"][block] += values[rows].sum(0)
                self.sums[f"{kind}outer"][block] += values[rows].T @ values[rows]
        if logits is None:
            return
        log_probabilities = logits.double().cpu().log_softmax(1)
        probabilities, correct = log_probabilities.exp(), log_probabilities.argmax(1) == class_labels
        for split, rows in self._blocks(indices, BLOCKS):
            self.sums["split_count"][split] += len(rows)
            self.sums["probabilities"][split] += probabilities[rows].sum(0)
            self.sums["negative_entropy"][split] += (probabilities[rows] * log_probabilities[rows]).sum()
            requested = rows[class_labels[rows] >= 0]
            self.sums["asked"][split].index_add_(0, class_labels[requested], torch.ones(len(requested)).double())
            self.sums["right"][split].index_add_(0, class_labels[requested], correct[requested].double())

    def _blocks(self, indices: torch.Tensor, blocks: int) -> Iterable[tuple[int, torch.Tensor]]:
        block_of = indices * blocks // self.num_images
        return [(block, (block_of == block).nonzero().flatten()) for block in block_of.unique().tolist()]

    def reduce(self, accelerator: Accelerator) -> "Summary":
        """Sum the statistics over all processes in-place. Return the summary itself."""
        if accelerator.num_processes > 1:
            for name, value in self.sums.items():
                self.sums[name] = accelerator.reduce(value.to(accelerator.device), reduction="sum").cpu()
            self.kept = gather_object(self.kept)
        return self

    @property
    def features(self) -> torch.Tensor:
        """The features of the first images, `(up to MAX_NEIGHBOURS, features)`, in order of index."""
        indices, features = (torch.cat(column) for column in zip(*self.kept, strict=True))
        return features[indices.argsort()]

    def moments(
        self, blocks: torch.Tensor | slice = slice(None), spatial: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the mean and the covariance of the features, or of the spatial features, over the selected blocks, by
        default all.
        """
        return mean_and_covariance(*(self.sums[name][blocks].sum(0) for name in moment_names(spatial)))


def moment_names(spatial: bool) -> tuple[str, str, str]:
    """Return the names in `Summary.sums` of the sums that give the moments of the features or the spatial features."""
    return ("count", "spatial_total", "spatial_outer") if spatial else ("count", "total", "outer")


class Summarizer:
    """
    A feature extractor that adds images to summaries.

    Args:
        extractor (`FeatureExtractor`): the network, which is moved to `device`.
        id2label (`dict[int, str]`): the names of the dataset's classes.
        device (`torch.device`): the device for feature extraction.
    """

    def __init__(self, extractor: FeatureExtractor, id2label: dict[int, str], device: torch.device) -> None:
        self.extractor, self.device = extractor.to(device), device
        label2id = {label: class_id for class_id, label in (extractor.id2label or {}).items()}
        # The extractor's id of each class of the dataset, -1 for a class that it lacks. The last element maps -1 to -1.
        self.class_map = torch.tensor([*(label2id.get(id2label[class_id], -1) for class_id in sorted(id2label)), -1])

    def new_summary(self, num_images: int, moment_blocks: int = BLOCKS) -> Summary:
        """Return an empty summary with the extractor's numbers of features and classes."""
        extractor = self.extractor
        return Summary(
            num_images, extractor.num_features, extractor.num_classes, moment_blocks, extractor.num_spatial_features
        )

    @torch.no_grad()
    def add(self, summary: Summary, indices: torch.Tensor, images: torch.Tensor, class_labels: torch.Tensor) -> None:
        """
        Extract the features of images and add them to a summary.

        Args:
            summary (`Summary`): a summary from `new_summary`.
            indices (`torch.Tensor` of shape `(images,)`): the indices of the images in the set.
            images (`torch.Tensor` of shape `(images, 3, height, width)`): uint8 images.
            class_labels (`torch.Tensor` of shape `(images,)`): the requested classes as ids of the dataset, or -1.
        """
        for rows in torch.arange(len(indices)).split(BATCH_SIZE):
            features, logits = self.extractor(images[rows].to(self.device))
            labels = self.class_map[class_labels[rows]]
            summary.add(indices[rows], features, logits, labels, self.extractor.spatial_features)


class Gaussian(NamedTuple):
    """The moments of the features of real images."""

    moments: tuple[torch.Tensor, torch.Tensor]  # mean (features,) and covariance (features, features)
    sqrt_covariance: torch.Tensor  # (features, features)

    @classmethod
    def from_moments(cls, moments: tuple[torch.Tensor, torch.Tensor]) -> "Gaussian":
        """Return the moments with the square root of the covariance."""
        return cls(moments, matrix_sqrt(moments[1]))


class Reference(NamedTuple):
    """Statistics of the real images that samples are compared with."""

    features: Gaussian
    spatial_features: Gaussian | None  # for the sFID
    neighbours: torch.Tensor | None  # (images, features), for the metrics of neighbours and kernels


def labelled_images(dataset: Dataset, num_samples: int) -> torch.Tensor:
    """Return the indices of a dataset's labelled images. Raise UserError if they or the samples are too few."""
    labelled = (dataset.class_labels >= 0).nonzero().flatten()
    for number, low, kind in ((num_samples, MIN_SAMPLES, "samples"), (len(labelled), 4 * BLOCKS, "labelled images")):
        if number < low:
            raise UserError(f"{number} {kind} are too few for the metrics. Use at least {low}.")
    return labelled


def warn_if_rank_deficient(extractor: FeatureExtractor, numbers: dict[str, int]) -> None:
    """Warn of kinds of images whose number does not exceed the number of features."""
    for kind, number in numbers.items():
        if number <= extractor.num_features:
            logger.warning(
                "There are only %d %s for the %d features of %s. The covariance does not have full rank, and the "
                "Fréchet distance is far too large. Use more images, or an extractor with fewer features.",
                *(number, kind, extractor.num_features, extractor.name),
            )


class RealStatistics:
    """
    Statistics of the real images under one feature extractor, read from the cache if a previous run wrote them.

    A stratified random split divides the images into a held-out set and the other images. The held-out set replaces the
    samples of a perfect model: its metrics against the other images are the floor. Its size is `num_samples`, but at
    most half of the dataset. Samples are compared with all real images, except in precision, recall, density, coverage
    and the kernel distance, which compare at most `num_held_out` samples with
    the same number of other images.

    Args:
        accelerator (`Accelerator`): the processes that share the work.
        dataset (`Dataset`): the real images, uint8, with their `class_labels`. Unlabelled images are skipped.
        id2label (`dict[int, str]`): the names of the dataset's classes.
        feature_extractor (`str`): "small", "inception", "dinov2", or the name of a transformers image classifier.
        num_samples (`int`): the number of images in a set of samples, at least 20.
        statistics_dir (`Path`): the folder that caches the statistics and the small classifier.

    Attributes:
        summarizer (`Summarizer`): the feature extractor, to add samples to summaries.
        held_out (`Summary`), others (`Summary`): the statistics of the held-out set and of the other images.
        class_labels (`dict[str, torch.Tensor]`): the classes of the images of both whose features are stored.
        num_real (`int`), num_held_out (`int`): the numbers of all images and of held-out images.

    Raises:
        UserError: if there are too few images, or the extractor cannot be loaded.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: Dataset,
        id2label: dict[int, str],
        feature_extractor: str,
        num_samples: int,
        statistics_dir: Path,
    ) -> None:
        labelled = labelled_images(dataset, num_samples)
        self.accelerator, self.num_samples = accelerator, num_samples
        self.num_real = len(labelled)
        self.num_held_out = min(num_samples, self.num_real // 2)

        data_name = fingerprint(dataset)
        if feature_extractor == SMALL:
            with accelerator.main_process_first():  # the other processes load it from the folder
                self.extractor = small_classifier(dataset, data_name, id2label, statistics_dir)
        else:
            self.extractor = pretrained_extractor(feature_extractor)
        warn_if_rank_deficient(self.extractor, {"samples": num_samples, "real images": self.num_real})
        self.summarizer = Summarizer(self.extractor, id2label, accelerator.device)

        order = labelled[stratified_order(dataset.class_labels[labelled])]
        subsets = {"held_out": order[: self.num_held_out], "others": order[self.num_held_out :]}
        self.class_labels = {name: dataset.class_labels[rows[:MAX_NEIGHBOURS]] for name, rows in subsets.items()}
        summaries = {
            name: self.summarizer.new_summary(len(indices), moment_blocks=1) for name, indices in subsets.items()
        }
        identity = {"data": data_name, "feature_extractor": self.extractor.name, "held_out": str(self.num_held_out)}
        path = statistics_dir / f"statistics-{seed_of(*identity.values()):016x}.safetensors"
        if not read_summaries(path, identity, summaries):
            for name, indices in subsets.items():
                self._summarize(dataset, indices, summaries[name])
            if accelerator.is_main_process:
                write_summaries(path, identity, summaries)
        accelerator.wait_for_everyone()
        self.held_out, self.others = summaries["held_out"], summaries["others"]

    def _summarize(self, dataset: Dataset, indices: torch.Tensor, summary: Summary) -> None:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batches = torch.arange(len(indices)).split(BATCH_SIZE)
        for rows in tqdm(batches[rank::world_size], "Real images", leave=False, disable=None if rank == 0 else True):
            batch = dataset.__getitems__(indices[rows].tolist())
            self.summarizer.add(summary, rows, batch.images_rgb, batch.class_labels)
        summary.reduce(self.accelerator)

    @cached_property
    def neighbours(self) -> torch.Tensor:
        """The features of at most `num_held_out` other images, `(images, features)`, on the accelerator's device."""
        features = self.others.features
        return features[: min(len(features), len(self.held_out.features))].to(self.accelerator.device)

    @cached_property
    def reference(self) -> Reference:
        """The reference for samples: all real images."""
        return self._reference(self.others, self.held_out)

    @property
    def reference_without_held_out(self) -> Reference:
        """The reference for the held-out images: the other images."""
        return self._reference(self.others)

    def _reference(self, *summaries: Summary) -> Reference:
        def gaussian(spatial: bool) -> Gaussian:
            names = moment_names(spatial)
            sums = (torch.cat([summary.sums[name] for summary in summaries]).sum(0) for name in names)
            return Gaussian.from_moments(mean_and_covariance(*sums))

        spatial = gaussian(True) if self.extractor.num_spatial_features else None
        return Reference(gaussian(False), spatial, self.neighbours)

    def record(self) -> dict[str, Any]:
        """Return the settings of the measurement, for JSON. Metrics are comparable if these settings are equal."""
        return {
            "num_samples": self.num_samples,
            "feature_extractor": self.extractor.record(),
            "num_real": self.num_real,
            "num_neighbours": len(self.neighbours),
            "num_held_out": self.num_held_out,
        }


def stratified_order(class_labels: torch.Tensor) -> torch.Tensor:
    """Return a random order of images, `(images,)`, in which every prefix has the class proportions of the whole."""
    order = torch.randperm(len(class_labels), generator=seeded_generator("cpu", "order of the real images"))
    position = torch.empty(len(order), dtype=torch.float64)
    for class_id in class_labels.unique():
        members = class_labels[order] == class_id
        position[members] = (torch.arange(int(members.sum())) + 0.5).double() / members.sum()
    return order[position.argsort(stable=True)]


def write_summaries(path: Path, identity: dict[str, str], summaries: dict[str, Summary]) -> None:
    """Write summaries by name to a file, with the identity of the data and the extractor."""
    tensors = {}
    for subset, summary in summaries.items():
        tensors |= {f"{subset}.{name}": value for name, value in summary.sums.items()}
        tensors[f"{subset}.features"] = summary.features
    write_safetensors(tensors, identity, path)


def read_summaries(path: Path, identity: dict[str, str], summaries: dict[str, Summary]) -> bool:
    """
    Read a file written by `write_summaries` into summaries. Return False if there is none, and with a warning if it is
    damaged or has a different identity.
    """
    if not path.is_file():
        return False
    try:
        tensors, found = read_safetensors(path)
        if found != identity:
            raise ValueError(f"it belongs to {found} instead of {identity}")
        for subset, summary in summaries.items():
            if any(tensors[f"{subset}.{name}"].shape != value.shape for name, value in summary.sums.items()):
                raise ValueError("it has statistics of different shapes")
            if len(tensors[f"{subset}.features"]) != min(summary.num_images, MAX_NEIGHBOURS):
                raise ValueError("it has the features of a different number of images")
    except Exception as error:  # a damaged file raises exceptions of many types
        logger.warning("%s cannot be used, so the statistics are computed again: %s", path, error)
        return False
    for subset, summary in summaries.items():
        features = tensors[f"{subset}.features"]
        summary.sums = {name: tensors[f"{subset}.{name}"] for name in summary.sums}
        summary.kept = [(torch.arange(len(features)), features)]
    return True
