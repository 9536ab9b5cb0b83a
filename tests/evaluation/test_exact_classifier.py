"""Test that trained classifiers of noisy samples approach the exact classifier of the mixture."""

import pytest
import torch

from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.evaluation.exact_classifier import (
    LOG_SNRS,
    guidance_errors,
    train_mixture_classifier,
    trained_classifier,
)
from diffusers_cfg.evaluation.mixture import GaussianMixtureClassifier, three_gaussians


@pytest.fixture
def model():
    return three_gaussians(LogSNRScheduler())


def test_exact_classifier_has_no_error(model):
    moves, errors = guidance_errors(GaussianMixtureClassifier(model.double()), num_samples=300)
    assert max(errors) < 1e-6
    assert moves[0] == pytest.approx(0.35 / 2**0.5, rel=0.01)  # to the mean of a class, from that of all


def test_trained_classifier_approaches_the_exact_one(model):
    found = [guidance_errors(train_mixture_classifier(model, steps), 300) for steps in (0, 150)]
    untrained, trained = (torch.tensor(errors) / torch.tensor(moves) for moves, errors in found)
    middle = [LOG_SNRS.index(value) for value in (-2.0, 0.0, 2.0)]
    assert (trained[middle] < 0.8 * untrained[middle]).all()


def test_classifier_that_sees_z_moves_x_far_at_the_noisy_end(tmp_path):
    """Untrained, the network that sees αz moves x̃ about as far as the exact one, and one that sees z by 1 / α."""
    lines = trained_classifier(tmp_path, steps=(0,)).splitlines()[-3:]
    rows = [[float(cell) for cell in line.split("|")[2:-1]] for line in lines]
    assert [line.split("|")[1].strip() for line in lines] == ["exact move of x̃", "sees αz, 0 steps", "sees z, 0 steps"]
    assert rows[0][0] == pytest.approx(0.25, abs=0.01)
    assert rows[1][0] < 3
    assert rows[2][0] > 1000
