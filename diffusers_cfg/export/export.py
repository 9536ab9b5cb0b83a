"""Export a model to ONNX, or to a static page that samples in the browser."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError, say
from diffusers_cfg.evaluation.sampling import check_call, choose_scheduler, load_model, only_sampler
from diffusers_cfg.export import graph, page
from diffusers_cfg.export.schedule import make_schedule
from diffusers_cfg.export.settings import ExportConfig
from diffusers_cfg.files import atomic_write, check_writable


def export_model(config: ExportConfig) -> list[Path]:
    """
    Export the model of the settings, after a comparison with the pipeline.

    Returns:
        `list[Path]`: the files that were written.

    Raises:
        UserError: if the model cannot be loaded or exported, or the graph differs from the pipeline.
    """
    check_writable(Path(config.output_dir), "--output_dir")
    runtime = page.runtime_files(config.onnxruntime_web) if config.format == "html" else {}
    pipeline = load_model(config)
    if config.format == "html" and pipeline.vae is not None:
        raise UserError(
            "A model of latents cannot be exported as a page, which would need the decoder too. Pass --format onnx for "
            "the prediction of the latents."
        )
    graph.check_exportable(pipeline, page.MAX_BYTES if config.format == "html" else graph.MAX_BYTES)
    if config.scheduler is not None:
        pipeline.scheduler = choose_scheduler(config.scheduler, pipeline)
    sampler = describe_sampler(config, pipeline)

    begin = time.perf_counter()
    model = graph.export_graph(pipeline, config.batch_size)
    difference = graph.check_graph(model, pipeline, config.batch_size, config.seed)
    say(
        f"The graph was made in {time.perf_counter() - begin:.1f} s, and differs from the pipeline by at most "
        f"{difference:.1g} of the largest prediction."
    )
    if config.format == "html":
        text = page.make_page({**sampler, "model": page.embed(model), "runtime": runtime, "seed": config.seed})
        contents = [text.encode()]
    else:
        contents = [model, (json.dumps(sampler, indent=1, ensure_ascii=False) + "\n").encode()]
    with ExitStack() as stack:
        for path, content in zip(config.outputs, contents, strict=True):
            stack.enter_context(atomic_write(path)).write_bytes(content)
    return config.outputs


def describe_sampler(config: ExportConfig, pipeline: CFGPipeline) -> dict[str, Any]:
    """Return, for JSON, what a program needs to sample with the graph, which is all but the noise."""
    low, high = graph.guidance_range(pipeline)
    steps = sampling_steps(config, pipeline)
    for num_inference_steps in steps:
        check_call(pipeline, guidance_scale=min(1.0, high), num_inference_steps=num_inference_steps)
    return {
        "name": config.model_name,
        "shape": list(pipeline.sample_shape),
        "batch_size": config.batch_size,
        "classes": [pipeline.id2label.get(label, str(label)) for label in range(pipeline.num_classes)],
        "guidance": {"min": low, "max": high, "start": min(1.0, high)},
        "prediction_type": pipeline.scheduler.config["prediction_type"],
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": steps[0],
        "schedules": {str(number): make_schedule(pipeline.scheduler, number).to_json() for number in sorted(steps)},
    }


def sampling_steps(config: ExportConfig, pipeline: CFGPipeline) -> list[int]:
    """Return the numbers of steps to offer, the one to start with first."""
    if config.num_inference_steps is not None:
        return config.num_inference_steps
    own = pipeline.num_inference_steps
    return (
        [own] if only_sampler(pipeline) is not None else list(dict.fromkeys([own, max(1, own // 2), 2 * own, 4 * own]))
    )
