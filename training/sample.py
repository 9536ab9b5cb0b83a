"""Draw images with a trained model: a folder of PNGs, a grid, or an npz file as ADM's evaluator reads it.

python training/sample.py --model cfg-model --class_labels three 7 --guidance_scale 2 --num_samples 20
accelerate launch training/sample.py --model me/cfg-digits --num_samples 50000 --format npz
"""

import json
import logging
import os
import shutil
import sys
import zipfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError

logger = logging.getLogger(__name__)

# Images in a file of a sample set, and the most that a kill can cost each process.
SHARD_SIZE = 500


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="sample.py", description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--class_labels", nargs="+", help="Class names or ids, drawn in turn; by default all of them.")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="The paper's w.")
    parser.add_argument("--num_samples", type=int, default=20, help="How many images.")
    parser.add_argument("--output_dir", default="images", help="Where to write them.")
    parser.add_argument(
        "--format", choices=["png", "grid", "npz"], default="png",
        help="CLASS/INDEX.png; grid.png, at most 10 in a row; or samples.npz with arr_0, uint8 NHWC, and arr_1, ids.",
    )  # fmt: skip
    add_sampling_flags(parser)
    return parser.parse_args(argv)


def add_sampling_flags(parser: ArgumentParser) -> None:
    """The flags that say how images are drawn."""
    parser.add_argument("--model", required=True, help="The output folder of a training run, or a repository.")
    parser.add_argument("--variant", help="Other weights of the network that the model holds, such as ema999.")
    parser.add_argument("--num_inference_steps", type=int, help="Sampling steps T; by default the model's own.")
    parser.add_argument(
        "--scheduler", help="A class of diffusers to sample with, or LogSNRScheduler; by default the model's own."
    )
    parser.add_argument("--guidance_interval", type=float, nargs=2, help="Guide only where σ_lo < σ/α ≤ σ_hi.")
    parser.add_argument("--guidance_rescale", type=float, default=0.0, help="φ in [0, 1], against saturation.")
    parser.add_argument(
        "--guidance_tolerance", type=float, default=0.0, help="Stop guiding an image once that moves x̃ by less."
    )
    parser.add_argument("--guide_model", help="A weaker model for the same classes, for autoguidance.")
    parser.add_argument("--guider", help="One of diffusers' guiders, made with w, instead of the pipeline's own rule.")
    parser.add_argument("--batch_size", type=int, default=250, help="Images drawn at a time on each process.")
    parser.add_argument("--seed", type=int, default=0, help="An image is determined by this and its index.")


def sample(args: Namespace) -> None:
    # Imported here and not above: they take seconds, which --help and a wrong flag need not wait for.
    import torch
    from config import TrainConfig
    from loop import make_accelerator

    check_positive(args, "num_samples", "batch_size")
    accelerator = make_accelerator(TrainConfig(report_to="none"))
    pipeline = load_pipeline(args, accelerator.device)
    labels = class_ids(args.class_labels, pipeline)
    class_labels = torch.tensor(labels)[torch.arange(args.num_samples) % len(labels)]

    output_dir = Path(args.output_dir)
    if output_dir.is_dir() and {path.name for path in output_dir.iterdir()} - {"shards"}:
        raise UserError(f"--output_dir {output_dir} is not empty: choose another.")
    samples = SampleSet(output_dir / "shards", args.num_samples)
    settings = {"class_labels": labels, "guidance_scale": args.guidance_scale, **sampling_settings(args, pipeline)}
    if accelerator.is_main_process:
        claim_folder(output_dir / "shards", settings)
    draw_sets(args, accelerator, pipeline, {args.guidance_scale: samples}, class_labels)
    if accelerator.is_main_process:
        {"png": write_png, "grid": write_grid, "npz": write_npz}[args.format](samples, output_dir, pipeline)
        shutil.rmtree(output_dir / "shards")
        print(f"{args.num_samples} images are in {output_dir}.")
    accelerator.end_training()


def check_positive(args: Namespace, *names: str) -> None:
    for name in ("num_inference_steps", *names):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(args, name)}.")


# ----- the pipeline, as the flags want it -----


def load_pipeline(args: Namespace, device):
    from diffusers_cfg import CFGPipeline, UNet2DCFGModel

    try:
        pipeline = CFGPipeline.from_pretrained(args.model, variant=args.variant)
        if args.guide_model is not None:
            pipeline.guide_unet = UNet2DCFGModel.from_pretrained(args.guide_model, subfolder="unet")
        if pipeline.guider is not None:
            logger.warning(
                "The model's own %s is not used: --guider says how to guide.", type(pipeline.guider).__name__
            )
            pipeline.guider = None
    except (OSError, ValueError) as error:
        raise UserError(f"A model cannot be loaded: {error}") from error
    if args.scheduler is not None:
        pipeline.scheduler = make_scheduler(args.scheduler, pipeline)
    if args.num_inference_steps is None:
        args.num_inference_steps = pipeline.num_inference_steps
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def make_scheduler(name: str, pipeline):
    """One of the schedulers that the pipeline takes, by name, with its noise process."""
    import diffusers

    from diffusers_cfg import LogSNRScheduler

    if name not in pipeline.schedulers:
        raise UserError(
            f"--scheduler {name} cannot sample this model. Those that can are {', '.join(pipeline.schedulers)}."
        )
    return getattr(diffusers, name, LogSNRScheduler).from_config(pipeline.scheduler.config)


