"""Run the tutorial: every block, in order, with short runs."""

import re
import shlex

import pytest
from PIL import Image

from tests.support.commands import load_command
from tests.support.hub_client import HubClient
from tests.support.runs import TRAINING, reset_accelerate

TUTORIAL = (TRAINING / "TUTORIAL.md").read_text(encoding="utf-8")
N = 40  # instead of that of the tutorial


@pytest.mark.slow
def test_every_block_runs(hub, tmp_path, monkeypatch):
    HubClient(monkeypatch, hub, str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    pages = []
    # The demo is served until Ctrl-C; here it ends at once.
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda page: pages.append(page.title) or page.close())
    (tmp_path / "training").symlink_to(TRAINING)  # presets
    variables, namespace = {}, {}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE):
        assert language in {"bash", "python", "text"}
        if language == "python":
            exec(block, namespace)
        for line in block.splitlines() if language == "bash" else ():
            if assignment := re.fullmatch(r"(\w+)=\d+", line):
                variables["$" + assignment[1]] = str(N)
                continue
            command = re.fullmatch(r"python training/(\w+)\.py (.*)", line)
            assert command, line
            reset_accelerate()
            load_command(command[1]).main([variables.get(word, word) for word in shlex.split(command[2])])
    assert variables == {"$N": str(N)}
    assert pages == ["my-model · diffusers-cfg"]
    assert (tmp_path / "my-page" / "index.html").exists()
    assert hub.repositories.keys() == {"me/my-model", "spaces/me/my-demo", "spaces/me/my-page"}
    assert len(namespace["images"]) == 2
    assert all(isinstance(image, Image.Image) for image in namespace["images"])
