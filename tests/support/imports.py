"""Find the imports between modules in the source code, without importing it.

python -m tests.support.imports    # prints the import graph of the package and the commands in Mermaid format
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffusers_cfg"
REMOTE = ("unet_2d_cfg", "scheduling_log_snr", "classifier_2d", "pipeline_cfg")


@cache
def modules() -> dict[str, Path]:
    """Return the files of the package by module name, such as `diffusers_cfg.data.order`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@cache
def commands() -> dict[str, Path]:
    """Return the files of the commands by relative path, such as `training/sample.py`."""
    return {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "training").rglob("*.py"))}


@cache
def imported(path: Path, nested: bool = True) -> set[str]:
    """
    Return the modules that a file imports. `from diffusers_cfg import CFGPipeline` imports the module that defines it.

    Args:
        path (`Path`): the file.
        nested (`bool`): whether to include imports inside functions.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if nested else outer(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)[: len(package_of(path)) - node.level + 1] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {resolve(module, alias.name) for alias in node.names}
    return names


def outer(tree: ast.Module) -> list[ast.AST]:
    """Return the nodes that are not inside a function."""
    nodes: list[ast.AST] = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        nodes.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack += ast.iter_child_nodes(node)
    return nodes


def package_of(path: Path) -> list[str]:
    """Return the package that contains a file, such as `["diffusers_cfg", "data"]`."""
    return list(path.relative_to(ROOT).parent.parts)


def resolve(module: str, name: str) -> str:
    """Return the module that `from module import name` imports."""
    public = {
        "CFGPipeline": "hub",
        "LogSNRScheduler": "scheduling_log_snr",
        "NoisyClassifier2DModel": "classifier_2d",
        "UNet2DCFGModel": "unet_2d_cfg",
    }
    if module == "diffusers_cfg" and name in public:
        return f"diffusers_cfg.{public[name]}"
    return f"{module}.{name}" if f"{module}.{name}" in modules() else module


def layer(module: str) -> str:
    """Return the layer of a module: R for remote code, a folder of the package, or the module itself."""
    parts = module.split(".")
    if parts[0] != "diffusers_cfg" or len(parts) == 1:
        return parts[0]
    around = ("citations", "hub", "loading", "model_card", "model_card_sections", "model_files", "repository", "space")
    return "R" if parts[1] in (*REMOTE, *around) else parts[1]


@cache
def edges() -> dict[str, set[str]]:
    """Return the layers that each layer of the package, and the commands, import."""
    found: dict[str, set[str]] = {}
    for name, path in {**modules(), **commands()}.items():
        source = "training" if name.startswith("training/") else layer(name)
        own = {layer(target) for target in imported(path) if target.startswith("diffusers_cfg.")}
        found.setdefault(source, set()).update(own - {source})
    return found


def main() -> None:
    """Print the import graph."""
    print("graph TD")
    for source, targets in sorted(edges().items()):
        for target in sorted(targets):
            print(f"    {source} --> {target}")


if __name__ == "__main__":
    main()
