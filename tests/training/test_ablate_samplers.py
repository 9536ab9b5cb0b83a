"""Test the comparison of samplers: rejected settings, the tables, and the choice of the cheapest sampler."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from diffusers import DDIMScheduler

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.evaluation import features
from diffusers_cfg.evaluation.ablations import applicable, cheapest, paper_row
from diffusers_cfg.evaluation.reports import write_report
from diffusers_cfg.evaluation.settings import EvaluationConfig, sampler_folder
from diffusers_cfg.evaluation.sweep import run_sweep
from tests.support.commands import load_command
from tests.support.models import ddgan, make_pipeline, make_unet

ablate_samplers = load_command("studies/ablate_samplers")

EXTRACTOR = {"name": "small-1", "resize": "none", "num_features": 64, "accuracy": 0.99}
FLOOR = {"frechet_distance": 0.02, "class_accuracy": 0.99}
# Fréchet distances at w = 0.2 and 0.3, by sampler, steps and whether there is a guidance interval
DISTANCES = {
    ("LogSNRScheduler", 4, False): (0.5, 0.6),
    ("LogSNRScheduler", 8, False): (0.2, 0.1),
    ("LogSNRScheduler", 8, True): (0.01, 0.02),
    ("DDIMScheduler", 2, False): (0.104, 0.3),
    ("DDIMScheduler", 4, False): (0.3, 0.09),
    ("DDIMScheduler", 4, True): (0.11, 0.0106),
    ("DDIMScheduler", 5, False): (0.07, 0.08),
    ("DDPMScheduler", 1, False): (0.8,),
    ("DDPMScheduler", 2, False): (0.4,),
}


def save_model(folder: Path) -> str:
    """Save a model of the kind that the name of the folder says."""
    if folder.name.startswith("gan"):
        pipeline = ddgan("--num_timesteps", folder.name.removeprefix("gan"))
    elif folder.name == "few":
        unet, scheduler = make_unet(max_guidance_scale=4.0), LogSNRScheduler().solver(DDIMScheduler)
        pipeline = make_pipeline(unet, scheduler, num_inference_steps=5)
    else:
        pipeline = make_pipeline()
    pipeline.save_pretrained(folder)
    return str(folder)


def fake_sweep(config: EvaluationConfig, _accelerator: Accelerator) -> dict:
    """Return the record of a sweep with invented distances, which are ten times smaller for a student."""
    assert config.scheduler is not None
    assert config.num_inference_steps is not None
    assert config.output_dir is not None
    assert config.guidance_scales is not None
    distances = DISTANCES[config.scheduler, config.num_inference_steps, config.guidance_interval is not None]
    factor = 0.1 if Path(config.model).name == "student" else 1.0
    results = [
        {
            "guidance_scale": w,
            "network_evaluations": (1.5 if config.guidance_interval else 2.0) * config.num_inference_steps,
            "frechet_distance": factor * distance,
            "frechet_distance_error": 0.001,
            "class_accuracy": 0.9 + w / 10,
            "class_accuracy_error": 0.01,
            **{"worst_class_accuracy": 0.7, "precision": 0.6, "recall": 0.5},
        }
        for w, distance in zip(config.guidance_scales, distances, strict=True)
    ]
    record = {"dataset": "made up", "num_samples": config.num_samples, "num_real": 100, "num_neighbours": 50}
    record |= {"num_held_out": 50, "feature_extractor": EXTRACTOR, "floor": {**FLOOR}, "class_labels": "balanced"}
    record |= {"num_inference_steps": config.num_inference_steps, "seed": 0, "scheduler": config.scheduler}
    guidance = {"interval": config.guidance_interval, "rescale": 0.0, "guider": None, "guide": None}
    if Path(config.model).name == "elsewhere":
        record["dataset"] = "other data"
    return write_report(Path(config.output_dir), {**record, "guidance": guidance, "results": results}, "small")


def ablate(tmp_path: Path, *argv: str, models: tuple[str, ...] = ("teacher",)) -> str:
    folders = [save_model(tmp_path / name) for name in models]
    flags = ["--model", *folders, "--output_dir", str(tmp_path / "out"), "--guidance_scales", "0.2", "0.3", *argv]
    ablate_samplers.main(flags)
    return (tmp_path / "out" / "table.md").read_text()


@pytest.fixture
def fake_sweeps(monkeypatch):
    """Replace sweeps by invented records, without figures."""
    monkeypatch.setattr("diffusers_cfg.evaluation.sweep.run_sweep", fake_sweep)
    monkeypatch.setattr("diffusers_cfg.evaluation.reports.plot_curves", lambda *_: None)


SAMPLERS = ["--samplers", "LogSNRScheduler:4,8", "DDIMScheduler:2,4"]
METRICS = "Fréchet distance | class accuracy | worst class | precision | recall"
REST = "0.700 | 0.600 | 0.500"


def test_table_shows_each_sampler_at_its_best_w(tmp_path, fake_sweeps, capsys):
    table = ablate(tmp_path, *SAMPLERS, "--num_samples", "300")
    assert capsys.readouterr().out.endswith(f"{table}\n")
    assert table.splitlines()[:7] == [
        f"| sampler | steps | interval | evaluations | w | {METRICS} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| LogSNRScheduler | 4 |  | 8 | 0.2 | 0.500 ± 0.002 | 0.920 ± 0.020 | {REST} |",
        f"| LogSNRScheduler | 8 |  | 16 | 0.3 | 0.100 ± 0.002 | 0.930 ± 0.020 | {REST} |",
        f"| DDIMScheduler | 2 |  | 4 | 0.2 | 0.104 ± 0.002 | 0.920 ± 0.020 | {REST} |",
        f"| DDIMScheduler | 4 |  | 8 | 0.3 | **0.090** ± 0.002 | 0.930 ± 0.020 | {REST} |",
        "| real |  |  |  |  | 0.020 | 0.990 |  |  |  |",
    ]
    assert (
        "300 samples for each w (balanced labels, seed 0), each sampler at its best w among 0.2, 0.3. Evaluations"
        in table
    )
    assert table.splitlines()[-4:] == [
        f"| cheapest within 5% of | sampler | steps | interval | evaluations | w | {METRICS} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| best distance, 0.090 | DDIMScheduler | 4 |  | 8 | 0.3 | **0.090** ± 0.002 | 0.930 ± 0.020 | {REST} |",
        "| paper's sampler, 0.100 with 16 evaluations | DDIMScheduler | 2 |  | 4 | 0.2 | 0.104 ± 0.002 | "
        f"0.920 ± 0.020 | {REST} |",
    ]
    rows = json.loads((tmp_path / "out" / "samplers.json").read_text())["rows"]
    assert [(row["model"], row["scheduler"], row["num_inference_steps"], row["guidance_scale"]) for row in rows] == [
        ("teacher", "LogSNRScheduler", 4, 0.2),
        ("teacher", "LogSNRScheduler", 8, 0.3),
        ("teacher", "DDIMScheduler", 2, 0.2),
        ("teacher", "DDIMScheduler", 4, 0.3),
    ]
    assert (tmp_path / "out" / "curves.png").is_file()


def test_samplers_with_and_without_an_interval(tmp_path, fake_sweeps):
    """Both variants have a row, and the paper's sampler is the one without an interval."""
    samplers = ["--samplers", "LogSNRScheduler:8", "DDIMScheduler:4"]
    table = ablate(tmp_path, *samplers, "--guidance_interval", "0.2", "5")
    assert "| LogSNRScheduler | 8 | 0.2 … 5 | 12 | 0.2 | **0.010** ± 0.002 |" in table
    assert "| DDIMScheduler | 4 | 0.2 … 5 | 6 | 0.3 | 0.011 ± 0.002 |" in table
    assert "| best distance, 0.010 | LogSNRScheduler | 8 | 0.2 … 5 | 12 | 0.2 | **0.010**" in table
    assert "| paper's sampler, 0.100 with 16 evaluations | DDIMScheduler | 4 | 0.2 … 5 | 6 | 0.3 | 0.011" in table
    assert "interval (" not in table


