"""
Measure whether a model memorised training images, by how close its samples are to the nearest of them.

Held-out images show how close a real image that was not trained on is to the training images. Of a model that copies
nothing, as many samples as held-out images are that close: the test of data-copying compares the same two sets of
distances (Meehan et al. 2020, arXiv 2004.05675, section 3). That paper compares them as a whole. Here only the closest
`CLOSEST` of the held-out images matter, because bad samples are far from all images and would hide a few copies.

Distances are between pixels, as in Carlini et al. 2023 (arXiv 2301.13188): the features of a classifier that was
trained on the data are closer for all images of a class, and hide copies with noise or blur.
"""

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusers_cfg.randomness import seeded_generator

logger = logging.getLogger(__name__)

# The fraction of the held-out images whose distances count as close.
CLOSEST = 0.05
# With fewer held-out images too few of them are close.
MIN_HELD_OUT = 100
# Images are compared at no more than this height and width.
MAX_SIZE = 32
# Samples of each w and held-out images that are compared, and training images that are searched.
MAX_COMPARED, MAX_SEARCHED = 2_000, 100_000
# Replicates of the bootstrap.
REPLICATES = 1000
# Images per batch of the search.
BATCH_SIZE = 500


class Neighbours(NamedTuple):
    """Images and the training image nearest to each."""

    images: torch.Tensor  # (images, 3, height, width), uint8
    class_labels: torch.Tensor  # (images,), int64; ids of the model, -1 is unlabelled
    nearest: torch.Tensor  # (images, 3, height, width), uint8
    distances: torch.Tensor  # (images,), float32: root mean square over the pixels, in levels of 0 … 255


def random_indices(length: int, number: int, purpose: str) -> torch.Tensor:
    """Return the indices of up to `number` of `length` images: all, or some at random, in ascending order."""
    if length <= number:
        return torch.arange(length)
    return torch.randperm(length, generator=seeded_generator("cpu", "memorisation", purpose))[:number].sort().values


