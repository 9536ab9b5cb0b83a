"""What sampling, training and starting cost, beside what people would write: in turn, in one run, medians and ratios.

python training/benchmark.py
python training/benchmark.py --config training/configs/mnist.yaml --output benchmark.json
python training/benchmark.py --model cfg-model --guidance_interval 0.2 5

With --model also its quality over the network's evaluations, as ablate_samplers.py measures it; hours on a CPU.
"""

import io
import json
import logging
import os
import platform
import statistics
import subprocess
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
    parser.add_argument("--model", help="Measure the quality of this model too, into its folder `samplers`.")
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, help="… also with guidance where σ_lo < σ/α ≤ σ_hi only."
    )
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
    images = load_labelled_images(config)
    pipeline = build_pipeline(config, images).to(device)
    pipeline.set_progress_bar_config(disable=True)
    on_gpu = device.type == "cuda"
    record = {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": pipeline.unet.num_parameters(),
        "sampling": sampling(args, pipeline),
        "training": training(args, config, images, accelerator),
        "starting": starting(args),
    }
    print(tables(record))
    if args.model is not None:
        record["quality"] = quality(args)
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


class Stopwatch:
    """Inside, adds up the seconds in a method of a class."""

    def __init__(self, owner: type, method: str):
        self.owner, self.method, self.seconds = owner, method, 0.0

    def __enter__(self) -> "Stopwatch":
        self.function = function = getattr(self.owner, self.method)

        def timed_function(*args, **kwargs):
            then = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += now() - then

        setattr(self.owner, self.method, timed_function)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.method, self.function)


class Watched:
    """Inside, adds up the seconds between two of torch's hooks: those of a network's evaluations, or of steps."""

    def __init__(self, register_before: Callable, register_after: Callable):
        self.register_before, self.register_after, self.seconds = register_before, register_after, 0.0

    def __enter__(self) -> "Watched":
        self.hooks = [self.register_before(self._before), self.register_after(self._after)]
        return self

    def _before(self, *_: object) -> None:
        self.then = now()

    def _after(self, *_: object) -> None:
        self.seconds += now() - self.then

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


class WatchedNetwork(Watched):
    """Counts also the samples that the network is evaluated on."""

    def __init__(self, network):
        super().__init__(network.register_forward_pre_hook, network.register_forward_hook)
        self.samples = 0

    def _before(self, _network, inputs: tuple) -> None:
        self.samples += len(inputs[0])
        super()._before()


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ----- sampling -----


def sampling(args: Namespace, pipeline) -> list[dict[str, Any]]:
    """
    The pipeline beside the usual loop over a stock network, with the same weights, noise and solver; and a distilled
    network beside the loop at the same w.
    """
    import torch
    from diffusers import DDIMScheduler, UNet2DModel
    from loop import sample_shape

    from diffusers_cfg import CFGPipeline, UNet2DCFGModel

    scheduler = pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    stock = UNet2DModel.from_config(pipeline.unet.config).to(pipeline.device).eval()
    stock.load_state_dict(pipeline.unet.state_dict())
    pipeline.unet.eval()
    # What it draws would have to be learned, but not what it costs.
    student = UNet2DCFGModel.from_config(pipeline.unet.config, max_guidance_scale=4.0).to(pipeline.device).eval()
    one_pass = CFGPipeline(student, scheduler)
    one_pass.set_progress_bar_config(disable=True)
    rows = []
    for batch_size in args.batch_sizes:
        noise = torch.randn(batch_size, *sample_shape(stock), device=pipeline.device)
        labels = torch.arange(batch_size) % pipeline.unet.num_classes
        for w, drawn_by in ((0.0, pipeline), (1.0, pipeline), (1.0, one_pass)):

            def ours(w=w, labels=labels, noise=noise, drawn_by=drawn_by):
                return drawn_by(labels, w, args.sampling_steps, latents=noise, output_type="pt").images

            def peer(w=w, labels=labels, noise=noise):
                return hand_written_loop(stock, scheduler, labels, w, args.sampling_steps, noise)

            difference = (ours() - peer()).abs().max().item()
            if drawn_by is pipeline and difference > 1e-3:
                raise AssertionError(f"The two sides draw other images: they differ by {difference}.")
            row = {"batch_size": batch_size, "w": w, "distilled": drawn_by is one_pass}
            row["seconds"] = take_turns(timed(ours), timed(peer), args.repeats).summary()
            for name, side, network in (("ours", ours, drawn_by.unet), ("peer", peer, stock)):
                with PeakMemory() as memory, WatchedNetwork(network) as watched:
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


def training(args: Namespace, config: TrainConfig, images, accelerator) -> dict[str, Any]:
    """
    Images per second of train_cfg.py beside the steps of diffusers' train_unconditional.py, given labels; and what part
    of a step goes to what.
    """
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

    peer = UnconditionalTraining(config, images, accelerator)
    turns = take_turns(ours, lambda: peer.run(args.training_steps), args.repeats)
    images_timed = args.training_steps * config.train_batch_size
    rates = {name: images_timed / seconds for name, seconds in turns.summary().items() if name != "ratio"}
    record = {"images_per_second": {**rates, "ratio": 1 / turns.summary()["ratio"]}}
    for name, side in (("ours", ours), ("peer", lambda: peer.run(args.training_steps))):
        with PeakMemory() as memory:
            record[name] = {**shares(side), "peak_bytes": memory.bytes}
    return record