def test_two_models_are_compared_in_one_table(tmp_path, fake_sweeps):
    table = ablate(tmp_path, *SAMPLERS, models=("teacher", "student"))
    assert "| LogSNRScheduler (teacher) | 8 |  | 16 | 0.3 | 0.100 ± 0.002 |" in table
    assert "| LogSNRScheduler (student) | 8 |  | 16 | 0.3 | 0.010 ± 0.002 |" in table
    assert "| best distance, 0.009 | DDIMScheduler (student) | 4 |  | 8 | 0.3 | **0.009**" in table
    assert "| paper's sampler, 0.100 with 16 evaluations | DDIMScheduler (student) | 2 |  | 4 | 0.2 |" in table


def test_models_of_one_sampler_are_evaluated_with_it_alone(tmp_path, fake_sweeps):
    """A generator is not guided, and a student is guided as the others are."""
    kinds = ("gan1", "teacher", "few", "gan2")
    table = ablate(tmp_path, "--samplers", "DDIMScheduler:2,4", models=kinds)
    assert [line.split("|")[1:6] for line in table.splitlines()[2:8]] == [
        [" DDPMScheduler (gan1) ", " 1 ", "  ", " 2 ", " 0 "],
        [" DDIMScheduler (teacher) ", " 2 ", "  ", " 4 ", " 0.2 "],
        [" DDIMScheduler (teacher) ", " 4 ", "  ", " 8 ", " 0.3 "],
        [" DDIMScheduler (few) ", " 5 ", "  ", " 10 ", " 0.2 "],
        [" DDPMScheduler (gan2) ", " 2 ", "  ", " 4 ", " 0 "],
        [" real ", "  ", "  ", "  ", "  "],
    ]
    assert "each sampler at its best w among 0.2, 0.3 (gan1, gan2 at 0). Evaluations" in table
    folders = sorted(str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.rglob("out/*/*/metrics.json"))
    assert folders == [
        "few/DDIMScheduler-5",
        "gan1/DDPMScheduler-1",
        "gan2/DDPMScheduler-2",
        *(f"teacher/DDIMScheduler-{steps}" for steps in (2, 4)),
    ]


