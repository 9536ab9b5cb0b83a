"""Test that invalid arguments, settings and components are refused by name, and that valid forms are accepted."""

import math
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from tests.support.models import generators, make_pipeline, make_unet

Z = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def shared() -> CFGPipeline:
    """Return a pipeline that no test changes."""
    return make_pipeline()


def call(pipeline: CFGPipeline, **arguments: Any) -> torch.Tensor:
    arguments = {"class_labels": 0, "num_inference_steps": 2, "output_type": "latent", **arguments}
    images = pipeline(**{"generator": generators(0), **arguments}).images
    assert isinstance(images, torch.Tensor)
    return images


def forbid(*_: Any) -> None:
    raise AssertionError("the network was evaluated")


# An argument, a value, and what the message says besides both
INVALID = [
    *[("guidance_scale", w, "a number, or a list") for w in ("2", ["2"], 1j, object(), {0: 1.0}, {1.0}, [None], b"2")],
    *[("guidance_scale", w, "a number, or a list") for w in (True, [True, 1.0], torch.tensor(1j), np.array([True]))],
    ("guidance_scale", (w for w in [1.0]), "a number, or a list"),
    ("guidance_scale", 10**400, "a number, or a list"),
    ("guidance_scale", int, "a function of the log-SNR"),
    ("guidance_scale", ClassifierFreeGuidance(2.0), "a guider is passed as guider"),
    ("guidance_scale", [[1.0]], r"shape \(1, 1\)"),
    *[("guidance_interval", x, "0 ≤ σ_lo < σ_hi") for x in (3.0, (1,), (1, 2, 3), ("a", "b"), "ab", {0: 1, 2: 3})],
    *[("guidance_interval", x, "0 ≤ σ_lo < σ_hi") for x in ({1, 2}, (math.nan, 1), (True, 2), (1j, 2), (-1, 2))],
    *[("guidance_interval", x, "0 ≤ σ_lo < σ_hi") for x in (bytearray(b"ab"), Z[0, 0, 0, :2].to("meta"), [1, [2]])],
    *[("guidance_scale", w, "a number, or a list") for w in (Z.to_sparse(), torch.zeros((), device="meta"))],
    *[("guidance_rescale", x, r"in \[0, 1\]") for x in ("a", None, [0.5], True, math.nan, -0.1)],
    *[("num_inference_steps", n, "a positive integer") for n in (True, "2", 2.0, -1, [2], 1j, torch.tensor(True))],
    *[("num_images_per_label", n, "a positive integer") for n in (True, "1", 0, 1.0)],
    *[("generator", g, "such as torch.Generator") for g in (0, "0", [0], (torch.Generator(),), torch.Generator)],
    *[("latents", z, "floating-point torch.Tensor") for z in (Z.numpy(), [0.0], "a", Z.long(), Z.to(torch.cfloat))],
    *[("latents", z, "a dense, floating-point") for z in (Z.to_sparse(), Z.to("meta"))],
    ("guider", "x", "a diffusers guider object"),
    ("guider", ClassifierFreeGuidance, "a diffusers guider object"),
    ("guider", forbid, "a diffusers guider object"),
    *[("output_type", x, "'pil', 'np', 'pt' or 'latent'") for x in ("PIL", None, ["pil"], np.array(["pil"]))],
    *[("return_dict", x, "True or False") for x in (None, "no", 1)],
    *[("callback_on_step_end", x, "a function") for x in (5, [], True, dict)],
    *[("callback_on_step_end_tensor_inputs", x, "a list of names in") for x in ("latents", None, ["x"], [[1]], 5)],
]


@pytest.mark.parametrize(("name", "value", "required"), INVALID)
def test_invalid_argument_is_named_before_the_network_runs(shared, name, value, required):
    shown = repr(value)
    shown = f"a {type(value).__name__}" if "\n" in shown else re.escape(shown[:30])
    expected = required if "shape" in required else rf"{required}.*but is {shown}"
    with shared.unet.register_forward_pre_hook(forbid), pytest.raises(ValueError, match=rf"(?s)^{name} .*{expected}"):
        call(shared, **{name: value})


LABELS = [
    *[(x, "one label or a list of labels, but is") for x in ({1}, frozenset([1]), b"one", bytearray([1]), int, list)],
    *[(x, "which is neither an integer id nor a name") for x in (1j, 1.0, True, [True], [torch.tensor(True)], [[0]])],
    *[
        (x, "which is neither an integer id nor a name")
        for x in (np.True_, object(), [None], {0.5: 1.0}, np.array(1.5))
    ],
    *[(10**30, "unknown id 10{30}"), ("", "unknown name ''"), ([], "is empty"), (torch.tensor([]), r"shape \(0,\)")],
    *[(torch.tensor(True), "must be integers"), (torch.tensor(1j), "must be integers")],
    (torch.tensor([[0, 1]]), "must contain one label per sample"),
    *[(x, "a dense tensor, not on the meta device") for x in (Z.long().to_sparse(), Z.to("meta"))],
    (torch.ones(1, 3), r"at least 0 and add up to one, but are \[1.0"),
]


