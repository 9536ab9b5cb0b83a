"""How good samples are, and how sure that is. Functions over features and class probabilities, in float64."""

from collections.abc import Callable

import torch

# At most so many rows of a matrix of distances are held at a time.
CHUNK = 1024


def mean_and_covariance(
    count: torch.Tensor, total: torch.Tensor, outer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean `(features,)` and unbiased covariance `(features, features)` from running sums in float64.

    Args:
        count (`torch.Tensor` of shape `()`): how many feature vectors f there were, 2 or more.
        total (`torch.Tensor` of shape `(features,)`): Σ f.
        outer (`torch.Tensor` of shape `(features, features)`): Σ f fᵀ.
    """
    if count < 2:
        raise ValueError(f"a covariance needs at least two images, but there are {int(count)}.")
    mean = total / count
    return mean, (outer - count * mean.outer(mean)) / (count - 1)


def frechet_distance(
    real: tuple[torch.Tensor, torch.Tensor], fake: tuple[torch.Tensor, torch.Tensor], sqrt_real: torch.Tensor
) -> float:
    """
    The Fréchet distance of two Gaussians, |μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½) (Heusel et al. 2017, arXiv 1706.08500);
    with Inception's features the FID. tr (Σ Σ')^½ is taken as the sum of the roots of the eigenvalues of Σ^½ Σ' Σ^½, a
    symmetric matrix, so that nothing complex comes of rounding where Σ or Σ' has not full rank.

    Args:
        real, fake (tuples of a mean `(features,)` and a covariance `(features, features)`).
        sqrt_real (`torch.Tensor` of shape `(features, features)`): Σ^½ of `real`, see `matrix_sqrt`.
    """
    (mean, covariance), (fake_mean, fake_covariance) = real, fake
    eigenvalues = torch.linalg.eigvalsh(sqrt_real @ fake_covariance @ sqrt_real)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    return ((mean - fake_mean).square().sum() + covariance.trace() + fake_covariance.trace() - 2 * cross).item()


def matrix_sqrt(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric root of a symmetric matrix without negative eigenvalues, but for rounding."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T


def inception_score(count: torch.Tensor, total: torch.Tensor, negative_entropy: torch.Tensor) -> float:
    """
    The inception score exp(E KL(p(y|x) ‖ p(y))) (Salimans et al. 2016, arXiv 1606.03498) from running sums. It is
    between 1 and the number of classes.

    Args:
        count (`torch.Tensor` of shape `()`): images.
        total (`torch.Tensor` of shape `(classes,)`): Σ p(y|x).
        negative_entropy (`torch.Tensor` of shape `()`): Σ Σ_y p(y|x) log p(y|x).
    """
    marginal = total / count
    return (negative_entropy / count - torch.special.xlogy(marginal, marginal).sum()).exp().item()


def jackknife(statistic: Callable[[torch.Tensor], float], blocks: int) -> float:
    """
    The standard error of a statistic of images that came in equal blocks, by leaving one block out at a time: se² =
    (B - 1)/B Σ (θ_b - θ̄)². Unlike a bootstrap, which repeats images, it changes the number of images by little, on
    which the Fréchet distance depends.

    Args:
        statistic: called with a mask `(blocks,)` of the blocks that are kept.
        blocks (`int`): B, 2 or more.
    """
    without = torch.tensor([statistic(torch.arange(blocks) != block) for block in range(blocks)], dtype=torch.float64)
    return ((blocks - 1) * without.var(correction=0)).sqrt().item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2): the share of the
    samples that lie on the manifold of the data, and the share of the data that lies on the manifold of the samples.
    A manifold is the union of balls around its points, each reaching its k-th nearest neighbour.

    Args:
        real (`torch.Tensor` of shape `(n, features)`), fake (`torch.Tensor` of shape `(m, features)`): more than k
            points each. Equal numbers make the two comparable.
        k (`int`): which neighbour; the paper uses 3.

    Returns:
        precision and recall, in [0, 1].
    """
    _, covered_fake = balls(real, fake, k)
    _, covered_real = balls(fake, real, k)
    return covered_fake.gt(0).double().mean().item(), covered_real.gt(0).double().mean().item()


def density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """
    Density and coverage (Naeem et al. 2020, arXiv 2002.09797, equations 4 and 5), which outliers among the data and
    among the samples deceive less: how many balls of the data a sample lies in, over k, on average, which may exceed 1;
    and the share of the data whose own ball holds a sample.

    Args:
        real (`torch.Tensor` of shape `(n, features)`), fake (`torch.Tensor` of shape `(m, features)`): more than k
            points each.
        k (`int`): which neighbour; the paper uses 5.
    """
    held, covered = balls(real, fake, k)
    return covered.double().mean().item() / k, held.gt(0).double().mean().item()


def balls(centers: torch.Tensor, points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Balls around the centers, each reaching its k-th nearest neighbour among them: how many of the points each ball
    holds, `(centers,)`, and in how many balls each point lies, `(points,)`. Memory is linear in both.
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
