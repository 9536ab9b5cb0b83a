"""Test which settings a resumed run may change, and that the changes are recorded."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_cfg.config import UserError
from diffusers_cfg.engine.checkpoint import (
    CHECKSUMS,
    STATE_FILE,
    find_checkpoint,
    verify_checkpoint,
    write_checksums,
)
from diffusers_cfg.method_settings import CFGConfig, DistillationConfig
from diffusers_cfg.model_files import checkpoints
from tests.support import runs
from tests.support.models import make_pipeline, make_unet
from tests.support.runs import ONE_LEVEL, WEIGHTS, assert_same_tensors, distill
from tests.support.toys import Unlabelled

RESUME = ["--resume_from_checkpoint", "checkpoint-2"]


def train(output_dir: Path, *argv: str, **settings: Any) -> None:
    runs.train(output_dir, *ONE_LEVEL, *argv, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the output folder of a finished run, which tests only read."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train(folder)
    return folder


@pytest.fixture
def checkpoint(run) -> Path:
    """Return a checkpoint of the finished run."""
    return run / "checkpoint-2"


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """Return a copy of the finished run to resume."""
    return Path(shutil.copytree(run, tmp_path / "out"))


def run_record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("config", [CFGConfig, DistillationConfig])
def test_every_setting_declares_whether_a_resumed_run_may_change_it(config):
    assert {s.name for s in fields(config) if s.metadata.get("on_resume") not in ("fixed", "recorded", "free")} == set()


# A different value for every fixed setting
CHANGED = {
    "train_val_split": "0.1",
    "streaming": None,  # needs a different dataset
    "shuffle_buffer_size": None,
    "stack": None,  # needs a method without labels, tested in tests/methods/test_ddgan_runs.py
    "resolution": "16",
    "block_out_channels": "16",
    "layers_per_block": "2",
    "attention_resolutions": "8",
    "dropout": "0.1",
    "use_ema": None,  # a flag without a value, tested below
    "ema_max_decay": "0.5",
    "seed": "5",
    "prediction_type": "epsilon",
    "log_snr_min": "-5",
    "log_snr_max": "5",
    "max_guidance_scale": "3.0",
    "optimizer": "adamw",
    "posthoc_ema_steps": "10",
}


def test_all_fixed_settings_are_tested():
    assert CHANGED.keys() == {s.name for s in fields(CFGConfig) if s.metadata["on_resume"] == "fixed"}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in CHANGED.items() if value is not None])
def test_fixed_settings_cannot_change(copy, name, value):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"--{name} was .* and is \[?'?{value}.*different --output_dir"):
        train(copy, *RESUME, f"--{name}", value)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_use_ema_cannot_change(copy, dry_run):
    with pytest.raises(UserError, match="--use_ema was True and is False"):
        train(copy, *RESUME, "--no_use_ema", *dry_run)


@pytest.mark.parametrize(
    ("flags", "name", "values"),
    [
        (["--learning_rate", "1e-2"], "learning_rate", [1e-3, 1e-2]),
        (["--lr_scheduler", "constant"], "lr_scheduler", ["cosine", "constant"]),
        (["--max_train_steps", "6"], "max_train_steps", [4, 6]),
        (["--lr_warmup_steps", "0"], "lr_warmup_steps", [1, 0]),
        (["--adam_beta1", "0.5"], "adam_beta1", [0.9, 0.5]),
        (["--adam_weight_decay", "0.5"], "adam_weight_decay", [0.0, 0.5]),
        (["--max_grad_norm", "1e-3"], "max_grad_norm", [1.0, 1e-3]),
        (["--ema_power", "0.1"], "ema_power", [0.75, 0.1]),
        (["--random_flip"], "random_flip", [False, True]),
        (["--adam_beta2", "0.5"], "adam_beta2", [0.999, 0.5]),
        (["--adam_epsilon", "1e-2"], "adam_epsilon", [1e-8, 1e-2]),
        (["--ema_inv_gamma", "9"], "ema_inv_gamma", [1.0, 9.0]),
        (["--conditioning_dropout_prob", "0.5"], "conditioning_dropout_prob", [0.1, 0.5]),
    ],
)
def test_recorded_settings_take_effect_and_are_recorded(run, copy, caplog, flags, name, values):
    train(copy, *RESUME, *flags)
    assert f"{name} was {values[0]!r} and is {values[1]!r}" in caplog.text
    assert run_record(copy)["history"] == [{"from_step": 2, name: values}]
    changed = [
        not torch.equal(a, b)
        for a, b in zip(*(load_file(folder / "unet" / WEIGHTS).values() for folder in (run, copy)), strict=True)
    ]
    assert any(changed)


def test_history_lists_the_changes_of_every_resumed_run(copy):
    train(copy, *RESUME, "--adam_beta1", "0.5", "--max_train_steps", "3")
    train(copy, "--adam_beta1", "0.5", "--resume_from_checkpoint", "latest", "--max_train_steps", "4")
    first = {"from_step": 2, "adam_beta1": [0.9, 0.5], "max_train_steps": [4, 3]}
    assert run_record(copy)["history"] == [first, {"from_step": 3, "max_train_steps": [3, 4]}]


def test_a_changed_learning_rate_applies_from_the_next_step(tmp_path):
    """With a constant learning rate, ten times the rate gives ten times the step."""
    flags = ["--lr_scheduler", "constant", "--no_use_ema", "--max_train_steps", "3", "--checkpointing_steps", "2"]
    train(tmp_path / "slow", *flags)
    steps = {}
    for name, rate in (("same", "1e-3"), ("tenfold", "1e-2")):
        shutil.copytree(tmp_path / "slow" / "checkpoint-2", tmp_path / name / "checkpoint-2")
        train(tmp_path / name, *flags, *RESUME, "--learning_rate", rate)
        before, after = (load_file(tmp_path / name / part / WEIGHTS) for part in ("checkpoint-2/unet", "unet"))
        steps[name] = after["conv_in.weight"] - before["conv_in.weight"]
    torch.testing.assert_close(steps["tenfold"], 10 * steps["same"], rtol=1e-3, atol=1e-6)
    assert_same_tensors(tmp_path / "slow" / "unet" / WEIGHTS, tmp_path / "same" / "unet" / WEIGHTS)


def test_changes_of_free_settings_are_not_logged(copy, caplog):
    train(copy, *RESUME, "--logging_steps", "3", "--checkpoints_total_limit", "8", "--validation_guidance_scales", "2")
    assert "the settings differ" not in caplog.text
    assert "history" not in run_record(copy)


def save_photos(folder: Path, names: list[str], number: int) -> str:
    """Save a number of random images in a folder for each class, and return the path."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


