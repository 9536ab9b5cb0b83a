"""Holds the rules of who may import whom."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REMOTE = ["unet_2d_cfg.py", "scheduling_log_snr.py", "pipeline_cfg.py"]
PACKAGE = sorted((ROOT / "diffusers_cfg").glob("*.py"))
TRAINING = sorted((ROOT / "training").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it; relative imports keep their dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." + (node.module or "") if node.level else node.module.split(".")[0])
    return names


def identifiers(path: Path) -> str:
    """All names in the code of a file, docstrings and comments aside."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    return " ".join(names)


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_runs_alone(name):
    path = ROOT / "diffusers_cfg" / name
    assert imported(path) - set(sys.stdlib_module_names) <= {"torch", "diffusers"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # A helper at module level would be shared by two loaded versions of a repository.
    assert [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))] == []
    # diffusers finds imports by their look, in docstrings too.
    looks = re.findall(r"^\s*(?:import\s+(\S+)\s*$|from\s+(\S+)\s+import)", path.read_text(), flags=re.MULTILINE)
    assert {(a or b).split(".")[0] for a, b in looks} <= imported(path)


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("scheduling_log_snr.py", r"class_label|num_class|null|guidance"),
        ("unet_2d_cfg.py", r"sched|alpha|sigma|snr"),
    ],
)
def test_only_the_pipeline_joins_them(name, unknown):
    assert re.findall(unknown, identifiers(ROOT / "diffusers_cfg" / name)) == []


def test_the_package_knows_nothing_of_training():
    names = {path.stem for path in TRAINING} | {"training", "accelerate", "datasets", "sklearn"}
    for path in PACKAGE:
        assert imported(path) & names == set(), path


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("accelerate", "checkpoint evaluation grid latents loop plan record train_cfg"),
        ("datasets", "data"),
        ("huggingface_hub", "hub model_card"),
        ("torchvision", ""),
    ],
)
def test_a_library_stays_in_its_place(library, homes):
    assert {path.stem for path in [*PACKAGE, *TRAINING] if library in imported(path)} <= set(homes.split())


@pytest.mark.parametrize("name", ["conditioning.py", "objectives.py", "metrics.py"])
def test_the_mathematics_are_functions_over_tensors(name):
    assert imported(ROOT / "training" / name) - {"collections"} == {"torch"}


def test_the_guidance_rule_stands_in_one_place():
    rule = re.compile(r"\(1 \+ \w+\) \* ")
    assert [path.name for path in [*PACKAGE, *TRAINING] if rule.search(path.read_text(encoding="utf-8"))] == [
        "pipeline_cfg.py"
    ]


def test_ci_runs_the_command_of_the_readme():
    commands = re.findall(r"^(python -m venv .*pytest.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text()
