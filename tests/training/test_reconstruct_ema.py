"""Test the command reconstruct_ema.py: the averages that it saves, for each method, and what it refuses."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError
from diffusers_cfg.engine.posthoc_ema import SIGMA_RELS, fit_profile
from diffusers_cfg.evaluation.records import noise_process, recorded_data
from diffusers_cfg.files import LOCK_FILE, digest
from diffusers_cfg.hub import allowed_files
from diffusers_cfg.model_card import model_card
from diffusers_cfg.model_files import snapshots
from tests.support.commands import load_command, locked_elsewhere
from tests.support.runs import SMALLEST, WEIGHTS, distill, train, train_classifier, train_ddgan, train_vdm
from tests.support.trajectories import TEACHER

STEPS = ["--max_train_steps", "8", "--checkpointing_steps", "0", "--posthoc_ema_steps", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the output folder of a run with a snapshot at each of 8 steps."""
    folder = tmp_path_factory.mktemp("reconstruct") / "out"
    train(folder, *SMALLEST, *STEPS)
    return folder


def reconstruct(model: Path, output_dir: Path, sigma_rel: float = 0.08) -> Path:
    """Run the command, and return its output folder."""
    flags = ["--model", str(model), "--sigma_rel", str(sigma_rel), "--output_dir", str(output_dir)]
    load_command("reconstruct_ema").main(flags)
    return output_dir


def combined(model: Path, sigma_rel: float) -> dict[str, torch.Tensor]:
    """Return the combination of all snapshots of a run in float64, by MODULE.PARAMETER."""
    found = snapshots(model)
    coefficients, total = fit_profile(list(found), sigma_rel, max(found)).coefficients, {}
    for row, path in zip(coefficients, found.values(), strict=True):
        for name, tensor in load_file(path).items():
            length, _, parameter = name.partition("/")
            total[parameter] = total.get(parameter, 0) + row[SIGMA_RELS.index(float(length))] * tensor.double()
    return total


def both_published(first: Path, second: Path) -> bool:
    """Return whether the same files of two folders are published."""
    return len({str(sorted(path.relative_to(f).as_posix() for path in allowed_files(f))) for f in (first, second)}) == 1


def assert_averages(folder: Path, expected: dict[str, torch.Tensor], module: str) -> None:
    """Assert that a saved module has the expected averages to 1e-6."""
    saved = {f"{module}.{name}": tensor.double() for name, tensor in load_file(folder / module / WEIGHTS).items()}
    expected = {name: tensor for name, tensor in expected.items() if name.startswith(f"{module}.")}
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_tracked_average_is_that_of_the_last_snapshot(run, tmp_path, sigma_rel):
    out = reconstruct(run, tmp_path / "out", sigma_rel)
    last = {name.partition("/"): tensor.double() for name, tensor in load_file(snapshots(run)[8]).items()}
    assert_averages(out, {name: x for (length, _, name), x in last.items() if float(length) == sigma_rel}, "unet")


def test_saved_model_is_like_that_of_the_run(run, tmp_path, capsys):
    out = reconstruct(run, tmp_path / "out", 0.15)
    assert "Saved the model to" in capsys.readouterr().out
    assert_averages(out, combined(run, 0.15), "unet")
    assert both_published(out, run)
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "train_config.yaml"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    pipeline = CFGPipeline.from_pretrained(out)
    assert pipeline("three", 0.5, num_inference_steps=2).images[0].size == (8, 8)
    assert recorded_data(str(out), pipeline) == recorded_data(str(run), pipeline)
    record, before = (json.loads((folder / "run.json").read_text()) for folder in (out, run))
    assert record.pop("posthoc_ema") == {"sigma_rel": 0.15, "relative_error": pytest.approx(0.03, abs=0.03)}
    assert {**record, "ema": "0.9999"} == before
    card = model_card(out, "me/model")
    assert "| post-hoc EMA σ_rel | 0.15 |" in card
    assert "EMA decay" not in card
    assert "EMA decay" in model_card(run, "me/model")


def test_command_of_the_run_is_followed_by_that_of_the_average(run, tmp_path):
    model = Path(shutil.copytree(run, tmp_path / "my model"))
    record = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps({**record, "command": "python training/train_cfg.py"}))
    out = reconstruct(model, tmp_path / "out")
    assert json.loads((out / "run.json").read_text())["command"] == (
        "python training/train_cfg.py\n"
        "python training/reconstruct_ema.py --model 'my model' --sigma_rel 0.08 --output_dir out"
    )


@pytest.mark.parametrize(
    ("train_method", "module"),
    [
        pytest.param(partial(distill, TEACHER), "unet", marks=pytest.mark.slow),
        pytest.param(
            lambda *argv: train(*argv, *SMALLEST, "--max_guidance_scale", "4"), "unet", marks=pytest.mark.slow
        ),
        pytest.param(train_ddgan, "unet", marks=pytest.mark.slow),
        (lambda folder, *argv: train_classifier(folder, TEACHER, *argv), "classifier"),
    ],
    ids=["distillation", "one_pass", "ddgan", "classifier"],
)
def test_other_methods(tmp_path, train_method, module):
    train_method(tmp_path / "run", *STEPS)
    out = reconstruct(tmp_path / "run", tmp_path / "out")
    assert_averages(out, combined(tmp_path / "run", 0.08), module)
    CFGPipeline.from_pretrained(out)
    assert "classifier_accuracy" not in (out / "run.json").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--loss_weighting", "sigmoid"], marks=pytest.mark.slow),
        pytest.param(["--noise_schedule", "fixed"], marks=pytest.mark.slow),
    ],
)
def test_noise_schedule_is_averaged_with_its_network(tmp_path, flags):
    train_vdm(tmp_path / "run", *flags, *STEPS, "--num_inference_steps", "2")
    out, expected = reconstruct(tmp_path / "run", tmp_path / "out"), combined(tmp_path / "run", 0.08)
    assert_averages(out, expected, "unet")
    end, before = (
        noise_process(CFGPipeline.from_pretrained(folder)).config.log_snr_max for folder in (out, tmp_path / "run")
    )
    if flags:  # the ends are not learned
        assert end == before
    else:
        assert end == pytest.approx(-expected["noise_schedule.gamma_0"].item(), abs=1e-6)
        assert end != pytest.approx(before, abs=1e-3)
    schedule = load_file(out / "noise_schedule.safetensors")
    assert schedule.keys() == load_file(tmp_path / "run" / "noise_schedule.safetensors").keys()
    if "noise_schedule.w2" in expected:
        torch.testing.assert_close(schedule["w2"].double(), expected["noise_schedule.w2"], rtol=0, atol=1e-5)
    assert both_published(out, tmp_path / "run")


