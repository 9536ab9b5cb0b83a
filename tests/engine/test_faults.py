"""Test that runs survive kills, signals, full disks, damaged files and non-finite losses."""

import errno
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from diffusers_cfg.config import UserError
from diffusers_cfg.data import datasets
from diffusers_cfg.engine import checkpoint, trainer
from diffusers_cfg.engine import preemption as preemption_module
from diffusers_cfg.engine.checkpoint import verify_checkpoint
from diffusers_cfg.engine.preemption import EXIT_RESUME, NotSaved, Preempted, Preemption
from diffusers_cfg.engine.processes import is_launcher
from diffusers_cfg.methods import cfg, guided
from diffusers_cfg.model_files import checkpoints
from tests.support.runs import ONE_LEVEL, ROOT, TINY, TRAINING, WEIGHTS, assert_same_tensors, scalars, start, train

EVERY_STEP = [*ONE_LEVEL, "--checkpointing_steps", "1", "--max_train_steps", "4"]


def names(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(output_dir)]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_latest_skips_damaged_checkpoints(tmp_path, caplog):
    train(tmp_path / "out", *EVERY_STEP)
    assert all(verify_checkpoint(path) is None for path in checkpoints(tmp_path / "out"))
    damage(tmp_path / "out" / "checkpoint-4" / "unet" / WEIGHTS)
    (tmp_path / "out" / "checkpoint-3" / "optimizer-unet.safetensors").unlink()
    train(tmp_path / "out", *EVERY_STEP, "--resume_from_checkpoint", "latest")
    assert f"checkpoint-4 is damaged (unet/{WEIGHTS} does not match its checksum). Trying the previous" in caplog.text
    assert "checkpoint-3 is damaged" in caplog.text
    assert "optimizer-unet.safetensors" in caplog.text
    train(tmp_path / "whole", *EVERY_STEP)
    assert_same_tensors(tmp_path / "out" / "unet" / WEIGHTS, tmp_path / "whole" / "unet" / WEIGHTS)


def test_resuming_a_damaged_checkpoint_by_name_raises(tmp_path):
    train(tmp_path, *EVERY_STEP)
    for path in checkpoints(tmp_path):
        damage(path / "state.json")
    with pytest.raises(UserError, match="checkpoint-2 is damaged .*state.json does not match its checksum"):
        train(tmp_path, *EVERY_STEP, "--resume_from_checkpoint", "checkpoint-2")
    with pytest.raises(UserError, match="All checkpoints in .* are damaged .*--overwrite_output_dir"):
        train(tmp_path, *EVERY_STEP, "--resume_from_checkpoint", "latest")


def test_partially_written_checkpoint_is_ignored(tmp_path):
    train(tmp_path, *EVERY_STEP)
    (tmp_path / "checkpoint-4").rename(tmp_path / "tmp-checkpoint-4")
    train(tmp_path, *EVERY_STEP, "--resume_from_checkpoint", "latest")
    assert names(tmp_path)[-1] == "checkpoint-4"
    assert not (tmp_path / "tmp-checkpoint-4").exists()


class CreateFile:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_never_loaded(tmp_path):
    train(tmp_path / "out", *EVERY_STEP)
    proof, folder = tmp_path / "proof", tmp_path / "out" / "checkpoint-3"
    malicious = pickle.dumps(CreateFile(proof))
    for name in ("optimizer.bin", "random_states_0.pkl", "unet/diffusion_pytorch_model.bin", "custom_checkpoint_0.pkl"):
        (folder / name).write_bytes(malicious)
        (folder.parent / Path(name).name).write_bytes(malicious)
    train(tmp_path / "out", *EVERY_STEP, "--resume_from_checkpoint", "checkpoint-3")
    assert not proof.exists()
    pickle.loads(malicious)
    assert proof.exists()


