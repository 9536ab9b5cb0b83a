"""Test the documents: length, links, commands, code and the tests that they name."""

import re
import shutil
from pathlib import Path

import pytest

from tests.support import imports
from tests.support.commands import help_of
from tests.support.runs import ROOT, TRAINING, distill, train_classifier

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("diffusers_cfg/*.md"), *ROOT.glob("training/*.md")]
)
# Flags of other programs that the documents mention.
FOREIGN_FLAGS = {
    "--cfg-scale",
    "--classifier_scale",
    "--config_file",
    "--gnet",
    "--local-dir",
    "--logdir",
    "--max_restarts",
    "--nproc_per_node",
}


def blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(document: Path) -> str:
    """Return the text outside code blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """Return the package's commands in a document's bash blocks, as (relative path of the script, arguments)."""
    lines = "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    found = [re.search(r"(training/[\w/]+\.py)(.*)", line.split("  #")[0]) for line in lines]
    return [(match[1], match[2].split()) for match in found if match]


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [block for block in blocks(ROOT / "README.md", "bash") if "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_are_alive(document):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    assert links or document.name == "CHANGELOG.md"
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_documented_commands_and_flags_exist(capsys):
    shown = [(document, *command) for document in DOCUMENTS for command in commands(document)]
    assert len(shown) > 20
    helps = {name: help_of(path, capsys) for name, path in imports.commands().items()}
    helps["training/studies/ablate_dropout.py"] += helps["training/train_cfg.py"] + helps["training/evaluate_cfg.py"]
    helps["training/studies/ablate_samplers.py"] += helps["training/evaluate_cfg.py"]
    helps["training/studies/benchmark.py"] += helps["training/train_cfg.py"]
    helps["training/studies/compare_guidance.py"] += helps["training/evaluate_cfg.py"]
    helps["training/studies/modes.py"] += helps["training/train_ddgan.py"]
    for document, script, arguments in shown:
        for flag in [argument for argument in arguments if argument.startswith("--")]:
            assert re.search(rf"{flag}\b", helps[script]), f"{document.name}: {script} {flag}"
        for path in [argument for argument in arguments if argument.startswith("training/")]:
            assert (ROOT / path).exists(), f"{document.name}: {script} {path}"


def test_flags_in_the_prose_exist(capsys):
    helps = "".join(help_of(path, capsys) for path in imports.commands().values())
    known = set(re.findall(r"--[a-z][a-z0-9_]*", helps)) | FOREIGN_FLAGS
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":  # which names flags that were removed
            continue
        inline = " ".join(re.findall(r"`([^`\n]+)`", prose(document)))
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", inline)) <= known, document.name


def test_named_tests_and_files_exist():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name, path in re.findall(r"\[`(test_\w+)`\]\(([\w./]+\.py)\)", text):
            assert f"def {name}(" in sources[(document.parent / path).resolve()], f"{document.name}: {name}"
        for path in re.findall(r"(?<![\w/.])((?:training|tests|diffusers_cfg|\.github)/[\w./-]+\w)", prose(document)):
            assert (ROOT / path).exists() or re.search(r"[A-Z]{4}\.py", path), f"{document.name}: {path}"


def test_the_python_blocks_run(trained_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("cfg-model", "weak-model", "cfg-digits"):
        shutil.copytree(trained_model, folder)
    train_classifier(tmp_path / "classifier-model", tmp_path / "cfg-model")
    distill(tmp_path / "cfg-model", tmp_path / "one-pass")
    distill(tmp_path / "one-pass", tmp_path / "eight-steps", "--student_steps", "8")
    for document in (ROOT / "README.md", ROOT / "diffusers_cfg" / "README.md", TRAINING / "README.md"):
        namespace: dict = {}
        for block in blocks(document, "python"):
            # Loading from the Hub is tested in test_hub.py; here a folder takes the repository's place.
            exec(block.replace("me/cfg-digits", "cfg-digits"), namespace)
