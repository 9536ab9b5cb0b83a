import io
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from config import TrainConfig, UserError
from data import (
    CachedImages,
    LazyImages,
    class_ids,
    load_labelled_images,
    normalise,
    stack_images,
    to_array,
    to_float,
    training_dataset,
)
from PIL import ExifTags, Image, PngImagePlugin

TRAINING = Path(__file__).parents[2] / "training"


def picture(value: int, size=(12, 10), mode="RGB") -> Image.Image:
    return Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value))


@pytest.fixture
def folder(tmp_path):
    """Three classes of four colour pictures."""
    for label, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            picture(label * 100).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def config(tmp_path, **settings) -> TrainConfig:
    return TrainConfig(**{"resolution": 8, "cache_dir": str(tmp_path / "cache"), **settings})


def save_dataset(path, labels, feature=None) -> str:
    """A data set in the Hub's layout, a grey picture a row."""
    features = {"image": datasets.Image(), "label": feature} if feature else None
    rows = {"image": [picture(10 * i, mode="L") for i in range(len(labels))], "label": labels}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features) if features else None)
    if features is None:
        dataset = dataset.cast_column("image", datasets.Image())
    path.mkdir()
    dataset.to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


# ----- sources -----


def test_digits():
    images = load_labelled_images(TrainConfig(resolution=8))
    assert (len(images), images.channels, images.id2label[3]) == (1797, 1, "three")
    data = stack_images(images, TrainConfig(resolution=8), 1, show_progress=False)
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 255)


def test_a_folder_of_class_folders(folder, tmp_path):
    images = load_labelled_images(config(tmp_path, train_data_dir=str(folder)))
    assert images.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert images.channels == 3
    data = stack_images(images, config(tmp_path), 3, show_progress=False)
    assert data.images.shape == (12, 3, 8, 8)
    assert torch.equal(data.images[:, 0, 0, 0] // 100, data.class_labels)


def test_a_data_set_in_the_hubs_layout(tmp_path):
    names = ["no", "yes"]
    source = save_dataset(tmp_path / "data", [0, 1, 1, -1], datasets.ClassLabel(names=names))
    images = load_labelled_images(config(tmp_path, dataset_name=source))
    assert images.id2label == {0: "no", 1: "yes"}
    assert images.class_labels.tolist() == [0, 1, 1, -1]
    assert images.channels == 1
    assert np.asarray(images.open_image(2))[0, 0] == 20


def test_a_data_set_written_by_save_to_disk(tmp_path):
    dataset = datasets.load_dataset(save_dataset(tmp_path / "data", [0, 1]), cache_dir=str(tmp_path / "cache"))
    dataset.save_to_disk(tmp_path / "all")
    dataset["train"].save_to_disk(tmp_path / "one")
    for name in ("all", "one"):
        assert len(load_labelled_images(config(tmp_path, dataset_name=str(tmp_path / name)))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_column": "species"}, r"no column 'species'.*--label_column can be one of \['image', 'label'\]"),
        ({"image_column": "picture"}, r"no column 'picture'.*\['image', 'label'\]"),
        ({"image_column": "label"}, r"holds ClassLabel, not images.*\['image'\]"),
        ({"dataset_split": "test"}, "cannot be loaded.*test"),
        ({"train_data_dir": "/nowhere"}, "/nowhere is not a folder"),
        ({"train_data_dir": None, "dataset_name": "/nowhere/at/all"}, "'/nowhere/at/all' cannot be loaded"),
    ],
)
def test_what_is_missing_is_named(folder, tmp_path, settings, message):
    settings = {"train_data_dir": str(folder), **settings}
    with pytest.raises(UserError, match=message):
        load_labelled_images(config(tmp_path, **settings))


