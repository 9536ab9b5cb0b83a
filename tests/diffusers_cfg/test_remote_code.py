"""Test that code repeated in the files that are saved with every model is marked and identical."""

import re
from itertools import combinations
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "diffusers_cfg"
NAMES = ("unet_2d_cfg", "scheduling_log_snr", "classifier_2d", "pipeline_cfg")
# The mark and the lines with its indentation up to a blank line
MARK = re.compile(r"^( *)# Copied from diffusers_cfg\.(\w+)(?:\.\w+)?\n((?:\1.+\n)+)", flags=re.MULTILINE)


def read(name: str) -> str:
    return (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_copies_match_their_source(name):
    for _, source, text in MARK.findall(read(name)):
        assert text in read(source)


@pytest.mark.parametrize("pair", list(combinations(NAMES, 2)))
def test_repeated_code_is_marked_as_copied(pair):
    """No three consecutive lines occur in both files, except imports, diffusers' decorator and punctuation."""
    copies = [text for name in NAMES for *_, text in MARK.findall(read(name))]
    found = []
    for name in pair:
        text = MARK.sub("", read(name))
        for copy in copies:
            text = text.replace(copy, "")
        lines = [line for line in text.splitlines() if not re.match(r"(from|import) | *@register_to_config|\W*$", line)]
        found.append(set(zip(lines, lines[1:], lines[2:], strict=False)))
    assert found[0] & found[1] == set()


def test_marks_are_found():
    assert [len(MARK.findall(read(name))) for name in NAMES] == [0, 2, 4, 3]
