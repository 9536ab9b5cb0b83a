"""Labelled images that are not decoded yet, and their division into parts."""

import hashlib
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import has_8_bits, is_colored, normalise, to_array
from diffusers_cfg.data.labels import UNLABELLED
from diffusers_cfg.randomness import seeded_generator

# Number of images that are decoded to determine whether a dataset is grayscale.
CHANNELS_SAMPLE_SIZE = 32
# Number of images that are searched, without decoding them, for color or for more than 8 bits.
MAX_SEARCH = 10_000
# Number of stacked images: that of the usual stacked MNIST.
NUM_STACKS = 120_000


class LabelledImages:
    """
    Images that are not decoded yet, with their class labels.

    Args:
        class_labels (`numpy.ndarray` of shape `(images,)`): int64, `0 … num_classes - 1`; -1 means unlabelled.
        id2label (`dict[int, str]`): name of each class; empty for unlabelled data.

    Attributes:
        left_out (`list[str]`): paths of files among the images that PIL cannot read.
        num_held_out (`int`): number of images of the dataset that are held out from these.

    Raises:
        UserError: if there are no images.
    """

    def __init__(self, class_labels: np.ndarray, id2label: dict[int, str]) -> None:
        if not len(class_labels):
            raise UserError("The dataset has no images. Check --dataset_split.")
        self.class_labels, self.id2label, self.left_out, self.num_held_out = class_labels, id2label, [], 0

    def open_image(self, index: int) -> Image.Image:
        """Open the image at `index` with PIL. An unreadable image may raise any exception."""
        raise NotImplementedError

    def name_image(self, index: int) -> str:
        """Return a human-readable name for the image at `index`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.class_labels)

    @cached_property
    def channels(self) -> int:
        """The number of channels: 1 if the images are grayscale, otherwise 3. Of many images, a sample is searched."""
        for index in evenly_spaced(len(self), CHANNELS_SAMPLE_SIZE):
            with suppress(Exception):  # unreadable images are counted when the dataset is decoded
                if normalise(self.open_image(index)).mode == "RGB":
                    return 3
        for index in evenly_spaced(len(self), MAX_SEARCH):
            with suppress(Exception):
                if is_colored(self.open_image(index)):
                    return 3
        return 1

    def fingerprint(self) -> str:
        """Return a text that changes with any image, without decoding them."""
        raise NotImplementedError

    @property
    def present_classes(self) -> list[int]:
        """The ids of the classes that have images."""
        return np.unique(self.class_labels[self.class_labels != UNLABELLED]).tolist()


def evenly_spaced(length: int, number: int) -> list[int]:
    """Return `number` evenly spaced indices of a list, or all of a shorter one."""
    return np.linspace(0, length - 1, min(length, number)).astype(int).tolist()


def require_classes(images: LabelledImages) -> None:
    """Raise UserError if the images have fewer than two classes. Used by class-conditional methods."""
    present = images.present_classes
    if isinstance(images, StackedImages):
        raise UserError(
            "--stack makes images without classes, but class-conditional training needs at least two. Leave it out, or "
            "use train_ddgan.py, which trains the null class on them."
        )
    if len(present) < 2:
        raise UserError(
            f"Class-conditional training needs at least two classes, but the data has {len(present)}: "
            f"{[images.id2label[i] for i in present]}. Check --label_column, or that each class has its own folder."
        )


def require_8_bits(images: LabelledImages) -> None:
    """Raise UserError if an image has more than 8 bits per channel. Used by methods that model the 256 levels."""
    for index in evenly_spaced(len(images), MAX_SEARCH):
        with suppress(Exception):  # unreadable images are counted when the dataset is decoded
            if not has_8_bits(image := images.open_image(index)):
                break
    else:
        return
    raise UserError(
        f"{images.name_image(index)} has more than 8 bits per channel (mode {image.mode}), but the likelihood is "
        "that of pixels with 256 levels. Save all images with 8 bits first."
    )


class ImageSubset(LabelledImages):
    """
    A part of other images. Its classes, its number of channels and the names of its images are theirs.

    Args:
        images (`LabelledImages`): the images.
        indices (`numpy.ndarray` of shape `(part,)`): int64, the indices of the part.
    """

    def __init__(self, images: LabelledImages, indices: np.ndarray) -> None:
        super().__init__(images.class_labels[indices], images.id2label)
        self.images, self.indices = images, indices
        # In proportion, so that the fraction of unreadable files is that of all images.
        self.left_out = images.left_out[: round(len(images.left_out) * len(indices) / len(images))]

    def open_image(self, index: int) -> Image.Image:
        return self.images.open_image(int(self.indices[index]))

    def name_image(self, index: int) -> str:
        return self.images.name_image(int(self.indices[index]))

    @cached_property
    def channels(self) -> int:
        return self.images.channels

    def fingerprint(self) -> str:
        return f"{self.images.fingerprint()} {hashlib.sha256(self.indices.tobytes()).hexdigest()}"


class StackedImages(LabelledImages):
    """
    RGB images whose channels are three grayscale images, chosen at random, without labels. Of images of ten classes,
    they have 1000 modes (Metz et al. 2017, arXiv 1611.02163). The choice depends only on the index of the stack and on
    the number of images, so that all runs train on the same stacks.

    Args:
        images (`LabelledImages`): the grayscale images.
        resolution (`int`), center_crop (`bool`): arguments of `to_array`, since a channel may have any size.

    Raises:
        UserError: if the images have color.
    """

    def __init__(self, images: LabelledImages, resolution: int, center_crop: bool) -> None:
        if images.channels != 1:
            raise UserError(
                "--stack makes the channels of an image of grayscale images, but the data has images with color. Leave "
                "it out, or convert the images to grayscale."
            )
        super().__init__(np.full(NUM_STACKS, UNLABELLED, np.int64), {})
        self.images, self.resolution, self.center_crop = images, resolution, center_crop
        generator = seeded_generator("cpu", "stack")
        self.indices = torch.randint(len(images), (NUM_STACKS, 3), generator=generator).numpy()

    def open_image(self, index: int) -> Image.Image:
        opened = (self.images.open_image(int(i)) for i in self.indices[index])
        channels = [to_array(image, self.resolution, 1, self.center_crop)[0] for image in opened]
        return Image.fromarray(np.stack(channels, axis=-1))

    def name_image(self, index: int) -> str:
        return "the stack of " + ", ".join(self.images.name_image(int(i)) for i in self.indices[index])

    @cached_property
    def channels(self) -> int:
        return 3

    def fingerprint(self) -> str:
        return f"{self.images.fingerprint()} {hashlib.sha256(self.indices.tobytes()).hexdigest()}"


def split_images(images: LabelledImages, fraction: float) -> tuple[LabelledImages, LabelledImages]:
    """
    Split images at random into those to train on and those that are held out. The split depends only on their number
    and on the fraction, so that all runs hold out the same images. A larger fraction also holds out those of a smaller.

    Args:
        images (`LabelledImages`): the images.
        fraction (`float`): the fraction that is held out, in [0, 1).

    Returns:
        The images to train on and the held-out images, both in their order in the dataset.

    Raises:
        UserError: if one of the two would be empty.
    """
    num_held_out = round(fraction * len(images))
    if not 0 < num_held_out < len(images):
        raise UserError(
            f"--train_val_split {fraction:g} holds out {num_held_out} of the {len(images)} images, but at least one "
            f"must be held out and at least one left. {'Raise' if num_held_out == 0 else 'Lower'} it."
        )
    order = torch.randperm(len(images), generator=seeded_generator("cpu", "train_val_split")).numpy()
    training = ImageSubset(images, np.sort(order[num_held_out:]))
    training.num_held_out = num_held_out
    return training, ImageSubset(images, np.sort(order[:num_held_out]))