@pytest.mark.parametrize("name", ["class_labels", "negative_class_labels"])
@pytest.mark.parametrize(("labels", "message"), LABELS)
def test_invalid_label_names_its_argument(shared, name, labels, message):
    with shared.unet.register_forward_pre_hook(forbid), pytest.raises(ValueError, match=message) as error:
        call(shared, **{name: labels})
    assert re.search(rf"\b{name}\b", str(error.value))


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_labels": [make_unet()]},
        {"class_labels": {0: make_unet()}},
        {"class_labels": ["a" * 9999]},
        {"class_labels": torch.ones(1, 3).expand(999, 3)},
        {"guider": LogSNRScheduler()},
        {"guidance_interval": torch.zeros(99, 99)},
        {"guidance_interval": (10**400, 1)},
    ],
)
def test_message_shows_no_whole_object(shared, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))) as error:
        call(shared, **arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("weight", ["1", None, 1j, [1.0], True, math.nan, -1.0])
def test_weight_of_a_class_is_a_number_of_at_least_0(shared, weight):
    """The second entry makes up for the first: {"one": -1.0, 1: 2.0} is class 1 if only the sum is checked."""
    message = "weight of class 1 in class_labels must be a number of at least 0, but is " + re.escape(repr(weight))
    with pytest.raises(ValueError, match=message):
        call(shared, class_labels={"one": weight, 1: 2.0})


@pytest.mark.parametrize(
    ("argument", "same"),
    [
        *[
            ({"class_labels": x}, {"class_labels": 1})
            for x in (np.array(1), np.int64(1), range(1, 2), [np.str_("one")])
        ],
        ({"class_labels": {0: np.float32(0.5), 1: torch.tensor(0.5)}}, {"class_labels": {0: 0.5, 1: 0.5}}),
        *[({"guidance_scale": w}, {"guidance_scale": 2.0}) for w in (2, np.float32(2), np.array(2), [np.float64(2)])],
        ({"guidance_scale": lambda _: np.float32(2)}, {"guidance_scale": 2.0}),
        *[
            ({"num_inference_steps": n}, {"num_inference_steps": 3})
            for n in (np.int64(3), np.array(3), torch.tensor(3))
        ],
        ({"num_images_per_label": np.int64(1)}, {}),
        ({"guidance_interval": np.array([0.0, 1e9])}, {"guidance_interval": (0, math.inf)}),
        ({"guidance_rescale": np.float32(0.5)}, {"guidance_rescale": 0.5}),
        ({"callback_on_step_end": lambda *arguments: arguments[3]}, {}),
    ],
)
def test_equivalent_arguments_draw_the_same(shared, argument, same):
    assert torch.equal(call(shared, **argument), call(shared, **same))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        *[(x, r"None or a dictionary of new 'latents', but is") for x in (Z, 5, [], False, {"latent": Z}, {"pred": Z})],
        *[({"latents": x}, "a dense, floating-point torch.Tensor, but is") for x in (None, Z.long(), Z.to("meta"))],
        ({"latents": Z.repeat(2, 1, 1, 1)}, r"shape \(2, 1, 8, 8\), but must have \(1, 1, 8, 8\)"),
        ({"latents": Z + math.nan}, "must be finite"),
    ],
)
def test_invalid_result_of_a_callback_is_refused(shared, returned, message):
    with pytest.raises(ValueError, match=f"callback_on_step_end .*{message}"):
        call(shared, callback_on_step_end=lambda *_: returned, callback_on_step_end_tensor_inputs=["latents", "pred"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.full((1, 1, 8, 8), math.nan)}, "latents must be finite"),
        ({"guider": ClassifierFreeGuidance(math.nan)}, "guider.guidance_scale must be a finite number, but is nan"),
        ({"guidance_scale": lambda _: None}, "What guidance_scale returns must be a number"),
        ({"guidance_scale": lambda _: "1"}, "What guidance_scale returns must be a number.*'1'"),
    ],
)
def test_non_finite_values_are_not_blamed_on_the_network(shared, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(shared, **arguments)


LEVELS = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}


def make_vae(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels)


