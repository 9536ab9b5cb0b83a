"""Test the decoding of every kind of image."""

import io
import runpy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_cfg.data import decoding
from diffusers_cfg.data.decoding import has_8_bits, normalise, to_array, to_float
from tests.support.odd_images import INKS, LIME, READABLE, RED, UNREADABLE, WHITE, encoded, row_in


def test_images_are_resized_to_cover_the_square_and_cropped():
    wide = Image.new("L", (30, 10), 0)
    wide.paste(255, (10, 0, 20, 10))
    assert to_array(wide, 10, 1, center_crop=True).min() == 255
    assert to_array(wide, 10, 1, center_crop=False).max() == 0
    assert to_array(wide, 5, 3, center_crop=True).shape == (3, 5, 5)


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile([0, 255], (64, 32)).astype(np.uint8))
    assert abs(to_array(stripes, 8, 1, center_crop=True).astype(int) - 127).max() < 20


def test_images_are_scaled_to_minus_1_to_1():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("kind", READABLE)
def test_odd_images_are_decoded_as_they_are_displayed(kind):
    data, expected = READABLE[kind]
    image = normalise(Image.open(io.BytesIO(data)))
    assert image.mode == ("RGB" if isinstance(expected[0], tuple) else "L")
    np.testing.assert_array_equal(np.asarray(image)[0], expected)


@pytest.mark.parametrize("kind", READABLE)
def test_more_than_8_bits_are_recognized_in_the_header(kind):
    assert has_8_bits(Image.open(io.BytesIO(READABLE[kind][0]))) == ("16-bit" not in kind)


@pytest.mark.parametrize("name", ["float.tif", "integer.tif"])
def test_32_bits_are_recognized_in_the_header(name):
    assert not has_8_bits(Image.open(io.BytesIO(UNREADABLE[name][0])))


def test_palette_with_an_alpha_channel():
    # Made in memory, since few file formats support it
    image = row_in("PA", (0, 255), (1, 0))
    image.putpalette([*RED, *LIME])
    np.testing.assert_array_equal(np.asarray(normalise(image))[0], [RED, WHITE])


def test_cmyk_jpeg_and_lab_are_decoded_up_to_rounding():
    # Adobe's programs and PIL write CMYK inverted to a JPEG
    files = {color: encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100) for color, ink in INKS.items()}
    files[250, 10, 30] = encoded(Image.new("RGB", (8, 8), (250, 10, 30)).convert("LAB"), "TIFF")
    for color, data in files.items():
        np.testing.assert_allclose(np.asarray(normalise(Image.open(io.BytesIO(data))))[4, 4], color, atol=2)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1)])
def test_extreme_aspect_ratios(size):
    assert (to_array(Image.new("RGB", size, RED), 64, 3, center_crop=True) == np.reshape(RED, (3, 1, 1))).all()


def test_huge_images_are_decoded_without_a_warning(monkeypatch):
    """PIL warns about an image above its pixel limit, and refuses an image above twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    huge = encoded(Image.new("1", (150, 100)), "PNG")
    with pytest.warns(Image.DecompressionBombWarning):  # pytest resets the filter that `decoding` sets at import
        Image.open(io.BytesIO(huge))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_array = runpy.run_path(decoding.__file__)["to_array"]  # runs the module, which sets its filter again
        assert to_array(Image.open(io.BytesIO(huge)), 8, 1, True).shape == (1, 8, 8)
    assert caught == []
