"""Test the counts of modes, their divergence and what perfect samples reach."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusers_cfg.data.sources import Digits, load_labelled_images
from diffusers_cfg.evaluation import features, mode_coverage
from diffusers_cfg.evaluation.mode_coverage import StackedModes, coverage, divergence_from_uniform, perfect_coverage
from diffusers_cfg.evaluation.mode_reports import coverage_table
from diffusers_cfg.settings import TrainConfig


class FirstPixel(nn.Module):
    """A classifier whose classes are the values of the first pixel."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        assert images.shape[1] == 3
        return None, nn.functional.one_hot(images[:, 0, 0, 0].long(), 10) * self.scale


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5, 5, 5, 5], 0.0), ([1, 0, 0, 0], math.log(4)), ([3, 1], 0.75 * math.log(1.5) + 0.25 * math.log(0.5))],
)
def test_divergence_matches_its_definition(counts, expected):
    assert divergence_from_uniform(torch.tensor(counts)) == pytest.approx(expected, abs=1e-12)


def test_coverage_counts_modes_with_a_sample():
    found = coverage(torch.tensor([0, 3, 3, 0]), 4)
    assert found == {"modes": 2, "kl": pytest.approx(math.log(2))}


@pytest.mark.parametrize(("num_samples", "modes", "kl"), [(4000, 982, 0.132), (10_000, 999.9, 0.0507)])
def test_perfect_samples_of_stacked_digits_reach_the_known_floor(num_samples, modes, kl):
    """The values are those of an independent simulation."""
    found = perfect_coverage(torch.full((1000,), 1e-3, dtype=torch.float64), num_samples)
    assert found["modes"] == pytest.approx(modes, abs=1)
    assert found["kl"] == pytest.approx(kl, abs=5e-4 + 0.01 * kl)
    # To the second order, KL ≈ (modes - 1) / 2n.
    assert found["kl"] == pytest.approx(999 / (2 * num_samples), rel=0.1)


def test_unequal_classes_raise_the_floor_by_three_times_their_divergence():
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    probabilities = torch.einsum("i,j,k->ijk", p, p, p).flatten()
    assert divergence_from_uniform(probabilities) == pytest.approx(3 * divergence_from_uniform(p))
    assert perfect_coverage(probabilities, 10_000)["kl"] == pytest.approx(3 * divergence_from_uniform(p), rel=0.02)


def test_the_mode_of_a_stack_is_the_classes_of_its_channels(monkeypatch):
    monkeypatch.setattr(mode_coverage, "BATCH_SIZE", 2)
    digits = torch.tensor([[1, 2, 3], [0, 0, 9], [9, 0, 0], [1, 2, 3], [4, 4, 4]])
    images = digits[:, :, None, None].expand(-1, -1, 8, 8).to(torch.uint8)
    modes = StackedModes(FirstPixel(), torch.ones(1000), [], "digits")  # pyright: ignore[reportArgumentType]
    assert modes.modes_of(images).tolist() == [123, 9, 900, 123, 444]
    assert modes.coverage(images)["modes"] == 4


def test_real_stacks_have_the_modes_of_their_labels(tmp_path, monkeypatch):
    """The classifier of single images tells the classes of channels."""
    monkeypatch.setattr(features.train_classifier, "__defaults__", (60, 128))
    monkeypatch.setattr(mode_coverage, "CACHE_DIR", tmp_path)
    config = TrainConfig(resolution=8, stack=3, block_out_channels=[8], attention_resolutions=[0])
    stacks = load_labelled_images(config)
    modes = StackedModes.of(config, Digits(), stacks, Accelerator(cpu=True))
    classes = torch.from_numpy(Digits().class_labels[stacks.indices[:500]])
    found = modes.modes_of(modes.stacks.__getitems__(list(range(500))).images)
    expected = (classes * torch.tensor([100, 10, 1])).sum(1)
    assert (found == expected).float().mean() > 0.85
    assert modes.name == "scikit-learn's digits"
    assert modes.probabilities.sum() == pytest.approx(1)
    assert divergence_from_uniform(modes.probabilities) == pytest.approx(0.0003, abs=1e-4)
    assert [path.name[:11] for path in Path(tmp_path).iterdir()] == ["classifier-"]


def test_the_table_has_means_over_seeds_and_the_references():
    runs = [
        {"num_timesteps": 4, "seed": 0, "modes": 990, "kl": 0.3, "seconds": 100.0},
        {"num_timesteps": 1, "seed": 0, "modes": 700, "kl": 0.9, "seconds": 90.0},
        {"num_timesteps": 4, "seed": 1, "modes": 980, "kl": 0.5, "seconds": 110.0},
    ]
    references = {"perfect": {"modes": 999.93, "kl": 0.0507}}
    assert coverage_table({"runs": runs, "references": references}).splitlines() == [
        "|  | seeds | modes | KL | seconds |",
        "| --- | --- | --- | --- | --- |",
        "| T = 4 | 2 | 985.0 ± 7.1 | 0.400 ± 0.141 | 105 ± 7 |",
        "| T = 1 | 1 | 700.0 | 0.900 | 90 |",
        "| perfect |  | 999.9 | 0.051 |  |",
    ]
