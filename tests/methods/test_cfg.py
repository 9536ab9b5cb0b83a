"""Test classifier-free guidance: the inputs, targets, updates and logs of Algorithm 1."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline, UNet2DCFGModel
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data import sources
from diffusers_cfg.data.datasets import stack_images
from diffusers_cfg.data.order import GlobalBatchSampler
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.batches import probe_batches
from diffusers_cfg.engine.method import Batch
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.methods import cfg
from diffusers_cfg.methods.networks import build_pipeline
from diffusers_cfg.randomness import Draws
from tests.support.runs import TINY, WEIGHTS, scalars, train


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_step_follows_algorithm_1(tmp_path, monkeypatch, prediction_type):
    """Compare the inputs and the target of the first step, term by term."""
    inputs, errors = [], []
    forward, error = UNet2DCFGModel.forward, cfg.squared_error

    def spy_on_forward(self, z, t, class_labels, **kwargs):
        inputs.append((z, t, class_labels))
        return forward(self, z, t, class_labels=class_labels, **kwargs)

    def spy_on_error(pred, target):
        errors.append((pred.detach(), target))
        return error(pred, target)

    monkeypatch.setattr(UNet2DCFGModel, "forward", spy_on_forward)
    monkeypatch.setattr(cfg, "squared_error", spy_on_error)
    config = train(
        tmp_path, "--max_train_steps", "1", "--conditioning_dropout_prob", "0.5", "--prediction_type", prediction_type
    )
    (z, t, c), (pred, target) = inputs[0], errors[0]

    data = stack_images(Digits(), config, 1, show_progress=False)
    (indices,) = GlobalBatchSampler(len(data), 8, config.seed, range(1))
    x = data.images[indices].double() / 127.5 - 1
    draws = Draws(config.seed, 0, range(8), 8)
    u, noise, dropout = draws.uniform("time"), draws.normal("noise", 1, 8, 8).double(), draws.uniform("dropout")
    b = math.atan(math.exp(-10))
    angle = ((math.pi / 2 - 2 * b) * u.double() + b).view(-1, 1, 1, 1)  # a u + b
    alpha, sigma = torch.cos(angle), torch.sin(angle)
    torch.testing.assert_close(z.double(), alpha * x + sigma * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t, 1000 * u - 1)
    assert c.tolist() == torch.where(dropout < 0.5, 10, data.class_labels[indices]).tolist()
    assert 0 < (c == 10).sum() < 8
    expected = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "sample": x}[prediction_type]
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)
    assert pred.shape == x.shape
    # The saved model has the same prediction type
    assert CFGPipeline.from_pretrained(tmp_path).scheduler.config.prediction_type == prediction_type


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_training_updates_every_parameter_and_the_null_row(tmp_path, accumulation):
    config = train(
        tmp_path, "--no_use_ema", "--conditioning_dropout_prob", "0.5", "--train_batch_size", "64",
        "--gradient_accumulation_steps", accumulation,
    )  # fmt: skip
    assert isinstance(config, CFGConfig)
    before = dict(build_pipeline(config, Digits()).unet.named_parameters())
    after = load_file(tmp_path / "unet" / WEIGHTS)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    rows = (before["class_embedding.weight"] != after["class_embedding.weight"]).any(dim=1)
    assert rows.tolist() == [True] * 11


def test_null_row_is_unchanged_without_dropout(tmp_path):
    config = train(tmp_path, "--no_use_ema", "--conditioning_dropout_prob", "0", "--train_batch_size", "64")
    assert isinstance(config, CFGConfig)
    before = build_pipeline(config, Digits()).unet.get_parameter("class_embedding.weight")
    after = load_file(tmp_path / "unet" / WEIGHTS)["class_embedding.weight"]
    assert (before != after).any(dim=1).tolist() == [True] * 10 + [False]


def test_a_single_class_is_refused(tmp_path, monkeypatch):
    digits = Digits()
    digits.class_labels[:] = 7
    monkeypatch.setattr(sources, "Digits", lambda: digits)
    with pytest.raises(UserError, match=r"at least two classes, but the data has 1: \['seven'\]"):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_losses_are_logged_by_label_and_noise_level(tmp_path):
    train(
        tmp_path, "--report_to", "tensorboard", "--logging_steps", "4", "--train_batch_size", "64",
        "--conditioning_dropout_prob", "0.3",
    )  # fmt: skip
    logged = {tag: values[0][1] for tag, values in scalars(tmp_path).items()}
    p = logged["dropout_rate"]
    assert logged["loss"] == pytest.approx(p * logged["loss/null"] + (1 - p) * logged["loss/conditional"], rel=1e-5)
    assert 0.2 < logged["dropout_rate"] < 0.4
    levels = {tag for tag in logged if tag.startswith("loss/log_snr_")}
    assert len(levels) == 8
    assert {"loss/log_snr_-20.0_to_-3.2", "loss/log_snr_0.0_to_0.8"} <= levels
    assert min(logged[tag] for tag in levels) < logged["loss"] < max(logged[tag] for tag in levels)
    assert logged["grad_norm"] > 0
    assert 0 <= logged["data_wait"] < 1


@pytest.mark.slow
def test_network_that_ignores_its_labels_is_reported(tmp_path, caplog):
    flags = ["--resolution", "8", "--attention_resolutions", "0", "--max_train_steps", "250"]
    flags += ["--train_batch_size", "64", "--report_to", "tensorboard", "--logging_steps", "250"]
    caplog.set_level(logging.WARNING)
    gains, digits = {}, Digits()
    shuffled = np.random.default_rng(0).permutation(digits.class_labels)
    for kind, labels in (("right", digits.class_labels), ("shuffled", shuffled)):
        for i, (image, label) in enumerate(zip(digits.images, labels, strict=True)):
            folder = tmp_path / kind / "abcdefghij"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
        caplog.clear()
        train(tmp_path / f"{kind}-model", "--train_data_dir", str(tmp_path / kind), *flags)
        gains[kind] = scalars(tmp_path / f"{kind}-model")["label_gain"][-1][1]
        assert ("does not predict better with correct labels" in caplog.text) == (kind == "shuffled")
    assert gains["right"] > 5
    assert gains["shuffled"] < 3


def test_probe_of_a_single_image_returns_nothing():
    """A single image has no standard error."""
    config = parse_config(CFGConfig, TINY)
    method = cfg.ClassifierFreeGuidance.build(config, Digits())
    images = stack_images(Digits(), config, 1, show_progress=False)
    batches = list(probe_batches(config, method, images, torch.device("cpu")))
    one = Batch(batches[0].x[:1], batches[0].class_labels[:1], Draws(0, 0, range(1), 1), 0)
    assert method.probe([one]) == {}
    assert math.isfinite(method.probe(batches)["label_gain"])
