"""Load the functions of a command from its script, because commands are run and never imported."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.runs import TRAINING


def load_command(name: str) -> SimpleNamespace:
    """Return the functions of a command, such as "studies/benchmark". They share `main.__globals__`."""
    return SimpleNamespace(**runpy.run_path(str(TRAINING / f"{name}.py")))


def help_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints for `--help`."""
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path))["main"](["--help"])
    return capsys.readouterr().out
