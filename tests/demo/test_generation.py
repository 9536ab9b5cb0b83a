"""Compare the images of the demo with the pipeline's, run its code, and test what each kind of model offers."""

import math

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.demo.generation import MAX_SEED, Demo, Range, Request, code_of, generate
from diffusers_cfg.space import load_demo
from tests.support.models import ddgan, generators, make_classifier, make_pipeline, make_unet, vdm


def pixels(images) -> np.ndarray:
    """Return the pixels of images of one size, int64."""
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


def saved_demo(pipeline, folder) -> Demo:
    """Save a pipeline and load it for the demo."""
    pipeline.save_pretrained(folder)
    return load_demo(str(folder))


@pytest.fixture
def demo(tmp_path) -> Demo:
    return saved_demo(make_pipeline(num_inference_steps=3, conditioning_dropout_prob=0.1), tmp_path / "model")


def test_images_are_those_of_the_pipeline(demo):
    steps = []
    request = Request([2, 0], guidance_scale=2.5, num_inference_steps=4, seed=5, num_images=2)
    images, captions = generate(demo, request, lambda step, total: steps.append((step, total)))
    call = {"guidance_scale": 2.5, "num_inference_steps": 4, "num_images_per_label": 2}
    expected = demo.pipe(["two", "zero"], generator=generators(5, 6, 5, 6), **call).images
    assert (pixels(images) == pixels(expected)).all()
    assert captions == ["two, seed 5", "two, seed 6", "zero, seed 5", "zero, seed 6"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (pixels(images[:1]) != pixels(images[2:3])).any()  # the class matters


def test_a_mix_has_soft_labels(demo):
    images, captions = generate(demo, Request([0, 2], mix=True, weights="3, 1", num_inference_steps=3))
    expected = demo.pipe({"zero": 0.75, "two": 0.25}, 1.0, 3, generator=generators(0)).images
    assert (pixels(images) == pixels(expected)).all()
    assert captions == ["0.75 zero + 0.25 two, seed 0"]


def test_a_sampler_leaves_the_pipeline_unchanged(demo):
    saved = demo.pipe.scheduler
    request = Request([1], sampler="UniPCMultistepScheduler", num_inference_steps=3)
    images, _ = generate(demo, request)
    assert demo.pipe.scheduler is saved
    demo.pipe.scheduler = saved.solver(UniPCMultistepScheduler)
    expected = demo.pipe("one", 1.0, 3, generator=generators(0)).images
    assert (pixels(images) == pixels(expected)).all()


REQUESTS = {
    "classes": Request([2, 0], guidance_scale=2.5, num_inference_steps=3, seed=7, num_images=2),
    "unconditional": Request([-1], guidance_scale=-1.0, num_inference_steps=3),
    "mix": Request([0, 1, 2], mix=True, num_inference_steps=3, seed=MAX_SEED),
    "sampler": Request([1], sampler="HeunDiscreteScheduler", num_inference_steps=3),
}


def assert_code_draws(demo: Demo, request: Request) -> None:
    """Run the code of a request, and compare its images with the demo's."""
    namespace: dict = {}
    exec(code_of(demo, request), namespace)
    images, _ = generate(demo, request)
    # The code has its own copy of the weights, so that the order of sums, and the rounding of a pixel, may differ.
    assert abs(pixels(images) - pixels(namespace["images"])).max() <= 1


@pytest.mark.parametrize("name", REQUESTS)
def test_the_code_generates_the_same_images(demo, name):
    assert_code_draws(demo, REQUESTS[name])


def test_the_code_uses_the_papers_sampler_of_the_package(tmp_path):
    pipeline = make_pipeline(scheduler=LogSNRScheduler().solver(UniPCMultistepScheduler))
    demo = saved_demo(pipeline, tmp_path / "model")
    request = Request([1], sampler="LogSNRScheduler", num_inference_steps=3)
    assert "from diffusers_cfg import LogSNRScheduler" in code_of(demo, request)
    assert_code_draws(demo, request)


def test_what_applies_to_a_model_that_guides_in_two_passes(demo):
    assert demo.classes == {0: "zero", 1: "one", 2: "two", -1: "unconditional"}
    assert demo.guidance == Range(-1.0, 8.0, 1.0)
    assert demo.classifier_guidance is None
    assert demo.steps == Range(1, 256, 3)
    assert {"UniPCMultistepScheduler", "DDIMScheduler"} <= {*demo.sampler_classes}
    assert "LogSNRScheduler" not in demo.sampler_classes  # the saved one


def test_what_applies_to_other_kinds():
    one_pass = Demo(make_pipeline(make_unet(max_guidance_scale=4.0)), "one-pass")
    assert one_pass.guidance == Range(0.0, 4.0, 1.0)

    variational = Demo(vdm(), "vdm-model")
    assert variational.guidance == Range(-1.0, 8.0, 1.0)
    assert "DDIMScheduler" in variational.sampler_classes

    gan = Demo(ddgan(), "ddgan-model")
    assert (gan.steps, gan.sampler_classes, gan.guidance) == (None, {}, Range(-1.0, 8.0, 0.0))

    classified = Demo(make_pipeline(classifier=make_classifier()), "classifier-model")
    assert classified.classifier_guidance == Range(0.0, 10.0, 0.0)
    alone = Demo(make_pipeline(make_unet(num_class_embeds=None), classifier=make_classifier()), "classifier-model")
    assert (alone.guidance, alone.classifier_guidance) == (None, Range(0.0, 10.0, 1.0))

    guided = Demo(make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=2.0)), "guided-model")
    assert guided.guidance is None

    never_dropped = Demo(make_pipeline(conditioning_dropout_prob=0.0), "conditional-model")
    assert -1 not in never_dropped.classes
    assert never_dropped.guidance == Range(-1.0, 8.0, 0.0)

    unlabelled = Demo(make_pipeline(make_unet(num_class_embeds=2), id2label=None), "plain-model", absent=[0])
    assert (unlabelled.classes, unlabelled.guidance) == ({-1: "unconditional"}, None)


