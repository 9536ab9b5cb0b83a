"""Compare the cost of sampling, training and startup with hand-written code, in interleaved timings."""

import statistics
from collections.abc import Callable
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_cfg import CFGPipeline, UNet2DCFGModel
from diffusers_cfg.data.images import LabelledImages
from diffusers_cfg.evaluation.reports import table
from diffusers_cfg.evaluation.sampling import counted_evaluations
from diffusers_cfg.evaluation.timing import now, peak_bytes, run_python, time_interleaved, timed
from diffusers_cfg.settings import TrainConfig

PEER_IMPORTS = (
    "import torch; from diffusers import DiffusionPipeline, UNet2DModel, AutoencoderKL, DDIMScheduler; "
    "from diffusers.guiders import BaseGuidance; from diffusers.image_processor import VaeImageProcessor"
)
OUR_IMPORTS = f"{PEER_IMPORTS}; from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel"


def compare_sampling(pipeline: CFGPipeline, batch_sizes: list[int], steps: int, repeats: int) -> list[dict[str, Any]]:
    """
    Compare the pipeline, and a distilled network, with a hand-written loop over a stock network at the same w. The
    pipeline and the loop have the same weights, noise and solver.

    Args:
        pipeline (`CFGPipeline`): its scheduler is replaced by DDIM.
        batch_sizes (`list[int]`): the numbers of images generated in one batch.
        steps (`int`): T, a divisor of 1000.
        repeats (`int`): timed calls of each side.

    Returns:
        A row for each batch size, w and network: seconds, peak memory and network evaluations of both sides.
    """
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert isinstance(scheduler, DDIMScheduler)
    pipeline.scheduler = scheduler
    stock = stock_copy(pipeline.unet)
    pipeline.unet.eval()
    # The student is untrained: its images are meaningless, but cost the same.
    student = UNet2DCFGModel.from_config(pipeline.unet.config, max_guidance_scale=4.0).eval()
    student.to(pipeline.device)  # pyright: ignore[reportArgumentType]
    one_pass = CFGPipeline(student, scheduler)
    one_pass.set_progress_bar_config(disable=True)
    rows = []
    for batch_size in batch_sizes:
        noise = torch.randn(batch_size, *pipeline.sample_shape, device=pipeline.device)
        labels = torch.arange(batch_size) % pipeline.unet.num_classes
        for w, drawn_by in ((0.0, pipeline), (1.0, pipeline), (1.0, one_pass)):

            def ours(
                w: float = w,
                labels: torch.Tensor = labels,
                noise: torch.Tensor = noise,
                drawn_by: CFGPipeline = drawn_by,
            ) -> torch.Tensor:
                images = drawn_by(labels, w, steps, latents=noise, output_type="pt").images
                assert isinstance(images, torch.Tensor)
                return images

            def peer(w: float = w, labels: torch.Tensor = labels, noise: torch.Tensor = noise) -> torch.Tensor:
                return hand_written_loop(stock, scheduler, labels, w, steps, noise)

            difference = (ours() - peer()).abs().max().item()
            assert drawn_by is one_pass or difference < 1e-3, (
                f"The two sides generate different images: they differ by up to {difference}."
            )
            row = {"batch_size": batch_size, "w": w, "distilled": drawn_by is one_pass}
            row["seconds"] = time_interleaved(timed(ours), timed(peer), repeats).summary()
            for name, side, network in (("ours", ours, drawn_by.unet), ("peer", peer, stock)):
                with counted_evaluations(network) as evaluations:
                    row[name] = {"peak_bytes": peak_bytes(side), "evaluations": sum(evaluations) / batch_size}
            rows.append(row)
    return rows


def stock_copy(unet: UNet2DCFGModel) -> UNet2DModel:
    """Return a `UNet2DModel` in eval mode with the weights of a network, on its device."""
    stock = UNet2DModel.from_config(unet.config).eval()
    stock.to(unet.device)  # pyright: ignore[reportArgumentType]  (diffusers' wrapper of `to` hides its signature)
    stock.load_state_dict(unet.state_dict())
    return stock


@torch.no_grad()
def hand_written_loop(
    unet: UNet2DModel, scheduler: DDIMScheduler, class_labels: torch.Tensor, w: float, steps: int, z: torch.Tensor
) -> torch.Tensor:
    """Sample with the usual classifier-free guidance loop, which doubles the batch if w > 0."""
    null = torch.full_like(class_labels, unet.config.num_class_embeds - 1)
    class_labels = (torch.cat([class_labels, null]) if w > 0 else class_labels).to(z.device)
    scheduler.set_timesteps(steps, device=z.device)
    for t in scheduler.timesteps:
        inputs = (torch.cat([z, z]) if w > 0 else z).to(unet.dtype)
        pred = unet(inputs, t, class_labels=class_labels).sample.float()
        if w > 0:
            conditional, unconditional = pred.chunk(2)
            s = 1 + w
            pred = unconditional + s * (conditional - unconditional)
        step = scheduler.step(pred, t, z, use_clipped_model_output=True)  # pyright: ignore[reportArgumentType]  (a tensor)
        z = step.prev_sample
    return (z / 2 + 0.5).clamp(0, 1)


