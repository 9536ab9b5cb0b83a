"""Test classifier guidance in the pipeline: exactness, labels, scales, cost and state."""

import itertools
import threading
from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.evaluation.mixture import GaussianMixtureClassifier, ToyProblem
from diffusers_cfg.evaluation.settings import GUIDANCE
from tests.support.latents import make_vae
from tests.support.models import generators, make_classifier, make_pipeline, make_unet

# KDPM2 of diffusers cannot take a network that predicts x.
EXACT = [
    (name, prediction_type)
    for name, prediction_type in itertools.product(CFGPipeline.schedulers, ("epsilon", "v_prediction", "sample"))
    if not (prediction_type == "sample" and name.startswith("KDPM2"))
]
# The pipeline adds the guidance before the scheduler sees it, so a few pairs find most faults.
EVERYDAY = [pair for pair in EXACT if pair[1] == "v_prediction" or pair[0] in ("LogSNRScheduler", "DDIMScheduler")]
# With ε, these keep what the rounding of float32 moves in the first x̃ = (z - σε) / α, where α is 4.5e-5 at λ = -20.
ROUNDED = ("DDIM", "KDPM2Ancestral")
SCALES = (0.0, 0.5, 1.0, 4.0)


def draw_rules(toy: ToyProblem, same_states: bool, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw the same images by all rules of guidance, one rule after the other in one batch.

    Returns the images, `(rules, images, 1, 1, 2)`, and the prediction of each step, `(steps, rules, images, 1, 1, 2)`.
    With `same_states`, each step of every rule starts from the state of the first rule.
    """
    w = torch.tensor(SCALES).repeat_interleave(3)
    scales = [rule(value) for rule in GUIDANCE.values() for value in w.tolist()]
    names = ("guidance_scale", "classifier_guidance_scale")
    rules, predictions = len(GUIDANCE), []

    def keep(pipeline, step, timestep, tensors):
        predictions.append(tensors["pred"])
        latents = tensors["latents"]
        return {"latents": latents[: len(w)].repeat(rules, 1, 1, 1)} if same_states else None

    given: dict[str, Any] = {name: [scale.get(name, 0.0) for scale in scales] for name in names}
    images = toy.pipeline(
        [0, 1, 2] * (rules * len(SCALES)),
        **given,
        num_inference_steps=steps,
        latents=toy.noise.repeat(rules, 1, 1, 1),
        generator=generators(*list(range(len(w))) * rules),
        output_type="latent",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["pred", "latents"],
    ).images
    assert isinstance(images, torch.Tensor)
    return images.unflatten(0, (rules, -1)), torch.stack(predictions).unflatten(1, (rules, -1))


def exact_problem(name: str, prediction_type: str) -> ToyProblem:
    """Return the mixture of Gaussians with its exact classifier."""
    toy = ToyProblem(3 * len(SCALES), prediction_type=prediction_type)
    toy.pipeline.classifier = GaussianMixtureClassifier(toy.model)  # pyright: ignore[reportAttributeAccessIssue]
    toy.use_scheduler(name)
    return toy


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [pair if pair in EVERYDAY else pytest.param(*pair, marks=pytest.mark.slow) for pair in EXACT],
)
def test_rules_agree_with_an_exact_classifier(name, prediction_type):
    """(1 + w) ε(z, c) - w ε(z) equals ε(z, c), ε(z), and both, guided by the exact classifier (section 3.1)."""
    toy = exact_problem(name, prediction_type)
    _, predictions = draw_rules(toy, same_states=True, steps=5)
    torch.testing.assert_close(predictions, predictions[:, :1].expand_as(predictions), rtol=1e-5, atol=1e-5)
    images, _ = draw_rules(toy, same_states=False, steps=8)
    is_rounded = prediction_type == "epsilon" and name.startswith(ROUNDED)
    torch.testing.assert_close(images, images[:1].expand_as(images), rtol=0, atol=1e-3 if is_rounded else 1e-5)
    assert (images[0, :3] - images[0, -3:]).abs().max() > 0.02  # w matters


@pytest.mark.parametrize("w", SCALES)
def test_rules_agree_with_one_scale_for_all_images(w):
    """These calls take one pass of the UNet where its other one has no weight."""
    toy = exact_problem("DPMSolverMultistepScheduler", "v_prediction")
    images = [
        toy.draw(scales.pop("guidance_scale"), 8, **scales) for scales in (dict(rule(w)) for rule in GUIDANCE.values())
    ]
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=0, atol=1e-5)


Z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
STEPS = 4


class Calls:
    """The inputs of the calls of a network."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.samples, self.timesteps = [], []
        network.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, network, args, kwargs):
        self.samples.append(args[0])
        self.timesteps.append(args[1].item())

    @property
    def sizes(self) -> list[int]:
        """The number of samples of each call."""
        return [len(sample) for sample in self.samples]


