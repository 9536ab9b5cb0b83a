"""Test the loss of classifiers of noisy images, and their accuracy on held-out images, on the real method object."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.guiders import AdaptiveProjectedGuidance

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.datasets import CachedImages, fingerprint, training_dataset
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.data.images import split_images
from diffusers_cfg.data.sources import Digits, load_held_out_images
from diffusers_cfg.engine.batches import probe_batches
from diffusers_cfg.engine.method import Batch
from diffusers_cfg.method_settings import ClassifierConfig
from diffusers_cfg.methods.classifier import ClassifierGuidance
from diffusers_cfg.randomness import Draws
from tests.support.models import make_pipeline, make_unet, vdm
from tests.support.runs import SMALLEST

BATCH_SIZE = 64
DIGITS = Digits()


def make_config(*argv: str, model: str = "model") -> ClassifierConfig:
    return parse_config(ClassifierConfig, ["--pretrained_model_name_or_path", model, *SMALLEST, *argv])


def make_diffusion_model(**settings) -> CFGPipeline:
    """Return a diffusion model of the digits with random weights."""
    return make_pipeline(make_unet(num_class_embeds=11), id2label=DIGITS.id2label, **settings)


def make_method(*argv: str, pipeline: CFGPipeline | None = None) -> ClassifierGuidance:
    """Return the method with a tiny classifier whose logits are not almost equal."""
    method = ClassifierGuidance(make_config(*argv), pipeline or make_diffusion_model())
    with torch.no_grad():
        method.pipeline.classifier.head.weight.normal_(0, 3)
    return method


def make_batch() -> Batch:
    """Return a batch of digits, of which the first is unlabelled."""
    x = to_float(torch.from_numpy(DIGITS.images[:BATCH_SIZE]).view(-1, 1, 8, 8))
    labels = torch.from_numpy(DIGITS.class_labels[:BATCH_SIZE]).clone()
    labels[0] = -1
    return Batch(x, labels, Draws(0, 0, range(BATCH_SIZE), BATCH_SIZE), 0)


@pytest.mark.parametrize("pipeline", [make_diffusion_model(), vdm()], ids=["cfg", "vdm"])
def test_loss_is_the_cross_entropy_of_noisy_images(pipeline):
    """Compute λ, the input of the network and the loss again, from the formulas of the papers in float64."""
    method, batch = make_method(pipeline=copy.deepcopy(pipeline)), make_batch()
    classifier = method.pipeline.classifier
    assert classifier.noise_process.items() <= pipeline.scheduler.config.items()
    terms = method.loss(method.modules, batch)
    terms.loss.mean().backward()
    gradients = {name: parameter.grad for name, parameter in classifier.named_parameters()}

    u, noise = batch.draws.uniform("time").double(), batch.draws.normal("noise", 1, 8, 8).double()
    process = pipeline.scheduler.config
    low, high = process.log_snr_min, process.log_snr_max
    if process.log_snr_schedule == "linear":
        log_snr = high + (low - high) * u
    else:  # the cosine schedule of the paper, section 4: λ = -2 log tan(au + b)
        b = np.arctan(np.exp(-high / 2))
        log_snr = -2 * torch.tan((np.arctan(np.exp(-low / 2)) - b) * u + b).log()
    alpha, sigma = (torch.sigmoid(sign * log_snr).sqrt().view(-1, 1, 1, 1) for sign in (1, -1))
    z = alpha * batch.x.double() + sigma * noise
    reference = copy.deepcopy(classifier).double()
    reference.zero_grad()
    log_prob = reference(alpha * z, 1000 * u - 1).log_softmax(1)
    loss = torch.stack([-row[c] if c >= 0 else 0 * row[0] for row, c in zip(log_prob, batch.class_labels, strict=True)])
    loss.mean().backward()
    torch.testing.assert_close(terms.loss.double(), loss.detach(), rtol=1e-4, atol=1e-4)
    assert terms.loss.dtype == torch.float32
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad.float(), rtol=1e-3, atol=1e-4, msg=name)
    assert all(gradient.any() for gradient in gradients.values())

    # Each labelled sample is logged at its own noise level only.
    level, correct = (8 * u).long(), (log_prob.argmax(1) == batch.class_labels).double()
    assert 0 < correct.mean() < 1
    for value, expected in (("loss", loss.detach()), ("accuracy", correct)):
        logged = torch.stack([logs for name, logs in terms.logs.items() if name.startswith(f"{value}/log_snr_")])
        assert logged.isfinite().sum(0).tolist() == [0] + [1] * (BATCH_SIZE - 1)
        found = logged[level, torch.arange(BATCH_SIZE)][1:].double()
        torch.testing.assert_close(found, expected[1:], rtol=1e-4, atol=1e-4)


def test_an_unlabelled_image_changes_no_weight():
    method, batch = make_method(), make_batch()
    batch.class_labels.fill_(-1)
    terms = method.loss(method.modules, batch)
    terms.loss.mean().backward()
    assert terms.loss.eq(0).all()
    assert all(value.isnan().all() for value in terms.logs.values())
    assert all(not parameter.grad.any() for parameter in method.pipeline.classifier.parameters())


def test_the_diffusion_model_is_not_trained():
    method = make_method()
    method.loss(method.modules, make_batch()).loss.mean().backward()
    assert tuple(method.modules) == method.averaged == method.objectives[0].trains == ("classifier",)
    assert all(p.grad is None and not p.requires_grad for p in method.pipeline.unet.parameters())
    (group,) = method.optimizer(method.objectives[0]).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in method.pipeline.classifier.parameters()]
    assert group["weight_decay"] == 0.01


def test_accuracy_is_that_of_the_held_out_images_by_noise_level(monkeypatch):
    """The classifier is right at the three least noisy levels, and answers 0 at the others."""
    config = make_config("--train_val_split", "0.05", "--train_batch_size", "8")
    images, _ = split_images(DIGITS, 0.05)
    method = ClassifierGuidance(config, make_diffusion_model(), images.present_classes)
    assert method.probe([]) == {}  # nothing is held out
    method.held_out = held_out = training_dataset(load_held_out_images(config), config, 1, show_progress=False)
    assert isinstance(held_out, CachedImages)
    used = torch.cat([batch.class_labels for batch in probe_batches(config, method, held_out, torch.device("cpu"))])
    assert sorted(used.tolist()) == sorted(held_out.class_labels.tolist())
    assert len(used) == 90
    calls = iter([(batch, level) for batch in used.split(8) for level in range(8)])

    def answer(sample, t):
        labels, level = next(calls)
        assert ((t + 1) / 125).long().tolist() == [level] * len(sample)
        return 9.0 * torch.nn.functional.one_hot(labels if level < 3 else 0 * labels, 10)

    monkeypatch.setattr(method.pipeline.classifier, "forward", answer)
    logged = method.probe([])
    zeros = (used == 0).float().mean().item()
    accuracy = [value for name, value in logged.items() if name.startswith("held_out/accuracy/log_snr_")]
    assert accuracy == pytest.approx([1, 1, 1] + [zeros] * 5)
    assert logged["held_out/accuracy"] == pytest.approx((3 + 5 * zeros) / 8)
    assert logged["held_out/loss"] == pytest.approx(9 * 5 / 8 * (1 - zeros), abs=0.01)
    assert method.facts()["classifier_accuracy"]["log_snr_3.2_to_20.0"] == 1


def test_the_measured_images_are_those_that_training_leaves_out(tmp_path):
    make_diffusion_model().save_pretrained(tmp_path)
    training, rest = split_images(DIGITS, 0.1)
    method = ClassifierGuidance.build(make_config(model=str(tmp_path)), training)
    assert isinstance(method.held_out, CachedImages)
    expected = training_dataset(rest, method.config, 1, show_progress=False)
    assert fingerprint(method.held_out) == fingerprint(expected)


def test_the_preview_guides_with_the_classifier(monkeypatch):
    method, calls = make_method("--validation_guidance_scales", "0", "2"), []
    method.present_classes = [3]

    def record(_, **call):
        calls.append((call["class_labels"], call["guidance_scale"], call["classifier_guidance_scale"]))
        return SimpleNamespace(images=torch.zeros(2, 1, 8, 8))

    monkeypatch.setattr(CFGPipeline, "__call__", record)
    method.preview(Accelerator(cpu=True))
    assert calls == [([3, 3], [0.0, 0.0], [0.0, 2.0])]


def test_the_probe_repeats_its_draws():
    """The accuracy over training is then that of the weights alone. Only the images of the training are flipped."""
    methods = [make_method("--train_val_split", "0.05", *flip) for flip in ([], [], ["--random_flip"])]
    for method in methods[1:]:
        method.pipeline.classifier.load_state_dict(methods[0].pipeline.classifier.state_dict())
    for method in methods:
        method.held_out = training_dataset(load_held_out_images(method.config), method.config, 1, show_progress=False)
    with torch.no_grad():
        first, *others = [method.probe([]) for method in methods]
        assert others == [first, first]
        assert methods[0].probe([]) == first


def test_the_preview_guides_the_conditional_model():
    method = make_method()
    assert method.guidance == "conditional_classifier"
    assert 'pipe(class_labels="zero", guidance_scale=0, classifier_guidance_scale=1)' in method.example()
    settings = {"classifier": method.pipeline.classifier, "id2label": DIGITS.id2label}
    assert make_method(pipeline=make_pipeline(make_unet(num_class_embeds=None), **settings)).guidance == "classifier"


def test_other_guidance_of_the_model_is_left_out(caplog):
    """A guider is refused together with the scales of the preview, and a guide network has no unconditional output."""
    guided = make_diffusion_model()
    guided.guide_unet = make_unet(num_class_embeds=11)
    assert make_method(pipeline=guided).pipeline.guide_unet is None
    guided = make_diffusion_model()
    guided.guider = AdaptiveProjectedGuidance()
    assert make_method(pipeline=guided).pipeline.guider is None
    for name in ("guide_unet", "guider"):
        assert f"Leaving out the {name} of the diffusion model" in caplog.text


def test_an_unconditional_model_gets_a_new_classifier(tmp_path):
    conditional = make_method(pipeline=make_diffusion_model()).pipeline
    pipeline = make_pipeline(
        make_unet(num_class_embeds=None),
        LogSNRScheduler(),
        id2label=DIGITS.id2label,
        classifier=conditional.classifier,
    )
    pipeline.save_pretrained(tmp_path)
    method = ClassifierGuidance.build(make_config("--train_val_split", "0", model=str(tmp_path)), DIGITS)
    assert method.pipeline.classifier is not conditional.classifier
    assert method.pipeline.num_classes == 10
    assert method.facts()["trained_network"] == "classifier"
    assert method.pipeline("three", num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_held_out_images_need_labels(tmp_path: Path, monkeypatch):
    """The accuracy would be that of none."""
    make_diffusion_model().save_pretrained(tmp_path)
    unlabelled = copy.copy(DIGITS)
    unlabelled.class_labels = np.full(len(DIGITS), -1)
    monkeypatch.setattr("diffusers_cfg.methods.classifier.load_held_out_images", lambda _: unlabelled)
    with pytest.raises(UserError, match="--train_val_split 0.1 holds out 1797 images, none of which has a label"):
        ClassifierGuidance.build(make_config(model=str(tmp_path)), DIGITS)
