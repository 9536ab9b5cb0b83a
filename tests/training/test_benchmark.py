"""The benchmark measures both sides, of the same images."""

import json
from pathlib import Path

import ablate_samplers
import benchmark
import pytest
from benchmark import Stopwatch, Turns, parse_args, take_turns
from test_train import TINY


def test_ratios_are_of_neighbours():
    turns = Turns(ours=[1.0, 30.0, 2.0], peer=[2.0, 40.0, 2.0])
    assert turns.summary() == {"ours": 2.0, "peer": 2.0, "ratio": 0.75}


def test_the_sides_take_turns():
    calls = []
    turns = take_turns(lambda: calls.append("ours") or 1.0, lambda: calls.append("peer") or 2.0, repeats=2)
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert (turns.ours, turns.peer) == ([1.0, 1.0], [2.0, 2.0])


def test_a_stopwatch_counts_what_is_spent_in_a_method(monkeypatch):
    clock = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(benchmark, "now", lambda: next(clock))

    class Sleeper:
        def sleep(self, fails):
            if fails:
                raise RuntimeError

    original = Sleeper.sleep
    with Stopwatch(Sleeper, "sleep") as watch:
        Sleeper().sleep(False)
        with pytest.raises(RuntimeError):
            Sleeper().sleep(True)
    assert watch.seconds == 2.75
    assert Sleeper.sleep is original


def test_quality_is_measured_by_the_other_script(tmp_path, monkeypatch, capsys):
    def measure(args, argv):
        Path(args.output_dir).mkdir()
        (Path(args.output_dir) / "samplers.json").write_text('{"rows": [1]}')
        return f"{args.model} {args.guidance_interval} {argv}"

    monkeypatch.setattr(ablate_samplers, "ablate_samplers", measure)
    args, _ = parse_args([*TINY, "--model", str(tmp_path), "--guidance_interval", "0.2", "5"])
    assert benchmark.quality(args) == {"rows": [1]}
    assert f"[{str(tmp_path)!r}] [0.2, 5.0] []" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_benchmark(tmp_path, capsys):
    flags = ["--batch_sizes", "2", "--sampling_steps", "4", "--training_steps", "2", "--repeats", "1"]
    args, config = parse_args([*TINY, *flags])
    record = json.loads(json.dumps(benchmark.benchmark(args, config)))
    rows = record["sampling"]
    assert [(row["batch_size"], row["w"], row["distilled"]) for row in rows] == [(2, 0, 0), (2, 1, 0), (2, 1, 1)]
    assert [row["ours"]["evaluations"] for row in rows] == [4, 8, 4]
    assert [row["peer"]["evaluations"] for row in rows] == [4, 8, 8]
    for row in rows:
        for side in ("ours", "peer"):
            assert 0 < row[side]["outside_network"] < 1
            assert row["seconds"][side] > 0
    assert record["training"]["images_per_second"]["ours"] > 0
    for side in ("ours", "peer"):
        for part in ("data", "optimizer", "average"):
            assert 0 < record["training"][side][part] < 1
    assert 0 < record["starting"]["help"] < record["starting"]["import"]["peer"]
    assert record["starting"]["import"]["ours"] > 0
    assert "| 2 | 1, distilled | " in capsys.readouterr().out


@pytest.mark.slow
def test_sides_that_draw_other_images_are_not_compared(monkeypatch):
    works = benchmark.hand_written_loop
    monkeypatch.setattr(benchmark, "hand_written_loop", lambda *args: works(*args) * 0.9)
    args, config = parse_args([*TINY, "--batch_sizes", "2", "--sampling_steps", "4"])
    with pytest.raises(AssertionError, match="draw other images"):
        benchmark.benchmark(args, config)
