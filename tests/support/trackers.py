"""Imitate the libraries of trackers. Each has the functions and the limits of its original that the project relies on.

Checked against wandb 0.31, swanlab 0.10, mlflow 3.18, comet_ml 3.58 and clearml 2.1. All calls go to one list.
"""

import re
from types import ModuleType, SimpleNamespace
from typing import Any

from PIL import Image

Calls = list[tuple[str, Any]]


def module(name: str, **members: Any) -> ModuleType:
    """Return a module with the given members."""
    library = ModuleType(name)
    vars(library).update(members)
    return library


class Media:
    """A value that a library wraps, such as an image."""

    def __init__(self, content: Any) -> None:
        assert isinstance(content, Image.Image)
        self.content = content


class Config(dict):
    """The settings of a run."""

    def update(self, values: Any, allow_val_change: bool = False) -> None:
        super().update(values)


def make_wandb(calls: Calls) -> ModuleType:
    """Return a stand-in for wandb, which drops values of steps before the last one."""

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]], dataframe: None = None) -> None:
            self.columns, self.data = columns, data
            for column in zip(*data, strict=True):  # a column has one type, and may have None
                kinds = {str if isinstance(value, str) else float for value in column if value is not None}
                assert len(kinds) <= 1, column

    class Run:
        id = "run-1"
        step = 0

        def log(self, data: dict[str, Any], step: int) -> None:
            if step >= self.step:
                self.step = step
                calls.append(("log", (step, data)))

        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append(("define_metric", (name, step_metric)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(project: str, name: str, id: str, resume: str) -> Run:
        calls.append(("init", (project, name)))
        return Run()

    return module("wandb", init=init, config=Config(), Image=Media, Table=Table)


def make_swanlab(calls: Calls) -> ModuleType:
    """Return a stand-in for swanlab, which ignores values with a negative step."""

    class Table:
        def add(self, headers: list[str], rows: list[list[Any]]) -> "Table":
            self.columns, self.data = headers, rows
            return self

    class Run:
        id = "run-1"

        def log(self, data: dict[str, Any], step: int) -> None:
            if step >= 0:
                calls.append(("log", (step, data)))

        def define_metric(self, key: str, *, x_axis: str) -> None:
            calls.append(("define_metric", (key, x_axis)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(*, project: str, experiment_name: str) -> Run:
        calls.append(("init", (project, experiment_name)))
        return Run()

    return module("swanlab", init=init, config=Config(), Image=Media, echarts=SimpleNamespace(Table=Table))


def make_mlflow(calls: Calls) -> ModuleType:
    """Return a stand-in for mlflow, which restricts the characters of names."""

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        for name in metrics:
            assert re.fullmatch(r"[\w.\- :/]+", name), f"Invalid value {name!r}"
        calls.append(("log", (step, metrics)))

    def log_image(image: Image.Image, artifact_file: None = None, key: str | None = None, step: int | None = None):
        assert isinstance(image, Image.Image)
        assert key is not None
        assert re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", key)
        calls.append(("image", (key, step)))

    def log_table(data: dict[str, list[Any]], artifact_file: str) -> None:
        assert artifact_file.endswith((".json", ".parquet"))
        rows = [list(row) for row in zip(*data.values(), strict=True)]
        calls.append(("table", (artifact_file, [*data], rows)))

    def start_run(run_name: str, **_: Any) -> Any:
        calls.append(("init", ("digits", run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

    return module(
        "mlflow",
        search_experiments=lambda filter_string: (
            [SimpleNamespace(experiment_id="1")] if "digits" in filter_string else []
        ),
        start_run=start_run,
        utils=SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)),
        log_params=lambda params: None,
        log_metrics=log_metrics,
        log_image=log_image,
        log_table=log_table,
        end_run=lambda: calls.append(("finish", None)),
    )


def make_comet_ml(calls: Calls) -> ModuleType:
    """Return a stand-in for comet_ml, whose runs get their names after they start."""

    class Experiment:
        def __init__(self, project: str) -> None:
            self.project = project

        def get_key(self) -> str:
            return "run-1"

        def set_name(self, name: str) -> None:
            calls.append(("init", (self.project, name)))

        def set_step(self, step: int) -> None:
            pass

        def log_parameters(self, values: dict[str, Any]) -> None:
            pass

        def log_metric(self, name: str, value: float, step: int) -> None:
            calls.append(("log", (step, {name: value})))

        def log_curve(self, name: str, x: list[float], y: list[float]) -> None:
            calls.append(("curve", (name, x, y)))

        def log_image(self, image_data: Image.Image, name: str, step: int) -> None:
            assert isinstance(image_data, Image.Image)
            calls.append(("image", (name, step)))

        def log_table(self, filename: str, tabular_data: list[list[Any]], headers: list[str]) -> None:
            assert filename.endswith((".csv", ".tsv"))
            calls.append(("table", (filename, headers, tabular_data)))

        def end(self) -> None:
            calls.append(("finish", None))

    def start(project_name: str, experiment_key: str | None) -> Experiment:
        return Experiment(project_name)

    return module("comet_ml", __version__="3.58.8", start=start)


def make_clearml(calls: Calls) -> ModuleType:
    """Return a stand-in for clearml."""

    class Logger:
        def report_scalar(self, title: str, series: str, value: float, iteration: int) -> None:
            calls.append(("log", (iteration, {title: value})))

        def report_image(self, title: str, series: str, iteration: int, image: Image.Image) -> None:
            assert isinstance(image, Image.Image)
            calls.append(("image", (title, iteration)))

        def report_table(self, title: str, series: str, iteration: int, table_plot: list[list[Any]]) -> None:
            calls.append(("table", (title, table_plot[0], table_plot[1:])))

        def report_scatter2d(
            self, title: str, series: str, scatter: list[tuple[float, float]], iteration: int, xaxis: str, yaxis: str,
            mode: str,
        ) -> None:  # fmt: skip
            calls.append(("curve", (title, [x for x, _ in scatter], [y for _, y in scatter])))

    class Task:
        id = "run-1"

        @staticmethod
        def current_task() -> None:
            return None

        @staticmethod
        def init(project_name: str, task_name: str, continue_last_task: bool | str) -> "Task":
            calls.append(("init", (project_name, task_name)))
            return Task()

        def connect_configuration(self, values: dict[str, Any]) -> None:
            pass

        def get_logger(self) -> Logger:
            return Logger()

        def close(self) -> None:
            calls.append(("finish", None))

    return module("clearml", Task=Task)


LIBRARIES = {
    "wandb": make_wandb,
    "swanlab": make_swanlab,
    "mlflow": make_mlflow,
    "comet_ml": make_comet_ml,
    "clearml": make_clearml,
}
