"""Test the settings of train_classifier.py: which it takes from the diffusion model, and which it refuses."""

from pathlib import Path

import pytest
from PIL import Image

from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.method_settings import (
    CFGConfig,
    ClassifierConfig,
    DDGANConfig,
    DistillationConfig,
    VDMConfig,
)
from tests.support.commands import check_refused, load_command
from tests.support.models import ddgan, make_pipeline, make_unet
from tests.support.runs import train_classifier


def parse(model: Path | str, *argv: str) -> ClassifierConfig:
    return parse_config(ClassifierConfig, ["--pretrained_model_name_or_path", str(model), *argv])


def test_defaults_are_those_of_the_digits():
    config = parse("me/digits")
    assert (config.resolution, config.block_out_channels, config.max_train_steps) == (8, [32, 64], 1500)
    assert (config.train_val_split, config.adam_weight_decay, config.output_dir) == (0.1, 0.01, "classifier-model")
    config = parse("me/cats", "--dataset_name", "me/cats")
    assert (config.resolution, config.block_out_channels, config.train_val_split) == (64, [128, 256, 256, 256], 0.1)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"dataset_name": "pets", "resolution": 32, "image_column": "img", "random_flip": True}),
        (["--resolution", "16"], {"dataset_name": "pets", "resolution": 16}),
        (["--dataset_name", "cars"], {"dataset_name": "cars", "resolution": 32}),
        (["--train_data_dir", "cars"], {"dataset_name": None, "dataset_config_name": None, "train_data_dir": "cars"}),
    ],
)
@pytest.mark.parametrize("config_class", [ClassifierConfig, DistillationConfig])
def test_data_are_those_of_the_model_unless_others_are_given(tmp_path, config_class, argv, expected):
    settings = {"dataset_name": "pets", "dataset_config_name": "small", "image_column": "img", "random_flip": True}
    CFGConfig(**settings, resolution=32, learning_rate=0.5).save(tmp_path / "train_config.yaml")
    flag = "--teacher" if config_class is DistillationConfig else "--pretrained_model_name_or_path"
    config = parse_config(config_class, [flag, str(tmp_path), *argv])
    assert {name: getattr(config, name) for name in expected} == expected
    # Only a student has the optimizer of its teacher.
    assert (config.learning_rate == 0.5) == (config_class is DistillationConfig)


def test_a_dataset_replaces_the_folder_of_the_model(tmp_path):
    CFGConfig(train_data_dir="photos", train_val_split=0.2).save(tmp_path / "train_config.yaml")
    config = parse(tmp_path, "--dataset_name", "cars")
    assert (config.train_data_dir, config.dataset_name, config.train_val_split) == (None, "cars", 0.1)


@pytest.mark.parametrize(
    ("of_model", "argv", "held_out"),
    [
        (VDMConfig(train_val_split=0.15, dataset_name="pets"), [], 0.15),
        (VDMConfig(train_val_split=0.15, dataset_name="pets"), ["--train_val_split", "0"], 0.0),
        (VDMConfig(train_val_split=0.15, dataset_name="pets"), ["--dataset_name", "cars"], 0.1),
        (VDMConfig(train_val_split=0.15, dataset_name="pets"), ["--streaming"], 0.0),
        (CFGConfig(), [], 0.1),
        (CFGConfig(), ["--train_val_split", "0.3"], 0.3),
        (CFGConfig(streaming=True, dataset_name="pets"), [], 0.0),
    ],
)
def test_held_out_images_are_those_of_the_model(tmp_path, of_model, argv, held_out):
    of_model.save(tmp_path / "train_config.yaml")
    assert parse(tmp_path, *argv).train_val_split == held_out


def test_saved_settings_repeat_the_run(tmp_path):
    config = parse("me/digits", "--block_out_channels", "8", "--train_val_split", "0", "--learning_rate", "1e-3")
    config.save(tmp_path / "train_config.yaml")
    assert parse_config(ClassifierConfig, ["--config", str(tmp_path / "train_config.yaml")]) == config


def test_a_finished_classifier_is_a_teacher_and_a_model_to_guide(tmp_path):
    parse("me/digits", "--train_val_split", "0.2").save(tmp_path / "train_config.yaml")
    assert parse(tmp_path).train_val_split == 0.2
    assert parse_config(DistillationConfig, ["--teacher", str(tmp_path)]).train_val_split == 0.2


