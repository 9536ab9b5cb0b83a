"""Test the noise process whose log-SNR is linear in time, as variational diffusion models export it."""

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.evaluation.mixture import GaussianMixtureModel
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.methods.networks import record_process
from tests.support.draws import assert_same_draws
from tests.support.models import generators, make_pipeline, make_unet
from tests.support.pixels import Pixel

F64 = torch.float64
U = torch.linspace(0, 1, 101, dtype=F64)
STOCK = [name for name in CFGPipeline.schedulers if name != "LogSNRScheduler"]


def make_process(low: float = -5.0, high: float = 13.3, **settings: Any) -> LogSNRScheduler:
    settings = {"prediction_type": "v_prediction", "variance_interpolation": 0.0, **settings}
    return LogSNRScheduler(log_snr_min=low, log_snr_max=high, log_snr_schedule="linear", **settings)


@pytest.mark.parametrize("ends", [(-5.0, 13.3), (-4.7, 8.1), (-20.0, 15.0)])
def test_log_snr_is_linear(ends):
    scheduler = make_process(*ends)
    log_snr = ends[1] + (ends[0] - ends[1]) * U
    torch.testing.assert_close(scheduler.log_snr(U), log_snr)
    torch.testing.assert_close(scheduler.u_at(log_snr), U)
    alpha, sigma = scheduler.alpha_sigma(U)
    torch.testing.assert_close(alpha, (1 / (1 + (-log_snr).exp())).sqrt())
    torch.testing.assert_close(sigma, (1 / (1 + log_snr.exp())).sqrt())
    for rough, exact in zip(scheduler.alpha_sigma(U.float()), (alpha, sigma), strict=True):
        torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=0)
    # The time of the network, and the noisy samples
    x, noise = torch.randn(2, 101, 3, dtype=F64, generator=generators(0)[0])
    z = scheduler.add_noise(x, noise, scheduler.timestep(U))
    torch.testing.assert_close(z, alpha[:, None] * x + sigma[:, None] * noise)


@pytest.mark.parametrize("name", STOCK)
def test_diffusers_schedulers_have_the_process(name, tmp_path):
    scheduler = make_process()
    scheduler.save_pretrained(tmp_path)
    stock = LogSNRScheduler.from_pretrained(tmp_path).solver(getattr(diffusers, name))
    log_snr = scheduler.log_snr(scheduler.u(torch.arange(1000, dtype=F64)))
    torch.testing.assert_close(stock.alphas_cumprod.double(), log_snr.sigmoid(), rtol=2e-7, atol=0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), log_snr.sigmoid(), rtol=2e-7, atol=0)
    stock.save_pretrained(tmp_path / "stock")
    back = LogSNRScheduler.from_config(type(stock).from_pretrained(tmp_path / "stock").config)
    assert {name: back.config[name] for name in scheduler._own_settings} == {
        "log_snr_min": -5.0,
        "log_snr_max": 13.3,
        "log_snr_schedule": "linear",
        "variance_interpolation": 0.0,
    }
    assert torch.equal(back.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(("high", "error"), [(8.0, 1e-4), (11.5, 2.5e-3), (13.3, 0.015)])
def test_rounding_of_the_clean_end(high, error):
    """1 - α² has few digits in float32, the dtype of diffusers' tables. At λ = 20 it would be 0."""
    stock = make_process(high=high).solver(diffusers.DDIMScheduler)
    exact = make_process(high=high).log_snr(torch.arange(1, 1001, dtype=F64) / 1000)
    assert (stock.alphas_cumprod.double().logit() - exact).abs().max() < 1.5 * error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": 15.1}, "log_snr_max must be at most 15 for a linear schedule, but is 15.1"),
        ({"low": 5.0, "high": 5.0}, "log_snr_min must be less than log_snr_max"),
        ({"log_snr_schedule": "cosine"}, "log_snr_schedule must be arctan or linear, but is 'cosine'"),
        ({"log_snr_schedule": None}, "log_snr_schedule must be arctan or linear, but is None"),
    ],
)
def test_invalid_processes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LogSNRScheduler(**{"log_snr_min": settings.pop("low", -5.0), "log_snr_max": settings.pop("high", 13.3),
                           "log_snr_schedule": "linear", **settings})  # fmt: skip


@pytest.mark.parametrize(("high", "sigma_min"), [(13.3, 0.01), (8.1, math.exp(-4.05))])
def test_solvers_in_sigma_stay_within_the_process(high, sigma_min):
    stock = make_process(high=high).solver(diffusers.EulerDiscreteScheduler)
    stock.set_timesteps(20)
    assert stock.sigmas[0].item() == pytest.approx(math.exp(2.5), rel=1e-4)
    assert stock.sigmas[-2].item() == pytest.approx(sigma_min, rel=1e-4)


