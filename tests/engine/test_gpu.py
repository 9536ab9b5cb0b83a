"""Test precisions, summation order, memory and synchronization on a GPU."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# Makes cuBLAS deterministic if set before the first matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import diffusers
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data import datasets, latents, sources
from diffusers_cfg.data.datasets import stack_images
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.method import Batch
from diffusers_cfg.engine.state import frozen
from diffusers_cfg.evaluation import features
from diffusers_cfg.evaluation.measure import measure
from diffusers_cfg.evaluation.statistics import RealStatistics
from diffusers_cfg.hub import rounding_tolerance
from diffusers_cfg.method_settings import DDGANConfig
from diffusers_cfg.methods import cfg
from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN, build_pipeline
from diffusers_cfg.randomness import Draws
from diffusers_cfg.settings import DataConfig
from tests.support.latents import few_digits, vae_flags
from tests.support.models import generators, make_classifier, make_pipeline, make_unet, randomize_head
from tests.support.runs import (
    SMALLEST_GAN,
    WEIGHTS,
    assert_same_tensors,
    reset_accelerate,
    scalars,
    train,
    train_classifier,
    train_ddgan,
    train_vdm,
)
from tests.support.synchronization import guard_steps
from tests.support.trajectories import METHODS, TEACHER, expected, train_trajectory, trajectory_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = "cuda"
RESUME = ["--resume_from_checkpoint", "latest"]
# A variational diffusion model whose noise schedule is not trained, with steps
FIXED = ["--noise_schedule", "fixed", "--diffusion_steps", "10"]
SOLVERS = ["LogSNRScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """Disable TF32, the default for convolutions, so that differences come from fp32 rounding only."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms only. torch raises an error for operations without one."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cpu_draws(monkeypatch) -> None:
    """Draw noise, times and dropped labels on the CPU, whose random numbers differ from those of a GPU."""

    def on_cpu(original):
        def draw(self, *args):
            device, self.device = self.device, torch.device("cpu")
            try:
                return original(self, *args).to(device)
            finally:
                self.device = device

        return draw

    for name in ("normal", "uniform", "antithetic"):
        monkeypatch.setattr(Draws, name, on_cpu(getattr(Draws, name)))


