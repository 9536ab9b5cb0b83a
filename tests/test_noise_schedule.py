"""Test the noise schedules: their ends, their closed-form slopes, and what the learned one learns."""

import math

import pytest
import torch

from diffusers_cfg.noise_schedule import MAX_GAMMA, MAX_GAMMA_0, MIN_GAMMA, SHAPES, NoiseSchedule, Schedule
from diffusers_cfg.variational_bound import continuous_weight, minimise_variance
from tests.support.pixels import F64, Pixel

TIMES = torch.linspace(0, 1, 201, dtype=F64)
ENDS = (-13.3, 5.0)


def learned(**settings) -> NoiseSchedule:
    """Return a learned schedule in float64 with random weights of both signs."""
    schedule = NoiseSchedule(*ENDS, **{"hidden_size": 64, **settings}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("w2", "b2", "w3"):
            weight = getattr(schedule, name)
            weight += 5 * torch.randn(weight.shape, generator=generator, dtype=F64)
        schedule.w1.fill_(-0.7)
        schedule.w2[::2] *= -1
    return schedule


def schedules() -> dict[str, Schedule]:
    """Return all schedules by name."""
    fixed = {name: make(*ENDS) for name, make in SHAPES.items()}
    return {**fixed, "initial": NoiseSchedule(*ENDS).double(), "learned": learned()}


@pytest.mark.parametrize("name", schedules())
def test_schedule_rises_from_one_end_to_the_other(name):
    shape = schedules()[name](TIMES)
    torch.testing.assert_close(shape.n[[0, -1]], torch.tensor([0.0, 1.0], dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(shape.gamma[[0, -1]], torch.tensor(ENDS, dtype=F64), rtol=0, atol=1e-6)
    assert (shape.n.diff() > 0).all()
    assert (shape.slope > 0).all()
    assert (shape.gamma_0.item(), shape.gamma_1.item()) == pytest.approx(ENDS)


@pytest.mark.parametrize("name", schedules())
def test_slope_is_the_derivative(name):
    """Compare the closed form with central differences, and with autograd."""
    schedule, h = schedules()[name], 1e-6
    times = TIMES[1:-1].clone().requires_grad_()
    shape = schedule(times)
    differences = (schedule(times + h).gamma - schedule(times - h).gamma) / (2 * h)
    torch.testing.assert_close(shape.gamma_slope, differences, rtol=1e-5, atol=1e-7)
    (slope,) = torch.autograd.grad(shape.gamma.sum(), times)
    torch.testing.assert_close(shape.gamma_slope, slope, rtol=1e-9, atol=1e-9)


def test_fixed_shapes_are_parts_of_those_of_their_papers():
    """α = cos(at + b), and -log α² = 0.1 s + 9.95 s² with s = at + b. The ends determine a and b."""
    alpha_square = {name: (-make(*ENDS)(TIMES).gamma).sigmoid() for name, make in SHAPES.items()}
    integral = -alpha_square["β-linear"].log()
    for linear_in_t in (
        SHAPES["linear"](*ENDS)(TIMES).gamma,
        alpha_square["cosine"].sqrt().acos(),
        torch.sqrt(0.1**2 + 4 * 9.95 * integral) - 0.1,
    ):
        steps = linear_in_t.diff()
        torch.testing.assert_close(steps, steps.mean().expand(200), rtol=1e-6, atol=0)


def test_learned_schedule_starts_close_to_a_line():
    """The sigmoids are spread over [0, 1], so that all parts of the shape can change."""
    shape = NoiseSchedule()(TIMES.float())
    assert (shape.n - TIMES).abs().max() < 0.0013
    assert 0.95 < shape.slope.min() < shape.slope.max() < 1.01


def test_float32_and_shapes_of_times():
    """The training step passes `(batch,)`, or `(2, batch)` in discrete time."""
    times = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    for name, schedule in schedules().items():
        exact = schedule(times.double())
        if isinstance(schedule, NoiseSchedule):
            schedule.float()
        rough = schedule(times)
        assert rough.gamma.shape == rough.gamma_slope.shape == (2, 5)
        assert rough.gamma.dtype == torch.float32, name
        torch.testing.assert_close(rough.gamma.double(), exact.gamma, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rough.gamma_slope.double(), exact.gamma_slope, rtol=1e-4, atol=1e-4)


def test_float32_under_autocast():
    schedule = learned().float()
    times = torch.rand(64, generator=torch.Generator().manual_seed(0))
    expected = schedule(times)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shape = schedule(times)
    assert torch.equal(shape.gamma, expected.gamma)
    assert torch.equal(shape.slope, expected.slope)


@pytest.mark.parametrize(
    ("learn_ends", "learn_shape", "parameters", "buffers"),
    [
        (True, True, {"gamma_0", "gamma_1", "w1", "w2", "b2", "w3"}, set()),
        (True, False, {"gamma_0", "gamma_1"}, set()),
        (False, True, {"w1", "w2", "b2", "w3"}, {"gamma_0", "gamma_1"}),
        (False, False, set(), {"gamma_0", "gamma_1"}),
    ],
)
def test_only_what_is_learned_is_a_parameter(learn_ends, learn_shape, parameters, buffers):
    schedule = NoiseSchedule(learn_ends=learn_ends, learn_shape=learn_shape)
    assert {name for name, _ in schedule.named_parameters()} == parameters
    assert {name for name, _ in schedule.named_buffers()} == buffers
    assert schedule.state_dict().keys() == parameters | buffers


def test_ends_stay_in_range():
    """An optimizer step may leave the range; then α² would round to 1, or γ would not rise."""
    schedule = NoiseSchedule(-14.0, 5.0)
    with torch.no_grad():
        schedule.gamma_0.fill_(-16.0)
    assert schedule.ends() == (MIN_GAMMA, 5.0)
    with torch.no_grad():
        schedule.gamma_0.fill_(4.5)
    assert schedule.ends() == (4.5, 5.5)
    assert schedule(torch.tensor([0.0, 1.0])).gamma.tolist() == [4.5, 5.5]
    with torch.no_grad():
        schedule.gamma_0.fill_(-300.0)
        schedule.gamma_1.fill_(300.0)
    assert schedule.ends() == (MIN_GAMMA, MAX_GAMMA)
    with torch.no_grad():
        schedule.gamma_0.fill_(300.0)
    assert schedule.ends() == (MAX_GAMMA_0, MAX_GAMMA)
    assert isinstance(schedule.gamma_0, torch.nn.Parameter)


@pytest.mark.parametrize("ends", [(-15.1, 5.0), (5.0, -13.3), (1.0, 1.5), (0.0, math.nan), (11.0, 20.0), (0.0, 61.0)])
def test_invalid_ends_are_refused(ends):
    with pytest.raises(ValueError, match=r"gamma_0 must lie in \[-15, 10\] and gamma_1 in \[gamma_0 \+ 1, 60\]"):
        NoiseSchedule(*ends)


@pytest.mark.parametrize("gamma_0", [-0.3, -13.3, 0.1, 1 / 3])
def test_rounding_does_not_make_the_shortest_range_too_short(gamma_0):
    schedule = NoiseSchedule(gamma_0, gamma_0 + 1)
    with torch.no_grad():
        schedule.gamma_1.fill_(-60.0)
    assert NoiseSchedule(*schedule.ends()).ends() == schedule.ends()


@pytest.mark.parametrize("minimised", [True, False])
def test_shape_learns_to_minimise_the_variance(minimised):
    """
    Train the shape on the errors of an exact denoiser, tabulated over γ, with random signs and sizes around their root
    mean square. The least variance has γ' ∝ E‖ε - ε̂‖⁴^-½.
    """
    low, high, steps, batch_size = -9.0, 7.0, 300, 64
    table = torch.linspace(low, high, 801, dtype=F64)
    pixel = Pixel((0, 36, 73, 109, 146, 182, 219, 255))
    squares, fourths = pixel.moments(table)
    rms = fourths.sqrt().float()
    mean = torch.trapezoid(squares, table).item() / 2
    least = torch.trapezoid(fourths.sqrt(), table).item() ** 2 / 4 - mean**2

    def variance(schedule: Schedule) -> float:
        """Return the variance of γ'(t)/2 ‖ε - ε̂‖² for t ~ U[0, 1]."""
        with torch.no_grad():
            shape = schedule(torch.linspace(0, 1, 4001))
        moments = rms.double().square()[((shape.gamma - low) / (high - low) * 800).round().long().clamp(0, 800)]
        return ((shape.gamma_slope.double() / 2) ** 2 * moments).mean().item() - mean**2

    def error(gamma: torch.Tensor) -> torch.Tensor:
        """Return the root mean square of ‖ε - ε̂‖² at γ, interpolated."""
        position = (gamma - low) / (high - low) * 800
        before = position.detach().long().clamp(0, 799)
        return torch.lerp(rms[before], rms[before + 1], position - before)

    schedule = NoiseSchedule(low, high, learn_ends=False)
    linear = variance(schedule)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=1e-2, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        times = (torch.rand((), generator=generator) + torch.arange(batch_size) / batch_size) % 1
        shape = schedule(times)
        noise = torch.empty(batch_size).exponential_(generator=generator) / math.sqrt(2)  # its mean square is 1
        loss = continuous_weight(shape.gamma_slope) * error(shape.gamma) * noise
        if minimised:
            minimise_variance(loss, shape.n, shape.slope)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert linear > 2 * least
    if minimised:
        assert variance(schedule) < 1.5 * least  # 1.2 was measured
    else:
        assert variance(schedule) > 2 * least
