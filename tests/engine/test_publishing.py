"""Test publishing a run, against a local server in place of the Hub."""

import json
import subprocess
import sys

import pytest

from diffusers_cfg.config import parse_config
from diffusers_cfg.data.naming import public_name
from diffusers_cfg.settings import CFGConfig
from tests.support.hub_server import Fault
from tests.support.runs import SETTINGS, TINY, TRAINING, WEIGHTS


@pytest.fixture
def script(hub, tmp_path):
    """Return a function that runs a training script with the local server in place of the Hub."""

    def run_script(name: str, *argv: str, token: str | None = None) -> subprocess.CompletedProcess:
        environment = hub.environment(str(tmp_path / "hf"), token)
        return subprocess.run(
            [sys.executable, str(TRAINING / name), *argv],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run_script


@pytest.mark.slow
def test_train_publish_and_fine_tune(hub, script, tmp_path):
    result = script(
        "train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", "--hub_model_id", "me/digits", "--hub_token",
        "hf_writer", "--hub_private_repo", "--hub_strategy", "checkpoint", "--license", "mit",
        "--report_to", "tensorboard",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "The published model generates the same image" in result.stdout
    assert "HTTP Request" not in result.stderr
    repository = hub.repositories["me/digits"]
    assert repository.private
    assert [commit.message for commit in repository.commits[1:]] == ["Step 2", "Upload CFGPipeline"]
    files = hub.files("me/digits")
    assert files["unet/" + WEIGHTS] == (tmp_path / "out" / "unet" / WEIGHTS).read_bytes()
    card = files["README.md"].decode()
    for line in (
        "license: mit",
        "| dataset | scikit-learn's digits |",
        "| steps | 4 |",
        "| images | 1797 |",
        "samples.png",
    ):
        assert line in card
    assert not any("optimizer" in name or "checkpoint" in name or "logs" in name for name in files)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"hf_writer" not in path.read_bytes(), f"{path} contains the token"

    # Fine-tune the published model.
    result = script(
        "train_cfg.py", *SETTINGS, "--output_dir", "more", "--pretrained_model_name_or_path", "me/digits",
        "--push_to_hub", "--max_train_steps", "1", token="hf_writer",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "base_model: me/digits" in hub.files("me/more")["README.md"].decode()


@pytest.mark.slow
def test_publishing_fails_at_the_end_of_the_run(hub, script, tmp_path):
    hub.faults.append(Fault("POST .*/commit/", 0))
    result = script("train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", token="hf_writer")
    assert result.returncode == 75
    assert "the model is saved in out" in result.stderr
    command = "python training/publish.py out --repo_id me/out"
    assert command in result.stderr
    assert set(hub.files("me/out")) == {".gitattributes"}

    result = script("publish.py", *command.split()[2:], token="hf_writer")
    assert result.returncode == 0, result.stderr
    assert "me/out/commit/" in result.stdout
    assert hub.files("me/out")["unet/" + WEIGHTS] == (tmp_path / "out" / "unet" / WEIGHTS).read_bytes()

    result = script("publish.py", "nowhere", "--repo_id", "me/out", token="hf_writer")
    assert result.returncode == 75
    assert "publish.py: error: nowhere is not a saved pipeline" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("token", "message"), [("wrong", "does not accept the token"), ("hf_reader", "can only read")])
def test_invalid_token_raises_before_training(hub, script, tmp_path, token, message):
    result = script("train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", token=token)
    assert result.returncode == 1
    assert (
        f"train_cfg.py: error: --push_to_hub: The {'Hub' if token == 'wrong' else 'token'} {message}" in result.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dry_run_creates_no_repository(hub, script, tmp_path):
    argv = ["train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", "--dry_run"]
    result = script(*argv, token="hf_writer")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("repository     me/out\n")
    assert "me/out" not in hub.repositories
    assert not (tmp_path / "out").exists()
    assert script(*argv, token="wrong").returncode != 0


def test_token_is_not_saved(tmp_path):
    config = parse_config(CFGConfig, ["--hub_token", "hf_secret"])
    config.save(tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in repr(config)
    assert "hf_secret" not in json.dumps(config.public())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("me/model", "me/model"), ("gpt2", "gpt2"), ("./model", None), ("/a/b", None), ("a/b/c", None), (None, None)],
)
def test_only_hub_names_are_public(name, expected):
    assert public_name(name) == expected