@pytest.fixture
def guided() -> CFGPipeline:
    return make_guided()


def make_guided(**settings) -> CFGPipeline:
    """Return a tiny pipeline with a classifier, whose logits are large enough to change the images."""
    classifier = make_classifier(**settings.pop("classifier", {}))
    torch.nn.init.normal_(classifier.head.weight)
    settings = {
        "scheduler": LogSNRScheduler(prediction_type="v_prediction", clip_sample=False),
        "unet": make_unet(),
        **settings,
    }
    return make_pipeline(**settings, classifier=classifier)


def draw(pipeline, class_labels: Any = (0, 1), guidance_scale: Any = None, seeds=(0, 1), **call) -> torch.Tensor:
    call = {"num_inference_steps": STEPS, "generator": generators(*seeds), "output_type": "latent", **call}
    return pipeline(class_labels, guidance_scale, **call).images


def prediction(pipeline, class_labels: Any, step: int = 2, **call) -> torch.Tensor:
    """Return the guided prediction at a step that starts from Z."""
    seen = []

    def keep(pipeline, i, t, tensors):
        seen.append(tensors["pred"])
        pipeline._interrupt = i == step
        return {"latents": Z.repeat(len(tensors["pred"]) // 2, 1, 1, 1)}

    names = ["latents", "pred"]
    draw(pipeline, class_labels, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names, **call)
    return seen[step]


def added(pipeline, class_labels: Any, s: Any = 2.0, **call) -> torch.Tensor:
    """Return what classifier guidance adds to a prediction."""
    guided = prediction(pipeline, class_labels, classifier_guidance_scale=s, **call)
    return guided - prediction(pipeline, class_labels, classifier_guidance_scale=0.0, **call)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_guidance_is_the_gradient_of_the_classifier(prediction_type):
    """-s σ ∇_z log p(c | z) for ε, and the change of v and x for the same change of ε, in float64."""
    guided = make_guided(scheduler=LogSNRScheduler(prediction_type=prediction_type, clip_sample=False))
    actual = added(guided, [0, 2], [2.0, -0.5])
    log_snr = guided.log_snr()[2]
    t = guided.scheduler.timestep(guided.scheduler.u_at(log_snr))
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    z = Z.double().requires_grad_()
    classifier = make_classifier().double()
    classifier.load_state_dict(guided.classifier.state_dict())
    log_prob = classifier(alpha * z, t).log_softmax(1)[[0, 1], [0, 2]]
    (gradient,) = torch.autograd.grad(log_prob.sum(), z)
    eps = -torch.tensor([2.0, -0.5]).view(2, 1, 1, 1) * sigma * gradient
    # v = (ε - σz) / α and x = (z - σε) / α at a given z
    expected = eps * {"epsilon": 1.0, "v_prediction": 1 / alpha, "sample": -sigma / alpha}[prediction_type]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 0.01


def test_one_scale_for_all_images_for_each_label_or_for_each_image(guided):
    seeds, given = (5, 6, 7, 8), {"num_images_per_label": 2, "guidance_scale": 0.5}
    for s, scales in (
        (1.5, [1.5] * 4),
        ([1.5, -3.0], [1.5, 1.5, -3.0, -3.0]),
        (torch.tensor([0.0, 1.5, -3.0, 0.0]), [0.0, 1.5, -3.0, 0.0]),
        (lambda log_snr: [1.0 if log_snr < 0 else 2.0, 0.0], None),
    ):
        images = draw(guided, ["zero", 2], seeds=seeds, classifier_guidance_scale=s, **given)
        for k, (label, seed) in enumerate(zip((0, 0, 2, 2), seeds, strict=True)):
            one = scales[k] if scales else lambda log_snr, k=k: (1.0 if log_snr < 0 else 2.0) if k < 2 else 0.0
            single = draw(guided, label, 0.5, (seed,), classifier_guidance_scale=one)
            torch.testing.assert_close(images[k : k + 1], single, rtol=1e-4, atol=1e-4)
    plain = draw(guided, ["zero", 2], seeds=seeds, **given)
    assert (draw(guided, ["zero", 2], seeds=seeds, classifier_guidance_scale=1.5, **given) - plain).abs().max() > 0.05


def test_schedule_receives_the_log_snr_of_each_step(guided):
    seen = []
    draw(guided, classifier_guidance_scale=lambda log_snr: seen.append(log_snr) or 1.0)
    assert seen == guided.log_snr().tolist()


def test_classes_are_mixed_by_their_log_probabilities(guided):
    """A mix has the weighted mean of log p(c | z). The null class has none, and a negative class is subtracted."""
    zero, two = (added(guided, [label, label]) for label in (0, 2))
    torch.testing.assert_close(added(guided, [{0: 0.25, 2: 0.75}, {"zero": 1}])[:1], (0.25 * zero + 0.75 * two)[:1])
    torch.testing.assert_close(added(guided, torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5]]))[1:], (zero + two)[1:] / 2)
    torch.testing.assert_close(added(guided, [{-1: 0.5, 0: 0.5}] * 2), zero / 2)
    torch.testing.assert_close(added(guided, [-1, 2])[1], two[1])
    assert added(guided, [-1, 2])[0].abs().max() == 0
    torch.testing.assert_close(added(guided, [0, 0], negative_class_labels=2), zero - two)
    torch.testing.assert_close(
        added(guided, [0, 2], negative_class_labels=[{0: 0.5, 2: 0.5}, -1])[0], (zero - two)[0] / 2
    )
    assert added(guided, [0, 0], negative_class_labels="zero").abs().max() == 0


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 3.0, "guidance_rescale": 0.7},
        {"guidance_scale": -1.0},
        {"guidance_scale": [0.0, 2.0]},
        {"guider": AdaptiveProjectedGuidance(guidance_scale=3.0)},
        {"guide_unet": make_unet(block_out_channels=(8, 8))},
    ],
)
def test_guidance_is_added_to_every_other_rule(guided, call):
    expected = added(guided, [0, 2])
    guided.guide_unet = call.pop("guide_unet", None)
    torch.testing.assert_close(added(guided, [0, 2], **call), expected, rtol=1e-4, atol=1e-5)


