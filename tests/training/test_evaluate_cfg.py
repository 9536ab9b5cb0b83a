"""Test the command evaluate_cfg.py on one and on two processes. The sweep itself is tested in tests/evaluation."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_cfg.config import UserError
from diffusers_cfg.engine.tracking import Trackers
from diffusers_cfg.evaluation import features
from tests.support.commands import load_command
from tests.support.runs import TRAINING, launch, reset_accelerate

SCRIPT = TRAINING / "evaluate_cfg.py"


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): np.load(path)["arr_0"].tobytes() for path in folder.rglob("shard-*.npz")}


def evaluate(model: Path, folder: Path, *argv: str) -> None:
    """Run the command with few samples of one step."""
    reset_accelerate()
    flags = ["--num_samples", "20", "--num_inference_steps", "1", "--guidance_scales", "1", "0"]
    folders = ["--output_dir", str(folder / "out"), "--statistics_dir", str(folder / "statistics")]
    load_command("evaluate_cfg").main(["--model", str(model), *flags, *folders, *argv])


def logged(folder: Path) -> EventAccumulator:
    """Return the TensorBoard events of an evaluation."""
    return EventAccumulator(str(folder / "logs" / "diffusers-cfg")).Reload()


@pytest.fixture
def quick_classifier(monkeypatch) -> None:
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))


@pytest.mark.usefixtures("quick_classifier")
def test_trackers_get_curves_the_table_and_pictures(trained_model, tmp_path, capsys):
    evaluate(trained_model, tmp_path, "--report_to", "tensorboard")
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = logged(tmp_path / "out")
    for metric in ("frechet_distance", "class_accuracy", "network_evaluations"):
        curve = [(event.step, event.value) for event in found.Scalars(f"evaluation/{metric}")]
        expected = [(100 * row["guidance_scale"], row[metric]) for row in reversed(record["results"])]
        assert curve == [(step, pytest.approx(value)) for step, value in expected], metric
    assert set(found.Tags()["images"]) == {"evaluation/curves", "evaluation/grid"}
    (table,) = found.Tensors("evaluation/table/text_summary")
    assert table.tensor_proto.string_val == [(tmp_path / "out" / "metrics.md").read_bytes()]

    # An evaluation without trackers adds nothing, and its folder is accepted again.
    before = sorted((tmp_path / "out" / "logs").rglob("*"))
    evaluate(trained_model, tmp_path)
    assert sorted((tmp_path / "out" / "logs").rglob("*")) == before
    assert "evaluated on scikit-learn's digits" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_classifier")
def test_failing_tracker_does_not_end_the_evaluation(trained_model, tmp_path, capsys, caplog, monkeypatch):
    def disconnected(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", disconnected)
    evaluate(trained_model, tmp_path, "--report_to", "tensorboard")
    assert caplog.text.count("tensorboard failed and gets no more values of this run: no network") == 1
    assert f"pictures are in {tmp_path / 'out'}.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "--report_to tensorbord: 'tensorbord' is not a tracker. Use all, .*tensorboard, .* or none"),
        ("tensorboard,wandb", "--report_to wandb is not installed. Install it with `pip install wandb`, or pass"),
    ],
)
def test_unknown_or_missing_tracker_raises_before_work(trained_model, tmp_path, report_to, message):
    with pytest.raises(UserError, match=message):
        evaluate(trained_model, tmp_path, "--report_to", report_to)
    assert list(tmp_path.iterdir()) == []


def test_tracker_starts_after_the_checks_and_before_the_first_image(trained_model, tmp_path, monkeypatch):
    def unavailable(*_):
        raise UserError("cannot be started")

    monkeypatch.setattr(Trackers, "start", unavailable)
    with pytest.raises(UserError, match="--scheduler NoScheduler is not supported"):
        evaluate(trained_model, tmp_path, "--report_to", "tensorboard", "--scheduler", "NoScheduler")
    with pytest.raises(UserError, match="cannot be started"):
        evaluate(trained_model, tmp_path, "--report_to", "tensorboard")
    assert not list(tmp_path.rglob("shard-*"))


@pytest.mark.usefixtures("quick_classifier")
def test_command_prints_the_table(trained_model, tmp_path, capsys):
    evaluate(trained_model, tmp_path)
    output = capsys.readouterr().out
    assert f"{trained_model}, evaluated on scikit-learn's digits" in output
    assert (tmp_path / "out" / "metrics.md").read_text() in output
    assert output.endswith(f"pictures are in {tmp_path / 'out'}.\n")


@pytest.mark.slow
def test_two_processes_match_a_killed_and_resumed_run(trained_model, tmp_path):
    """Use the default shards and classifier: 1,100 images in three shards."""
    command = ["--model", str(trained_model), "--num_samples", "1100", "--num_inference_steps", "2"]
    command += ["--guidance_scales", "0", "2", "--statistics_dir", "statistics"]
    one = [sys.executable, str(SCRIPT), *command, "--output_dir", "out1"]
    with subprocess.Popen(one, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        first = tmp_path / "out1" / "samples" / "w=0" / "shard-00000.npz"
        while process.poll() is None and not first.is_file():
            time.sleep(0.02)
        process.kill()
    drawn = first.stat().st_mtime_ns
    result = subprocess.run(one, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert first.stat().st_mtime_ns == drawn
    assert len(shards(tmp_path / "out1")) == 6
    assert "Sampling" in result.stderr

    # The second run reuses the classifier, but computes the statistics of the real images again.
    for file in (tmp_path / "statistics").glob("statistics-*"):
        file.unlink()
    launch(*command, "--output_dir", "out2", "--report_to", "tensorboard", cwd=tmp_path, processes=2, script=SCRIPT)
    # Only the main process reports, and each point once.
    assert len(list((tmp_path / "out2" / "logs" / "diffusers-cfg").glob("events.*"))) == 1
    assert [event.step for event in logged(tmp_path / "out2").Scalars("evaluation/w")] == [0, 200]
    assert shards(tmp_path / "out1") == shards(tmp_path / "out2")
    one, two = (json.loads((tmp_path / f"out{n}" / "metrics.json").read_text()) for n in (1, 2))
    for a, b in zip([one["floor"], *one["results"]], [two["floor"], *two["results"]], strict=True):
        nested = [
            [row.pop("accuracy_by_class", {}), *row.pop("by_class").values(), row.pop("close_to_training_interval", [])]
            for row in (a, b)
        ]
        for x, y in zip([a, *nested[0]], [b, *nested[1]], strict=True):
            assert x == pytest.approx(y, rel=1e-6, abs=1e-6)