def exact_pipeline(scheduler: LogSNRScheduler, name: str) -> tuple[Pixel, CFGPipeline]:
    """Return a pixel of eight levels, and a pipeline with its exact network and the named scheduler."""
    pixel = Pixel((0, 36, 73, 109, 146, 182, 219, 255))
    # Gaussians without width
    network: Any = GaussianMixtureModel(
        scheduler, pixel.values.float().view(8, 1, 1, 1), torch.zeros(8), torch.arange(8), pixel.probs.float()
    )
    stock = getattr(diffusers, name, None)
    pipeline = CFGPipeline(network, scheduler if stock is None else scheduler.solver(stock))
    pipeline.set_progress_bar_config(disable=True)
    return pixel, pipeline


NUM_STEPS = {"LogSNRScheduler": 100, "DDIM": 100, "DDPM": 100, "EulerDiscreteScheduler": 50}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("name", CFGPipeline.schedulers)
def test_every_scheduler_draws_the_distribution(name, prediction_type):
    """
    With an exact network, each level is drawn with its probability ± 0.03, of which the standard error of the
    4,000 samples is 0.006. The largest difference measured was 0.019.
    """
    pixel, pipeline = exact_pipeline(make_process(-4.7, 8.1, prediction_type=prediction_type), name)
    steps = next((steps for prefix, steps in NUM_STEPS.items() if name.startswith(prefix)), 25)
    drawn: Any = pipeline([-1] * 4000, 0.0, steps, generator=generators(0)[0], output_type="latent").images
    distances = (drawn.view(-1, 1) - pixel.values).abs()
    probs = torch.bincount(distances.argmin(1), minlength=8) / 4000
    assert (probs - pixel.probs).abs().max() < 0.03
    assert distances.min(1).values.mean() < 0.02  # two and a half of the 256 levels; those of a pixel are 36 apart
    # Guided to one class, each image has its level.
    drawn = pipeline([2, 5], 1.0, steps, generator=generators(0)[0], output_type="latent").images
    torch.testing.assert_close(drawn.double().flatten(), pixel.values[[2, 5]], rtol=0, atol=0.1)


@pytest.fixture
def trained() -> CFGPipeline:
    """Return a pipeline as training creates it, with untrained weights."""
    unet = make_unet()
    record_process(unet, make_process())
    return make_pipeline(unet, make_process(), num_inference_steps=3)


@pytest.mark.parametrize("remote_code", [False, True])
@pytest.mark.parametrize("solver", [None, DPMSolverMultistepScheduler])
def test_saved_pipeline_draws_the_same_images(trained, tmp_path, remote_code, solver):
    if solver is not None:
        trained.scheduler = trained.scheduler.solver(solver)
    trained.save_pretrained(tmp_path)
    if remote_code:
        loaded: Any = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    else:
        loaded = CFGPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    process = noise_process(loaded).config
    assert (process.log_snr_min, process.log_snr_max, process.log_snr_schedule) == (-5.0, 13.3, "linear")
    images = [p([0, 1], 1.0, generator=generators(0, 1), output_type="pt").images for p in (trained, loaded)]
    assert_same_draws(images[1], images[0], trained, 1.0, 3)


WRONG = {
    "another λ_max": (make_process(high=12.0), "log_snr_max 12.0 instead of 13.3"),
    "a close λ_min": (make_process(low=-4.99), "log_snr_min -4.99 instead of -5.0"),
    "arctan": (
        LogSNRScheduler(log_snr_min=-5.0, log_snr_max=13.3, prediction_type="v_prediction"),
        "log_snr_schedule 'arctan' instead of 'linear'; alphas_cumprod differs",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("solver", [None, "DDIMScheduler"])
def test_schedulers_of_another_process_are_refused(trained, name, solver):
    scheduler, message = WRONG[name]
    if solver is not None:
        scheduler = scheduler.solver(getattr(diffusers, solver))
    trained.scheduler = scheduler
    with pytest.raises(ValueError, match=f"does not match the noise process this model was trained with.*{message}"):
        trained(0)
    # The other way round
    trained.unet.noise_process = {**trained.unet.noise_process, "log_snr_schedule": "arctan"}
    trained.scheduler = make_process()
    with pytest.raises(ValueError, match="log_snr_schedule 'linear' instead of 'arctan'"):
        trained(0)


def test_older_records_name_no_schedule(trained):
    """They are those of versions that knew only the arctan."""
    trained.unet.noise_process = {
        name: value for name, value in trained.unet.noise_process.items() if name != "log_snr_schedule"
    }
    with pytest.raises(ValueError, match="log_snr_schedule 'linear' instead of 'arctan'"):
        trained(0)
    trained.scheduler = WRONG["arctan"][0]
    trained(0)


def test_unknown_schedules_of_a_record_are_refused(trained):
    trained.unet.noise_process = {**trained.unet.noise_process, "log_snr_schedule": "cosine"}
    with pytest.raises(ValueError, match="The noise process must be .* the log_snr_schedule arctan or linear"):
        trained(0)