def class_ids(names: list[str] | None, pipeline) -> list[int]:
    """Ids of classes given as names or ids; a name goes before an id that looks like it."""
    if names is None:
        return list(range(pipeline.unet.num_classes))
    label2id = {name: class_id for class_id, name in pipeline.id2label.items()}
    ids = {str(class_id): class_id for class_id in range(-1, pipeline.unet.num_classes)} | label2id
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise UserError(f"--class_labels {' '.join(unknown)}: the classes are {', '.join(list(ids)[:50])}.")
    return [ids[name] for name in names]


def guidance(args: Namespace, w: float) -> dict[str, Any]:
    """What the pipeline is called with to guide by w as the flags say."""
    import diffusers

    if args.guider is not None:
        if not hasattr(diffusers.guiders, args.guider):
            raise UserError(f"--guider {args.guider} is none of diffusers' guiders.")
        return {"guider": getattr(diffusers.guiders, args.guider)(guidance_scale=w, use_original_formulation=True)}
    interval = tuple(args.guidance_interval) if args.guidance_interval else None
    return {
        "guidance_scale": w,
        "guidance_interval": interval,
        **{name: getattr(args, name) for name in ("guidance_rescale", "guidance_tolerance")},
    }


def sampling_settings(args: Namespace, pipeline) -> dict[str, Any]:
    """What determines the images of a set beside their labels and w, as plain values."""
    from feature_extractors import digest

    names = ["num_inference_steps", "guidance_interval", "guidance_rescale", "guidance_tolerance", "guider", "seed"]
    networks = [network for network in (pipeline.unet, pipeline.guide_unet, pipeline.vae) if network is not None]
    return {
        **{name: getattr(args, name) for name in names},
        "scheduler": type(pipeline.scheduler).__name__,
        "networks": [digest(network.state_dict()) for network in networks],
    }


# ----- drawing -----