@pytest.mark.parametrize("function", ["save_file", "fsync"])
def test_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog, function):
    original = getattr(checkpoint, function)

    def full(*args, **kwargs):
        if "checkpoint-3" in str(args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, function, full)
    train(tmp_path / "out", *EVERY_STEP, "--checkpoints_total_limit", "1")
    assert "Failed to write the checkpoint of step 3: [Errno 28] No space left" in caplog.text
    assert "The last valid checkpoint is checkpoint-2" in caplog.text
    assert names(tmp_path / "out") == ["checkpoint-4"]
    assert list((tmp_path / "out").glob("tmp-*")) == []


def test_checkpoint_that_fails_verification_is_discarded(tmp_path, monkeypatch, caplog):
    original = checkpoint.write_checksums

    def write_and_damage(folder):
        original(folder)
        if folder.name == "tmp-checkpoint-4":
            damage(folder / "unet" / WEIGHTS)

    monkeypatch.setattr(checkpoint, "write_checksums", write_and_damage)
    train(tmp_path / "out", *EVERY_STEP, "--checkpoints_total_limit", "1")
    assert "verification failed: unet/" in caplog.text
    assert names(tmp_path / "out") == ["checkpoint-3"]


def test_file_size_limit_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    """Set a real limit of the operating system, unlike the test above."""
    original = trainer.Trainer.validate

    def unlimited(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        original(*args, **kwargs)

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(trainer.Trainer, "validate", unlimited)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        train(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "Failed to write the checkpoint of step 4" in caplog.text
    assert "The last valid checkpoint is none" in caplog.text
    assert (tmp_path / "out" / "unet" / WEIGHTS).is_file()
    assert names(tmp_path / "out") == []


def default_signals() -> None:
    """Do not ignore any signal that stops a run. A job in the background of a shell script ignores SIGINT."""
    for number in preemption_module.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def preemption() -> Preemption:
    default_signals()
    return Preemption().install()


def with_signal(original: Callable, when: int, number: int = signal.SIGTERM) -> Callable:
    """Return a function that calls `original`, and sends a signal to the process in call number `when`."""
    calls = []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return original(*args, **kwargs)

    return function


VALIDATED = [*ONE_LEVEL, "--validation_steps", "3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the output folder of a run with validation that no signal has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder, Preemption(), *VALIDATED)
    return folder


@pytest.mark.parametrize(
    ("module", "name", "when", "step", "number"),
    [
        (cfg, "squared_error", 3, 3, signal.SIGTERM),  # during the third step
        (trainer, "save_checkpoint", 1, 2, signal.SIGTERM),  # during a save
        (guided, "sample_grid", 1, 3, signal.SIGINT),  # during validation
        (guided, "sample_grid", 2, 4, signal.SIGTERM),  # during the last validation
    ],
)
def test_signal_saves_a_checkpoint(tmp_path, whole, monkeypatch, preemption, module, name, when, step, number):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, with_signal(getattr(module, name), when, number))
        with pytest.raises(Preempted):
            start(out, preemption, *VALIDATED)
    assert names(out)[-1] == f"checkpoint-{step}"
    assert not (out / "model_index.json").exists()
    start(out, Preemption(), *VALIDATED, "--resume_from_checkpoint", "latest")
    for file in (Path("unet") / WEIGHTS, Path("checkpoint-4") / "optimizer-unet.safetensors"):
        assert_same_tensors(out / file, whole / file)
    assert (out / "samples" / "step-4.png").read_bytes() == (whole / "samples" / "step-4.png").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_the_run_as_well(tmp_path, monkeypatch, preemption, number):
    monkeypatch.setattr(cfg, "squared_error", with_signal(cfg.squared_error, 1, number))
    with pytest.raises(Preempted):
        start(tmp_path / "out", preemption, *ONE_LEVEL)
    assert names(tmp_path / "out") == ["checkpoint-1"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signals_remain_ignored(number):
    """nohup ignores SIGHUP, and a shell ignores SIGINT for jobs in the background."""
    signal.signal(number, signal.SIG_IGN)
    Preemption().install()
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/usr/bin/python", "/venv/bin/accelerate", "launch", "train_cfg.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train_cfg.py"], True),
        (["python", "-u", "/venv/bin/torchrun", "train_cfg.py"], True),
        (["python", "-m", "torch.distributed.run", "train_cfg.py"], True),
        (["bash", "run.sh"], False),
        (["/bin/bash", "/home/me/accelerate/run.sh"], False),
        (["uv", "run", "training/train_cfg.py"], False),
        ([], False),
    ],
)
def test_launchers_are_recognised(monkeypatch, command, expected):
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: command)
    assert is_launcher(os.getpid()) == expected


