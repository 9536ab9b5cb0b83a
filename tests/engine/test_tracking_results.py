"""Test that curves, tables and images reach each tracker: accelerate's own class of it, with an imitated library."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_cfg.engine.accelerator import make_accelerator
from diffusers_cfg.engine.tracking import SEND_IMAGE, SEND_TABLE, Table, Trackers
from diffusers_cfg.settings import TrainConfig
from tests.support.runs import reset_accelerate
from tests.support.trackers import LIBRARIES, Calls

# Out of order in neither w nor steps, with a w below 0, which no tracker may lose
CURVES = [
    {"run/w": -1.0, "run/distance": 5.0},
    {"run/w": 0.25, "run/distance": 3.0},
    {"run/w": 3.0, "run/distance": 4.0},
]
W, DISTANCES = [-1.0, 0.25, 3.0], [5.0, 3.0, 4.0]
COLUMNS, ROWS = ["w", "distance", "evaluations"], [["-1", 5.0, 2], ["real", 0.5, None]]
TABLE = Table(COLUMNS, ROWS, "| w | distance |\n| --- | --- |\n| real | 0.5 |")
# A figure of matplotlib has an alpha channel
IMAGE = Image.fromarray(np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4), "RGBA")


def report(folder: Path, name: str) -> Trackers:
    """Send curves, a table, an image and a value to a tracker."""
    reset_accelerate()
    config = TrainConfig(
        output_dir=str(folder), report_to=name, tracker_project_name="digits", run_name="first", resolution=8
    )
    trackers = Trackers(config, make_accelerator(config), config.public())
    trackers.start()
    trackers.log_curves("run/w", CURVES)
    trackers.log_table("run/table", TABLE, 2)
    trackers.log_image("run/grid", IMAGE, 2)
    trackers.log({"recall/w=0.5": 0.75}, 3)
    trackers.finish()
    return trackers


@pytest.fixture
def calls(request, monkeypatch) -> Calls:
    """Put a stand-in in the place of a library, and return the list of its calls."""
    name, calls = request.param, []
    monkeypatch.setitem(sys.modules, name, LIBRARIES[name](calls))
    monkeypatch.setattr(accelerate_tracking, "get_available_trackers", lambda: [LoggerType(name)])
    return calls


def values(calls: Calls, name: str) -> list[tuple[int, Any]]:
    """Return the logged values of a name with their steps."""
    return [(step, logged[name]) for kind, (step, logged) in named(calls, "log") if name in logged]


def named(calls: Calls, *kinds: str) -> Calls:
    return [(kind, value) for kind, value in calls if kind in kinds]


@pytest.mark.parametrize(("calls", "name"), [(name, name) for name in LIBRARIES], indirect=["calls"])
def test_run_has_its_name_in_its_project_and_is_finished(calls, name, tmp_path):
    trackers = report(tmp_path, name)
    assert named(calls, "init") == [("init", ("digits", "first"))]
    assert len(named(calls, "finish")) == 1
    assert [tracker.name for tracker in trackers.accelerator.trackers] == [name]  # none has failed
    assert values(calls, "recall/w_0.5") == [(3, 0.75)]


@pytest.mark.parametrize(("calls", "name"), [("wandb", "wandb"), ("swanlab", "swanlab")], indirect=["calls"])
def test_trackers_that_know_other_axes_draw_curves_over_w(calls, name, tmp_path):
    report(tmp_path, name)
    assert named(calls, "define_metric") == [("define_metric", ("run/distance", "run/w"))]
    assert calls.index(("define_metric", ("run/distance", "run/w"))) < calls.index(named(calls, "log")[0])
    assert values(calls, "run/w") == list(enumerate(W))
    assert values(calls, "run/distance") == list(enumerate(DISTANCES))
    ((step, table),) = values(calls, "run/table")
    assert (step, table.columns, table.data) == (2, COLUMNS, ROWS)
    ((step, (image,)),) = values(calls, "run/grid")
    assert (step, image.content.size) == (2, (4, 6))


@pytest.mark.parametrize(("calls", "name"), [("comet_ml", "comet_ml"), ("clearml", "clearml")], indirect=["calls"])
def test_trackers_with_plots_draw_curves_over_w(calls, name, tmp_path):
    report(tmp_path, name)
    assert named(calls, "curve") == [("curve", ("run/distance", W, DISTANCES))]
    assert values(calls, "run/distance") == list(enumerate(DISTANCES))
    ((_, (file, columns, rows)),) = named(calls, "table")
    assert (file.removesuffix(".csv"), columns, rows) == ("run/table", COLUMNS, ROWS)
    assert named(calls, "image") == [("image", ("run/grid", 2))]


@pytest.mark.parametrize("calls", ["mlflow"], indirect=True)
def test_steps_of_mlflow_are_hundredths_of_w(calls, tmp_path):
    report(tmp_path, "mlflow")
    assert values(calls, "run/distance") == [(-100, 5.0), (25, 3.0), (300, 4.0)]
    assert named(calls, "table") == [("table", ("run/table.json", COLUMNS, ROWS))]
    assert named(calls, "image") == [("image", ("run/grid", 2))]


def test_tensorboard_shows_the_last_of_two_reports(tmp_path):
    report(tmp_path, "tensorboard")
    report(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / "digits")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("run/distance")] == [(-100, 5), (25, 3), (300, 4)]
    (image,) = events.Images("run/grid")
    assert (image.width, image.height) == (4, 6)
    *_, table = events.Tensors("run/table/text_summary")
    assert table.tensor_proto.string_val == [TABLE.markdown.encode()]


def test_trackio_stores_curves_tables_and_images(tmp_path, monkeypatch):
    """The library itself. It reads the folder from the environment when it is imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackers = report(tmp_path, "trackio")
    assert [tracker.name for tracker in trackers.accelerator.trackers] == ["trackio"]
    (run,) = sys.modules["trackio"].Api().runs("digits")
    assert run.name == "first"
    assert run.config["resolution"] == 8
    rows = sys.modules["trackio.sqlite_storage"].SQLiteStorage.get_logs("digits", run.name)
    points = [(row["step"], row["run/w"], row["run/distance"]) for row in rows if "run/w" in row]
    assert points == [(index, *point) for index, point in enumerate(zip(W, DISTANCES, strict=True))]
    logged = {name: value for row in rows for name, value in row.items()}
    assert logged["run/table"]["_value"] == [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    with Image.open(tmp_path / "trackio" / "media" / logged["run/grid"]["file_path"]) as image:
        assert image.size == IMAGE.size
    assert logged["recall/w_0.5"] == 0.75


def test_every_tracker_with_images_gets_tables():
    assert SEND_TABLE.keys() == SEND_IMAGE.keys()