@pytest.mark.parametrize("kind", ["vdm", "gan", "one-pass", "classifier", "only classifier", "guider", "unlabelled"])
def test_every_kind_of_model_generates_with_its_defaults(kind, tmp_path):
    pipeline = {
        "vdm": vdm,
        "gan": ddgan,
        "one-pass": lambda: make_pipeline(make_unet(max_guidance_scale=0.5)),
        "classifier": lambda: make_pipeline(classifier=make_classifier()),
        "only classifier": lambda: make_pipeline(make_unet(num_class_embeds=None), classifier=make_classifier()),
        "guider": lambda: make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=2.0)),
        "unlabelled": lambda: make_pipeline(make_unet(num_class_embeds=2), id2label=None),
    }[kind]()
    demo = saved_demo(pipeline, tmp_path / "model")
    defaults = {"guidance_scale": demo.guidance, "classifier_guidance_scale": demo.classifier_guidance}
    values: dict = {name: limits.default for name, limits in defaults.items() if limits is not None}
    request = Request([next(iter(demo.classes))], num_inference_steps=2, num_images=2, **values)
    images, captions = generate(demo, request)
    assert len(images) == len(captions) == 2
    assert_code_draws(demo, request)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_ids": []}, "No class is chosen"),
        ({"class_ids": [3]}, "The model has no class 3. The ids are"),
        ({"guidance_scale": -1.5}, "w must be a number from -1 to 8, but is -1.5"),
        ({"guidance_scale": math.nan}, "w must be a number"),
        ({"guidance_scale": None}, "w must be a number"),
        ({"num_inference_steps": 0}, "The number of steps must be a whole number from 1 to 256, but is 0"),
        ({"num_inference_steps": 2.5}, "The number of steps must be a whole number"),
        ({"seed": 2**63}, "The seed must be a whole number from 0 to 9007199254740991, but is 9223372036854775808"),
        ({"seed": -1}, "The seed must be"),
        ({"seed": None}, "The seed must be"),
        ({"num_images": 65}, "The number of images must be a whole number from 1 to 64"),
        ({"class_ids": [0, 1], "num_images": 40}, "2 classes with 40 images each are 80 images"),
        ({"sampler": "FlowMatchEulerDiscreteScheduler"}, "'FlowMatchEulerDiscreteScheduler' is not one of: DDIM"),
        ({"sampler": "DDIMScheduler", "num_inference_steps": 12}, "Use num_inference_steps=10"),
        ({"mix": True, "weights": "1 2"}, "The weights '1 2' do not fit 1 classes"),
        ({"mix": True, "weights": "a"}, "The weights 'a'"),
        ({"mix": True, "weights": "-1"}, "The weights '-1'"),
        ({"mix": True, "weights": "0"}, "The weights '0'"),
        ({"mix": True, "weights": "inf"}, "The weights 'inf'"),
    ],
)
def test_bad_values_are_named(demo, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(demo, Request(**{"class_ids": [0], **settings}))


def test_latents_without_an_autoencoder_are_no_pictures():
    with pytest.raises(ValueError, match="latent-model has samples of 4 channels, which are not pictures"):
        Demo(make_pipeline(make_unet(in_channels=4, out_channels=4)), "latent-model")
