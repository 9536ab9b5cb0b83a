"""Arrange images in a grid, such as the samples of a training run: a row for each class, a column for each w."""

from importlib.metadata import distribution
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from diffusers_cfg import CFGPipeline
from diffusers_cfg.evaluation.settings import GUIDANCE, format_number
from diffusers_cfg.randomness import seeded_generator

MAX_CLASSES = 20
GAP, TOP, FONT_SIZE = 4, 26, 14  # in pixels


def sample_grid(
    pipeline: CFGPipeline,
    accelerator: Accelerator,
    classes: list[int],
    guidance_scales: list[float],
    num_inference_steps: int,
    seed: int,
    guidance: str = "classifier_free",
) -> Image.Image:
    """
    Generate a grid of samples with a row for each class and a column for each w. Images of a row start from the same
    noise, so that the row shows the effect of w, except those with the same w. Of more than `MAX_CLASSES` classes the
    grid shows the first, and says how many it leaves out.

    Args:
        pipeline (`CFGPipeline`): the pipeline, on the accelerator's device.
        accelerator (`Accelerator`): the processes that share the work.
        classes (`list[int]`): the ids of the classes to sample.
        guidance_scales (`list[float]`): the paper's w, one for each column. Values may repeat.
        num_inference_steps (`int`): T.
        seed (`int`): the seed of the noise; each row also depends on its class.
        guidance (`str`): the rule of guidance, one of `GUIDANCE`.
    """
    classes, note = classes[:MAX_CLASSES], left_out_note(min(len(classes), MAX_CLASSES), len(classes))
    # The noise of repeated scales also depends on the number of the repetition.
    numbers = [guidance_scales[:column].count(w) for column, w in enumerate(guidance_scales)]
    jobs = [
        (class_id, w, (class_id, number) if number else (class_id,))
        for class_id in classes
        for w, number in zip(guidance_scales, numbers, strict=True)
    ]
    with accelerator.split_between_processes(jobs, apply_padding=True) as process_jobs:
        assert isinstance(process_jobs, list)
        scales = [GUIDANCE[guidance](w) for _, w, _ in process_jobs]
        by_image: dict[str, Any] = {name: [row[name] for row in scales] for name in scales[0]}
        images = pipeline(
            class_labels=[class_id for class_id, _, _ in process_jobs],
            **by_image,
            num_inference_steps=num_inference_steps,
            generator=[seeded_generator("cpu", seed, "grid", *key) for _, _, key in process_jobs],
            output_type="pt",
        ).images
    images = accelerator.gather(images.to(accelerator.device).contiguous())[: len(jobs)].cpu()
    return make_grid(
        images.unflatten(0, (len(classes), len(guidance_scales))),
        rows=[pipeline.id2label.get(class_id, str(class_id)) for class_id in classes],
        columns=[f"w = {format_number(w)}" for w in guidance_scales],
        note=note,
    )


def left_out_note(shown: int, total: int) -> str | None:
    """Return how many classes a picture leaves out; `None` if it shows all."""
    return f"{total - shown} of {total} classes are not shown" if shown < total else None


def make_grid(
    images: torch.Tensor, rows: list[str], columns: list[str], min_size: int = 64, note: str | None = None
) -> Image.Image:
    """
    Arrange images in a grid with captions.

    Args:
        images (`torch.Tensor` of shape `(rows, columns, channels, height, width)`): values in [0, 1], 1 or 3 channels.
        rows, columns (`list[str]`): the captions of the rows and columns.
        min_size (`int`): smaller images are enlarged by an integer factor to at least this size, in pixels.
        note (`str`, *optional*): a line below the images.
    """
    scale = max(1, -(-min_size // images.shape[-1]))
    pixels = (images * 255).round().to(torch.uint8).movedim(2, -1)
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(*pixels.shape[:-1], 3)
    height, width = (side * scale for side in images.shape[-2:])
    # Pillow's own font lacks letters such as ä, α and ж. Importing matplotlib would make a folder in the user's home.
    font_file = distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")
    font = ImageFont.truetype(str(font_file), FONT_SIZE)
    left = 12 + max(int(font.getlength(name)) for name in rows)
    total, bottom = left + len(columns) * (width + GAP), TOP + len(rows) * (height + GAP)
    if note is not None:
        total = max(total, 12 + int(font.getlength(note)))
    canvas = Image.new("RGB", (total, bottom + (TOP if note is not None else 0)), "white")
    draw = ImageDraw.Draw(canvas)
    if note is not None:
        draw.text((6, bottom + TOP / 2), note, "black", font, anchor="lm")
    for column, name in enumerate(columns):
        draw.text((left + column * (width + GAP) + width / 2, TOP / 2), name, "black", font, anchor="mm")
    for row, name in enumerate(rows):
        draw.text((left - 6, TOP + row * (height + GAP) + height / 2), name, "black", font, anchor="rm")
        for column in range(len(columns)):
            tile = Image.fromarray(pixels[row, column].contiguous().numpy()).resize((width, height), Image.NEAREST)
            canvas.paste(tile, (left + column * (width + GAP), TOP + row * (height + GAP)))
    return canvas
