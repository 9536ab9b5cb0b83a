"""What sampling and training cost, beside what people would write instead: in turn, in one run, medians and ratios.

python training/benchmark.py
python training/benchmark.py --config training/configs/mnist.yaml --output benchmark.json
"""

import io
import json
import logging
import platform
import statistics
import sys
import tempfile
import threading
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, parse_config


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, TrainConfig]:
    parser = ArgumentParser(
        prog="benchmark.py", formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False,
        description=__doc__.splitlines()[0] + " Further flags are those of train_cfg.py: network, data, batch.",
    )  # fmt: skip
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="Images that are drawn at once.")
    parser.add_argument("--sampling_steps", type=int, default=20, help="Sampling steps T; a divisor of 1000.")
    parser.add_argument("--training_steps", type=int, default=30, help="Training steps that are timed at a time.")
    parser.add_argument("--repeats", type=int, default=5, help="How often each side has its turn.")
    parser.add_argument("--output", help="A JSON file for the figures.")
    args, rest = parser.parse_known_args(argv)
    return args, parse_config(rest)


def benchmark(args: Namespace, config: TrainConfig) -> dict[str, Any]:
    import torch
    from data import load_labelled_images
    from loop import make_accelerator
    from model import build_pipeline

    config.report_to = "none"
    accelerator = make_accelerator(config)
    device = accelerator.device
    pipeline = build_pipeline(config, load_labelled_images(config)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    on_gpu = device.type == "cuda"
    record = {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": pipeline.unet.num_parameters(),
        "sampling": sampling(args, pipeline),
        "training": training(args, config),
    }
    print(tables(record))
    return record


# ----- taking turns -----


@dataclass
class Turns:
    """Seconds of both sides, in turn."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Medians, and that of the ratios ours : peer of neighbours, which have the machine's moods in common."""
        ratios = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
        return {
            "ours": statistics.median(self.ours),
            "peer": statistics.median(self.peer),
            "ratio": statistics.median(ratios),
        }


def take_turns(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> Turns:
    """Functions that return seconds, called in turn, the other one first each time. A first call does not count."""
    ours(), peer()
    turns = Turns()
    for i in range(repeats):
        sides = [(turns.ours, ours), (turns.peer, peer)]
        for seconds, side in sides if i % 2 else reversed(sides):
            seconds.append(side())
    return turns


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """A function that calls another, and returns the seconds until the device was done too."""

    def seconds() -> float:
        then = now()
        function()
        return now() - then

    return seconds


class PeakMemory:
    """Inside, watches the memory of the process, or on a GPU of torch; `bytes` is the most above that before."""

    def __enter__(self) -> "PeakMemory":
        import psutil
        import torch

        self.process, self.on_gpu, self.bytes = psutil.Process(), torch.cuda.is_available(), 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before, self.done = self.process.memory_info().rss, threading.Event()
            self.watcher = threading.Thread(target=self._watch, daemon=True)
            self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, self.process.memory_info().rss - self.before)

    def __exit__(self, *_: object) -> None:
        import torch

        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.done.set()
            self.watcher.join()


class Watched:
    """Inside, counts the samples that a network is evaluated on, and the seconds that it takes."""

    def __init__(self, network):
        self.network, self.samples, self.seconds = network, 0, 0.0

    def __enter__(self) -> "Watched":
        self.hooks = [
            self.network.register_forward_pre_hook(self._before),
            self.network.register_forward_hook(self._after),
        ]
        return self

    def _before(self, _network, inputs: tuple) -> None:
        self.samples += len(inputs[0])
        self.then = now()

    def _after(self, *_: object) -> None:
        self.seconds += now() - self.then

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ----- sampling -----


def sampling(args: Namespace, pipeline) -> list[dict[str, Any]]:
    """The pipeline beside the usual loop over a stock network, with the same weights, noise and solver."""
    import torch
    from diffusers import DDIMScheduler, UNet2DModel
    from loop import sample_shape

    scheduler = pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    stock = UNet2DModel.from_config(pipeline.unet.config).to(pipeline.device).eval()
    stock.load_state_dict(pipeline.unet.state_dict())
    pipeline.unet.eval()
    rows = []
    for batch_size in args.batch_sizes:
        noise = torch.randn(batch_size, *sample_shape(stock), device=pipeline.device)
        labels = torch.arange(batch_size) % pipeline.unet.num_classes
        for w in (0.0, 1.0):

            def ours(w=w, labels=labels, noise=noise):
                return pipeline(labels, w, args.sampling_steps, latents=noise, output_type="pt").images

            def peer(w=w, labels=labels, noise=noise):
                return hand_written_loop(stock, scheduler, labels, w, args.sampling_steps, noise)

            difference = (ours() - peer()).abs().max().item()
            if difference > 1e-3:
                raise AssertionError(f"The two sides draw other images: they differ by {difference}.")
            row = {"batch_size": batch_size, "w": w}
            row["seconds"] = take_turns(timed(ours), timed(peer), args.repeats).summary()
            for name, side, network in (("ours", ours, pipeline.unet), ("peer", peer, stock)):
                with PeakMemory() as memory, Watched(network) as watched:
                    total = timed(side)()
                row[name] = {
                    "evaluations": watched.samples / batch_size,
                    "outside_network": 1 - watched.seconds / total,
                    "peak_bytes": memory.bytes,
                }
            rows.append(row)
    return rows


def hand_written_loop(unet, scheduler, class_labels, w: float, num_inference_steps: int, z):
    """Classifier-free guidance as people write it: two halves of one batch, if there is any guidance."""
    import torch

    with torch.no_grad():
        null = torch.full_like(class_labels, unet.config.num_class_embeds - 1)
        class_labels = (torch.cat([class_labels, null]) if w > 0 else class_labels).to(z.device)
        scheduler.set_timesteps(num_inference_steps, device=z.device)
        for t in scheduler.timesteps:
            pred = unet(torch.cat([z, z]) if w > 0 else z, t, class_labels=class_labels).sample
            if w > 0:
                conditional, unconditional = pred.chunk(2)
                s = 1 + w
                pred = unconditional + s * (conditional - unconditional)
            z = scheduler.step(pred, t, z, use_clipped_model_output=True).prev_sample
    return (z / 2 + 0.5).clamp(0, 1)


# ----- training -----


def training(args: Namespace, config: TrainConfig) -> dict[str, Any]:
    """Images per second of train_cfg.py beside the steps of diffusers' train_unconditional.py, given labels."""
    from data import load_labelled_images
    from loop import make_accelerator
    from train_cfg import train_cfg

    config.max_train_steps = config.checkpointing_steps = args.training_steps
    config.validation_steps = config.eval_steps = 0
    config.validation_guidance_scales, config.num_inference_steps = [0.0], 1

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            config.output_dir = folder
            train_cfg(config)
            state = Path(folder) / f"checkpoint-{args.training_steps}" / "state.json"
            return json.loads(state.read_text(encoding="utf-8"))["seconds"]

    images = load_labelled_images(config)
    peer = UnconditionalTraining(config, images, make_accelerator(config))
    turns = take_turns(ours, lambda: peer.run(args.training_steps), args.repeats)
    images_timed = args.training_steps * config.train_batch_size
    rates = {name: images_timed / seconds for name, seconds in turns.summary().items() if name != "ratio"}
    return {"images_per_second": {**rates, "ratio": 1 / turns.summary()["ratio"]}, "peer_data_wait": peer.data_wait}


class UnconditionalTraining:
    """
    What diffusers' examples/unconditional_image_generation/train_unconditional.py does in a step, for a network with
    labels: each image decoded as it is used, DDPM's noise, AdamW, an average of the weights, a loss read off at each
    step. Its transforms are torchvision's; here PIL and NumPy do the same.
    """

    def __init__(self, config: TrainConfig, images, accelerator):
        import torch
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from model import build_unet

        unet = build_unet(config, None, images.channels, len(images.id2label))
        model = UNet2DModel.from_config(unet.config)
        self.ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.ema.to(accelerator.device)
        self.noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        loader = torch.utils.data.DataLoader(
            Decoded(images, config.resolution), batch_size=config.train_batch_size, shuffle=True
        )
        lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self.accelerator, self.data_wait = accelerator, 0.0
        self.model, self.optimizer, self.loader, self.lr_scheduler = accelerator.prepare(
            model, optimizer, loader, lr_scheduler
        )

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        import torch
        import torch.nn.functional as F
        from tqdm.auto import tqdm

        then, waited, done = now(), 0.0, 0
        progress = tqdm(total=steps, disable=None)
        while done < steps:
            asked = time.perf_counter()
            for x, class_labels in self.loader:
                waited += time.perf_counter() - asked
                noise = torch.randn_like(x)
                t = torch.randint(0, 1000, (len(x),), device=x.device)
                z = self.noise_scheduler.add_noise(x, noise, t)
                with self.accelerator.accumulate(self.model):
                    loss = F.mse_loss(self.model(z, t, class_labels=class_labels).sample.float(), noise)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.lr_scheduler.step()
                    self.optimizer.zero_grad()
                self.ema.step(self.model.parameters())
                progress.update()
                progress.set_postfix(loss=loss.detach().item(), lr=self.lr_scheduler.get_last_lr()[0])
                done += 1
                if done == steps:
                    break
                asked = time.perf_counter()
        progress.close()
        seconds = now() - then
        self.data_wait = waited / seconds
        return seconds


class Decoded:
    """Resize, crop, to a tensor in [-1, 1], for each image as it is asked for."""

    def __init__(self, images, resolution: int):
        self.images, self.resolution, self.mode = images, resolution, "L" if images.channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        import numpy as np
        import torch
        from PIL import Image, ImageOps

        image = self.images.open_image(index).convert(self.mode)
        image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).view(self.resolution, self.resolution, -1).permute(2, 0, 1)
        return (pixels.float().div(255) - 0.5) / 0.5, int(self.images.class_labels[index])


