"""Test that random numbers depend only on the seed and on their purpose."""

import pytest
import torch

from diffusers_cfg.randomness import Draws, seed_of, seeded_generator

ROWS = 1000


def draws(seed: int = 0, step: int = 3, rows: range = range(ROWS), batch_size: int = ROWS) -> Draws:
    return Draws(seed, step, rows, batch_size)


def draw_all(source: Draws, purpose: str = "noise") -> list[torch.Tensor]:
    """Return draws of every kind for a purpose."""
    by_row = torch.stack([torch.randn(3, generator=generator) for generator in source.generators(purpose)])
    return [source.normal(purpose, 1, 2, 2), source.uniform(purpose), source.antithetic(purpose), by_row]


def test_draws_depend_only_on_seed_step_and_purpose():
    first, again = draw_all(draws()), draw_all(draws())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # Draws for other purposes in between have no effect.
    source = draws()
    draw_all(source, "other")
    assert all(torch.equal(a, b) for a, b in zip(first, draw_all(source), strict=True))
    for other in (draw_all(draws(seed=1)), draw_all(draws(step=4)), draw_all(draws(), "dropout")):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rows", [range(0, 10), range(10, 20), range(990, ROWS), range(5, 5)])
def test_draws_do_not_depend_on_the_division_of_the_global_batch(rows):
    whole = draw_all(draws())
    if len(rows) == 0:
        assert draws(rows=rows).normal("noise", 1, 2, 2).shape == (0, 1, 2, 2)
        return
    for all_rows, own in zip(whole, draw_all(draws(rows=rows)), strict=True):
        assert torch.equal(own, all_rows[rows.start : rows.stop])


def test_draws_have_the_documented_shapes_and_dtype():
    source = draws(rows=range(2, 5), batch_size=8)
    assert source.normal("x", 1, 2, 2).shape == (3, 1, 2, 2)
    assert source.uniform("x").shape == source.antithetic("x").shape == (3,)
    assert source.uniform("x", 4).shape == (3, 4)
    for numbers in (source.normal("x"), source.uniform("x"), source.antithetic("x")):
        assert numbers.dtype == torch.float32


def test_draws_have_the_documented_distributions():
    source = draws()
    noise, uniform, antithetic = source.normal("noise", 1, 2, 2), source.uniform("u"), source.antithetic("t")
    assert noise.mean().item() == pytest.approx(0, abs=0.06)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    for numbers in (uniform, antithetic):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert numbers.mean().item() == pytest.approx(0.5, abs=0.05)
        assert numbers.std().item() == pytest.approx(12**-0.5, abs=0.03)
    assert (uniform < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.05)


def test_draws_for_different_purposes_are_independent():
    source = draws()
    pair = torch.stack([source.uniform("u"), source.uniform("dropout")])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.15


def test_antithetic_draws_are_evenly_spaced():
    """Each step has one value in each interval of length 1/k, with a different offset."""
    first_rows = []
    for step in range(20):
        numbers = draws(step=step, rows=range(50), batch_size=50).antithetic("t")
        gaps = numbers.sort().values.diff()
        torch.testing.assert_close(gaps, torch.full((49,), 1 / 50), rtol=0, atol=1e-6)
        first_rows.append(numbers[0].item())
    assert len(set(first_rows)) == 20


def test_row_generators_do_not_depend_on_the_batch_size():
    first = draws(rows=range(2), batch_size=2).generators("posterior")
    second = draws(rows=range(1, 3), batch_size=8).generators("posterior")
    assert first[1].initial_seed() == second[0].initial_seed()
    assert len({generator.initial_seed() for generator in [*first, second[1]]}) == 3


def test_generators_of_different_keys_differ():
    first = [torch.rand(1, generator=seeded_generator("cpu", *key)).item() for key in ((0, "a"), (0, "b"), (1, "a"))]
    assert len(set(first)) == 3


def test_seeds_are_the_same_in_every_process():
    """`hash` differs between processes. Changing these seeds would change every resumed run."""
    assert [seed_of(0, "order", 0), seed_of(1, "order", 0)] == [4819849257279361181, 969933350306031620]
    assert all(0 <= seed_of(number) < 2**63 for number in range(1000))
