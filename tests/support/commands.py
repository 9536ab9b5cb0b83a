"""Load the functions of a command from its script, because commands are run and never imported."""

import runpy
from collections.abc import Callable
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
