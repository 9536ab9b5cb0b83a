"""Test publishing Spaces with the real Hub client against a local stand-in for the Hub, and run a published app."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceCardData

from diffusers_cfg.config import CommandError
from diffusers_cfg.demo.generation import Request, generate
from diffusers_cfg.repository import PublishError
from diffusers_cfg.space import load_demo, publish_space, publish_with_demo, space_requirements
from tests.support.commands import load_command
from tests.support.hub_client import HubClient
from tests.support.hub_server import Fault
from tests.support.models import make_pipeline, make_unet

# Imports a Space's app without this package, and prints the pixels and the code of two images.
RUN_APP = """
import json
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_cfg":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import app
from cfg_demo.generation import Demo, Request, code_of, generate
from cfg_demo.page import build_page

demo = Demo(app.pipe, "me/scribbles", app.arguments)
build_page(demo)
request = Request([2], num_images=2, sampler="UniPCMultistepScheduler", num_inference_steps=3)
images = [list(image.tobytes()) for image in generate(demo, request)[0]]
namespace = {}
exec(code_of(demo, request), namespace)
print(json.dumps({"images": images, "by code": [list(image.tobytes()) for image in namespace["images"]]}))
"""


@pytest.fixture
def client(hub, tmp_path, monkeypatch) -> HubClient:
    return HubClient(monkeypatch, hub, str(tmp_path / "hf"))


@pytest.fixture
def model(tmp_path) -> Path:
    make_pipeline(conditioning_dropout_prob=0.1, num_inference_steps=3).save_pretrained(tmp_path / "scribbles")
    run = {"method": {"classes_without_images": [1]}}
    (tmp_path / "scribbles" / "run.json").write_text(json.dumps(run))
    return tmp_path / "scribbles"


def front_matter(text: bytes) -> dict:
    """Return the metadata of a card."""
    return yaml.safe_load(text.decode().split("---\n")[1])


def distance(first: list[list[int]], second: list[list[int]]) -> int:
    """Return the largest difference between the pixels of two lists of images."""
    return max(abs(a - b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_publish_a_model_with_its_demo(hub, client, model):
    url, space = publish_with_demo(str(model), None, "me/demo")
    assert space == f"{hub.url}/spaces/me/demo"
    revision = hub.repositories["me/scribbles"].branches["main"]
    assert url.endswith(revision)
    card = hub.files("me/scribbles")["README.md"].decode()
    assert "Try it in the browser: [demo](https://huggingface.co/spaces/me/demo)." in card

    files = hub.files("spaces/me/demo")
    pages = [f"cfg_demo/{name}.py" for name in ("__init__", "generation", "page")]
    assert sorted(files) == sorted([".gitattributes", "README.md", "app.py", *pages, "requirements.txt"])
    data = front_matter(files["README.md"])
    assert data["models"] == ["me/scribbles"]
    assert (data["sdk"], data["app_file"], data["tags"]) == ("gradio", "app.py", ["diffusers-cfg"])
    assert f"gradio=={data['sdk_version']}" in files["requirements.txt"].decode().split("\n")
    assert f'"{revision}"' in files["app.py"].decode()
    assert "absent=[1]" in files["app.py"].decode()

    # A later push of the model without its demo keeps the link; the demo can be published again.
    load_command("publish").main([str(model), "--repo_id", "me/scribbles"])
    assert hub.files("me/scribbles")["README.md"].decode() == card
    hub.files("spaces/me/demo")["README.md"] = (
        b"---\nsdk: gradio\ntitle: x\nhf_oauth: true\ntags: [diffusers-cfg]\n---\n"
    )
    publish_with_demo(str(model), "me/scribbles", "me/demo")
    data = front_matter(hub.files("spaces/me/demo")["README.md"])
    assert (data["title"], data["hf_oauth"]) == ("demo", True)  # the owner's own metadata is kept


@pytest.mark.slow
def test_the_app_needs_only_its_requirements(hub, client, model, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    publish_with_demo(str(model), None, "me/demo")
    folder = tmp_path / "space"
    for name, content in hub.files("spaces/me/demo").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    # Another model takes the place of the published one, but the revision is pinned.
    client.log_in("hf_writer")
    files = {**hub.files("me/scribbles"), "unet/diffusion_pytorch_model.safetensors": b"damaged"}
    hub.commit("me/scribbles", "damage", files)
    command = [sys.executable, "-c", RUN_APP]
    env = hub.environment(str(tmp_path / "other"))
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    drawn = json.loads(result.stdout.splitlines()[-1])
    request = Request([2], num_images=2, sampler="UniPCMultistepScheduler", num_inference_steps=3)
    expected = [list(image.tobytes()) for image in generate(load_demo(str(model)), request)[0]]
    assert distance(drawn["images"], expected) <= 1  # other copies of the weights round differently
    assert distance(drawn["by code"], expected) <= 1


def test_requirements_are_those_of_the_package():
    names = [text.split("=")[0].rstrip(">") for text in space_requirements()]
    assert names == ["accelerate", "diffusers", "huggingface-hub", "pillow", "safetensors", "torch", "gradio"]
    pinned = [text.split("==")[0] for text in space_requirements() if "==" in text]
    assert pinned == ["diffusers", "torch", "gradio"]
    assert not any("+" in text for text in space_requirements())  # the name of a build


def test_a_static_space(hub, client):
    files = {"index.html": b"<title>demo</title>"}
    data = SpaceCardData(title="demo", sdk="static", tags=["onnx"])
    publish_space("demo", files, data, "# demo\n")
    assert hub.files("spaces/me/demo")["index.html"] == b"<title>demo</title>"
    assert front_matter(hub.files("spaces/me/demo")["README.md"])["tags"] == ["onnx", "diffusers-cfg"]
    publish_space("me/demo", {"index.html": b"new"}, data, "# demo\n")
    assert hub.files("spaces/me/demo")["index.html"] == b"new"


def test_a_page_is_published_as_a_static_space(hub, client, tmp_path, capsys):
    (tmp_path / "index.html").write_bytes(b"<title>page</title>")
    (tmp_path / "notes.txt").write_text("private")
    main = load_command("publish").main
    main([str(tmp_path), "--space", "me/page"])
    assert capsys.readouterr().out == f"Published the page: {hub.url}/spaces/me/page\n"
    files = hub.files("spaces/me/page")
    assert files.keys() == {".gitattributes", "README.md", "index.html"}
    assert files["index.html"] == b"<title>page</title>"
    card = front_matter(files["README.md"])
    assert (card["title"], card["sdk"], card["app_file"]) == ("page", "static", "index.html")
    for argv in (["--repo_id", "me/page"], ["--repo_id", "me/page", "--space", "me/page"]):
        with pytest.raises(CommandError, match="contains a page of export.py, which is published by --space alone"):
            main([str(tmp_path), *argv])


OURS = b"---\nsdk: static\ntags: [diffusers-cfg]\n---\n"


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": b"---\nsdk: gradio\n---\n", "app.py": b"theirs"},
        {"README.md": b"---\nsdk: docker\n---\n"},
        {"README.md": OURS, "index.html": b""},
        {"app.py": b"no card"},
    ],
)
def test_a_space_with_other_contents_is_left_alone(hub, client, model, files):
    hub.create("spaces/me/demo", files)
    with pytest.raises(PublishError, match=r"me/demo exists and does not contain a gradio Space of diffusers-cfg"):
        publish_with_demo(str(model), None, "me/demo")
    assert hub.files("spaces/me/demo") == {".gitattributes": b"", **files}
    assert "me/scribbles" not in hub.repositories  # nothing was uploaded
    publish_with_demo(str(model), None, "me/demo", overwrite=True)
    assert front_matter(hub.files("spaces/me/demo")["README.md"])["sdk"] == "gradio"


def test_a_private_model_has_no_demo(hub, client, model):
    hub.create("me/scribbles", private=True)
    with pytest.raises(PublishError, match="me/scribbles is private, and a Space cannot read it"):
        publish_with_demo(str(model), None, "me/demo")
    assert [*hub.repositories] == ["me/scribbles"]


def test_a_model_without_pictures_has_no_demo(hub, client, tmp_path):
    make_pipeline(make_unet(in_channels=4, out_channels=4)).save_pretrained(tmp_path / "latents")
    with pytest.raises(PublishError, match="samples of 4 channels, which are not pictures"):
        publish_with_demo(str(tmp_path / "latents"), None, "me/demo")
    with pytest.raises(PublishError, match="nowhere does not exist. Pass the output folder"):
        publish_with_demo(str(tmp_path / "nowhere"), None, "me/demo")
    assert hub.requests == []


def test_a_failure_after_the_model_was_published_is_named(hub, client, model):
    hub.faults.append(Fault(r"POST /api/spaces/.*/commit", 403))
    with pytest.raises(CommandError, match=r"The model was published \(http.*\), but not its demo. The Space me/demo"):
        load_command("publish").main([str(model), "--space", "me/demo"])
    assert "me/scribbles" in hub.repositories


@pytest.mark.parametrize("argv", [[], ["--space", "me/demo", "--private"], ["--space", "me/demo", "--create_pr"]])
def test_flags_that_exclude_each_other(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_command("publish").main(["cfg-model", *argv])
    assert "--space" in capsys.readouterr().err
