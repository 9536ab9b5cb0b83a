"""Test pipelines with a classifier: bad input, unconditional networks, dtypes, compilation, saving and loading."""

import json
import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance

from diffusers_cfg import CFGPipeline, LogSNRScheduler, NoisyClassifier2DModel
from diffusers_cfg.loading import check_index
from tests.support.models import NAMES, ddgan, generators, load_saved, make_classifier, make_pipeline, make_unet

PROCESS = make_classifier().noise_process or {}


def make_guided(unet=None, scheduler=None, **settings) -> CFGPipeline:
    """Return a tiny pipeline with a classifier, whose logits are large enough to change the images."""
    classifier = make_classifier()
    torch.nn.init.normal_(classifier.head.weight)
    scheduler = scheduler or LogSNRScheduler(prediction_type="v_prediction", clip_sample=False)
    return make_pipeline(unet, scheduler, **{"classifier": classifier, **settings})


@pytest.fixture
def guided() -> CFGPipeline:
    return make_guided()


@pytest.fixture
def unconditional() -> CFGPipeline:
    return make_guided(make_unet(num_class_embeds=None))


def draw(pipeline, class_labels: Any = (0, 1), **call) -> torch.Tensor:
    call = {"num_inference_steps": 4, "generator": generators(0, 1), "output_type": "latent", **call}
    return pipeline(class_labels, **call).images


def assert_refused(pipeline, message: str, error: type[Exception] = ValueError, **call) -> None:
    """Assert that a call is refused before a network is evaluated."""

    def never(*_):
        raise AssertionError("a network was evaluated")

    hooks = [
        network.register_forward_pre_hook(never)
        for network in (pipeline.unet, pipeline.classifier)
        if network is not None
    ]
    with pytest.raises(error, match=message):
        draw(pipeline, **call)
    for hook in hooks:
        hook.remove()


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "more classes": ({"num_classes": 4}, r"classifier.num_classes must be the UNet's 3, but is 4"),
    "other names": ({"id2label": {"0": "a", "1": "b", "2": "c"}}, r"other names .*\(0, 'a'\), \(0, 'zero'\)"),
    "another order": ({"id2label": {"0": "one", "1": "zero", "2": "two"}}, "in another order"),
    "channels": ({"in_channels": 2}, "classifier.config.in_channels must be the UNet's 1, but is 2"),
    "size": ({"sample_size": 16}, r"classifier.config.sample_size must be the UNet's \[8, 8\], but is \[16, 16\]"),
    "no process": ({"noise_process": None}, "classifier.noise_process must be recorded in its config, but is None"),
    "another end": (
        {"noise_process": {**PROCESS, "log_snr_max": 15.0}},
        r"another noise process than the UNet \(log_snr_max 15.0 instead of 20.0\)",
    ),
    "another schedule": ({"noise_process": {**PROCESS, "log_snr_schedule": "linear"}}, "'linear' instead of 'arctan'"),
    "fewer timesteps": ({"noise_process": {**PROCESS, "num_train_timesteps": 10}}, "10 instead of 1000"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_classifier_of_another_model_is_refused(name):
    settings, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        make_pipeline(classifier=make_classifier(**settings))
    pipeline = make_pipeline()
    pipeline.classifier = make_classifier(**settings)
    assert_refused(pipeline, message)


def test_fitting_classifier_is_accepted():
    names = {str(class_id): name for class_id, name in NAMES.items()}
    assert draw(make_guided(classifier=make_classifier(id2label=names))).shape == (2, 1, 8, 8)
    process = {**PROCESS, "log_snr_max": 20}  # an integer, as JSON may contain
    unet = make_unet(sample_size=(8, 8))
    assert draw(make_guided(unet, classifier=make_classifier(noise_process=process))).shape == (2, 1, 8, 8)
    for prediction_type in ("epsilon", "sample"):  # what the network predicts does not matter
        scheduler = LogSNRScheduler(prediction_type=prediction_type)
        assert draw(make_guided(scheduler=scheduler), classifier_guidance_scale=1.0).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("component", [make_unet(), torch.nn.Linear(1, 1), "classifier", NoisyClassifier2DModel])
def test_other_objects_are_refused(component, guided):
    for assign in (lambda: make_pipeline(classifier=component), lambda: setattr(guided, "classifier", component)):
        with pytest.raises(ValueError, match="classifier must be a NoisyClassifier2DModel or None"):
            assign()


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (math.nan, "classifier_guidance_scale must be finite"),
        ([1.0, math.inf], r"classifier_guidance_scale must be finite in float32, but contains \[inf\]"),
        (1e39, r"classifier_guidance_scale must be finite in float32, but contains \[1e\+39\]"),
        (lambda log_snr: math.nan, "What classifier_guidance_scale returns must be finite"),
        (lambda log_snr: [1.0] * 3, r"What classifier_guidance_scale returns has shape \(3,\)"),
        ("1", "classifier_guidance_scale must be a number"),
        (True, "classifier_guidance_scale must be a number"),
        ([1.0, 2.0, 3.0], r"classifier_guidance_scale has shape \(3,\), but must be one number, one per label \(2\)"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (make_classifier(), "a classifier is a component of the pipeline, but is a NoisyClassifier2DModel"),
    ],
)
def test_invalid_scales_are_refused(guided, scale, message):
    assert_refused(guided, message, classifier_guidance_scale=scale)