def pixels(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the pixels of `(images, 3, height, width)` that are compared, `(images, values)`, float32."""
    images = images.to(device, torch.float32)
    if images.shape[-1] > MAX_SIZE:
        images = F.adaptive_avg_pool2d(images, MAX_SIZE)
    return images.flatten(1)


@torch.no_grad()
def find_nearest(
    images: torch.Tensor,
    class_labels: torch.Tensor,
    training: Dataset,
    flips: bool,
    device: torch.device,
    show_progress: bool = True,
) -> Neighbours:
    """
    Find the nearest training image of each image.

    Args:
        images (`torch.Tensor` of shape `(images, 3, height, width)`): uint8.
        class_labels (`torch.Tensor` of shape `(images,)`): their classes.
        training (`Dataset`): the training images, of the same size. Of more than `MAX_SEARCHED`, a random part.
        flips (`bool`): whether training images are compared as they are and mirrored, as after `--random_flip`.
        device (`torch.device`): the device of the search.
        show_progress (`bool`): whether to show a progress bar.
    """
    queries = [pixels(images, device)]
    if flips:  # the distance from a mirrored image is that of the mirrored query from the image
        queries.append(pixels(images.flip(-1), device))
    best = torch.full((len(images),), torch.inf, device=device)
    indices, mirrored = (torch.zeros(len(images), dtype=torch.int64, device=device) for _ in range(2))
    searched = random_indices(len(training.class_labels), MAX_SEARCHED, "training")
    disable = None if show_progress else True
    for rows in tqdm(searched.split(BATCH_SIZE), "Searching the training images", leave=False, disable=disable):
        batch = pixels(training.__getitems__(rows.tolist()).images_rgb, device)
        for version, vectors in enumerate(queries):
            distances, which = torch.cdist(vectors, batch).min(1)
            closer = distances < best
            best[closer] = distances[closer]
            indices[closer] = rows.to(device)[which[closer]]
            mirrored[closer] = version
    nearest = torch.cat([training.__getitems__(rows.tolist()).images_rgb for rows in indices.cpu().split(BATCH_SIZE)])
    nearest = torch.where(mirrored.bool().cpu().view(-1, 1, 1, 1), nearest.flip(-1), nearest)
    # `cdist` multiplies matrices, whose rounding hides that the distance of a copy is 0.
    exact = (pixels(images, device) - pixels(nearest, device)).square().mean(1).sqrt()
    return Neighbours(images, class_labels, nearest, exact.cpu())


def closest_quantile(distances: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the distance within which the closest `CLOSEST` of weighted images are, and their exact weight, which is
    larger if distances are equal.

    Args:
        distances (`torch.Tensor` of shape `(..., images)`): the distances.
        weights (`torch.Tensor` of shape `(..., images)`): weights that sum to 1.
    """
    ordered, order = distances.sort(-1)
    cumulated = weights.gather(-1, order).cumsum(-1)
    # The tolerance is that of the sum's rounding.
    first = (cumulated < CLOSEST - 1e-9).sum(-1, keepdim=True)
    limit = ordered.gather(-1, first)
    return limit.squeeze(-1), (weights * (distances <= limit)).sum(-1)


def close_share(samples: Neighbours, held_out: Neighbours) -> dict[str, Any] | str:
    """
    Compute the share of samples that are at least as close to a training image as the closest `CLOSEST` of the held-out
    images, and its floor: the share of the held-out images themselves. Held-out images are weighted so that their
    classes are as frequent as those of the samples. Samples of classes without held-out images are left out.

    The interval of the floor is a bootstrap over both sets, within classes: it draws the samples from the held-out
    images as well, which is what a model that copies nothing does. It takes images as independent, so it is too narrow
    if several held-out images are variants of one.

    Args:
        samples (`Neighbours`), held_out (`Neighbours`): the samples at one w, and the held-out images.

    Returns:
        `dict[str, Any]`: the share `close_to_training`, its `floor`, the 95 % `interval` of the floor, and the numbers
        `num_samples` and `num_held_out` of compared images. `str`: why it is not measured, if fewer than `MIN_HELD_OUT`
        held-out images can be compared, or more than half of them are equally close, such as images that were trained
        on after all.
    """
    shared = samples.class_labels.unique()
    shared = shared[torch.isin(shared, held_out.class_labels)]
    parts = [(held_out.distances[held_out.class_labels == c], samples.class_labels == c) for c in shared]
    num_samples = sum(int(chosen.sum()) for _, chosen in parts)
    num_held_out = sum(len(distances) for distances, _ in parts)
    if num_held_out < MIN_HELD_OUT:
        return (
            f"it takes {MIN_HELD_OUT} held-out images of the samples' classes, but there are {num_held_out}. "
            "Train with a larger --train_val_split."
        )
    weights = torch.cat(
        [
            torch.full((len(distances),), chosen.sum().item() / len(distances) / num_samples, dtype=torch.float64)
            for distances, chosen in parts
        ]
    )
    limit, floor = closest_quantile(torch.cat([distances for distances, _ in parts]), weights)
    if floor > 0.5:
        return f"{floor:.0%} of the held-out images are equally close to training images. Were they trained on?"
    close = samples.distances[torch.isin(samples.class_labels, shared)] <= limit

    generator = seeded_generator("cpu", "memorisation", "bootstrap")

    def draw(distances: torch.Tensor, number: int) -> torch.Tensor:
        return distances[torch.randint(len(distances), (REPLICATES, number), generator=generator)]

    held_out_draws = torch.cat([draw(distances, len(distances)) for distances, _ in parts], 1)
    sample_draws = torch.cat([draw(distances, int(chosen.sum())) for distances, chosen in parts], 1)
    limits, _ = closest_quantile(held_out_draws, weights.expand(REPLICATES, -1))
    shares = (sample_draws <= limits[:, None]).double().mean(1)
    return {
        "close_to_training": close.double().mean().item(),
        "floor": floor.item(),
        "interval": shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist(),
        "num_samples": num_samples,
        "num_held_out": num_held_out,
    }
