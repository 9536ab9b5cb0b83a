"""Draw pictures of an evaluation: samples of each class, and the samples nearest to training images."""

import torch
from PIL import Image

from diffusers_cfg.evaluation.grids import MAX_CLASSES, left_out_note, make_grid
from diffusers_cfg.evaluation.memorisation import Neighbours
from diffusers_cfg.evaluation.sample_sets import SampleSet
from diffusers_cfg.evaluation.settings import format_number

# Samples of each class, and pairs of an image and its nearest training image, in a picture.
COLUMNS = 10


def class_grid(samples: SampleSet, classes: list[int], names: list[str], w: float) -> Image.Image:
    """
    Arrange the first `COLUMNS` samples of each class in a row, as far as there are samples. Of more than `MAX_CLASSES`
    classes the picture shows the first, and says how many it leaves out.

    Args:
        samples (`SampleSet`): the samples at one w.
        classes (`list[int]`), names (`list[str]`): the ids and the names of the classes.
        w (`float`): their guidance scale, for the caption.
    """
    shown = classes[:MAX_CLASSES]
    found: dict[int, list[torch.Tensor]] = {class_id: [] for class_id in shown}
    for shard in samples.shards:
        content = samples.load(shard)
        for image, class_id in zip(content.images, content.class_labels.tolist(), strict=True):
            if len(found.get(class_id, ())) < COLUMNS and class_id in found:
                found[class_id].append(torch.from_numpy(image).movedim(-1, 0))
        if all(len(images) == COLUMNS for images in found.values()):
            break
    size = next(image.shape for images in found.values() for image in images)
    rows = torch.ones(len(shown), COLUMNS, *size)
    for row, images in enumerate(found.values()):
        for column, image in enumerate(images):
            rows[row, column] = image / 255
    notes = [f"w = {format_number(w)}", left_out_note(len(shown), len(classes))]
    return make_grid(rows, names[: len(shown)], [""] * COLUMNS, note="; ".join(filter(None, notes)))


def nearest_grid(samples: Neighbours, held_out: Neighbours | None, w: float) -> Image.Image:
    """
    Arrange the samples that are closest to a training image above that image, with their distances, and below them the
    same for the closest held-out images, for comparison.

    Args:
        samples (`Neighbours`), held_out (`Neighbours`, *optional*): the images with their nearest training images.
        w (`float`): the guidance scale of the samples, for the caption.
    """
    order = samples.distances.argsort(stable=True)[:COLUMNS]
    columns = [f"{distance:.1f}" for distance in samples.distances[order].tolist()]
    rows = {"sample": samples.images[order], "training": samples.nearest[order]}
    note = f"w = {format_number(w)}; above: root mean square distance in levels of 0 to 255"
    if held_out is not None and len(held_out.distances) >= len(order):
        real = held_out.distances.argsort(stable=True)[: len(order)]
        rows |= {"held out": held_out.images[real], "training ": held_out.nearest[real]}
        low, high = held_out.distances[real][[0, -1]].tolist()
        note += f"; held-out images: {low:.1f} to {high:.1f}"
    return make_grid(torch.stack([*rows.values()]) / 255, [*rows], columns, note=note)
