"""Decode an image to the 8-bit array that training sees."""

import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

# PIL warns of an image of more pixels than its limit, and refuses one of more than twice as many. That is enough.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def normalise(image: Image.Image) -> Image.Image:
    """
    What PIL opened, as it is meant to be seen, in 8 bits: "L" if it is grey, else "RGB". It is upright, has white where
    it is transparent, and of several frames it is the first.

    Raises:
        ValueError: it is of 32-bit numbers, of which nothing says what is black and what white.
    """
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(f'its pixels are 32-bit numbers (mode "{image.mode}") of unknown range: save it with 8 or 16')
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        pixels = np.asarray(image)
        grey = (pixels >> 8).astype(np.uint8)  # the high byte, which is what PIL keeps of 16-bit colours
        grey[pixels == image.info.get("transparency")] = 255
        return Image.fromarray(grey)
    palette = image.getpalette() or []
    is_grey = image.mode in ("1", "L", "LA") or (palette and palette[0::3] == palette[1::3] == palette[2::3])
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    mode = "L" if is_grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_array(image: Image.Image, resolution: int, channels: int, center_crop: bool) -> np.ndarray:
    """A PIL image to uint8 `(channels, resolution, resolution)`: resized with antialiasing to cover it, and cropped."""
    image = normalise(image).convert("L" if channels == 1 else "RGB")
    centering = (0.5, 0.5) if center_crop else (0.0, 0.0)
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC, centering=centering)
    return np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
