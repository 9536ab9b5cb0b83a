"""Serve a web page with controls for the classes and the guidance, a gallery, and code for the images, with Gradio."""

import importlib.util
import os
import socket
from typing import Any

import torch
from PIL import Image

from .generation import AS_SAVED, MAX_IMAGES, MAX_SEED, Demo, Range, Request, code_of, generate

# Images are enlarged by the largest whole factor that keeps their sides at most this long, in pixels: a column's width.
GALLERY_SIZE = 160
# Local fonts. Pictures keep their size and their pixels, captions stand below them, and the gallery fits its pictures.
FONT, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
CSS = """
.gradio-container { max-width: 1200px !important; margin: auto; }
#images img { image-rendering: pixelated; }
#images .grid-wrap { max-height: none; min-height: 0; padding: 12px; overflow: visible; }
#images .grid-container { padding: 0; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); }
#images .thumbnail-lg { aspect-ratio: auto; height: auto; border: none; box-shadow: none; background: none; }
#images .thumbnail-lg img { width: auto; height: auto; max-width: 100%; margin: auto; }
#images .caption-label { position: static; max-width: 100%; padding: 4px 0; text-align: center; }
#images .caption-label { border: none; background: none; }
"""


def enlarged(image: Image.Image) -> Image.Image:
    """Enlarge an image by a whole factor, so that all its pixels are squares of one size."""
    factor = max(1, GALLERY_SIZE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def check_gradio() -> None:
    """Raise `ImportError` that says how to install Gradio, if it is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('The demo needs Gradio, which is not installed: pip install "diffusers-cfg[demo]"')


def check_port(port: int) -> None:
    """Raise `OSError` if a port of this machine cannot be used."""
    if not 0 < port < 2**16:
        raise OSError(f"Port {port} is not in 1 … 65535.")
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        problem = f"Port {port} cannot be used ({os.strerror(error.errno or 0)})."
        raise OSError(f"{problem} Stop the program that uses it, or choose another port.") from error


def describe(demo: Demo) -> str:
    """Return the heading of the page."""
    channels, height, width = demo.pipe.image_shape
    kind = "grayscale" if channels == 1 else "colour"
    text = f"# {demo.source.rstrip('/').split('/')[-1]}\n\n{height}×{width} {kind} images"
    if demo.guidance is not None:
        text += (
            ". *w* is the scale of [classifier-free guidance](https://arxiv.org/abs/2207.12598): 0 follows the class "
            "without guidance, larger values are closer to the class and less varied"
        )
        text += "." if demo.guidance.low == 0 else ", and −1 ignores the class."
    elif demo.pipe.guider is not None:
        text += f". The guidance is that of {type(demo.pipe.guider).__name__}."
    return text


def build_page(demo: Demo) -> Any:
    """Return the page of a demo, a `gradio.Blocks`. Raise `ImportError` if Gradio is missing."""
    check_gradio()
    import gradio as gr

    def slider(label: str, limits: Range | None, step: float, **settings: Any) -> gr.Slider:
        low, high, default = limits or Range(0, 1, 0)
        return gr.Slider(low, high, default, step=step, label=label, visible=limits is not None, **settings)

    classes, saved = demo.classes, type(demo.pipe.scheduler).__name__
    samplers = [(f"{AS_SAVED} ({saved})", AS_SAVED), *[(name, name) for name in demo.sampler_classes]]
    with gr.Blocks(title=f"{demo.source} · diffusers-cfg", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(describe(demo))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                class_ids = gr.Dropdown(
                    [(name, class_id) for class_id, name in classes.items()],
                    value=[next(iter(classes))],
                    multiselect=True,
                    label="Classes",
                    visible=len(classes) > 1,
                    elem_id="classes",
                )
                mix = gr.Checkbox(label="Mix the classes in each image", visible=len(classes) > 1, elem_id="mix")
                weights = gr.Textbox(
                    label="Weights of the mix", placeholder="equal, or for example: 0.7 0.3", visible=False
                )
                w = slider("w (s = 1 + w)", demo.guidance, 0.1, elem_id="w")
                scale = slider("s of the classifier", demo.classifier_guidance, 0.1, elem_id="classifier")
                steps = slider("Steps", demo.steps, 1, elem_id="steps")
                sampler = gr.Dropdown(
                    samplers, value=AS_SAVED, label="Sampler", visible=bool(demo.sampler_classes), elem_id="sampler"
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
                    per_class = "Images per class" if len(classes) > 1 else "Images"
                    num_images = gr.Number(4, label=per_class, precision=0, minimum=1, maximum=MAX_IMAGES)
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=4, min_width=320):
                # PNG keeps the pixels; the default format changes them.
                gallery = gr.Gallery(
                    show_label=False, columns=4, format="png", object_fit="scale-down", height="auto", elem_id="images"
                )
                code = gr.Code(label="The same images in Python", language="python", interactive=False, elem_id="code")

        # Gradio finds the progress bar by the default of a positional parameter.
        def run(progress: gr.Progress = gr.Progress(), *values: Any) -> tuple[list, str]:  # noqa: B008
            names = ("class_ids", "mix", "weights", "guidance_scale", "classifier_guidance_scale")
            names += ("num_inference_steps", "sampler", "seed", "num_images")
            request = Request(**dict(zip(names, values, strict=True)))
            try:
                images, captions = generate(demo, request, lambda step, steps: progress((step, steps), unit="steps"))
                return [*zip(map(enlarged, images), captions, strict=True)], code_of(demo, request)
            except (ValueError, FloatingPointError) as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from error
            except torch.OutOfMemoryError as error:
                raise gr.Error("Out of memory. Generate fewer images at once.", print_exception=False) from error

        mix.change(lambda mixed: gr.update(visible=mixed), mix, weights, show_progress="hidden")
        inputs = [class_ids, mix, weights, w, scale, steps, sampler, seed, num_images]
        button.click(run, inputs, [gallery, code], show_progress_on=gallery, api_name="generate")
    return page


def launch(demo: Demo, **settings: Any) -> Any:
    """
    Move the pipeline to the GPU, if there is one, and serve the page of a demo.

    Args:
        demo (`Demo`): the pipeline.
        **settings: Arguments of `gradio.Blocks.launch`, such as `server_port`.

    Returns:
        `gradio.Blocks`: The page. A script gets it after Ctrl-C, or with `prevent_thread_lock=True` at once.
    """
    page = build_page(demo)
    import gradio as gr

    if torch.accelerator.is_available():
        demo.pipe.to(torch.accelerator.current_accelerator())
    page.launch(theme=gr.themes.Default(font=FONT, font_mono=MONOSPACE), css=CSS, ssr_mode=False, **settings)
    return page