def test_a_student_of_one_sampler_is_also_guided_in_the_interval(tmp_path):
    config = EvaluationConfig(model="few", guidance_scales=[0.2], output_dir=str(tmp_path / "few" / "x"))
    configs = [replace(config, guidance_interval=interval) for interval in (None, [0.2, 5.0])]
    student = CFGPipeline.from_pretrained(save_model(tmp_path / "few"))
    found = [(Path(config.output_dir or "").name, config.guidance_scales) for config in applicable(configs, student)]
    assert found == [("DDIMScheduler-5", [0.2]), ("DDIMScheduler-5-interval=0.2,5", [0.2])]
    (only,) = applicable([replace(config, guidance_rescale=0.5, guide_model="other") for config in configs], ddgan())
    assert only.output_dir == str(tmp_path / "few" / "DDPMScheduler-2")
    assert (only.guidance_scales, only.guidance_flags) == ([0.0], [])


def test_table_without_the_papers_sampler(tmp_path, fake_sweeps):
    table = ablate(tmp_path, "--samplers", "DDIMScheduler:2,4")
    assert "paper's" not in table
    assert table.splitlines()[-1].startswith("| best distance, 0.090 | DDIMScheduler | 4 |  | 8 |")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(2, 1.06), (4, 1.05), (8, 1.0)], 4),  # the bound is inclusive
        ([(2, 1.06), (4, 1.06), (8, 1.0)], 8),
        ([(8, 1.0)], 8),
    ],
)
def test_cheapest_is_within_the_tolerance(rows, expected):
    rows = [{"network_evaluations": evaluations, "frechet_distance": distance} for evaluations, distance in rows]
    assert cheapest(rows, 1.0)["network_evaluations"] == expected


def test_cheapest_breaks_ties_by_distance():
    rows = [{"network_evaluations": 4, "frechet_distance": distance} for distance in (1.04, 1.02, 1.03)]
    assert cheapest(rows, 1.0)["frechet_distance"] == 1.02


def test_paper_row_has_no_guidance_interval():
    row = {"scheduler": "LogSNRScheduler", "num_inference_steps": 256}
    rows = [{**row, "guidance_interval": interval} for interval in ([0.2, 5.0], None)]
    assert paper_row(rows) == rows[1]


