"""Call a command's functions without importing it, which nobody does."""

import runpy
from types import SimpleNamespace

from tests.support.runs import TRAINING


def load_command(name: str) -> SimpleNamespace:
    """Return the functions of a command, such as "studies/benchmark". They share `main.__globals__`."""
    return SimpleNamespace(**runpy.run_path(str(TRAINING / f"{name}.py")))
