"""Decode images to 8-bit arrays for training."""

import logging
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

# PIL warns about images above its pixel limit, which photographs exceed, and refuses images above twice the limit. The
# filter is global because images are decoded in threads, which share the filters.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

# Lossy compression makes the channels of a gray pixel differ by a few levels.
MAX_GRAY_DIFFERENCE = 8
COLOR_LOST = "images have color, which is lost, because most images and therefore the network are grayscale"


def normalise(image: Image.Image) -> Image.Image:
    """
    Convert a PIL image to 8-bit "L" (grayscale) or "RGB": apply the EXIF orientation, composite transparency onto
    white, take the first frame.

    Raises:
        ValueError: if the pixels are 32-bit values, whose black and white are undefined.
    """
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(
            f'The pixels are 32-bit values (mode "{image.mode}") of unknown range. Save the image with 8 or 16 bits.'
        )
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        pixels = np.asarray(image)
        gray = (pixels >> 8).astype(np.uint8)  # the high byte, as PIL converts 16-bit colors
        gray[pixels == image.info.get("transparency")] = 255
        return Image.fromarray(gray)
    palette = image.getpalette() or []
    is_grayscale = image.mode in ("1", "L", "LA") or (palette and palette[0::3] == palette[1::3] == palette[2::3])
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    mode = "L" if is_grayscale else "RGB"
    return image if image.mode == mode else image.convert(mode)


def has_8_bits(image: Image.Image) -> bool:
    """Return whether the pixels of an image that PIL has opened have at most 8 bits per channel in its file."""
    # PIL gives 16-bit colors the mode of 8-bit ones, and names the bits of the file in its list of tiles.
    tiles = str(getattr(image, "tile", ""))
    return not image.mode.startswith(("I", "F")) and ";16" not in tiles


def is_colored(image: Image.Image) -> bool:
    """Return whether an image has pixels that are not gray. Only images of a mode with color are decoded."""
    if Image.getmodebase(image.mode) == "L":
        return False
    pixels = np.asarray(normalise(image).convert("RGB"))
    return bool((pixels.max(-1) - pixels.min(-1) > MAX_GRAY_DIFFERENCE).any())


def to_array(image: Image.Image, resolution: int, channels: int, center_crop: bool) -> np.ndarray:
    """
    Resize an image with antialiasing to cover a square, and crop it to the square.

    Args:
        image (`PIL.Image.Image`): the image, in any mode that `normalise` accepts.
        resolution (`int`): height and width of the square.
        channels (`int`): 1 for grayscale, 3 for RGB.
        center_crop (`bool`): whether to crop at the center instead of at the top left.

    Returns:
        `numpy.ndarray` of shape `(channels, resolution, resolution)`, uint8.
    """
    image = normalise(image).convert("L" if channels == 1 else "RGB")
    centering = (0.5, 0.5) if center_crop else (0.0, 0.0)
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC, centering=centering)
    return np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class ColorCheck:
    """
    A warning about the first image whose color is lost.

    Args:
        channels (`int`): 1 for grayscale, 3 for RGB.
    """

    def __init__(self, channels: int) -> None:
        self.pending = channels == 1

    def __call__(self, image: Image.Image, name: Callable[[], str]) -> None:
        if self.pending and is_colored(image):
            self.pending = False
            logger.warning("Some %s, such as %s.", COLOR_LOST, name())
