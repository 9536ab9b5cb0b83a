"""Test the study of mode coverage: its settings, refused flags, and a tiny run."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest

from diffusers_cfg.engine.record import is_completed, public_config
from diffusers_cfg.evaluation import features, gaussian_grid, mode_coverage
from diffusers_cfg.evaluation.gaussian_grid import GridSettings
from diffusers_cfg.method_settings import DDGANConfig
from tests.support.commands import check_refused, load_command
from tests.support.images import save_class_folders, solid
from tests.support.runs import SHARED, SMALLEST_GAN, reset_accelerate

modes = load_command("studies/modes")
TRAINING_FLAGS = [*SHARED, *SMALLEST_GAN]


@pytest.fixture
def argv(tmp_path) -> list[str]:
    return ["--output_dir", str(tmp_path / "out"), "--num_samples", "30"]


def configs_of(argv: list[str]) -> list[DDGANConfig]:
    """Return the training settings of the runs on stacked images."""
    return modes.configs_of(*modes.parse_args(argv))


def test_runs_differ_in_steps_and_seed(argv, tmp_path):
    started = tmp_path / "out" / "stacked" / "T=8" / "seed=2"
    (started / "checkpoint-2").mkdir(parents=True)
    configs = configs_of([*argv, "--num_timesteps", "1", "8", "--seeds", "1", "2", "--learning_rate", "3e-4"])
    assert [(config.num_timesteps, config.seed) for config in configs] == [(1, 1), (1, 2), (8, 1), (8, 2)]
    assert [config.resume_from_checkpoint for config in configs] == [None, None, None, "latest"]
    assert configs[3].output_dir == str(started)
    assert {(config.stack, config.learning_rate, config.resolution) for config in configs} == {(3, 3e-4, 8)}
    assert [config.num_timesteps for config in configs_of(argv)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_timesteps", "4", "4"], r"--num_timesteps must not repeat a value: \[4, 4\]"),
        (["--num_timesteps", "9"], r"num_timesteps must lie in \[1, 8\], but is 9"),
        (["--seeds", "0", "0"], "--seeds must not repeat a value"),
        (["--seeds", "-1"], "seed must"),
        (["--parts", "stacked", "stacked"], "--parts must not repeat a value"),
        (["--num_samples", "0"], "num_samples must lie in"),
        (["--stack", "1"], "Pass --stack 3"),
        (["--seed", "1"], "--seed is not a flag of this command. Pass --seeds"),
        (["--dry_run"], "--dry_run is not a flag of this command"),
        (["--push_to_hub", "--hub_token", "hf_secret"], "--push_to_hub is not a flag of this command"),
        (["--resume_from_checkpoint", "latest"], "Runs are resumed automatically"),
        (["--parts", "gaussians", "--learning_rate", "1"], "--learning_rate: no effect on the Gaussians"),
        (["--mixed_precision", "fp16"], "fp16 is not supported"),
        (["--block_out_channels", "8", "8", "8", "8", "8"], "resolution 8 cannot be halved 4 times"),
        (["--output_dir", "/dev/null"], "/dev/null is not one. Pass a folder"),
    ],
)
def test_invalid_flags_raise_before_the_first_run(argv, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(gaussian_grid, "train_on_grid", lambda _: pytest.fail("a run was started"))
    check_refused(modes.main, [*argv, *flags], message, monkeypatch)
    assert not (tmp_path / "out").exists()


def test_data_without_classes_or_with_color_are_refused_before_the_first_run(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(gaussian_grid, "train_on_grid", lambda _: pytest.fail("a run was started"))
    folder = tmp_path / "data"
    save_class_folders(folder)
    solid(0, (8, 8)).save(folder / "ant" / "0.png")
    data = [*argv, *TRAINING_FLAGS, "--train_data_dir", str(folder), "--resolution", "8"]
    check_refused(modes.main, data, "the data has images with color", monkeypatch)
    shutil.rmtree(folder / "ant")
    check_refused(modes.main, data, "needs at least two classes", monkeypatch)


def test_completed_run_of_other_settings_is_refused(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(gaussian_grid, "train_on_grid", lambda _: pytest.fail("a run was started"))
    (config,) = configs_of([*argv, "--num_timesteps", "1"])
    assert not is_completed(config)
    record = tmp_path / "out" / "stacked" / "T=1" / "seed=0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"config": public_config(config)}))
    assert is_completed(replace(config, logging_steps=7, train_batch_size=8, push_to_hub=True))
    flags = [*argv, "--num_timesteps", "2", "1", "--max_train_steps", "9", "--latent_dim", "5"]
    message = f"--max_train_steps was {config.max_train_steps} and is 9.*--latent_dim was 100 and is 5.* delete .*T=1"
    check_refused(modes.main, flags, message, monkeypatch)
    for text, problem in {"{": "cannot be read as JSON", "{}": "does not contain the settings of a run"}.items():
        record.write_text(text)
        check_refused(modes.main, [*argv, "--num_timesteps", "1"], f"run.json {problem}.* delete", monkeypatch)


@pytest.mark.slow
def test_study_trains_what_is_missing_and_writes_the_tables(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    monkeypatch.setattr(mode_coverage, "CACHE_DIR", tmp_path / "cache")  # not the quick classifier in the user's
    monkeypatch.setattr(gaussian_grid, "GridSettings", partial(GridSettings, steps=3, batch_size=8, units=8))
    reset_accelerate()
    out, argv = tmp_path / "out", [*argv, *TRAINING_FLAGS]
    modes.main([*argv, "--num_timesteps", "1", "--parts", "stacked"])
    finished = out / "stacked" / "T=1" / "seed=0" / "run.json"
    before = finished.stat().st_mtime_ns
    assert not (out / "gaussians.png").exists()
    modes.main([*argv, "--num_timesteps", "1", "2"])
    assert finished.stat().st_mtime_ns == before
    record, text = json.loads((out / "modes.json").read_text()), (out / "table.md").read_text()
    printed = capsys.readouterr().out
    assert printed.endswith(f"The tables, the pictures and the models are in {out}.\n")
    for part, num_modes in (("gaussians", 25), ("stacked", 1000)):
        assert [run["num_timesteps"] for run in record[part]["runs"]] == [1, 2]
        for run in record[part]["runs"]:
            assert 0 <= run["modes"] <= num_modes
            assert f"| {run['modes']:.1f} |" in text
            assert f"| {run['kl']:.3f} |" in text
    for table in text.split("\n\n")[::2]:
        assert table in printed
    assert record["stacked"]["num_modes"] == 1000
    assert record["stacked"]["references"]["perfect"]["kl"] > 3  # 30 samples
    assert {path.name for path in out.iterdir()} == {
        *("gaussians", "gaussians.png", "stacked", "stacked.png", "modes.json", "table.md")
    }
