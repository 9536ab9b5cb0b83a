"""Test Muon and AdamW as one optimizer."""

import copy

import pytest
import torch

from diffusers_cfg import UNet2DCFGModel
from diffusers_cfg.engine.muon import MuonAdamW, split_parameters
from tests.support.models import make_unet

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8, "fused": True}


def make_optimizer(module: torch.nn.Module) -> MuonAdamW:
    return MuonAdamW(*split_parameters([module]), **OPTIONS)


class Layers(torch.nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = torch.nn.Embedding(3, 4), torch.nn.Linear(4, 6)
        self.conv, self.norm = torch.nn.Conv2d(2, 5, 3), torch.nn.GroupNorm(1, 5)


def set_gradients(module: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_weights_of_layers_are_matrices_and_the_rest_is_not():
    unet: UNet2DCFGModel = make_unet()
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    matrices, others = ({names[id(p)] for p in group} for group in split_parameters([unet]))
    assert matrices.isdisjoint(others)
    assert matrices | others == {*names.values()}
    assert {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= matrices
    assert {"class_embedding.weight", "conv_in.bias", "conv_norm_out.weight"} <= others
    assert all(name.endswith(("bias", "class_embedding.weight")) or "norm" in name for name in others)


def test_shared_weights_are_optimized_once():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    module = torch.nn.Sequential(first, second)
    matrices, others = split_parameters([module])
    assert (len(matrices), len(others)) == (1, 2)


def test_step_equals_the_two_optimizers_of_torch():
    module = Layers()
    peer = copy.deepcopy(module)
    optimizer = make_optimizer(module)
    views = [torch.nn.Parameter(layer.weight.data.flatten(1)) for layer in (peer.linear, peer.conv)]
    rest = [peer.embedding.weight, peer.linear.bias, peer.conv.bias, *peer.norm.parameters()]
    muon = torch.optim.Muon(views, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, **OPTIONS)
    for step in range(4):
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 1e-2 / (1 + step)  # as a schedule does
        for layers in (module, peer):
            set_gradients(layers, step)
        for view, layer in zip(views, (peer.linear, peer.conv), strict=True):
            assert layer.weight.grad is not None
            view.grad = layer.weight.grad.flatten(1)
        for one in (optimizer, muon, adamw):
            one.step()
        peer.linear.weight.data.copy_(views[0])
        peer.conv.weight.data.copy_(views[1].view_as(peer.conv.weight))
    for (name, parameter), other in zip(module.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_update_of_a_matrix_is_orthogonal_and_as_large_as_one_of_adamw():
    layer = torch.nn.Linear(16, 48, bias=False)
    before = layer.weight.detach().clone()
    set_gradients(layer, 0)
    MuonAdamW(*split_parameters([layer]), **{**OPTIONS, "weight_decay": 0.0}).step()
    update = before - layer.weight.detach()
    singular = torch.linalg.svdvals(update) / (1e-2 * 0.2 * 48**0.5)
    assert ((singular > 0.5) & (singular < 1.5)).all()
    assert update.square().mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.25)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_step_is_skipped_on_the_device(steps_before):
    """A non-finite gradient changes neither weights nor moments, also in the first step."""
    module, peer = Layers(), Layers()
    optimizer, other = make_optimizer(module), make_optimizer(peer)
    for step in range(steps_before):
        for layers, one in ((module, optimizer), (peer, other)):
            set_gradients(layers, step)
            one.found_inf = torch.zeros(())
            one.step()
    set_gradients(module, 7)
    assert module.linear.weight.grad is not None
    module.linear.weight.grad[0, 0] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    set_gradients(module, 8)
    set_gradients(peer, 8)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    other.step()
    for (name, parameter), expected in zip(module.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_parameters_without_gradients_are_left_out():
    module = Layers()
    optimizer, before = make_optimizer(module), copy.deepcopy(module)
    optimizer.step()
    assert not optimizer.state
    module.linear.weight.grad = torch.ones(6, 4)
    optimizer.step()
    assert {id(parameter) for parameter in optimizer.state} == {id(module.linear.weight)}
    changed = [n for (n, p), q in zip(module.named_parameters(), before.parameters(), strict=True) if not p.equal(q)]
    assert changed == ["linear.weight"]
