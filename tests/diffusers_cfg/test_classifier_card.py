"""Test the model card of a diffusion model with a classifier of noisy images."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from diffusers_cfg.model_card import model_card
from tests.diffusers_cfg.test_model_card import EVALUATION, RUN, TABLE, parse
from tests.support.models import make_classifier, make_pipeline, make_unet

ACCURACY = {"log_snr_3.2_to_20.0": 0.9944, "log_snr_-0.8_to_0.0": 0.6833, "log_snr_-20.0_to_-3.2": 0.1667}
METHOD = {"trained_network": "classifier", "prediction_type": "epsilon", "conditioning_dropout_prob": 0.1}
CALL = 'pipe(class_labels=["zero"], guidance_scale=0.0, classifier_guidance_scale=1.0).images[0]'


def card(folder: Path, method: dict | None = None, run: dict = RUN, **settings) -> tuple[dict, str]:
    """Return the card of a pipeline with a classifier, by facts of the method, its run, and the pipeline's settings."""
    settings = {"conditioning_dropout_prob": 0.1, "num_inference_steps": 2, **settings}
    make_pipeline(classifier=make_classifier(block_out_channels=(8, 24)), **settings).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({**run, "method": METHOD if method is None else method}))
    (folder / "samples").mkdir()
    Image.new("L", (4, 4)).save(folder / "samples" / "step-7.png")
    return parse(model_card(folder, str(folder)))


def run_examples(text: str) -> None:
    """Run the code in a card."""
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        names = {}
        exec(block, names)
        assert names["image"].size == (8, 8)


def test_card_of_a_run_that_trained_the_classifier(tmp_path):
    metadata, text = card(tmp_path, {**METHOD, "classifier_accuracy": ACCURACY})
    assert {"classifier-guidance", "classifier-free-guidance", "class-conditional"} <= set(metadata["tags"])
    assert metadata["base_model"] == "someone/older"
    for line in (
        "trained for [classifier-free guidance](https://arxiv.org/abs/2207.12598) with diffusers-cfg. It has a "
        "classifier of noisy images, for [classifier guidance](https://arxiv.org/abs/2105.05233).",
        "![One row per class, one column per guidance scale w of the classifier](samples.png)",
        CALL,
        "subtracts s σ ∇ log p(c | z) from the ε̃ above. It is 0 by default.",
        "`guidance_scale=-1, classifier_guidance_scale=1 + w` and `guidance_scale=0, classifier_guidance_scale=w`",
        "This is the training of the classifier. The diffusion model was trained before and is unchanged.",
        "| diffusion model | someone/older |",
        "| parameters of the classifier | 1.5 M |",
        "| channels of the classifier | 8, 24 |",
        "```\n\nThe diffusion model of the command, `--pretrained_model_name_or_path`, is someone/older on the Hub.\n",
        "| log-SNR λ | -20 … 20 |",
        "| λ | accuracy |\n|---|---|\n| 3.2 … 20.0 | 0.99 |\n| −0.8 … 0.0 | 0.68 |\n| −20.0 … −3.2 | 0.17 |\n",
        "@inproceedings{dhariwal2021diffusion",
        "@article{ho2022classifier",
    ):
        assert line in text
    # The diffusion model's, not the classifier's
    for words in ("label dropout", "prediction type", "pretrained model", "cannot be guided", "None"):
        assert words not in text
    run_examples(text)


def test_card_of_a_classifier_of_an_unpublished_model(tmp_path):
    """The command has the last component of the path, which a reader could take for a name."""
    command = "python training/train_classifier.py --pretrained_model_name_or_path cfg-model"
    run = {name: value for name, value in RUN.items() if name != "base_model"}
    metadata, text = card(tmp_path, run={**run, "command": command})
    assert "base_model" not in metadata
    assert "| diffusion model | a local folder |" in text
    assert (
        f"{command}\n```\n\nThe diffusion model of the command, `--pretrained_model_name_or_path`, is a local folder.\n"
        in text
    )


@pytest.mark.parametrize("rule", [None, "classifier", "conditional_classifier", "both"])
def test_results_by_a_rule_name_it_beside_w(tmp_path, rule):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps({**EVALUATION, "guidance": {"rule": rule}}))
    (tmp_path / "evaluation" / "metrics.md").write_text(TABLE)
    for name in ("grid.png", "curves.png"):
        Image.new("L", (4, 4)).save(tmp_path / "evaluation" / name)
    metadata, text = card(tmp_path)
    words = f" by the rule {rule}" if rule else ""
    names = [metric["name"] for metric in metadata["model-index"][0]["results"][0]["metrics"]]
    assert f"Fréchet distance at w = 0{words}, 1000 samples, 127 network evaluations, features of small-0123" in names
    grid = f"One row per guidance scale w{words}; each column uses the same noise"
    assert metadata["widget"][-1] == {"text": grid, "output": {"url": "evaluation/grid.png"}}
    assert f"![{grid}](evaluation/grid.png)" in text
    assert f"![Metrics as a function of the guidance scale{words}](evaluation/curves.png)" in text


def test_card_of_a_classifier_whose_accuracy_was_not_measured(tmp_path):
    _, text = card(tmp_path)
    assert "This is the training of the classifier." in text
    assert "accuracy" not in text


def test_card_of_a_diffusion_model_to_which_a_classifier_was_added(tmp_path):
    """The record is that of the diffusion model."""
    metadata, text = card(tmp_path, {"prediction_type": "epsilon"})
    assert "classifier-guidance" in metadata["tags"]
    for line in (
        "| label dropout p_uncond | 0.1 |",
        "| pretrained model | someone/older |",
        "| parameters | 1.5 M |",
        "| channels | 8, 16 |",
        CALL,
    ):
        assert line in text
    assert "![One row per class, one column per guidance scale w](samples.png)" in text
    for words in ("This is the training of the classifier", "Accuracy of the classifier", "of the command"):
        assert words not in text


def test_card_of_a_classifier_of_an_unconditional_model(tmp_path):
    metadata, text = card(tmp_path, unet=make_unet(num_class_embeds=None), conditioning_dropout_prob=None)
    assert "classifier-free-guidance" not in metadata["tags"]
    for line in (
        "An unconditional diffusion model of 8×8 grayscale images of someone/scribbles, 3 classes, trained with ",
        'pipe(class_labels=["zero"], classifier_guidance_scale=2.0).images[0]',
        "`class_labels` are for the classifier alone. The default 1 samples p(x | c) if the classifier is exact",
        "| 2 | two |",
    ):
        assert line in text
    assert "`guidance_scale`" not in text
    run_examples(text)


def test_card_of_a_classifier_of_a_model_without_label_dropout(tmp_path):
    _, text = card(tmp_path, conditioning_dropout_prob=0.0)
    assert 'class_labels=["zero"], guidance_scale=0.0, classifier_guidance_scale=1.0)' in text
    assert "without label dropout and cannot be guided by itself. Use 0." in text
    assert "If the classifier were exact, `guidance_scale=0, classifier_guidance_scale=w` would" in text
    assert "guidance_scale=-1" not in text
    run_examples(text)


@pytest.mark.parametrize("settings", [{}, {"guide_unet": make_unet()}])
def test_card_without_a_classifier_does_not_mention_one(tmp_path, settings):
    make_pipeline(**settings).save_pretrained(tmp_path)
    metadata, text = parse(model_card(tmp_path, "me/scribbles"))
    assert "classifier-guidance" not in metadata["tags"]
    for words in ("classifier_guidance_scale", "2105.05233", "dhariwal", "classifier of noisy"):
        assert words not in text
