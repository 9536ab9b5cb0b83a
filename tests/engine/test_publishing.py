"""From a training run to the Hub and on from there, against the stand-in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.settings import CFGConfig
from tests.support.models import make_pipeline, make_unet
from diffusers_cfg.data.sources import LabelledImages
from tests.support.hub_server import Fault
from diffusers_cfg.methods.networks import build_pipeline, replace_classes
from diffusers_cfg.data.naming import public_name
from test_train import SETTINGS, TINY, WEIGHTS, train

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture
def script(hub, tmp_path):
    """Run a training script in an environment that knows the stand-in only."""

    def run_script(name: str, *argv: str, token: str | None = None) -> subprocess.CompletedProcess:
        environment = hub.environment(str(tmp_path / "hf"), token)
        return subprocess.run(
            [sys.executable, str(TRAINING / name), *argv],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run_script


@pytest.mark.slow
def test_train_publish_and_go_on(hub, script, tmp_path):
    result = script(
        "train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", "--hub_model_id", "me/digits", "--hub_token",
        "hf_writer", "--hub_private_repo", "--hub_strategy", "checkpoint", "--license", "mit",
        "--report_to", "tensorboard",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "checked that it draws the same image" in result.stdout
    repository = hub.repositories["me/digits"]
    assert repository.private
    assert [commit.message for commit in repository.commits[1:]] == ["Step 2", "Upload CFGPipeline"]
    files = hub.files("me/digits")
    assert files["unet/" + WEIGHTS] == (tmp_path / "out" / "unet" / WEIGHTS).read_bytes()
    card = files["README.md"].decode()
    for line in (
        "license: mit",
        "| data | scikit-learn's digits |",
        "| steps | 4 |",
        "| images | 1797 |",
        "samples.png",
    ):
        assert line in card
    assert not any("optimizer" in name or "checkpoint" in name or "logs" in name for name in files)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"hf_writer" not in path.read_bytes(), f"{path} holds the token"

    # Fine-tune what was published
    result = script(
        "train_cfg.py", *SETTINGS, "--output_dir", "more", "--pretrained_model_name_or_path", "me/digits",
        "--push_to_hub", "--max_train_steps", "1", token="hf_writer",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "base_model: me/digits" in hub.files("me/more")["README.md"].decode()


@pytest.mark.slow
def test_a_network_that_goes_down_at_the_end(hub, script, tmp_path):
    hub.faults.append(Fault("POST .*/commit/", 0))
    result = script("train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", token="hf_writer")
    assert result.returncode == 75
    assert "its model is safe in out" in result.stderr
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
def test_a_wrong_token_fails_before_training(hub, script, tmp_path, token, message):
    result = script("train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", token=token)
    assert result.returncode == 1
    assert (
        f"train_cfg.py: error: --push_to_hub: The {'Hub' if token == 'wrong' else 'token'} {message}" in result.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_makes_no_repository(hub, script, tmp_path):
    argv = ["train_cfg.py", *TINY, "--output_dir", "out", "--push_to_hub", "--dry_run"]
    result = script(*argv, token="hf_writer")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("published as   me/out\n")
    assert "me/out" not in hub.repositories
    assert not (tmp_path / "out").exists()
    assert script(*argv, token="wrong").returncode != 0


def test_the_token_is_not_written_down(tmp_path):
    config = parse_config(CFGConfig, ["--hub_token", "hf_secret"])
    config.save(tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in repr(config)
    assert "hf_secret" not in json.dumps(config.public())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("me/model", "me/model"), ("gpt2", "gpt2"), ("./model", None), ("/a/b", None), ("a/b/c", None), (None, None)],
)
def test_only_names_of_the_hub_are_public(name, expected):
    assert public_name(name) == expected


# ----- going on from a pipeline -----


def test_classes_of_the_same_name_keep_their_rows():
    unet = make_unet()
    before = unet.class_embedding.weight.detach().clone()
    replace_classes(unet, {0: "zero", 1: "one", 2: "two"}, {0: "two", 1: "ten", 2: "zero", 3: "eel"})
    assert torch.equal(unet.class_embedding.weight, before[[2, 3, 0, 3, 3]])
    assert (unet.num_classes, unet.null_class_label) == (4, 4)
    assert unet.class_embedding.weight.requires_grad


def test_the_same_classes_stay(caplog):
    unet = make_unet()
    weight = unet.class_embedding.weight
    replace_classes(unet, {0: "zero", 1: "one", 2: "two"}, {0: "zero", 1: "one", 2: "two"})
    assert unet.class_embedding.weight is weight
    assert caplog.text == ""


def test_a_run_goes_on_from_a_pipeline(tmp_path, caplog):
    make_pipeline(make_unet()).save_pretrained(tmp_path / "base")
    train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"), "--learning_rate", "1e-9")
    assert "3 classes were replaced by the 10 of the data: 3 of the same name keep their rows" in caplog.text
    from diffusers_cfg import CFGPipeline

    old, new = (CFGPipeline.from_pretrained(tmp_path / name).unet for name in ("base", "out"))
    torch.testing.assert_close(new.conv_in.weight, old.conv_in.weight, rtol=0, atol=1e-6)
    rows = old.class_embedding.weight[[0, 1, 2, *([3] * 8)]]
    torch.testing.assert_close(new.class_embedding.weight, rows, rtol=0, atol=1e-6)
    assert "base_model" not in json.loads((tmp_path / "out" / "run.json").read_text())
    # And it resumes as any other
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base")]
    train(tmp_path / "out", *base, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_unnamed_classes_are_taken_in_order(caplog):
    unet = make_unet()
    weight = unet.class_embedding.weight
    replace_classes(unet, {}, {0: "a", 1: "b", 2: "c"})
    assert unet.class_embedding.weight is weight
    assert "have no names" in caplog.text


def test_a_pipeline_of_another_process_is_refused(tmp_path):
    pipeline = make_pipeline(make_unet(), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="has a DDIMScheduler that was not made from a LogSNRScheduler"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all cannot be loaded"),
        ({"pretrained_model_name_or_path": "a", "model_config_name_or_path": "b"}, "brings its own network"),
    ],
)
def test_what_cannot_be_gone_on_from_is_named(settings, message):
    class Images(LabelledImages):
        def __init__(self):
            pass

    with pytest.raises(ValueError, match=message):
        build_pipeline(CFGConfig(**settings), Images())


def test_a_resolution_that_the_pipeline_cannot_halve(tmp_path):
    make_pipeline(make_unet()).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="9×9, which cannot be halved 1 times"):
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"), "--resolution", "9")
    assert not (tmp_path / "out").exists()
