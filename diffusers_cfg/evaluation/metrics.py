"""Metrics of generated images and their standard errors: pure functions of features and class probabilities."""

from collections.abc import Callable

import torch

# Rows of a matrix of distances that are held at a time.
CHUNK = 1024


def mean_and_covariance(
    count: torch.Tensor, total: torch.Tensor, outer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the mean and the unbiased covariance of feature vectors f from running sums in float64.

    Args:
        count (`torch.Tensor` of shape `()`): the number of vectors, at least 2.
        total (`torch.Tensor` of shape `(features,)`): Σ f.
        outer (`torch.Tensor` of shape `(features, features)`): Σ f fᵀ.

    Returns:
        The mean `(features,)` and the covariance `(features, features)`.

    Raises:
        ValueError: there are fewer than two vectors.
    """
    if count < 2:
        raise ValueError(f"a covariance needs at least two images, but there are {int(count)}.")
    mean = total / count
    return mean, (outer - count * mean.outer(mean)) / (count - 1)


def frechet_distance(
    real: tuple[torch.Tensor, torch.Tensor], fake: tuple[torch.Tensor, torch.Tensor], sqrt_real: torch.Tensor
) -> float:
    """
    Compute the Fréchet distance of two Gaussians, |μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½) (Heusel et al. 2017, arXiv
    1706.08500). With Inception's features it is the FID.

    tr (Σ Σ')^½ is the sum of the roots of the eigenvalues of Σ^½ Σ' Σ^½. That matrix is symmetric, so rounding yields
    no complex numbers where Σ or Σ' does not have full rank.

    Args:
        real, fake (tuples of a mean `(features,)` and a covariance `(features, features)`).
        sqrt_real (`torch.Tensor` of shape `(features, features)`): Σ^½ of `real`, see `matrix_sqrt`.
    """
    (mean, covariance), (fake_mean, fake_covariance) = real, fake
    eigenvalues = torch.linalg.eigvalsh(sqrt_real @ fake_covariance @ sqrt_real)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    return ((mean - fake_mean).square().sum() + covariance.trace() + fake_covariance.trace() - 2 * cross).item()


def matrix_sqrt(covariance: torch.Tensor) -> torch.Tensor:
    """Return the symmetric root of a positive semi-definite matrix. Negative eigenvalues are taken for rounding."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T


def inception_score(count: torch.Tensor, total: torch.Tensor, negative_entropy: torch.Tensor) -> float:
    """
    Compute the inception score exp(E KL(p(y|x) ‖ p(y))) (Salimans et al. 2016, arXiv 1606.03498) from running sums. It
    lies between 1 and the number of classes.

    Args:
        count (`torch.Tensor` of shape `()`): the number of images.
        total (`torch.Tensor` of shape `(classes,)`): Σ p(y|x).
        negative_entropy (`torch.Tensor` of shape `()`): Σ Σ_y p(y|x) log p(y|x).
    """
    marginal = total / count
    return (negative_entropy / count - torch.special.xlogy(marginal, marginal).sum()).exp().item()


def jackknife(statistic: Callable[[torch.Tensor], float], blocks: int) -> float:
    """
    Estimate the standard error of a statistic of images in equal blocks by leaving out one block at a time: se² =
    (B - 1)/B Σ (θ_b - θ̄)².

    A bootstrap would repeat images. The jackknife hardly changes their number, which the Fréchet distance depends on.

    Args:
        statistic: called with a mask `(blocks,)` of the blocks that are kept.
        blocks (`int`): B, at least 2.
    """
    without = torch.tensor([statistic(torch.arange(blocks) != block) for block in range(blocks)], dtype=torch.float64)
    return ((blocks - 1) * without.var(correction=0)).sqrt().item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """
    Compute improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2): the share of
    the samples that lie on the manifold of the data, and the share of the data that lies on the manifold of the
    samples. A manifold is the union of balls around its points, each reaching its k-th nearest neighbour.

    Args:
        real (`torch.Tensor` of shape `(n, features)`), fake (`torch.Tensor` of shape `(m, features)`): more than k
            points each. The two metrics are comparable if n = m.
        k (`int`): which neighbour; the paper uses 3.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: there are k points or fewer.
    """
    _, covered_fake = knn_balls(real, fake, k)
    _, covered_real = knn_balls(fake, real, k)
    return covered_fake.gt(0).double().mean().item(), covered_real.gt(0).double().mean().item()


def density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """
    Compute density and coverage (Naeem et al. 2020, arXiv 2002.09797, equations 4 and 5), which outliers affect less
    than precision and recall. Density is the mean number of the data's balls that a sample lies in, divided by k; it
    may exceed 1. Coverage is the share of the data whose own ball holds a sample.

    Args:
        real (`torch.Tensor` of shape `(n, features)`), fake (`torch.Tensor` of shape `(m, features)`): more than k
            points each.
        k (`int`): which neighbour; the paper uses 5.

    Raises:
        ValueError: there are k points or fewer.
    """
    held, covered = knn_balls(real, fake, k)
    return covered.double().mean().item() / k, held.gt(0).double().mean().item()


def knn_balls(centers: torch.Tensor, points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Count points in balls around centers, each ball reaching its center's k-th nearest neighbour among the centers.
    Memory is linear in both numbers.

    Args:
        centers (`torch.Tensor` of shape `(centers, features)`), points (`torch.Tensor` of shape `(points, features)`):
            more than k each.

    Returns:
        The number of points in each ball, `(centers,)`, and the number of balls that each point lies in, `(points,)`.
    """
    for name, rows in (("real", centers), ("fake", points)):
        if len(rows) <= k:
            raise ValueError(f"the k={k} nearest neighbours need more than {k} points, but {name} has {len(rows)}.")
    held, covered = [], torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for rows in centers.split(CHUNK):
        # The nearest "neighbour" of a point is itself.
        radii = torch.cdist(rows, centers).kthvalue(k + 1, dim=1, keepdim=True).values
        inside = torch.cdist(rows, points) <= radii
        held.append(inside.sum(1))
        covered += inside.sum(0)
    return torch.cat(held), covered