def test_latents_are_classified():
    unet, vae = make_unet(in_channels=2, out_channels=2, sample_size=4), make_vae()
    guided = make_guided(unet=unet, vae=vae, classifier={"in_channels": 2, "sample_size": 4})
    calls = Calls(guided.classifier)
    images = draw(guided, classifier_guidance_scale=100.0, output_type="pt")
    assert images.shape == (2, *guided.image_shape)
    assert {tuple(sample.shape) for sample in calls.samples} == {(2, 2, 4, 4)}
    assert (images - draw(guided, output_type="pt")).abs().max() > 1e-3


def test_image_does_not_depend_on_its_batch(guided):
    together = draw(guided, [0, 1, 2], seeds=(4, 5, 6), classifier_guidance_scale=[1.0, 0.0, 2.0])
    alone = draw(guided, 2, seeds=(6,), classifier_guidance_scale=2.0)
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "call", "sizes"),
    [
        ([0, 1, 2], {"classifier_guidance_scale": 1.0}, [3] * STEPS),
        ([0, 1, -1], {"classifier_guidance_scale": [1.0, 0.0, 1.0]}, [1] * STEPS),
        ([0, 1, 2], {"classifier_guidance_scale": [0.0, 0.0, 0.0]}, []),
        ([0, 1, 2], {}, []),
        (-1, {"classifier_guidance_scale": 1.0, "seeds": (0,)}, []),
        ([0, 1, 2], {"classifier_guidance_scale": lambda log_snr: [float(log_snr > 0), 0.0, 1.0]}, [1, 1, 2, 2]),
        # λ = -20, -1.1, 1.1 and 20: σ/α = 1.7 and 0.58
        ([0, 1, 2], {"classifier_guidance_scale": 1.0, "guidance_interval": (0.1, 2.0)}, [3, 3]),
    ],
)
def test_gradient_is_taken_once_a_step_for_guided_images_only(guided, labels, call, sizes):
    classifier, unet = Calls(guided.classifier), Calls(guided.unet)
    draw(guided, labels, 0.0, **{"seeds": (0, 1, 2), **call})
    assert classifier.sizes == sizes
    assert unet.sizes == [1 if labels == -1 else 3] * STEPS  # w = 0: one pass
    if call.get("guidance_interval"):
        assert classifier.timesteps == unet.timesteps[1:3]