def test_a_folder_without_class_folders(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(UserError, match="has no folders in it, but each class needs a folder of its own"):
        load_labelled_images(config(tmp_path, train_data_dir=str(tmp_path / "flat")))


def test_a_single_class_is_refused(tmp_path):
    source = save_dataset(tmp_path / "data", [1, 1, -1], datasets.ClassLabel(names=["no", "yes"]))
    with pytest.raises(UserError, match=r"at least two classes, but the data has 1 \['yes'\]"):
        load_labelled_images(config(tmp_path, dataset_name=source))


# ----- labels -----


@pytest.mark.parametrize(
    ("labels", "names", "ids", "id2label", "said"),
    [
        ([0, 1, 1], ["a", "b"], [0, 1, 1], {0: "a", 1: "b"}, ""),
        ([0, 2, 1], None, [0, 2, 1], {0: "0", 1: "1", 2: "2"}, ""),
        ([3, 7, 3], None, [0, 1, 0], {0: "3", 1: "7"}, "3 -> 0, 7 -> 1"),
        (["b", "a"], None, [1, 0], {0: "a", 1: "b"}, "'a' -> 0, 'b' -> 1"),
        ([True, False], None, [1, 0], {0: "False", 1: "True"}, ""),
        ([0, -1, None, 1], None, [0, -1, -1, 1], {0: "0", 1: "1"}, "2 of 4 images have no label"),
    ],
)
def test_labels_become_ids(labels, names, ids, id2label, said, caplog):
    class_labels, actual = class_ids(labels, names)
    assert class_labels.tolist() == ids
    assert class_labels.dtype == np.int64
    assert actual == id2label
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0.0, 1.0], None, r"but are float \(0.0, 1.0"),
        ([0, "a"], None, "int, str"),
        ([0, 5], ["a", "b"], "from 0 to 5, but there are 2 names"),
    ],
)
def test_other_labels_are_refused(labels, names, message):
    with pytest.raises(UserError, match=message):
        class_ids(labels, names)


# ----- decoding -----


def test_images_are_covered_and_cropped():
    wide = Image.new("L", (30, 10), 0)
    wide.paste(255, (10, 0, 20, 10))
    assert to_array(wide, 10, 1, center_crop=True).min() == 255
    assert to_array(wide, 10, 1, center_crop=False).max() == 0
    assert to_array(wide, 5, 3, center_crop=True).shape == (3, 5, 5)


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile([0, 255], (64, 32)).astype(np.uint8))
    assert abs(to_array(stripes, 8, 1, center_crop=True).astype(int) - 127).max() < 20


def test_the_range_of_images():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("lazy", [False, True])
def test_both_kinds_of_data_set_give_the_same_batches(folder, tmp_path, lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr("data.MAX_CACHED_BYTES", 0)
    settings = config(tmp_path, train_data_dir=str(folder))
    data = training_dataset(load_labelled_images(settings), settings, 3, show_progress=False)
    assert isinstance(data, LazyImages if lazy else CachedImages)
    batch = data.__getitems__([0, 11, 5])
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.class_labels.tolist() == [0, 2, 1]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 200, 100]
    assert batch.unreadable == []


@pytest.mark.parametrize("lazy", [False, True])
def test_unreadable_images_are_named_and_skipped(folder, tmp_path, lazy, caplog):
    (folder / "dog" / "1.png").write_bytes(b"not a picture")
    settings = config(tmp_path, train_data_dir=str(folder), max_unreadable_fraction=0.1)
    images = load_labelled_images(settings)
    if lazy:
        batch = LazyImages(images, 8, 3, True).__getitems__([5, 4])
        assert len(batch.unreadable) == 1
        assert "1.png" in batch.unreadable[0]
        assert batch.class_labels.tolist() == [1, 1]
    else:
        with caplog.at_level(logging.WARNING):
            assert len(stack_images(images, settings, 3, show_progress=False)) == 11
        assert "1.png" in caplog.text


def test_too_many_unreadable_images_stop_the_run(folder, tmp_path):
    for name in ("0.png", "1.png"):
        (folder / "dog" / name).write_bytes(b"not a picture")
    settings = config(tmp_path, train_data_dir=str(folder), max_unreadable_fraction=0.1)
    with pytest.raises(UserError, match=r"2 of 12 images cannot be read.*0\.1.*0\.png"):
        stack_images(load_labelled_images(settings), settings, 3, show_progress=False)


# ----- odd images -----

RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
WHITE, HALF_LIME, HALF_BLUE = (255, 255, 255), (127, 255, 127), (127, 127, 255)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def row(*pixels, dtype: str = "uint8") -> Image.Image:
    """A picture one pixel high."""
    return Image.fromarray(np.array([pixels], dtype))


def row_in(mode: str, *pixels) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def with_palette(*colours) -> Image.Image:
    """A picture one pixel high, of each of some colours."""
    image = row_in("P", *range(len(colours)))
    image.putpalette([value for colour in colours for value in colour])
    return image


def several_frames(kind: str, **settings) -> bytes:
    frames = [Image.new("RGB", (3, 1), colour) for colour in (LIME, RED, BLUE)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)


