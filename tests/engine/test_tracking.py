"""Test trackers: names, images, one curve over resumed runs, and failures, with stand-ins for their libraries."""

import time
import types
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from diffusers_cfg.config import UserError
from diffusers_cfg.engine import tracking
from diffusers_cfg.engine.tracking import SEND_IMAGE, init_arguments, tracker_names
from tests.support import runs
from tests.support.runs import ONE_LEVEL, events, scalars

Trackio = namedtuple("Trackio", "Image")


def train(output_dir: Path, *argv: str) -> None:
    runs.train(output_dir, *ONE_LEVEL, *argv)


class FakeTracker(GeneralTracker):
    """A tracker that records its calls, which all of its kind share."""

    name = "trackio"
    requires_logging_directory = False
    tracker: Any = None
    calls: ClassVar[list[tuple[str, Any]]] = []
    fails_at: ClassVar[str | None] = None

    def __init__(self, project: str, **arguments: Any):
        super().__init__()
        self.record("init", {"project": project, **arguments})
        self.tracker = types.SimpleNamespace(name=arguments["name"], id=arguments.get("id"))

    def record(self, call: str, value: Any) -> None:
        self.calls.append((call, value))
        if self.fails_at == call:
            raise ConnectionError(f"{call} failed")

    def start(self):
        self.record("start", None)

    def store_init_configuration(self, values):
        self.record("config", values)

    def log(self, values, step, **_):
        self.record("log", (step, values))

    def finish(self):
        self.record("finish", None)


class FakeWandB(FakeTracker):
    name = "wandb"

    def log_images(self, values, step, **_):
        self.record("images", (step, values))


class FakeDVCLive(FakeTracker):
    """A tracker of which the engine knows no way to send images."""

    name = "dvclive"

    def __init__(self, project: str):
        super().__init__(project, name="dvclive")


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[tuple[str, Any]]]:
    """Put the stand-ins in place of accelerate's trackers, and return the list of calls."""
    FakeTracker.calls.clear()
    for tracker in (FakeTracker, FakeWandB, FakeDVCLive):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, tracker.name, tracker)
    monkeypatch.setattr(tracking, "library", lambda _: Trackio(lambda image: ("trackio.Image", image.size)))
    available = [LoggerType(name) for name in ("tensorboard", "trackio", "wandb", "dvclive")]
    monkeypatch.setattr(accelerate_tracking, "get_available_trackers", lambda: available)
    yield FakeTracker.calls
    FakeTracker.fails_at = None


def named(calls: list[tuple[str, Any]], name: str) -> list[Any]:
    return [value for call, value in calls if call == name]


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ("none", []),
        ("tensorboard", ["tensorboard"]),
        ("tensorboard,wandb", ["tensorboard", "wandb"]),
        ("tensorboard, trackio", ["tensorboard", "trackio"]),
        ("all", ["all"]),
    ],
)
def test_tracker_names(report_to, expected):
    assert [str(name) for name in tracker_names(report_to)] == expected


@pytest.mark.parametrize(
    "report_to", ["", "tensorbord", "tensorboard,", "tensorboard,foo", "tensorboard wandb", "none,wandb"]
)
def test_unknown_trackers_raise(report_to, tmp_path):
    with pytest.raises(UserError, match=r"is not a tracker. Use all, .*tensorboard, .* or none"):
        tracker_names(report_to)


@pytest.mark.parametrize(
    ("name", "new", "resumed"),
    [
        ("tensorboard", {}, {"purge_step": 5}),
        ("wandb", {"name": "out", "resume": "allow"}, {"name": "out", "id": "run-1", "resume": "allow"}),
        ("trackio", {"name": "out", "resume": "never"}, {"name": "run-1", "resume": "allow"}),
        ("mlflow", {"run_name": "out", "run_id": None}, {"run_name": "out", "run_id": "run-1"}),
        ("swanlab", {"experiment_name": "out"}, {"experiment_name": "out", "id": "run-1", "resume": "allow"}),
        ("comet_ml", {"experiment_key": None}, {"experiment_key": "run-1"}),
        ("aim", {"run_hash": None}, {"run_hash": "run-1"}),
        ("clearml", {"task_name": "out", "continue_last_task": False}, {"continue_last_task": "run-1"}),
    ],
)
def test_arguments_name_a_new_run_and_resume_an_old_one(name, new, resumed):
    assert new.items() <= init_arguments("out", {}, 0)[name].items()
    assert resumed.items() <= init_arguments("out", {name: "run-1"}, 4)[name].items()


