"""Test the measure of memorisation: a copying model is found, a model that draws new images is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_cfg.data.datasets import CachedImages
from diffusers_cfg.evaluation import memorisation
from diffusers_cfg.evaluation.memorisation import Neighbours, close_share, find_nearest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(digits) -> dict[str, CachedImages]:
    """Divide the digits at random into training images, held-out images and images that a perfect model draws."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    sizes = {"training": order[:897], "held_out": order[897:1347], "new": order[1347:]}
    return {name: CachedImages(digits.images[rows], digits.class_labels[rows]) for name, rows in sizes.items()}


@pytest.fixture(scope="module")
def nearest(parts) -> Callable[..., Neighbours]:
    def nearest(images: CachedImages, flips: bool = False, training: CachedImages | None = None) -> Neighbours:
        rgb = images.images.expand(-1, 3, -1, -1)
        return find_nearest(rgb, images.class_labels, training or parts["training"], flips, CPU, show_progress=False)

    return nearest


def share_of(samples: Neighbours, held_out: Neighbours) -> dict[str, Any]:
    result = close_share(samples, held_out)
    assert isinstance(result, dict)
    return result


def within(result: dict[str, Any]) -> bool:
    low, high = result["interval"]
    return low <= result["close_to_training"] <= high


def first(images: CachedImages, count: int) -> CachedImages:
    return CachedImages(images.images[:count], images.class_labels[:count])


def joined(*parts: CachedImages) -> CachedImages:
    return CachedImages(torch.cat([p.images for p in parts]), torch.cat([p.class_labels for p in parts]))


def noise(count: int) -> CachedImages:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return CachedImages(images, torch.arange(count) % 10)


def test_nearest_image_and_distance_are_those_of_a_loop(parts, nearest):
    found = nearest(first(parts["new"], 5))
    training = parts["training"].images.double()
    for image, neighbour, distance in zip(found.images, found.nearest, found.distances, strict=True):
        distances = (training - image[:1].double()).square().flatten(1).mean(1).sqrt()
        assert torch.equal(neighbour[:1], parts["training"].images[distances.argmin()])
        assert distance.item() == pytest.approx(distances.min().item(), rel=1e-6)


def test_distance_of_a_copy_is_exactly_0_also_mirrored(parts, nearest):
    mirrored = CachedImages(parts["training"].images[:50].flip(-1), parts["training"].class_labels[:50])
    assert nearest(first(parts["training"], 50)).distances.tolist() == [0.0] * 50
    assert nearest(mirrored).distances.min() > 0
    found = nearest(mirrored, flips=True)
    assert found.distances.tolist() == [0.0] * 50
    assert torch.equal(found.nearest, found.images)


def test_large_images_are_compared_at_a_small_size(monkeypatch, parts, nearest):
    monkeypatch.setattr(memorisation, "MAX_SIZE", 4)
    found = nearest(first(parts["new"], 3))
    small = [images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) for images in (found.images, found.nearest)]
    torch.testing.assert_close(found.distances, (small[0] - small[1]).square().flatten(1).mean(1).sqrt())


def test_new_images_lie_in_the_interval_of_the_floor(parts, nearest):
    result = share_of(nearest(parts["new"]), nearest(parts["held_out"]))
    assert result["floor"] == pytest.approx(0.05, abs=0.01)
    assert within(result)
    assert (result["num_samples"], result["num_held_out"]) == (450, 450)


def test_copies_are_found_also_among_bad_samples(parts, nearest):
    held_out = nearest(parts["held_out"])
    assert share_of(nearest(first(parts["training"], 400)), held_out)["close_to_training"] == 1
    assert share_of(nearest(noise(400)), held_out)["close_to_training"] == 0
    few = share_of(nearest(joined(first(parts["training"], 60), noise(340))), held_out)
    assert few["close_to_training"] == pytest.approx(0.15)
    assert few["close_to_training"] > few["interval"][1]


def test_slightly_changed_copies_are_found(parts, nearest):
    copies = first(parts["training"], 400)
    changed = (copies.images.int() + torch.randint(-8, 9, copies.images.shape)).clamp(0, 255).to(torch.uint8)
    result = share_of(nearest(CachedImages(changed, copies.class_labels)), nearest(parts["held_out"]))
    assert result["close_to_training"] > 0.95


def test_duplicates_in_both_splits_raise_the_floor(parts, nearest):
    """A fifth of all held-out and of all new images are also training images."""
    held_out = nearest(joined(first(parts["held_out"], 400), first(parts["training"], 100)))
    new = nearest(joined(first(parts["new"], 400), first(parts["training"], 100)))
    result = share_of(new, held_out)
    assert result["floor"] == pytest.approx(0.2, abs=0.04)
    assert within(result)


def test_other_class_proportions_are_no_memorisation(parts, nearest):
    """Ones are much closer to each other than other digits. A model that draws only ones and twos copies nothing."""
    labels = parts["new"].class_labels
    chosen = ((labels == 1) | (labels == 2)).nonzero().flatten()
    samples = nearest(CachedImages(parts["new"].images[chosen], labels[chosen]))
    held_out = nearest(joined(parts["held_out"], parts["held_out"]))  # 100 images or more of two classes
    result = share_of(samples, held_out)
    assert within(result)
    assert result["num_held_out"] < len(held_out.distances)
    # Without the classes the samples would be called close.
    limit = held_out.distances.quantile(0.05)
    assert (samples.distances <= limit).double().mean() > 2 * result["floor"]


def test_held_out_images_that_were_trained_on_give_no_figure(parts, nearest):
    samples = nearest(parts["new"])
    trained_on = nearest(first(parts["training"], 300))
    assert close_share(samples, trained_on) == (
        "100% of the held-out images are equally close to training images. Were they trained on?"
    )


def test_too_few_held_out_images_give_no_figure(parts, nearest):
    result = close_share(nearest(parts["new"]), nearest(first(parts["held_out"], 99)))
    assert isinstance(result, str)
    assert result.startswith("it takes 100 held-out images of the samples' classes, but there are 99.")
    other = nearest(CachedImages(parts["held_out"].images, torch.full((450,), 10)))
    assert "but there are 0" in str(close_share(nearest(parts["new"]), other))
