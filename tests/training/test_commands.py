"""Test the commands: flags, length, and when they import heavy modules."""

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.commands import help_of
from tests.support.imports import commands
from tests.support.runs import ROOT, TRAINING

COMMANDS = {path.stem: path for path in commands().values()}
# The flags of each command at 573b54d, which users' scripts rely on
FROZEN = json.loads((ROOT / "tests" / "support" / "cli-573b54d.json").read_text(encoding="utf-8"))
FROZEN["distill_guidance"] += FROZEN["train_cfg"]
REMOVED = {
    "sample": {"guidance_tolerance"},
    "evaluate_cfg": {"guidance_tolerance"},
    "benchmark": {"model", "guidance_interval"},
}
HEAVY = {"torch", "diffusers", "accelerate", "datasets", "torchmetrics", "matplotlib", "sklearn", "scipy"}


@pytest.mark.parametrize("name", FROZEN)
def test_flags_are_not_removed(name, capsys):
    """Flags may be added, but renaming or removing one breaks users' scripts."""
    shown = set(re.findall(r"--([a-z][a-z0-9_]*)", help_of(COMMANDS[name], capsys)))
    assert set(FROZEN[name]) - shown == REMOVED.get(name, set())


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_flag_prints_the_usage(name, capsys):
    main = runpy.run_path(str(COMMANDS[name]))["main"]
    with pytest.raises(SystemExit, match="2"):
        main(["--no_such_flag", "1"])
    error = capsys.readouterr().err
    assert "usage: " in error
    assert "required" in error or "--no_such_flag" in error


def test_help_and_flag_errors_do_not_import_torch():
    """Check the imports, because a time limit would depend on the machine."""
    script = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    main = runpy.run_path(path)['main']\n"
        "    for flag in ('--help', '--no_such_flag'):\n"
        "        try:\n"
        "            main([flag])\n"
        "        except SystemExit:\n"
        "            pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    # -OO drops docstrings, which no command may depend on.
    command = [sys.executable, "-OO", "-c", script, *map(str, COMMANDS.values())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n[]\n"), result.stdout[-300:]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_short(name):
    """A command is a short file with at most one delayed block of imports, and metadata for `uv run`."""
    path = COMMANDS[name]
    source = path.read_text(encoding="utf-8")
    if path.parent == TRAINING:
        assert len(source.splitlines()) <= 65
    blocks = [
        node
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        for node, before in zip(function.body, [None, *function.body], strict=False)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not isinstance(before, (ast.Import, ast.ImportFrom))
    ]
    assert len(blocks) <= 1
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", source, flags=re.MULTILINE)
    metadata = tomllib.loads("".join(f"{line[2:]}\n" for line in block.splitlines()))
    extra = {"gpu_check": "test", "demo": "demo", "export": "export"}.get(path.stem, "train")  # the first runs tests
    assert metadata["dependencies"] == [f"diffusers-cfg[{extra}]"]
    assert metadata["requires-python"] == ">=3.11"
    source_of_package = Path(path.parent, metadata["tool"]["uv"]["sources"]["diffusers-cfg"]["path"]).resolve()
    assert source_of_package == ROOT
