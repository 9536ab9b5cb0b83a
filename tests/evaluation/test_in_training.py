"""Test the evaluation during training."""

from dataclasses import dataclass

import pytest
from accelerate import Accelerator

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import in_training
from diffusers_cfg.evaluation.in_training import training_evaluation
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.evaluation.sweep import run_sweep
from diffusers_cfg.settings import CFGConfig
from tests.support.models import make_pipeline, make_unet


@dataclass
class ToyMethod:
    """The attributes of a training method that the evaluation uses."""

    pipeline: CFGPipeline
    guidance_scales: list[float]
    num_inference_steps: int


def test_metrics_during_training_match_those_of_a_sweep(digits, statistics_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(in_training, "CACHE_DIR", statistics_dir)
    pipeline = make_pipeline(make_unet(num_class_embeds=11), id2label=Digits().id2label)
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "run.json").write_text('{"data": {}}')
    method = ToyMethod(pipeline=pipeline, guidance_scales=[0.0, 1.0], num_inference_steps=2)
    config = parse_config(CFGConfig, ["--num_eval_samples", "20", "--eval_steps", "1"])
    metrics = training_evaluation(method, config, Accelerator(cpu=True), digits)(pipeline)

    settings = {"num_samples": 20, "num_inference_steps": 2, "guidance_scales": [0.0, 1.0]}
    folders = {"model": tmp_path / "model", "output_dir": tmp_path / "out", "statistics_dir": statistics_dir}
    rows = run_sweep(EvaluationConfig(**settings, **folders), Accelerator(cpu=True))["results"]
    for row in rows:
        for name in ("frechet_distance", "frechet_distance_error", "recall", "class_accuracy", "inception_score"):
            assert metrics[f"{name}/w={row['guidance_scale']:g}"] == pytest.approx(row[name], rel=1e-6), name
    assert not any("by_class" in name or "evaluations" in name for name in metrics)