@pytest.fixture
def conv_dtypes() -> Iterator[set[torch.dtype]]:
    """Yield a set that receives the dtypes of all convolution outputs."""
    dtypes: set[torch.dtype] = set()

    def record(module, _inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            dtypes.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    yield dtypes
    hook.remove()


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Raise an error if the process synchronizes with the GPU inside the block."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Compare the tensors and the state of two checkpoints bit for bit."""
    files = [path.relative_to(first) for path in first.rglob("*.safetensors")]
    assert len(files) >= 3
    for file in files:
        assert_same_tensors(first / file, second / file)
    states = [json.loads((folder / "state.json").read_text()) for folder in (first, second)]
    assert {**states[0], "seconds": 0} == {**states[1], "seconds": 0}


def resume(whole: Path, resumed: Path, *argv: str) -> None:
    """Resume a run from its second step in a different folder."""
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(resumed, *argv, *RESUME)


def scaler_of(checkpoint: Path) -> dict:
    """Return the state of the gradient scaler in a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())["scaler"]


@pytest.mark.parametrize(
    "argv", [[], ["--dropout", "0.2"], ["--mixed_precision", "fp16"], ["--mixed_precision", "bf16"]]
)
def test_resume_is_bit_exact(tmp_path, deterministic, argv):
    train(tmp_path / "whole", *argv)
    resume(tmp_path / "whole", tmp_path / "resumed", *argv)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    grids = [(tmp_path / run / "samples" / "step-4.png").read_bytes() for run in ("whole", "resumed")]
    assert grids[0] == grids[1]
    hardware = json.loads((tmp_path / "whole" / "run.json").read_text())["hardware"]
    assert hardware == f"1 × {torch.cuda.get_device_name()}"


@pytest.mark.parametrize("method", METHODS)
def test_training_matches_the_cpu(tmp_path, cpu_draws, method):
    """The same random numbers give the recorded trajectory."""
    train_trajectory(method, tmp_path)
    logged = trajectory_of(tmp_path)
    for tag, values in expected(method).items():
        # The relative error of twenty steps of Adam is below 1e-4 on a CPU, and for the gradient of a noise schedule
        # below 1e-3. Winograd convolutions on a GPU may lose one more digit.
        rel = 1e-2 if tag == "grad_norm/noise_schedule" else 1e-3
        assert logged[tag] == pytest.approx(values, rel=rel), tag


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("bf16", torch.bfloat16, 0.05), ("fp16", torch.float16, 0.01)]
)
def test_mixed_precision_is_close_to_fp32(tmp_path, conv_dtypes, precision, dtype, tolerance):
    """
    A network of about 25 layers has a relative rounding error of about 5 ε, 0.02 in bf16 and 0.0025 in fp16. The
    relative error of the loss, a mean square, is at most twice as large.
    """
    flags = ["--report_to", "tensorboard", "--learning_rate", "1e-4"]
    train(tmp_path / "fp32", *flags)
    assert conv_dtypes == {torch.float32}
    conv_dtypes.clear()
    train(tmp_path / "mixed", *flags, "--mixed_precision", precision)
    assert dtype in conv_dtypes
    fp32, mixed = (scalars(tmp_path / run) for run in ("fp32", "mixed"))
    losses, norms = ([dict(logged[tag]) for logged in (mixed, fp32)] for tag in ("loss", "grad_norm"))
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0] != losses[1]
    # fp16 skips the first one or two steps, until the scale is small enough.
    taken = [step for step, skipped in mixed["skipped_steps"] if not skipped]
    assert len(taken) >= 2
    for step in taken:
        assert norms[0][step] == pytest.approx(norms[1][step], rel=2 * tolerance)
    weights, before = (load_file(tmp_path / run / "unet" / WEIGHTS) for run in ("mixed", "fp32"))
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in weights.values())
    # Each of the four Adam steps moves a weight by about the learning rate.
    assert all((weights[name] - before[name]).abs().max() < 8e-4 for name in weights)
    moments = load_file(tmp_path / "mixed" / "checkpoint-4" / "optimizer-unet.safetensors")
    assert {value.dtype for value in moments.values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_mixed_precision_of_a_variational_diffusion_model(tmp_path, precision, tolerance):
    """The first layer, which tells grey levels apart, stays in float32, and so do the noise schedule and the bound."""
    dtypes = set()

    def record(module, _inputs, output):
        if isinstance(module, UNet2DCFGModel.FourierConv):
            dtypes.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    flags = ["--report_to", "tensorboard", "--learning_rate", "1e-4", "--train_batch_size", "64"]
    train_vdm(tmp_path / "fp32", *flags)
    train_vdm(tmp_path / "mixed", *flags, "--mixed_precision", precision)
    hook.remove()
    assert dtypes == {torch.float32}
    fp32, mixed = (scalars(tmp_path / run) for run in ("fp32", "mixed"))
    losses = [dict(logged["loss"]) for logged in (mixed, fp32)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0] != losses[1]
    for tag in ("prior/conditional", "reconstruction/conditional"):
        assert dict(mixed[tag])[1] == pytest.approx(dict(fp32[tag])[1], rel=1e-5)
    schedules = [load_file(tmp_path / run / "noise_schedule.safetensors") for run in ("mixed", "fp32")]
    assert {value.dtype for value in schedules[0].values()} == {torch.float32}
    # Each of the four Adam steps moves a parameter by about the learning rate, 0.01.
    assert all((schedules[0][name] - schedules[1][name]).abs().max() < 0.08 for name in schedules[0])
    with pytest.raises(UserError, match=f"--mixed_precision {precision} rounds the images by more than the noise"):
        train_vdm(tmp_path / "out", "--mixed_precision", precision, "--fourier_features", "0")


def test_resume_of_a_variational_diffusion_model_is_bit_exact(tmp_path, deterministic):
    train_vdm(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train_vdm(tmp_path / "resumed", *RESUME)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_bf16_of_a_denoising_diffusion_gan(tmp_path, conv_dtypes, loss):
    """R1 is computed in float32. In the first step, whose logits are zero, both networks are those of float32."""
    flags = ["--loss", loss, "--report_to", "tensorboard", "--learning_rate", "1e-4", "--train_batch_size", "64"]
    train_ddgan(tmp_path / "fp32", *flags)
    assert conv_dtypes == {torch.float32}
    conv_dtypes.clear()
    train_ddgan(tmp_path / "mixed", *flags, "--mixed_precision", "bf16")
    assert conv_dtypes == {torch.float32, torch.bfloat16}
    fp32, mixed = (scalars(tmp_path / run) for run in ("fp32", "mixed"))
    for tag in ("discriminator/loss", "generator/loss"):
        losses = [dict(logged[tag]) for logged in (mixed, fp32)]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)
    for tag in ("discriminator/r1", "discriminator/r2") if loss == "relativistic" else ("discriminator/r1",):
        penalties = [dict(logged[tag]) for logged in (mixed, fp32)]  # of the steps 0 and 3
        assert list(penalties[0]) == [1, 4]
        assert penalties[0] == pytest.approx(penalties[1], rel=0.1)
        assert penalties[0][4] > 0
    assert all(skipped == 0 for _, skipped in mixed["discriminator/skipped_steps"])
    images = CFGPipeline.from_pretrained(tmp_path / "mixed").to(DEVICE)([0, 1], output_type="pt").images
    assert images.device.type == DEVICE
    assert images.isfinite().all()


def test_bf16_of_a_classifier_and_of_the_network_that_it_guides(tmp_path, conv_dtypes):
    """The classifier is trained under autocast, and its gradient is taken in float32 beside a UNet in bf16."""
    for name, flags in (("fp32", []), ("mixed", ["--mixed_precision", "bf16"])):
        train_classifier(tmp_path / name, TEACHER, "--report_to", "tensorboard", *flags)
    assert conv_dtypes == {torch.float32, torch.bfloat16}
    losses = [dict(scalars(tmp_path / run)["loss"]) for run in ("mixed", "fp32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    pipeline = CFGPipeline.from_pretrained(tmp_path / "mixed").to(DEVICE)
    pipeline.unet.to(torch.bfloat16)
    conv_dtypes.clear()
    images = pipeline([0, 1], -1, output_type="pt", classifier_guidance_scale=2.0).images
    assert conv_dtypes == {torch.float32, torch.bfloat16}
    assert images.device.type == DEVICE
    assert images.isfinite().all()


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_r1_under_autocast_is_that_of_float32(loss):
    config = parse_config(DDGANConfig, [*SMALLEST_GAN, "--loss", loss])
    method = DenoisingDiffusionGAN(config, build_pipeline(config, Digits()))
    randomize_head(method.discriminator)
    for module in method.modules.values():
        module.to(DEVICE)
    x = to_float(torch.from_numpy(Digits().images[:16]).view(-1, 1, 8, 8)).to(DEVICE)
    labels = torch.from_numpy(Digits().class_labels[:16]).to(DEVICE)
    batch, terms = Batch(x, labels, Draws(0, 0, range(16), 16, DEVICE), 0), []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled), frozen([method.modules["generator"]]):
            terms.append(method.discriminator_loss(method.modules, batch))
    torch.testing.assert_close(terms[1].logs["r1"], terms[0].logs["r1"], rtol=1e-4, atol=1e-5)


def test_resume_of_a_denoising_diffusion_gan_is_bit_exact(tmp_path, deterministic):
    """R1 is due at the steps 0 and 3, of which the second comes after the checkpoint."""
    train_ddgan(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train_ddgan(tmp_path / "resumed", *RESUME)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")


def test_gradient_scaler_is_saved_and_restored(tmp_path):
    train(tmp_path / "whole", "--mixed_precision", "fp16", "--checkpointing_steps", "1")
    scalers = [scaler_of(tmp_path / "whole" / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert all(scaler["scale"] > 0 for scaler in scalers)
    assert scalers[3]["_growth_tracker"] > scalers[1]["_growth_tracker"] or scalers[3]["scale"] < scalers[1]["scale"]
    # A resumed run restores the changed scaler.
    resume(tmp_path / "whole", tmp_path / "same", "--mixed_precision", "fp16")
    assert scaler_of(tmp_path / "same" / "checkpoint-4") == scalers[3]
    # A resumed run in fp32 has no scaler.
    resume(tmp_path / "whole", tmp_path / "fp32", "--mixed_precision", "no")
    assert scaler_of(tmp_path / "fp32" / "checkpoint-4") is None


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_nonfinite_step_is_skipped(tmp_path, monkeypatch, precision):
    original, calls = cfg.squared_error, []

    def nan_in_third_call(pred, target):
        calls.append(1)
        return original(pred, target) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(cfg, "squared_error", nan_in_third_call)
    flags = ["--checkpointing_steps", "1", "--no_use_ema", "--report_to", "tensorboard"]
    train(tmp_path, *flags, "--mixed_precision", precision)
    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 3, 4)]
    before, after, last = (load_file(folder / "unet" / WEIGHTS) for folder in folders)
    moments = [load_file(folder / "optimizer-unet.safetensors") for folder in folders[:2]]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert any(not torch.equal(after[name], last[name]) for name in after)
    assert all(torch.isfinite(value).all() for value in last.values())
    assert dict(scalars(tmp_path)["skipped_steps"])[3] == 1
    if precision == "fp16":
        assert scaler_of(folders[1])["scale"] == scaler_of(folders[0])["scale"] / 2


@pytest.mark.parametrize(
    ("run", "argv"),
    [
        (train, ["--random_flip"]),
        (train_vdm, []),
        (train_vdm, FIXED),
        (train_ddgan, []),
        (METHODS["one_pass"], []),
        (METHODS["classifier"], []),
    ],
)
def test_training_does_not_synchronize_with_the_device(tmp_path, monkeypatch, run, argv):
    """As in tests/test_synchronization.py, by the GPU's own check."""
    calls = guard_steps(monkeypatch, no_synchronization)
    run(tmp_path, "--logging_steps", "4", "--checkpointing_steps", "0", "--mixed_precision", "bf16", *argv)
    assert calls == [*["_batch", "train_step", "_after_step"] * 3, "_batch", "train_step"]


def test_gradient_checkpointing_does_not_change_the_weights(tmp_path, deterministic):
    """The recomputation has the same dropout masks, from the generator of the device."""
    flags = ["--attention_resolutions", "4", "--dropout", "0.2"]
    train(tmp_path / "kept", *flags)
    train(tmp_path / "recomputed", *flags, "--gradient_checkpointing")
    assert_same_tensors(tmp_path / "kept" / "unet" / WEIGHTS, tmp_path / "recomputed" / "unet" / WEIGHTS)


def test_workers_and_pinned_memory_do_not_change_the_weights(tmp_path, monkeypatch, deterministic):
    """A batch is copied to the device while a worker writes the next one."""
    train(tmp_path / "memory", "--max_train_steps", "12")
    monkeypatch.setattr(datasets, "MAX_CACHED_BYTES", 0)
    train(tmp_path / "workers", "--max_train_steps", "12", "--dataloader_num_workers", "2")
    assert_same_tensors(tmp_path / "memory" / "unet" / WEIGHTS, tmp_path / "workers" / "unet" / WEIGHTS)


def test_training_is_the_same_with_and_without_cached_latents(tmp_path, monkeypatch):
    digits = few_digits()
    monkeypatch.setattr(sources, "Digits", lambda: digits)
    monkeypatch.setattr(latents, "LATENTS_DIR", tmp_path / "latents")
    flags = vae_flags(tmp_path / "vae")
    train(tmp_path / "without", *flags)
    train(tmp_path / "with", *flags, "--cache_latents")
    # Encoding batches of a different size rounds differently, and Adam scales rounding noise up to full steps.
    assert_same_tensors(
        tmp_path / "without" / "unet" / WEIGHTS, tmp_path / "with" / "unet" / WEIGHTS, rtol=1e-3, atol=2e-3
    )
    images = CFGPipeline.from_pretrained(tmp_path / "with").to(DEVICE)([0, 1], output_type="pt").images
    assert images.device.type == DEVICE


def test_allow_tf32_reduces_the_precision(tmp_path):
    """TF32 has a mantissa of 10 bits, ε = 2⁻¹⁰, like fp16. The loss has a similar rounding error."""
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact, errors = (a.double() @ b.double()).float(), []
    for run, flags in (("fp32", []), ("tf32", ["--allow_tf32"])):
        train(tmp_path / run, "--report_to", "tensorboard", *flags)
        errors.append(((a @ b - exact).norm() / exact.norm()).item())
    assert errors[0] < 1e-5 < 1e-4 < errors[1] < 1e-2
    losses = [dict(scalars(tmp_path / run)["loss"]) for run in ("fp32", "tf32")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_dry_run_prints_the_free_memory(tmp_path, capsys):
    train(tmp_path / "out", "--dry_run", "--mixed_precision", "bf16")
    printed = capsys.readouterr().out
    assert DEVICE in printed
    assert "bf16" in printed
    (memory,) = [line for line in printed.splitlines() if line.startswith("memory")]
    assert "free" in memory


@pytest.mark.slow
def test_compiled_run_is_close_to_an_eager_run(tmp_path):
    """Compiled kernels sum in a different order. `--compile` does not allow TF32, which would lose three digits."""
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for run, flags in (("eager", []), ("compiled", ["--compile"])):
        train(tmp_path / run, "--report_to", "tensorboard", "--layers_per_block", "1", *flags)
    assert graphs["unique_graphs"] > before
    assert not torch.backends.cuda.matmul.allow_tf32
    losses = [dict(scalars(tmp_path / run)["loss"]) for run in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    norms = [dict(scalars(tmp_path / run)["grad_norm"]) for run in ("eager", "compiled")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)  # A missing gradient would lower the norm.


@pytest.mark.skipif(find_spec("xformers") is None, reason="xformers is not installed")
def test_xformers_attention_is_close_to_torch_attention(tmp_path):
    for run, flags in (("torch", []), ("xformers", ["--enable_xformers_memory_efficient_attention"])):
        train(tmp_path / run, "--report_to", "tensorboard", *flags)
    losses = [dict(scalars(tmp_path / run)["loss"]) for run in ("torch", "xformers")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def pipeline_with(name: str) -> CFGPipeline:
    """Return a v-prediction pipeline with random weights and the named scheduler."""
    scheduler = LogSNRScheduler(prediction_type="v_prediction")
    return make_pipeline(scheduler=scheduler.solver(getattr(diffusers, name, LogSNRScheduler)))


def draw(pipeline: CFGPipeline, *seeds: int, w: float | list[float] = 1.0, steps: int = 6) -> torch.Tensor:
    """Return one image for each seed."""
    labels = [seed % 3 for seed in seeds]
    images = pipeline(labels, w, num_inference_steps=steps, generator=generators(*seeds), output_type="pt").images
    return images.cpu()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, pipeline: CFGPipeline, w: float, steps: int = 6) -> None:
    """Compare images with ten times the `rounding_tolerance`, since Winograd convolutions lose up to a digit."""
    tolerance = 10 * rounding_tolerance(pipeline, w, steps)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SOLVERS)
def test_images_match_the_cpu(name):
    pipeline = pipeline_with(name)
    images = draw(pipeline, 0, 1, 2, 3)
    assert_close(draw(pipeline.to(DEVICE), 0, 1, 2, 3), images, pipeline, 1.0)
    assert images.std() > 0.01


def test_image_does_not_depend_on_its_batch():
    """Batches of a different size differ in the summation order only."""
    pipeline = pipeline_with("DPMSolverMultistepScheduler").to(DEVICE)
    seeds = range(64)
    batch = draw(pipeline, *seeds, w=[0.0, 1.0, 2.0, 4.0] * 16)
    one_by_one = torch.cat([draw(pipeline, seed, w=[0.0, 1.0, 2.0, 4.0][seed % 4]) for seed in seeds])
    assert_close(batch, one_by_one, pipeline, 4.0)


@pytest.mark.parametrize("name", SOLVERS)
def test_bf16_images_are_finite(name):
    """Without guidance, they are within the `rounding_tolerance` of bf16 of the fp32 images."""
    pipeline = pipeline_with(name)
    images = draw(pipeline, 0, 1, 2, 3, w=0.0)
    pipeline.to(DEVICE).to(torch.bfloat16)
    rounded = draw(pipeline, 0, 1, 2, 3, w=0.0)
    assert torch.isfinite(draw(pipeline, 0, 1, 2, 3, w=4.0)).all()
    tolerance = rounding_tolerance(pipeline, 0.0, 6)
    torch.testing.assert_close(rounded.float(), images, rtol=0, atol=tolerance)
    assert (rounded.float() - images).abs().mean() < 0.02


@pytest.mark.parametrize("name", SOLVERS)
def test_threads_draw_their_own_images(name):
    """Threads share the pipeline and the device's stream, but neither a scheduler nor its state."""
    pipeline = pipeline_with(name).to(DEVICE)
    steps = [4, 5, 8, 10, 2, 6]
    expected = [draw(pipeline, seed, steps=count) for seed, count in enumerate(steps)]
    with ThreadPoolExecutor(len(steps)) as pool:
        images = list(pool.map(lambda seed: draw(pipeline, seed, steps=steps[seed]), range(len(steps))))
    for image, alone, count in zip(images, expected, steps, strict=True):
        assert_close(image, alone, pipeline, 1.0, count)


def test_channels_last_does_not_change_images():
    pipeline = pipeline_with("DPMSolverMultistepScheduler").to(DEVICE)
    images = draw(pipeline, 0, 1)
    pipeline.unet.to(memory_format=torch.channels_last)
    assert_close(draw(pipeline, 0, 1), images, pipeline, 1.0)


@pytest.mark.parametrize("name", ["LogSNRScheduler", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("classifier_guidance_scale", [0.0, [0.0, 1.0]])
def test_sampling_loop_does_not_synchronize_with_the_device(monkeypatch, name, classifier_guidance_scale):
    """As in tests/test_synchronization.py, by the GPU's own check."""
    pipeline, steps, begun = pipeline_with(name), 5, []
    pipeline.classifier = make_classifier()
    pipeline.to(DEVICE)
    scale, check = pipeline.scheduler.scale_model_input, CFGPipeline._check_gradients

    def begin(*args):
        torch.cuda.set_sync_debug_mode("error")
        begun.append(1)
        return scale(*args)

    def end(*args):
        torch.cuda.set_sync_debug_mode("default")
        return check(*args)

    pipeline.scheduler.scale_model_input = begin
    monkeypatch.setattr(CFGPipeline, "_check_gradients", end)
    call = {"guidance_interval": (0.1, 20), "classifier_guidance_scale": classifier_guidance_scale}
    try:
        pipeline([0, 1], [1.0, 2.0], steps, generator=torch.Generator(DEVICE).manual_seed(0), **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(begun) == steps


@pytest.mark.slow
def test_compiled_network_does_not_change_images():
    torch.compiler.reset()
    pipeline = pipeline_with("DPMSolverMultistepScheduler").to(DEVICE)
    images = draw(pipeline, 0, 1)
    pipeline.unet = torch.compile(pipeline.unet)
    assert_close(draw(pipeline, 0, 1), images, pipeline, 1.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(pipeline, 1, 2, w=[2.0, 0.5], steps=9)


def test_evaluation_matches_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(features.train_classifier, "__defaults__", (30, 64))
    digits = stack_images(Digits(), DataConfig(resolution=8), 1, show_progress=False)
    pipeline = make_pipeline(make_unet(num_class_embeds=11), id2label=Digits().id2label)
    labels = torch.arange(100) % 10
    images = pipeline(labels, 0.5, 4, generator=generators(*range(100)), output_type="pt").images
    images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    rows = []
    for kind in ("cpu", DEVICE):
        reset_accelerate()
        accelerator = Accelerator(cpu=kind == "cpu")
        assert accelerator.device.type == kind
        (tmp_path / kind).mkdir()
        for classifier in (tmp_path / "cpu").glob("classifier-*"):  # train it only once
            if not (tmp_path / kind / classifier.name).exists():
                shutil.copy(classifier, tmp_path / kind)
        real = RealStatistics(accelerator, digits, Digits().id2label, "small", 100, tmp_path / kind)
        assert real.neighbours.device.type == kind
        summary = real.summarizer.new_summary(100)
        real.summarizer.add(summary, torch.arange(100), images, labels)
        rows.append(measure(summary, real.reference, real.extractor.id2label))
    reset_accelerate()
    for name, value in rows[0].items():
        if isinstance(value, float):
            # Features differ by rounding. For precision, recall, density and coverage, one of 100 samples at the edge
            # of a ball may be counted differently.
            absolute = 0.011 if name in ("precision", "recall", "density", "coverage") else 1e-5
            assert rows[1][name] == pytest.approx(value, rel=1e-3, abs=absolute), name