@pytest.mark.parametrize(
    ("sigma_rel", "message"),
    [
        (0.0, "sigma_rel must lie between 0 and 0.2887, but is 0. The snapshots have 0.05 and 0.1"),
        (0.3, "sigma_rel must lie between 0 and 0.2887, but is 0.3"),
        (0.01, r"profile of --sigma_rel 0.01 with an error of \d\d.\d%; at most 25% are.*0.05 or 0.1"),
        (float("nan"), "sigma_rel must lie between"),
    ],
)
def test_lengths_that_cannot_be_represented_raise(run, tmp_path, sigma_rel, message):
    with pytest.raises(UserError, match=message):
        reconstruct(run, tmp_path / "out", sigma_rel)
    assert not (tmp_path / "out").exists()


def test_large_error_is_reported_and_recorded(run, tmp_path, caplog):
    out = reconstruct(run, tmp_path / "out", 0.03)
    assert "represent the profile of --sigma_rel 0.03 with an error of " in caplog.text
    assert 0.05 < json.loads((out / "run.json").read_text())["posthoc_ema"]["relative_error"] < 0.25


def change(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace or remove tensors of a snapshot, and update its checksum."""
    tensors = load_file(path) | {name: x for name, x in changes.items() if x is not None}
    tensors = {name: x for name, x in tensors.items() if name not in changes or changes[name] is not None}
    save_file(tensors, path, {"digest": digest(tensors)})


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def drop_layer(path: Path) -> None:
    change(path, **{f"{length:g}/unet.conv_in.bias": None for length in SIGMA_RELS})


def rename_network(path: Path) -> None:
    tensors = {name.replace("unet.", "other."): x for name, x in load_file(path).items()}
    save_file(tensors, path, {"digest": digest(tensors)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda paths: flip_a_bit(paths[2]),
            "step-3.safetensors is damaged .*not match its checksum.*Delete it",
        ),
        (lambda paths: paths[4].write_bytes(paths[4].read_bytes()[:-9]), "step-5.safetensors is damaged"),
        (lambda paths: drop_layer(paths[3]), "step-4.safetensors is of another network .*than .*step-1.safetensors"),
        (lambda paths: [*map(drop_layer, paths)], "are not of its unet. They are of another run"),
        (lambda paths: [*map(rename_network, paths)], "have other, but its pipeline unet"),
        (
            lambda paths: [path.unlink() for path in paths],
            "has no snapshots. Train with --posthoc_ema_steps, such as 1",
        ),
        (lambda paths: [path.unlink() for path in paths[-4:]], "error of .*Restore the missing snapshots"),
    ],
)
def test_wrong_snapshots_raise(run, tmp_path, edit, message):
    model = Path(shutil.copytree(run, tmp_path / "run"))
    edit(list(snapshots(model).values()))
    with pytest.raises(UserError, match=message):
        reconstruct(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_snapshots_are_named(run, tmp_path, caplog):
    model = Path(shutil.copytree(run, tmp_path / "run"))
    for step in (1, 5):
        snapshots(model)[step].unlink()
    out = reconstruct(model, tmp_path / "out")
    assert "those of the steps: 1, 5" in caplog.text
    assert_averages(out, combined(model, 0.08), "unet")


def test_wrong_folders_raise(run, tmp_path, trained_model):
    for model, message in (
        (tmp_path / "nowhere", "nowhere is not a folder. Pass the output folder of a run with --posthoc_ema_steps"),
        (run / "unet", "is a part of a saved pipeline"),
        (trained_model, "has no snapshots"),
    ):
        with pytest.raises(UserError, match=message):
            reconstruct(model, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty. Pass a different folder"):
        reconstruct(run, run)
    (tmp_path / "out").mkdir()
    with locked_elsewhere(tmp_path / "out" / LOCK_FILE), pytest.raises(UserError, match="is in use by process 7"):
        reconstruct(run, tmp_path / "out")
    (tmp_path / "null").mkdir()
    for file in ("model_index.json", "unet", "scheduler"):
        (tmp_path / "null" / file).symlink_to(run / file)
    (tmp_path / "null" / "run.json").write_text('{"steps": 8, "config": null}')
    with pytest.raises(UserError, match="has no snapshots"):
        reconstruct(tmp_path / "null", tmp_path / "out")


def test_unfinished_run_raises(run, tmp_path):
    model = Path(shutil.copytree(run, tmp_path / "run"))
    (model / "model_index.json").unlink()
    (model / "checkpoint-2").mkdir()
    with pytest.raises(UserError, match="training run has not finished. Its newest checkpoint is checkpoint-2"):
        reconstruct(model, tmp_path / "out")
