import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import generators, make_pipeline, make_unet
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import CFGPipeline, LogSNRScheduler


def draw(pipeline: CFGPipeline, class_labels, guidance_scale=1.0, seeds=(0,), **settings) -> torch.Tensor:
    settings = {"num_inference_steps": 4, "output_type": "pt", **settings}
    return pipeline(class_labels, guidance_scale, generator=generators(*seeds), **settings).images


class Calls:
    """Remembers what the UNet was called with."""

    def __init__(self, unet: torch.nn.Module):
        self.samples, self.timesteps, self.labels = [], [], []
        unet.register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, _, args, kwargs):
        self.samples.append(args[0])
        self.timesteps.append(args[1])
        self.labels.append(kwargs["class_labels"].tolist())


# ----- the guidance rule -----


@pytest.mark.parametrize("w", [-0.5, 0.3, 1.0, 4.0])
def test_the_rule_is_diffusers_original_formulation(pipeline, w):
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor(300.0), torch.tensor([0, 2])
    pred_cond = pipeline.unet(z, t, class_labels=labels).sample
    pred_uncond = pipeline.unet(z, t).sample
    guider = ClassifierFreeGuidance(guidance_scale=w, use_original_formulation=True)
    expected = guider.forward(pred_cond, pred_uncond).pred
    actual = pipeline.guided_prediction(z, t, labels, torch.full((2, 1, 1, 1), w))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("w", "labels"), [(0.0, [2]), (-1.0, [3])])
def test_one_pass_where_the_other_has_no_weight(pipeline, w, labels):
    """w = 0 is the plain conditional model bit for bit, w = -1 the unconditional one."""
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


def test_two_passes_in_one_batch(pipeline):
    calls = Calls(pipeline.unet)
    draw(pipeline, [1, 2], [0.0, 2.5], seeds=(0, 1))
    assert calls.labels == [[1, 2, 3, 3]] * 4