def test_changed_classes_raise_and_added_images_are_recorded(tmp_path, caplog):
    photos, flags = tmp_path / "photos", ["--resolution", "8", "--cache_dir", str(tmp_path / "cache")]
    data = ["--train_data_dir", save_photos(photos, ["cat", "dog"], 8), *flags]
    train(tmp_path / "out", *data)
    save_photos(photos, ["cat", "dog"], 10)
    train(tmp_path / "out", *data, *RESUME)
    assert "data.num_images was 16 and is 20" in caplog.text
    assert "data.fingerprint was" in caplog.text
    history = run_record(tmp_path / "out")["history"]
    assert history[0]["data.num_images"] == [16, 20]
    # The folder may move.
    photos.rename(tmp_path / "moved")
    train(tmp_path / "out", "--train_data_dir", str(tmp_path / "moved"), *flags, *RESUME)
    history = run_record(tmp_path / "out")["history"]
    assert history[-1]["train_data_dir"] == ["photos", "moved"]  # without paths of this machine
    (tmp_path / "moved" / "cat").rename(tmp_path / "moved" / "zebra")
    with pytest.raises(UserError, match=r"classes of the data was \['cat', 'dog'\] and is \['dog', 'zebra'\]"):
        train(tmp_path / "out", "--train_data_dir", str(tmp_path / "moved"), *flags, *RESUME)


def test_changed_noise_process_of_a_pretrained_model_raises(tmp_path):
    for name, end in (("base", -20.0), ("other", -10.0)):
        pipeline = make_pipeline(make_unet(), type(make_pipeline().scheduler)(log_snr_min=end))
        pipeline.save_pretrained(tmp_path / name)
    runs.train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "base"))
    with pytest.raises(UserError, match="log_snr_min of the method was -20.0 and is -10.0"):
        runs.train(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "other"), *RESUME)


