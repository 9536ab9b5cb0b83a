"""Test the pure functions that methods share."""

import math

import pytest
import torch

from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.methods.objectives import by_group, drop_class_labels, prediction_target, squared_error


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_labels_are_dropped_at_the_given_rate(p):
    n = 100_000
    labels = torch.arange(n) % 10
    before = labels.clone()
    dropped = drop_class_labels(labels, p, 10, torch.rand(n, generator=torch.Generator().manual_seed(0)))
    rate = (dropped == 10).float().mean().item()
    assert rate == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    assert torch.equal(labels, before)
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])


def test_labels_are_dropped_independently():
    dropped = drop_class_labels(torch.tensor([1, 2, 3]), 0.5, 9, torch.tensor([0.49, 0.51, 0.5]))
    assert dropped.tolist() == [9, 2, 3]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_sampler_inverts_the_target(prediction_type):
    scheduler = LogSNRScheduler(prediction_type=prediction_type, clip_sample=False)
    x, noise = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = scheduler.timestep(torch.tensor([0.6], dtype=torch.float64))
    z, target = scheduler.add_noise(x, noise, t), prediction_target(scheduler, x, noise, t)
    log_snr = scheduler.log_snr(scheduler.u(t)).item()
    torch.testing.assert_close(scheduler.predict_original_sample(target, z, log_snr), x)


def test_squared_error_is_the_mean_over_each_sample():
    error = squared_error(torch.tensor([[1.0, 3.0], [0.0, 0.0]]).half(), torch.zeros(2, 2))
    assert error.tolist() == [5.0, 0.0]
    assert error.dtype == torch.float32


def test_values_are_split_by_group():
    groups = by_group(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]), ["a", "b"])
    torch.testing.assert_close(groups["a"], torch.tensor([1.0, torch.nan, 3.0]), equal_nan=True)
    torch.testing.assert_close(groups["b"], torch.tensor([torch.nan, 2.0, torch.nan]), equal_nan=True)
