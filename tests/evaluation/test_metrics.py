"""Test the metrics against other libraries and against known values."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from diffusers_cfg.evaluation import metrics
from diffusers_cfg.evaluation.measure import kernel_distance
from diffusers_cfg.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    jackknife,
    matrix_sqrt,
    mean_and_covariance,
    precision_recall,
)

warnings.filterwarnings("ignore", module="torchmetrics")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.tensor(float(len(features)), dtype=torch.float64)
    return mean_and_covariance(count, features.sum(0), features.T @ features)


def distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    return frechet_distance(moments(real), moments(fake), matrix_sqrt(moments(real)[1]))


@pytest.mark.parametrize(("n", "features"), [(500, 16), (50, 64)])
def test_frechet_distance_matches_scipy_and_torchmetrics(n, features):
    real = normal(n, features) @ normal(features, features, seed=1)
    fake = normal(n, features, seed=2) @ normal(features, features, seed=3) + 0.5
    (m, c), (m2, c2) = ((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (real, fake))
    root = scipy.linalg.sqrtm(c @ c2).real
    expected = ((m - m2) ** 2).sum() + np.trace(c + c2 - 2 * root)
    assert distance(real, fake) == pytest.approx(expected, rel=1e-3 if n < features else 1e-9)

    network = torch.nn.Identity()
    network.num_features = features
    reference = FrechetInceptionDistance(feature=network)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    assert distance(real, fake) == pytest.approx(reference.compute().item(), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """For commuting covariances the distance is |μ - μ'|² + Σ (σ - σ')²."""
    std, std2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    real, fake = (torch.zeros(3).double(), std.square().diag()), (torch.ones(3).double(), std2.square().diag())
    expected = 3 + (std - std2).square().sum().item()
    assert frechet_distance(real, fake, matrix_sqrt(real[1])) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(real, real, matrix_sqrt(real[1])) == pytest.approx(0, abs=1e-12)


def test_covariance_of_one_image_raises():
    with pytest.raises(ValueError, match="at least two images, but there are 1"):
        moments(normal(1, 4))


def test_jackknife_of_a_mean_is_its_standard_error():
    blocks = normal(10)
    error = jackknife(lambda kept: blocks[kept].mean().item(), 10)
    assert error == pytest.approx((blocks.std() / 10**0.5).item(), rel=1e-9)


def test_jackknife_of_the_frechet_distance_matches_the_spread_of_independent_sets():
    real = normal(5000, 8)
    distances, errors = [], []
    for seed in range(60):
        fake = (normal(600, 8, seed=seed + 1) + 0.3).unflatten(0, (10, 60))
        distances.append(distance(real, fake.flatten(0, 1)))
        errors.append(jackknife(lambda kept, fake=fake: distance(real, fake[kept].flatten(0, 1)), 10))
    assert np.mean(errors) == pytest.approx(np.std(distances, ddof=1), rel=0.3)


def score(logits: torch.Tensor) -> float:
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return inception_score(torch.tensor(float(len(p))), p.sum(0), torch.xlogy(p, p).sum())


def test_inception_score_of_known_predictions():
    certain = 1000 * torch.eye(7).repeat(3, 1)
    assert score(certain) == pytest.approx(7)  # certain, and uniform over the classes
    assert score(certain[:1].repeat(5, 1)) == pytest.approx(1)  # always the same class
    assert score(torch.zeros(5, 7)) == pytest.approx(1)  # uniform predictions


def test_inception_score_matches_torchmetrics():
    logits = 3 * normal(200, 10)
    reference = InceptionScore(feature=torch.nn.Identity(), splits=1)
    reference.update(logits)
    assert score(logits) == pytest.approx(reference.compute()[0].item(), rel=1e-9)


def modes(*centers: float, n: int = 100, seed: int = 0) -> torch.Tensor:
    """Return n points around each center, on a line in four dimensions."""
    points = normal(len(centers), n, 4, seed=seed)
    points[..., 0] += 100 * torch.tensor(centers).view(-1, 1)
    return points.flatten(0, 1)


def test_dropped_mode_lowers_recall_and_coverage():
    real, fake = modes(0, 1, 2, 3), modes(0, 1, n=200, seed=1)
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    assert precision > 0.85
    assert 0.8 < density < 1.2
    assert 0.4 < recall <= 0.5
    assert 0.45 < coverage <= 0.5


def test_invented_mode_lowers_precision_and_density():
    real, fake = modes(0, 1), modes(0, 1, 9, 10, n=50, seed=1)
    precision, recall = precision_recall(real, fake)
    assert 0.4 < precision <= 0.5
    assert recall > 0.85
    assert 0.4 < density_coverage(real, fake)[0] < 0.6


def test_outlier_raises_precision_but_not_density():
    """The ball of a distant real point covers all samples (Naeem et al. 2020)."""
    real, fake = torch.cat([modes(0), modes(50, n=1)]), modes(5, n=100, seed=1)
    assert precision_recall(real, fake)[0] == 1.0
    assert density_coverage(real, fake)[0] < 0.25


def test_metrics_of_the_data_itself():
    real = modes(0, 1)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e6) == (0.0, 0.0)
    density, coverage = density_coverage(real, real)
    assert density == pytest.approx(6 / 5)  # each ball holds its center and five neighbours
    assert coverage == 1.0


def test_metrics_do_not_depend_on_the_chunk_size(monkeypatch):
    real, fake = normal(50, 4), normal(40, 4, seed=1)
    whole = precision_recall(real, fake), density_coverage(real, fake)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    assert (precision_recall(real, fake), density_coverage(real, fake)) == whole


def test_too_few_points_raise():
    with pytest.raises(ValueError, match="k=3 nearest neighbours need more than 3 points, but `real` has 3"):
        precision_recall(normal(3, 2), normal(9, 2))


def test_kernel_distance_is_unbiased_and_detects_a_shift():
    real, fake = normal(1000, 8), normal(1000, 8, seed=1)
    same, spread = kernel_distance(real, fake)
    assert abs(same) < 3 * spread
    shifted, _ = kernel_distance(real, fake + 0.5)
    # Definition of MMD² with the kernel (x·y/d + 1)³
    x, y = real.numpy(), (fake + 0.5).numpy()
    xx, yy, xy = ((a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n = len(x)
    off_diagonal = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    assert shifted == pytest.approx(off_diagonal - 2 * xy.mean(), rel=0.05)


def test_kernel_distance_keeps_the_global_random_state():
    before = torch.get_rng_state()
    first = kernel_distance(normal(50, 4), normal(50, 4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert kernel_distance(normal(50, 4), normal(50, 4, seed=1)) == first
