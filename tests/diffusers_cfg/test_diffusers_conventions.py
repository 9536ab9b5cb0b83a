"""Test what code that was written for diffusers' own models, schedulers and pipelines expects of these classes."""

from copy import deepcopy

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.training_utils import EMAModel

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from tests.support.latents import make_vae
from tests.support.models import generators, make_classifier, make_pipeline, make_unet


def make_latent_pipeline(**settings) -> CFGPipeline:
    unet, guide = (make_unet(in_channels=2, out_channels=2, sample_size=4, layers_per_block=n) for n in (2, 1))
    scheduler = LogSNRScheduler(num_train_timesteps=100, prediction_type="v_prediction", clip_sample=False)
    return make_pipeline(unet, scheduler, vae=make_vae(), guide_unet=guide, **settings)


PIPELINES = {
    "with every network": lambda: make_latent_pipeline(num_inference_steps=3, conditioning_dropout_prob=0.2),
    "with a guider and DDIM": lambda: make_pipeline(
        scheduler=LogSNRScheduler(num_train_timesteps=100).solver(diffusers.DDIMScheduler),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    ),
    "unconditional with a classifier": lambda: make_pipeline(
        make_unet(num_class_embeds=None), LogSNRScheduler(prediction_type="v_prediction"), classifier=make_classifier()
    ),
    "distilled": lambda: make_pipeline(make_unet(max_guidance_scale=4.0), LogSNRScheduler(num_train_timesteps=100)),
}


def draw(pipeline, steps: int = 2, **arguments) -> torch.Tensor:
    arguments = {"output_type": "pt", "generator": generators(0, 1), **arguments}
    return pipeline([1, 2], num_inference_steps=steps, **arguments).images


def loaded(pipeline: CFGPipeline, folder, save: dict | None = None, **load) -> CFGPipeline:
    pipeline.save_pretrained(folder, **(save or {}))
    again = CFGPipeline.from_pretrained(folder, **load)
    again.set_progress_bar_config(disable=True)
    return again


def with_group_offload(pipeline: CFGPipeline) -> CFGPipeline:
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return pipeline


def with_attention_slicing(pipeline: CFGPipeline) -> CFGPipeline:
    pipeline.enable_attention_slicing(1)
    return pipeline


IN_MEMORY = {
    "components": lambda pipe: CFGPipeline(**pipe.components),
    "from_pipe": CFGPipeline.from_pipe,
    "deepcopy": deepcopy,
    "group offload": with_group_offload,
    "attention slicing": with_attention_slicing,
}
# Arguments of save_pretrained and from_pretrained, and the name of a file of weights.
WEIGHTS = "diffusion_pytorch_model{}.safetensors"
ON_DISK = {
    "shards": ({"max_shard_size": "10KB"}, {}, WEIGHTS.format("-00002-of-*")),
    "variant": ({"variant": "ema"}, {"variant": "ema"}, WEIGHTS.format(".ema")),
    "device map": ({}, {"device_map": "cpu"}, WEIGHTS.format("")),
    "without low_cpu_mem_usage": ({}, {"low_cpu_mem_usage": False}, WEIGHTS.format("")),
}


def assert_same(actual: CFGPipeline, images: torch.Tensor, settings: dict | None) -> None:
    actual.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(actual), images, rtol=0, atol=1e-4)
    if settings is not None:
        names = ("id2label", "conditioning_dropout_prob", "num_inference_steps")
        assert {name: actual.config[name] for name in names} == {name: settings[name] for name in names}


@pytest.mark.parametrize("copy", IN_MEMORY)
@pytest.mark.parametrize("kind", PIPELINES)
def test_copies_draw_the_same(kind, copy):
    pipeline = PIPELINES[kind]()
    images, settings = draw(pipeline), dict(pipeline.config)
    # The names, the dropout and the steps are settings of the pipeline, not components.
    assert_same(IN_MEMORY[copy](pipeline), images, None if copy == "components" else settings)


