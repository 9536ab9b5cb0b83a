"""Training that starts from a pipeline."""

import json
import shutil

import diffusers
import pytest
import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.data.sources import LabelledImages
from diffusers_cfg.methods.networks import build_pipeline, replace_classes
from diffusers_cfg.settings import CFGConfig
from tests.support.models import make_pipeline, make_unet
from tests.support.runs import train


def test_classes_of_the_same_name_keep_their_rows():
    unet = make_unet()
    before = unet.class_embedding.weight.detach().clone()
    replace_classes(unet, {0: "zero", 1: "one", 2: "two"}, {0: "two", 1: "ten", 2: "zero", 3: "eel"})
    assert torch.equal(unet.class_embedding.weight, before[[2, 3, 0, 3, 3]])
    assert (unet.num_classes, unet.null_class_label) == (4, 4)
    assert unet.class_embedding.weight.requires_grad


def test_the_same_classes_stay(caplog):
    unet = make_unet()
    weight = unet.class_embedding.weight
    replace_classes(unet, {0: "zero", 1: "one", 2: "two"}, {0: "zero", 1: "one", 2: "two"})
    assert unet.class_embedding.weight is weight
    assert caplog.text == ""


def test_a_run_goes_on_from_a_pipeline(tmp_path, caplog):
    make_pipeline(make_unet()).save_pretrained(tmp_path / "base")
    train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"), "--learning_rate", "1e-9")
    assert "3 classes were replaced by the 10 of the data: 3 of the same name keep their rows" in caplog.text
    old, new = (CFGPipeline.from_pretrained(tmp_path / name).unet for name in ("base", "out"))
    torch.testing.assert_close(new.conv_in.weight, old.conv_in.weight, rtol=0, atol=1e-6)
    rows = old.class_embedding.weight[[0, 1, 2, *([3] * 8)]]
    torch.testing.assert_close(new.class_embedding.weight, rows, rtol=0, atol=1e-6)
    assert "base_model" not in json.loads((tmp_path / "out" / "run.json").read_text())
    # And it resumes as any other
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base")]
    train(tmp_path / "out", *base, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_unnamed_classes_are_taken_in_order(caplog):
    unet = make_unet()
    weight = unet.class_embedding.weight
    replace_classes(unet, {}, {0: "a", 1: "b", 2: "c"})
    assert unet.class_embedding.weight is weight
    assert "have no names" in caplog.text


def test_a_pipeline_of_another_process_is_refused(tmp_path):
    pipeline = make_pipeline(make_unet(), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="has a DDIMScheduler that was not made from a LogSNRScheduler"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all cannot be loaded"),
        ({"pretrained_model_name_or_path": "a", "model_config_name_or_path": "b"}, "brings its own network"),
    ],
)
def test_what_cannot_be_gone_on_from_is_named(settings, message):
    class Images(LabelledImages):
        def __init__(self):
            pass

    with pytest.raises(ValueError, match=message):
        build_pipeline(CFGConfig(**settings), Images())


def test_a_resolution_that_the_pipeline_cannot_halve(tmp_path):
    make_pipeline(make_unet()).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="9×9, which cannot be halved 1 times"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"), "--resolution", "9")
    assert not (tmp_path / "out").exists()
