"""Test that the noise process of training is saved with the network, and that each scheduler is compared with it."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.evaluation.records import noise_process
from tests.support.models import generators, make_pipeline, make_unet
from tests.support.runs import train

PROCESS = {
    "prediction_type": "v_prediction",
    "log_snr_min": -20.0,
    "log_snr_max": 20.0,
    "log_snr_schedule": "arctan",
    "num_train_timesteps": 1000,
}
OLDER = Path(__file__).parents[1] / "support" / "models-573b54d" / "plain"


def make_scheduler(**settings: Any) -> LogSNRScheduler:
    return LogSNRScheduler(**{"prediction_type": "v_prediction", **settings})


@pytest.fixture
def trained() -> CFGPipeline:
    """Return a pipeline as training creates it, with untrained weights."""
    unet = make_unet()
    unet.noise_process = PROCESS
    return make_pipeline(unet, make_scheduler().solver(DPMSolverMultistepScheduler), num_inference_steps=3)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    trained.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, remote_code: bool) -> Any:
    """Load a pipeline, with remote code an instance of the folder's own class."""
    if remote_code:
        return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    return CFGPipeline.from_pretrained(folder)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "deleted"}))


def test_training_records_its_noise_process(trained_model, tmp_path, caplog):
    unet = UNet2DCFGModel.from_pretrained(trained_model / "unet")
    assert unet.noise_process == PROCESS
    diffusers.utils.logging.enable_propagation()
    stock = UNet2DModel.from_pretrained(trained_model / "unet")  # without a warning
    assert caplog.text == ""
    assert UNet2DCFGModel.from_config(stock.config).noise_process == PROCESS
    train(tmp_path, "--pretrained_model_name_or_path", str(OLDER), "--max_train_steps", "1")
    assert UNet2DCFGModel.from_pretrained(tmp_path / "unet").noise_process == PROCESS  # of the pretrained model


@pytest.mark.parametrize("remote_code", [False, True])
def test_noise_process_is_loaded(folder, remote_code):
    loaded = load(folder, remote_code)
    assert loaded.unet.noise_process == PROCESS
    with pytest.raises(ValueError, match="DDIMScheduler does not match the noise process"):
        type(loaded)(loaded.unet, DDIMScheduler())


# Changes of scheduler_config.json
EDITS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "sample"},
    {"prediction_type": None},
    {"trained_betas": None},
    {"trained_betas": [0.1] * 1000},
    {"trained_betas": [math.nan] * 1000},
    {"num_train_timesteps": 500},
    {"_log_snr_min": -10},
    {"_log_snr_min": "x"},
    {"_log_snr_max": 10.0},
    {"rescale_betas_zero_snr": True, "trained_betas": None},
]


@pytest.mark.parametrize("change", EDITS, ids=lambda change: str(change)[:40])
def test_edited_scheduler_is_refused_at_load(folder, change):
    edit(folder, **change)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler does not match the noise process"):
        CFGPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon' instead of 'v_prediction'"),
        ({"trained_betas": [0.1] * 1000}, r"alphas_cumprod differs by up to 0\.9\d?"),
        ({"_log_snr_min": "x"}, f"log_snr_min 'x' instead of {PROCESS['log_snr_min']}"),
    ],
)
def test_only_what_differs_is_named(folder, change, difference):
    edit(folder, **change)
    with pytest.raises(ValueError, match=rf"this model was trained with \({difference}\)\. Create it"):
        CFGPipeline.from_pretrained(folder)


@pytest.mark.parametrize("config", [{}, dict(DDIMScheduler().config)], ids=["empty", "DDIM"])
def test_config_of_another_scheduler_is_refused_at_load(folder, config):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not match the noise process"):
        CFGPipeline.from_pretrained(folder)


@pytest.mark.parametrize("end", [None, "deleted"])
def test_lost_end_point_of_a_scheduler_is_in_the_network(folder, trained, end):
    """The β are those of training, so the images are right, and further training reads the network's record."""
    edit(folder, _log_snr_min=end)
    loaded = CFGPipeline.from_pretrained(folder)
    process = noise_process(loaded).config
    assert {name: process[name] for name in PROCESS} == PROCESS


WRONG_SCHEDULERS = {
    "plain DDIM": DDIMScheduler,
    "another prediction": lambda: make_scheduler(prediction_type="epsilon").solver(DDIMScheduler),
    "another λ_min": lambda: make_scheduler(log_snr_min=-19.0),  # α² differs by less than the tolerance
    "another λ_max": lambda: make_scheduler(log_snr_max=15.0).solver(DDIMScheduler),
    "another length": lambda: make_scheduler(num_train_timesteps=500),
    "NaN": lambda: DDIMScheduler(prediction_type="v_prediction", trained_betas=[math.nan] * 1000),
}


