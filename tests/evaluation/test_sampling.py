"""Test sampling by the settings, shards on disk, and output formats."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.evaluation import sample_sets
from diffusers_cfg.evaluation.class_labels import parse_class_labels
from diffusers_cfg.evaluation.sample_sets import SampleSet, Shard
from diffusers_cfg.evaluation.sampling import (
    call_arguments,
    check_call,
    draw_to_folder,
    load_pipeline,
    make_scheduler,
    with_model_defaults,
)
from diffusers_cfg.evaluation.settings import SampleConfig
from tests.support.models import make_pipeline, make_unet


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(sample_sets, "SHARD_SIZE", 8)


def config_of(model: Path, *argv: str) -> SampleConfig:
    flags = ["--model", str(model), "--output_dir", str(model.parent / "images"), "--num_inference_steps", "2"]
    return parse_config(SampleConfig, [*flags, *argv])


def draw(model: Path, *argv: str) -> Path:
    config = config_of(model, *argv)
    draw_to_folder(config, Accelerator(cpu=True))
    return Path(config.output_dir)


def test_class_may_be_called_like_the_home_folder(model):
    assert config_of(model, "--class_labels", "~", "three").class_labels == ["~", "three"]


def test_png_format_writes_a_folder_per_class(model):
    folder = draw(model, "--num_samples", "11")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = ("zero", "one", "two")
    assert found == {f"{names[index % 3]}/{index:06}.png" for index in range(11)}
    image = Image.open(folder / "two" / "000002.png")
    assert (image.size, image.mode) == ((8, 8), "L")


def test_classes_are_selected_by_name_and_id(model):
    folder = draw(model, "--class_labels", "two", "0", "-1", "--num_samples", "6")
    assert sorted(path.name for path in folder.iterdir()) == ["two", "unconditional", "zero"]
    assert [path.name for path in sorted((folder / "zero").iterdir())] == ["000001.png", "000004.png"]


def test_class_name_takes_precedence_over_id():
    pipeline = make_pipeline(id2label={0: "2", 1: "one", 2: "zero"})
    assert parse_class_labels(["2", "1", "zero"], pipeline) == [0, 1, 2]


def test_class_ids_counted_from_1_raise_with_a_hint():
    with pytest.raises(
        UserError, match=r"--class_labels has unknown classes: 3\. .*Ids start at 0, and the null class is -1"
    ):
        parse_class_labels(["1", "2", "3"], make_pipeline())
    with pytest.raises(UserError, match="--class_labels has unknown classes: 4") as error:
        parse_class_labels(["4"], make_pipeline())
    assert "Ids start" not in str(error.value)


def test_variant_selects_different_ema_weights(model):
    other = make_unet()
    other.conv_out.weight.data.mul_(0.5)
    other.save_pretrained(model / "unet", variant="ema999")
    folders = [draw(model, "--num_samples", "1").rename(model.parent / "first")]
    folders.append(draw(model, "--num_samples", "1", "--variant", "ema999"))
    first, other = ((folder / "zero" / "000000.png").read_bytes() for folder in folders)
    assert first != other


def test_images_do_not_depend_on_the_number_of_samples(model):
    few = draw(model, "--num_samples", "4").rename(model.parent / "few")
    many = draw(model, "--num_samples", "20")
    for path in few.rglob("*.png"):
        a, b = (np.asarray(Image.open(f), dtype=int) for f in (path, many / path.relative_to(few)))
        assert np.abs(a - b).max() <= 1


def test_paper_sampler_is_selected_by_name(model, tmp_path):
    """The model's own scheduler does not matter."""
    own = draw(model)
    ddim = make_pipeline(scheduler=make_scheduler("DDIMScheduler", LogSNRScheduler()))
    ddim.save_pretrained(tmp_path / "a" / "ddim")
    named = draw(tmp_path / "a" / "ddim", "--scheduler", "LogSNRScheduler")
    for path in own.rglob("*.png"):
        assert (named / path.relative_to(own)).read_bytes() == path.read_bytes()


