"""Test the evaluation during training."""

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
from accelerate import Accelerator

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import parse_config
from diffusers_cfg.data.datasets import stack_images
from diffusers_cfg.data.sources import Digits, load_held_out_images
from diffusers_cfg.evaluation import in_training
from diffusers_cfg.evaluation.in_training import likelihood_evaluation, training_evaluation
from diffusers_cfg.evaluation.likelihood import estimate
from diffusers_cfg.evaluation.likelihood_data import random_part
from diffusers_cfg.evaluation.settings import EvaluationConfig
from diffusers_cfg.evaluation.sweep import run_sweep
from diffusers_cfg.method_settings import CFGConfig
from diffusers_cfg.variational_bound import bits_per_dim
from tests.support.models import make_pipeline, make_unet, vdm


@dataclass
class ToyMethod:
    """The attributes of a training method that the evaluation uses."""

    pipeline: CFGPipeline
    guidance_scales: list[float]
    num_inference_steps: int
    guidance: str = "classifier_free"


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


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_likelihood_during_training_matches_that_of_the_estimator(digits, monkeypatch, processes):
    """The processes divide the held-out images, and gather their terms."""
    monkeypatch.setattr(in_training, "training_evaluation", lambda *_: lambda _: {"recall/w=1": 0.5})
    monkeypatch.setattr(in_training, "TIMES_PER_IMAGE", 2)
    pipeline = vdm()
    method = ToyMethod(pipeline=pipeline, guidance_scales=[1.0], num_inference_steps=2)
    config = parse_config(CFGConfig, ["--train_val_split", "0.02", "--num_eval_samples", "20", "--eval_steps", "1"])
    gathered, found = [], {}

    def gather(terms: list) -> list:
        gathered[:0] = terms
        return gathered

    monkeypatch.setattr(in_training, "gather_object", gather)
    for rank in reversed(range(processes)):  # the main process is the last, and gets the terms of all
        accelerator = SimpleNamespace(
            num_processes=processes,
            process_index=rank,
            is_main_process=rank == 0,
            main_process_first=contextlib.nullcontext,
        )
        found[rank] = likelihood_evaluation(method, config, cast(Accelerator, accelerator), digits)(pipeline)
        assert rank == 0 or found[rank] == {"recall/w=1": 0.5}
    assert len(gathered) == processes

    held_out = stack_images(random_part(load_held_out_images(config), 20), config, 1, show_progress=False)
    terms = estimate(pipeline, held_out.images, held_out.class_labels, times_per_image=2)
    bits = bits_per_dim((1, 8, 8))
    for column, suffix in ((0, ""), (1, "_null")):
        total = bits * (terms.prior + terms.reconstruction + terms.diffusion[:, column]).mean()
        assert found[0][f"validation/bits_per_dim{suffix}"] == pytest.approx(total.item(), rel=1e-5)
        parts = [found[0][f"validation/{part}{suffix}"] for part in ("prior", "reconstruction", "diffusion")]
        assert sum(parts) == pytest.approx(total.item(), rel=1e-5)
    assert len(found[0]) == 1 + 8


@pytest.mark.parametrize("flags", [[], ["--train_val_split", "0.02", "--dry_run"]])
def test_no_likelihood_without_held_out_images(digits, monkeypatch, flags):
    monkeypatch.setattr(in_training, "training_evaluation", lambda *_: lambda _: {"recall/w=1": 0.5})
    config, method = parse_config(CFGConfig, ["--eval_steps", "1", *flags]), ToyMethod(vdm(), [1.0], 2)
    assert likelihood_evaluation(method, config, Accelerator(cpu=True), digits)(vdm()) == {"recall/w=1": 0.5}