def set_and_call(pipeline: CFGPipeline, scheduler: Any) -> None:
    pipeline.scheduler = scheduler
    pipeline(0)


WAYS = {
    "loaded": lambda folder, _, scheduler: CFGPipeline.from_pretrained(folder, scheduler=scheduler),
    "built": lambda _, pipeline, scheduler: CFGPipeline(**{**pipeline.components, "scheduler": scheduler}),
    "from_pipe": lambda _, pipeline, scheduler: CFGPipeline.from_pipe(pipeline, scheduler=scheduler),
    "set": lambda _, pipeline, scheduler: set_and_call(pipeline, scheduler),
}


@pytest.mark.parametrize("name", WRONG_SCHEDULERS)
@pytest.mark.parametrize("way", WAYS)
def test_another_process_is_refused_by_every_way(trained, folder, name, way):
    scheduler, calls = WRONG_SCHEDULERS[name](), []
    trained.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="does not match the noise process this model was trained with"):
        WAYS[way](folder, trained, scheduler)
    assert calls == []


@pytest.mark.parametrize("make", [make_unet, lambda: UNet2DCFGModel.from_pretrained(OLDER / "unet")])
def test_unknown_process_is_refused(make):
    message = "noise process of this model is not known.*DDIMScheduler was not made from a LogSNRScheduler"
    with pytest.raises(ValueError, match=message):
        CFGPipeline(make(), DDIMScheduler())
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(OLDER, scheduler=DDIMScheduler())


@pytest.mark.parametrize(
    "change", [{"trained_betas": None}, {"_log_snr_min": -10.0}, {"trained_betas": [math.nan] * 1000}]
)
def test_scheduler_of_an_older_model_must_agree_with_itself(change, tmp_path):
    pipeline = make_pipeline(make_unet(), make_scheduler().solver(DDIMScheduler))
    pipeline.save_pretrained(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match="does not match the noise process"):
        CFGPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"log_snr_min": None},
        {"log_snr_min": 30.0},
        {"log_snr_max": "x"},
        {"num_train_timesteps": 10**12},
        {"prediction_type": 3},
    ],
)
def test_invalid_record_is_refused(trained, change):
    trained.unet.noise_process = {**PROCESS, **change}
    with pytest.raises(ValueError, match="The noise process must be a prediction_type, num_train_timesteps"):
        trained(0)


def test_guide_unet_of_another_process_is_refused(trained):
    guide = make_unet()
    guide.noise_process = {**PROCESS, "log_snr_min": -10.0}
    with pytest.raises(ValueError, match=r"guide_unet.noise_process must be the UNet's .*-20.*, but is .*-10"):
        CFGPipeline(**{**trained.components, "guide_unet": guide})
    trained.guide_unet = guide
    with pytest.raises(ValueError, match="guide_unet.noise_process"):
        trained(0)
    guide.noise_process = PROCESS
    trained(0, num_inference_steps=2)


def test_record_does_not_change_the_images(trained):
    plain = make_pipeline(make_unet(), make_scheduler().solver(DPMSolverMultistepScheduler))
    draws: list[Any] = [
        p(0, num_inference_steps=3, generator=generators(0), output_type="pt") for p in (plain, trained)
    ]
    assert torch.equal(*(drawn.images for drawn in draws))


@pytest.mark.parametrize("remote_code", [False, True])
def test_from_pipe_keeps_everything(folder, remote_code):
    pipe = load(folder, remote_code)
    pipe.register_to_config(conditioning_dropout_prob=0.2)
    pipe.to(torch.bfloat16)
    other = type(pipe).from_pipe(pipe)
    assert (other.id2label, other.num_inference_steps, other.config.conditioning_dropout_prob) == (
        pipe.id2label,
        3,
        0.2,
    )
    assert all(other.components[name] is component for name, component in pipe.components.items())
    assert pipe.unet.dtype == torch.bfloat16  # diffusers' own would convert the shared network to float32
    assert other.name_or_path == pipe.name_or_path
    assert type(pipe).from_pipe(pipe, num_inference_steps=5, dtype=torch.float32).num_inference_steps == 5
    assert pipe.unet.dtype == torch.float32


def test_components_keep_the_process_and_say_what_they_lose(trained, caplog):
    diffusers.utils.logging.enable_propagation()
    built = CFGPipeline(**trained.components)
    assert "without id2label, conditioning_dropout_prob and num_inference_steps" in caplog.text
    assert "CFGPipeline.from_pipe(pipe) keeps them" in caplog.text
    assert noise_process(built).config.prediction_type == "v_prediction"
    caplog.clear()
    CFGPipeline.from_pipe(trained)
    CFGPipeline(**trained.components, num_inference_steps=3)
    make_pipeline(id2label=None)
    assert caplog.text == ""
