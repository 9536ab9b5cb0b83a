"""pyproject.toml: the wheel holds every module, and the lower bounds are those that are tested."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_lowest_txt_pins_the_lower_bounds():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["train"], *extras["test"]]
    bounds = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<\d+)?", text).groups() for text in requirements if "[" not in text
    )
    lines = (ROOT / ".github" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert bounds.pop("torch")
    assert pins == bounds


def test_the_wheel_finds_every_module():
    """setuptools takes folders with an `__init__.py` only."""
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["diffusers_cfg", "diffusers_cfg.*"]
    folders = {path.parent for path in (ROOT / "diffusers_cfg").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert (ROOT / "diffusers_cfg" / "py.typed").is_file()