def test_models_of_different_data_raise(tmp_path, fake_sweeps):
    with pytest.raises(UserError, match="teacher was measured against made up and .*elsewhere against other data"):
        ablate(tmp_path, "--samplers", "DDIMScheduler:2", models=("teacher", "elsewhere"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--samplers", "DDIMScheduler:2", "Nonsense:4"], "Nonsense is not supported.*LogSNRScheduler"),
        (["--samplers", "DDIMScheduler:2,3"], "DDIMScheduler cannot take 3 steps"),
        (["--samplers", "DDIMScheduler:2,0"], r"num_inference_steps must lie in \[1, 100000\], but is 0"),
        (["--samplers", "DDIMScheduler"], "--samplers DDIMScheduler must have the form CLASS:STEPS,STEPS"),
        (["--samplers", "DDIMScheduler:2,many"], "--samplers DDIMScheduler:2,many must have"),
        (["--guidance_interval", "5", "0.2"], r"0 ≤ σ_lo < σ_hi, but is \(5.0, 0.2\)"),
        (
            ["--samplers", "DDIMScheduler:2", "--guidance_interval", "0.3", "0.4"],
            "None of the 2 steps is in guidance_interval",
        ),
        (["--scheduler", "DDIMScheduler"], "--scheduler is not a flag of this command"),
        (["--num_inference_steps=5"], "--num_inference_steps is not a flag of this command"),
        (
            ["--guider", "ClassifierFreeGuidance", "--guidance_interval", "1", "2"],
            "--guidance_interval cannot be combined",
        ),
        (["--guider", "ClassifierFreeGuidance", "--guidance_rescale", "0.5"], "--guidance_rescale cannot be combined"),
        (["--guidance_scales", "0.1", "0.1"], "guidance_scales must not repeat a value"),
        (["--guidance_scales", "inf"], "guidance_scales must be finite"),
        (["--samplers", "DDIMScheduler:"], "--samplers DDIMScheduler: must have the form"),
        (["--samplers", ""], "--samplers  must have the form"),
        (["--samplers", "DDIMScheduler:-2"], "num_inference_steps must lie in"),
        (["--output_dir", "/dev/null"], "/dev/null is not one. Pass a folder"),
        (["--statistics_dir", "/proc/x"], "--statistics_dir '/proc/x' cannot be written"),
    ],
)
def test_invalid_settings_raise_before_the_first_sweep(tmp_path, monkeypatch, argv, message):
    def never(*_):
        raise AssertionError("a sweep was started")

    monkeypatch.setattr("diffusers_cfg.evaluation.sweep.run_sweep", never)
    with pytest.raises(UserError, match=message):
        ablate(tmp_path, *argv)
    assert not (tmp_path / "out").exists()


def test_models_with_the_same_name_raise(tmp_path):
    with pytest.raises(UserError, match="two models have the same name"):
        ablate(tmp_path, models=("a/model", "b/model"))


def test_comparison_end_to_end(trained_model, tmp_path, monkeypatch):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    monkeypatch.setattr("diffusers_cfg.evaluation.reports.plot_curves", lambda *_: None)
    out, name = tmp_path / "out", trained_model.name
    same = ["--model", str(trained_model), "--num_samples", "20", "--statistics_dir", str(tmp_path / "statistics")]
    samplers = ["--samplers", "LogSNRScheduler:3", "DDIMScheduler:2", "--guidance_interval", "0.001", "5"]
    argv = [*same, *samplers, "--output_dir", str(out), "--guidance_scales", "0.1", "0.3"]
    ablate_samplers.main(argv)
    folders = {path.name for path in (out / name).iterdir()}
    assert folders == {
        sampler + interval
        for sampler in ("LogSNRScheduler-3", "DDIMScheduler-2")
        for interval in ("", "-interval=0.001,5")
    }
    rows = json.loads((out / "samplers.json").read_text())["rows"]
    # σ/α is 22026, 1 and 0.00005 at the three steps, of which one is guided.
    assert [row["network_evaluations"] for row in rows[:3]] == [6, 4, 4]
    assert not (trained_model / "evaluation").exists()

    # A sweep of the paper's sampler alone gives the same distance.
    flags = ["--scheduler", "LogSNRScheduler", "--num_inference_steps", "3", "--guidance_scales", "0.1", "0.3"]
    own = run_sweep(
        parse_config(EvaluationConfig, [*same, *flags, "--output_dir", str(tmp_path / "own")]), Accelerator(cpu=True)
    )
    assert rows[0]["frechet_distance"] == min(row["frechet_distance"] for row in own["results"])

    # The seconds are those of the images at the best w.
    for row in rows:
        name = sampler_folder(*(row[key] for key in ("scheduler", "num_inference_steps", "guidance_interval")))
        with np.load(out / trained_model.name / name / f"samples/w={row['guidance_scale']:g}/shard-00000.npz") as file:
            assert row["seconds"] == pytest.approx(100 * file["seconds"])
    header, line = (text.split(" | ") for text in (out / "table.md").read_text().splitlines()[::2][:2])
    assert (header[-1], line[-1]) == ("s / 100 images |", f"{rows[0]['seconds']:.3g} |")

    # Existing shards are not generated again.
    def untimed_table() -> list[str]:
        return [line.rpartition(" | ")[0] for line in (out / "table.md").read_text().splitlines()]

    shards, table = sorted(out.rglob("shard-*.npz")), untimed_table()
    times = [os.stat(shard).st_mtime_ns for shard in shards]
    shards[0].unlink()
    ablate_samplers.main(argv)
    assert untimed_table() == table
    assert [os.stat(shard).st_mtime_ns for shard in shards][1:] == times[1:]