def test_a_scale_for_each_image(pipeline):
    together = draw(pipeline, [1, 1, 1], [-1.0, 0.0, 3.0], seeds=(0, 0, 0))
    for image, w in zip(together, (-1.0, 0.0, 3.0), strict=True):
        torch.testing.assert_close(image, draw(pipeline, 1, w)[0], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert (together[1] - together[2]).abs().max() > 1e-3


def test_an_image_does_not_depend_on_its_batch(pipeline):
    together = draw(pipeline, [0, 1, 2], 2.0, seeds=(5, 6, 7))
    torch.testing.assert_close(together[1:2], draw(pipeline, 1, 2.0, seeds=(6,)), rtol=1e-4, atol=1e-5)


def test_the_prediction_is_float32_whatever_the_network_computes_in(pipeline):
    pipeline.to(torch.bfloat16)
    z, w = torch.randn(1, 1, 8, 8), torch.ones(1, 1, 1, 1)
    assert pipeline.guided_prediction(z, torch.tensor(5.0), torch.tensor([0]), w).dtype == torch.float32
    assert draw(pipeline, 0).isfinite().all()


# ----- labels -----


def test_ids_names_and_tensors_are_the_same_labels(pipeline):
    expected = draw(pipeline, [2, 0], seeds=(0, 1))
    for labels in (["two", "zero"], ["two", 0], torch.tensor([2, 0]), np.array([2, 0]), (2, "zero")):
        assert torch.equal(draw(pipeline, labels, seeds=(0, 1)), expected)
    assert torch.equal(draw(pipeline, "two"), draw(pipeline, 2))
    assert torch.equal(draw(pipeline, torch.tensor(2)), draw(pipeline, 2))


def test_minus_one_is_the_null_class(pipeline):
    torch.testing.assert_close(draw(pipeline, -1, 0.0), draw(pipeline, 0, -1.0))


def test_several_images_of_a_label(pipeline):
    images = draw(pipeline, [0, 2], [0.0, 3.0], seeds=(0, 1, 2, 3), num_images_per_label=2)
    expected = draw(pipeline, [0, 0, 2, 2], [0.0, 0.0, 3.0, 3.0], seeds=(0, 1, 2, 3))
    assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_labels": "seven"}, r"unknown name 'seven'.*'zero' \(0\), 'one' \(1\), 'two' \(2\)"),
        ({"class_labels": [0, 5]}, r"unknown id 5.*'two' \(2\)"),
        ({"class_labels": [-2]}, "unknown id -2"),
        ({"class_labels": torch.tensor([7])}, r"\[7\] are out of range"),
        ({"class_labels": torch.tensor([0.5])}, "float32"),
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
        ({"generator": generators(0)}, "list of 1, but 4 images"),
        ({"latents": torch.zeros(4, 3, 8, 8)}, r"\(4, 3, 8, 8\).*\(4, 1, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_computed(pipeline, settings, message):
    calls = Calls(pipeline.unet)
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": [0, 1], "num_images_per_label": 2, **settings})
    assert calls.samples == []


def test_without_names_ids_are_asked_for():
    with pytest.raises(ValueError, match="no names"):
        draw(make_pipeline(id2label=None), "two")


@pytest.mark.parametrize(
    ("id2label", "message"), [({0: "a", 3: "b"}, r"\['3'\].*0 … 2"), ({0: "a", 1: "a"}, r"\['a'\] to more than one")]
)
def test_wrong_names_are_refused(id2label, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(id2label=id2label)


def test_a_model_that_never_saw_the_null_class_warns(caplog):
    diffusers.utils.logging.enable_propagation()
    pipeline = make_pipeline(conditioning_dropout_prob=0.0)
    draw(pipeline, 0, 0.0)
    assert "conditioning_dropout_prob" not in caplog.text
    draw(pipeline, 0, 1.0)
    assert "conditioning_dropout_prob = 0" in caplog.text
    caplog.clear()
    draw(make_pipeline(conditioning_dropout_prob=0.1), 0, 1.0)
    assert "conditioning_dropout_prob" not in caplog.text


def test_values_that_are_not_finite_are_not_drawn():
    unet = make_unet()
    unet.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"float32.*guidance_scale \[1.0\]"):
        draw(make_pipeline(unet), 0)


# ----- outputs -----


def test_output_types(pipeline):
    tensors = draw(pipeline, [0, 1], seeds=(0, 1))
    assert tensors.shape == (2, 1, 8, 8)
    assert tensors.min() >= 0
    assert tensors.max() <= 1
    arrays = draw(pipeline, [0, 1], seeds=(0, 1), output_type="np")
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = draw(pipeline, [0, 1], seeds=(0, 1), output_type="pil")
    assert [picture.mode for picture in pictures] == ["L", "L"]
    np.testing.assert_array_equal(np.asarray(pictures[1]), (arrays[1, ..., 0] * 255).round().astype(np.uint8))
    latents = draw(pipeline, [0, 1], seeds=(0, 1), output_type="latent")
    torch.testing.assert_close(tensors, (latents / 2 + 0.5).clamp(0, 1))


def test_return_dict(pipeline):
    (images,) = pipeline(0, num_inference_steps=2, output_type="pt", generator=generators(0), return_dict=False)
    assert torch.equal(images, draw(pipeline, 0, num_inference_steps=2))


def test_latents_are_the_start(pipeline):
    (generator,) = generators(0)
    latents = torch.randn(1, 1, 8, 8, generator=generator)
    out = pipeline(0, num_inference_steps=4, latents=latents, generator=[generator], output_type="pt").images
    assert torch.equal(out, draw(pipeline, 0))


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


# ----- schedulers -----


def test_timesteps_reach_the_network_as_tensors(pipeline):
    calls = Calls(pipeline.unet)
    draw(pipeline, 0)
    assert [t.item() for t in calls.timesteps] == pytest.approx([999, 665.6667, 332.3333, -1])
    assert all(isinstance(t, torch.Tensor) for t in calls.timesteps)


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_every_listed_scheduler_recovers_the_data(name):
    """
    The exact ε for data that is one known image: whatever w, every sampler must return it. A scheduler whose input is
    not scaled, or whose first sample is not, misses it.
    """
    picture = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8)
    reference = LogSNRScheduler()

    def exact(z, t, class_labels):
        alpha, sigma = reference.alpha_sigma(reference.u(t.double()))
        return UNet2DOutput(sample=((z - alpha * picture) / sigma).float())

    pipeline = make_pipeline()
    pipeline.unet.forward = exact
    pipeline.scheduler = getattr(diffusers, name, LogSNRScheduler).from_config(reference.config)
    images = draw(pipeline, [0, 1], 1.5, seeds=(0, 1), num_inference_steps=20)
    torch.testing.assert_close(images, (picture / 2 + 0.5).expand(2, -1, -1, -1), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_the_network_sees_samples_of_unit_variance(pipeline, name):
    """At the first step there is noise only, whatever the scheduler calls its standard deviation."""
    pipeline.scheduler = getattr(diffusers, name, LogSNRScheduler).from_config(pipeline.scheduler.config)
    calls = Calls(pipeline.unet)
    draw(pipeline, [0] * 64, 0.0, seeds=range(64), num_inference_steps=5)
    assert calls.samples[0].std().item() == pytest.approx(1, abs=0.05)


def test_ddim_steps_along_the_noise_of_the_clipped_sample(pipeline):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = draw(pipeline, 0, 3.0, output_type="latent")
    scheduler, (generator,) = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config), generators(0)
    scheduler.set_timesteps(4)
    expected = {True: torch.randn(1, 1, 8, 8, generator=generator)}
    expected[False] = expected[True]
    for clipped, z in expected.items():
        for t in scheduler.timesteps:
            with torch.no_grad():
                pred = pipeline.guided_prediction(z, t, torch.tensor([0]), torch.full((1, 1, 1, 1), 3.0))
            z = scheduler.step(pred, t, z, use_clipped_model_output=clipped).prev_sample
        expected[clipped] = z
    assert torch.equal(latents, expected[True])
    assert not torch.allclose(latents, expected[False], atol=1e-3)


def test_the_lists_of_schedulers_agree():
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
def test_other_schedulers_are_refused_by_name(pipeline, name):
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    calls = Calls(pipeline.unet)
    with pytest.raises(ValueError, match=f"{name} cannot sample this model"):
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


def test_a_start_at_the_very_end_is_refused(pipeline):
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=False
    )
    with pytest.raises(ValueError, match="EulerDiscreteScheduler starts at σ/α = 2202"):
        draw(pipeline, 0)


# ----- latent models -----


@pytest.fixture
def latent_pipeline():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    return make_pipeline(make_unet(in_channels=2, out_channels=2), LogSNRScheduler(clip_sample=False), vae=vae)


def test_latents_are_shifted_and_scaled(latent_pipeline):
    vae, images = latent_pipeline.vae, torch.rand(2, 3, 16, 16) * 2 - 1
    latents = latent_pipeline.encode(images, generators(3)[0])
    expected = (vae.encode(images).latent_dist.sample(generators(3)[0]) - 0.25) * 0.5
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(latent_pipeline.decode(latents), vae.decode(latents / 0.5 + 0.25).sample)


def test_a_latent_model_draws_images(latent_pipeline):
    assert draw(latent_pipeline, [0, 1], seeds=(0, 1)).shape == (2, 3, 16, 16)
    assert draw(latent_pipeline, 0, output_type="latent").shape == (1, 2, 8, 8)
