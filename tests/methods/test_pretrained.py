"""Test training that starts from a pretrained pipeline."""

import json
import shutil

import diffusers
import pytest
import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.method_settings import DIGITS_DDGAN, CFGConfig, DDGANConfig
from diffusers_cfg.methods.networks import build_pipeline, replace_classes
from tests.support.commands import load_command
from tests.support.models import ddgan, make_pipeline, make_unet
from tests.support.runs import reset_accelerate, train


def test_classes_of_the_same_name_keep_their_rows():
    unet = make_unet()
    before = unet.get_parameter("class_embedding.weight").detach().clone()
    replace_classes(unet, {0: "zero", 1: "one", 2: "two"}, {0: "two", 1: "ten", 2: "zero", 3: "eel"})
    after = unet.get_parameter("class_embedding.weight")
    assert torch.equal(after, before[[2, 3, 0, 3, 3]])
    assert (unet.num_classes, unet.null_class_label) == (4, 4)
    assert after.requires_grad


def test_identical_classes_are_unchanged(caplog):
    unet = make_unet()
    weight = unet.get_parameter("class_embedding.weight")
    replace_classes(unet, {0: "zero", 1: "one", 2: "two"}, {0: "zero", 1: "one", 2: "two"})
    assert unet.get_parameter("class_embedding.weight") is weight
    assert caplog.text == ""


def test_training_starts_from_a_pretrained_pipeline(tmp_path, caplog):
    make_pipeline(make_unet()).save_pretrained(tmp_path / "base")
    train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"), "--learning_rate", "1e-9")
    assert "3 classes by the 10 classes of the data: 3 with the same name keep their embedding" in caplog.text
    old, new = (CFGPipeline.from_pretrained(tmp_path / name).unet for name in ("base", "out"))
    torch.testing.assert_close(new.conv_in.weight, old.conv_in.weight, rtol=0, atol=1e-6)
    rows = old.get_parameter("class_embedding.weight")[[0, 1, 2, *([3] * 8)]]
    torch.testing.assert_close(new.get_parameter("class_embedding.weight"), rows, rtol=0, atol=1e-6)
    assert "base_model" not in json.loads((tmp_path / "out" / "run.json").read_text())
    # The run can be resumed
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base")]
    train(tmp_path / "out", *base, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_unnamed_classes_are_matched_in_order(caplog):
    unet = make_unet()
    weight = unet.get_parameter("class_embedding.weight")
    replace_classes(unet, {}, {0: "a", 1: "b", 2: "c"})
    assert unet.get_parameter("class_embedding.weight") is weight
    assert "have no names" in caplog.text


def test_pipeline_with_a_different_noise_process_is_refused(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]})
    )
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "base" / "scheduler")
    with pytest.raises(UserError, match="its DDIMScheduler was not made from a LogSNRScheduler"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all cannot be loaded"),
        ({"pretrained_model_name_or_path": "a", "model_config_name_or_path": "b"}, "already contains a network"),
    ],
)
def test_invalid_pretrained_settings_are_refused(settings, message):
    class Images(LabelledImages):
        def __init__(self):
            pass

    with pytest.raises(ValueError, match=message):
        build_pipeline(CFGConfig(**settings), Images())


def test_resolution_that_the_network_cannot_halve_is_refused(tmp_path):
    make_pipeline(make_unet()).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="9×9 cannot be halved 1 times"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"), "--resolution", "9")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("train_cfg", "--pretrained_model_name_or_path", "is a denoising diffusion GAN, whose generator draws images"),
        ("train_vdm", "--pretrained_model_name_or_path", "is a denoising diffusion GAN, whose generator draws images"),
        ("distill_guidance", "--teacher", "is a denoising diffusion GAN, whose generator draws images in 2 steps"),
        ("train_ddgan", "--pretrained_model_name_or_path", "a generator cannot be trained further without its discr"),
    ],
)
def test_training_from_a_generator_is_refused(tmp_path, command, flag, message):
    """The settings of its run, which distillation reads, do not matter."""
    ddgan().save_pretrained(tmp_path / "gan")
    DDGANConfig(**DIGITS_DDGAN, num_timesteps=2).save(tmp_path / "gan" / "train_config.yaml")
    reset_accelerate()
    with pytest.raises(UserError, match=f"{flag} {tmp_path / 'gan'}:? {message}"):
        load_command(command).main([flag, str(tmp_path / "gan"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
