"""Test the command evaluate_likelihood.py on one and on two processes. The rest is tested in tests/evaluation."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_cfg.method_settings import CFGConfig
from tests.support.commands import load_command
from tests.support.models import vdm
from tests.support.runs import TRAINING, launch, reset_accelerate

SCRIPT = TRAINING / "evaluate_likelihood.py"


@pytest.fixture
def model(tmp_path) -> Path:
    """Return the folder of a model with 90 held-out digits."""
    vdm(conditioning_dropout_prob=0.1).save_pretrained(tmp_path / "model")
    CFGConfig(train_val_split=0.05).save(tmp_path / "model" / "train_config.yaml")
    return tmp_path / "model"


def test_command_prints_the_table(model, capsys):
    reset_accelerate()
    flags = ["--num_images", "4", "--times_per_image", "2"]
    load_command("evaluate_likelihood").main(["--model", str(model), *flags])
    output = capsys.readouterr().out
    assert f"{model}, evaluated on scikit-learn's digits" in output
    assert (model / "evaluation" / "likelihood.md").read_text() in output
    assert output.endswith(f"the figures are in {model / 'evaluation'}.\n")


@pytest.mark.slow
def test_two_processes_match_a_killed_and_resumed_run(model, tmp_path):
    """Use the default shards: 90 images in three shards for each number of steps."""
    command = ["--model", str(model), "--times_per_image", "8", "--diffusion_steps", "10", "0"]
    one = [sys.executable, str(SCRIPT), *command, "--output_dir", "out1"]
    with subprocess.Popen(one, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        first = tmp_path / "out1" / "likelihood" / "T=10" / "shard-00000.npz"
        while process.poll() is None and not first.is_file():
            time.sleep(0.02)
        process.kill()
    computed = first.stat().st_mtime_ns
    result = subprocess.run(one, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert first.stat().st_mtime_ns == computed
    assert "Evaluating" in result.stderr

    launch(*command, "--output_dir", "out2", cwd=tmp_path, processes=2, script=SCRIPT)
    shards = [sorted(path.name for path in (tmp_path / out).rglob("shard-*")) for out in ("out1", "out2")]
    assert len(shards[0]) == 6
    assert shards[0] == shards[1]
    one, two = (json.loads((tmp_path / f"out{n}" / "likelihood.json").read_text())["results"] for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.pop("diffusion_steps") == b.pop("diffusion_steps")
        assert a.pop("network_evaluations") == b.pop("network_evaluations") == 90 * 8 * 2
        for bound in ("conditional", "null", "labels"):
            assert a[bound] == pytest.approx(b[bound], rel=1e-5)
