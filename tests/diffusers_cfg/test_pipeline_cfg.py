"""Test sampling with `CFGPipeline`: guidance, labels, schedulers, guiders and latents."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import guiders
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from tests.support.draws import assert_same_draws
from tests.support.models import generators, make_pipeline, make_unet


def draw(
    pipeline: CFGPipeline,
    class_labels,
    guidance_scale: float | list[float] | Callable[[float], Any] | None = 1.0,
    seeds: Iterable[int] = (0,),
    **settings: Any,
) -> torch.Tensor:
    """Return images as a tensor, with one seed per image."""
    settings = {"num_inference_steps": 4, "output_type": "pt", **settings}
    images = pipeline(class_labels, guidance_scale, generator=generators(*seeds), **settings).images
    assert isinstance(images, torch.Tensor)
    return images


def guided(pipeline: CFGPipeline, z, t, class_labels, guide_labels, w, guidance_rescale=0.0) -> torch.Tensor:
    preds = pipeline.predictions(z.to(pipeline.unet.dtype), t, class_labels, guide_labels, w)
    return pipeline.guide(*preds, w, guidance_rescale)


class Calls:
    """A record of the arguments that a network was called with."""

    def __init__(self, unet: torch.nn.Module):
        self.samples, self.timesteps, self.labels, self.scales = [], [], [], []
        unet.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, _, args, kwargs):
        self.samples.append(args[0])
        self.timesteps.append(args[1])
        self.labels.append(kwargs["class_labels"].tolist())
        if "guidance_scale" in kwargs:
            self.scales.append(kwargs["guidance_scale"].tolist())


@pytest.mark.parametrize("w", [-0.5, 0.3, 1.0, 4.0])
def test_guidance_matches_diffusers_original_formulation(pipeline, w):
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor(300.0), torch.tensor([0, 2])
    pred_cond = pipeline.unet(z, t, class_labels=labels).sample
    pred_uncond = pipeline.unet(z, t).sample
    guider = ClassifierFreeGuidance(guidance_scale=w, use_original_formulation=True)
    expected = guider.forward(pred_cond, pred_uncond).pred
    actual = guided(pipeline, z, t, labels, torch.tensor([3, 3]), torch.full((2, 1, 1, 1), w))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("w", "labels"), [(0.0, [2]), (-1.0, [3])])
def test_pass_with_zero_weight_is_skipped(pipeline, w, labels):
    """w = 0 is the conditional model bit for bit, and w = -1 the unconditional model."""
    calls = Calls(pipeline.unet)
    images = draw(pipeline, 2, w, output_type="latent")
    assert calls.labels == [labels] * 4

    scheduler, (generator,) = LogSNRScheduler(), generators(0)
    scheduler.set_timesteps(4)
    z = torch.randn(1, 1, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        with torch.no_grad():
            pred = pipeline.unet(z, t, class_labels=torch.tensor(labels)).sample
        z = scheduler.step(pred, t, z, generator=generator).prev_sample
    assert torch.equal(images, z)


def test_two_passes_run_in_one_batch(pipeline):
    calls = Calls(pipeline.unet)
    draw(pipeline, [1, 2], [0.0, 2.5], seeds=(0, 1))
    assert calls.labels == [[1, 2, 3, 3]] * 4


def test_one_guidance_scale_per_image(pipeline):
    together = draw(pipeline, [1, 1, 1], [-1.0, 0.0, 3.0], seeds=(0, 0, 0))
    for image, w in zip(together, (-1.0, 0.0, 3.0), strict=True):
        torch.testing.assert_close(image, draw(pipeline, 1, w)[0], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert (together[1] - together[2]).abs().max() > 1e-3


def test_image_does_not_depend_on_its_batch(pipeline):
    together = draw(pipeline, [0, 1, 2], 2.0, seeds=(5, 6, 7))
    torch.testing.assert_close(together[1:2], draw(pipeline, 1, 2.0, seeds=(6,)), rtol=1e-4, atol=1e-5)


def test_prediction_of_a_bfloat16_network_is_float32(pipeline):
    pipeline.to(torch.bfloat16)
    z, w = torch.randn(1, 1, 8, 8), torch.ones(1, 1, 1, 1)
    pred = guided(pipeline, z, torch.tensor(5.0), torch.tensor([0]), torch.tensor([3]), w)
    assert pred.dtype == torch.float32
    assert draw(pipeline, 0).isfinite().all()


def test_steps_outside_the_interval_take_one_pass(pipeline):
    calls = Calls(pipeline.unet)
    latents = draw(pipeline, 1, 2.0, guidance_interval=(0.1, 1.1), num_inference_steps=9, output_type="latent")
    u = torch.linspace(1, 0, 9, dtype=torch.float64)
    sigma = (-LogSNRScheduler().log_snr(u) / 2).exp()
    inside = [0.1 < value <= 1.1 for value in sigma.tolist()]
    assert inside == [False, False, False, False, True, True, True, True, False]
    assert calls.labels == [[1, 3] if guided else [1] for guided in inside]

    scale = iter(2.0 if guided else 0.0 for guided in inside)
    by_schedule = draw(pipeline, 1, lambda _: next(scale), num_inference_steps=9, output_type="latent")
    assert torch.equal(latents, by_schedule)


def test_guidance_schedule_receives_the_log_snr_of_each_step(pipeline):
    seen = []

    def schedule(log_snr):
        seen.append(log_snr)
        return [1.0, 0.0]

    together = draw(pipeline, [0, 0], schedule, seeds=(0, 0))
    assert seen == pytest.approx(LogSNRScheduler().log_snr(torch.linspace(1, 0, 4, dtype=torch.float64)).tolist())
    torch.testing.assert_close(together[0], draw(pipeline, 0, 1.0)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], draw(pipeline, 0, 0.0)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_log_snr_matches_the_schedulers_steps(pipeline, name):
    pipeline.scheduler = getattr(diffusers, name, LogSNRScheduler).from_config(pipeline.scheduler.config)
    seen = []
    draw(pipeline, 0, lambda log_snr: seen.append(log_snr) or 0.0, num_inference_steps=10)
    assert seen == pipeline.log_snr().tolist()
    assert len(seen) == pipeline.num_timesteps
    assert seen == sorted(seen) or name == "KDPM2AncestralDiscreteScheduler"  # which evaluates half a step ahead
    if name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        pipeline.scheduler.set_timesteps(10)
        sigmas = torch.tensor(seen[:-1]).mul(-0.5).exp()
        # Some schedulers round to a whole timestep, a relative error of up to 1/t in σ
        torch.testing.assert_close(sigmas, pipeline.scheduler.sigmas[: len(sigmas)].float(), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_interval": (1.0, 0.5)}, r"σ_lo < σ_hi, but is \(1.0, 0.5\)"),
        (
            {"guidance_interval": (0.5, 0.51)},
            r"None of the 4 steps is in guidance_interval \(0.5, 0.51\].*2.203e\+04",
        ),
        ({"guidance_scale": lambda log_snr: math.inf}, "inf"),
        ({"guidance_scale": lambda log_snr: [1.0, 2.0]}, r"shape \(2,\)"),
        ({"guidance_rescale": 1.5}, "guidance_rescale.*1.5"),
        ({"negative_class_labels": "seven"}, "'seven'"),
        ({"negative_class_labels": [0, 1, 2]}, "3 labels.*1 class_labels"),
        ({"guider": ClassifierFreeGuidance(), "guidance_scale": 1.0}, "guidance_scale cannot.*ClassifierFreeGuidance"),
        ({"guider": ClassifierFreeGuidance(), "guidance_interval": (0, 1)}, "guidance_interval cannot"),
        ({"guider": ClassifierFreeGuidance(), "guidance_rescale": 0.5}, "guidance_rescale cannot"),
        ({"guider": guiders.MagnitudeAwareGuidance()}, "MagnitudeAwareGuidance cannot.*token sequences"),
    ],
)
def test_invalid_guidance_is_refused_before_the_network_runs(pipeline, settings, message):
    calls = Calls(pipeline.unet)
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": 0, "num_inference_steps": 4, **settings})
    assert calls.samples == []


@pytest.fixture
def student() -> CFGPipeline:
    torch.manual_seed(1)
    unet = make_unet(max_guidance_scale=3.0)
    assert unet.guidance_embedding is not None
    torch.nn.init.normal_(unet.guidance_embedding.linear_2.weight)
    return make_pipeline(unet)


def test_student_takes_w_in_one_pass(student):
    calls = Calls(student.unet)
    images = draw(student, [0, 1, 1], [0.0, 1.0, 3.0], seeds=(0, 1, 1))
    assert calls.labels == [[0, 1, 1]] * 4
    assert (images[1] - images[2]).abs().max() > 1e-3
    torch.testing.assert_close(images[1:2], draw(student, 1, 1.0, (1,)), rtol=1e-4, atol=1e-5)
    calls.scales.clear()
    draw(student, 1, 2.0, num_inference_steps=9, guidance_interval=(0.1, 1.1))
    assert calls.scales == [[0.0]] * 4 + [[2.0]] * 4 + [[0.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 3.5}, "guidance_scale is 3.5, but this model was trained for 0 … 3"),
        ({"guidance_scale": -1.0}, "class_labels=-1"),
        ({"guidance_scale": lambda log_snr: 4.0 if log_snr > 0 else 0.0}, "guidance_scale is 4, but"),
        ({"negative_class_labels": 1}, "negative_class_labels cannot be used"),
        ({"guidance_rescale": 0.5}, "guidance_rescale cannot be used"),
        ({"guider": ClassifierFreeGuidance()}, "guider cannot be used"),
    ],
)
def test_student_refuses_settings_that_need_a_second_pass(student, settings, message):
    calls = Calls(student.unet)
    with pytest.raises(ValueError, match=message):
        student(**{"class_labels": 0, "num_inference_steps": 4, **settings})
    assert calls.samples == []
    student.guide_unet = make_unet()
    with pytest.raises(ValueError, match="guide_unet cannot be used"):
        draw(student, 0)


def test_default_scale_is_within_the_students_range():
    pipeline = make_pipeline(make_unet(max_guidance_scale=0.5))
    calls = Calls(pipeline.unet)
    draw(pipeline, 0, None)
    assert calls.scales == [[0.5]] * 4


def test_student_loads_with_and_without_remote_code(student, tmp_path):
    student.register_to_config(num_inference_steps=3)
    student.save_pretrained(tmp_path)
    images = draw(student, [0, 1], [0.5, 3.0], seeds=(0, 1), num_inference_steps=None)
    loaded: list[Any] = [CFGPipeline.from_pretrained(tmp_path)]
    loaded.append(diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True))
    assert type(loaded[1]) is not CFGPipeline
    for pipe in loaded:
        pipe.set_progress_bar_config(disable=True)
        calls = Calls(pipe.unet)
        again = draw(pipe, [0, 1], [0.5, 3.0], seeds=(0, 1), num_inference_steps=None)
        assert_same_draws(again, images, student, guidance_scale=3.0, num_inference_steps=3)
        assert calls.labels == [[0, 1]] * 3


def test_rescale_restores_the_conditional_standard_deviation(pipeline):
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = (z, torch.tensor(300.0), torch.tensor([0, 2]), torch.tensor([3, 3]))
    w = torch.full((2, 1, 1, 1), 3.0)
    cond, _ = pipeline.predictions(*arguments, 0 * w, needs_uncond=False)
    plain = guided(pipeline, *arguments, w)
    rescaled = guided(pipeline, *arguments, w, guidance_rescale=1.0)
    half = guided(pipeline, *arguments, w, guidance_rescale=0.5)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), cond.std((1, 2, 3)))
    assert not torch.allclose(plain.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=0.05)
    torch.testing.assert_close(half, (plain + rescaled) / 2)
    assert not torch.equal(draw(pipeline, 0, 3.0), draw(pipeline, 0, 3.0, guidance_rescale=0.7))


def test_negative_class_replaces_the_null_class(pipeline):
    calls = Calls(pipeline.unet)
    images = draw(pipeline, [0, 1], 1.5, seeds=(0, 1), negative_class_labels=["two", 0])
    assert calls.labels == [[0, 1, 2, 0]] * 4
    assert torch.equal(images, draw(pipeline, [0, 1], 1.5, seeds=(0, 1), negative_class_labels=torch.tensor([2, 0])))
    one_for_all = draw(pipeline, [0, 1], 1.5, seeds=(0, 1), negative_class_labels="two")
    assert torch.equal(one_for_all, draw(pipeline, [0, 1], 1.5, seeds=(0, 1), negative_class_labels=[2, 2]))
    assert torch.equal(draw(pipeline, 0, negative_class_labels=-1), draw(pipeline, 0))
    torch.testing.assert_close(draw(pipeline, 0, 3.0, negative_class_labels=0), draw(pipeline, 0, 0.0))


def test_soft_labels_mix_classes(pipeline):
    mixed = draw(pipeline, [{"zero": 0.3, 2: 0.7}, 1], seeds=(0, 1))
    weights = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    assert torch.equal(mixed, draw(pipeline, weights, seeds=(0, 1)))
    torch.testing.assert_close(mixed[1:], draw(pipeline, 1, seeds=(1,)))
    torch.testing.assert_close(draw(pipeline, {"zero": 1.0}), draw(pipeline, 0))
    assert (mixed[0] - draw(pipeline, 0)[0]).abs().max() > 1e-3
    assert (mixed[0] - draw(pipeline, 2)[0]).abs().max() > 1e-3
    assert draw(pipeline, {"zero": 0.5, "one": 0.5}, num_images_per_label=2, seeds=(0, 1)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("argument", ["class_labels", "negative_class_labels"])
@pytest.mark.parametrize(
    "labels",
    [3, [0, 3], np.array([0, 3]), torch.tensor([0, 3]), torch.tensor(3), {3: 1.0}, [{0: 1.0}, {-1: 0.5, 3: 0.5}]],
)
def test_one_based_label_is_not_the_null_class(pipeline, argument, labels):
    """The network takes the number of classes as the null class and would silently generate unconditional images."""
    message = (
        rf"^{argument} contains the unknown id 3, counted from 1\? The classes are 'zero' \(0\).*; -1 is the null class"
    )
    with pytest.raises(ValueError, match=message):
        draw(pipeline, **{"class_labels": [0, 1], "seeds": (0, 1), argument: labels})
    assert pipeline.unet(torch.zeros(1, 1, 8, 8), torch.tensor(5.0), torch.tensor([3])).sample.shape == (1, 1, 8, 8)


def test_mix_may_include_the_null_class(pipeline):
    calls = Calls(pipeline.unet)
    draw(pipeline, {-1: 0.25, "one": 0.75}, 0.0)
    assert calls.labels == [[[0.0, 0.75, 0.0, 0.25]]] * 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"zero": 0.5, "two": 0.6}, "add up to one"),
        ({"zero": 1.5, "two": -0.5}, "at least 0"),
        ({"seven": 1.0}, "'seven'"),
        (torch.ones(2, 5) / 5, r"\(2, 5\).*shape \(labels, 3\)\."),
        (torch.ones(2, 4) / 4, r"\(2, 4\).*shape \(labels, 3\), counted from 1\?.*null class, -1"),
        ({"zero": 0.5, 3: 0.5}, r"unknown id 3, counted from 1\?.*-1 is the null class"),
    ],
)
def test_invalid_soft_labels_are_refused(pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline, labels)


def test_autoguidance_uses_the_same_classes_in_both_networks(pipeline):
    torch.manual_seed(7)
    weak = UNet2DCFGModel.from_config(pipeline.unet.config, block_out_channels=(8, 8)).eval()
    strong = Calls(pipeline.unet)
    plain = draw(pipeline, [0, 2], 1.5, seeds=(0, 1))
    pipeline.guide_unet, calls = weak, Calls(weak)
    strong.labels.clear()
    z, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(300.0), torch.tensor([0, 2])
    with torch.no_grad():
        actual = guided(pipeline, z, t, labels, labels, torch.full((2, 1, 1, 1), 1.5))
        expected = 2.5 * pipeline.unet(z, t, class_labels=labels).sample - 1.5 * weak(z, t, class_labels=labels).sample
    torch.testing.assert_close(actual, expected)

    strong.labels.clear()
    calls.labels.clear()
    images = draw(pipeline, [0, 2], 1.5, seeds=(0, 1))
    assert strong.labels == calls.labels == [[0, 2]] * 4
    assert not torch.allclose(images, plain, atol=1e-3)
    calls.labels.clear()
    draw(pipeline, [0, 2], 1.5, seeds=(0, 1), negative_class_labels=-1)
    assert calls.labels == [[3, 3]] * 4
    draw(pipeline, 0, 0.0)
    assert len(calls.labels) == 4  # w = 0 needs no guide
    pipeline.guide_unet = None
    assert torch.equal(draw(pipeline, [0, 2], 1.5, seeds=(0, 1)), plain)


def test_guide_unet_for_different_classes_is_refused(pipeline):
    pipeline.guide_unet = make_unet(num_class_embeds=6)
    with pytest.raises(ValueError, match="guide_unet.num_classes must be the UNet's 3, but is 5"):
        draw(pipeline, 0)


ORIGINAL = {"guidance_scale": 2.0, "use_original_formulation": True}
MID_ATTENTION = {"indices": [0], "fqn": "mid_block.attentions", "skip_ff": False}
GUIDERS = {
    "ClassifierFreeGuidance": lambda: guiders.ClassifierFreeGuidance(**ORIGINAL),
    "AdaptiveProjectedGuidance": lambda: guiders.AdaptiveProjectedGuidance(
        **ORIGINAL, eta=0.0, adaptive_projected_guidance_momentum=-0.5
    ),
    "AdaptiveProjectedMixGuidance": lambda: guiders.AdaptiveProjectedMixGuidance(
        **ORIGINAL, adaptive_projected_guidance_start_step=1
    ),
    "ClassifierFreeZeroStarGuidance": lambda: guiders.ClassifierFreeZeroStarGuidance(**ORIGINAL, zero_init_steps=0),
    "TangentialClassifierFreeGuidance": lambda: guiders.TangentialClassifierFreeGuidance(**ORIGINAL),
    "AutoGuidance": lambda: guiders.AutoGuidance(**ORIGINAL, auto_guidance_config=LayerSkipConfig(**MID_ATTENTION)),
    "PerturbedAttentionGuidance": lambda: guiders.PerturbedAttentionGuidance(
        **ORIGINAL,
        perturbed_guidance_config=LayerSkipConfig(**MID_ATTENTION, skip_attention=False, skip_attention_scores=True),
        perturbed_guidance_stop=1.0,
    ),
    "SkipLayerGuidance": lambda: guiders.SkipLayerGuidance(
        **ORIGINAL, skip_layer_config=LayerSkipConfig(**MID_ATTENTION), skip_layer_guidance_stop=1.0
    ),
    "LTX2Guidance": lambda: guiders.LTX2Guidance(guidance_scale=3.0),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_diffusers_guiders_change_the_images_and_keep_no_state(pipeline, name):
    """Repeated calls agree, the network is unchanged, and only two guiders equal classifier-free guidance."""
    plain, guider = draw(pipeline, [0, 1], 2.0, seeds=(0, 1), output_type="latent"), GUIDERS[name]()
    images = draw(pipeline, [0, 1], None, seeds=(0, 1), output_type="latent", guider=guider)
    assert torch.equal(images, draw(pipeline, [0, 1], None, seeds=(0, 1), output_type="latent", guider=guider))
    assert torch.equal(plain, draw(pipeline, [0, 1], 2.0, seeds=(0, 1), output_type="latent"))
    same = torch.allclose(images, plain, rtol=1e-3, atol=1e-4)
    assert same == (name in ("ClassifierFreeGuidance", "LTX2Guidance"))
    assert (images - draw(pipeline, [0, 1], 0.0, seeds=(0, 1), output_type="latent")).abs().max() > 1e-2


def test_every_diffusers_guider_is_tested():
    tested = {*GUIDERS, *CFGPipeline.refused_guiders, "FrequencyDecoupledGuidance"}  # the last one needs kornia
    exported = {name for name in dir(guiders) if name.endswith("Guidance") and name != "BaseGuidance"}
    assert exported == tested


def test_guider_runs_only_the_passes_that_it_needs(pipeline):
    calls = Calls(pipeline.unet)
    draw(pipeline, 1, None, guider=guiders.ClassifierFreeGuidance(**ORIGINAL, stop=0.5))
    assert calls.labels == [[1], [3], [1], [3], [1], [1]]


def test_failed_pass_leaves_no_hook_in_the_network(pipeline):
    guider, plain = GUIDERS["SkipLayerGuidance"](), draw(pipeline, 0)
    forward, calls = pipeline.unet.forward, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    pipeline.unet.forward = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(pipeline, 0, None, guider=guider)
    pipeline.unet.forward = forward
    assert torch.equal(draw(pipeline, 0), plain)


def test_ids_names_and_tensors_are_equivalent_labels(pipeline):
    expected = draw(pipeline, [2, 0], seeds=(0, 1))
    for labels in (["two", "zero"], ["two", 0], torch.tensor([2, 0]), np.array([2, 0]), (2, "zero")):
        assert torch.equal(draw(pipeline, labels, seeds=(0, 1)), expected)
    assert torch.equal(draw(pipeline, "two"), draw(pipeline, 2))
    assert torch.equal(draw(pipeline, torch.tensor(2)), draw(pipeline, 2))


def test_minus_one_is_the_null_class(pipeline):
    torch.testing.assert_close(draw(pipeline, -1, 0.0), draw(pipeline, 0, -1.0))


def test_several_images_per_label(pipeline):
    images = draw(pipeline, [0, 2], [0.0, 3.0], seeds=(0, 1, 2, 3), num_images_per_label=2)
    expected = draw(pipeline, [0, 0, 2, 2], [0.0, 0.0, 3.0, 3.0], seeds=(0, 1, 2, 3))
    assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_labels": "seven"}, r"unknown name 'seven'.*'zero' \(0\), 'one' \(1\), 'two' \(2\)"),
        ({"class_labels": [0, 5]}, r"unknown id 5.*'two' \(2\)"),
        ({"class_labels": [-2]}, "unknown id -2"),
        ({"class_labels": torch.tensor([7])}, r"unknown id 7\. The classes"),
        ({"class_labels": torch.tensor([[0, 1]])}, r"shape \(1,\).*\(1, 2\)"),
        ({"class_labels": torch.tensor([True])}, "must be integers.*bool"),
        ({"class_labels": torch.tensor([0.5])}, r"shape \(1,\) \(torch.float32\).*ids must be integers"),
        ({"class_labels": [1.0]}, "1.0, which is neither"),
        ({"class_labels": [True]}, "True, which is neither"),
        ({"class_labels": [None]}, "None, which is neither"),
        ({"class_labels": []}, "empty"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, r"\(3,\).*per label \(2\).*per image \(4\)"),
        ({"guidance_scale": math.nan}, "nan"),
        ({"guidance_scale": [1.0, math.inf]}, "inf"),
        ({"num_inference_steps": 0}, "num_inference_steps.*0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps.*2.5"),
        ({"num_images_per_label": 0}, "num_images_per_label.*0"),
        ({"output_type": "jpeg"}, "'jpeg'"),
        ({"generator": generators(0)}, "1 generators.*each of 4 images"),
        ({"latents": torch.zeros(4, 3, 8, 8)}, r"\(4, 3, 8, 8\).*\(4, 1, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_invalid_arguments_are_refused_before_the_network_runs(pipeline, settings, message):
    calls = Calls(pipeline.unet)
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": [0, 1], "num_images_per_label": 2, **settings})
    assert calls.samples == []


def test_names_are_refused_if_the_model_has_none():
    with pytest.raises(ValueError, match="no class names"):
        draw(make_pipeline(id2label=None), "two")


@pytest.mark.parametrize(
    ("id2label", "message"), [({0: "a", 3: "b"}, r"\['3'\].*0 … 2"), ({0: "a", 1: "a"}, r"\['a'\] for more than one")]
)
def test_invalid_id2label_is_refused(id2label, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(id2label=id2label)


def test_model_trained_without_the_null_class_warns(caplog):
    diffusers.utils.logging.enable_propagation()
    pipeline = make_pipeline(conditioning_dropout_prob=0.0)
    draw(pipeline, 0, 0.0)
    assert "conditioning_dropout_prob" not in caplog.text
    draw(pipeline, 0, 1.0)
    assert "conditioning_dropout_prob = 0" in caplog.text
    caplog.clear()
    draw(make_pipeline(conditioning_dropout_prob=0.1), 0, 1.0)
    assert "conditioning_dropout_prob" not in caplog.text


def test_non_finite_images_raise():
    unet = make_unet()
    torch.nn.init.constant_(unet.get_parameter("conv_out.bias"), math.nan)
    with pytest.raises(FloatingPointError, match="float32.*guidance_scale up to 1"):
        draw(make_pipeline(unet), 0)


def test_output_types(pipeline):
    tensors = draw(pipeline, [0, 1], seeds=(0, 1))
    assert tensors.shape == (2, 1, 8, 8)
    assert tensors.min() >= 0
    assert tensors.max() <= 1
    arrays = pipeline([0, 1], num_inference_steps=4, generator=generators(0, 1), output_type="np").images
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    images = pipeline([0, 1], num_inference_steps=4, generator=generators(0, 1), output_type="pil").images
    assert [image.mode for image in images] == ["L", "L"]
    np.testing.assert_array_equal(np.asarray(images[1]), (arrays[1, ..., 0] * 255).round().astype(np.uint8))
    latents = draw(pipeline, [0, 1], seeds=(0, 1), output_type="latent")
    torch.testing.assert_close(tensors, (latents / 2 + 0.5).clamp(0, 1))


def test_return_dict(pipeline):
    (images,) = pipeline(0, num_inference_steps=2, output_type="pt", generator=generators(0), return_dict=False)
    assert torch.equal(images, draw(pipeline, 0, num_inference_steps=2))


def test_latents_are_the_initial_noise(pipeline):
    (generator,) = generators(0)
    latents = torch.randn(1, 1, 8, 8, generator=generator)
    out = pipeline(0, num_inference_steps=4, latents=latents, generator=[generator], output_type="pt").images
    assert torch.equal(out, draw(pipeline, 0))


def test_default_number_of_steps_is_the_pipelines(pipeline):
    calls = Calls(pipeline.unet)
    draw(pipeline, 0, 0.0, num_inference_steps=None)
    assert len(calls.labels) == pipeline.num_inference_steps == 64
    own = make_pipeline(num_inference_steps=5)
    calls = Calls(own.unet)
    draw(own, 0, 0.0, num_inference_steps=None)
    draw(own, 0, 0.0, num_inference_steps=2)
    assert len(calls.labels) == 5 + 2


@pytest.mark.slow
def test_compiled_network_compiles_once_per_number_of_passes(pipeline, tmp_path):
    """Vary w, labels and steps. aot_eager traces the network as inductor does, but generates no code."""
    torch._dynamo.reset()
    images = draw(pipeline, [0, 1], seeds=(0, 1))
    pipeline.unet = torch.compile(pipeline.unet, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(draw(pipeline, [0, 1], seeds=(0, 1)), images)
    draw(pipeline, [0, 1], 0.0, seeds=(0, 1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(pipeline, ["two", 1], [2.0, 0.5], seeds=(0, 1), num_inference_steps=6)
        draw(pipeline, [1, 1], -1.0, seeds=(0, 1), num_inference_steps=5)
        draw(pipeline, [2, 0], 1.0, seeds=(0, 1), num_inference_steps=9, guidance_interval=(0.1, 1.1))
    pipeline.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(CFGPipeline.from_pretrained(tmp_path), [0, 1], seeds=(0, 1)), images)


def test_callback(pipeline):
    seen = []

    def zero_at_the_end(pipe, i, t, tensors):
        seen.append((i, t.item(), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else {}

    images = draw(
        pipeline, 0, callback_on_step_end=zero_at_the_end, callback_on_step_end_tensor_inputs=["latents", "pred"]
    )
    timesteps = [999, pytest.approx(665.6667), pytest.approx(332.3333), -1]
    assert seen == [(i, t, ["latents", "pred"]) for i, t in enumerate(timesteps)]
    assert torch.equal(images, torch.full_like(images, 0.5))


def test_timesteps_reach_the_network_as_tensors(pipeline):
    calls = Calls(pipeline.unet)
    draw(pipeline, 0)
    assert [t.item() for t in calls.timesteps] == pytest.approx([999, 665.6667, 332.3333, -1])
    assert all(isinstance(t, torch.Tensor) for t in calls.timesteps)


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_every_listed_scheduler_recovers_the_data(name):
    """
    With the exact ε for data that is one known image, every sampler must return that image for every w. A scheduler
    whose inputs or first sample are not scaled returns a different one.
    """
    target = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8)
    reference = LogSNRScheduler()

    def exact(z, t, class_labels):
        alpha, sigma = reference.alpha_sigma(reference.u(t.double()))
        return UNet2DOutput(sample=((z - alpha * target) / sigma).float())

    pipeline = make_pipeline()
    pipeline.unet.forward = exact
    pipeline.scheduler = getattr(diffusers, name, LogSNRScheduler).from_config(reference.config)
    images = draw(pipeline, [0, 1], 1.5, seeds=(0, 1), num_inference_steps=20)
    torch.testing.assert_close(images, (target / 2 + 0.5).expand(2, -1, -1, -1), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_network_inputs_have_unit_variance(pipeline, name):
    """The first input is pure noise, which some schedulers scale by their largest σ."""
    pipeline.scheduler = getattr(diffusers, name, LogSNRScheduler).from_config(pipeline.scheduler.config)
    calls = Calls(pipeline.unet)
    draw(pipeline, [0] * 64, 0.0, seeds=range(64), num_inference_steps=5)
    assert calls.samples[0].std().item() == pytest.approx(1, abs=0.05)


def test_ddim_uses_the_noise_of_the_clipped_sample(pipeline):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = draw(pipeline, 0, 3.0, output_type="latent")
    scheduler, (generator,) = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config), generators(0)
    scheduler.set_timesteps(4)
    expected = {True: torch.randn(1, 1, 8, 8, generator=generator)}
    expected[False] = expected[True]
    for clipped, z in expected.items():
        for t in scheduler.timesteps:
            with torch.no_grad():
                pred = guided(pipeline, z, t, torch.tensor([0]), torch.tensor([3]), torch.full((1, 1, 1, 1), 3.0))
            out = scheduler.step(pred, t, z, use_clipped_model_output=clipped)  # pyright: ignore[reportArgumentType]
            z = out.prev_sample
        expected[clipped] = z
    assert torch.equal(latents, expected[True])
    assert not torch.allclose(latents, expected[False], atol=1e-3)


def test_lists_of_schedulers_agree():
    assert set(CFGPipeline.schedulers) == {"LogSNRScheduler", *LogSNRScheduler._compatibles}


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "PNDMScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
        "TCDScheduler",
    ],
)
def test_unsupported_schedulers_are_refused(pipeline, name):
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    calls = Calls(pipeline.unet)
    with pytest.raises(
        ValueError, match=f"{name} is not supported. Supported schedulers: LogSNRScheduler, DDIMParallelScheduler, "
    ):
        draw(pipeline, 0)
    assert calls.samples == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"prediction_type": "flow_prediction"}, "'flow_prediction'"),
    ],
)
def test_flow_matching_settings_are_refused(pipeline, settings, message):
    cls = diffusers.DPMSolverMultistepScheduler
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **settings)
    with pytest.raises(ValueError, match=message):
        draw(pipeline, 0)


@pytest.mark.parametrize("ends", [(0, 20), (-1, 20), (0.05, "a"), (float("nan"), 20), (20, 0.05), (0.05, float("inf"))])
def test_range_of_noise_levels_is_checked(pipeline, ends):
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(config, sigma_min=ends[0], sigma_max=ends[1])
    with pytest.raises(ValueError, match=r"\(sigma_min, sigma_max\) of UniPCMultistepScheduler must be positive, and"):
        draw(pipeline, 0)


def test_start_at_the_noisy_end_is_refused(pipeline):
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_exponential_sigmas=False
    )
    with pytest.raises(ValueError, match="EulerDiscreteScheduler starts at σ/α = 2202"):
        draw(pipeline, 0)


def test_scheduler_with_a_different_noise_process_is_refused(pipeline):
    own = pipeline.scheduler.config
    for scheduler, message in (
        (diffusers.DDIMScheduler(), r"DDIMScheduler does not match the noise process.*differs by up to 0\.\d+"),
        (diffusers.DDIMScheduler.from_config(own, num_train_timesteps=500, trained_betas=None), "does not match"),
        (diffusers.DDIMScheduler.from_config(own, prediction_type="v_prediction"), "'v_prediction' instead of 'eps"),
        (LogSNRScheduler.from_config(own, log_snr_min=-10.0), "LogSNRScheduler does not match the noise process"),
    ):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            draw(pipeline, 0)
    pipeline.scheduler = LogSNRScheduler.from_config(own)
    draw(pipeline, 0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler"])
def test_ddim_is_refused_if_its_steps_fall_short(pipeline, name):
    """DDIM steps by ⌊1000 / T⌋ timesteps even if its timesteps are spaced more widely, and never reaches the data."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=r"cannot take 256 steps: it steps by 3.*num_inference_steps=250"):
        draw(pipeline, 0, num_inference_steps=256)
    draw(pipeline, 0, num_inference_steps=250)


