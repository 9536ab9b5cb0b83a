"""Test the import rules and other design rules of the code."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.support.imports import PACKAGE, REMOTE, ROOT, commands, edges, imported, layer, modules

# The layers of the package that each layer may import
RULES = {
    "diffusers_cfg": {"R"},
    "config": set(),
    "randomness": set(),
    "files": {"config"},
    "denoising_gan": set(),
    "noise_schedule": set(),
    "variational_bound": set(),
    "demo": set(),  # is copied to Spaces
    "run_settings": {"config"},
    "settings": {"config", "run_settings"},
    "method_settings": {"config", "run_settings", "settings"},
    "R": {"R", "demo"},
    "data": {"config", "randomness", "files", "settings"},
    "evaluation": {
        "data",
        "R",
        "config",
        "randomness",
        "files",
        "settings",
        "run_settings",
        "method_settings",
        "denoising_gan",
        "noise_schedule",
        "variational_bound",
    },
    "export": {"evaluation", "R", "config", "files"},
    "engine": {"data", "R", "config", "randomness", "files", "settings"},
    "methods": {
        "engine",
        "evaluation",
        "data",
        "R",
        "config",
        "randomness",
        "settings",
        "run_settings",
        "method_settings",
        "denoising_gan",
        "noise_schedule",
        "variational_bound",
    },
    "training": {
        "R",
        "data",
        "engine",
        "evaluation",
        "export",
        "methods",
        "demo",
        "config",
        "randomness",
        "files",
        "settings",
        "run_settings",
        "method_settings",
        "denoising_gan",
        "noise_schedule",
    },
}


def identifiers(path: Path) -> str:
    """Return all names in the code of a file, without docstrings and comments."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    return " ".join(names)


def top_level(names: set[str]) -> set[str]:
    """Return the top-level packages of modules."""
    return {name.split(".")[0] for name in names}


def users_of(library: str) -> set[str]:
    """Return the modules and commands that import a library."""
    return {name for name, path in {**modules(), **commands()}.items() if library in top_level(imported(path))}


def test_sampling_and_evaluation_start_on_systems_other_than_posix():
    files, found, names = {**modules(), **commands()}, set(), ["training/sample.py", "training/evaluate_cfg.py"]
    while names:
        found.add(name := names.pop())
        names += (imported(files[name]) & files.keys()) - found
    assert "diffusers_cfg.files" in found
    assert "diffusers_cfg.engine.preemption" not in found  # has signals that Windows lacks
    assert "fcntl" not in set().union(*(imported(files[name], nested=False) for name in found))


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_imports_only_torch_and_diffusers(name):
    path = PACKAGE / f"{name}.py"
    assert top_level(imported(path)) - set(sys.stdlib_module_names) <= {"torch", "diffusers"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Two loaded versions of a repository would share a function at module level.
    assert [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))] == []
    # diffusers searches for imports with this pattern, in docstrings too.
    found = re.findall(r"^\s*(?:import\s+(\S+)\s*$|from\s+(\S+)\s+import)", path.read_text(), flags=re.MULTILINE)
    assert {(a or b).split(".")[0] for a, b in found} <= top_level(imported(path))


def test_the_demo_runs_in_a_space():
    paths = (PACKAGE / "demo").glob("*.py")
    libraries = top_level(set().union(*map(imported, paths))) - set(sys.stdlib_module_names)
    assert libraries == {"PIL", "diffusers", "diffusers_cfg", "gradio", "torch"}
    assert edges()["demo"] == set()  # only its own modules of this package


@pytest.mark.parametrize(
    ("pattern", "unknown"),
    [
        ("scheduling_log_snr.py", r"class_label|num_class|null|guidance"),
        ("unet_2d_cfg.py", r"sched|alpha|sigma|snr"),
        ("engine/*.py", r"log_snr|guidance_scale|null_class|conditioning_dropout|\bunet\b|prediction_type"),
        ("data/*.py", r"log_snr|guidance|null_class|conditioning_dropout|unet|prediction_type"),
    ],
)
def test_layers_do_not_mention_concepts_of_others(pattern, unknown):
    """Only the pipeline combines the network and the noise process. Engine and data are independent of the method."""
    found = {path.name: set(re.findall(unknown, identifiers(path))) for path in PACKAGE.glob(pattern)}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize("name", RULES)