def on_its_side(image: Image.Image) -> bytes:
    """As a camera that was turned writes it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def transparent_16_bit() -> bytes:
    """A 16-bit grey PNG of which one value is transparent, which PIL reads and does not write."""
    chunk = io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"tRNS", (257).to_bytes(2))
    data = encoded(row(0, 257, 65535, dtype="uint16"), "PNG")
    place = data.index(b"IDAT") - 4
    return data[:place] + chunk.getvalue() + data[place:]


GREY_BLOCK = Image.new("L", (8, 8), 40)
INKS = {WHITE: (0, 0, 0, 0), (0, 255, 255): (255, 0, 0, 0), (0, 0, 0): (0, 0, 0, 255)}

# What a file shows, from left to right
READABLE = {
    "bits": (encoded(row(True, False, dtype="bool"), "PNG"), [255, 0]),
    "grey": (encoded(row(0, 7, 255), "PNG"), [0, 7, 255]),
    "colour": (encoded(row(RED, (1, 2, 3)), "PNG"), [RED, (1, 2, 3)]),
    "grey of 16 bits": (encoded(row(0, 257, 32896, 65535, dtype="uint16"), "PNG"), [0, 1, 128, 255]),
    "grey of 16 bits, big-endian": (encoded(row(0, 257, 65535, dtype=">u2"), "TIFF"), [0, 1, 255]),
    "grey of 16 bits, as PGM": (encoded(row(0, 257, 65535, dtype="uint16"), "PPM"), [0, 1, 255]),
    "grey of 16 bits, on its side": (on_its_side(row(0, 65535, dtype="uint16")), [0, 255]),
    "grey of 16 bits, transparent": (transparent_16_bit(), [0, 255, 255]),
    "alpha": (encoded(row((*RED, 0), (*LIME, 255), (*BLUE, 128)), "PNG"), [WHITE, LIME, HALF_BLUE]),
    "alpha, WebP": (
        encoded(row((*RED, 0), (*LIME, 255), (*BLUE, 128)), "WEBP", lossless=True, exact=True),
        [WHITE, LIME, HALF_BLUE],
    ),
    "grey and alpha": (encoded(row((10, 0), (20, 255), (30, 128)), "PNG"), [255, 20, 142]),
    "a transparent grey": (encoded(row(5, 200), "PNG", transparency=5), [255, 200]),
    "a transparent bit": (encoded(row(True, False, dtype="bool"), "PNG", transparency=0), [255, 255]),
    "a transparent colour": (encoded(row(RED, LIME), "PNG", transparency=RED), [WHITE, LIME]),
    "palette": (encoded(with_palette(RED, LIME, BLUE), "PNG"), [RED, LIME, BLUE]),
    "palette of greys": (encoded(with_palette((9,) * 3, (0,) * 3, (77,) * 3), "PNG"), [9, 0, 77]),
    "palette, one transparent": (encoded(with_palette(RED, LIME, BLUE), "GIF", transparency=0), [WHITE, LIME, BLUE]),
    "palette, all half": (
        encoded(with_palette(RED, LIME, BLUE), "PNG", transparency=bytes([0, 128, 255])),
        [WHITE, HALF_LIME, BLUE],
    ),
    "CMYK": (encoded(row_in("CMYK", *INKS.values()), "TIFF"), list(INKS)),
    "YCbCr": (encoded(row_in("YCbCr", (255, 128, 128), (0, 128, 128)), "TIFF"), [WHITE, (0, 0, 0)]),
    "GIF of three frames": (several_frames("GIF"), [LIME] * 3),
    "WebP of three frames": (several_frames("WEBP", lossless=True), [LIME] * 3),
    "PNG of three frames": (several_frames("PNG"), [LIME] * 3),
    "TIFF of three frames": (several_frames("TIFF"), [LIME] * 3),
}
UNREADABLE = {
    "float.tif": (encoded(row(0.0, 0.5, dtype="float32"), "TIFF"), 'mode "F".* of unknown range: save it with 8 or 16'),
    "integer.tif": (encoded(row(0, 9, dtype="int32"), "TIFF"), 'mode "I".* of unknown range'),
    "truncated.png": (encoded(GREY_BLOCK, "PNG")[:-30], "truncated"),
    "truncated.jpg": (encoded(GREY_BLOCK, "JPEG")[:-10], "(?i)truncated"),
    "truncated.gif": (encoded(GREY_BLOCK, "GIF")[:-10], "truncated"),
    "truncated.webp": (encoded(GREY_BLOCK, "WEBP")[:-10], "decoder"),
    "empty.png": (b"", "cannot identify"),
    "no_pixels.pgm": (b"P5 0 4 255 ", "cannot identify"),
    "bomb.png": (encoded(Image.new("1", (201, 101)), "PNG"), "decompression bomb"),
}


@pytest.mark.parametrize("kind", READABLE)
def test_odd_images_come_out_as_they_are_seen(kind):
    data, expected = READABLE[kind]
    image = normalise(Image.open(io.BytesIO(data)))
    assert image.mode == ("RGB" if isinstance(expected[0], tuple) else "L")
    np.testing.assert_array_equal(np.asarray(image)[0], expected)


def test_palette_with_an_alpha_channel():
    """In memory, as few formats have it."""
    image = row_in("PA", (0, 255), (1, 0))
    image.putpalette([*RED, *LIME])
    np.testing.assert_array_equal(np.asarray(normalise(image))[0], [RED, WHITE])


def test_colours_that_are_rounded():
    """CMYK in a JPEG, which Adobe's programs and PIL write inverted, and LAB."""
    files = {colour: encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100) for colour, ink in INKS.items()}
    files[250, 10, 30] = encoded(Image.new("RGB", (8, 8), (250, 10, 30)).convert("LAB"), "TIFF")
    for colour, data in files.items():
        np.testing.assert_allclose(np.asarray(normalise(Image.open(io.BytesIO(data))))[4, 4], colour, atol=2)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1)])
