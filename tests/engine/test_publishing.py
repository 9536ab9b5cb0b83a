"""Test publishing a run, against a local server in place of the Hub."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

import diffusers_cfg.repository
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.naming import public_name
from diffusers_cfg.engine.publishing import NotPublished
from diffusers_cfg.engine.record import public_command, public_config
from diffusers_cfg.method_settings import CFGConfig
from tests.support.hub_client import HubClient
from tests.support.hub_server import Fault
from tests.support.runs import ONE_LEVEL, SETTINGS, TINY, TRAINING, WEIGHTS, train


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
    assert result.stdout.endswith("\npython training/demo.py --model out\n")
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
    assert "publish.py: error: The folder nowhere does not exist" in result.stderr


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


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["training/train_cfg.py", "--seed", "1"], "python training/train_cfg.py --seed 1"),
        (["/home/me/training/studies/x.py"], "python training/studies/x.py"),
        (
            ["./training/train_cfg.py", "--hub_token", "hf_secret", "--seed", "1"],
            "python training/train_cfg.py --seed 1",
        ),
        (
            ["training/train_cfg.py", "--hub-token=hf_secret", "--push_to_hub"],
            "python training/train_cfg.py --push_to_hub",
        ),
        (["training/x.py", "--train_data_dir", "/data/me/my cats"], "python training/x.py --train_data_dir 'my cats'"),
        (["training/x.py", "--output_dir=../runs/one"], "python training/x.py --output_dir=one"),
        (["training/x.py", "--config", "~/me/a.yaml"], "python training/x.py --config a.yaml"),
        (["training/x.py", "--dataset_name", "me/cats"], "python training/x.py --dataset_name me/cats"),
        (["training/x.py", "--ema_max_decay", ".9", "1e-3", "-5"], "python training/x.py --ema_max_decay .9 1e-3 -5"),
        (["/usr/lib/pytest/__main__.py", "-k", "x"], None),
        (["train_cfg.py", "--seed", "1"], None),
        ([""], None),
    ],
)
def test_recorded_command_has_no_secrets_and_no_local_paths(argv, expected):
    assert public_command(CFGConfig(), argv) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train_data_dir": "/data/me/cats"}, {"train_data_dir": "cats"}),
        ({"pretrained_model_name_or_path": "me/model"}, {"pretrained_model_name_or_path": "me/model"}),
        ({"pretrained_vae_model_name_or_path": "./vae"}, {"pretrained_vae_model_name_or_path": "vae"}),
        ({"ema_max_decay": [0.9, 0.99], "seed": 3}, {"ema_max_decay": [0.9, 0.99], "seed": 3}),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 2}, {"train_batch_size": 7}),
    ],
)
def test_recorded_settings_have_no_local_paths(settings, expected):
    recorded = public_config(
        CFGConfig(hub_token="hf_secret", output_dir="/home/me/out", cache_dir="/home/me", **settings)
    )
    assert expected.items() <= recorded.items()
    assert "/home" not in str(recorded)
    assert "secret" not in str(recorded)


def test_published_settings_repeat_the_run(trained_model, tmp_path):
    """The settings in `run.json` are those of the run, and `--config` accepts them."""
    record = json.loads((trained_model / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump(record["config"]))
    again = parse_config(CFGConfig, ["--config", str(tmp_path / "train_config.yaml")])
    assert public_config(again) == record["config"]
    assert record["config"]["conditioning_dropout_prob"] == 0.2


def test_token_is_not_saved(tmp_path):
    config = parse_config(CFGConfig, ["--hub_token", "hf_secret"])
    config.save(tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in repr(config)
    assert "hf_secret" not in json.dumps(config.public())


@pytest.mark.parametrize(
    ("argv", "file"),
    [
        (["--hub_tokn", "hf_secret"], None),
        (["--hub_token", "hf_other", "hf_secret"], None),
        (["--hub_token=hf_secret", "--resolution", "x"], None),
        ([], "hub_token: [hf_secret]"),
        ([], "hub_token: {token: hf_secret}"),
        ([], "hub_token: hf_secret: x"),
        ([], "hub_tokn: hf_secret"),
        ([], "hub_token: hf_secret\nresolution: x"),
    ],
)
def test_wrong_flags_and_files_do_not_print_the_token(tmp_path, capsys, argv, file):
    if file is not None:
        (tmp_path / "config.yaml").write_text(file)
        argv = ["--config", str(tmp_path / "config.yaml")]
    with pytest.raises((UserError, SystemExit)) as raised:
        parse_config(CFGConfig, argv)
    printed = "".join([str(raised.value), *capsys.readouterr()])
    assert "secret" not in printed
    assert len(printed) > 10


@pytest.mark.parametrize("fault", [Fault("POST .*/commit/", 400, times=9), Fault("PUT /lfs", 0, times=99)])
def test_failed_publishing_does_not_show_the_token(hub, tmp_path, monkeypatch, capfd, caplog, fault):
    """Look for the token in the output, in the logs and in all files of a run that cannot be published."""
    HubClient(monkeypatch, hub, str(tmp_path / "hf")).log_in(None)
    monkeypatch.setattr(diffusers_cfg.repository.time, "sleep", lambda _: None)
    hub.tokens["hf_secret"] = "write"
    argv = ["train_cfg.py", "--push_to_hub", "--hub_token=hf_secret", "--hub_strategy", "checkpoint"]
    monkeypatch.setattr(sys, "argv", ["training/train_cfg.py", *argv])
    hub.faults.append(fault)
    with pytest.raises(NotPublished, match="publish.py .* --repo_id me/out") as raised:
        train(tmp_path / "out", *ONE_LEVEL, *argv[1:], "--report_to", "tensorboard")
    assert "secret" not in "".join([str(raised.value), *capfd.readouterr(), caplog.text])
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("name", "expected"),
    [("me/model", "me/model"), ("gpt2", "gpt2"), ("./model", None), ("/a/b", None), ("a/b/c", None), (None, None)],
)
def test_only_hub_names_are_public(name, expected):
    assert public_name(name) == expected
