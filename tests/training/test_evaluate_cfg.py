"""Test the command evaluate_cfg.py on one and on two processes. The sweep itself is tested in tests/evaluation."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffusers_cfg.evaluation import features
from tests.support.commands import load_command
from tests.support.runs import TRAINING, launch

SCRIPT = TRAINING / "evaluate_cfg.py"


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): np.load(path)["arr_0"].tobytes() for path in folder.rglob("shard-*.npz")}


def test_command_prints_the_table(trained_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    flags = ["--num_samples", "20", "--num_inference_steps", "1", "--guidance_scales", "1"]
    folders = ["--output_dir", str(tmp_path / "out"), "--statistics_dir", str(tmp_path)]
    load_command("evaluate_cfg").main(["--model", str(trained_model), *flags, *folders])
    output = capsys.readouterr().out
    assert f"{trained_model}, evaluated on scikit-learn's digits" in output
    assert (tmp_path / "out" / "metrics.md").read_text() in output
    assert output.endswith(f"sample grid are in {tmp_path / 'out'}.\n")


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
    launch(*command, "--output_dir", "out2", cwd=tmp_path, processes=2, script=SCRIPT)
    assert shards(tmp_path / "out1") == shards(tmp_path / "out2")
    one, two = (json.loads((tmp_path / f"out{n}" / "metrics.json").read_text()) for n in (1, 2))
    for a, b in zip([one["floor"], *one["results"]], [two["floor"], *two["results"]], strict=True):
        by_class = [row.pop("accuracy_by_class", {}) for row in (a, b)]
        assert by_class[0] == pytest.approx(by_class[1], rel=1e-6, abs=1e-6)
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
