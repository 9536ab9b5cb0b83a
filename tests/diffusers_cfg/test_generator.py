"""Test generators of denoising diffusion GANs: their steps, their latent vectors, and how they are saved and loaded."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from tests.diffusers_cfg.test_older_models import FOLDER as OLDER
from tests.support.draws import assert_same_draws
from tests.support.models import ddgan, generators, load_saved, make_pipeline, make_unet

F64 = torch.float64


@pytest.fixture
def gan() -> CFGPipeline:
    return ddgan()


def draw(pipeline: Any, *labels: int, w: float | None = None, **call: Any) -> torch.Tensor:
    """Return the final samples, each with a generator of its own."""
    call = {"generator": generators(*range(len(labels))), "output_type": "latent", **call}
    images = pipeline(list(labels), w, **call).images
    assert isinstance(images, torch.Tensor)
    return images


def record_calls(pipeline: Any) -> list[dict[str, Any]]:
    """Return a list to which each later evaluation of the network adds its arguments."""
    calls: list[dict[str, Any]] = []

    def hook(_module, args, kwargs):
        calls.append({"sample": args[0], "t": args[1], **kwargs})

    pipeline.unet.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def posterior(betas: torch.Tensor, t: int, x: torch.Tensor, x_next: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the variance of x_prev by Bayes' rule, from x_prev given x and x_next given x_prev."""
    variance = 1 - (1 - betas[:t]).prod()
    if variance == 0:
        return x, variance
    precision = 1 / variance + (1 - betas[t]) / betas[t]
    mean = (1 - variance).sqrt() * x / variance + (1 - betas[t]).sqrt() * x_next / betas[t]
    return mean / precision, 1 / precision