def compare_training(
    ours: Callable[[], float], peer: Callable[[], float], num_images: int, repeats: int
) -> dict[str, Any]:
    """
    Compare the throughput and the peak memory of two training loops.

    Args:
        ours, peer (`Callable`): train on `num_images` images and return the seconds taken.
        num_images (`int`): images per call.
        repeats (`int`): timed calls of each side.
    """
    seconds = time_interleaved(ours, peer, repeats).summary()
    rates = {"ours": num_images / seconds["ours"], "peer": num_images / seconds["peer"], "ratio": 1 / seconds["ratio"]}
    memory = {name: {"peak_bytes": peak_bytes(side)} for name, side in (("ours", ours), ("peer", peer))}
    return {"images_per_second": rates, **memory}


def unconditional_training(
    config: TrainConfig, images: LabelledImages, pipeline: CFGPipeline, accelerator: Accelerator
) -> Callable[[int], float]:
    """
    Return a function that runs a number of training steps and returns the seconds taken.

    The loop follows diffusers' examples/unconditional_image_generation/train_unconditional.py, with class labels added:
    lazily decoded images, DDPM's noise, AdamW, EMA weights, and a loss that is read at each step. Transforms use PIL
    and NumPy instead of torchvision.
    """
    model = UNet2DModel.from_config(pipeline.unet.config)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    mode, size = "L" if images.channels == 1 else "RGB", (config.resolution, config.resolution)

    def decode(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = [images.open_image(index).convert(mode) for index in indices]
        decoded = [np.array(ImageOps.fit(image, size, Image.Resampling.BILINEAR)) for image in decoded]
        x = torch.from_numpy(np.stack(decoded)).view(len(indices), *size, -1).permute(0, 3, 1, 2).float()
        return (x / 255 - 0.5) / 0.5, torch.from_numpy(images.class_labels[indices])

    indices: Any = range(len(images))  # a sequence, which DataLoader takes as a dataset
    loader = DataLoader(indices, batch_size=config.train_batch_size, shuffle=True, collate_fn=decode)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)

    def run(steps: int) -> float:
        start, progress = now(), tqdm(total=steps, disable=None)
        for x, class_labels in islice(chain.from_iterable(repeat(loader)), steps):
            noise = torch.randn_like(x)
            t = torch.randint(0, 1000, (len(x),), device=x.device)
            z = noise_scheduler.add_noise(x, noise, t)  # pyright: ignore[reportArgumentType]  (int64 is supported)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(z, t, class_labels=class_labels).sample.float(), noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            progress.update()
            progress.set_postfix(loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
        progress.close()
        return now() - start

    return run


def compare_starting(command: Path, repeats: int) -> dict[str, Any]:
    """Time fresh processes: importing this package, importing only the parts of diffusers it needs, and `--help`."""
    memory: dict[str, list[int]] = {OUR_IMPORTS: [], PEER_IMPORTS: []}

    def start(code: str) -> float:
        process = run_python("-c", code)
        memory[code].append(process.peak_bytes)
        return process.seconds

    timings = time_interleaved(lambda: start(OUR_IMPORTS), lambda: start(PEER_IMPORTS), repeats)
    ours, peer = map(statistics.median, memory.values())
    added = statistics.median(ours - peer for ours, peer in zip(timings.ours, timings.peer, strict=True))
    return {
        "import": {**timings.summary(), "added": added, "added_bytes": ours - peer},
        "help": statistics.median(run_python(str(command), "--help").seconds for _ in range(repeats)),
    }


def tables(record: dict[str, Any]) -> str:
    """Return all measurements as Markdown tables. Pairs read ours / peer."""

    def both(row: dict[str, Any], name: str, unit: float = 1) -> str:
        return " / ".join(f"{row[side][name] / unit:.0f}" for side in ("ours", "peer"))

    sampled = []
    for row in record["sampling"]:
        w, seconds = f"{row['w']:g}" + (", distilled" if row["distilled"] else ""), row["seconds"]
        per_image = " / ".join(f"{seconds[side] / row['batch_size']:.4f}" for side in ("ours", "peer"))
        cost = [both(row, "evaluations"), both(row, "peak_bytes", 2**20)]
        sampled.append([str(row["batch_size"]), w, per_image, f"{seconds['ratio']:.3f}", *cost])
    training, starting = record["training"], record["starting"]
    rate, imports = training["images_per_second"], starting["import"]
    trained = [f"{rate['ours']:.1f} / {rate['peer']:.1f}", f"{rate['ratio']:.3f}", both(training, "peak_bytes", 2**20)]
    return (
        f"{record['machine']}, {record['versions']}, {record['parameters'] / 1e6:.1f} M parameters\n\n"
        "Sampling, ours / a hand-written loop over UNet2DModel\n\n"
        f"{table(['batch size', 'w', 's/image', 'ratio', 'evaluations', 'peak MiB'], sampled)}\n\n"
        "Training, ours / train_unconditional.py\n\n"
        f"{table(['images/s', 'ratio', 'peak MiB'], [trained])}\n\n"
        f"Importing the package takes {imports['ours']:.2f} s; torch and the parts of diffusers that it needs take "
        f"{imports['peer']:.2f} s. The package adds {imports['added']:.2f} s and "
        f"{imports['added_bytes'] / 2**20:.0f} MiB. `train_cfg.py --help` takes {starting['help']:.2f} s."
    )
