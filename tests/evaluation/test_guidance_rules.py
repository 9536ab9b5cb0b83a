"""Test sampling and evaluation by each rule of guidance: scales, costs, refused models and settings, and resuming."""

import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from PIL import Image

from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.evaluation import reports
from diffusers_cfg.evaluation.guidance_rules import passes_per_step
from diffusers_cfg.evaluation.sampling import call_arguments, draw_images, draw_to_folder, load_pipeline
from diffusers_cfg.evaluation.settings import GUIDANCE, EvaluationConfig, SampleConfig
from diffusers_cfg.evaluation.sweep import check_sampling, run_sweep
from tests.support.models import ddgan, make_classifier, make_pipeline, make_unet, save_classified_digits


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory) -> Path:
    return save_classified_digits(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def unconditional_model(tmp_path_factory) -> Path:
    return save_classified_digits(tmp_path_factory.mktemp("saved") / "unconditional", num_class_embeds=None)


def sample_config(model: Path, output_dir: Path, *argv: str) -> SampleConfig:
    flags = ["--model", str(model), "--output_dir", str(output_dir), "--num_inference_steps", "2", "--num_samples", "4"]
    return parse_config(SampleConfig, [*flags, *argv])


@pytest.fixture
def evaluate(statistics_dir, tmp_path, monkeypatch):
    """Return a function that runs a sweep of 20 samples without its figure and returns its record."""
    monkeypatch.setattr(reports, "plot_curves", lambda *_: None)

    def evaluate(model: Path, *argv: str) -> dict:
        flags = ["--num_samples", "20", "--num_inference_steps", "2", "--guidance_scales", "0", "1"]
        folders = ["--output_dir", str(tmp_path / "out"), "--statistics_dir", str(statistics_dir)]
        config = parse_config(EvaluationConfig, ["--model", str(model), *flags, *folders, *argv])
        return run_sweep(config, Accelerator(cpu=True))

    return evaluate


def test_the_flag_takes_all_rules():
    assert list(get_args(get_type_hints(SampleConfig)["guidance"])) == list(GUIDANCE)


@pytest.mark.parametrize("rule", GUIDANCE)
def test_images_are_those_of_the_scales_of_the_rule(digits_model, tmp_path, rule):
    config = sample_config(digits_model, tmp_path / "out", "--guidance", rule, "--guidance_scale", "2")
    draw_to_folder(config, Accelerator(cpu=True))
    pipeline = load_pipeline(config, "cpu")
    scales = {
        "classifier_free": (2.0, 0.0),
        "classifier": (-1.0, 3.0),
        "conditional_classifier": (0.0, 2.0),
        "both": (1.0, 1.0),
    }[rule]
    call = {"guidance_scale": scales[0], "classifier_guidance_scale": scales[1], "num_inference_steps": 2}
    images, _ = draw_images(pipeline, torch.arange(4), list(range(4)), 0, **call)
    names = ("zero", "one", "two", "three")
    saved = [np.asarray(Image.open(tmp_path / "out" / name / f"{i:06}.png")) for i, name in enumerate(names)]
    assert np.array_equal(np.stack(saved), images[:, 0].numpy())


# Network evaluations and gradients at w = -1, 0 and 2 with two steps
COSTS = {
    "classifier_free": [(2, 0), (2, 0), (4, 0)],
    "classifier": [(2, 0), (2, 2), (2, 2)],
    "conditional_classifier": [(2, 2), (2, 0), (2, 2)],
    "both": [(4, 2), (2, 0), (4, 2)],
}


@pytest.mark.parametrize("rule", GUIDANCE)
def test_networks_and_gradients_are_counted(digits_model, tmp_path, rule):
    config = sample_config(digits_model, tmp_path, "--guidance", rule)
    pipeline = load_pipeline(config, "cpu")
    calls = [call_arguments(config, w) for w in (-1.0, 0.0, 2.0)]
    costs = [tuple(draw_images(pipeline, torch.arange(3), [0, 1, 2], 0, **call)[1]) for call in calls]
    assert costs == COSTS[rule]
    # The estimate of the progress bar counts the same passes.
    assert [2 * passes_per_step(config, w) for w in (-1.0, 0.0, 2.0)] == [sum(cost) for cost in costs]


@pytest.mark.parametrize("step", [1, 2])
def test_gradient_that_is_not_finite_is_named(digits_model, tmp_path, step):
    """In the first step no image exists yet, and in the second the images are still finite."""
    config = sample_config(digits_model, tmp_path, "--guidance", "classifier")
    pipeline, calls = load_pipeline(config, "cpu"), []

    def diverge(*_):
        calls.append(1)
        if len(calls) == step:
            pipeline.classifier.head.weight.data.fill_(torch.nan)

    pipeline.classifier.register_forward_pre_hook(diverge)
    message = f"In the batch of the images 6 … 7: The gradient of the classifier is not finite at step {step} of 2"
    with pytest.raises(UserError, match=message):
        draw_images(pipeline, torch.arange(2), [6, 7], 0, **call_arguments(config, 1.0))


def test_images_without_a_class_take_no_gradient(digits_model, tmp_path):
    config = sample_config(digits_model, tmp_path, "--guidance", "classifier")
    call = call_arguments(config, 1.0)
    _, cost = draw_images(load_pipeline(config, "cpu"), torch.tensor([0, -1, -1, 2]), [0, 1, 2, 3], 0, **call)
    assert cost == (2, 1)


def test_no_gradient_is_taken_outside_of_the_interval(digits_model, tmp_path):
    """σ/α is 22026 and 0.00005 at the two steps. Outside of the interval the model is conditional."""
    for rule, expected in (("classifier", (2, 1)), ("both", (3, 1))):
        config = sample_config(digits_model, tmp_path, "--guidance", rule, "--guidance_interval", "1e-5", "1")
        call = call_arguments(config, 1.0)
        assert draw_images(load_pipeline(config, "cpu"), torch.arange(2), [0, 1], 0, **call)[1] == expected


def test_sweep_records_the_rule_and_the_gradients(digits_model, evaluate, tmp_path):
    record = evaluate(digits_model, "--guidance", "conditional_classifier")
    assert [(row["network_evaluations"], row["gradients"]) for row in record["results"]] == [(2, 0), (2, 2)]
    assert record["guidance"]["rule"] == "conditional_classifier"
    text = (tmp_path / "out" / "metrics.md").read_text()
    header, _, _, guided, real = text.splitlines()[:5]
    assert header.endswith("| evaluations | gradients |")
    assert guided.endswith("| 2 | 2 |")
    assert real.endswith("|  |  |")
    assert (
        ", guided by the rule `conditional_classifier`: the conditional model and the classifier at the scale w. "
        "Evaluations are network evaluations per image, and gradients those" in text
    )


def test_classifier_free_sweep_has_no_column_of_gradients(digits_model, evaluate, tmp_path):
    record = evaluate(digits_model)
    text = (tmp_path / "out" / "metrics.md").read_text()
    assert text.splitlines()[0].endswith("| evaluations |")
    assert "gradients" not in text
    assert "rule" not in text
    assert record["guidance"]["rule"] is None


@pytest.mark.parametrize("rule", GUIDANCE)
def test_curves_name_the_rule_beside_w(tmp_path, monkeypatch, rule):
    figures = []
    monkeypatch.setattr(reports, "save_figure", lambda figure, _: figures.append(figure))
    row = {"guidance_scale": 0.0, "frechet_distance": 1.0, "class_accuracy": 0.5}
    record = {
        "results": [row],
        "floor": row,
        "metric_names": reports.metric_names("small"),
        "best": dict.fromkeys(row, 0.0),
        "guidance": {"rule": None if rule == "classifier_free" else rule},
        "num_samples": 20,
        "feature_extractor": {"name": "small"},
    }
    reports.plot_curves(record, tmp_path / "curves.png")
    label = "guidance scale w" if rule == "classifier_free" else f"guidance scale w by the rule {rule}"
    assert [axis.get_xlabel() for axis in figures[0].axes] == [label, label, "class accuracy"]


def test_all_rules_but_classifier_free_guidance_are_described():
    assert ["classifier_free", *reports.RULES] == list(GUIDANCE)


def drawn(tmp_path: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*.npz")}


def test_samples_of_older_versions_are_used_by_classifier_free_guidance_alone(digits_model, evaluate, tmp_path):
    """They record neither the rule nor the gradients."""
    results = evaluate(digits_model)["results"]
    settings = tmp_path / "out" / "samples" / "settings.json"
    content = json.loads(settings.read_text())
    assert (content.pop("guidance"), content.pop("classifier")) == (None, None)
    settings.write_text(json.dumps(content))
    for path in drawn(tmp_path):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file if name != "gradients"}
        np.savez(path, **arrays)
    before = drawn(tmp_path)
    assert evaluate(digits_model)["results"] == results
    assert drawn(tmp_path) == before
    with pytest.raises(UserError, match="different settings .guidance None, now 'both', classifier None, now '"):
        evaluate(digits_model, "--guidance", "both")


def test_samples_of_different_rules_and_classifiers_are_not_mixed(digits_model, evaluate, tmp_path):
    evaluate(digits_model, "--guidance", "both")
    with pytest.raises(UserError, match="different settings .guidance 'both', now None, classifier '"):
        evaluate(digits_model)
    with pytest.raises(UserError, match="different settings .guidance 'both', now 'classifier'"):
        evaluate(digits_model, "--guidance", "classifier")
    other = make_classifier(10)
    other.head.weight.data.mul_(2)
    with pytest.raises(UserError, match="different settings .classifier '"):
        evaluate(save_classified_digits(tmp_path / "other", classifier=other), "--guidance", "both")


def test_unconditional_network_is_sampled_and_evaluated(unconditional_model, evaluate, tmp_path):
    config = sample_config(unconditional_model, tmp_path / "images", "--guidance", "classifier")
    draw_to_folder(config, Accelerator(cpu=True))
    assert len(list((tmp_path / "images").glob("*/*.png"))) == 4
    rows = evaluate(unconditional_model, "--guidance", "classifier")["results"]
    assert [(row["network_evaluations"], row["gradients"]) for row in rows] == [(2, 2), (2, 2)]


def test_rules_that_need_a_null_class(evaluate, tmp_path):
    """At w = 0 the classifier guides the unconditional model, which an untrained null class is not."""

    def check(model: Path, rule: str) -> None:
        flags = ["--guidance", rule, "--guidance_scales", "0", "1", "--num_inference_steps", "2"]
        config = parse_config(EvaluationConfig, ["--model", str(model), *flags])
        check_sampling(config, load_pipeline(config, "cpu"))

    model = save_classified_digits(tmp_path / "model", conditioning_dropout_prob=0.0)
    for rule, scales in (("classifier", r"\[0.0, 1.0\]"), ("both", r"\[1.0\]")):
        with pytest.raises(UserError, match=f"--guidance_scales {scales} need a null class.*conditional_classifier"):
            evaluate(model, "--guidance", rule)
    check(model, "conditional_classifier")
    check(save_classified_digits(tmp_path / "u", num_class_embeds=None, conditioning_dropout_prob=0.0), "classifier")


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("plain", "classifier"),
        ("plain", "both"),
        ("student", "conditional_classifier"),
        ("few steps", "classifier"),
        ("generator", "both"),
    ],
)
def test_models_that_no_classifier_guides_are_refused(tmp_path, evaluate, kind, rule):
    """Also at the w whose scale of the classifier is zero."""
    if kind == "plain":
        model, message = (
            save_classified_digits(tmp_path / "model", classifier=None),
            "needs a classifier, but .*model has none",
        )
    elif kind == "generator":
        ddgan().save_pretrained(tmp_path / "model")
        model, message = tmp_path / "model", "denoising diffusion GAN, whose output .*--guidance classifier_free"
    else:
        scheduler = LogSNRScheduler().solver(DDIMScheduler) if kind == "few steps" else LogSNRScheduler()
        unet = make_unet(num_class_embeds=11, max_guidance_scale=4.0)
        make_pipeline(unet, scheduler, id2label=Digits().id2label).save_pretrained(tmp_path / "model")
        model, message = tmp_path / "model", "was trained to guide in one"
    w = {"classifier": "-1"}.get(rule, "0")
    flags = ["--guidance", rule]
    with pytest.raises(UserError, match=f"--guidance {rule} .*{message}"):
        evaluate(model, *flags, "--guidance_scales", w)
    with pytest.raises(UserError, match=f"--guidance {rule} .*{message}"):
        draw_to_folder(sample_config(model, tmp_path / "out", *flags, "--guidance_scale", w), Accelerator(cpu=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["classifier_free", "both"])
def test_unconditional_network_is_guided_by_the_classifier_alone(unconditional_model, evaluate, tmp_path, rule):
    message = f"--guidance {rule} needs classes, but the network of .* has none. Use --guidance classifier."
    with pytest.raises(UserError, match=message):
        evaluate(unconditional_model, "--guidance", rule)
    with pytest.raises(UserError, match=message):
        draw_to_folder(
            sample_config(unconditional_model, tmp_path / "out", "--guidance", rule, "--guidance_scale", "-1"),
            Accelerator(cpu=True),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guider", "ClassifierFreeGuidance"], "--guidance cannot be combined with --guider ClassifierFreeGuidance"),
        (["--guidance_rescale", "0.5"], "--guidance_rescale changes classifier-free guidance, which --guidance class"),
        (["--guide_model", "weak"], "--guide_model changes classifier-free guidance, which --guidance classifier does"),
    ],
)
def test_flags_that_the_rule_does_not_take_are_refused(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        sample_config(tmp_path, tmp_path, "--guidance", "classifier", *argv)


def test_rescaling_changes_only_the_classifier_free_part(digits_model, tmp_path):
    """With a rescale of 1 the classifier-free part has the deviation of the conditional prediction."""
    flags = ["--guidance", "both", "--guidance_rescale", "1"]
    call = call_arguments(sample_config(digits_model, tmp_path, *flags), 4.0)
    pipeline = load_pipeline(sample_config(digits_model, tmp_path), "cpu")
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found, times = [], []
    for scales in (call, {**call, "classifier_guidance_scale": 0.0}):
        preds = []

        def keep(_pipeline, _step, t, tensors, preds=preds):
            times.append(t)
            preds.append(tensors["pred"])
            return {}

        names = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["pred"]}
        pipeline(class_labels=[3], latents=noise, **names, **scales)
        found.append(preds[0])
    added = pipeline.classifier_guidance(noise, times[0], torch.eye(10)[[3]], torch.tensor([2.0]), -20.0)
    torch.testing.assert_close(found[0] - found[1], added, rtol=1e-3, atol=1e-7)