@pytest.mark.parametrize("latent_dim", [6, 0])
@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 4, 8])
def test_steps_are_the_posterior_with_a_fresh_latent_vector_each(num_timesteps, is_list, latent_dim):
    """First the initial noise, then the latent vector and the noise of each step come from the same generators."""
    gan = ddgan("--num_timesteps", str(num_timesteps), "--latent_dim", str(latent_dim))
    calls, ends, draws = record_calls(gan), [], generators(0, 1) if is_list else generators(0)[0]

    def keep(_pipeline, _step, _t, tensors):
        ends.append((tensors["pred"].double(), tensors["latents"].double()))

    names = ["latents", "pred"]
    images = draw(gan, 3, 7, generator=draws, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    draws = generators(0, 1) if is_list else generators(0)[0]
    betas = torch.tensor(gan.unet.noise_process["trained_betas"], dtype=F64)
    x_next = randn_tensor((2, 1, 8, 8), draws).double()
    assert len(calls) == len(ends) == num_timesteps
    for call, (x, x_prev), t in zip(calls, ends, reversed(range(num_timesteps)), strict=True):
        assert call["t"].item() == t
        torch.testing.assert_close(call["sample"].double(), x_next, rtol=0, atol=1e-6)
        if latent_dim:
            assert torch.equal(call["latent"], randn_tensor((2, latent_dim), draws))
        else:
            assert "latent" not in call
        mean, variance = posterior(betas, t, x, x_next)
        if t:
            mean = mean + variance.sqrt() * randn_tensor((2, 1, 8, 8), draws).double()
        torch.testing.assert_close(x_prev, mean, rtol=0, atol=1e-6)
        x_next = x_prev
    assert torch.equal(images.double(), ends[-1][0])  # The last step returns the generator's output.
    expected = (1 - betas).cumprod(0).logit().flip(0)
    torch.testing.assert_close(gan.log_snr(), expected, rtol=0, atol=5e-3)


def test_latent_vector_kept_over_the_steps_gives_another_law(monkeypatch):
    """With x = (z + x_next) / 2, x_1 depends on z, so that the same z in step 0 would add to the variance of x."""
    gan = ddgan("--latent_dim", "64")
    gan.scheduler = DDPMScheduler.from_config(gan.scheduler.config, clip_sample=False)

    def forward(x_next, t, class_labels, latent):
        return UNet2DOutput(sample=(latent.view(x_next.shape) + x_next) / 2)

    monkeypatch.setattr(gan.unet, "forward", forward)
    betas = torch.tensor(gan.unet.noise_process["trained_betas"], dtype=F64)
    zero, one = torch.tensor([0.0, 1.0], dtype=F64)
    (mean_x, variance), (mean_next, _) = posterior(betas, 1, one, zero), posterior(betas, 1, zero, one)
    variance_1 = (mean_x / 2) ** 2 + (mean_x / 2 + mean_next) ** 2 + variance  # of x_1, by z and x_2
    expected, covariance = (1 + variance_1.item()) / 4, mean_x.item() / 2
    call = {"generator": generators(0)[0], "output_type": "latent"}
    assert gan([0] * 500, **call).images.var() == pytest.approx(expected, abs=0.02)
    kept = torch.randn(500, 64, generator=generators(1)[0])
    monkeypatch.setattr(gan, "_draw_latent", lambda *_: kept)
    assert gan([0] * 500, **call).images.var() == pytest.approx(expected + covariance / 2, abs=0.02)
    assert covariance / 2 > 0.05


@pytest.mark.parametrize(
    ("w", "batch", "labels"), [(None, 2, [3, 7]), (0.0, 2, [3, 7]), (-1.0, 2, [10, 10]), (0.5, 4, [3, 7, 10, 10])]
)
def test_number_of_evaluations(gan, w, batch, labels):
    calls = record_calls(gan)
    images = draw(gan, 3, 7, w=w)
    assert [len(call["sample"]) for call in calls] == [batch] * gan.num_inference_steps
    for call in calls:
        assert call["class_labels"].tolist() == labels
        assert torch.equal(*(call["latent"][half] for half in (slice(2), slice(batch - 2, batch))))  # both passes
    assert images.abs().max() <= 1  # Guided samples are clipped.
    assert torch.equal(images, draw(gan, 3, 7)) == (w in (None, 0.0))


def test_image_does_not_depend_on_its_batch(gan):
    together = draw(gan, 3, 7, 1, generator=generators(0, 1, 2))
    torch.testing.assert_close(together[1:2], draw(gan, 7, generator=generators(1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("remote_code", [False, True])
@pytest.mark.parametrize("argv", [[], ["--latent_dim", "0", "--num_timesteps", "1"]])
def test_saved_generator_draws_the_same_images(tmp_path, argv, remote_code):
    gan = ddgan(*argv)
    gan.save_pretrained(tmp_path)
    loaded = load_saved(tmp_path, remote_code)
    assert (loaded.unet.latent_dim, loaded.num_inference_steps) == (gan.unet.latent_dim, gan.num_inference_steps)
    assert loaded.unet.noise_process == gan.unet.noise_process
    assert_same_draws(draw(loaded, 3, 7), draw(gan, 3, 7), gan, 0.0, gan.num_inference_steps)
    assert (tmp_path / "unet" / "config.json").read_text().count("latent_dim") == 1


def test_other_models_are_saved_as_before(tmp_path):
    assert not {"latent_dim", "max_guidance_scale", "fourier_frequencies"} & make_unet().config.keys()
    for name in ("plain", "student"):
        pipeline = CFGPipeline.from_pretrained(OLDER / name)
        assert pipeline.unet.latent_dim is None
        pipeline.save_pretrained(tmp_path / name)
        for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
            older, saved = (json.loads((folder / name / file).read_text()) for folder in (OLDER, tmp_path))
            version = {"_diffusers_version": diffusers.__version__}
            assert list({**older, **version}.items()) == list(saved.items()), file


WRONG_SIZES = ["6", 6.0, 6.5, True, -1, 65_537, 10**400, [6], {"6": 6}, math.nan]


@pytest.mark.parametrize("value", WRONG_SIZES, ids=lambda value: str(value)[:10])
def test_invalid_latent_dims_are_refused(value):
    with pytest.raises(ValueError, match="latent_dim must be an integer in 0 … 65536, but is "):
        make_unet(latent_dim=value)


@pytest.fixture
def saved(gan, tmp_path) -> Path:
    gan.save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    """Change settings in a JSON file; `None` deletes one."""
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


DAMAGED = {
    "wrong type": ({"latent_dim": "6"}, "latent_dim must be an integer in 0 … 65536, but is '6'"),
    "huge": ({"latent_dim": 10**12}, "latent_dim must be an integer in 0 … 65536, but is 1000000000000"),
    "another size": ({"latent_dim": 7}, r"latent_mapping.0.weight.*\[8, 7\]|latent_mapping.0.weight.*\[32, 7\]"),
    "none": ({"latent_dim": 0}, "8 unexpected .latent_mapping.0.bias"),
    "deleted": ({"latent_dim": None}, "8 unexpected .latent_mapping.0.bias"),
    "a student": ({"max_guidance_scale": 4.0}, r"both latent_dim \(6\) and max_guidance_scale \(4.0\)"),
    "fourier": ({"time_embedding_type": "fourier"}, "cannot have time_embedding_type='fourier'.* Use 'positional'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_network_configs_are_refused(saved, name):
    changes, message = DAMAGED[name]
    edit(saved / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("latent_dim", "latent", "message"),
    [
        (6, None, r"latent must be a tensor of shape \(2, 6\), because this network is a generator.* but is None"),
        (6, torch.zeros(2, 5), r"of shape \(2, 6\).*but is of shape \(2, 5\)"),
        (6, torch.zeros(1, 6), r"of shape \(2, 6\).*but is of shape \(1, 6\)"),
        (6, torch.zeros(6), r"of shape \(2, 6\).*but is of shape \(6,\)"),
        (
            0,
            torch.zeros(2, 6),
            r"latent must be None, because this network takes no latent vector .its latent_dim is 0",
        ),
        (None, torch.zeros(2, 6), "latent must be None.*its latent_dim is None.*but is of shape"),
    ],
)
def test_wrong_latent_vectors_are_refused(latent_dim, latent, message):
    unet = make_unet() if latent_dim is None else make_unet(latent_dim=latent_dim)
    with pytest.raises(ValueError, match=message):
        unet(torch.zeros(2, 1, 8, 8), torch.tensor(0), latent=latent)


def test_generator_returns_samples_that_its_latent_vector_selects(gan):
    x, t = torch.randn(2, 1, 8, 8, generator=generators(0)[0]), torch.tensor(1)
    latents = torch.randn(2, 2, 6, generator=generators(1)[0])
    outputs = [gan.unet(100 * x, t, latent=latent).sample for latent in latents]
    assert not torch.equal(*outputs)
    assert all(output.abs().max() <= 1 for output in outputs)
    # Of the vector, only the direction has an effect.
    torch.testing.assert_close(gan.unet(100 * x, t, latent=1000 * latents[0]).sample, outputs[0])
    torch.testing.assert_close(  # although the squares exceed the range of half precision
        gan.unet(100 * x, t, latent=1000 * latents[0].half()).sample, outputs[0], atol=1e-3, rtol=1e-3
    )
    assert gan.unet(x, t, latent=torch.zeros(2, 6)).sample.isfinite().all()


BETAS = ddgan().unet.noise_process["trained_betas"]
SCHEDULER, NETWORK = "scheduler/scheduler_config.json", "unet/config.json"
WRONG_PROCESSES = {
    "edited in the scheduler": (SCHEDULER, {"trained_betas": [0.92, BETAS[1]]}, "trained_betas .* instead of"),
    "edited in the network": (NETWORK, {"trained_betas": [0.92, BETAS[1]]}, "trained_betas .* instead of"),
    "slightly edited": (NETWORK, {"trained_betas": [BETAS[0], BETAS[1] + 1e-9]}, "trained_betas .* instead of"),
    "a number in the scheduler": (SCHEDULER, {"trained_betas": 0.5}, "trained_betas 0.5 instead of"),
    "another length in the scheduler": (SCHEDULER, {"trained_betas": [0.5] * 3}, "trained_betas .* instead of"),
    "deleted in the scheduler": (SCHEDULER, {"trained_betas": None}, "alphas_cumprod differs by up to"),
    "deleted in the network": (NETWORK, {"trained_betas": None}, "is not known: its UNet has latent_dim=6 but records"),
    "a number": (NETWORK, {"trained_betas": 0.5}, "must be the prediction_type 'sample', and a list of"),
    "strings": (NETWORK, {"trained_betas": ["a", "b"]}, "must be the prediction_type 'sample', and a list of"),
    "not numbers": (NETWORK, {"trained_betas": [BETAS[0], math.nan]}, "must be the prediction_type 'sample', and a"),
    "no step": (NETWORK, {"trained_betas": [], "num_train_timesteps": 0}, "must be the prediction_type 'sample', and"),
    "another length": (NETWORK, {"num_train_timesteps": 3}, "must be the prediction_type 'sample', and a list of"),
    "length of a wrong type": (NETWORK, {"num_train_timesteps": "2"}, "must be the prediction_type 'sample', and a"),
    "noise of no variance": (NETWORK, {"trained_betas": [0.0, BETAS[1]]}, r"trained_betas in \(0, 1\)"),
    "no signal": (NETWORK, {"trained_betas": [BETAS[0], 1.0]}, r"trained_betas in \(0, 1\)"),
    "another prediction": (SCHEDULER, {"prediction_type": "epsilon"}, "prediction_type 'epsilon' instead of 'sample'"),
    "another prediction in the network": (NETWORK, {"prediction_type": "epsilon"}, "the prediction_type 'sample'"),
    "another variance": (SCHEDULER, {"variance_type": "fixed_large"}, "variance_type 'fixed_large' instead of"),
    "a smaller range": (SCHEDULER, {"clip_sample_range": 0.1}, "clip_sample_range 0.1 instead of 1.0"),
    "a range of a wrong type": (SCHEDULER, {"clip_sample_range": "1"}, "clip_sample_range '1' instead of 1.0"),
    "thresholds": (SCHEDULER, {"thresholding": True, "sample_max_value": 0.5}, "thresholding True instead of False"),
    "another length of the scheduler": (SCHEDULER, {"num_train_timesteps": 3}, "num_train_timesteps 3 instead of 2"),
}


@pytest.mark.parametrize("name", WRONG_PROCESSES)
def test_wrong_noise_processes_are_refused(saved, name):
    file, changes, message = WRONG_PROCESSES[name]
    if file == NETWORK:
        process = {**json.loads((saved / file).read_text())["_noise_process"], **changes}
        changes = {"_noise_process": {name: value for name, value in process.items() if value is not None}}
    edit(saved / file, **changes)
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(saved)


@pytest.mark.parametrize("record", [3, "x", ["trained_betas"]])
def test_record_of_another_form_is_refused(gan, saved, record):
    edit(saved / NETWORK, _noise_process=record)
    with pytest.raises(ValueError, match=r"unet.noise_process must be a dictionary or None, but is .?.?(3|x|trained)"):
        CFGPipeline.from_pretrained(saved)
    gan.unet.noise_process = record
    with pytest.raises(ValueError, match=r"noise_process must be a dictionary or None"):
        gan(0)


def test_record_without_a_number_of_steps_is_refused(gan):
    gan.unet.noise_process = {"trained_betas": [0.5]}
    assert gan.num_inference_steps == 2
    with pytest.raises(ValueError, match="must be the prediction_type 'sample', and a list of num_train_timesteps"):
        gan(0)


@pytest.mark.parametrize("name", [name for name in CFGPipeline.schedulers if name != "DDPMScheduler"])
def test_other_schedulers_are_refused(gan, name):
    if name == "LogSNRScheduler":
        gan.scheduler = LogSNRScheduler(prediction_type="sample")
    else:
        gan.scheduler = getattr(diffusers, name).from_config(gan.scheduler.config)
    with pytest.raises(
        ValueError, match=f"{name} is not supported by a generator.*Supported schedulers: DDPMScheduler"
    ):
        gan(0)


def test_scheduler_of_a_generator_is_refused_by_other_networks(gan):
    with pytest.raises(ValueError, match="does not record one, and its DDPMScheduler was not made from a LogSNRSched"):
        make_pipeline(scheduler=gan.scheduler)
    unet = make_unet()
    unet.noise_process = gan.unet.noise_process
    with pytest.raises(ValueError, match="its UNet has latent_dim=None but records"):
        make_pipeline(unet, gan.scheduler)


@pytest.mark.parametrize("num_timesteps", [1, 8])
def test_other_numbers_of_steps_are_refused(num_timesteps, tmp_path):
    gan, calls = ddgan("--num_timesteps", str(num_timesteps)), []
    gan.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    assert gan.num_inference_steps == num_timesteps
    message = (
        f"num_inference_steps is 3, but this model was trained to generate in {num_timesteps} steps and in no other"
    )
    with pytest.raises(ValueError, match=message):
        gan(0, num_inference_steps=3)
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pipe(gan, num_inference_steps=3)
    gan.save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", num_inference_steps=3)
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pretrained(tmp_path)
    assert not calls
    assert torch.equal(draw(gan, 0), draw(gan, 0, num_inference_steps=num_timesteps))


@pytest.mark.parametrize(
    ("settings", "timesteps"),
    [({"timestep_spacing": "leading"}, None), ({"timestep_spacing": "leading", "steps_offset": 1}, r"\[2, 1\]")],
)
def test_other_timesteps_are_refused(gan, settings, timesteps):
    expected, message = draw(gan, 3), rf"would take the timesteps {timesteps}, but a generator was trained for \[1, 0\]"
    gan.scheduler = DDPMScheduler.from_config(gan.scheduler.config, **settings)
    if timesteps is None:
        assert torch.equal(draw(gan, 3), expected)
    else:
        with pytest.raises(ValueError, match=message):
            gan(0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_half_precision(gan, dtype, tolerance):
    """Half precision rounds the network alone: the steps and the latent vectors are in float32."""
    expected = draw(gan, 3, 7)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(draw(gan, 3, 7), expected, rtol=0, atol=tolerance)
    gan.to(dtype)
    images, calls = draw(gan, 3, 7), record_calls(gan)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=tolerance)
    draw(gan, 3)
    assert (calls[0]["sample"].dtype, calls[0]["latent"].dtype) == (dtype, torch.float32)


def test_other_arguments_of_the_pipeline(gan):
    images = draw(gan, 3, 7)
    # A pipeline made of another one
    copy = CFGPipeline.from_pipe(gan)
    copy.set_progress_bar_config(disable=True)
    assert torch.equal(draw(copy, 3, 7), images)
    # The first noise, after which the generators draw only the latent vectors and the noise of the steps
    noise, rest = torch.randn(2, 1, 8, 8, generator=generators(5)[0]), generators(0, 1)
    for generator in rest:
        torch.randn(1, 1, 8, 8, generator=generator)
    first = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators(0, 1)])
    assert torch.equal(draw(gan, 3, 7, latents=first, generator=rest), images)
    assert not torch.equal(draw(gan, 3, 7, latents=noise), images)
    # A callback that changes the samples of a step, and stops
    half = draw(gan, 3, 7, callback_on_step_end=lambda *args: {"latents": args[3]["latents"] / 2})
    assert not torch.equal(half, images)
    # Mixes of classes, and classes to guide away from
    weights = torch.zeros(2, 10)
    weights[0, 3], weights[1, 7] = 1, 1
    call = {"generator": generators(0, 1), "output_type": "latent"}
    torch.testing.assert_close(gan(weights, **call).images, images)
    mixed = gan([{"three": 0.5, "seven": 0.5}, 7], generator=generators(0, 1), output_type="latent").images
    assert not torch.equal(mixed[0], images[0])
    torch.testing.assert_close(mixed[1], images[1])
    assert not torch.equal(draw(gan, 3, 7, w=1.0, negative_class_labels=5), draw(gan, 3, 7, w=1.0))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_guider_passes_the_latent_vector_to_each_pass(gan, scale):
    calls = record_calls(gan)
    guided = draw(gan, 3, 7, guider=ClassifierFreeGuidance(guidance_scale=scale))
    passes = [call["latent"] for call in calls[: 1 if scale == 1 else 2]]
    assert torch.equal(passes[0], passes[-1])
    assert len(calls) == len(passes) * gan.num_inference_steps
    torch.testing.assert_close(guided, draw(gan, 3, 7, w=scale - 1))  # s = 1 + w


def test_guide_network(gan):
    guide, calls = ddgan().unet, []
    torch.nn.init.normal_(guide.conv_out.weight)
    guide.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["latent"]), with_kwargs=True)
    plain, guided = draw(gan, 3, 7), CFGPipeline.from_pipe(gan, guide_unet=guide)
    guided.set_progress_bar_config(disable=True)
    assert torch.equal(draw(guided, 3, 7), plain)
    ours = record_calls(guided)
    assert not torch.equal(draw(guided, 3, 7, w=1.0), plain)
    assert all(torch.equal(call["latent"], latent) for call, latent in zip(ours, calls, strict=True))
    for other, found in ((ddgan("--latent_dim", "5"), "5"), (ddgan("--latent_dim", "0"), "0")):
        with pytest.raises(ValueError, match=f"guide_unet.latent_dim must be the UNet's 6, but is {found}"):
            CFGPipeline.from_pipe(gan, guide_unet=other.unet)
    message = "guide_unet.latent_dim must be the UNet's 6, but is None"
    with pytest.raises(ValueError, match=message):
        CFGPipeline.from_pipe(gan, guide_unet=make_unet(num_class_embeds=11))
    with pytest.raises(ValueError, match="guide_unet.noise_process must be the UNet's"):
        CFGPipeline.from_pipe(gan, guide_unet=ddgan("--num_timesteps", "4").unet)