def test_call_without_a_scale_is_that_of_a_pipeline_without_a_classifier(guided):
    expected = draw(make_pipeline(guided.unet, guided.scheduler))
    assert torch.equal(draw(guided), expected)
    assert torch.equal(draw(guided, classifier_guidance_scale=0.0), expected)
    assert not torch.equal(draw(guided, classifier_guidance_scale=1e-3), expected)


def test_unet_builds_no_graph_and_no_state_changes(guided):
    outputs, graphs = [], []
    guided.unet.register_forward_hook(lambda *args: outputs.append(args[-1].sample))
    guided.classifier.register_forward_hook(lambda *args: graphs.append(args[-1].requires_grad))
    guided.classifier.head.requires_grad_(False)
    images = draw(guided, classifier_guidance_scale=1.0)
    assert torch.is_grad_enabled()
    assert graphs == [True] * STEPS
    assert not any(tensor.requires_grad for tensor in (*outputs, images))
    for network in (guided.unet, guided.classifier):
        for name, parameter in network.named_parameters():
            assert parameter.grad is None, name
            assert parameter.requires_grad == (network is guided.unet or not name.startswith("head")), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_guides_in_every_grad_mode(guided, mode):
    expected = draw(guided, classifier_guidance_scale=1.0)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        images = draw(guided, classifier_guidance_scale=1.0)
        noise = torch.randn(2, 1, 8, 8)
        draw(guided, classifier_guidance_scale=torch.ones(2), latents=noise, class_labels=torch.tensor([0, 1]))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(images, expected)


def test_guides_under_autocast_in_float32(guided):
    dtypes = []
    guided.classifier.head.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        draw(guided, classifier_guidance_scale=1.0)
    assert dtypes == [torch.float32] * STEPS


def test_frozen_or_checkpointed_classifier_guides_alike(guided):
    expected = draw(guided, classifier_guidance_scale=1.0)
    guided.classifier.requires_grad_(False)
    assert torch.equal(draw(guided, classifier_guidance_scale=1.0), expected)
    guided.classifier.enable_gradient_checkpointing()
    torch.testing.assert_close(draw(guided, classifier_guidance_scale=1.0), expected)


def test_calls_in_several_threads_are_independent(guided):
    scales, images = (0.0, 1.0, 3.0), {}
    expected = {s: draw(guided, classifier_guidance_scale=s) for s in scales}
    threads = [
        threading.Thread(target=lambda s=s: images.update({s: draw(guided, classifier_guidance_scale=s)}))
        for s in scales
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for s in scales:
        torch.testing.assert_close(images[s], expected[s])
