"""The benchmark measures both sides, of the same images."""

import json

import pytest

from diffusers_cfg.evaluation.timing import FreshProcess
from tests.support.runs import TINY, reset_accelerate
from training.studies import benchmark


@pytest.fixture
def argv(tmp_path) -> list[str]:
    reset_accelerate()
    flags = ["--batch_sizes", "2", "--sampling_steps", "4", "--training_steps", "2", "--repeats", "1"]
    return [*TINY, *flags, "--output", str(tmp_path / "record.json")]


def test_a_small_benchmark(argv, tmp_path, monkeypatch, capsys):
    codes = []

    def run_python(*code: str) -> FreshProcess:
        codes.append(code)
        return FreshProcess(2.0, 1000) if "import diffusers_cfg" in code[-1] else FreshProcess(1.5, 900)

    monkeypatch.setattr(benchmark, "run_python", run_python)
    benchmark.main(argv)
    record = json.loads((tmp_path / "record.json").read_text())
    rows = record["sampling"]
    assert [(row["batch_size"], row["w"], row["distilled"]) for row in rows] == [(2, 0, 0), (2, 1, 0), (2, 1, 1)]
    assert [row["ours"]["evaluations"] for row in rows] == [4, 8, 4]
    assert [row["peer"]["evaluations"] for row in rows] == [4, 8, 8]
    for row in [*rows, {"seconds": record["training"]["images_per_second"]}]:
        assert min(row["seconds"].values()) > 0
    assert codes[-1] == (benchmark.TRAIN_COMMAND, "--help")
    assert "| 2 | 1, distilled | " in capsys.readouterr().out


@pytest.mark.slow
def test_starting():
    args, _ = benchmark.parse_args(["--repeats", "1"])
    starting = benchmark.compare_starting(args)
    assert 0 < starting["help"] < starting["import"]["peer"]
    assert starting["import"]["ours"] > 0


def test_sides_that_draw_other_images_are_not_compared(argv, monkeypatch):
    works = benchmark.hand_written_loop
    monkeypatch.setattr(benchmark, "hand_written_loop", lambda *args: works(*args) * 0.9)
    with pytest.raises(AssertionError, match="draw other images"):
        benchmark.main(argv)