def test_changed_network_config_raises(tmp_path):
    settings = {
        "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    }  # fmt: skip
    flags = ["--model_config_name_or_path", str(tmp_path / "network.json")]
    (tmp_path / "network.json").write_text(json.dumps(settings))

    def train_from_file(*argv: str) -> None:
        runs.reset_accelerate()
        config = runs.parse_config(CFGConfig, [*runs.SETTINGS, *flags, "--output_dir", str(tmp_path / "out"), *argv])
        runs.Trainer(config, runs.ClassifierFreeGuidance).run()

    train_from_file()
    (tmp_path / "network.json").write_text(json.dumps({**settings, "layers_per_block": 2}))
    with pytest.raises(UserError, match="layers_per_block of the unet was 1 and is 2"):
        train_from_file(*RESUME)


def test_changed_method_raises(copy):
    with pytest.raises(UserError, match="name of the method was 'ClassifierFreeGuidance' and is 'Unlabelled'"):
        train(copy, *RESUME, method=Unlabelled)


def test_fixed_settings_of_a_student_cannot_change(trained_model, tmp_path):
    distill(trained_model, tmp_path / "out", "--max_guidance_scale", "3")
    with pytest.raises(UserError, match=r"--max_guidance_scale was 3.0 and is 2.0"):
        distill(trained_model, tmp_path / "out", "--max_guidance_scale", "2", *RESUME)


def change_state(folder: Path, **values) -> None:
    record = json.loads((folder / STATE_FILE).read_text())
    record.update(values)
    (folder / STATE_FILE).write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))
    update_checksums(folder)


def update_checksums(folder: Path) -> None:
    """Recompute the checksums of a checkpoint."""
    (folder / CHECKSUMS).unlink()
    write_checksums(folder)


@pytest.mark.parametrize(("format", "age"), [(..., "an older"), (3, "a newer")])
def test_checkpoint_with_a_different_layout_raises(copy, format, age):
    change_state(copy / "checkpoint-2", format=format)
    with pytest.raises(UserError, match=f"checkpoint-2 was written by {age} version.*--pretrained_model_name_or_path"):
        train(copy, *RESUME)


def test_settings_unknown_to_one_version_are_ignored_with_a_warning(copy, caplog):
    record = json.loads((copy / "checkpoint-2" / STATE_FILE).read_text())
    settings = {**record["settings"], "setting_of_a_later_version": 3}
    del settings["adam_beta1"]
    change_state(copy / "checkpoint-2", settings=settings)
    train(copy, *RESUME)
    assert "has settings of a newer version, which are ignored: setting_of_a_later_version" in caplog.text
    assert "history" not in run_record(copy)


def keep_moments(kept: Callable[[int, str], bool]) -> Callable[[Path], None]:
    """Return a function that deletes the moments of a checkpoint for whose index and name `kept` is false."""

    def change(folder: Path) -> None:
        path = folder / "optimizer-unet.safetensors"
        moments = load_file(path)
        save_file({name: moments[name] for i, name in enumerate(sorted(moments)) if kept(i, name)}, path)

    return change


def with_entry(name: str, value: Any) -> Callable[[Path], None]:
    """Return a function that replaces an entry of `state.json`, such as "data.class_names". `...` deletes it."""

    def change(folder: Path) -> None:
        record = json.loads((folder / STATE_FILE).read_text())
        *parents, last = name.split(".")
        parent = record
        for key in parents:
            parent = parent[key]
        parent[last] = value
        if value is ...:
            del parent[last]
        (folder / STATE_FILE).write_text(json.dumps(record))

    return change


