"""The grid of samples that a run draws of itself: a row for each class, a column for each guidance scale."""

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from randomness import seeded_generator

from diffusers_cfg import CFGPipeline

MAX_ROWS = 10


def sample_grid(
    pipeline: CFGPipeline, accelerator: Accelerator, guidance_scales: list[float], num_inference_steps: int, seed: int
) -> Image.Image:
    """
    Draw one image for each class (the first ten) and each w, all processes sharing the work, and lay them out. A row
    starts from the same noise throughout, so that it shows what w does.
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
    Images `(rows, columns, channels, height, width)` in [0, 1] as one picture with captions. Small images are enlarged
    to `min_size` pixels by a whole factor, so that their pixels stay visible.
    """
    scale = max(1, -(-min_size // images.shape[-1]))
    pixels = (images * 255).round().to(torch.uint8).movedim(2, -1)
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(*pixels.shape[:-1], 3)
    height, width = (side * scale for side in images.shape[-2:])
    gap, font = 4, ImageFont.load_default(14)
    left = 12 + max(int(font.getlength(name)) for name in rows)
    top = 26
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        draw.text((left + column * (width + gap) + width / 2, top / 2), name, "black", font, anchor="mm")
    for row, name in enumerate(rows):
        draw.text((left - 6, top + row * (height + gap) + height / 2), name, "black", font, anchor="rm")
        for column in range(len(columns)):
            tile = Image.fromarray(pixels[row, column].contiguous().numpy()).resize((width, height), Image.NEAREST)
            canvas.paste(tile, (left + column * (width + gap), top + row * (height + gap)))
    return canvas
