"""Test the discriminator of denoising diffusion GANs: its head, its inputs, and the groups that it compares."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusers_cfg.methods.ddgan import Discriminator, minibatch_std
from tests.support.models import randomize_head

NULL = 10


def make_discriminator(**settings: Any) -> Discriminator:
    torch.manual_seed(0)
    settings = {"in_channels": 1, "size": 8, "num_classes": 10, "num_timesteps": 4, "channels": [8, 8], **settings}
    discriminator = Discriminator(**settings)
    assert (discriminator(*inputs(4, settings["in_channels"], settings["size"])) == 0).all()
    randomize_head(discriminator)
    return discriminator


def inputs(count: int, channels: int = 1, size: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x_prev, x_next = torch.randn(2, count, channels, size, size, generator=generator)
    return x_prev, x_next, torch.arange(count) % 4, torch.arange(count) % 11


@pytest.mark.parametrize(("size", "channels"), [(8, [8]), (12, [8, 16, 8, 8]), (7, [4, 4]), (4, [4, 4]), (1, [4, 4])])
def test_discriminator_of_any_size(size, channels):
    discriminator = make_discriminator(in_channels=3, size=size, channels=channels)
    logits = discriminator(*inputs(8, 3, size))
    assert logits.shape == (8,)
    logits.sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in discriminator.parameters()
    )


def test_projection_head():
    """D(c) - D(c') is the inner product of the features with the difference of two rows."""
    discriminator, features = make_discriminator(), []
    discriminator.linear.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    x_prev, x_next, t, c = inputs(8)
    logits = [discriminator(x_prev, x_next, t, labels) for labels in (c, torch.full_like(c, NULL))]
    rows = discriminator.class_embedding.weight
    torch.testing.assert_close(
        logits[0] - logits[1], ((rows[c] - rows[NULL]) * features[0]).sum(1), rtol=1e-4, atol=1e-5
    )
    assert rows.shape[0] == 11


def test_discriminator_depends_on_the_step_and_on_both_ends():
    discriminator, (x_prev, x_next, t, c) = make_discriminator(), inputs(8)
    logits = discriminator(x_prev, x_next, t, c)
    for other in ((x_next, x_prev, t, c), (x_prev, x_next, (t + 1) % 4, c), (x_prev, x_next, t, (c + 1) % 11)):
        assert ((discriminator(*other) - logits).abs() > 1e-3).all()


@pytest.mark.parametrize(("count", "group"), [(8, 4), (12, 4), (6, 3), (2, 2), (5, 1)])
def test_minibatch_std_compares_groups_of_consecutive_samples(count, group):
    h = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    std = minibatch_std(h)
    groups = h.numpy().reshape(count // group, group, 12)
    expected = np.sqrt(groups.var(1) + 1e-8).mean(1)
    assert std.shape == (count, 1, 2, 2)
    for i in range(count):
        np.testing.assert_allclose(std[i], expected[i // group], rtol=1e-5)


def test_logits_depend_on_the_own_group_only():
    """Otherwise several processes or accumulated batches would not be equal to one."""
    discriminator, (x_prev, x_next, t, c) = make_discriminator(), inputs(8)
    logits = discriminator(x_prev, x_next, t, c)
    torch.testing.assert_close(discriminator(x_prev[:4], x_next[:4], t[:4], c[:4]), logits[:4])
    alike = x_prev.clone()
    alike[5:] = alike[4]  # mode collapse of the second group
    after = discriminator(alike, x_next, t, c)
    torch.testing.assert_close(after[:4], logits[:4])
    assert abs(after[4] - logits[4]) > 1e-3
