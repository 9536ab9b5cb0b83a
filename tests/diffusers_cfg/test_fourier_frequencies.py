"""Test networks whose first convolution sees sines and cosines of z (Kingma et al. 2021, section 4.5)."""

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.hub import rounding_tolerance
from tests.support.draws import assert_same_draws
from tests.support.models import generators, load_saved, make_pipeline, make_unet

FREQUENCIES = [2.0**n * math.pi for n in range(3, 9)]
Z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor(500.0)


def make_fourier(**settings: Any) -> UNet2DCFGModel:
    return make_unet(**{"fourier_frequencies": FREQUENCIES, **settings})


def make_vdm(**settings: Any) -> CFGPipeline:
    """Return a pipeline as train_vdm.py creates it, with untrained weights."""
    scheduler = LogSNRScheduler(
        log_snr_min=-5.0, log_snr_max=13.3, log_snr_schedule="linear", prediction_type="v_prediction"
    )
    return make_pipeline(make_fourier(), scheduler, num_inference_steps=4, **settings)


@pytest.mark.parametrize("channels", [1, 3])
def test_first_convolution_sees_z_and_its_waves(channels):
    unet = make_fourier(in_channels=channels, out_channels=channels, fourier_frequencies=[10.0, 3.5])
    z, conv = torch.randn(2, channels, 8, 8, generator=generators(0)[0]), unet.conv_in
    assert conv.weight.shape == (8, 5 * channels, 3, 3)
    features = torch.cat([z, (10 * z).sin(), (10 * z).cos(), (3.5 * z).sin(), (3.5 * z).cos()], 1)
    expected = torch.nn.functional.conv2d(features, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(z), expected)
    assert unet(z, T).sample.shape == z.shape
    # With no weight on the waves, the network is the one that sees z alone.
    plain = make_unet(in_channels=channels, out_channels=channels)
    state = {**plain.state_dict(), "conv_in.weight": torch.zeros_like(conv.weight)}
    state["conv_in.weight"][:, :channels] = plain.conv_in.weight.data
    unet.load_state_dict(state)
    torch.testing.assert_close(unet(z, T).sample, plain(z, T).sample)


def test_settings_describe_z_and_are_json():
    unet = make_fourier()
    assert (unet.config.in_channels, unet.config.fourier_frequencies) == (1, FREQUENCIES)
    assert "fourier_frequencies" not in make_unet().config
    tuples = make_unet(fourier_frequencies=(1, 2.5)).config
    assert tuples.fourier_frequencies == [1, 2.5]


@pytest.mark.parametrize(
    "frequencies",
    [
        [],
        [0.0],
        [-1.0],
        [math.inf],
        [math.nan],
        [True],
        ["8"],
        8.0,
        "8",
        {8.0: 1},
        [[8.0]],
        [1.0] * 65,
        [1e7],
        [10**400],
    ],
    ids=lambda value: str(value)[:20],
)
def test_invalid_frequencies_are_refused(frequencies):
    with pytest.raises(
        ValueError, match="fourier_frequencies must be a list of up to 64 positive numbers of at most 1e\\+06, but is"
    ):
        make_unet(fourier_frequencies=frequencies)


@pytest.mark.parametrize("remote_code", [False, True])
def test_saved_pipeline_draws_the_same_images(tmp_path, remote_code):
    pipeline = make_vdm()
    pipeline.save_pretrained(tmp_path)
    loaded = load_saved(tmp_path, remote_code)
    assert loaded.unet.config.fourier_frequencies == FREQUENCIES
    images: Any = [p([0, 1], 1.0, generator=generators(0, 1), output_type="pt").images for p in (pipeline, loaded)]
    assert_same_draws(images[1], images[0], pipeline, 1.0, 4)
    # diffusers' own class does not know the setting, and says that the shapes differ.
    with pytest.raises((ValueError, RuntimeError), match="conv_in"):
        UNet2DModel.from_pretrained(tmp_path / "unet")


def test_damaged_setting_is_refused_at_load(tmp_path):
    make_fourier().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace(str(FREQUENCIES[0]), "-1.0"))
    with pytest.raises(ValueError, match="fourier_frequencies must be a list"):
        UNet2DCFGModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config.replace(f"{FREQUENCIES[0]},", ""))
    with pytest.raises(ValueError, match="conv_in"):
        UNet2DCFGModel.from_pretrained(tmp_path)


def test_first_layer_stays_in_float32_under_autocast():
    """
    In bfloat16, z = αx + σε at the clean end would be rounded by more than its noise, and the waves of that z would be
    arbitrary. The rest of the network is rounded by about 2⁻⁸ √depth.
    """
    unet, outputs = make_fourier(), []
    x = to_float(torch.randint(256, (8, 1, 8, 8), generator=generators(0)[0]).to(torch.uint8))
    z = x + math.exp(-13.3 / 2) * torch.randn(x.shape, generator=generators(1)[0])
    for layer in (unet.conv_in, unet.conv_out):
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        unet(z, T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unet(z, T)
    (first, last), (rounded_first, rounded_last) = outputs[:2], outputs[2:]
    assert rounded_first.dtype == torch.float32
    assert torch.equal(rounded_first, first)
    assert rounded_last.dtype == torch.bfloat16
    assert (rounded_last - last).norm() < 0.02 * last.norm()
    # Gradients reach the weights of the first layer in float32.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unet(z, T).sample.sum().backward()
    assert unet.conv_in.weight.grad is not None
    assert unet.conv_in.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(tmp_path, dtype):
    pipeline = make_vdm()
    pipeline.save_pretrained(tmp_path)
    message = f"fourier_frequencies cannot take samples in {dtype}.*Load it in torch.float32; torch.autocast can be"
    for half in (CFGPipeline.from_pretrained(tmp_path).to(dtype), pipeline.to(dtype)):
        half.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match=message):
            half("one")
    pipeline.to(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        assert pipeline("one", output_type="pt").images.isfinite().all()


def test_gradient_checkpointing_and_time_gradients():
    """A learned noise schedule needs the gradient with respect to z and to the timestep."""
    unet, gradients = make_fourier().train(), []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        z, t = Z.clone().requires_grad_(), torch.tensor([10.3, 700.1], requires_grad=True)
        gradients.append(torch.autograd.grad(unet(z, t).sample.square().sum(), [z, t, unet.conv_in.weight]))
        assert all(gradient.any() for gradient in gradients[-1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_tolerance_of_published_images_allows_for_the_waves():
    """
    Waves multiply the rounding errors of a network's copies, such as those of another number of threads. Without them
    in the tolerance, published models would seem to differ from those in the folder.
    """
    pipeline, generator = make_vdm(), torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        images = pipeline([0, 1, 2], 1.0, 100, generator=generators(0, 1, 2), output_type="pt").images
        assert isinstance(images, torch.Tensor)
        return images

    def round_differently(_module, _inputs, output):
        output.sample *= 1 + torch.finfo(torch.float32).eps * torch.randn(output.sample.shape, generator=generator)
        return output

    images = draw()
    pipeline.unet.register_forward_hook(round_differently)
    difference = (draw() - images).abs().max().item()
    tolerance = rounding_tolerance(pipeline, 1.0, 100)
    plain = rounding_tolerance(make_pipeline(), 1.0, 100)
    assert tolerance == pytest.approx(plain * (1 + 2 * FREQUENCIES[-1]))
    assert plain < difference < tolerance