# ----- the report -----


def tables(record: dict[str, Any]) -> str:
    from report import table

    header = ["images at once", "w", "ours, s/image", "by hand, s/image", "ratio", "evaluations", "outside", "peak MiB"]
    rows = [
        [
            str(row["batch_size"]),
            f"{row['w']:g}",
            *(f"{row['seconds'][side] / row['batch_size']:.4f}" for side in ("ours", "peer")),
            f"{row['seconds']['ratio']:.3f}",
            *(f"{row['ours'][name]:.{digits}f} / {row['peer'][name]:.{digits}f}" for name, digits in
              (("evaluations", 0), ("outside_network", 3))),
            " / ".join(f"{row[side]['peak_bytes'] / 2**20:.0f}" for side in ("ours", "peer")),
        ]
        for row in record["sampling"]
    ]  # fmt: skip
    rate = record["training"]["images_per_second"]
    return (
        f"{record['machine']}, {record['versions']}, {record['parameters'] / 1e6:.1f} M parameters\n\n"
        f"{table(header, rows)}\n\n"
        f"Training: {rate['ours']:.1f} images/s, train_unconditional.py {rate['peer']:.1f}, ratio {rate['ratio']:.3f}"
    )


if __name__ == "__main__":
    try:
        args, config = parse_args()
        logging.disable(logging.WARNING)
        record = benchmark(args, config)
        if args.output:
            Path(args.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except UserError as error:
        sys.exit(f"benchmark.py: error: {error}")