def test_number_of_steps_defaults_to_the_models(model):
    pipeline = load_pipeline(config_of(model), "cpu")
    assert with_model_defaults(config_of(model), pipeline).num_inference_steps == 2
    without = SampleConfig(model=str(model))
    assert with_model_defaults(without, pipeline).num_inference_steps == pipeline.num_inference_steps
    assert without.num_inference_steps is None


def test_npz_format_matches_adm(model):
    png = draw(model, "--num_samples", "19").rename(model.parent / "png")
    folder = draw(model, "--num_samples", "19", "--format", "npz")
    assert [path.name for path in folder.iterdir()] == ["samples.npz"]
    with np.load(folder / "samples.npz") as file:
        images, class_labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype) == ((19, 8, 8, 3), np.uint8)
    assert class_labels.tolist() == [i % 3 for i in range(19)]
    assert np.array_equal(images[13, ..., 0], np.asarray(Image.open(png / "one" / "000013.png")))


def test_grid_format_writes_one_image(model):
    folder = draw(model, "--num_samples", "13", "--format", "grid")
    grid = Image.open(folder / "grid.png")
    assert 10 * 64 < grid.width < 11 * 64 + 50
    assert 2 * 64 < grid.height < 3 * 64
    assert [path.name for path in folder.iterdir()] == ["grid.png"]


def test_rgb_model_writes_rgb_images(tmp_path):
    make_pipeline(make_unet(in_channels=3, out_channels=3)).save_pretrained(tmp_path / "model")
    folder = draw(tmp_path / "model", "--num_samples", "2", "--class_labels", "one")
    assert Image.open(folder / "one" / "000001.png").mode == "RGB"


def test_shard_with_different_classes_is_not_reused(tmp_path):
    samples, shard = SampleSet(tmp_path, 4), range(4)
    assert not samples.has(shard, np.arange(4), (8, 8))
    samples.save(shard, Shard(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), 2.0))
    assert samples.has(shard, np.arange(4), (8, 8))
    assert not samples.has(shard, np.array([0, 1, 2, 2]), (8, 8))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--class_labels", "two", "ten"], r"unknown classes: ten\. The classes are -1, 0, 1, 2, zero, one, two\."),
        (["--class_labels", "4"], "--class_labels has unknown classes: 4"),
        (["--num_samples", "0"], r"num_samples must lie in \[1, 100000000\], but is 0"),
        (["--guidance_scale", "nan"], "guidance_scale must be finite"),
        (["--guidance_interval", "5", "0.2"], r"0 ≤ σ_lo < σ_hi, but is \(5.0, 0.2\)"),
        (
            ["--variant", "ema1"],
            "--model .*model cannot be loaded: .*model has no variants. Leave out the variant 'ema1'",
        ),
        (["--guide_model", "/nowhere/at/all"], "--guide_model /nowhere/at/all cannot be loaded"),
        (["--scheduler", "Nonsense"], "--scheduler Nonsense is not supported.*UniPCMultistepScheduler"),
        (["--guider", "Nonsense"], "--guider Nonsense is not a guider of diffusers"),
        (["--guider", "Any"], "--guider Any is not a guider of diffusers"),  # the module also imports `Any`
        (
            ["--guider", "SmoothedEnergyGuidance"],
            "SmoothedEnergyGuidance cannot be created from a guidance scale alone",
        ),
        (["--guider", "MagnitudeAwareGuidance"], "MagnitudeAwareGuidance cannot guide this model"),
        *(
            (
                ["--guider", name],
                rf"--guider {name} cannot be created from a guidance scale alone: .*[^.]\. Use a guider",
            )
            for name in ("BaseGuidance", "AutoGuidance", "SkipLayerGuidance", "FrequencyDecoupledGuidance")
        ),
        (["--guider", "guider_utils"], "--guider guider_utils is not a guider of diffusers"),
        (["--class_labels", ""], "--class_labels has unknown classes: ''"),
        (["--variant", ""], "variant must not be empty. Leave out --variant, or pass a value"),
        (["--model", ""], "model must not be empty"),
        (["--num_samples", "1000000000000"], r"num_samples must lie in \[1, 100000000\], but is 1000000000000"),
        (["--num_inference_steps", "1000000000"], r"num_inference_steps must lie in \[1, 100000\]"),
        (["--guidance_scale", "1e300"], "guidance_scale must be finite"),
        (["--guidance_interval", "nan", "1"], "guidance_interval must be finite"),
        (["--batch_size", "0"], "batch_size must be at least 1, but is 0"),
        (["--seed", "-1"], "seed must be at least 0, but is -1"),
        (["--scheduler", "SASolverScheduler"], "--scheduler SASolverScheduler is not supported"),
    ],
)
def test_invalid_settings_raise_before_any_file_is_written(model, argv, message):
    with pytest.raises(UserError, match=message):
        draw(model, *argv)
    assert not (model.parent / "images").exists()


