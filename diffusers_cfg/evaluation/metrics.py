"""Compute metrics of generated images and their standard errors from features and class probabilities."""

from collections.abc import Callable

import torch

# Rows of the distance matrix that are in memory at a time.
CHUNK = 1024


def mean_and_covariance(
    count: torch.Tensor, total: torch.Tensor, outer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the mean and the unbiased covariance of feature vectors f from running sums, in float64.

    Args:
        count (`torch.Tensor` of shape `()`): the number of vectors, at least 2.
        total (`torch.Tensor` of shape `(features,)`): Σ f.
        outer (`torch.Tensor` of shape `(features, features)`): Σ f fᵀ.

    Returns:
        The mean `(features,)` and the covariance `(features, features)`.

    Raises:
        ValueError: if `count` is less than 2.
    """
    if count < 2:
        raise ValueError(f"A covariance needs at least two images, but there are {int(count)}.")
    mean = total / count
    return mean, (outer - count * mean.outer(mean)) / (count - 1)


def frechet_distance(
    real: tuple[torch.Tensor, torch.Tensor], fake: tuple[torch.Tensor, torch.Tensor], sqrt_real: torch.Tensor
) -> float:
    """
    Compute the Fréchet distance between two Gaussians, |μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½) (Heusel et al. 2017, arXiv
    1706.08500). With Inception's features it is the FID.

    tr (Σ Σ')^½ is the sum of the square roots of the eigenvalues of Σ^½ Σ' Σ^½. This matrix is symmetric, so rounding
    yields no complex eigenvalues where Σ or Σ' does not have full rank.

    Args:
        real, fake (`tuple[torch.Tensor, torch.Tensor]`): a mean `(features,)` and a covariance `(features, features)`.
        sqrt_real (`torch.Tensor` of shape `(features, features)`): Σ^½ of `real`, see `matrix_sqrt`.
    """
    (mean, covariance), (fake_mean, fake_covariance) = real, fake
    eigenvalues = torch.linalg.eigvalsh(sqrt_real @ fake_covariance @ sqrt_real)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    return ((mean - fake_mean).square().sum() + covariance.trace() + fake_covariance.trace() - 2 * cross).item()


def matrix_sqrt(covariance: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root of a positive semi-definite matrix. Negative eigenvalues are set to zero."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T


def inception_score(count: torch.Tensor, total: torch.Tensor, negative_entropy: torch.Tensor) -> float:
    """
    Compute the inception score exp(E KL(p(y|x) ‖ p(y))) (Salimans et al. 2016, arXiv 1606.03498) from running sums. The
    score lies between 1 and the number of classes.

    Args:
        count (`torch.Tensor` of shape `()`): the number of images.
        total (`torch.Tensor` of shape `(classes,)`): Σ p(y|x).
        negative_entropy (`torch.Tensor` of shape `()`): Σ Σ_y p(y|x) log p(y|x).
    """
    marginal = total / count
    return (negative_entropy / count - torch.special.xlogy(marginal, marginal).sum()).exp().item()


def jackknife(statistic: Callable[[torch.Tensor], float], blocks: int) -> float:
    """
    Estimate the standard error of a statistic by leaving out one of B equal blocks of images at a time: se² =
    (B - 1)/B Σ (θ_b - θ̄)².

    The Fréchet distance depends on the number of distinct images. The jackknife hardly changes this number; a
    bootstrap, which repeats images, would.

    Args:
        statistic (`Callable[[torch.Tensor], float]`): maps a mask `(blocks,)` of the blocks to keep to the value.
        blocks (`int`): B, at least 2.
    """
    without = torch.tensor([statistic(torch.arange(blocks) != block) for block in range(blocks)], dtype=torch.float64)
    return ((blocks - 1) * without.var(correction=0)).sqrt().item()


def polynomial_mmd(real: torch.Tensor, fake: torch.Tensor) -> float:
    """
    Compute the unbiased estimate of the squared MMD with the cubic kernel (x·y/d + 1)³ over all pairs (Bińkowski et al.
    2018, arXiv 1801.01401, equation 4), which can be negative. It suits sets of a few images.

    Args:
        real (`torch.Tensor` of shape `(n, d)`), fake (`torch.Tensor` of shape `(m, d)`): two or more features each.
    """

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a: torch.Tensor) -> torch.Tensor:
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return (mean_of_pairs(real) + mean_of_pairs(fake) - 2 * kernel(real, fake).mean()).item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """
    Compute improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2): the fraction
    of the samples on the manifold of the data, and the fraction of the data on the manifold of the samples. A manifold
    is the union of balls around its points; each ball reaches the k-th nearest neighbour of its center.

    Args:
        real (`torch.Tensor` of shape `(n, features)`), fake (`torch.Tensor` of shape `(m, features)`): more than k
            points each. The two metrics are comparable if n = m.
        k (`int`): the neighbour that a ball reaches; 3 in the paper.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: if `real` or `fake` has k points or fewer.
    """
    _, covered_fake = knn_balls(real, fake, k)
    _, covered_real = knn_balls(fake, real, k)
    return covered_fake.gt(0).double().mean().item(), covered_real.gt(0).double().mean().item()


def density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """
    Compute density and coverage (Naeem et al. 2020, arXiv 2002.09797, equations 4 and 5), which are less sensitive to
    outliers than precision and recall. Density is the mean number of the data's balls that contain a sample, divided by
    k; it may exceed 1. Coverage is the fraction of the data's balls that contain a sample.

    Args:
        real (`torch.Tensor` of shape `(n, features)`), fake (`torch.Tensor` of shape `(m, features)`): more than k
            points each.
        k (`int`): the neighbour that a ball reaches; 5 in the paper.

    Returns:
        Density and coverage.

    Raises:
        ValueError: if `real` or `fake` has k points or fewer.
    """
    inside_counts, covered = knn_balls(real, fake, k)
    return covered.double().mean().item() / k, inside_counts.gt(0).double().mean().item()


def knn_balls(centers: torch.Tensor, points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Count the points in balls around centers. Each ball reaches the k-th nearest neighbour of its center among the
    centers. Memory is linear in the numbers of centers and of points.

    Args:
        centers (`torch.Tensor` of shape `(centers, features)`), points (`torch.Tensor` of shape `(points, features)`):
            more than k rows each.

    Returns:
        The number of points in each ball, `(centers,)`, and the number of balls around each point, `(points,)`.
    """
    for name, rows in (("real", centers), ("fake", points)):
        if len(rows) <= k:
            raise ValueError(f"The k={k} nearest neighbours need more than {k} points, but `{name}` has {len(rows)}.")
    inside_counts, covered = [], torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for rows in centers.split(CHUNK):
        # The nearest "neighbour" of a point is itself.
        radii = torch.cdist(rows, centers).kthvalue(k + 1, dim=1, keepdim=True).values
        inside = torch.cdist(rows, points) <= radii
        inside_counts.append(inside.sum(1))
        covered += inside.sum(0)
    return torch.cat(inside_counts), covered