REFUSED = [
    (["--stack", "3"], "--stack 3 makes images without classes to tell apart. Leave it out"),
    (["--model_config_name_or_path", "unet"], "--model_config_name_or_path: a classifier has its own layers"),
    (
        ["--pretrained_vae_model_name_or_path", "vae"],
        "--pretrained_vae_model_name_or_path: a classifier has .* model's",
    ),
    (["--streaming", "--dataset_name", "a", "--train_val_split", "0.1"], "cannot be combined with --streaming"),
    (["--streaming", "--dataset_name", "a", "--eval_steps", "5"], "--eval_steps compares samples with the whole"),
    (["--train_val_split", "1"], r"train_val_split must lie in \[0, 1\), but is 1.0"),
    (["--layers_per_block", "0"], "layers_per_block must be at least 1, but is 0"),
    (["--pretrained_model_name_or_path", ""], "pretrained_model_name_or_path must not be empty"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_settings_without_an_effect_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        parse("me/model", *argv)


@pytest.mark.parametrize("flag", ["--prediction_type", "--log_snr_min", "--conditioning_dropout_prob"])
def test_settings_of_the_diffusion_model_are_no_flags(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("me/model", flag, "0.5")
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_a_model_is_required(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config(ClassifierConfig, [])
    assert "the following arguments are required: --pretrained_model_name_or_path" in capsys.readouterr().err


def models(folder: Path) -> dict[str, str]:
    """Save models that no classifier of the digits can guide, and return their folders by name."""
    made = {
        "student": make_pipeline(make_unet(num_class_embeds=11, max_guidance_scale=3.0), id2label=None),
        "generator": ddgan(),
        "letters": make_pipeline(make_unet(num_class_embeds=11), id2label={i: "abcdefghij"[i] for i in range(10)}),
        "three": make_pipeline(),
        "last": make_pipeline(make_unet(num_class_embeds=11), id2label={**Digits().id2label, 9: "ten"}),
        "unnamed": make_pipeline(id2label=None),
        "large": make_pipeline(make_unet(sample_size=16, num_class_embeds=11), id2label=None),
        "wide": make_pipeline(make_unet(sample_size=(8, 16), num_class_embeds=11), id2label=None),
        "fits": make_pipeline(make_unet(num_class_embeds=11), id2label=None),
    }
    for name, pipeline in made.items():
        pipeline.save_pretrained(folder / name)
    (folder / "empty").mkdir()
    return {name: str(folder / name) for name in (*made, "empty")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("model", "argv", "message"),
    [
        ("student", [], "student was trained to guide in one pass. Use a model that guides in two"),
        ("generator", [], "generator is a denoising diffusion GAN, whose generator draws images in 2 steps"),
        ("letters", [], "letters: class 0 is 'zero' instead of 'a'. Pass the data that the model was trained on"),
        ("last", [], "The classes of the data have other names .*last: class 9 is 'nine' instead of 'ten'"),
        ("unnamed", [], r"The data has 10 classes \(zero, .*unnamed has 3 \(without names\)"),
        ("three", [], r"The data has 10 classes \(zero, .*three has 3 \(zero, one, two\)"),
        ("large", [], "large has images of 16×16, but --resolution is 8. Set --resolution 16"),
        ("wide", [], "wide has images of 8×16, but --resolution is 8. Only square images can be trained on"),
        ("empty", [], "empty cannot be loaded: .*has no model_index.json, so it is not a saved pipeline"),
        ("nowhere", [], "nowhere cannot be loaded: The folder .*nowhere' does not exist"),
        (
            "fits",
            ["--attention_resolutions", "7"],
            "attention_resolutions .7.: the levels of the network have 8 pixels",
        ),
        ("fits", ["--block_out_channels", "8", "8", "8", "8", "8"], "Samples of 8×8 cannot be halved 4 times"),
        ("fits", ["--block_out_channels", "1000000000"], "Failed to build a classifier with the settings {'block_out"),
        ("fits", ["--train_val_split", "0.0001"], "--train_val_split 0.0001 holds out 0 of the 1797 images"),
        ("fits", ["--train_data_dir", "no/photos"], "--train_data_dir no/photos is not a folder"),
        ("fits", ["--cache_latents"], "--cache_latents needs an autoencoder, but .*fits has none"),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused(folders, tmp_path, model, argv, message):
    with pytest.raises(UserError, match=message):
        train_classifier(tmp_path / "out", Path(folders.get(model, tmp_path / "nowhere")), *argv)
    assert not (tmp_path / "out").exists()


def test_colored_images_are_converted_for_a_model_of_gray_ones(folders, tmp_path, caplog):
    for name in "abcdefghij":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), ("red", "blue")[i]).save(tmp_path / "photos" / name / f"{i}.png")
    data = ["--train_data_dir", str(tmp_path / "photos"), "--resolution", "8"]
    train_classifier(tmp_path / "out", Path(folders["fits"]), *data, "--dry_run")
    assert "Converting the images to 1 channels" in caplog.text
    assert "The model's classes have no names. Assuming that they are the classes of the data" in caplog.text


@pytest.mark.parametrize("output_dir", ["fits", ".", "fits/../fits"])
def test_the_model_is_not_overwritten(folders, output_dir):
    """The folder of the model has the name of the output folder of many runs."""
    model = Path(folders["fits"])
    (model / "train_config.yaml").write_text("")
    before = sorted(path.name for path in model.rglob("*"))
    with pytest.raises(UserError, match="is or contains .*fits, which the run reads. Pass another folder"):
        train_classifier(model.parent / output_dir, model, "--overwrite_output_dir")
    assert sorted(path.name for path in model.rglob("*")) == before
    (model / "train_config.yaml").unlink()


def test_plan(folders, tmp_path, capsys):
    argv = ["--pretrained_model_name_or_path", folders["fits"], "--output_dir", str(tmp_path / "out")]
    load_command("train_classifier").main([*argv, "--dry_run", "--report_to", "none"])
    printed = capsys.readouterr().out
    for line in (
        "images         1617 of 10 classes of scikit-learn's digits, 180 held out, decoded into memory",
        "classifier     0.3 M parameters",
        "method         trained_network classifier, prediction_type epsilon",
        "steps          1500 of 64 images: 59.4 epochs",
    ):
        assert line in printed
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_before_torch_loads(monkeypatch):
    argv = ["--pretrained_model_name_or_path", "me/model", "--stack", "3"]
    check_refused(load_command("train_classifier").main, argv, "--stack 3 makes images without classes", monkeypatch)


def test_the_run_of_a_generator_is_read(tmp_path):
    """Its settings have names that the classifier's have not, and it may have been trained on stacks."""
    DDGANConfig(stack=3, resolution=8, train_batch_size=4, block_out_channels=[8]).save(tmp_path / "train_config.yaml")
    assert parse(tmp_path).stack == 1