def test_layers_import_only_allowed_layers(name):
    assert edges().get(name, set()) <= RULES[name]


def test_every_module_has_a_layer():
    assert {layer(name) for name in modules()} <= RULES.keys()


def test_there_are_no_circular_imports():
    graph = {name: imported(path) & modules().keys() for name, path in modules().items() if name != "diffusers_cfg"}
    while free := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph.keys() == set()


def test_methods_do_not_import_each_other():
    methods = {path.stem for path in (PACKAGE / "methods").glob("*.py")}
    shared = {"__init__", "objectives", "networks", "guided"}
    for name in methods - shared:
        own = {
            module.split(".")[-1] for module in imported(PACKAGE / "methods" / f"{name}.py") if ".methods." in module
        }
        assert own <= shared, name


def test_engine_and_evaluation_do_not_import_each_other():
    assert "evaluation" not in edges()["engine"]
    assert "engine" not in edges()["evaluation"]


def test_no_module_imports_a_command():
    stems = {path.stem for path in commands().values()} - {"publish", "sample"}  # also names of other modules
    for path in [*modules().values(), *commands().values(), *(ROOT / "tests").rglob("*.py")]:
        assert not top_level(imported(path)) & (stems | {"training"}), path


def test_imports_are_at_the_top_of_the_file():
    """Exceptions are imports that are optional, or slow and not always needed."""
    allowed = {"config": {"transformers.hf_argparser"}, "sources": {"sklearn.datasets"}, "files": {"fcntl"}}
    allowed["page"] = {"gradio"}
    allowed["features"] = {"torch_fidelity.feature_extractor_inceptionv3"}
    for name, path in modules().items():
        nested = imported(path) - imported(path, nested=False)
        assert nested <= allowed.get(name.split(".")[-1], set()), name


def test_no_file_exceeds_400_lines():
    lines = {name: len(path.read_text().splitlines()) for name, path in {**modules(), **commands()}.items()}
    assert {name: n for name, n in lines.items() if n > 400 and name.split(".")[-1] not in REMOTE} == {}


def test_no_module_changes_sys_path():
    for path in [*modules().values(), *commands().values(), *(ROOT / "tests").rglob("*.py")]:
        if path != Path(__file__):
            assert "sys.path" not in path.read_text(encoding="utf-8"), path
    assert "pythonpath" not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("accelerate", r"diffusers_cfg\.(engine|evaluation|methods)\..*|diffusers_cfg\.data\.latents"),
        ("datasets", r"diffusers_cfg\.data\..*"),
        ("huggingface_hub", r"diffusers_cfg\.(hub|loading|model_card|model_files|repository|space)"),
        ("torchvision", "-"),
    ],
)
def test_libraries_are_imported_only_where_allowed(library, allowed):
    assert {name for name in users_of(library) if not re.fullmatch(allowed, name)} - {
        name for name in commands() if library == "accelerate"
    } == set()


@pytest.mark.parametrize("name", ["methods/objectives.py", "evaluation/metrics.py"])
def test_math_functions_are_pure(name):
    libraries = top_level(imported(PACKAGE / name)) - set(sys.stdlib_module_names)
    assert libraries <= {"torch", "diffusers", "diffusers_cfg"}
    assert [n for n in ast.parse((PACKAGE / name).read_text()).body if isinstance(n, ast.ClassDef)] == []


def test_guidance_rule_is_written_once():
    rule = re.compile(r"\(1 \+ \w+\) \* ")
    files = [*modules().values(), *commands().values()]
    assert [path.name for path in files if rule.search(path.read_text(encoding="utf-8"))] == ["pipeline_cfg.py"]