def test_slivers(size):
    assert (to_array(Image.new("RGB", size, RED), 64, 3, center_crop=True) == np.reshape(RED, (3, 1, 1))).all()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_whatever_it_is(folder, tmp_path, monkeypatch, caplog, name, lazy):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # the bomb has a little more than twice as many
    data, reason = UNREADABLE[name]
    (folder / "dog" / f"0-{name}").write_bytes(data)
    settings = config(tmp_path, train_data_dir=str(folder), max_unreadable_fraction=0.1)
    images = load_labelled_images(settings)
    with pytest.raises(Exception, match=reason):
        to_array(images.open_image(4), 8, 3, center_crop=True)
    if lazy:
        batch = LazyImages(images, 8, 3, True).__getitems__([4, 5])
        assert [name in said for said in batch.unreadable] == [True]
        assert batch.images[:, 0, 0, 0].tolist() == [100, 100]
    else:
        assert len(stack_images(images, settings, 3, show_progress=False)) == 12
        assert f"Skipped an image that cannot be read: row 4 ({folder}/dog/0-{name}): " in caplog.text


def test_odd_images_from_disk(tmp_path, monkeypatch):
    """By both kinds of data set, among plain images."""
    for i, (data, _) in enumerate(READABLE.values()):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i // 2}.png"  # PIL goes by what is in a file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    settings = config(tmp_path, train_data_dir=str(tmp_path / "data"), resolution=8)
    images = load_labelled_images(settings)
    everything = list(range(len(READABLE)))
    batches = []
    for limit in (2**30, 0):
        monkeypatch.setattr("data.MAX_CACHED_BYTES", limit)
        batches.append(training_dataset(images, settings, 3, show_progress=False).__getitems__(everything))
    assert batches[0].unreadable == batches[1].unreadable == []
    torch.testing.assert_close(batches[0].images, batches[1].images, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["grey of 16 bits", "palette of greys", "grey and alpha", "bits", "palette", "alpha"])
def test_a_data_set_is_grey_if_its_images_come_out_grey(tmp_path, kind):
    data, expected = READABLE[kind]
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(data)
    images = load_labelled_images(config(tmp_path, train_data_dir=str(tmp_path / "data")))
    assert images.channels == (3 if isinstance(expected[0], tuple) else 1)


@pytest.mark.slow
def test_huge_images_are_read_in_silence(tmp_path):
    """As huge as PIL warns of, and not as it refuses."""
    Image.new("1", (150, 100)).save(tmp_path / "huge.png")
    script = (
        "import data; from PIL import Image; Image.MAX_IMAGE_PIXELS = 10_000\n"
        "print(data.to_array(Image.open('huge.png'), 8, 1, True).shape)"
    )
    path = {"PYTHONPATH": str(TRAINING)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(1, 8, 8)\n", "")
