"""Compare the cost of sampling, training and starting with that of hand-written code: medians and ratios, in turn."""

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
from diffusers_cfg.data.sources import LabelledImages
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
    Compare the pipeline with the usual loop over a stock network of the same weights, noise and solver; and a distilled
    network with that loop at the same w.

    Args:
        pipeline (`CFGPipeline`): gets DDIM for its scheduler.
        batch_sizes (`list[int]`): images that are drawn at once.
        steps (`int`): T, a divisor of 1000.
        repeats (`int`): how often each side has its turn.
    """
    scheduler = pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    stock = UNet2DModel.from_config(pipeline.unet.config).to(pipeline.device).eval()
    stock.load_state_dict(pipeline.unet.state_dict())
    pipeline.unet.eval()
    # It draws nothing sensible without being trained, but at the same cost.
    student = UNet2DCFGModel.from_config(pipeline.unet.config, max_guidance_scale=4.0).to(pipeline.device).eval()
    one_pass = CFGPipeline(student, scheduler)
    one_pass.set_progress_bar_config(disable=True)
    rows = []
    for batch_size in batch_sizes:
        noise = torch.randn(batch_size, *pipeline.sample_shape, device=pipeline.device)
        labels = torch.arange(batch_size) % pipeline.unet.num_classes
        for w, drawn_by in ((0.0, pipeline), (1.0, pipeline), (1.0, one_pass)):

            def ours(w=w, labels=labels, noise=noise, drawn_by=drawn_by) -> torch.Tensor:
                return drawn_by(labels, w, steps, latents=noise, output_type="pt").images

            def peer(w=w, labels=labels, noise=noise) -> torch.Tensor:
                return hand_written_loop(stock, scheduler, labels, w, steps, noise)

            difference = (ours() - peer()).abs().max().item()
            assert drawn_by is one_pass or difference < 1e-3, f"The two sides draw other images: {difference} apart."
            row = {"batch_size": batch_size, "w": w, "distilled": drawn_by is one_pass}
            row["seconds"] = time_interleaved(timed(ours), timed(peer), repeats).summary()
            for name, side, network in (("ours", ours, drawn_by.unet), ("peer", peer, stock)):
                with counted_evaluations(network) as evaluations:
                    row[name] = {"peak_bytes": peak_bytes(side), "evaluations": sum(evaluations) / batch_size}
            rows.append(row)
    return rows


@torch.no_grad()
def hand_written_loop(
    unet: UNet2DModel, scheduler: DDIMScheduler, class_labels: torch.Tensor, w: float, steps: int, z: torch.Tensor
) -> torch.Tensor:
    """Draw with classifier-free guidance as it is usually written: two halves of a batch, if there is guidance."""
    null = torch.full_like(class_labels, unet.config.num_class_embeds - 1)
    class_labels = (torch.cat([class_labels, null]) if w > 0 else class_labels).to(z.device)
    scheduler.set_timesteps(steps, device=z.device)
    for t in scheduler.timesteps:
        pred = unet(torch.cat([z, z]) if w > 0 else z, t, class_labels=class_labels).sample
        if w > 0:
            conditional, unconditional = pred.chunk(2)
            s = 1 + w
            pred = unconditional + s * (conditional - unconditional)
        z = scheduler.step(pred, t, z, use_clipped_model_output=True).prev_sample
    return (z / 2 + 0.5).clamp(0, 1)


def compare_training(
    ours: Callable[[], float], peer: Callable[[], float], num_images: int, repeats: int
) -> dict[str, Any]:
    """
    Compare the images per second of two trainings.

    Args:
        ours, peer (`Callable`): train on `num_images` images, and return the seconds.
        num_images (`int`): that many.
        repeats (`int`): how often each side has its turn.
    """
    seconds = time_interleaved(ours, peer, repeats).summary()
    rates = {"ours": num_images / seconds["ours"], "peer": num_images / seconds["peer"], "ratio": 1 / seconds["ratio"]}
    memory = {name: {"peak_bytes": peak_bytes(side)} for name, side in (("ours", ours), ("peer", peer))}
    return {"images_per_second": rates, **memory}


def unconditional_training(
    config: TrainConfig, images: LabelledImages, pipeline: CFGPipeline, accelerator: Accelerator
) -> Callable[[int], float]:
    """
    Return a function that takes some steps of diffusers' examples/unconditional_image_generation/train_unconditional.py
    for a network with labels, and returns the seconds: images are decoded lazily; DDPM's noise, AdamW, an EMA, a loss
    that is read at each step. Its transforms are torchvision's; here PIL and NumPy do the same.
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

    loader = DataLoader(range(len(images)), batch_size=config.train_batch_size, shuffle=True, collate_fn=decode)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)

    def run(steps: int) -> float:
        then, progress = now(), tqdm(total=steps, disable=None)
        for x, class_labels in islice(chain.from_iterable(repeat(loader)), steps):
            noise = torch.randn_like(x)
            t = torch.randint(0, 1000, (len(x),), device=x.device)
            z = noise_scheduler.add_noise(x, noise, t)
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
        return now() - then

    return run


def compare_starting(command: Path, repeats: int) -> dict[str, Any]:
    """Compare fresh processes that import the package and what it needs of diffusers; time the help of a command."""
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
    """Return all figures in Markdown: ours / theirs."""

    def both(row: dict[str, Any], name: str, unit: float = 1) -> str:
        return " / ".join(f"{row[side][name] / unit:.0f}" for side in ("ours", "peer"))

    sampled = []
    for row in record["sampling"]:
        w, seconds = f"{row['w']:g}" + (", distilled" if row["distilled"] else ""), row["seconds"]
        a_image = " / ".join(f"{seconds[side] / row['batch_size']:.4f}" for side in ("ours", "peer"))
        cost = [both(row, "evaluations"), both(row, "peak_bytes", 2**20)]
        sampled.append([str(row["batch_size"]), w, a_image, f"{seconds['ratio']:.3f}", *cost])
    training, starting = record["training"], record["starting"]
    rate, imports = training["images_per_second"], starting["import"]
    trained = [f"{rate['ours']:.1f} / {rate['peer']:.1f}", f"{rate['ratio']:.3f}", both(training, "peak_bytes", 2**20)]
    return (
        f"{record['machine']}, {record['versions']}, {record['parameters'] / 1e6:.1f} M parameters\n\n"
        "Sampling / a hand-written loop over UNet2DModel\n\n"
        f"{table(['images at once', 'w', 's/image', 'ratio', 'evaluations', 'peak MiB'], sampled)}\n\n"
        "Training / train_unconditional.py\n\n"
        f"{table(['images/s', 'ratio', 'peak MiB'], [trained])}\n\n"
        f"Starting: the package {imports['ours']:.2f} s, what it needs of torch and diffusers {imports['peer']:.2f} s; "
        f"it adds {imports['added']:.2f} s and {imports['added_bytes'] / 2**20:.0f} MiB. "
        f"`train_cfg.py --help` {starting['help']:.2f} s."
    )