def shares(side: Callable[[], float]) -> dict[str, float]:
    """What parts of a side's seconds are spent on what."""
    from diffusers.training_utils import EMAModel
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    with (
        Stopwatch(_BaseDataLoaderIter, "__next__") as data,
        Watched(register_optimizer_step_pre_hook, register_optimizer_step_post_hook) as optimizer,
        Stopwatch(EMAModel, "step") as average,
    ):
        seconds = side()
    watches = {"data": data, "optimizer": optimizer, "average": average}
    return {name: watch.seconds / seconds for name, watch in watches.items()}


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
        self.accelerator = accelerator
        self.model, self.optimizer, self.loader, self.lr_scheduler = accelerator.prepare(
            model, optimizer, loader, lr_scheduler
        )

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        import torch
        import torch.nn.functional as F
        from tqdm.auto import tqdm

        then, done = now(), 0
        progress = tqdm(total=steps, disable=None)
        while done < steps:
            for x, class_labels in self.loader:
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
        progress.close()
        return now() - then


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


# ----- starting -----

PEER_IMPORTS = (
    "import torch; from diffusers import DiffusionPipeline, UNet2DModel, AutoencoderKL, DDIMScheduler; "
    "from diffusers.guiders import BaseGuidance; from diffusers.image_processor import VaeImageProcessor"
)


def starting(args: Namespace) -> dict[str, Any]:
    """Seconds and memory of a fresh process that imports the package, beside what it needs of diffusers; of --help."""
    peer, ours = [], []
    imports = take_turns(
        lambda: fresh_process(["-c", f"{PEER_IMPORTS}; import diffusers_cfg"], ours),
        lambda: fresh_process(["-c", PEER_IMPORTS], peer),
        args.repeats,
    )
    script = str(Path(__file__).parent / "train_cfg.py")
    usage = [fresh_process([script, "--help"], []) for _ in range(args.repeats)]
    return {
        "import": {
            **imports.summary(),
            "added": statistics.median(a - b for a, b in zip(imports.ours, imports.peer, strict=True)),
            "added_bytes": statistics.median(ours) - statistics.median(peer),
        },
        "help": statistics.median(usage),
    }


def fresh_process(argv: list[str], peak_bytes: list[int]) -> float:
    """Seconds that Python takes with these arguments; the most memory it had is noted."""
    then = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - then
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"python {' '.join(argv)} failed.")
    peak_bytes.append(usage.ru_maxrss * 1024)
    return seconds


# ----- quality -----


def quality(args: Namespace) -> dict[str, Any]:
    """What a model's samples are like, by sampler and number of steps."""
    from ablate_samplers import ablate_samplers
    from ablate_samplers import parse_args as parse_samplers

    folder = Path(args.model) / "samplers"
    interval = ["--guidance_interval", *map(str, args.guidance_interval)] if args.guidance_interval else []
    table = ablate_samplers(*parse_samplers(["--model", args.model, "--output_dir", str(folder), *interval]))
    print(f"\nQuality\n\n{table}")
    return json.loads((folder / "samplers.json").read_text(encoding="utf-8"))


# ----- the report -----


def tables(record: dict[str, Any]) -> str:
    from report import table

    def both(row: dict, name: str, digits: int, unit: float = 1) -> str:
        return " / ".join(f"{row[side][name] / unit:.{digits}f}" for side in ("ours", "peer"))

    header = ["images at once", "w", "s/image", "ratio", "evaluations", "outside the network", "peak MiB"]
    sampled = [
        [
            str(row["batch_size"]),
            f"{row['w']:g}" + (", distilled" if row["distilled"] else ""),
            " / ".join(f"{row['seconds'][side] / row['batch_size']:.4f}" for side in ("ours", "peer")),
            f"{row['seconds']['ratio']:.3f}",
            both(row, "evaluations", 0),
            both(row, "outside_network", 3),
            both(row, "peak_bytes", 0, 2**20),
        ]
        for row in record["sampling"]
    ]
    seconds = {
        (row["batch_size"], row["w"]): row["seconds"]["ours"] for row in record["sampling"] if not row["distilled"]
    }
    unguided = ", ".join(f"{seconds[n, 0] / seconds[n, 1]:.3f} ({n})" for n in dict.fromkeys(n for n, _ in seconds))
    training, starting = record["training"], record["starting"]
    rate = training["images_per_second"]
    trained = [
        [f"{rate['ours']:.1f} / {rate['peer']:.1f}", f"{rate['ratio']:.3f}"]
        + [both(training, name, 4) for name in ("data", "optimizer", "average")]
        + [both(training, "peak_bytes", 0, 2**20)]
    ]
    imports = starting["import"]
    return (
        f"{record['machine']}, {record['versions']}, {record['parameters'] / 1e6:.1f} M parameters\n\n"
        f"Sampling / a hand-written loop over UNet2DModel\n\n{table(header, sampled)}\n\n"
        f"w = 0 in seconds of w = 1 (images at once): {unguided}\n\n"
        "Training / train_unconditional.py; shares of a step\n\n"
        f"{table(['images/s', 'ratio', 'data wait', 'optimizer', 'EMA', 'peak MiB'], trained)}\n\n"
        f"Starting: `import diffusers_cfg` {imports['ours']:.2f} s, what it needs of torch and diffusers "
        f"{imports['peer']:.2f} s; it adds {imports['added']:.2f} s and {imports['added_bytes'] / 2**20:.0f} MiB. "
        f"`train_cfg.py --help` {starting['help']:.2f} s."
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
