"""Test the measurement beside busy processes."""

import json

import psutil
import pytest
import torch

from diffusers_cfg.evaluation import busy
from tests.support.models import make_pipeline
from tests.support.runs import reset_accelerate


def test_processes_are_busy_until_the_end_of_the_block():
    before = set(psutil.Process().children())
    with busy.busy_processes(2):
        started = set(psutil.Process().children()) - before
        assert len(started) == 2
    assert not any(process.is_running() for process in started)


def test_sides_alternate_and_rates_are_fractions_of_torch_alone(monkeypatch):
    rates = {("default", 0): 98.0, ("default", 3): 30.0, ("torch", 0): 100.0, ("torch", 3): 10.0}
    running, calls = [], []

    class Running:
        def __init__(self, number: int) -> None:
            running.append(number)

        __enter__ = __exit__ = lambda *_: None

    def run_rates(command, variables):
        side = next(name for name, value in busy.SIDES.items() if value == variables)
        calls.append((side, running[-1]))
        rate = rates[calls[-1]]
        return {"threads": 1 if calls[-1] == ("default", 3) else 2, "training": rate, "sampling": rate / 2}

    monkeypatch.setattr(busy, "busy_processes", Running)
    monkeypatch.setattr(busy, "run_rates", run_rates)
    record = busy.compare_busy(["command.py"], 3, repeats=2)
    first = [("default", 0), ("torch", 0), ("default", 3), ("torch", 3)]
    assert calls == [*first, first[1], first[0], first[3], first[2]]
    assert [(row["measured"], row["side"]) for row in record["rows"]][:2] == [
        ("training", "default"),
        ("training", "torch"),
    ]
    assert [row["alone_fraction"] for row in record["rows"]] == [0.98, 1.0] * 2
    assert [row["beside_fraction"] for row in record["rows"]] == [0.3, 0.1] * 2
    assert "| sampling | the package's | 2 / 1 | 49 / 15 | 0.98 / 0.30 |" in busy.report({**record, "versions": {}})


def test_each_side_replaces_the_variables_of_threads(tmp_path, monkeypatch):
    script = tmp_path / "command.py"
    script.write_text("import json, os\nprint('a progress bar')\nprint(json.dumps(dict(os.environ)))\n")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("OTHER", "kept")
    printed = busy.run_rates([str(script)], {"GOMP_SPINCOUNT": "7"})
    assert {name: printed[name] for name in busy.THREAD_VARIABLES & printed.keys()} == {"GOMP_SPINCOUNT": "7"}
    assert printed["OTHER"] == "kept"


def test_command_that_fails_raises(tmp_path):
    (tmp_path / "command.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match=r"command\.py failed with exit code 3"):
        busy.run_rates([str(tmp_path / "command.py")], {})


def test_rates_count_the_images_of_all_processes(capsys, monkeypatch):
    reset_accelerate()

    class TwoProcesses:
        num_processes, is_main_process = 2, True

    calls = iter([9.0, 4.0])  # the first call warms up
    busy.print_rates({"training": lambda: next(calls)}, {"training": 64}, TwoProcesses())  # pyright: ignore
    assert json.loads(capsys.readouterr().out) == {"threads": torch.get_num_threads(), "training": 32.0}


def test_sampling_returns_the_seconds_of_a_batch(monkeypatch):
    pipeline, sizes = make_pipeline(), []
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, labels, *args, **kwargs: sizes.append(len(labels)))
    assert 0 < busy.sampling(pipeline, 5, 2)() < 60
    assert sizes == [5] * busy.CALLS
