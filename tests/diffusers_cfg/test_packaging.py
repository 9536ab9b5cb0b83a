"""Test pyproject.toml: the wheel contains every module, and the lower bounds are the tested versions."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_lowest_txt_pins_the_lower_bounds():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    chosen = ("train", "demo", "export", "test")
    requirements = [*project["dependencies"], *(text for name in chosen for text in extras[name])]
    bounds = {}
    for text in requirements:
        if not text.startswith("diffusers-cfg["):
            match = re.fullmatch(r"([\w-]+)(?:\[nodejs\])?>=([\d.]+)(?:,<\d+)?", text)
            assert match is not None, text
            bounds[match[1]] = match[2]
    lines = (ROOT / ".github" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert bounds.pop("torch")
    assert pins == bounds


def test_wheel_contains_every_module():
    """setuptools includes only folders with an `__init__.py`."""
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["diffusers_cfg", "diffusers_cfg.*"]
    folders = {path.parent for path in (ROOT / "diffusers_cfg").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    data = PROJECT["tool"]["setuptools"]["package-data"]["diffusers_cfg"]
    assert {*data} == {"py.typed", "export/page.html"}
    assert all((ROOT / "diffusers_cfg" / name).is_file() for name in data)
