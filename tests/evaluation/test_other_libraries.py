"""Compare the metrics with prdc, torchmetrics and torch-fidelity on the same random features."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from diffusers_cfg.evaluation import measure as measure_module
from diffusers_cfg.evaluation.measure import kernel_distance, measure
from diffusers_cfg.evaluation.metrics import density_coverage, precision_recall
from diffusers_cfg.evaluation.statistics import Gaussian, Reference, Summary

N, FEATURES, CLASSES = 400, 24, 10
# The distances are sums of at most N · FEATURES² terms in float64, each of which is rounded to 1.1e-16.
TOLERANCE = N * FEATURES**2 * 1.1e-16


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return (normal(N, FEATURES, seed=0) @ normal(FEATURES, FEATURES, seed=1)).float().double()


@pytest.fixture(scope="module")
def fake() -> torch.Tensor:
    return (normal(N, FEATURES, seed=2) @ normal(FEATURES, FEATURES, seed=1) + 0.5).float().double()


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return 3 * normal(N, CLASSES, seed=3)


@pytest.fixture(scope="module")
def row(real, fake, logits) -> dict[str, float]:
    """Return our metrics, computed in batches as for images. The summaries keep features in float32."""
    summaries = []
    for features in (real, fake):
        summaries.append(Summary(N, FEATURES, CLASSES, num_spatial_features=FEATURES))
        for rows in torch.arange(N).split(70):
            labels = torch.full((len(rows),), -1)
            summaries[-1].add(rows, features[rows], logits[rows], labels, features[rows].flip(1))
    gaussians = [Gaussian.from_moments(summaries[0].moments(spatial=spatial)) for spatial in (False, True)]
    return measure(summaries[1], Reference(*gaussians, neighbours=summaries[0].features))


def torch_fidelity(metric: str) -> ModuleType:
    try:
        return importlib.import_module(f"torch_fidelity.metric_{metric}")
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError if it does not match torch
        pytest.skip(f"needs torch-fidelity and torchvision: pip install -e '.[inception]' ({error})")


@pytest.mark.parametrize("k", [3, 5])
def test_neighbours_match_prdc(real, fake, k):
    """The metrics are counts, and therefore equal but for the rounding of a mean."""
    expected = compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    precision, recall = precision_recall(real, fake, k)
    density, coverage = density_coverage(real, fake, k)
    found = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    assert all(0 < found[name] < 1 for name in ("precision", "recall", "coverage"))
    assert found == pytest.approx(expected, rel=1e-12)


def test_distance_and_score_match_torchmetrics(real, fake, logits, row):
    network: Any = torch.nn.Identity()
    network.num_features = FEATURES
    distance = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    distance.update(real, real=True)
    distance.update(fake, real=False)
    expected = distance.compute().item()
    assert row["frechet_distance"] == pytest.approx(expected, rel=TOLERANCE)
    # The spatial features are the same ones in reverse order.
    assert row["spatial_frechet_distance"] == pytest.approx(expected, rel=TOLERANCE)
    assert row["spatial_frechet_distance_error"] == pytest.approx(row["frechet_distance_error"], rel=1e-6)
    scores = []
    for split in logits.chunk(10):
        score = InceptionScore(feature=torch.nn.Identity(), splits=1)
        score.update(split)
        scores.append(score.compute()[0].item())
    assert row["inception_score"] == pytest.approx(np.mean(scores), rel=1e-6)  # torchmetrics returns float32


def test_frechet_distance_matches_torch_fidelity(real, fake, row):
    library = torch_fidelity("fid")
    statistics = [library.fid_features_to_statistics(features) for features in (real, fake)]
    expected = library.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert row["frechet_distance"] == pytest.approx(expected, rel=TOLERANCE)


def test_inception_score_matches_torch_fidelity(logits, row):
    expected = torch_fidelity("isc").isc_features_to_metric(logits, splits=10, shuffle=False)
    assert row["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    deviation = expected["inception_score_std"] * (10 / 9) ** 0.5  # torch-fidelity divides by n instead of n - 1
    assert row["inception_score_error"] == pytest.approx(deviation, rel=1e-4)


def test_precision_and_recall_match_torch_fidelity(real, fake, row):
    settings = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    expected = torch_fidelity("prc").prc_features_to_metric(fake, real, **settings)
    assert (row["precision"], row["recall"]) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)


def test_kernel_distance_matches_torch_fidelity(real, fake, monkeypatch):
    """The subsets are torchmetrics': the first of a random order of the real images, then of the samples."""
    library = torch_fidelity("kid")
    subsets, size = 7, N // 2
    monkeypatch.setattr(measure_module, "KERNEL_SUBSETS", subsets)
    mean, _ = kernel_distance(real, fake)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [[features[torch.randperm(N)[:size]].numpy() for features in (real, fake)] for _ in range(subsets)]
    settings = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    values = [library.kernel_mmd(*pair, **settings, kid_kernel_poly_coef0=1) for pair in drawn]
    assert mean == pytest.approx(np.mean(values), rel=1e-6)  # torchmetrics returns float32