def test_scale_without_a_classifier_is_refused():
    message = r"classifier_guidance_scale is 2, but this model has no classifier.*train_classifier.py"
    assert_refused(make_pipeline(), message, classifier_guidance_scale=[0.0, 2.0])
    assert draw(make_pipeline(), classifier_guidance_scale=0.0).shape == (2, 1, 8, 8)


def test_models_without_a_prediction_to_guide_refuse_a_scale():
    student = make_guided(make_unet(max_guidance_scale=3.0))
    assert_refused(
        student, "is 1, but this model was trained to guide in one pass, without", classifier_guidance_scale=1.0
    )
    assert torch.equal(draw(student), draw(make_pipeline(student.unet, student.scheduler)))
    generator = ddgan()
    with pytest.raises(ValueError, match="is 1, but this model is a generator"):
        generator([0, 1], classifier_guidance_scale=1.0)
    channels, size, _ = generator.sample_shape
    generator.classifier = make_classifier(in_channels=channels, sample_size=size, num_classes=10)
    with pytest.raises(ValueError, match=r"another noise process.*trained_betas None instead of"):
        generator([0, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_not_finite_is_named(guided, value):
    """It is an error at the step and for the images where it occurs."""

    def fail(module, args, logits):
        return torch.where((args[0].shape[0] == 3) & (torch.arange(len(logits)) == 1), value, 1.0)[:, None] * logits

    guided.classifier.register_forward_hook(fail)
    call: dict[str, Any] = {"generator": generators(0, 1, 2, 3)}
    call["classifier_guidance_scale"] = lambda log_snr: [1.0, 0.0, 1.0, float(log_snr > 0)]
    with pytest.raises(FloatingPointError, match=r"not finite at step 3 of 4 \(λ = 1.10\), for the images \[2\]\."):
        draw(guided, [0, 1, 2, 0], **call)
    steps = []
    call = {
        **call,
        "generator": generators(0, 1, 2, 3),
        "callback_on_step_end": lambda _, step, *__: steps.append(step),
    }
    with pytest.raises(FloatingPointError, match="not finite at step 3 of 4"):
        draw(guided, [0, 1, 2, 0], **call)
    assert steps == [0, 1]  # A callback never sees the images of the wrong step.
    assert draw(guided, classifier_guidance_scale=1.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_classifier_guides_in_float32_only(guided, dtype):
    guided.to(dtype)
    assert_refused(
        guided, rf"the classifier is in {dtype}, .* pipe.classifier.to\(torch.float32\)", classifier_guidance_scale=1.0
    )
    guided.classifier.to(torch.float32)
    images = draw(guided, classifier_guidance_scale=1.0)
    assert images.dtype == torch.float32
    assert not torch.equal(images, draw(guided))


def test_every_parameter_of_the_classifier_is_in_float32(guided):
    guided.classifier.head.to(torch.bfloat16)
    assert_refused(guided, "the classifier is in torch.bfloat16", classifier_guidance_scale=1.0)


def test_classifier_that_was_made_in_inference_mode_is_refused(guided):
    with torch.inference_mode():
        guided.classifier = make_classifier()
        assert_refused(guided, "was made under torch.inference_mode", classifier_guidance_scale=1.0)
    assert_refused(guided, "was made under torch.inference_mode", classifier_guidance_scale=1.0)
    assert draw(guided).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("name", ["unet", "classifier"])
def test_network_without_weights_is_refused(guided, name):
    getattr(guided, name).to("meta")
    for s in (0.0, 1.0):
        assert_refused(guided, f"The {name} is on the meta device", classifier_guidance_scale=s)


@pytest.mark.parametrize(
    ("num_class_embeds", "other"), [(4, make_classifier()), (None, None), (None, make_classifier(2))]
)
def test_classifier_is_not_replaced_during_a_call(num_class_embeds, other):
    guided = make_guided(make_unet(num_class_embeds=num_class_embeds))
    classifier = guided.classifier

    def replace(pipeline, step, timestep, tensors):
        pipeline.classifier = other if step == 1 else classifier

    with pytest.raises(ValueError, match="The classifier was replaced during the call, before step 3 of 4"):
        draw(guided, classifier_guidance_scale=1.0, callback_on_step_end=replace)
    guided.classifier = classifier
    images = draw(guided, classifier_guidance_scale=1.0)
    replaced_at_the_end = draw(
        guided, classifier_guidance_scale=1.0, num_inference_steps=1, callback_on_step_end=replace
    )
    assert replaced_at_the_end.shape == images.shape


@pytest.mark.parametrize("name", ["unet", "guide_unet", "classifier"])
def test_dropout_in_training_mode_is_warned_of(name, caplog):
    networks = {"unet": make_unet(dropout=0.5), "guide_unet": make_unet(dropout=0.5)}
    guided = make_guided(**networks, classifier=make_classifier(dropout=0.5))
    message = f"The {name} is in training mode"
    call: dict[str, Any] = {"classifier_guidance_scale": 1.0, "num_inference_steps": 1}
    draw(guided, **call)
    assert "training mode" not in caplog.text
    getattr(guided, name).train()
    draw(guided, **call)
    assert caplog.text.count("training mode") == caplog.text.count(message) == 1
    caplog.clear()
    setattr(guided, name, (make_classifier() if name == "classifier" else make_unet()).train())
    draw(guided, **call)
    assert "training mode" not in caplog.text  # without dropout, the mode does not matter


def test_images_that_overflow_name_both_scales():
    """The change of ε is finite here, but not that of x, which is 1/α = 22026 times larger at λ = -20."""
    guided = make_guided(scheduler=LogSNRScheduler(clip_sample=False))
    torch.nn.init.normal_(guided.classifier.head.weight, std=100.0)
    with pytest.raises(FloatingPointError, match=r"guidance_scale up to 2, classifier_guidance_scale up to 3e\+38"):
        draw(guided, guidance_scale=2.0, classifier_guidance_scale=-3e38, num_inference_steps=1)


@pytest.mark.slow
def test_compiled_networks_guide_alike(guided, tmp_path):
    torch._dynamo.reset()
    call = {"classifier_guidance_scale": 2.0}
    expected = draw(guided, **call)
    guided.unet = torch.compile(guided.unet, fullgraph=True, backend="aot_eager")
    guided.classifier = torch.compile(guided.classifier, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(draw(guided, **call), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(guided, [2, 1], classifier_guidance_scale=[1.0, 0.5], num_inference_steps=6)
    with torch.inference_mode():
        torch.testing.assert_close(draw(guided, **call), expected)
    guided.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(load_saved(tmp_path, remote_code=False), **call), expected)


def test_unconditional_network_is_guided_by_default(unconditional):
    assert (unconditional.num_classes, unconditional.id2label) == (3, NAMES)
    images = draw(unconditional, ["zero", 2])
    assert torch.equal(images, draw(unconditional, [0, 2], classifier_guidance_scale=1.0, guidance_scale=-1))
    assert (images - draw(unconditional, [1, 2])).abs().amax((1, 2, 3))[0] > 0.01
    plain = draw(unconditional, classifier_guidance_scale=0.0)
    assert torch.equal(plain, draw(unconditional, [2, 2], classifier_guidance_scale=0.0))  # labels do not matter
    assert torch.equal(plain, draw(unconditional, [-1, -1]))
    mixed = draw(unconditional, [{"zero": 0.5, "two": 0.5}, {0: 1.0}])
    torch.testing.assert_close(mixed[1], draw(unconditional, [1, 0])[1])
    negative = draw(unconditional, [0, 2], negative_class_labels=["zero", -1])
    torch.testing.assert_close(negative[0], plain[0])
    torch.testing.assert_close(negative[1], images[1])
    interval = draw(unconditional, guidance_interval=(0.1, 2.0))
    assert (interval - plain).abs().max() > 0.01
    assert (interval - draw(unconditional)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_scale": 1.0}, "guidance_scale is 1, but the network of this model is unconditional"),
        ({"guidance_scale": [-1.0, 0.0]}, "guidance_scale is 0, but the network of this model is unconditional"),
        ({"guider": AdaptiveProjectedGuidance()}, "AdaptiveProjectedGuidance compares predictions for several classes"),
        ({"guidance_rescale": 0.5}, "guidance_rescale has no effect on this model"),
        ({"class_labels": [0, 3]}, r"class_labels contains the unknown id 3.*'zero' \(0\)"),
        ({"class_labels": ["zero", "three"]}, "unknown name 'three'"),
        ({"class_labels": torch.ones(2, 4) / 4}, r"weights of shape \(2, 4\)"),
    ],
)
def test_unconditional_network_refuses_what_needs_a_conditional_one(unconditional, call, message):
    assert_refused(unconditional, message, **call)


def test_unconditional_network_needs_a_classifier_and_no_guide(unconditional):
    message = "needs a class embedding with a row for the null class"
    with pytest.raises(ValueError, match=message):
        make_pipeline(unconditional.unet)
    with pytest.raises(ValueError, match=message):
        make_guided(guide_unet=unconditional.unet)
    with pytest.raises(ValueError, match="guide_unet must be None, because the UNet is unconditional"):
        make_guided(unconditional.unet, guide_unet=make_unet())
    unconditional.classifier = None
    assert_refused(unconditional, message)


@pytest.mark.parametrize(("num_class_embeds", "remote_code"), [(4, False), (4, True), (None, True)])
def test_saved_pipeline_is_loaded_with_its_classifier(num_class_embeds, remote_code, tmp_path):
    guided = make_guided(make_unet(num_class_embeds=num_class_embeds))
    guided.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["classifier"] == [
        "classifier_2d",
        "NoisyClassifier2DModel",
    ]
    assert (tmp_path / "classifier" / "classifier_2d.py").read_text() == NoisyClassifier2DModel.remote_code
    loaded = load_saved(tmp_path, remote_code)
    assert (type(loaded.classifier) is NoisyClassifier2DModel) != remote_code
    call = {"classifier_guidance_scale": 2.0}
    torch.testing.assert_close(draw(loaded, **call), draw(guided, **call), rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    again = load_saved(tmp_path / "again", remote_code)
    torch.testing.assert_close(draw(again, **call), draw(guided, **call), rtol=1e-4, atol=1e-4)
    copy = type(loaded).from_pipe(loaded)
    assert copy.classifier is loaded.classifier
    assert type(loaded).from_pipe(loaded, classifier=loaded.classifier).classifier is loaded.classifier


def test_pipeline_without_a_classifier_is_saved_as_before(pipeline, guided, tmp_path):
    pipeline.save_pretrained(tmp_path / "without")
    index = json.loads((tmp_path / "without" / "model_index.json").read_text())
    assert "classifier" not in index
    guided.classifier = None
    guided.save_pretrained(tmp_path / "removed")
    assert json.loads((tmp_path / "removed" / "model_index.json").read_text()) == index
    assert not (tmp_path / "removed" / "classifier").exists()
    assert load_saved(tmp_path / "removed", remote_code=True).classifier is None


def test_assigned_classifier_is_saved_in_every_variant(pipeline, guided, tmp_path):
    pipeline.classifier = guided.classifier
    assert pipeline.components["classifier"] is guided.classifier
    pipeline.save_pretrained(tmp_path, variant="ema")
    loaded = CFGPipeline.from_pretrained(tmp_path, variant="ema")
    for name, value in guided.classifier.state_dict().items():
        assert torch.equal(loaded.classifier.state_dict()[name], value), name
    assert CFGPipeline.from_pretrained(tmp_path, variant="ema", classifier=None).classifier is None


def test_another_class_in_the_index_is_refused(guided, tmp_path):
    guided.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for entry, message in (
        (["unet_2d_cfg", "UNet2DCFGModel"], "has UNet2DCFGModel of unet_2d_cfg as its classifier"),
        (["diffusers", "UNet2DModel"], "has UNet2DModel of diffusers as its classifier"),
        ("classifier_2d", "must contain the module and the class of the classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            check_index({**index, "classifier": entry}, "the model")
    check_index(index, "the model")
    index["classifier"] = ["other_module", "NoisyClassifier2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="uses NoisyClassifier2DModel from other_module as its classifier"):
        CFGPipeline.from_pretrained(tmp_path)


def test_edited_classifier_is_refused_at_load(guided, tmp_path):
    guided.save_pretrained(tmp_path)
    path = tmp_path / "classifier" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "noise_process": {**PROCESS, "log_snr_min": -10.0}}))
    for remote_code in (False, True):
        with pytest.raises(ValueError, match="log_snr_min -10.0 instead of -20.0"):
            load_saved(tmp_path, remote_code)


def test_every_network_is_in_the_order_of_offloading():
    networks = {"guide_unet", "unet", "classifier", "vae"}
    assert {*CFGPipeline.model_cpu_offload_seq.split("->")} == networks
    assert networks < {*CFGPipeline._optional_components, "unet", "vae"}


def test_group_offload_guides_alike(guided):
    expected = draw(guided, classifier_guidance_scale=2.0)
    guided.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(draw(guided, classifier_guidance_scale=2.0), expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_solvers_take_the_process_of_the_classifier(guided, name):
    guided.scheduler = getattr(diffusers, name).from_config(guided.scheduler.config)
    images = draw(guided, classifier_guidance_scale=2.0)
    assert (images - draw(guided)).abs().max() > 1e-3
