"""Test `LogSNRScheduler` against the paper's formulas and diffusers' schedulers."""

import math

import diffusers
import pytest
import torch

from diffusers_cfg import LogSNRScheduler

F64 = torch.float64
U = torch.linspace(0, 1, 101, dtype=F64)


def paper_log_snr(u: torch.Tensor, low: float = -20.0, high: float = 20.0) -> torch.Tensor:
    b = math.atan(math.exp(-high / 2))
    a = math.atan(math.exp(-low / 2)) - b
    return -2 * torch.log(torch.tan(a * u + b))


@pytest.mark.parametrize(("low", "high"), [(-20.0, 20.0), (-10.0, 15.0)])
def test_log_snr_matches_the_paper(low, high):
    scheduler = LogSNRScheduler(log_snr_min=low, log_snr_max=high)
    torch.testing.assert_close(scheduler.log_snr(U), paper_log_snr(U, low, high), rtol=1e-9, atol=1e-9)
    assert scheduler.log_snr(U[0]).item() == pytest.approx(high, abs=1e-9)
    assert scheduler.log_snr(U[-1]).item() == pytest.approx(low, abs=1e-9)


def test_alpha_and_sigma_are_roots_of_sigmoids():
    alpha, sigma = LogSNRScheduler().alpha_sigma(U)
    log_snr = paper_log_snr(U)
    torch.testing.assert_close(alpha, torch.sigmoid(log_snr).sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(sigma, torch.sigmoid(-log_snr).sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(U))


def test_float32_is_accurate_at_both_ends():
    scheduler = LogSNRScheduler()
    u = torch.tensor([0.0, 1e-4, 0.3, 0.999, 1.0])
    for rough, exact in zip(scheduler.alpha_sigma(u), scheduler.alpha_sigma(u.double()), strict=True):
        torch.testing.assert_close(rough.double(), exact, rtol=1e-6, atol=0)


def test_timestep_and_u_are_inverse_and_match_diffusers():
    scheduler = LogSNRScheduler()
    torch.testing.assert_close(scheduler.u(scheduler.timestep(U)), U)
    assert scheduler.timestep(torch.tensor([0.0, 1.0])).tolist() == [-1, 999]
    torch.testing.assert_close(scheduler.u(torch.tensor([0, 999])), torch.tensor([0.001, 1.0]))


def test_add_noise_and_velocity():
    scheduler = LogSNRScheduler()
    x, noise = torch.randn(2, 101, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = scheduler.timestep(U)
    alpha, sigma = (value[:, None] for value in scheduler.alpha_sigma(U))
    torch.testing.assert_close(scheduler.add_noise(x, noise, t), alpha * x + sigma * noise)
    torch.testing.assert_close(scheduler.get_velocity(x, noise, t), alpha * noise - sigma * x)
    # Integers, as diffusers' own schedulers take them
    stock = diffusers.DDPMScheduler.from_config(scheduler.config)
    t = torch.tensor([0, 500, 999])
    x, noise = x[:3].float(), noise[:3].float()
    expected = stock.add_noise(x, noise, t)  # pyright: ignore[reportArgumentType] says IntTensor
    torch.testing.assert_close(scheduler.add_noise(x, noise, t), expected)


STOCK = [name for name in LogSNRScheduler._compatibles if not name.startswith("LogSNR")]


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("name", STOCK)
def test_from_config_keeps_the_noise_process(name, reloaded, tmp_path):
    scheduler = LogSNRScheduler(log_snr_min=-18.0, prediction_type="v_prediction")
    if reloaded:
        scheduler.save_pretrained(tmp_path)
        scheduler = LogSNRScheduler.from_pretrained(tmp_path)
    stock = getattr(diffusers, name).from_config(scheduler.config)
    u = scheduler.u(torch.arange(1000, dtype=F64))
    exact = torch.sigmoid(paper_log_snr(u, low=-18.0))
    # α is compared by its relative error, as it is only 1e-4 at the noisy end.
    torch.testing.assert_close(stock.alphas_cumprod.double().sqrt(), exact.sqrt(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(stock.alphas_cumprod.double(), exact, rtol=0, atol=2e-7)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=1e-6, atol=0)
    assert stock.config.prediction_type == "v_prediction"
    assert stock.config.timestep_spacing == "trailing"

    back = LogSNRScheduler.from_config(stock.config)
    assert (back.config.log_snr_min, back.config.variance_interpolation) == (-18.0, 0.3)
    assert torch.equal(back.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("reloaded", [False, True])
def test_solver_converts_back_without_a_warning(reloaded, tmp_path, caplog):
    diffusers.utils.logging.enable_propagation()
    scheduler = LogSNRScheduler(log_snr_min=-15.0, variance_interpolation=0.2, prediction_type="v_prediction")
    solver = scheduler.solver(diffusers.UniPCMultistepScheduler)
    if reloaded:
        solver.save_pretrained(tmp_path)
        solver = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path)
    solver = diffusers.DDIMScheduler.from_config(solver.config)
    assert solver.config.prediction_type == "v_prediction"
    torch.testing.assert_close(solver.alphas_cumprod, scheduler.alphas_cumprod)
    back = LogSNRScheduler.from_config(solver.config)
    assert {name: back.config[name] for name in scheduler._own_settings} == {
        "log_snr_min": -15.0,
        "log_snr_max": 20.0,
        "log_snr_schedule": "arctan",
        "variance_interpolation": 0.2,
    }
    assert LogSNRScheduler.from_config(solver.config, log_snr_min=-10.0).config.log_snr_min == -10.0
    assert "not expected" not in caplog.text


def test_changed_noise_process_reaches_diffusers_schedulers():
    changed = LogSNRScheduler.from_config(LogSNRScheduler().config, log_snr_min=-10.0)
    stock = diffusers.DDIMScheduler.from_config(changed.config)
    assert stock.alphas_cumprod[-1].item() == pytest.approx(1 / (1 + math.exp(10)), rel=1e-3)


def test_sigma_schedulers_start_within_the_process():
    for low, sigma_max in ((-20.0, 80.0), (-4.0, math.exp(2))):
        stock = diffusers.EulerDiscreteScheduler.from_config(LogSNRScheduler(log_snr_min=low).config)
        stock.set_timesteps(20)
        assert stock.sigmas[0].item() == pytest.approx(sigma_max, rel=1e-5)
        assert stock.sigmas[-2].item() == pytest.approx(0.01, rel=1e-5)


def test_disabled_clipping_reaches_diffusers_schedulers():
    config = LogSNRScheduler(clip_sample=False).config
    assert not diffusers.DDIMScheduler.from_config(config).config.clip_sample
    assert not diffusers.DPMSolverMultistepScheduler.from_config(config).config.thresholding


def test_timesteps_are_evenly_spaced_in_u():
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249, -1]
    assert scheduler.timesteps.dtype == torch.float32
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_step_has_the_posterior_mean_and_the_interpolated_variance(v):
    scheduler = LogSNRScheduler(prediction_type="sample", variance_interpolation=v, clip_sample=False)
    scheduler.set_timesteps(5)
    draws, generator = 200_000, torch.Generator().manual_seed(0)
    z, x = torch.full((draws, 1), 0.7), torch.full((draws, 1), -0.4)
    out = scheduler.step(x, scheduler.timesteps[2], z, generator=generator).prev_sample.double()

    low, high = paper_log_snr(torch.tensor([0.5, 0.25], dtype=F64)).tolist()  # λ and λ'
    alpha, alpha_next = (math.sqrt(1 / (1 + math.exp(-value))) for value in (low, high))
    sigma2, sigma2_next = (1 / (1 + math.exp(value)) for value in (low, high))
    ratio = math.exp(low - high)
    mean = ratio * alpha_next / alpha * 0.7 + (1 - ratio) * alpha_next * -0.4
    variance = ((1 - ratio) * sigma2_next) ** (1 - v) * ((1 - ratio) * sigma2) ** v
    assert out.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / draws))
    assert out.var().item() == pytest.approx(variance, rel=0.02)


