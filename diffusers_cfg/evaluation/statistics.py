"""What is measured of a set of images: running sums over their features, and the metrics that come of them."""

import json
import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from config import STATISTICS_DIR, TrainConfig, UserError
from data import fingerprint
from feature_extractors import SMALL, pretrained_extractor, small_classifier, write_safetensors
from metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    jackknife,
    matrix_sqrt,
    mean_and_covariance,
    precision_recall,
)
from randomness import seed_of, seeded_generator
from safetensors import safe_open
from sample import draw_images
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline

logger = logging.getLogger(__name__)

# The inception score's ten splits, and the blocks that are left out in turn for the standard errors.
BLOCKS = 10
# Nearest neighbours and kernels are taken among so many images of each side at the most.
MAX_NEIGHBOURS = 10_000
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000


class Summary:
    """
    All that is kept of a set of images: sums over their features in float64, and the features of the first of them.
    What it holds does not grow with the number of images.

    Args:
        num_images (`int`): how many images the set has.
        num_features (`int`), num_classes (`int`): of the extractor; 0 classes if it has no logits.
        moment_blocks (`int`): in how many blocks, in order, the sums of features are kept apart.
    """

    def __init__(self, num_images: int, num_features: int, num_classes: int, moment_blocks: int = BLOCKS):
        self.num_images, self.moment_blocks = num_images, moment_blocks
        self.sums = {
            "count": torch.zeros(moment_blocks),
            "total": torch.zeros(moment_blocks, num_features),
            "outer": torch.zeros(moment_blocks, num_features, num_features),
            "split_count": torch.zeros(BLOCKS),
            "probabilities": torch.zeros(BLOCKS, num_classes),
            "negative_entropy": torch.zeros(BLOCKS),
            # of the class asked for, by split and class
            "right": torch.zeros(BLOCKS, num_classes),
            "asked": torch.zeros(BLOCKS, num_classes),
        }
        self.sums = {name: value.double() for name, value in self.sums.items()}
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(
        self, indices: torch.Tensor, features: torch.Tensor, logits: torch.Tensor | None, class_labels: torch.Tensor
    ) -> None:
        """
        Take images into account.

        Args:
            indices (`torch.Tensor` of shape `(images,)`): their places in the set, `0 … num_images - 1`.
            features (`(images, features)`), logits (`(images, classes)`, *optional*): what the extractor says.
            class_labels (`(images,)`): the classes that were asked for, in the extractor's ids; -1 for none.
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
        """Put together what the processes have each taken into account."""
        if accelerator.num_processes > 1:
            for name, value in self.sums.items():
                self.sums[name] = accelerator.reduce(value.to(accelerator.device), reduction="sum").cpu()
            self.kept = gather_object(self.kept)
        return self

    @property
    def features(self) -> torch.Tensor:
        """Those of the first images, `(up to MAX_NEIGHBOURS, features)`, in the order of their places."""
        places, features = (torch.cat(column) for column in zip(*self.kept, strict=True))
        return features[places.argsort()]

    def moments(self, blocks: torch.Tensor | slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of the features, of all blocks or of some."""
        return mean_and_covariance(*(self.sums[name][blocks].sum(0) for name in ("count", "total", "outer")))


