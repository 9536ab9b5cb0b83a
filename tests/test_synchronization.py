"""Test on the CPU that neither a training step nor a sampling step waits for a GPU."""

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import CFGPipeline, LogSNRScheduler, NoisyClassifier2DModel, UNet2DCFGModel
from tests.support.models import ddgan, make_classifier, make_pipeline, make_unet
from tests.support.synchronization import (
    guard_steps,
    leave_out_checks_on_the_cpu,
    move_to_meta,
    synchronizations,
)
from tests.support.trajectories import METHODS

X, MASK = torch.ones(3), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.sum().item(),
        lambda: bool(MASK.any()),
        lambda: float(X[0]),
        lambda: [1, 2, 3][X[0].long()],
        lambda: f"{X[0]:.1f}",
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.numpy(),
        lambda: X.nonzero(),
        lambda: X[MASK],
        lambda: X.clone().index_put_((MASK,), torch.ones(2)),
        lambda: X.masked_select(MASK),
        lambda: X.unique(),
        lambda: torch.equal(X, X),
        lambda: torch.allclose(X, X),
        lambda: torch.linalg.solve(torch.eye(3), X),
        lambda: X.repeat_interleave(torch.tensor([1, 2, 1])),
        lambda: torch.tensor(1.0, device=X.device),
    ],
)
def test_reads_are_found(read):
    found = []
    with synchronizations("cpu", found):
        read()
    assert len(found) >= 1


def test_other_operations_are_not_found():
    found = []
    with synchronizations("cpu", found):
        y = X.clone()
        y[MASK] = 0.0
        for function in (y.max, y.cumsum, y.repeat_interleave):
            function(0)
        X.where(MASK, y[MASK.long()])
    assert found == []


def test_copies_to_the_device_are_found():
    found = []
    with synchronizations("meta", found):
        X.to("meta", non_blocking=True)
        assert found == []
        X.to("meta")
        torch.empty(3, device="meta").copy_(X)
    assert found == ["_to_copy", "copy_"]


@pytest.mark.parametrize(
    ("method", "argv"),
    [
        ("cfg", ["--random_flip", "--gradient_accumulation_steps", "2", "--dropout", "0.1"]),
        pytest.param("adamw", [], marks=pytest.mark.slow),
        ("one_pass", ["--gradient_checkpointing"]),
        ("vdm", []),
        pytest.param("vdm", ["--noise_schedule", "fixed", "--diffusion_steps", "10"], marks=pytest.mark.slow),
        ("distillation", ["--student_steps", "4", "--teacher_steps", "8"]),
        ("ddgan", ["--loss", "relativistic"]),
        ("classifier", []),
    ],
)
def test_training_steps_do_not_wait(tmp_path, monkeypatch, method, argv):
    """Values are read only when they are logged, here at the last step."""
    found = []
    leave_out_checks_on_the_cpu(monkeypatch, found)
    calls = guard_steps(monkeypatch, lambda: synchronizations("cpu", found))
    METHODS[method](tmp_path, "--max_train_steps", "2", "--logging_steps", "2", "--checkpointing_steps", "0", *argv)
    assert found == []
    assert calls.count("train_step") == 2
    assert calls.count("_after_step") == 1


# UniPC copies its σ to the device in every step, and solves for its coefficients there, which waits.
SCHEDULERS = [name for name in CFGPipeline.schedulers if name != "UniPCMultistepScheduler"]


def copies_per_call(pipeline: CFGPipeline, steps: int, labels: Any = (0, 1), **call) -> int:
    """Return the number of copies to the device in a call. A step that reads from it raises an error."""
    found = []
    with synchronizations("meta", found):
        images = pipeline(list(labels), num_inference_steps=steps, output_type="pt", **call).images
    assert len(images) == len(labels)
    assert set(found) == {"_to_copy"}
    return len(found)


def use_a_cheap_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the layers of both networks, which are slow on the meta device and the same for all calls."""
    monkeypatch.setattr(UNet2DCFGModel, "forward", lambda self, z, t, class_labels: UNet2DOutput(z))
    monkeypatch.setattr(NoisyClassifier2DModel, "forward", lambda self, y, t: y.flatten(1)[:, : self.num_classes])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_waits_for_the_device(monkeypatch, name):
    pipeline = make_pipeline(scheduler=LogSNRScheduler().solver(getattr(diffusers, name, LogSNRScheduler)))
    move_to_meta(pipeline, monkeypatch)
    use_a_cheap_network(monkeypatch)
    assert copies_per_call(pipeline, 4) == copies_per_call(pipeline, 8)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": [1.0, 2.0]},
        {"guidance_scale": 0.0},
        {"guidance_scale": lambda log_snr: 1 / (1 + math.exp(log_snr)), "guidance_rescale": 0.5},
        {"guidance_interval": (0.1, 20.0)},
        {"labels": [{"zero": 0.5, "one": 0.5}, "two"], "negative_class_labels": [1, 0]},
        {"classifier_guidance_scale": 2.0},
        {"classifier_guidance_scale": [0.0, 1.0], "guidance_interval": (0.1, 20.0)},
        {"classifier_guidance_scale": lambda log_snr: [float(log_snr > 0), 1.0]},
    ],
)
def test_no_guidance_waits_for_the_device(monkeypatch, call):
    """The check of the gradients of a classifier reads the device once, at the end."""
    pipeline, checks = make_pipeline(classifier=make_classifier()), []
    move_to_meta(pipeline, monkeypatch)
    use_a_cheap_network(monkeypatch)
    monkeypatch.setattr(CFGPipeline, "_check_gradients", lambda self, are_finite, *_: checks.append(len(are_finite)))
    assert copies_per_call(pipeline, 4, **call) == copies_per_call(pipeline, 8, **call)
    assert len(checks) == 2
    assert (min(checks) > 0) == ("classifier_guidance_scale" in call)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: make_pipeline(guide_unet=make_unet()), {"guidance_scale": 1.0}),
        (lambda: make_pipeline(make_unet(max_guidance_scale=3.0)), {"guidance_scale": lambda log_snr: 1.0}),
        (lambda: make_pipeline(make_unet(num_class_embeds=None), classifier=make_classifier()), {}),
    ],
)
def test_no_network_waits_for_the_device(monkeypatch, make, call):
    pipeline = make()
    move_to_meta(pipeline, monkeypatch)
    monkeypatch.setattr(CFGPipeline, "_check_gradients", lambda *_: None)
    assert copies_per_call(pipeline, 2, **call) == copies_per_call(pipeline, 3, **call)


def test_generator_does_not_wait_for_the_device(monkeypatch):
    pipelines = [ddgan("--num_timesteps", str(steps)) for steps in (1, 2)]
    for pipeline in pipelines:
        move_to_meta(pipeline, monkeypatch)
    counts = [copies_per_call(pipeline, steps) for pipeline, steps in zip(pipelines, (1, 2), strict=True)]
    assert counts[0] == counts[1]
