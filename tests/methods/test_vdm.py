"""Test the loss of variational diffusion models, its gradients and its logs, on the real method object."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import parse_config
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.method import Batch, Terms
from diffusers_cfg.method_settings import CFGConfig, VDMConfig
from diffusers_cfg.methods.cfg import ClassifierFreeGuidance
from diffusers_cfg.methods.vdm import VariationalDiffusion, build_pipeline
from diffusers_cfg.randomness import Draws
from diffusers_cfg.variational_bound import prior_term, reconstruction_term
from tests.support.models import generators, make_unet
from tests.support.runs import SMALLEST

BATCH_SIZE = 16
BITS = 1 / (64 * math.log(2))  # bits per dimension of one nat, at 8×8
DIGITS = Digits()


def make_method(*argv: str) -> VariationalDiffusion:
    """Return the method with a tiny network and, if the shape is learned, a shape that is far from a line."""
    config = parse_config(VDMConfig, [*SMALLEST, *argv])
    method = VariationalDiffusion(config, build_pipeline(config, DIGITS))
    schedule = method.noise_schedule
    if schedule.learn_shape:
        with torch.no_grad():
            schedule.w3 += torch.linspace(1, 0, len(schedule.w3))
    return method


def make_batch(first: int = 0, last: int = BATCH_SIZE) -> Batch:
    """Return some rows of a global batch of digits."""
    rows = range(first, last)
    x = to_float(torch.from_numpy(DIGITS.images[first:last]).view(-1, 1, 8, 8))
    return Batch(x, torch.from_numpy(DIGITS.class_labels[first:last]), Draws(0, 0, rows, BATCH_SIZE), 0)


def loss_of(method: VariationalDiffusion, batch: Batch, unet: torch.nn.Module | None = None) -> Terms:
    """Return the terms of a batch, as the trainer computes them."""
    return method.loss({**method.modules, **({} if unet is None else {"unet": unet})}, batch)


def parameters_of(method: VariationalDiffusion) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the parameters of the network and of the ends, and those of the shape."""
    outer, inner = list(method.pipeline.unet.parameters()), []
    for name, parameter in method.noise_schedule.named_parameters():
        (outer if name.startswith("gamma") else inner).append(parameter)
    return outer, inner


def assert_close_gradients(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Compare gradients, each relative to its norm, unless that is a rounding error of the norm of all."""
    total = torch.stack([gradient.norm() for gradient in expected]).norm()
    for own, other in zip(actual, expected, strict=True):
        assert (own - other).norm() <= 1e-5 * other.norm() + 1e-7 * total


class Network(torch.nn.Module):
    """A network, given as a function of z, that records its inputs."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, z: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> UNet2DOutput:
        self.calls.append((z, t, class_labels))
        return UNet2DOutput(sample=self.function(z))


class GivenDraws(Draws):
    """Given times and noise, and no dropped label."""

    def __init__(self, times: torch.Tensor, noise: torch.Tensor) -> None:
        super().__init__(0, 0, range(len(times)), len(times))
        self.times, self.noise = times, noise

    def antithetic(self, purpose: str) -> torch.Tensor:
        return self.times

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        return torch.ones_like(self.times)

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        return self.noise.expand(len(self.times), *shape)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [0, 10])
def test_loss_follows_the_paper(prediction_type, steps):
    """Compute the inputs of the network and the three terms again, from the formulas of the paper in float64."""
    method, batch = make_method("--prediction_type", prediction_type, "--diffusion_steps", str(steps)), make_batch()
    network = Network(lambda z: 0.3 * z + 0.1)
    terms = loss_of(method, batch, network)
    ((z, t, _),) = network.calls
    assert z.requires_grad  # The schedule learns through both inputs
    assert t.requires_grad

    draws, x, schedule = batch.draws, batch.x.double(), method.noise_schedule.double()
    noise, noise_0 = (draws.normal(name, 1, 8, 8).double() for name in ("noise", "noise of z_0"))
    assert (noise - noise_0).abs().mean() > 0.5
    u = draws.antithetic("time").double()
    assert u.sort().values.diff().tolist() == pytest.approx([1 / BATCH_SIZE] * (BATCH_SIZE - 1), abs=1e-6)
    if steps:
        i = torch.floor(u * steps) + 1
        shape, previous = schedule(i / steps), schedule((i - 1) / steps)
        weight = steps / 2 * ((shape.gamma - previous.gamma).exp() - 1)
    else:
        shape = schedule(u)
        weight = shape.gamma_slope / 2
    alpha, sigma = ((1 / (1 + (sign * shape.gamma).exp())).sqrt().view(-1, 1, 1, 1) for sign in (1, -1))
    exact_z = alpha * x + sigma * noise
    torch.testing.assert_close(z.double(), exact_z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.double(), 1000 * shape.n - 1, rtol=1e-4, atol=1e-3)
    pred = 0.3 * exact_z + 0.1
    eps = {
        "epsilon": pred,
        "v_prediction": sigma * exact_z + alpha * pred,
        "sample": (exact_z - alpha * pred) / sigma,
    }[prediction_type]
    diffusion = weight * (noise - eps).square().sum((1, 2, 3))
    expected = prior_term(x, shape.gamma_1) + reconstruction_term(x, noise_0, shape.gamma_0) + diffusion
    torch.testing.assert_close(terms.loss.double(), BITS * expected, rtol=2e-3, atol=1e-4)
    assert terms.loss.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_backward_pass_serves_two_objectives(prediction_type):
    """The network and the ends minimise the mean loss, the shape the mean square of the diffusion term."""
    method, batch = make_method("--prediction_type", prediction_type), make_batch()
    outer, inner = parameters_of(method)
    actual = torch.autograd.grad(loss_of(method, batch).loss.mean(), [*outer, *inner])

    method.minimises_variance = False
    mean = torch.autograd.grad(loss_of(method, batch).loss.mean(), outer)
    noise_0 = batch.draws.normal("noise of z_0", 1, 8, 8)
    ends = (prior_term(batch.x, method.noise_schedule.gamma_1), reconstruction_term(batch.x, noise_0, outer[-2]))
    assert outer[-2] is method.noise_schedule.gamma_0
    diffusion = loss_of(method, batch).loss - BITS * (ends[0] + ends[1]).detach()
    square = torch.autograd.grad(diffusion.square().mean(), inner)
    assert_close_gradients(actual[: len(outer)], mean)
    assert_close_gradients(actual[len(outer) :], square)
    # The two objectives differ
    plain = torch.autograd.grad(loss_of(method, batch).loss.mean(), inner)
    assert all((own - other).norm() > 0.1 * other.norm() for own, other in zip(plain, square, strict=True))


