"""Test the benchmark of both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffusers_cfg.config import UserError
from diffusers_cfg.evaluation import benchmark, busy
from diffusers_cfg.evaluation.timing import FreshProcess
from tests.support.commands import load_command
from tests.support.runs import TINY, TRAINING, reset_accelerate

main = load_command("studies/benchmark").main
TRAIN_COMMAND = TRAINING / "train_cfg.py"


@pytest.fixture
def argv(tmp_path) -> list[str]:
    reset_accelerate()
    flags = ["--batch_sizes", "2", "--sampling_steps", "4", "--training_steps", "2", "--repeats", "1"]
    return [*TINY, *flags, "--output", str(tmp_path / "record.json")]


@pytest.mark.slow
def test_benchmark_end_to_end(argv, tmp_path, monkeypatch, capsys):
    codes = []

    def run_python(*code: str) -> FreshProcess:
        codes.append(code)
        return FreshProcess(2.0, 1000) if "import diffusers_cfg" in code[-1] else FreshProcess(1.5, 900)

    monkeypatch.setattr(benchmark, "run_python", run_python)
    main(argv)
    record = json.loads((tmp_path / "record.json").read_text())
    rows = record["sampling"]
    assert [(row["batch_size"], row["w"], row["distilled"]) for row in rows] == [(2, 0, 0), (2, 1, 0), (2, 1, 1)]
    assert [row["ours"]["evaluations"] for row in rows] == [4, 8, 4]
    assert [row["peer"]["evaluations"] for row in rows] == [4, 8, 8]
    for row in [*rows, {"seconds": record["training"]["images_per_second"]}]:
        assert min(row["seconds"].values()) > 0
    assert codes[-1] == (str(TRAIN_COMMAND), "--help")
    assert "| 2 | 1, distilled | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_sizes", "2", "0"], r"--batch_sizes must be at least 1, but is \[2, 0\]"),
        (["--sampling_steps", "0"], "--sampling_steps must be at least 1, but is 0"),
        (["--sampling_steps", "3"], "--sampling_steps must be a divisor of 1000, but is 3"),
        (["--training_steps", "-1"], "--training_steps must be at least 1, but is -1"),
        (["--busy", "0"], "--busy must be at least 1, but is 0"),
        (["--repeats", "0"], "--repeats must be at least 1, but is 0"),
        (["--rates"], "--output is for the other measurements: --rates prints its JSON"),
        (["--output", "/dev/null/x"], "The folder of --output /dev/null cannot be a folder"),
        (["--output", "/dev"], "--output /dev is a folder. Pass a file"),
        (["--output_dir", "x"], "--output_dir is not a flag of this command"),
        (["--push_to_hub", "--hub_token", "hf_secret"], "--push_to_hub is not a flag of this command"),
        (["--learning_rate", "nan"], "learning_rate must be"),
    ],
)
def test_invalid_flags_raise_before_the_first_measurement(argv, monkeypatch, flags, message):
    monkeypatch.setattr(benchmark, "compare_sampling", None)
    with pytest.raises(UserError, match=message):
        main([*argv, *flags])


def test_rates_are_printed_as_json(argv, capsys):
    main([*argv[: argv.index("--output")], "--rates"])
    rates = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rates.keys() == {"threads", "training", "sampling"}
    assert min(rates.values()) > 0


def test_busy_measures_this_command_in_new_processes(argv, tmp_path, monkeypatch, capsys):
    commands = []

    def compare_busy(command: list[str], num_busy: int, repeats: int) -> dict[str, Any]:
        commands.append(command)
        return {"cpus": 2, "busy": num_busy, "repeats": repeats, "rows": [], "runs": []}

    monkeypatch.setattr(busy, "compare_busy", compare_busy)
    main([*argv, "--busy", "3"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["busy"], record["repeats"]) == (3, 1)
    assert Path(commands[0][0]) == TRAINING / "studies" / "benchmark.py"
    # They measure what was asked for, and neither busy processes nor a file are started by them.
    expected = [*TINY, "--sampling_steps", "4", "--training_steps", "2", "--batch_sizes", "2", "--rates"]
    assert commands[0][1:] == expected
    assert "alone / beside 3 busy processes" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_starting():
    starting = benchmark.compare_starting(TRAIN_COMMAND, repeats=1)
    assert 0 < starting["help"] < starting["import"]["peer"]
    assert starting["import"]["ours"] > 0


def test_sides_that_generate_different_images_raise(argv, monkeypatch):
    works = benchmark.hand_written_loop
    monkeypatch.setattr(benchmark, "hand_written_loop", lambda *args: works(*args) * 0.9)
    with pytest.raises(AssertionError, match="generate different images"):
        main(argv)