def draw_images(pipeline, class_labels, indices: list[int], seed: int, **call: Any):
    """
    Draw images of which each is determined by the seed and its index.

    Returns:
        uint8 `(images, 3, height, width)`, and the number of network evaluations an image took.

    Raises:
        UserError: images are not finite; they are counted and named.
    """
    import torch
    from randomness import seeded_generator

    evaluations, last = [], {}
    networks = [network for network in (pipeline.unet, pipeline.guide_unet) if network is not None]
    hooks = [net.register_forward_pre_hook(lambda _, inputs: evaluations.append(len(inputs[0]))) for net in networks]
    try:
        images = pipeline(
            class_labels=class_labels,
            generator=[seeded_generator("cpu", seed, "sample", index) for index in indices],
            output_type="pt",
            callback_on_step_end=lambda _pipeline, _step, _timestep, tensors: last.update(tensors),
            **call,
        ).images
    except FloatingPointError as error:
        finite = torch.isfinite(last["latents"]).flatten(1).all(1).tolist()
        bad = [index for index, is_finite in zip(indices, finite, strict=True) if not is_finite]
        raise UserError(f"{len(bad)} of {len(indices)} images are not finite (indices {bad[:10]}): {error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    images = (images * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1)
    return images, sum(evaluations) / len(indices)


class Shard(NamedTuple):
    images: Any  # numpy.ndarray (images, height, width, 3), uint8
    class_labels: Any  # numpy.ndarray (images,), int64
    network_evaluations: float  # an image


class SampleSet:
    """
    Images of one w on disk, `shard-00000.npz` and so on, each with `arr_0` and `arr_1` as ADM's evaluator has them.

    Args:
        folder (`Path`): where the shards are, or will be.
        num_samples (`int`): how many images the set has. Shards of a larger set are good for a smaller one.
    """

    def __init__(self, folder: Path, num_samples: int):
        self.folder, self.num_samples = folder, num_samples
        self.shards = [
            range(first, min(first + SHARD_SIZE, num_samples)) for first in range(0, num_samples, SHARD_SIZE)
        ]

    def path(self, shard: range) -> Path:
        return self.folder / f"shard-{shard.start // SHARD_SIZE:05}.npz"

    def has(self, shard: range, class_labels) -> bool:
        """Whether the images of a shard are there, and of these classes."""
        try:
            return self.load(shard).class_labels.tolist() == class_labels.tolist()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    def save(self, shard: range, content: Shard) -> None:
        """Write a file that is whole or not there."""
        import numpy as np

        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path(shard).with_suffix(f".tmp-{os.getpid()}")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file, arr_0=content.images, arr_1=content.class_labels, network_evaluations=content.network_evaluations
            )
        unfinished.replace(self.path(shard))

    def load(self, shard: range) -> Shard:
        import numpy as np

        with np.load(self.path(shard)) as file:
            images, class_labels = (file[name][: len(shard)] for name in ("arr_0", "arr_1"))
            return Shard(images, class_labels, float(file["network_evaluations"]))

    def first_images(self, count: int):
        """`torch.Tensor (count, 3, height, width)` with values in [0, 1]."""
        import torch

        shards = [shard for shard in self.shards if shard.start < count]
        images = torch.cat([torch.from_numpy(self.load(shard).images) for shard in shards])
        return images[:count].movedim(-1, 1) / 255


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what the samples in a folder are drawn with. Raises UserError if it holds others."""
    path = folder / "settings.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        settings = json.loads(json.dumps(settings))
        changed = [name for name in settings if known.get(name) != settings[name]]
        if changed:
            changes = ", ".join(f"{name} {known.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise UserError(
                f"{folder} holds samples that were drawn otherwise ({changes}): choose another --output_dir, or delete "
                "them."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def draw_sets(args: Namespace, accelerator, pipeline, sets: dict[float, SampleSet], class_labels) -> None:
    """
    Draw what is missing of the sample sets of each w, all processes sharing the shards. The image at an index has the
    class `class_labels[index]`, and starts from the same noise for each w.
    """
    import torch
    from tqdm.auto import tqdm

    accelerator.wait_for_everyone()  # so that all see the same shards
    missing = [
        (w, shard)
        for w, samples in sets.items()
        for shard in samples.shards
        if not samples.has(shard, class_labels[list(shard)])
    ]
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    # A guided image takes two passes of the network at each step: so the time left comes out right.
    passes = {w: 1 if w in (0, -1) else 2 for w in sets}
    total = sum(passes[w] * len(shard) for w, shard in mine)
    progress = tqdm(total=total, unit="pass", desc="Sampling", disable=not accelerator.is_main_process or not mine)
    for w, shard in mine:
        progress.set_postfix_str(f"w = {w:g}")
        drawn = []
        for indices in torch.tensor(shard).split(args.batch_size):
            call = {**guidance(args, w), "num_inference_steps": args.num_inference_steps}
            drawn.append(draw_images(pipeline, class_labels[indices], indices.tolist(), args.seed, **call))
            progress.update(passes[w] * len(indices))
        images = torch.cat([images for images, _ in drawn]).movedim(1, -1).numpy()
        sets[w].save(shard, Shard(images, class_labels[list(shard)].numpy(), drawn[0][1]))
    progress.close()
    accelerator.wait_for_everyone()


# ----- what people want -----


def write_png(samples: SampleSet, folder: Path, pipeline) -> None:
    """`CLASS/INDEX.png`, as `--train_data_dir` reads it."""
    from model import image_channels
    from PIL import Image

    mode = "L" if image_channels(pipeline) == 1 else "RGB"
    names = {-1: "unconditional", **{i: str(i) for i in range(pipeline.unet.num_classes)}, **pipeline.id2label}
    for shard in samples.shards:
        content = samples.load(shard)
        for index, image, class_id in zip(shard, content.images, content.class_labels.tolist(), strict=True):
            # A class may be called anything, a file may not
            path = folder / names[class_id].replace("/", "_").strip(".") / f"{index:06}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).convert(mode).save(path)


def write_grid(samples: SampleSet, folder: Path, pipeline) -> None:
    import torch
    from grid import draw_grid

    images = samples.first_images(samples.num_samples)
    columns = min(10, len(images))
    missing = torch.ones(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, missing]).unflatten(0, (-1, columns))
    draw_grid(rows, [str(row * columns) for row in range(len(rows))], [""] * columns).save(folder / "grid.png")


def write_npz(samples: SampleSet, folder: Path, pipeline) -> None:
    """All shards as one file, without holding them all."""
    import numpy as np

    shape = samples.load(samples.shards[0]).images.shape[1:]
    unfinished = folder / "shards" / "samples.npz"
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, field, dtype, rest in (("arr_0", "images", "|u1", shape), ("arr_1", "class_labels", "<i8", ())):
            with archive.open(f"{member}.npy", "w", force_zip64=True) as file:
                header = {"descr": dtype, "fortran_order": False, "shape": (samples.num_samples, *rest)}
                np.lib.format.write_array_header_1_0(file, header)
                for shard in samples.shards:
                    file.write(getattr(samples.load(shard), field).astype(dtype).tobytes())
    unfinished.replace(folder / "samples.npz")


if __name__ == "__main__":
    try:
        sample(parse_args())
    except UserError as error:
        sys.exit(f"sample.py: error: {error}")