def test_accumulated_batches_have_the_gradients_of_the_whole():
    """The two objectives and the antithetic times are those of the global batch."""
    method = make_method()
    outer, inner = parameters_of(method)
    whole = torch.autograd.grad(loss_of(method, make_batch()).loss.mean(), [*outer, *inner])
    halves = [
        torch.autograd.grad(loss_of(method, make_batch(first, first + 8)).loss.mean() / 2, [*outer, *inner])
        for first in (0, 8)
    ]
    assert_close_gradients(tuple(a + b for a, b in zip(*halves, strict=True)), whole)
    times = [make_batch(*rows).draws.antithetic("time") for rows in ((0, 8), (8, 16), (0, 16))]
    assert torch.equal(torch.cat(times[:2]), times[2])


def test_everything_minimises_the_bound_with_steps():
    """With T steps the bound depends on the shape."""
    method, batch = make_method("--diffusion_steps", "10"), make_batch()
    outer, inner = parameters_of(method)
    actual = torch.autograd.grad(loss_of(method, batch).loss.mean(), [*outer, *inner])
    method.minimises_variance = False
    expected = torch.autograd.grad(loss_of(method, batch).loss.mean(), [*outer, *inner])
    assert_close_gradients(actual, expected)
    assert all(gradient.any() for gradient in actual[len(outer) - 2 :])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_in_bfloat16_is_close_to_float32(prediction_type):
    """The trainer runs the network under autocast, and all else in float32."""
    method = make_method("--prediction_type", prediction_type)
    unet, losses = method.pipeline.unet, []
    forward = unet.forward
    for enabled in (False, True):
        unet.forward = torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)(forward)
        with torch.no_grad():
            losses.append(loss_of(method, make_batch()).loss)
    assert losses[1].dtype == torch.float32
    assert not torch.equal(*losses)
    assert losses[1].mean().item() == pytest.approx(losses[0].mean().item(), rel=0.02)


