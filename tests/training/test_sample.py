"""Images for people who only want images."""

from pathlib import Path

import numpy as np
import pytest
import sample
from config import UserError
from tests.support.models import make_pipeline, make_unet
from diffusers import DDIMScheduler
from PIL import Image
from sample import parse_args

from diffusers_cfg import LogSNRScheduler


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(sample, "SHARD_SIZE", 8)


@pytest.fixture
def model(tmp_path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def draw(model: Path, *argv: str) -> Path:
    output_dir = model.parent / "images"
    flags = ["--model", str(model), "--output_dir", str(output_dir), "--num_inference_steps", "2"]
    sample.sample(parse_args([*flags, *argv]))
    return output_dir


def test_a_folder_of_images(model):
    folder = draw(model, "--num_samples", "11")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = ("zero", "one", "two")
    assert found == {f"{names[index % 3]}/{index:06}.png" for index in range(11)}
    image = Image.open(folder / "two" / "000002.png")
    assert (image.size, image.mode) == ((8, 8), "L")


def test_classes_by_name_and_id(model):
    folder = draw(model, "--class_labels", "two", "0", "-1", "--num_samples", "6")
    assert sorted(path.name for path in folder.iterdir()) == ["two", "unconditional", "zero"]
    assert [path.name for path in sorted((folder / "zero").iterdir())] == ["000001.png", "000004.png"]


def test_another_average_of_the_weights(model):
    other = make_unet()
    other.conv_out.weight.data.mul_(0.5)
    other.save_pretrained(model / "unet", variant="ema999")
    folders = [draw(model, "--num_samples", "1").rename(model.parent / "first")]
    folders.append(draw(model, "--num_samples", "1", "--variant", "ema999"))
    first, other = ((folder / "zero" / "000000.png").read_bytes() for folder in folders)
    assert first != other


def test_images_do_not_depend_on_how_many_there_are(model):
    few = draw(model, "--num_samples", "4").rename(model.parent / "few")
    many = draw(model, "--num_samples", "20")
    for path in few.rglob("*.png"):
        a, b = (np.asarray(Image.open(f), dtype=int) for f in (path, many / path.relative_to(few)))
        assert np.abs(a - b).max() <= 1


def test_the_papers_sampler_by_its_name(model, tmp_path):
    """Also for a model that was saved with another."""
    own = draw(model)
    make_pipeline(scheduler=DDIMScheduler.from_config(LogSNRScheduler().config)).save_pretrained(
        tmp_path / "a" / "ddim"
    )
    named = draw(tmp_path / "a" / "ddim", "--scheduler", "LogSNRScheduler")
    for path in own.rglob("*.png"):
        assert (named / path.relative_to(own)).read_bytes() == path.read_bytes()


def test_an_npz_as_adm_has_it(model):
    png = draw(model, "--num_samples", "19").rename(model.parent / "png")
    folder = draw(model, "--num_samples", "19", "--format", "npz")
    assert [path.name for path in folder.iterdir()] == ["samples.npz"]
    with np.load(folder / "samples.npz") as file:
        images, class_labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype) == ((19, 8, 8, 3), np.uint8)
    assert class_labels.tolist() == [i % 3 for i in range(19)]
    assert np.array_equal(images[13, ..., 0], np.asarray(Image.open(png / "one" / "000013.png")))


def test_a_grid(model):
    folder = draw(model, "--num_samples", "13", "--format", "grid")
    grid = Image.open(folder / "grid.png")
    assert 10 * 64 < grid.width < 11 * 64 + 50
    assert 2 * 64 < grid.height < 3 * 64
    assert [path.name for path in folder.iterdir()] == ["grid.png"]


def test_colour_stays_colour(tmp_path):
    make_pipeline(make_unet(in_channels=3, out_channels=3)).save_pretrained(tmp_path / "model")
    folder = draw(tmp_path / "model", "--num_samples", "2", "--class_labels", "one")
    assert Image.open(folder / "one" / "000001.png").mode == "RGB"


def test_a_shard_of_other_classes_is_not_the_one_wanted(tmp_path):
    samples, shard = sample.SampleSet(tmp_path, 4), range(4)
    assert not samples.has(shard, np.arange(4))
    samples.save(shard, sample.Shard(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), 2.0))
    assert samples.has(shard, np.arange(4))
    assert not samples.has(shard, np.array([0, 1, 2, 2]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--class_labels", "two", "ten"], "--class_labels ten: the classes are -1, 0, 1, 2, zero, one, two"),
        (["--class_labels", "3"], "--class_labels 3"),
        (["--num_samples", "0"], "--num_samples must be at least 1, but is 0"),
        (["--guidance_scale", "nan"], "guidance_scale must be finite"),
        (["--variant", "ema1"], "A model cannot be loaded: .*variant=ema1"),
        (["--guide_model", "/nowhere/at/all"], "A model cannot be loaded"),
    ],
)
def test_what_cannot_be_drawn_is_named(model, argv, message):
    with pytest.raises(UserError, match=message):
        draw(model, *argv)
    assert list((model.parent / "images").rglob("*.png")) == []


def test_a_folder_with_something_in_it_is_left_alone(model):
    draw(model, "--num_samples", "1")
    with pytest.raises(UserError, match="--output_dir .*images is not empty: choose another"):
        draw(model, "--num_samples", "1")
