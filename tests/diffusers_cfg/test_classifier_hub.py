"""Test publishing and loading a diffusion model with its classifier, against a local stand-in for the Hub."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.hub import example_images, publish, verify_published
from diffusers_cfg.repository import PublishError
from tests.diffusers_cfg.test_save_and_load import WITHOUT_THE_PACKAGE
from tests.support.draws import assert_same_draws
from tests.support.hub_client import HubClient
from tests.support.models import NAMES, generators, make_classifier, make_pipeline, make_unet
from tests.support.runs import WEIGHTS

FILES = ["classifier/classifier_2d.py", "classifier/config.json", f"classifier/{WEIGHTS}"]


@pytest.fixture
def client(hub, tmp_path, monkeypatch) -> HubClient:
    return HubClient(monkeypatch, hub, str(tmp_path / "hf"))


@pytest.fixture
def model(tmp_path) -> Path:
    """Return the folder of a model with a classifier that moves its samples."""
    classifier = make_classifier(id2label={str(i): name for i, name in NAMES.items()})
    with torch.no_grad():
        classifier.head.weight.mul_(30)
    folder = tmp_path / "model"
    make_pipeline(classifier=classifier, num_inference_steps=4).save_pretrained(folder)
    for secret in ("classifier/__pycache__/x.pyc", "classifier/weights.bin", "classifier/notes.txt"):
        (folder / secret).parent.mkdir(exist_ok=True)
        (folder / secret).write_text("private")
    return folder


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {"guidance_scale": -1, "classifier_guidance_scale": 2.0, "num_inference_steps": 4}
    return pipeline(["two", 1], generator=generators(0, 1), output_type="pt", **call).images


def test_classifier_is_published_with_its_code_and_loaded(hub, client, model):
    publish(model, "me/scribbles", verify=False)
    assert sorted(name for name in hub.files("me/scribbles") if name.startswith("classifier/")) == FILES
    assert "classifier_guidance_scale=1.0" in hub.files("me/scribbles")["README.md"].decode()
    hub.requests.clear()
    published = CFGPipeline.from_pretrained("me/scribbles")
    assert not any(request.endswith(".py") for request in hub.requests)
    assert type(published.classifier).__module__ == "diffusers_cfg.classifier_2d"
    assert_same_draws(draw(published), draw(CFGPipeline.from_pretrained(model)), published, 2.0, 4)
    # A pipeline without it replaces it in the index, and is loaded without it.
    published.classifier = None
    published.save_pretrained(model.parent / "without")
    publish(model.parent / "without", "me/scribbles", verify=False)
    assert CFGPipeline.from_pretrained("me/scribbles").classifier is None


@pytest.mark.slow
def test_classifier_is_loaded_by_plain_diffusers(hub, client, model, tmp_path):
    """In a process that cannot import this package, which saves and loads the model again."""
    publish(model, "me/scribbles", verify=False)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, "me/scribbles", "one.pt", "copy"],
        cwd=tmp_path, env=hub.environment(str(tmp_path / "hf")), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    original, copy = (CFGPipeline.from_pretrained(folder) for folder in (model, tmp_path / "copy"))
    assert_same_draws(draw(copy), draw(original), original, 2.0, 4)


@pytest.mark.slow
def test_published_classifier_is_compared(hub, client, model):
    """Another classifier in the repository draws other images than the folder."""
    examples = example_images(model)
    publish(model, "me/scribbles", verify=False)
    local, revision = next(iter(examples.items())), hub.repositories["me/scribbles"].branches["main"]
    verify_published(local, model, "me/scribbles", revision)
    weights = load_file(model / "classifier" / WEIGHTS)
    save_file({**weights, "head.weight": -weights["head.weight"]}, model / "classifier" / WEIGHTS)
    revision = publish(model, "me/scribbles", verify=False).rpartition("/")[2]
    with pytest.raises(PublishError, match="does not generate the same image"):
        verify_published(local, model, "me/scribbles", revision)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("classifier/config.json", "classifier/config.json does not exist"),
        (f"classifier/{WEIGHTS}", "classifier has no weights in diffusion_pytorch_model.safetensors, only weights.bin"),
        ("truncate", "Unable to load weights from checkpoint file .*classifier"),
        ("tensor", r"The weights in .*classifier are not those of its config.json. Tensors: 1 missing .head.bias"),
    ],
)
def test_damaged_classifier_is_named(model, damage, message):
    weights = model / "classifier" / WEIGHTS
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "tensor":
        save_file({name: value for name, value in load_file(weights).items() if name != "head.bias"}, weights)
    else:
        (model / damage).unlink()
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(model)


@pytest.mark.parametrize("settings", [{"max_guidance_scale": 3.0}, {"num_class_embeds": None}])
def test_examples_of_models_that_need_or_refuse_the_classifier(tmp_path, settings):
    make_pipeline(make_unet(**settings), classifier=make_classifier(), num_inference_steps=2).save_pretrained(tmp_path)
    assert example_images(tmp_path).keys() == NAMES.keys()