def test_posterior_follows_bayes_rule():
    """With x ~ N(0, 1) and x̃ sampled from p(x | z), a step with v = 0 keeps z ~ N(0, 1) at every λ."""
    scheduler = LogSNRScheduler(prediction_type="sample", variance_interpolation=0.0, clip_sample=False)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 1, generator=generator)
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.alpha_sigma(scheduler.u(t))
        x = alpha * z + sigma * torch.randn(z.shape, generator=generator)  # p(x | z) = N(αz, σ²)
        z = scheduler.step(x, t, z, generator=generator).prev_sample
        assert z.mean().item() == pytest.approx(0, abs=0.015)
        assert z.var().item() == pytest.approx(1, abs=0.02)


def test_last_step_returns_x():
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(3)
    z, noise = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        out = scheduler.step(noise, t, z, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out.prev_sample, out.pred_original_sample)


@pytest.mark.parametrize("u", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_prediction_types_agree(u):
    u = torch.tensor([u], dtype=F64)
    x, noise = torch.randn(2, 1, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = LogSNRScheduler().timestep(u)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = LogSNRScheduler(prediction_type=prediction_type, clip_sample=False)
        z = scheduler.add_noise(x, noise, t)
        output = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, t), "sample": x}[prediction_type]
        predicted = scheduler.predict_original_sample(output, z, scheduler.log_snr(u).item())
        torch.testing.assert_close(predicted, x, rtol=1e-6, atol=1e-6)