@pytest.mark.parametrize(
    "own",
    [
        ["--guidance_interval", "0.1", "5"],
        ["--guidance_rescale", "0.7"],
        ["--guide_model", "/nowhere"],
    ],
)
def test_guider_cannot_be_combined_with_the_pipelines_own_guidance(model, own):
    with pytest.raises(UserError, match=f"{own[0]} cannot be combined with --guider ClassifierFreeGuidance"):
        config_of(model, "--guider", "ClassifierFreeGuidance", *own)


@pytest.mark.parametrize(
    "argv", [["--seed", str(10**23)], ["--class_labels", "two", "two"], ["--batch_size", str(10**12)]]
)
def test_unusual_settings_are_right(model, argv):
    assert len([*draw(model, *argv, "--num_samples", "2").rglob("*.png")]) == 2


@pytest.mark.parametrize(
    ("unet", "settings", "message"),
    [
        ({"num_class_embeds": 3}, {"id2label": {0: "zero", 1: "one"}}, r"different classes, .*\(2, 'two'\)"),
        ({"num_class_embeds": 3}, {"id2label": None}, "guide_unet.num_classes must be the UNet's 3, but is 2"),
        ({}, {"id2label": {0: "a", 1: "one", 2: "two"}}, r"different classes, .*\[\(0, 'a'\), \(0, 'zero'\)\]"),
        ({"in_channels": 3, "out_channels": 3}, {}, "guide_unet.config.in_channels must be the UNet's 1, but is 3"),
        (
            {"max_guidance_scale": 4.0},
            {},
            "guide_unet.max_guidance_scale must be None: a network that guides in one pass",
        ),
        ({}, {"scheduler": LogSNRScheduler(log_snr_min=-10.0)}, "does not match the noise process"),
        ({}, {"scheduler": LogSNRScheduler(prediction_type="v_prediction")}, "does not match the noise process"),
    ],
)
def test_guide_model_must_fit(model, tmp_path, unet, settings, message):
    make_pipeline(make_unet(**unet), **settings).save_pretrained(tmp_path / "guide")
    with pytest.raises(UserError, match=message):
        draw(model, "--guide_model", str(tmp_path / "guide"))
    assert not (tmp_path / "images").exists()


def test_checkpoint_can_be_the_guide(trained_model, tmp_path):
    flags = ["--model", str(trained_model), "--guide_model", str(trained_model / "checkpoint-2")]
    config = parse_config(SampleConfig, [*flags, "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")])
    draw_to_folder(config, Accelerator(cpu=True))
    assert len([*(tmp_path / "out").rglob("*.png")]) == 20


def test_non_empty_output_folder_raises(model):
    draw(model, "--num_samples", "1")
    with pytest.raises(UserError, match="--output_dir .*images is not empty. Choose a different folder"):
        draw(model, "--num_samples", "1")


@pytest.mark.parametrize("w", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("flags", [[], ["--guider", "ClassifierFreeGuidance"], ["--guide_model", "MODEL"]])
def test_check_call_does_not_evaluate_a_network(model, flags, w):
    config = config_of(model, *(str(model) if flag == "MODEL" else flag for flag in flags))
    pipeline = load_pipeline(config, "cpu")

    def never(*_):
        raise AssertionError("a network was evaluated")

    for network in (pipeline.unet, pipeline.guide_unet or pipeline.unet):
        network.conv_in.register_forward_pre_hook(never)
    before = torch.get_rng_state()
    check_call(pipeline, **call_arguments(config, w))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(AssertionError, match="a network was evaluated"):
        pipeline(0, **call_arguments(config, w))