@pytest.fixture
def latent_pipeline():
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    vae = diffusers.AutoencoderKL(**settings).eval()
    return make_pipeline(make_unet(in_channels=2, out_channels=2), LogSNRScheduler(clip_sample=False), vae=vae)


def test_latents_are_shifted_and_scaled(latent_pipeline):
    vae, images = latent_pipeline.vae, torch.rand(2, 3, 16, 16) * 2 - 1
    latents = latent_pipeline.encode(images, generators(3)[0])
    expected = (vae.encode(images).latent_dist.sample(generators(3)[0]) - 0.25) * 0.5
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(latent_pipeline.decode(latents), vae.decode(latents / 0.5 + 0.25).sample)


def test_latent_model_generates_images(latent_pipeline):
    assert latent_pipeline.sample_shape == (2, 8, 8)
    assert latent_pipeline.image_shape == (3, 16, 16)
    assert draw(latent_pipeline, [0, 1], seeds=(0, 1)).shape == (2, *latent_pipeline.image_shape)
    assert draw(latent_pipeline, 0, output_type="latent").shape == (1, *latent_pipeline.sample_shape)


def test_shapes_without_a_vae():
    pipeline = make_pipeline(make_unet(sample_size=(8, 16), in_channels=3, out_channels=3))
    assert pipeline.sample_shape == pipeline.image_shape == (3, 8, 16)
    assert draw(pipeline, 0).shape == (1, 3, 8, 16)
