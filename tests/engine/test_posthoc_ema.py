"""Test the post-hoc EMA: its averages, its snapshots, and the exact resume of both."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_cfg.config import UserError
from diffusers_cfg.engine import posthoc_ema
from diffusers_cfg.engine.checkpoint import POSTHOC_EMA, verify_checkpoint, write_checksums
from diffusers_cfg.engine.posthoc_ema import SIGMA_RELS, PowerAverages, fit_profile, gamma_of, snapshot_steps
from diffusers_cfg.model_files import checkpoints, snapshots
from tests.support.runs import SMALLEST, WEIGHTS, assert_same_tensors, launch, train

EVERY_STEP = [*SMALLEST, "--checkpointing_steps", "1", "--max_train_steps", "8", "--posthoc_ema_steps", "3"]
RESUME = ["--resume_from_checkpoint"]
Usage = namedtuple("Usage", "total used free")


def weights_of(steps: int, sigma_rel: float) -> np.ndarray:
    """Return the integral of the profile over each step, (steps,)."""
    ends = (np.arange(steps + 1) / steps) ** (gamma_of(sigma_rel) + 1)
    return np.diff(ends)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the output folder of a run with a checkpoint at each step, and snapshots at the steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("posthoc") / "out"
    train(folder, *EVERY_STEP)
    return folder


def assert_same_snapshots(first: Path, second: Path) -> None:
    assert [path.name for path in snapshots(first).values()] == [path.name for path in snapshots(second).values()]
    for a, b in zip(snapshots(first).values(), snapshots(second).values(), strict=True):
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.288675, 0.0)])
def test_exponents_are_those_of_the_paper(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)
    gamma = gamma_of(sigma_rel)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.28868, 1.0, float("nan"), float("inf")])
def test_lengths_that_no_rising_profile_has_raise(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel must lie between 0 and 0.2887, but is"):
        gamma_of(sigma_rel)


def test_averages_are_weighted_sums_of_the_weights():
    module, steps = torch.nn.Linear(3, 2), 300
    averages, generator, trajectory = PowerAverages({"unet": module}), torch.Generator().manual_seed(0), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.add_(0.1 * torch.randn(2, 3, generator=generator))
        averages.update(step)
        trajectory.append(module.weight.detach().double().clone())
    tensors = averages.tensors()
    assert tensors.keys() == {f"{length}/unet.{name}" for length in (0.05, 0.1) for name in ("weight", "bias")}
    for sigma_rel in SIGMA_RELS:
        expected = sum(w * x for w, x in zip(weights_of(steps, sigma_rel), trajectory, strict=True))
        torch.testing.assert_close(tensors[f"{sigma_rel}/unet.weight"].double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(tensors[f"{sigma_rel}/unet.bias"], module.bias.detach())
        assert not tensors[f"{sigma_rel}/unet.weight"].requires_grad


def test_snapshots_are_weighted_sums_of_the_weights(run):
    assert list(snapshots(run)) == [3, 6, 8]
    trained = [load_file(path / "unet" / WEIGHTS) for path in checkpoints(run)]
    for steps, path in snapshots(run).items():
        for name, tensor in load_file(path).items():
            length, _, parameter = name.partition("/unet.")
            weights = weights_of(steps, float(length))
            expected = sum(w * x[parameter].double() for w, x in zip(weights, trained, strict=False))
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.08, 0.15, 0.25])
def test_coefficients_solve_the_least_squares_problem(sigma_rel):
    """Compare with a fit on a grid of 40 points in each step (Gauss-Legendre), by a basis of all sums of 0."""
    steps, total = [*range(10, 91, 10), 97], 97
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    tau = (np.arange(total)[:, None] + (nodes + 1) / 2).ravel()
    root = np.sqrt(np.tile(node_weights / 2, total))

    def profile(length: float, step: int) -> np.ndarray:
        gamma = gamma_of(length)
        return root * np.where(tau <= step, (gamma + 1) * tau**gamma / float(step) ** (gamma + 1), 0)

    profiles = np.stack([profile(length, step) for step in steps for length in SIGMA_RELS], axis=1)
    target = profile(sigma_rel, total)
    last, differences = profiles[:, -1], profiles[:, :-1] - profiles[:, -1:]
    others = np.linalg.lstsq(differences, target - last, rcond=None)[0]
    expected = np.append(others, 1 - others.sum())
    fit = fit_profile(steps, sigma_rel, total)
    np.testing.assert_allclose(fit.coefficients.ravel(), expected, atol=1e-9)
    residual = np.linalg.norm(profiles @ expected - target) / np.linalg.norm(target)
    assert fit.residual == pytest.approx(residual, rel=1e-6)


@pytest.mark.parametrize("column", range(len(SIGMA_RELS)))
def test_tracked_profile_is_fitted_exactly(column):
    fit = fit_profile(range(7, 700, 7), SIGMA_RELS[column], 693)
    expected = np.zeros_like(fit.coefficients)
    expected[-1, column] = 1
    np.testing.assert_allclose(fit.coefficients, expected, atol=1e-9)
    assert fit.residual < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_fitted_average_is_within_the_error_of_its_profile(sigma_rel):
    """The error of a profile bounds that of the average (Cauchy-Schwarz), whatever the size of the weights."""
    steps, interval = 400, 10
    walk = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0).numpy()
    walk += 1e4
    fit = fit_profile(saved := snapshot_steps(interval, steps), sigma_rel, steps)
    tracked = [[weights_of(step, length) @ walk[:step] for length in SIGMA_RELS] for step in saved]
    error = abs((fit.coefficients * tracked).sum() - weights_of(steps, sigma_rel) @ walk)
    gamma = gamma_of(sigma_rel)
    norm = (gamma + 1) / (2 * gamma + 1) ** 0.5 / steps**0.5  # of the profile
    assert error <= fit.residual * norm * np.linalg.norm(walk - walk[-1])
    assert fit.residual < 0.02


def test_resumed_run_has_the_snapshots_of_an_uninterrupted_one(run, tmp_path):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    for step in (6, 8):
        snapshots(out)[step].write_bytes(b"of steps that are repeated")
    (out / "posthoc_ema" / "step-5.tmp-1").write_bytes(b"of a killed process")
    train(out, *EVERY_STEP, *RESUME, "checkpoint-5")
    assert_same_snapshots(out, run)
    assert not (out / "posthoc_ema" / "step-5.tmp-1").exists()
    assert_same_tensors(out / "checkpoint-8" / POSTHOC_EMA, run / "checkpoint-8" / POSTHOC_EMA)


def test_later_snapshots_are_deleted_before_the_first_step(run, tmp_path):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    train(out, *EVERY_STEP, *RESUME, "checkpoint-3", "--max_train_steps", "4")
    assert list(snapshots(out)) == [3, 4]


def test_snapshots_are_copied_from_the_folder_of_the_checkpoint(run, tmp_path):
    train(tmp_path / "out", *EVERY_STEP, *RESUME, str(run / "checkpoint-7"))
    assert_same_snapshots(tmp_path / "out", run)


def test_new_run_in_a_folder_without_a_checkpoint_deletes_its_snapshots(run, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(run / "posthoc_ema", tmp_path / "out" / "posthoc_ema")
    flags = [*SMALLEST, "--max_train_steps", "2", "--posthoc_ema_steps", "2"]
    train(tmp_path / "out", *flags, *RESUME, "latest")
    assert list(snapshots(tmp_path / "out")) == [2]


def test_nothing_is_saved_by_default(trained_model):
    assert not (trained_model / "posthoc_ema").exists()
    assert not list(trained_model.rglob(POSTHOC_EMA))


@pytest.mark.parametrize("interval", ["0", "4"])
def test_changed_interval_cannot_be_resumed(run, tmp_path, interval):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    message = f"cannot be resumed: --posthoc_ema_steps was 3 and is {interval}"
    with pytest.raises(UserError, match=message):
        train(out, *EVERY_STEP, *RESUME, "checkpoint-4", "--posthoc_ema_steps", interval)
    assert_same_snapshots(out, run)


def test_checkpoint_of_a_version_without_these_settings_cannot_be_resumed_with_others(trained_model, tmp_path):
    out = Path(shutil.copytree(trained_model, tmp_path / "out"))
    state = out / "checkpoint-2" / "state.json"
    record = json.loads(state.read_text())
    del record["settings"]["posthoc_ema_steps"], record["settings"]["optimizer"]
    state.write_text(json.dumps(record))
    write_checksums_of(state.parent)
    flags = ["--conditioning_dropout_prob", "0.2", *RESUME, "checkpoint-2", "--max_train_steps", "3"]
    with pytest.raises(UserError, match="--optimizer was 'adamw' and is 'muon'; --posthoc_ema_steps was 0 and is 2"):
        train(out, *flags, "--posthoc_ema_steps", "2")


def write_checksums_of(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    write_checksums(folder)


def test_checkpoint_without_its_averages_is_damaged(run, tmp_path):
    folder = Path(shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4"))
    assert verify_checkpoint(folder) is None
    (folder / POSTHOC_EMA).unlink()
    write_checksums_of(folder)
    assert verify_checkpoint(folder) == f"{POSTHOC_EMA} is missing"


def test_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    original = posthoc_ema.write_safetensors

    def full(tensors, metadata, path):
        if "step-6" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, metadata, path)

    monkeypatch.setattr(posthoc_ema, "write_safetensors", full)
    train(tmp_path / "out", *EVERY_STEP, "--checkpoints_total_limit", "1")  # which does not limit the snapshots
    assert "Failed to write the snapshot of step 6 for the post-hoc EMA: [Errno 28] No space left" in caplog.text
    assert list(snapshots(tmp_path / "out")) == [3, 8]
    assert (tmp_path / "out" / "model_index.json").is_file()


def numbers(folder: Path) -> int:
    """Return how many numbers the tensors of a folder contain."""
    return sum(tensor.numel() for file in folder.rglob("*.safetensors") for tensor in load_file(file).values())


def test_disk_for_the_snapshots_is_checked_before_the_first_step(run, tmp_path, monkeypatch, caplog):
    snapshot = 8 * numbers(run / "unet")  # two averages in float32
    checkpoint = 4 * numbers(run / "checkpoint-7")
    free = [2 * checkpoint + 2.5 * snapshot]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free[0]))
    flags = [*EVERY_STEP, "--checkpoints_total_limit", "1", "--dry_run"]
    with pytest.raises(UserError, match="2 checkpoints take .* and 3 snapshots .*or raise --posthoc_ema_steps"):
        train(tmp_path / "out", *flags)
    out = Path(shutil.copytree(run, tmp_path / "resumed"))
    (out / "posthoc_ema" / "step-8.safetensors").unlink()
    train(out, *flags, *RESUME, "checkpoint-7")  # two snapshots are on the disk already
    free[0] += snapshot
    train(tmp_path / "out", *flags)
    assert "Lower --checkpoints_total_limit" not in caplog.text


@pytest.mark.slow
def test_two_processes_write_the_snapshots_of_one(run, tmp_path):
    flags = ["--train_batch_size", "4", "--lr_warmup_steps", "1", "--learning_rate", "1e-3", "--report_to", "none"]
    launch(
        *EVERY_STEP, *flags, "--validation_steps", "0", "--num_inference_steps", "2", "--output_dir", "out",
        cwd=tmp_path, processes=2,
    )  # fmt: skip
    assert [path.name for path in sorted((tmp_path / "out" / "posthoc_ema").iterdir())] == [
        f"step-{step}.safetensors" for step in (3, 6, 8)
    ]
    for step, path in snapshots(run).items():
        assert_same_tensors(path, snapshots(tmp_path / "out")[step], rtol=1e-3, atol=2e-3)