SETTINGS = [
    *[("id2label", x, "a dictionary such as") for x in ([1], "abc", 5)],
    *[("id2label", {x: "a"}, r"class ids \['") for x in ("a", 1.5, " 1", "01", True, -1, 3)],
    *[("id2label", {0: x}, "A name in id2label must be a string") for x in ([1], None, 7)],
    ("id2label", {0: "a", "0": "b"}, r"ids \['0'\] for more than one class"),
    *[("conditioning_dropout_prob", x, r"in \[0, 1\]") for x in ("x", -1, 2, math.nan, True, [0.5])],
    *[("num_inference_steps", x, "a positive integer") for x in (0, True, "x", -1, 2.5)],
    *[("unet", x, "a UNet2DCFGModel") for x in (None, 5, UNet2DCFGModel, torch.nn.Linear(1, 1))],
    *[("scheduler", x, "a scheduler object, not a class") for x in (None, 5, diffusers.DDIMScheduler)],
    *[("guider", x, "a diffusers guider object") for x in ("x", ClassifierFreeGuidance)],
    *[("guide_unet", x, "a UNet2DCFGModel or None") for x in (5, torch.nn.Linear(1, 1))],
    *[("vae", x, "an AutoencoderKL") for x in (5, torch.nn.Linear(1, 1))],
]


@pytest.mark.parametrize(("name", "value", "message"), SETTINGS)
def test_invalid_setting_or_component_is_named(shared, name, value, message):
    with pytest.raises(ValueError, match=message):
        CFGPipeline(**{"unet": shared.unet, "scheduler": shared.scheduler, name: value})
    if name in shared.components:
        kept = getattr(shared, name)
        with pytest.raises(ValueError, match=f"{name} must be {message}"):
            setattr(shared, name, value)
        assert getattr(shared, name) is kept


@pytest.mark.parametrize(
    ("components", "message"),
    [
        *[
            (lambda x=x: {"unet": make_unet(sample_size=x)}, "sample_size must be")
            for x in (None, "8", 8.0, (8, 8, 8), 0)
        ],
        *[
            (lambda x=x: {"unet": make_unet(sample_size=x)}, f"multiple of 2, .*but is {re.escape(str(x))}")
            for x in (7, (8, 7))
        ],
        (lambda: {"unet": make_unet(sample_size=6), "guide_unet": make_unet(**LEVELS)}, "multiple of 4, .*but is 6"),
        (lambda: {"unet": make_unet(in_channels=3)}, "out_channels must be in_channels, 3, but is 1"),
        (lambda: {"unet": make_unet(num_class_embeds=None)}, "num_class_embeds=None"),
        (lambda: {"vae": make_vae(2)}, "vae.config.latent_channels must be the UNet's 1, but is 2"),
        (lambda: {"guide_unet": make_unet(in_channels=3, out_channels=3)}, "guide_unet.config.in_channels must be"),
        (lambda: {"guide_unet": make_unet(num_class_embeds=6)}, "guide_unet.num_classes must be"),
        (lambda: {"guide_unet": make_unet(max_guidance_scale=4.0)}, "guide_unet.max_guidance_scale must be None"),
    ],
)
def test_components_that_do_not_fit_are_refused(components, message):
    with pytest.raises(ValueError, match=message):
        CFGPipeline(**{"unet": make_unet(), "scheduler": LogSNRScheduler(), **components()})


def test_guide_of_another_dtype_is_refused(pipeline):
    pipeline.guide_unet = make_unet().bfloat16()
    with pytest.raises(ValueError, match="guide_unet.dtype must be the UNet's torch.float32, but is torch.bfloat16"):
        call(pipeline)


@pytest.mark.parametrize("name", ["guider", "guide_unet", "vae"])
def test_optional_component_is_replaced_only_by_another(pipeline, name):
    """diffusers reads attributes of a new component's class, which an arbitrary object does not have."""
    fitting = {"guider": ClassifierFreeGuidance(2.0), "guide_unet": make_unet(), "vae": make_vae(1)}
    setattr(pipeline, name, fitting[name])
    with pytest.raises(ValueError, match=f"{name} must be .* but is 'x'"):
        setattr(pipeline, name, "x")
    setattr(pipeline, name, None)
    call(pipeline)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"num_class_embeds": n}, f"but is {n!r}") for n in ("11", 11.0, True, 0, -5, 10**9)],
        *[({"max_guidance_scale": w}, f"but is {w!r}") for w in ("4", True, 0.0, -1, math.nan, math.inf)],
    ],
)
def test_invalid_network_settings_are_refused(settings, message):
    """A class embedding with 10⁹ rows would take 512 GB."""
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must be .*{message}"):
        make_unet(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"num_train_timesteps": n}, f"but is {n!r}") for n in (1, "10", 10.0, True, 10**12)],
        *[({name: "x"}, "a number, but is 'x'") for name in ("log_snr_min", "log_snr_max", "variance_interpolation")],
        *[({name: None}, "a number, but is None") for name in ("log_snr_min", "sigma_max")],
    ],
)
def test_invalid_scheduler_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must be .*{message}"):
        LogSNRScheduler(**settings)


@pytest.mark.parametrize("steps", [0, -1, True, "3", 2.5, None, [3]])
def test_invalid_number_of_steps_of_a_scheduler_is_refused(steps):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer of at least 1, but is"):
        LogSNRScheduler().set_timesteps(steps)