class Evaluation:
    """
    Measures sets of images against the data, with one extractor.

    The real images are divided at random, each class in proportion: as many as there are samples (or half of them, if
    they are fewer than twice as many) stand in for samples, and measured against the others they give the floor: what
    a perfect model would reach. Samples are measured against all real images; by precision, recall, density, coverage
    and the kernel distance, so many of them against so many of the others, as stood in.

    Args:
        accelerator (`Accelerator`): the processes that share the work.
        dataset (`Dataset`): the real images, uint8, and their `class_labels`; those without one are left out.
        id2label (`dict[int, str]`): the names of its classes.
        feature_extractor (`str`): "small", "inception", "dinov2", or an image classifier of transformers by its name.
        num_samples (`int`): images in a set, at least 20.
        statistics_dir (`Path`): where the real images' sums and the small classifier are kept for the next time.

    Raises:
        UserError: there are too few images; the extractor cannot be had; the file with the sums is of other data.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: Dataset,
        id2label: dict[int, str],
        feature_extractor: str,
        num_samples: int,
        statistics_dir: Path,
        batch_size: int = 250,
    ):
        labelled = (dataset.class_labels >= 0).nonzero().flatten()
        for number, low, what in ((num_samples, 2 * BLOCKS, "samples"), (len(labelled), 4 * BLOCKS, "labelled images")):
            if number < low:
                raise UserError(f"{number} {what} are too few to be measured: at least {low} are needed.")
        self.accelerator, self.num_samples, self.batch_size = accelerator, num_samples, batch_size
        name = fingerprint(dataset)
        if feature_extractor == SMALL:
            with accelerator.main_process_first():  # the others find it in the folder
                self.extractor = small_classifier(dataset, name, id2label, statistics_dir)
        else:
            self.extractor = pretrained_extractor(feature_extractor)
        self.extractor.to(accelerator.device)
        self.num_classes = self._count_classes()
        self.class_map = self._map_classes(id2label)

        self.num_real = len(labelled)
        self.num_held_out = min(num_samples, self.num_real // 2)
        self._warn_of_rank()
        self._measure_real_images(dataset, name, labelled, statistics_dir)

    def _count_classes(self) -> int:
        image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=self.accelerator.device)
        logits = self.extractor(image)[1]
        return 0 if logits is None else logits.shape[1]

    def _map_classes(self, id2label: dict[int, str]) -> torch.Tensor:
        """The extractor's id of each of the data's classes and, last, of -1; -1 where it does not know the class."""
        theirs = {label: class_id for class_id, label in (self.extractor.id2label or {}).items()}
        return torch.tensor([*(theirs.get(id2label[class_id], -1) for class_id in sorted(id2label)), -1])

    def _warn_of_rank(self) -> None:
        for what, number in (("samples", self.num_samples), ("real images", self.num_real)):
            if number <= self.extractor.num_features:
                logger.warning(
                    "%d %s are no more than the %d features of %s: the covariance has not full rank, and the Fréchet "
                    "distance is far too large. Draw more, or use an extractor with fewer features.",
                    number, what, self.extractor.num_features, self.extractor.name,
                )  # fmt: skip

    # ----- the real images -----

    def _measure_real_images(self, dataset: Dataset, name: str, labelled: torch.Tensor, statistics_dir: Path) -> None:
        """Sum up the real images, or read what a former run summed up, and measure the floor."""
        order = labelled[stratified_order(dataset.class_labels[labelled])]
        parts = {"held_out": order[: self.num_held_out], "others": order[self.num_held_out :]}
        identity = {"data": name, "feature_extractor": self.extractor.name, "held_out": str(self.num_held_out)}
        path = statistics_dir / f"statistics-{seed_of(*identity.values()):016x}.safetensors"
        summaries = {part: self.new_summary(len(indices), moment_blocks=1) for part, indices in parts.items()}
        if path.is_file():
            read_summaries(path, identity, summaries)
        else:
            for part, indices in parts.items():
                self._sum_up(dataset, indices, summaries[part])
            if self.accelerator.is_main_process:
                write_summaries(path, identity, summaries)
        self.accelerator.wait_for_everyone()

        held_out, others = summaries.values()
        self.neighbours = others.features[: min(len(others.features), len(held_out.features))]
        self._set_reference(others)
        self.floor = self.measure(held_out) if self.accelerator.is_main_process else {}
        if self.extractor.accuracy is not None:
            # It was trained on most of them
            self.floor["class_accuracy"] = self.extractor.accuracy
            for key in ("class_accuracy_error", "accuracy_by_class"):
                self.floor.pop(key, None)
        for key, value in held_out.sums.items():
            others.sums[key] = others.sums[key] + value
        self._set_reference(others)

    def _sum_up(self, dataset: Dataset, indices: torch.Tensor, summary: Summary) -> None:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        places = torch.arange(len(indices)).split(self.batch_size)
        for mine in tqdm(places[rank::world_size], "Real images", leave=False, disable=rank != 0):
            batch = dataset.__getitems__(indices[mine].tolist())
            self.add(summary, mine, batch.images_rgb, batch.class_labels)
        summary.reduce(self.accelerator)

    def _set_reference(self, summary: Summary) -> None:
        self.reference = summary.moments()
        self.sqrt_reference = matrix_sqrt(self.reference[1])

    # ----- samples -----

    def new_summary(self, num_images: int | None = None, moment_blocks: int = BLOCKS) -> Summary:
        """An empty one, for a set of samples."""
        return Summary(num_images or self.num_samples, self.extractor.num_features, self.num_classes, moment_blocks)

    @torch.no_grad()
    def add(self, summary: Summary, places: torch.Tensor, images: torch.Tensor, class_labels: torch.Tensor) -> None:
        """Take uint8 images `(images, 3, height, width)` into account, which were meant to be of the given classes."""
        for rows in torch.arange(len(places)).split(self.batch_size):
            features, logits = self.extractor(images[rows].to(self.accelerator.device))
            summary.add(places[rows], features, logits, self.class_map[class_labels[rows]])

    def measure(self, summary: Summary) -> dict[str, Any]:
        """
        The metrics of a set of images. Those that need class probabilities are left out if the extractor has none, the
        class accuracy if its classes are not the data's; a standard error ends in `_error`.
        """

        def distance(blocks: torch.Tensor | slice = slice(None)) -> float:
            return frechet_distance(self.reference, summary.moments(blocks), self.sqrt_reference)

        assert summary.sums["count"].sum() == len(summary.features), "some images were not added, or some twice"
        row = {"frechet_distance": distance()}
        if summary.moment_blocks > 1:
            row["frechet_distance_error"] = jackknife(distance, summary.moment_blocks)
        device = self.accelerator.device
        real, fake = self.neighbours.to(device), summary.features[: len(self.neighbours)].to(device)
        row["kernel_distance"], row["kernel_distance_error"] = kernel_distance(real, fake)
        row["precision"], row["recall"] = precision_recall(real, fake)
        row["density"], row["coverage"] = density_coverage(real, fake)
        if self.num_classes:
            splits = zip(*(summary.sums[n] for n in ("split_count", "probabilities", "negative_entropy")), strict=True)
            scores = torch.tensor([inception_score(*split) for split in splits])
            row["inception_score"], row["inception_score_error"] = scores.mean().item(), scores.std().item()
        right, asked = summary.sums["right"], summary.sums["asked"]
        if asked.sum() > 0:
            row["class_accuracy"] = (right.sum() / asked.sum()).item()
            row["class_accuracy_error"] = jackknife(lambda kept: (right[kept].sum() / asked[kept].sum()).item(), BLOCKS)
            row["accuracy_by_class"] = {
                self.extractor.id2label[class_id]: (right[:, class_id].sum() / asked[:, class_id].sum()).item()
                for class_id in asked.sum(0).nonzero().flatten().tolist()
            }
        return row

    def record(self) -> dict[str, Any]:
        """What the figures were measured with: two of them can be compared if this is the same for both."""
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
            "floor": self.floor,
        }


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """
    The squared MMD with a cubic kernel (Bińkowski et al. 2018, arXiv 1801.01401), with Inception's features the KID:
    its mean and standard deviation over random subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it warns that it keeps all features; they are few
        torch.manual_seed(0)
        distance = KernelInceptionDistance(
            feature=torch.nn.Identity(),
            subsets=KERNEL_SUBSETS,
            subset_size=min(KERNEL_SUBSET_SIZE, len(real) // 2, len(fake) // 2),
            sync_on_compute=False,
        )
        distance.update(real, real=True)
        distance.update(fake, real=False)
        mean, deviation = distance.compute()
    return mean.item(), deviation.item()


def stratified_order(class_labels: torch.Tensor) -> torch.Tensor:
    """A random order of the images of which every beginning has the classes in proportion, `(images,)`."""
    order = torch.randperm(len(class_labels), generator=seeded_generator("cpu", "order of the real images"))
    place = torch.empty(len(order), dtype=torch.float64)
    for class_id in class_labels.unique():
        members = class_labels[order] == class_id
        place[members] = (torch.arange(int(members.sum())) + 0.5).double() / members.sum()
    return order[place.argsort(stable=True)]


def write_summaries(path: Path, identity: dict[str, str], summaries: dict[str, Summary]) -> None:
    tensors = {}
    for part, summary in summaries.items():
        tensors |= {f"{part}.{name}": value for name, value in summary.sums.items()}
        tensors[f"{part}.features"] = summary.features
    write_safetensors(tensors, identity, path)


def read_summaries(path: Path, identity: dict[str, str], summaries: dict[str, Summary]) -> None:
    """Fill summaries with what `write_summaries` wrote. Raises UserError if it is of other images than wanted."""
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


def training_evaluation(
    config: TrainConfig, accelerator: Accelerator, dataset: Dataset, id2label: dict[int, str]
) -> Callable[[CFGPipeline], dict[str, float]]:
    """A small evaluation for a run to make of itself: for each w the metrics of a few samples, by name."""
    evaluation = Evaluation(
        accelerator, dataset, id2label, config.feature_extractor, config.num_eval_samples, STATISTICS_DIR
    )
    class_labels = torch.arange(config.num_eval_samples) % len(id2label)
    batches = torch.arange(config.num_eval_samples).split(evaluation.batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]

    def evaluate(pipeline: CFGPipeline) -> dict[str, float]:
        metrics = {}
        for w in config.validation_guidance_scales:
            call = {"guidance_scale": w, "num_inference_steps": config.num_inference_steps}
            summary = evaluation.new_summary()
            for places in mine:
                labels = class_labels[places]
                images, _ = draw_images(pipeline, labels, places.tolist(), config.seed, **call)
                evaluation.add(summary, places, images, labels)
            summary.reduce(accelerator)
            if accelerator.is_main_process:
                row = evaluation.measure(summary)
                metrics |= {f"{name}/w={w:g}": value for name, value in row.items() if isinstance(value, float)}
        return metrics

    return evaluate
