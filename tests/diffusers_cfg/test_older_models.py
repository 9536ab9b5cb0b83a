"""Test that models saved by version 573b54d load with and without remote code and generate the same images."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from tests.support.draws import assert_same_draws
from tests.support.models import generators
from tests.support.runs import distill, train

FOLDER = Path(__file__).parents[1] / "support" / "models-573b54d"
EXPECTED = load_file(FOLDER / "images.safetensors")


@pytest.mark.parametrize("remote_code", [False, True])
@pytest.mark.parametrize("name", ["plain", "student", "plain, the paper's sampler"])
def test_older_models_generate_the_same_images(name, remote_code):
    folder = FOLDER / name.split(",")[0]
    pipeline: Any  # with remote code an instance of the folder's own class
    if remote_code:
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    else:
        pipeline = CFGPipeline.from_pretrained(folder)
    call: dict[str, Any] = {}
    if "paper" in name:
        pipeline.scheduler, call = LogSNRScheduler.from_config(pipeline.scheduler.config), {"num_inference_steps": 8}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["three", 7], [0.0, 2.5], generator=generators(0, 1), output_type="pt", **call).images
    steps = call.get("num_inference_steps", pipeline.num_inference_steps)
    assert_same_draws(images, EXPECTED[name], pipeline, guidance_scale=2.5, num_inference_steps=steps)


def test_training_and_distillation_start_from_older_models(tmp_path):
    train(tmp_path / "more", "--pretrained_model_name_or_path", str(FOLDER / "plain"), "--max_train_steps", "1")
    distill(FOLDER / "plain", tmp_path / "student", "--max_train_steps", "1")
    steps = ["--student_steps", "2", "--teacher_steps", "4"]
    distill(FOLDER / "student", tmp_path / "steps", *steps, "--max_train_steps", "1", "--resolution", "8")
