"""Test `NoisyClassifier2DModel`: outputs, gradients, settings, saving and loading."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_cfg import NoisyClassifier2DModel
from tests.support.models import NAMES, make_classifier

Y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3.0, 700.5])
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def classifier() -> NoisyClassifier2DModel:
    return make_classifier()


def test_logits_of_each_sample_depend_on_its_own_timestep(classifier):
    logits = classifier(Y, T)
    assert logits.shape == (2, len(NAMES)) == (2, classifier.num_classes)
    for i in range(2):
        torch.testing.assert_close(logits[i : i + 1], classifier(Y[i : i + 1], T[i]))
    assert not torch.allclose(logits[1:], classifier(Y[1:], T[0]), atol=1e-3)
    assert not torch.allclose(logits[:1], classifier(Y[:1], T[0] + 0.25), atol=1e-6)  # not rounded to an integer


@pytest.mark.parametrize(
    "settings",
    [
        {"sample_size": (8, 16), "in_channels": 3, "num_classes": 7, "id2label": {"6": "six"}},
        {"down_block_types": ("DownBlock2D",) * 3, "block_out_channels": (4, 8, 8), "add_attention": False},
        {"dropout": 0.3, "layers_per_block": 2},
    ],
)
def test_settings_are_saved_and_loaded(settings, tmp_path):
    classifier = make_classifier(**settings)
    channels, size = classifier.config.in_channels, classifier.config.sample_size
    y = torch.randn(2, channels, *(size if isinstance(size, tuple) else (size, size)))
    logits = classifier(y, T)
    assert logits.shape == (2, classifier.num_classes)
    classifier.save_pretrained(tmp_path)
    loaded = NoisyClassifier2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(y, T), logits)
    assert loaded.noise_process == classifier.noise_process == make_classifier().noise_process
    assert loaded.config.id2label == classifier.config.id2label


def test_every_parameter_gets_a_gradient(classifier):
    torch.nn.functional.cross_entropy(classifier(Y, T), torch.tensor([0, 2])).backward()
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        classifier, y, calls = make_classifier().train(), Y.clone().requires_grad_(), []
        if checkpointing:
            classifier.enable_gradient_checkpointing()
        layer = classifier.get_submodule("down_blocks.0.resnets.0")
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        classifier(y, T).log_softmax(1)[:, 1].sum().backward()
        gradients.append([y.grad, *(parameter.grad for parameter in classifier.parameters())])
        assert len(calls) == 1 + checkpointing  # a layer that is checkpointed runs again
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_gradient_agrees_with_finite_differences(classifier):
    """∇_y log p(c | y, t), of which the guidance is made, in float64."""
    classifier, y = classifier.double(), Y.double().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(y, T).log_softmax(1)[:, 1].sum(), y)
    step = 1e-5
    for index in torch.randperm(64, generator=torch.Generator().manual_seed(0))[:6].tolist():
        shift = torch.zeros(64, dtype=torch.float64)
        shift[index] = step
        up, down = (classifier(y + sign * shift.view(1, 1, 8, 8), T).log_softmax(1)[:, 1] for sign in (1, -1))
        expected = gradient.flatten(1)[:, index]
        torch.testing.assert_close((up - down) / (2 * step), expected, rtol=1e-6, atol=1e-10)
    assert gradient.abs().max() > 1e-4


def test_dtypes(classifier):
    exact = classifier(Y, T)
    torch.testing.assert_close(classifier.double()(Y.double(), T), exact.double(), rtol=1e-4, atol=1e-5)
    rough = classifier.to(torch.bfloat16)(Y.bfloat16(), T)
    assert rough.dtype == classifier.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"num_classes": value}, f"num_classes must .* but is {value}") for value in (True, 3.0, 1, 10**9)],
        ({"num_classes": "3"}, "num_classes must .*'3'"),
        *[({"sample_size": value}, "sample_size must be a positive") for value in (0, 8.0, True, "8", (8,), (8, -8))],
        *[({"in_channels": value}, "in_channels must be a positive") for value in (0, None, 1.0)],
        *[({"block_out_channels": value}, "block_out_channels must") for value in (8, "ab", (0, 16), (8, None))],
        *[({"layers_per_block": value}, "layers_per_block must be a positive") for value in (0, -1, 1.5)],
        *[({"attention_head_dim": value}, "attention_head_dim must be a positive") for value in (0, None)],
        ({"layers_per_block": 10**9}, "layers_per_block must be at most 100, but is 1000000000"),
        ({"attention_head_dim": 5}, "attention_head_dim is 5, which does not divide the 16 channels"),
        ({"attention_head_dim": 32}, "attention_head_dim is 32, which does not divide the 16 channels"),
        ({"norm_num_groups": 0}, "norm_num_groups must be a positive"),
        ({"norm_num_groups": 3}, "norm_num_groups is 3, which does not divide the 8 channels"),
        ({"down_block_types": ("DownBlock2D", "Other")}, "down_block_types must be .*Other"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "down_block_types must be .*SkipDownBlock2D"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types must be"),
        ({"down_block_types": ("DownBlock2D",)}, "1 levels, but block_out_channels has 2"),
        ({"down_block_types": (), "block_out_channels": ()}, "0 levels"),
        *[({"dropout": value}, r"dropout must be in \[0, 1\]") for value in (2.0, -0.1, float("nan"), "0", True)],
        *[({"id2label": value}, "id2label must") for value in (5, ["zero"], {"a": "zero"}, {3: "three"}, {0: 1})],
        ({"noise_process": ["arctan"]}, "noise_process must be a dictionary or None"),
    ],
)
def test_invalid_settings_are_refused_before_layers_are_made(settings, message, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a layer was made")

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", never)
    with pytest.raises(ValueError, match=message):
        make_classifier(**settings)


@pytest.fixture
def folder(classifier, tmp_path) -> Path:
    classifier.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {name: value for name, value in x.items() if name != "head.bias"}, r"1 missing \(head.bias\)"),
        (lambda x: {**x, "other": torch.ones(1)}, r"1 unexpected \(other\)"),
        (lambda x: {**x, "head.bias": torch.ones(4)}, r"head.bias.*\[3\].*\[4\]"),
    ],
)
def test_other_weights_are_refused(folder, change, message, low_cpu_mem_usage):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"(?s){folder}.*{message}"):
        NoisyClassifier2DModel.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("missing", [WEIGHTS, "config.json"])
def test_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")  # a pickle is not loaded instead
    with pytest.raises(OSError, match=missing):
        NoisyClassifier2DModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors=False is not supported"):
        NoisyClassifier2DModel.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(OSError, match=f"{folder / 'none'} does not exist"):
        NoisyClassifier2DModel.from_pretrained(folder / "none")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "config.json must contain the settings of a NoisyClassifier2DModel"),
        ({"num_classes": 10**9}, "num_classes must be .*1000000000"),
        ({"norm_num_groups": 5}, "norm_num_groups is 5"),
        ({"num_classes": None}, "num_classes must be .*None"),
        ({"layers_per_block": 2}, "missing"),
    ],
)
def test_invalid_config_is_refused(folder, config, message):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **config} if isinstance(config, dict) else config
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        NoisyClassifier2DModel.from_pretrained(folder)
