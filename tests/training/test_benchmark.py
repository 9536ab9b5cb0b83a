"""The benchmark measures both sides, of the same images."""

import json

import benchmark
import pytest
from benchmark import Turns, parse_args, take_turns
from test_train import TINY


def test_ratios_are_of_neighbours():
    turns = Turns(ours=[1.0, 30.0, 2.0], peer=[2.0, 40.0, 2.0])
    assert turns.summary() == {"ours": 2.0, "peer": 2.0, "ratio": 0.75}


def test_the_sides_take_turns():
    calls = []
    turns = take_turns(lambda: calls.append("ours") or 1.0, lambda: calls.append("peer") or 2.0, repeats=2)
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert (turns.ours, turns.peer) == ([1.0, 1.0], [2.0, 2.0])


@pytest.mark.slow
def test_a_small_benchmark(tmp_path, capsys):
    flags = ["--batch_sizes", "2", "--sampling_steps", "4", "--training_steps", "2", "--repeats", "1"]
    args, config = parse_args([*TINY, *flags])
    record = json.loads(json.dumps(benchmark.benchmark(args, config)))
    assert [(row["batch_size"], row["w"]) for row in record["sampling"]] == [(2, 0), (2, 1)]
    for row, evaluations in zip(record["sampling"], (4, 8), strict=True):
        for side in ("ours", "peer"):
            assert row[side]["evaluations"] == evaluations
            assert 0 < row[side]["outside_network"] < 1
            assert row["seconds"][side] > 0
    assert record["training"]["images_per_second"]["ours"] > 0
    assert 0 < record["training"]["peer_data_wait"] < 1
    assert "| 2 | 1 | " in capsys.readouterr().out


@pytest.mark.slow
def test_sides_that_draw_other_images_are_not_compared(monkeypatch):
    works = benchmark.hand_written_loop
    monkeypatch.setattr(benchmark, "hand_written_loop", lambda *args: works(*args) * 0.9)
    args, config = parse_args([*TINY, "--batch_sizes", "2", "--sampling_steps", "4"])
    with pytest.raises(AssertionError, match="draw other images"):
        benchmark.benchmark(args, config)