def test_process_that_has_ended_is_no_launcher():
    process = multiprocessing.get_context("fork").Process(target=os.getpid)
    process.start()
    process.join()
    assert process.pid is not None
    assert not is_launcher(process.pid)


def test_end_of_the_launcher_stops_the_run_like_sigterm(tmp_path, monkeypatch):
    """`accelerate launch` of one process ends on SIGTERM, and does not pass it on."""
    monkeypatch.setattr(preemption_module, "is_launcher", lambda pid: True)
    preemption, original = Preemption().install(), cfg.squared_error

    def end_of_launcher(*args):
        monkeypatch.setattr(preemption_module.os, "getppid", lambda: 1)
        while not preemption.requested:
            time.sleep(0.01)
        return original(*args)

    monkeypatch.setattr(cfg, "squared_error", end_of_launcher)
    with pytest.raises(Preempted):
        start(tmp_path / "out", preemption, *ONE_LEVEL)
    assert names(tmp_path / "out") == ["checkpoint-1"]


def test_workers_survive_a_signal_to_all_processes(tmp_path, monkeypatch, preemption):
    """Cluster schedulers signal all processes, but the current step still needs data from the workers."""
    original, calls = cfg.squared_error, []

    def signal_all(*args):
        calls.append(1)
        if len(calls) == 3:
            workers = psutil.Process().children()
            assert len(workers) >= 2
            for process in [*workers, psutil.Process()]:
                process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        return original(*args)

    monkeypatch.setattr(datasets, "MAX_CACHED_BYTES", 0)
    flags = [*ONE_LEVEL, "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(cfg, "squared_error", signal_all)
        with pytest.raises(Preempted):
            start(tmp_path / "out", preemption, *flags)
    assert names(tmp_path / "out") == ["checkpoint-2"]
    start(tmp_path / "out", Preemption(), *flags, "--resume_from_checkpoint", "latest")
    start(tmp_path / "whole", Preemption(), *flags)
    assert_same_tensors(tmp_path / "out" / "unet" / WEIGHTS, tmp_path / "whole" / "unet" / WEIGHTS)


def test_signal_saves_a_checkpoint_without_periodic_checkpoints(tmp_path, monkeypatch, preemption):
    monkeypatch.setattr(cfg, "squared_error", with_signal(cfg.squared_error, 2))
    with pytest.raises(Preempted):
        start(tmp_path / "out", preemption, "--checkpointing_steps", "0")
    assert names(tmp_path / "out") == ["checkpoint-2"]


def test_signal_and_full_disk_raise_not_saved(tmp_path, monkeypatch, preemption):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    monkeypatch.setattr(cfg, "squared_error", with_signal(cfg.squared_error, 3))
    with pytest.raises(NotSaved, match="Stopped at step 3, whose checkpoint could not be written"):
        start(tmp_path / "out", preemption)
    assert names(tmp_path / "out") == []


TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def run_and_signal(
    cwd: Path,
    *argv: str,
    at: str | Path | None = None,
    launcher: Sequence[str] = (),
    number: int = signal.SIGTERM,
    rank: int | None = None,
    times: int = 1,
) -> tuple[int, str]:
    """
    Run `train_cfg.py`, send a signal to it, and return its exit code and stderr.

    Args:
        cwd (`Path`): the working directory. The run writes to `out` in it.
        argv (`str`): flags of the script.
        at (`str` or `Path`, *optional*): when to send the signal: when a text appears on stderr or when a path in `cwd`
            exists. By default after one second.
        launcher (`Sequence[str]`): arguments of Python before the script.
        number (`int`): the signal.
        rank (`int`, *optional*): the child process to send the signal to. By default the process itself.
        times (`int`): how often to send the signal.
    """
    command = [sys.executable, *launcher, str(TRAINING / "train_cfg.py"), *TINY, "--output_dir", "out", *argv]
    stderr, environment = "", {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(
        command,
        cwd=cwd,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=default_signals,
    ) as process:
        assert process.stderr is not None
        if at is None:
            time.sleep(1)
        while isinstance(at, str) and at not in stderr and process.poll() is None:
            stderr += process.stderr.read(1)
        while isinstance(at, Path) and not (cwd / at).exists() and process.poll() is None:
            time.sleep(0.001)
        for _ in range(times if process.poll() is None else 0):
            target = psutil.Process(process.pid)
            if rank is not None:
                target = sorted(target.children(), key=lambda child: child.pid)[rank]
            target.send_signal(number)
            time.sleep(0.2)
        stderr += process.stderr.read()
        return process.wait(), stderr


@pytest.mark.slow
def test_signal_from_another_process(tmp_path):
    code, stderr = run_and_signal(tmp_path)  # during imports
    assert code in (EXIT_RESUME, -signal.SIGTERM)
    assert not (tmp_path / "out").exists()

    long = ["--max_train_steps", "100000", "--checkpointing_steps", "0", "--resume_from_checkpoint", "latest"]
    code, stderr = run_and_signal(tmp_path, *long, at="step 1 of")
    assert code == EXIT_RESUME
    assert "SIGTERM: finishing the step, then saving" in stderr
    assert "Stopped and saved. Resume with the same command and --resume_from_checkpoint latest." in stderr
    (first,) = checkpoints(tmp_path / "out")
    code, stderr = run_and_signal(tmp_path, *long, at="images/s")
    assert code == EXIT_RESUME
    assert f"Resumed from out/{first.name}" in stderr
    assert len(checkpoints(tmp_path / "out")) == 2

    code, stderr = run_and_signal(tmp_path, *long, "--num_inference_steps", "100000", "--validation_steps", "1",
                                at="Drawing samples", times=2)  # fmt: skip
    # Python may already have removed the handler when the second signal arrives.
    assert code in (EXIT_RESUME, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_accelerate_launch_saves_a_checkpoint(tmp_path, number):
    """The launcher ends at once. The run that it has started notices this, and saves."""
    flags = ["--max_train_steps", "100000", "--checkpointing_steps", "0"]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1"]
    _, stderr = run_and_signal(tmp_path, *flags, at="step 1 of", launcher=launcher, number=number)
    assert "SIGTERM: finishing the step, then saving" in stderr
    assert "Stopped and saved. Resume with the same command" in stderr
    (path,) = checkpoints(tmp_path / "out")
    assert verify_checkpoint(path) is None


@pytest.mark.slow
def test_signal_stops_two_processes_at_the_same_step(tmp_path):
    _, stderr = run_and_signal(tmp_path, "--max_train_steps", "100000", "--checkpointing_steps", "0", at="step 1 of",
                             launcher=TWO)  # fmt: skip
    assert "Stopped and saved" in stderr
    (path,) = checkpoints(tmp_path / "out")
    assert verify_checkpoint(path) is None


LONG = ["--max_train_steps", "60", "--checkpointing_steps", "10", "--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """Return the output folder of an uninterrupted run on two processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, stderr = run_and_signal(folder, *LONG, at="images/s", launcher=TWO, times=0)
    assert code == 0, stderr
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_is_restarted(tmp_path, uninterrupted, rank):
    launcher = [*TWO, "--max_restarts", "1"]
    at = Path("out", "checkpoint-20")
    code, stderr = run_and_signal(tmp_path, *LONG, at=at, launcher=launcher, rank=rank, number=signal.SIGKILL)
    assert code == 0, stderr
    assert "Resumed from out/checkpoint-20" in stderr
    for name in ("unet", "checkpoint-60/unet", "checkpoint-60/unet_ema"):
        assert_same_tensors(tmp_path / "out" / name / WEIGHTS, uninterrupted / name / WEIGHTS)


@pytest.mark.slow
def test_stopped_process_ends_the_run_after_a_timeout(tmp_path):
    """The other process gets no answer, as after a network failure."""
    flags = ["--max_train_steps", "100000", "--checkpointing_steps", "20", "--ddp_timeout", "10"]
    started = time.monotonic()
    at = Path("out", "checkpoint-20")
    code, stderr = run_and_signal(tmp_path, *flags, at=at, launcher=TWO, rank=1, number=signal.SIGSTOP)
    assert code != 0
    assert "Timed out waiting 10000ms" in stderr
    assert "Root Cause" in stderr  # from torchrun, which has also ended the stopped process
    assert time.monotonic() - started < 300
    (last,) = checkpoints(tmp_path / "out")  # a later one, if the machine is busy
    assert verify_checkpoint(last) is None


MANY_SAVES = ["--max_train_steps", "200", "--checkpointing_steps", "2", "--checkpoints_total_limit", "1"]


def train_quietly(output_dir: str) -> None:
    logging.disable(logging.WARNING)
    train(Path(output_dir), *MANY_SAVES, "--resume_from_checkpoint", "latest")


def last_step(output_dir: Path) -> int:
    return max((int(name.removeprefix("checkpoint-")) for name in names(output_dir)), default=0)


@pytest.mark.slow
def test_run_survives_kills_at_twenty_random_moments(tmp_path, monkeypatch):
    """Each kill follows some progress. Every other kill happens during a save."""
    train(tmp_path / "whole", *MANY_SAVES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # The fork server does not inherit the path from pytest.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.test_faults"])
    out, rng, partially_written = tmp_path / "out", random.Random(0), 0
    for i in range(20):
        process = context.Process(target=train_quietly, args=(str(out),))
        process.start()
        target = last_step(out) + 2 * rng.randint(1, 2)
        while last_step(out) < target and process.is_alive():
            time.sleep(0.002)
        while i % 2 and not list(out.glob("tmp-*")) and process.is_alive():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01 if i % 2 else 0.1))
        before = last_step(out)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert before - 2 <= last_step(out) <= before + 2  # a checkpoint is still listed while it is deleted
        partially_written += bool(list(out.glob("tmp-*")))
        undamaged = [path for path in checkpoints(out) if verify_checkpoint(path) is None]
        assert int(undamaged[-1].name.removeprefix("checkpoint-")) >= target - 2
    assert partially_written > 3
    train_quietly(str(out))
    logging.disable(logging.NOTSET)
    for name in ("unet", "checkpoint-200/unet_ema"):
        assert_same_tensors(out / name / WEIGHTS, tmp_path / "whole" / name / WEIGHTS)


def squared_error_with_nan(calls: set[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return `squared_error` with NaN in the given calls, counted from 1."""
    original, count = cfg.squared_error, []

    def function(pred, target):
        count.append(1)
        return original(pred, target) * (torch.nan if len(count) in calls else 1.0)

    return function


def test_nonfinite_step_is_skipped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cfg, "squared_error", squared_error_with_nan({3}))
    train(tmp_path, *EVERY_STEP, "--no_use_ema", "--report_to", "tensorboard")
    before, after, last = (load_file(tmp_path / f"checkpoint-{step}" / "unet" / WEIGHTS) for step in (2, 3, 4))
    moments = [load_file(tmp_path / f"checkpoint-{step}" / "optimizer-unet.safetensors") for step in (2, 3)]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert all(torch.isfinite(value).all() for value in last.values())
    assert any(not torch.equal(after[name], last[name]) for name in after)
    assert "Skipped 1 of the last 1 steps" in caplog.text
    assert [value for _, value in scalars(tmp_path)["skipped_steps"]] == [0, 0, 1, 0]


def test_too_many_consecutive_nonfinite_steps_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cfg, "squared_error", squared_error_with_nan({2, 4, 5, 6}))
    flags = [*EVERY_STEP, "--max_train_steps", "8", "--max_nonfinite_steps", "3"]
    with pytest.raises(FloatingPointError, match="last 3 steps, up to step 6.*--resume_from_checkpoint checkpoint-5"):
        train(tmp_path, *flags)
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / "checkpoint-5" / "unet" / WEIGHTS).values())