def test_two_new_runs_have_different_ids():
    assert init_arguments("out", {}, 0)["wandb"]["id"] != init_arguments("out", {}, 0)["wandb"]["id"]


def test_trackers_get_names_losses_and_images(tmp_path, calls):
    flags = ["--tracker_project_name", "digits", "--run_name", "first"]
    train(tmp_path / "out", "--report_to", "tensorboard,trackio,wandb", *flags)
    (trackio, wandb) = named(calls, "init")
    assert trackio == {"project": "digits", "name": "first", "resume": "never"}
    assert (wandb["project"], wandb["name"]) == ("digits", "first")
    assert {step for step, values in named(calls, "log") if "loss" in values} == {1, 2, 3, 4}
    assert [step for step, values in named(calls, "log") if values.get("samples", ("", 0))[0] == "trackio.Image"] == [4]
    ((step, images),) = named(calls, "images")
    assert (step, len(images["samples"])) == (4, 1)
    assert len(named(calls, "finish")) == 2
    assert (tmp_path / "out" / "logs" / "digits").is_dir()


def test_run_is_named_after_the_folder_and_continues_its_curve(tmp_path, calls):
    flags = ["--report_to", "trackio,wandb"]
    train(tmp_path / "out", *flags, "--max_train_steps", "2")
    new = named(calls, "init")
    assert [arguments["name"] for arguments in new] == ["out", "out"]
    assert len(named(calls, "config")) == 2
    calls.clear()
    train(tmp_path / "out", *flags, "--resume_from_checkpoint", "latest", "--run_name", "other")
    resumed = named(calls, "init")
    assert [arguments["resume"] for arguments in resumed] == ["allow", "allow"]
    assert (resumed[0]["name"], resumed[1]["id"]) == ("out", new[1]["id"])
    assert {step for step, values in named(calls, "log") if "loss" in values} == {3, 4}
    calls.clear()
    train(tmp_path / "out", *flags, "--overwrite_output_dir")
    again = named(calls, "init")
    assert (again[0]["resume"], again[1]["id"] == new[1]["id"]) == ("never", False)


def test_tensorboard_shows_one_curve_after_a_kill(tmp_path):
    """The killed run has logged steps 3 and 4 after its checkpoint of step 2, and the resumed run logs them again."""
    flags = ["--report_to", "tensorboard", "--learning_rate", "1e-3"]
    train(tmp_path / "out", *flags)
    time.sleep(1)  # TensorBoard orders files by their names, which have the time in seconds.
    train(tmp_path / "out", *flags, "--resume_from_checkpoint", "checkpoint-2", "--max_train_steps", "5")
    assert [step for step, _ in scalars(tmp_path / "out")["loss"]] == [1, 2, 3, 4, 5]
    assert [event.step for event in events(tmp_path / "out").Images("samples")] == [5]


def test_tracker_without_images_is_named_once(tmp_path, calls, caplog):
    train(tmp_path / "out", "--report_to", "dvclive", "--validation_steps", "1", "--max_train_steps", "2")
    assert caplog.text.count("dvclive gets no images or tables, which are in") == 1


@pytest.mark.parametrize("name", [str(name) for name in LoggerType if name != LoggerType.ALL])
def test_every_tracker_of_accelerate_gets_images_or_is_known_not_to(name):
    assert (name in SEND_IMAGE) != (name == "dvclive")


@pytest.mark.parametrize(("fails_at", "message"), [("init", "init failed"), ("start", "start failed")])
def test_tracker_that_does_not_start_raises(tmp_path, calls, monkeypatch, fails_at, message):
    monkeypatch.setattr(FakeTracker, "fails_at", fails_at)
    with pytest.raises(UserError, match=f"--report_to trackio cannot be started: {message}.*--report_to none"):
        train(tmp_path / "out", "--report_to", "trackio")


@pytest.mark.parametrize("fails_at", ["log", "finish"])
def test_failing_tracker_does_not_end_the_run(tmp_path, calls, monkeypatch, caplog, fails_at):
    monkeypatch.setattr(FakeTracker, "fails_at", fails_at)
    train(tmp_path / "out", "--report_to", "trackio,tensorboard")
    assert f"trackio failed and gets no more values of this run: {fails_at} failed" in caplog.text
    assert len(named(calls, fails_at)) == 1
    assert [step for step, _ in scalars(tmp_path / "out")["loss"]] == [1, 2, 3, 4]
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_samples_that_cannot_be_saved_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "save_image", full)
    train(tmp_path / "out")
    assert "Failed to save the samples of step 4: [Errno 28] No space left on device" in caplog.text
    assert (Path(tmp_path) / "out" / "model_index.json").is_file()
