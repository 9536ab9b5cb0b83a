"""Test runs that are started from the command line."""

import contextlib
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from diffusers_cfg.data import datasets
from diffusers_cfg.data.sources import Digits
from tests.support.runs import TINY, TRAINING, WEIGHTS, assert_same_tensors, launch, printed_code, scalars, train

pytestmark = pytest.mark.slow


def test_train_load_and_evaluate_from_the_command_line(tmp_path):
    result = launch(*TINY, "--output_dir", "out", cwd=tmp_path)
    script = printed_code(result.stdout)
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    assert Image.open(tmp_path / "zero.png").size == (8, 8)

    evaluated = subprocess.run(
        [sys.executable, str(TRAINING / "evaluate_cfg.py"), "--model", "out", "--num_samples", "20",
         "--num_inference_steps", "2", "--guidance_scales", "0", "1", "--statistics_dir", "statistics"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    record = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert [row["guidance_scale"] for row in record["results"]] == [0, 1]
    assert record["feature_extractor"]["accuracy"] > 0.95

    again = launch(*TINY, "--output_dir", "out", cwd=tmp_path, fails=True)
    assert again.returncode != 0
    assert "train_cfg.py: error: --output_dir out is not empty" in again.stderr


def run_in_terminal(command: list[str], cwd: Path, env: dict[str, str]) -> str:
    """Run a command in a pseudo-terminal of 120 columns, and return its output."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 120))
    printed = b""
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        with contextlib.suppress(OSError):  # EIO when the process has exited
            while chunk := os.read(controller, 4096):
                printed += chunk
        os.close(controller)
        assert process.wait() == 0, printed.decode()
    return printed.decode()


@pytest.mark.parametrize("terminal", [False, True])
def test_training_prints_no_messages_of_other_libraries(tmp_path, terminal):
    """Use a new home folder, like a user who runs the first command in the README."""
    command = [sys.executable, str(TRAINING / "train_cfg.py"), "--max_train_steps", "60", "--validation_steps", "30"]
    command += ["--lr_warmup_steps", "10"]
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    if terminal:
        printed = run_in_terminal(command, tmp_path, env)
    else:
        with subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
    lines = [line for line in re.split(r"[\r\n]+|\x1b\[A", printed) if line.strip()]
    known = r"INFO |Decoding: |Training: |Sampling: |Saved the pipeline |from diffusers import |pipe|Try |python "
    assert [line for line in lines if not re.match(known, line)] == []
    assert [line for line in lines if "INFO " in line[1:]] == []  # above the progress bar and not inside it
    assert any(line.startswith("Training: 100%") for line in lines) == terminal
    assert any(line.startswith("INFO step 60 of 60") for line in lines) != terminal
    # Importing matplotlib would build a font cache, and print a message on slow machines.
    assert list(tmp_path.rglob("matplotlib")) == []


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Save 60 images in class folders, 7.5 steps per epoch, and return the folder."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(60):
        path = folder / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(Digits().images[index]).save(path)
    return folder


def test_resume_on_two_processes_is_bit_exact(tmp_path, photos, monkeypatch, caplog):
    """The run has workers and resumes within an epoch. A run on one process is the same up to rounding."""
    (tmp_path / "lazily.py").write_text(  # Otherwise small datasets are decoded into memory, without workers.
        "import runpy\nfrom diffusers_cfg.data import datasets\ndatasets.MAX_CACHED_BYTES = 0\n"
        f"runpy.run_path({str(TRAINING / 'train_cfg.py')!r}, run_name='__main__')\n"
    )
    flags = [
        "--train_data_dir", str(photos), "--resolution", "8", "--train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2", "--checkpointing_steps", "10",
        "--max_train_steps", "30", "--random_flip", "--report_to", "tensorboard",
        "--resume_from_checkpoint", "latest", "--optimizer", "adamw",
    ]  # fmt: skip

    def run(name: str) -> str:
        argv = [*TINY, *flags, "--output_dir", name]
        return launch(*argv, cwd=tmp_path, processes=2, script=tmp_path / "lazily.py").stderr

    run("whole")
    for name in ("resumed", "alone"):
        shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / name / "checkpoint-10")
    assert "Resumed from resumed/checkpoint-10" in run("resumed")
    for file in [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]:
        if "checkpoint-10" not in file.parts:
            assert_same_tensors(tmp_path / "whole" / file, tmp_path / "resumed" / file)
    losses = [dict(scalars(tmp_path / name)["loss"]) for name in ("whole", "resumed")]
    assert losses[1] == {step: loss for step, loss in losses[0].items() if step > 10}

    monkeypatch.setattr(datasets, "MAX_CACHED_BYTES", 0)
    train(tmp_path / "alone", *flags)
    assert "Using --gradient_accumulation_steps 4 instead of 2, so that a step still has 8 images" in caplog.text
    assert "Resuming with 1 processes instead of 2. Data and noise are the same" in caplog.text
    first, second = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("whole", "alone"))
    # A bias of the keys cancels in the softmax. Its gradient is rounding noise, which Adam scales up to full steps.
    compared = [name for name in first if not name.endswith("to_k.bias")]
    assert max((first[name] - second[name]).abs().max().item() for name in compared) < 1e-5
    alone = dict(scalars(tmp_path / "alone")["loss"])
    assert all(abs(alone[step] - loss) < 1e-5 for step, loss in losses[1].items())


def launch_machines(name: str, *scripts: list[str], cwd: Path) -> list[tuple[int, str]]:
    """
    Run two processes with one of the included launch configurations, and return the exit code and stderr of each
    machine. All machines are simulated on this one.

    Args:
        name (`str`): the file name of the launch configuration.
        scripts (`list[str]`): the flags of `train_cfg.py` on each machine.
        cwd (`Path`): the working directory.
    """
    flags = ["--config_file", str(TRAINING / "configs" / "accelerate" / name), "--num_processes", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        flags += ["--main_process_port", str(free.getsockname()[1]), "--main_process_ip", "127.0.0.1"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *flags, "--machine_rank", str(rank),
             str(TRAINING / "train_cfg.py"), *TINY, "--train_batch_size", "4", *script],
            cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank, script in enumerate(scripts)
    ]  # fmt: skip
    errors = [run.communicate(timeout=600)[1] for run in runs]
    return [(run.returncode, stderr) for run, stderr in zip(runs, errors, strict=True)]


@pytest.mark.parametrize(("name", "machines"), [("ddp.yaml", 1), ("ddp_two_machines.yaml", 2)])
def test_included_launch_configurations(tmp_path, name, machines):
    adamw = ["--optimizer", "adamw"]  # Muon would amplify the rounding of sums.
    results = launch_machines(name, *[["--output_dir", "two", *adamw]] * machines, cwd=tmp_path)
    assert [code for code, _ in results] == [0] * machines, results
    assert "4 steps of 8 images (0.0 epochs) on 2 × cpu" in results[0][1]
    train(tmp_path / "one", *adamw)
    assert_same_tensors(tmp_path / "one" / "unet" / WEIGHTS, tmp_path / "two" / "unet" / WEIGHTS, rtol=1e-4, atol=1e-6)


def test_machines_without_a_shared_folder_raise(tmp_path):
    train(tmp_path / "here")
    flags = ["--max_train_steps", "6", "--resume_from_checkpoint", "latest", "--output_dir"]
    results = launch_machines("ddp_two_machines.yaml", [*flags, "here"], [*flags, "there"], cwd=tmp_path)
    for code, stderr in results:
        assert code != 0
        assert "would resume from different steps, [4, 0]. --output_dir" in stderr
    assert not (tmp_path / "there").exists()