@pytest.mark.parametrize(("save", "load", "file"), ON_DISK.values(), ids=ON_DISK)
def test_every_way_of_saving_and_loading_draws_the_same(save, load, file, tmp_path):
    pipeline = PIPELINES["with every network"]()
    again = loaded(pipeline, tmp_path, save, **load)
    assert_same(again, draw(pipeline), dict(pipeline.config))
    for name in ("unet", "guide_unet"):
        assert list((tmp_path / name).glob(file))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, {"unet": torch.bfloat16, "vae": torch.bfloat16}),
        ({"vae": torch.bfloat16, "default": torch.float16}, {"unet": torch.float16, "vae": torch.bfloat16}),
    ],
)
def test_each_component_is_loaded_in_its_dtype(dtype, expected, tmp_path):
    again = loaded(make_latent_pipeline(), tmp_path, dtype=dtype)
    assert {name: getattr(again, name).dtype for name in expected} == expected
    assert draw(again).isfinite().all()


def test_optional_components_stay_removed(tmp_path):
    pipeline = make_latent_pipeline()
    pipeline.guider = ClassifierFreeGuidance()
    for name in pipeline._optional_components:
        setattr(pipeline, name, None)
    again = loaded(pipeline, tmp_path)
    assert {name: getattr(again, name) for name in pipeline._optional_components} == dict.fromkeys(
        ("vae", "guide_unet", "guider", "classifier")
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["scheduler", "unet"]
    torch.testing.assert_close(draw(again), draw(pipeline), rtol=0, atol=1e-4)


def test_schedulers_can_be_exchanged_one_after_another():
    pipeline = make_pipeline(scheduler=LogSNRScheduler(num_train_timesteps=100))
    expected, noise_process = draw(pipeline, steps=5), pipeline.scheduler.alphas_cumprod
    for name in LogSNRScheduler._compatibles:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        images = draw(pipeline, steps=5)
        assert images.shape == expected.shape, name
        assert not torch.equal(images, expected), name
    pipeline.scheduler = LogSNRScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(pipeline.scheduler.alphas_cumprod, noise_process)
    assert torch.equal(draw(pipeline, steps=5), expected)


SCHEDULERS = {
    "default": {},
    "velocity": {"prediction_type": "v_prediction", "clip_sample": False},
    "short": {"num_train_timesteps": 8, "log_snr_min": -10.0, "log_snr_max": 10.0, "variance_interpolation": 1.0},
    "thresholding": {"sample_max_value": 2.0, "prediction_type": "sample"},
}


@pytest.mark.parametrize("settings", SCHEDULERS.values(), ids=SCHEDULERS)
def test_saved_scheduler_takes_the_same_steps(settings, tmp_path):
    scheduler = LogSNRScheduler(**settings)
    scheduler.save_pretrained(tmp_path)
    again = LogSNRScheduler.from_pretrained(tmp_path)
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in settings} == settings
    scheduler.set_timesteps(4)
    again.set_timesteps(4)
    z = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        step = scheduler.step(0.1 * z, t, z, generator=generators(0, 1))
        same = again.step(0.1 * z, t, z, generator=generators(0, 1), return_dict=False)
        assert torch.equal(same[0], step.prev_sample)
        assert torch.equal(same[1], step.pred_original_sample)
        z = step.prev_sample


NETWORKS = {"plain": {}, "distilled": {"max_guidance_scale": 4.0}}
INPUTS = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_network_is_loaded_as_it_was_saved(settings, dtype, tmp_path):
    unet = make_unet(**settings).to(dtype)
    unet.save_pretrained(tmp_path)
    again, info = UNet2DCFGModel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert (again.training, again.dtype) == (False, dtype)
    for name, value in unet.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_averaged_weights_of_diffusers_are_saved_and_loaded(settings, tmp_path):
    unet = make_unet(**settings).train()
    ema = EMAModel(unet.parameters(), decay=0.5, model_cls=UNet2DCFGModel, model_config=unet.config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1.0)
    ema.step(unet.parameters())
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, UNet2DCFGModel)
    assert again.optimization_step == 1
    for actual, expected in zip(again.shadow_params, ema.shadow_params, strict=True):
        assert torch.equal(actual, expected)
    again.copy_to(unet.parameters())
    assert torch.equal(next(unet.parameters()), ema.shadow_params[0])


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_network_returns_a_tuple_or_an_object(settings):
    unet = make_unet(**settings)
    labels = torch.tensor([0, -1])
    output = unet(*INPUTS, class_labels=labels)
    (prediction,) = unet(*INPUTS, class_labels=labels, return_dict=False)
    for same in (output.sample, output[0], output["sample"]):
        assert torch.equal(same, prediction)
