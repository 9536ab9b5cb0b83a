"""Load the functions of a command from its script, because commands are run and never imported; lock its folder."""

import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusers_cfg.config import UserError
from tests.support.runs import TRAINING, reset_accelerate


def load_command(name: str) -> SimpleNamespace:
    """Return the functions of a command, such as "studies/benchmark". They share `main.__globals__`."""
    return SimpleNamespace(**runpy.run_path(str(TRAINING / f"{name}.py")))


def help_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints for `--help`."""
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path))["main"](["--help"])
    return capsys.readouterr().out


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[None]:
    """Lock a file in another process, "process 7 on elsewhere". A POSIX lock does not exclude its own process."""
    holder = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "file.write('process 7 on elsewhere'); file.flush(); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def check_refused(
    main: Callable[[list[str]], None], argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert that a command refuses its flags with a message without a token, before it starts a training run."""

    def never(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr("diffusers_cfg.engine.trainer.Trainer.run", never)
    reset_accelerate()
    with pytest.raises(UserError, match=message) as error:
        main(argv)
    assert "hf_secret" not in str(error.value)
