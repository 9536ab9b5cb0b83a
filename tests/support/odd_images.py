"""Make files of every kind of image that PIL reads, with their pixels, and files that cannot be read."""

import io
import struct
import zlib

import numpy as np
import PIL
from PIL import ExifTags, Image, PngImagePlugin

RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
WHITE, HALF_LIME, HALF_BLUE = (255, 255, 255), (127, 255, 127), (127, 127, 255)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    """Return an image encoded as a file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def row(*pixels, dtype: str = "uint8") -> Image.Image:
    """Return an image of one row of pixels."""
    return Image.fromarray(np.array([pixels], dtype))


def row_in(mode: str, *pixels) -> Image.Image:
    """Return an image of one row of pixels in a PIL mode."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def with_palette(*colors) -> Image.Image:
    """Return an image with a palette, and one pixel of each of its colors."""
    image = row_in("P", *range(len(colors)))
    image.putpalette([value for color in colors for value in color])
    return image


def several_frames(kind: str, **settings) -> bytes:
    """Return an animation of three frames, 3×1 pixels each. The first frame is lime."""
    frames = [Image.new("RGB", (3, 1), color) for color in (LIME, RED, BLUE)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)


def on_its_side(image: Image.Image) -> bytes:
    """Return a PNG with rotated pixels, and the EXIF orientation that turns it upright, as a camera writes it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def transparent_16_bit() -> bytes:
    """Return a 16-bit grayscale PNG with one transparent value, a kind that PIL reads but does not write."""
    chunk = io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"tRNS", (257).to_bytes(2))
    data = encoded(row(0, 257, 65535, dtype="uint16"), "PNG")
    offset = data.index(b"IDAT") - 4
    return data[:offset] + chunk.getvalue() + data[offset:]


def color_16_bit() -> bytes:
    """Return an RGB PNG of one pixel with 16 bits per channel, which PIL opens with 8 bits."""
    file, pixel = io.BytesIO(b"\x89PNG\r\n\x1a\n"), struct.pack(">x3H", 65535, 257, 0)
    file.seek(0, io.SEEK_END)
    PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0))
    PngImagePlugin.putchunk(file, b"IDAT", zlib.compress(pixel))
    PngImagePlugin.putchunk(file, b"IEND")
    return file.getvalue()


GRAY_BLOCK = Image.new("L", (8, 8), 40)
INKS = {WHITE: (0, 0, 0, 0), (0, 255, 255): (255, 0, 0, 0), (0, 0, 0): (0, 0, 0, 255)}

# Contents of files, and their pixels from left to right.
READABLE = {
    "bits": (encoded(row(True, False, dtype="bool"), "PNG"), [255, 0]),
    "grayscale": (encoded(row(0, 7, 255), "PNG"), [0, 7, 255]),
    "color": (encoded(row(RED, (1, 2, 3)), "PNG"), [RED, (1, 2, 3)]),
    "16-bit grayscale": (encoded(row(0, 257, 32896, 65535, dtype="uint16"), "PNG"), [0, 1, 128, 255]),
    "16-bit grayscale, big-endian": (encoded(row(0, 257, 65535, dtype=">u2"), "TIFF"), [0, 1, 255]),
    "16-bit grayscale, PGM": (encoded(row(0, 257, 65535, dtype="uint16"), "PPM"), [0, 1, 255]),
    "16-bit grayscale, on its side": (on_its_side(row(0, 65535, dtype="uint16")), [0, 255]),
    "16-bit grayscale, transparent": (transparent_16_bit(), [0, 255, 255]),
    "16-bit color": (color_16_bit(), [(255, 1, 0)]),
    "alpha": (encoded(row((*RED, 0), (*LIME, 255), (*BLUE, 128)), "PNG"), [WHITE, LIME, HALF_BLUE]),
    "alpha, WebP": (
        encoded(row((*RED, 0), (*LIME, 255), (*BLUE, 128)), "WEBP", lossless=True, exact=True),
        [WHITE, LIME, HALF_BLUE],
    ),
    "grayscale and alpha": (encoded(row((10, 0), (20, 255), (30, 128)), "PNG"), [255, 20, 142]),
    "a transparent gray": (encoded(row(5, 200), "PNG", transparency=5), [255, 200]),
    "a transparent bit": (encoded(row(True, False, dtype="bool"), "PNG", transparency=0), [255, 255]),
    "a transparent color": (encoded(row(RED, LIME), "PNG", transparency=RED), [WHITE, LIME]),
    "palette": (encoded(with_palette(RED, LIME, BLUE), "PNG"), [RED, LIME, BLUE]),
    "palette of grays": (encoded(with_palette((9,) * 3, (0,) * 3, (77,) * 3), "PNG"), [9, 0, 77]),
    "palette, one transparent": (encoded(with_palette(RED, LIME, BLUE), "GIF", transparency=0), [WHITE, LIME, BLUE]),
    "palette, all half": (
        encoded(with_palette(RED, LIME, BLUE), "PNG", transparency=bytes([0, 128, 255])),
        [WHITE, HALF_LIME, BLUE],
    ),
    "CMYK": (encoded(row_in("CMYK", *INKS.values()), "TIFF"), list(INKS)),
    "GIF of three frames": (several_frames("GIF"), [LIME] * 3),
    "WebP of three frames": (several_frames("WEBP", lossless=True), [LIME] * 3),
    "PNG of three frames": (several_frames("PNG"), [LIME] * 3),
    "TIFF of three frames": (several_frames("TIFF"), [LIME] * 3),
}
if int(PIL.__version__.split(".")[0]) >= 13:  # earlier versions cannot read their own YCbCr files
    READABLE["YCbCr"] = (
        encoded(row_in("YCbCr", (255, 128, 128), (0, 128, 128)), "TIFF"),
        [WHITE, (0, 0, 0)],
    )
# Contents of files, and the error that they raise. The bomb is refused with a limit of 10,000 pixels.
UNREADABLE = {
    "float.tif": (encoded(row(0.0, 0.5, dtype="float32"), "TIFF"), 'mode "F".* of unknown range. Save the image'),
    "integer.tif": (encoded(row(0, 9, dtype="int32"), "TIFF"), 'mode "I".* of unknown range'),
    "truncated.png": (encoded(GRAY_BLOCK, "PNG")[:-30], "truncated"),
    "truncated.jpg": (encoded(GRAY_BLOCK, "JPEG")[:-10], "(?i)truncated"),
    "truncated.gif": (encoded(GRAY_BLOCK, "GIF")[:-10], "truncated"),
    "truncated.webp": (encoded(GRAY_BLOCK, "WEBP")[:-10], "decoder"),
    "empty.png": (b"", "cannot identify"),
    "no_pixels.pgm": (b"P5 0 4 255 ", "cannot identify"),
    "bomb.png": (encoded(Image.new("1", (201, 101)), "PNG"), "decompression bomb"),
}
