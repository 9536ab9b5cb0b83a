"""Test classifier guidance in the pipeline: exactness, labels, scales, cost, and bad input."""

import itertools

import pytest
import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.evaluation.mixture import GaussianMixtureClassifier, ToyProblem
from diffusers_cfg.evaluation.settings import GUIDANCE
from tests.support.models import generators

# KDPM2 of diffusers cannot take a network that predicts x.
EXACT = [
    (name, prediction_type)
    for name, prediction_type in itertools.product(CFGPipeline.schedulers, ("epsilon", "v_prediction", "sample"))
    if not (prediction_type == "sample" and name.startswith("KDPM2"))
]
# With ε, these keep what the rounding of float32 moves in the first x̃ = (z - σε) / α, where α is 4.5e-5 at λ = -20.
ROUNDED = ("DDIM", "KDPM2Ancestral")
SCALES = (0.0, 0.5, 1.0, 4.0)


def draw_rules(toy: ToyProblem, same_states: bool, steps: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
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

    images = toy.pipeline(
        [0, 1, 2] * (rules * len(SCALES)),
        **{name: [scale.get(name, 0.0) for scale in scales] for name in names},
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


@pytest.mark.parametrize(("name", "prediction_type"), EXACT)
def test_rules_agree_with_an_exact_classifier(name, prediction_type):
    """(1 + w) ε(z, c) - w ε(z) equals ε(z, c), ε(z), and both, guided by the exact classifier (section 3.1)."""
    toy = exact_problem(name, prediction_type)
    _, predictions = draw_rules(toy, same_states=True)
    torch.testing.assert_close(predictions, predictions[:, :1].expand_as(predictions), rtol=1e-5, atol=1e-5)
    images, _ = draw_rules(toy, same_states=False)
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
