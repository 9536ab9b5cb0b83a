"""How good samples are. Functions over tensors."""

import torch


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
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k={k} points, but got {len(real)} and {len(fake)}.")
    return coverage_of(fake, real, k), coverage_of(real, fake, k)


def coverage_of(points: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    """The share of the points that lie within at least one of the manifold's balls."""
    # The nearest "neighbour" of a point is itself.
    radii = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
    return (torch.cdist(points, manifold) <= radii).any(dim=1).float().mean().item()
