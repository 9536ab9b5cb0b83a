"""Lay images out as one picture, such as the grid of samples that a run draws: classes down, guidance scales across."""

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from diffusers_cfg import CFGPipeline
from diffusers_cfg.randomness import seeded_generator

MAX_ROWS = 10
GAP, TOP, FONT_SIZE = 4, 26, 14  # in pixels


def sample_grid(
    pipeline: CFGPipeline, accelerator: Accelerator, guidance_scales: list[float], num_inference_steps: int, seed: int
) -> Image.Image:
    """
    Draw a row of images for each of the first ten classes, with a column for each w. The processes share the work. All
    images of a row start from the same noise, so the row shows the effect of w.

    Args:
        pipeline (`CFGPipeline`): drawn with, on the device of the accelerator.
        guidance_scales (`list[float]`): the paper's w.
        num_inference_steps (`int`): T.
        seed (`int`): determines the noise of each row, together with the class.
    """
    classes = list(range(min(pipeline.unet.num_classes, MAX_ROWS)))
    jobs = [(class_id, w) for class_id in classes for w in guidance_scales]
    with accelerator.split_between_processes(jobs, apply_padding=True) as mine:
        images = pipeline(
            class_labels=[class_id for class_id, _ in mine],
            guidance_scale=[w for _, w in mine],
            num_inference_steps=num_inference_steps,
            generator=[seeded_generator("cpu", seed, "grid", class_id) for class_id, _ in mine],
            output_type="pt",
        ).images
    images = accelerator.gather(images.to(accelerator.device).contiguous())[: len(jobs)].cpu()
    return draw_grid(
        images.unflatten(0, (len(classes), len(guidance_scales))),
        rows=[pipeline.id2label.get(class_id, str(class_id)) for class_id in classes],
        columns=[f"w = {w:g}" for w in guidance_scales],
    )


def draw_grid(images: torch.Tensor, rows: list[str], columns: list[str], min_size: int = 64) -> Image.Image:
    """
    Lay images out as one picture with captions.

    Args:
        images (`torch.Tensor` of shape `(rows, columns, channels, height, width)`): in [0, 1], 1 or 3 channels.
        rows, columns (`list[str]`): the captions.
        min_size (`int`): smaller images are enlarged by a whole factor to at least this many pixels.
    """
    scale = max(1, -(-min_size // images.shape[-1]))
    pixels = (images * 255).round().to(torch.uint8).movedim(2, -1)
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(*pixels.shape[:-1], 3)
    height, width = (side * scale for side in images.shape[-2:])
    font = ImageFont.load_default(FONT_SIZE)
    left = 12 + max(int(font.getlength(name)) for name in rows)
    canvas = Image.new("RGB", (left + len(columns) * (width + GAP), TOP + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * (width + GAP) + width / 2, TOP / 2), name, "black", font, anchor="mm")
    for row, name in enumerate(rows):
        draw.text((left - 6, TOP + row * (height + GAP) + height / 2), name, "black", font, anchor="rm")
        for column in range(len(columns)):
            tile = Image.fromarray(pixels[row, column].contiguous().numpy()).resize((width, height), Image.NEAREST)
            canvas.paste(tile, (left + column * (width + GAP), TOP + row * (height + GAP)))
    return canvas
