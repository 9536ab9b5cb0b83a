"""Test the 25 Gaussians: the data, the metrics, the training step and the coverage that the paper claims."""

import logging
import math
from functools import partial

import pytest
import torch

from diffusers_cfg.evaluation import gaussian_grid
from diffusers_cfg.evaluation.gaussian_grid import (
    MEANS,
    SPACING,
    STD,
    GridNetwork,
    GridSettings,
    compare_on_grid,
    draw_grid,
    grid_coverage,
    sample_grid_model,
    train_on_grid,
    trained_on_grid,
)
from diffusers_cfg.randomness import seeded_generator

TINY = GridSettings(num_timesteps=2, seed=0, steps=6, batch_size=8, units=8)


def real_points(number: int = 100_000) -> torch.Tensor:
    return draw_grid(number, seeded_generator("cpu", "test"))


def test_the_data_have_unit_variance_and_a_width_of_a_twentieth_of_the_spacing():
    assert MEANS.shape == (25, 2)
    points = real_points()
    assert points.mean(0).tolist() == pytest.approx([0, 0], abs=0.02)
    assert points.var(0).tolist() == pytest.approx([1, 1], abs=0.01)
    others = torch.cdist(MEANS, MEANS) + 9 * torch.eye(25)
    assert others.min().item() == pytest.approx(SPACING)
    assert pytest.approx(SPACING / 20) == STD
    nearest = torch.cdist(points, MEANS).argmin(1)
    assert (points - MEANS[nearest]).std(0).tolist() == pytest.approx([STD, STD], rel=0.02)


def test_real_points_reach_all_modes():
    found = grid_coverage(real_points(10_000))
    assert found["modes"] == 25
    assert found["high_quality"] == pytest.approx(0.98889, abs=0.003)  # 1 - exp(-9/2)
    assert found["kl"] == pytest.approx(24 / 20_000, abs=8e-4)


def test_a_mode_needs_a_sample_within_three_standard_deviations():
    near, far = MEANS[:1] + torch.tensor([[2.9 * STD, 0.0]]), MEANS[1:2] + torch.tensor([[0.0, 3.1 * STD]])
    found = grid_coverage(torch.cat([near, near, near, far]))
    assert (found["modes"], found["high_quality"]) == (1, 0.75)
    assert found["kl"] == pytest.approx(0.75 * math.log(18.75) + 0.25 * math.log(6.25))


def test_training_moves_all_weights_and_is_deterministic():
    state = torch.get_rng_state()
    networks = [train_on_grid(settings) for settings in (TINY, TINY, TINY._replace(steps=0), TINY._replace(seed=1))]
    first, again, untrained, other = (network.state_dict() for network in networks)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert not torch.equal(weight, untrained[name])
        assert not torch.equal(weight, other[name])


def test_the_average_moves_by_a_part_of_the_step():
    """It moves by (1 - decay) times the first step of Adam, which is the learning rate times the gradient's sign."""
    settings = TINY._replace(steps=1, ema_decay=0.75)
    before, after = train_on_grid(settings._replace(steps=0)), train_on_grid(settings)
    moved = torch.cat([(a - b).flatten() for a, b in zip(after.parameters(), before.parameters(), strict=True)])
    assert moved.abs().max().item() == pytest.approx(0.25 * settings.learning_rate, rel=1e-3)


def test_samples_take_the_posterior_steps_of_the_generator():
    """A generator that returns the mean of the data gives that mean in the last step, whatever the noise."""
    network = GridNetwork(4, 2, TINY)
    for parameter in network.parameters():
        parameter.detach().zero_()
    network.body[-1].bias.data = torch.tensor([0.25, -0.5])
    calls = []
    network.register_forward_pre_hook(lambda _, inputs: calls.append((inputs[0].unique().item(), inputs[2])))
    points = sample_grid_model(network, TINY, 5)
    assert torch.allclose(points, torch.tensor([0.25, -0.5]).expand(5, 2))
    assert [t for t, _ in calls] == [1, 0]
    assert not torch.equal(calls[0][1], calls[1][1])  # a new latent vector in each step


def test_models_are_reused_if_their_settings_are_the_same(tmp_path, monkeypatch, caplog):
    path = tmp_path / "T=2" / "seed=0.safetensors"
    network, seconds = trained_on_grid(TINY, path)
    trained = []
    monkeypatch.setattr(gaussian_grid, "train_on_grid", lambda settings: trained.append(settings) or network)
    again, same_seconds = trained_on_grid(TINY, path)
    assert (trained, same_seconds) == ([], seconds)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))
    with caplog.at_level(logging.WARNING):
        trained_on_grid(TINY._replace(steps=7), path)
    assert trained == [TINY._replace(steps=7)]
    assert f"{path} has other settings" in caplog.text


def test_comparison_trains_each_number_of_steps_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(gaussian_grid, "GridSettings", partial(GridSettings, steps=2, batch_size=8, units=8))
    record = compare_on_grid([1, 4], [0, 3], 2000, tmp_path)
    assert [(run["num_timesteps"], run["seed"]) for run in record["runs"]] == [(1, 0), (1, 3), (4, 0), (4, 3)]
    assert record["references"]["perfect"]["modes"] == 25
    # π (3σ)² of a cell of one spacing
    assert record["references"]["uniform square"]["high_quality"] == pytest.approx(math.pi * 0.15**2, abs=0.02)
    assert record["settings"]["steps"] == 2
    assert not {"num_timesteps", "seed"} & record["settings"].keys()
    assert (tmp_path / "gaussians.png").stat().st_size > 5000


@pytest.mark.slow
def test_four_steps_cover_the_modes_more_evenly_than_one():
    """The claim of the paper, at half of the steps of the study: KL(T = 4) < KL(T = 1) / 3."""
    found = {}
    for num_timesteps in (1, 4):
        settings = GridSettings(num_timesteps, seed=0, steps=3000)
        found[num_timesteps] = grid_coverage(sample_grid_model(train_on_grid(settings), settings, 10_000))
    assert found[4]["modes"] == 25, found
    assert found[4]["kl"] < 0.05, found
    assert found[4]["kl"] < found[1]["kl"] / 3, found
