"""Load the functions of a command from its script, because commands are run and never imported."""

import runpy
from types import SimpleNamespace

from tests.support.runs import TRAINING


def load_command(name: str) -> SimpleNamespace:
    """Return the functions of a command, such as "studies/benchmark". They share `main.__globals__`."""
    return SimpleNamespace(**runpy.run_path(str(TRAINING / f"{name}.py")))