def test_x_is_clipped():
    scheduler = LogSNRScheduler(prediction_type="sample")
    out = scheduler.predict_original_sample(torch.tensor([[-3.0, 0.5, 2.0]]), torch.zeros(1, 3), 0.0)
    assert out.tolist() == [[-1.0, 0.5, 1.0]]


def test_dynamic_thresholding_matches_diffusers():
    scheduler = LogSNRScheduler(prediction_type="sample", sample_max_value=2.0, dynamic_thresholding_ratio=0.8)
    stock = diffusers.DDIMScheduler.from_config(scheduler.config)
    x = 2 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        scheduler.predict_original_sample(x, torch.zeros_like(x), 0.0), stock._threshold_sample(x)
    )


def test_one_generator_per_sample():
    scheduler = LogSNRScheduler()
    z, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def step(rows, seeds):
        scheduler.set_timesteps(4)
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler.step(noise[rows], scheduler.timesteps[0], z[rows], generator=generator).prev_sample

    assert torch.equal(step([0, 1, 2], [5, 6, 7])[2:], step([2], [7]))


def test_half_precision_is_computed_in_float32():
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(4)
    z = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[0]
    exact = scheduler.step(z.half().float(), t, z.half().float(), generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)
    rough = scheduler.step(z.half(), t, z.half(), generator=torch.Generator().manual_seed(0))
    assert rough.prev_sample.dtype == torch.float16
    assert torch.equal(rough.prev_sample, exact.prev_sample.half())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "flow"}, "'flow'"),
        ({"log_snr_min": 5.0, "log_snr_max": -5.0}, "log_snr_min=5.0"),
        ({"log_snr_min": -200.0}, "log_snr_min=-200"),
        ({"variance_interpolation": 1.5}, "1.5"),
        ({"num_train_timesteps": 1}, "num_train_timesteps.*1"),
        ({"log_snr_min": -60.0, "log_snr_max": -30.0}, "log_snr_min and log_snr_max are too small"),
        ({"log_snr_min": -60.0, "log_snr_max": 13.0, "log_snr_schedule": "linear", "num_train_timesteps": 4}, "Raise"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LogSNRScheduler(**settings)


def test_invalid_calls_are_refused():
    scheduler = LogSNRScheduler()
    z = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(z, 999.0, z)
    with pytest.raises(ValueError, match="0"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"123\.0 is not one of the 4"):
        scheduler.step(z, 123.0, z)