@pytest.mark.parametrize(
    ("noise_schedule", "learned"),
    [
        ("learned", ["gamma_0", "gamma_1", "w1", "w2", "b2", "w3"]),
        ("linear", ["gamma_0", "gamma_1"]),
        ("fixed", []),
    ],
)
def test_noise_schedule_flag_selects_what_is_learned(noise_schedule, learned):
    method = make_method("--noise_schedule", noise_schedule)
    assert [name for name, _ in method.noise_schedule.named_parameters()] == learned
    if learned:
        gradients = torch.autograd.grad(
            loss_of(method, make_batch()).loss.mean(), list(method.noise_schedule.parameters())
        )
        assert all(gradient.any() for gradient in gradients)
    # DDP refuses a module without parameters
    names = ("unet", "noise_schedule") if learned else ("unet",)
    assert tuple(method.modules) == method.averaged == method.objectives[0].trains == names
    assert method.compiled == ("unet",)


def test_weights():
    """The weights relative to the bound are sigmoid(2 - λ), and 2p(λ) for the density of train_cfg.py's process."""
    log_snr = torch.linspace(-5, 13.3, 101, dtype=torch.float64)
    sigmoid = make_method("--loss_weighting", "sigmoid").loss_weight(log_snr)
    torch.testing.assert_close(sigmoid, 1 / (1 + (log_snr - 2).exp()))
    scheduler, h = LogSNRScheduler(), 1e-4
    density = (scheduler.u_at(log_snr - h) - scheduler.u_at(log_snr + h)) / (2 * h)
    simple = make_method("--loss_weighting", "simple").loss_weight(log_snr)
    torch.testing.assert_close(simple, 2 * density, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("weighting", ["sigmoid", "simple"])
def test_weighted_loss_trains_the_network_and_the_shape_only(weighting):
    """The ends would shrink the interval: less interval, less loss. The bound is logged."""
    method, batch = make_method("--loss_weighting", weighting), make_batch()
    assert {name for name, _ in method.noise_schedule.named_buffers()} == {"gamma_0", "gamma_1"}
    network = Network(lambda z: 0.3 * z)
    terms = loss_of(method, batch, network)
    diffusion = terms.logs["diffusion/conditional"].nan_to_num() + terms.logs["diffusion/null"].nan_to_num()
    gamma = method.noise_schedule(batch.draws.antithetic("time")).gamma
    torch.testing.assert_close(terms.loss, method.loss_weight(-gamma) * diffusion)
    bound = torch.cat([terms.logs[f"bits_per_dim/{kind}"] for kind in ("conditional", "null")])
    assert bound.nansum() > 2 * terms.loss.sum()
    # The shape minimises the mean square of the weighted loss
    inner = list(method.noise_schedule.parameters())
    actual = torch.autograd.grad(loss_of(method, batch).loss.mean(), inner)
    method.minimises_variance = False
    assert_close_gradients(actual, torch.autograd.grad(loss_of(method, batch).loss.square().mean(), inner))


def test_simple_weighting_is_the_loss_of_train_cfg():
    """
    With ε-prediction, the two losses integrate the same error over λ: train_cfg.py draws λ from its density, and
    train_vdm.py weighs λ drawn from its learned shape. Here both are sums over a grid of times, for λ in -5 … 13.3.
    """
    x, noise, count = make_batch().x[:1], torch.randn(1, 1, 8, 8, generator=generators(0)[0]), 1000
    network, grid = Network(lambda z: z.tanh() + 0.2), (torch.arange(count) + 0.5) / count
    labels = torch.zeros(count, dtype=torch.int64)

    cfg = ClassifierFreeGuidance(CFGConfig(prediction_type="epsilon"), CFGPipeline(make_unet(), LogSNRScheduler()))
    clean, noisy = cfg.scheduler.u_at(torch.tensor([13.3, -5.0], dtype=torch.float64)).tolist()
    u = clean + (noisy - clean) * grid
    batch = x.expand(count, 1, 8, 8), labels, u, noise.expand(count, 1, 8, 8)
    expected = (noisy - clean) * cfg.denoising_error(network, *batch).mean() * 64  # a sum over the pixels

    method = make_method("--prediction_type", "epsilon", "--loss_weighting", "simple")
    terms = loss_of(method, Batch(batch[0], labels, GivenDraws(grid, noise), 0), network)
    assert terms.loss.mean().item() == pytest.approx(BITS * expected.item(), rel=1e-4)


def test_optimizer_has_a_group_for_the_noise_schedule():
    """Weight decay would move the ends towards 0."""
    flags = ["--learning_rate", "3e-4", "--schedule_learning_rate", "2e-3"]
    method = make_method(*flags, "--adam_weight_decay", "0.02")
    optimizer = method.optimizer(method.objectives[0])
    assert isinstance(optimizer, torch.optim.AdamW)
    network, schedule = optimizer.param_groups
    assert (network["lr"], network["weight_decay"], network["betas"]) == (3e-4, 0.02, (0.9, 0.99))
    assert (schedule["lr"], schedule["weight_decay"], schedule["betas"]) == (2e-3, 0.0, (0.9, 0.99))
    assert [id(p) for p in network["params"]] == [id(p) for p in method.pipeline.unet.parameters()]
    assert [id(p) for p in schedule["params"]] == [id(p) for p in method.noise_schedule.parameters()]
    (only,) = (fixed := make_method("--noise_schedule", "fixed")).optimizer(fixed.objectives[0]).param_groups
    assert len(only["params"]) == len(list(fixed.pipeline.unet.parameters()))


def test_three_parts_are_logged_for_both_kinds_of_labels():
    method, batch = make_method("--conditioning_dropout_prob", "0.4"), make_batch()
    batch.class_labels[0] = -1  # unlabelled: the network is given the null class
    network = Network(lambda z: 0.3 * z)
    terms = loss_of(method, batch, network)
    c = network.calls[0][2]
    is_null = (c == 10) | (c == -1)
    assert 1 < is_null.sum() < BATCH_SIZE
    assert is_null[0]
    assert torch.equal(terms.logs["dropout_rate"].bool(), is_null)
    for kind, rows in (("conditional", ~is_null), ("null", is_null)):
        parts = [terms.logs[f"{part}/{kind}"] for part in ("prior", "reconstruction", "diffusion", "bits_per_dim")]
        assert all(torch.equal(~part.isnan(), rows) for part in parts)
        torch.testing.assert_close(sum(part[rows] for part in parts[:3]), parts[3][rows])
        torch.testing.assert_close(parts[3][rows], terms.loss[rows])
    for name in ("gamma_0", "gamma_1"):
        assert torch.equal(terms.logs[name], getattr(method.noise_schedule, name).detach().expand(BATCH_SIZE))
    assert not any(value.requires_grad for value in terms.logs.values())


def test_diffusion_term_is_logged_by_noise_level():
    """The levels are those of the first ends. Times beyond them belong to the first and to the last level."""
    method, batch = make_method("--noise_schedule", "linear"), make_batch()
    with torch.no_grad():
        method.noise_schedule.gamma_0.fill_(-14.5)
        method.noise_schedule.gamma_1.fill_(7.0)
    terms = loss_of(method, batch)
    names = [name for name in terms.logs if name.startswith("loss/log_snr_")]
    assert names[0] == "loss/log_snr_11.0_to_13.3"
    assert names[-1] == "loss/log_snr_-5.0_to_-2.7"
    values = torch.stack([terms.logs[name] for name in names], 1)
    assert ((~values.isnan()).sum(1) == 1).all()
    log_snr = 14.5 - 21.5 * batch.draws.antithetic("time")
    for row, level in enumerate(values.isnan().logical_not().int().argmax(1).tolist()):
        low, high = 13.3 - 18.3 * (level + 1) / 8, 13.3 - 18.3 * level / 8
        assert low <= log_snr[row] or level == 7
        assert log_snr[row] <= high or level == 0
    assert log_snr.max() > 13.3
    assert log_snr.min() < -5


def test_pipeline_has_the_current_ends():
    """Each preview samples with the ends of its step, and the range of solvers in σ/α does not keep those of others."""
    method = make_method("--noise_schedule", "linear", "--log_snr_max", "8", "--log_snr_min", "-3")
    identity, levels = method.identity(), method.levels
    configs = []
    for ends in ((-6.0, 2.5), (-12.0, 4.5)):
        with torch.no_grad():
            method.noise_schedule.gamma_0.fill_(ends[0])
            method.noise_schedule.gamma_1.fill_(ends[1])
        pipeline = method.sampling_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        config = pipeline.scheduler.config
        configs.append(config)
        assert (-config.log_snr_max, -config.log_snr_min) == ends
        assert (pipeline.unet.noise_process or {}).items() <= config.items()
        assert pipeline("three", num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 8)
    assert configs[1].sigma_min == 0.01
    assert configs[1].sigma_max == pytest.approx(math.exp(4.5 / 2))
    assert configs[1].variance_interpolation == 0
    assert pipeline.num_inference_steps == 100
    # What a resumed run must share with its checkpoint is the process at the start
    assert (method.identity(), method.levels) == (identity, levels)
    assert identity["log_snr_max"] == 8


def test_facts_name_the_settings_of_the_bound():
    facts = make_method("--diffusion_steps", "10").facts()
    assert facts["prediction_type"] == "v_prediction"
    assert (facts["noise_schedule"], facts["diffusion_steps"], facts["loss_weighting"]) == ("learned", 10, "bound")