@pytest.mark.parametrize(
    ("change", "damage"),
    [
        (keep_moments(lambda *_: False), "has 0 moments of 0 parameters, but"),
        (keep_moments(lambda i, _: i < 30), "has 30 moments of 13 parameters, but"),
        (keep_moments(lambda i, _: i % 2 == 1), r"has \d+ moments of \d+ parameters, but"),
        (keep_moments(lambda _, name: not name.endswith("exp_avg_sq")), r"has \d+ moments of \d+ parameters, but"),
        (lambda folder: (folder / "optimizer-unet.safetensors").unlink(), "optimizer-unet.safetensors"),
        (lambda folder: (folder / "optimizer-unet.safetensors").write_bytes(b""), "header"),
        (lambda folder: (folder / "unet" / WEIGHTS).unlink(), f"unet/{WEIGHTS} is missing"),
        (lambda folder: (folder / "unet_ema" / WEIGHTS).unlink(), f"unet_ema/{WEIGHTS} is missing"),
        (lambda folder: (folder / STATE_FILE).write_text("[]"), "list"),
        (lambda folder: (folder / STATE_FILE).write_text("{"), "Expecting"),
        (lambda folder: (folder / STATE_FILE).unlink(), "does not list state.json"),
        (with_entry("step", -5), "step in state.json is -5"),
        (with_entry("step", "x"), "step in state.json is 'x'"),
        (with_entry("step", True), "step in state.json is True"),
        (with_entry("step", 2.5), "step in state.json is 2.5"),
        (with_entry("step", ...), "lacks 'step'"),
        (with_entry("batch_size", 0), "batch_size in state.json is 0"),
        (with_entry("num_processes", None), "num_processes in state.json is None"),
        (with_entry("seconds", float("nan")), "seconds in state.json is nan"),
        (with_entry("settings", ...), "lacks 'settings'"),
        (with_entry("settings", {}), r"settings in state.json is \{\}"),
        (with_entry("data", []), r"data in state.json is \[\]"),
        (with_entry("data.class_names", ...), "lacks 'class_names'"),
        (with_entry("identity.method", ...), "lacks 'method'"),
        (with_entry("optimizers", {}), r"optimizers in state.json is \{\}"),
        (with_entry("optimizers", {"other": 3}), "lacks 'unet'"),
        (with_entry("history", ...), "lacks 'history'"),
        (with_entry("history", "x"), "history in state.json is 'x'"),
        (with_entry("stream", ...), "lacks 'stream'"),
        (with_entry("stream", [1]), r"stream in state.json is \[1\]"),
        (with_entry("scaler", 3), "scaler in state.json is 3"),
    ],
)
def test_checkpoint_without_all_of_its_state_is_no_checkpoint(checkpoint, tmp_path, caplog, change, damage):
    for step in (2, 4):
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
    change(tmp_path / "checkpoint-4")
    update_checksums(tmp_path / "checkpoint-4")
    assert re.search(damage, str(verify_checkpoint(tmp_path / "checkpoint-4")))
    flags = {"output_dir": str(tmp_path), "resolution": 8, "block_out_channels": [8]}
    found = find_checkpoint(CFGConfig(resume_from_checkpoint="latest", **flags))
    assert found is not None
    assert found.path.name == "checkpoint-2"
    assert "checkpoint-4 is damaged (" in caplog.text
    with pytest.raises(UserError, match="checkpoint-4 (is damaged|does not exist)"):
        find_checkpoint(CFGConfig(resume_from_checkpoint="checkpoint-4", **flags))


@pytest.mark.parametrize(
    "checksums", ["{}", "[]", "null", "3", '"state.json"', "", '{"state.json": 3}', '["state.json"]']
)
def test_wrong_checksums_are_damage(checkpoint, tmp_path, checksums):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    assert verify_checkpoint(folder) is None
    (folder / CHECKSUMS).write_text(checksums)
    assert verify_checkpoint(folder) is not None


def test_resuming_an_older_checkpoint_renames_newer_ones(copy, caplog):
    """Renamed checkpoints are neither resumed by `latest` nor deleted."""
    flags = ["--learning_rate", "5e-4", "--max_train_steps", "3", "--checkpoints_total_limit", "1"]
    train(copy, *RESUME, *flags)
    assert "checkpoint-4 is newer than the resumed checkpoint and was renamed to old-checkpoint-4" in caplog.text
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-3"]
    assert (copy / "old-checkpoint-4" / STATE_FILE).is_file()
    train(copy, *flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "4")
    assert run_record(copy)["steps"] == 4
    assert run_record(copy)["history"][0] == {
        "from_step": 2, "max_train_steps": [4, 3], "learning_rate": [1e-3, 5e-4],
    }  # fmt: skip


def test_resuming_beyond_the_length_of_the_run_raises(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="checkpoint-4 is from step 4, but the run has only 3 steps. Raise --max_train"):
        train(copy, "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    # A finished run takes no step with the changed setting, which is not recorded.
    train(copy, "--resume_from_checkpoint", "latest", "--learning_rate", "0.5")
    assert "history" not in run_record(copy)


def test_overwrite_output_dir_does_not_delete_a_resumed_run(copy):
    flags = ["--resume_from_checkpoint", "latest", "--overwrite_output_dir"]
    train(copy, *flags)
    assert (copy / "checkpoint-2").is_dir()
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(copy / name)
    (copy / "samples" / "step-9.png").write_bytes(b"from the previous run")
    train(copy, *flags)
    assert not (copy / "samples" / "step-9.png").exists()
