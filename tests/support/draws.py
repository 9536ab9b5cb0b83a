"""Compare what two copies of a model draw."""

import torch

from diffusers_cfg.hub import rounding_tolerance
from diffusers_cfg.pipeline_cfg import CFGPipeline


def assert_same_draws(
    actual: torch.Tensor, expected: torch.Tensor, pipeline: CFGPipeline, guidance_scale: float, num_inference_steps: int
) -> None:
    """
    Assert that two tensors of images are draws of one model, up to `rounding_tolerance`.

    Separately loaded copies lie elsewhere in memory, and their sums are rounded differently on some CPUs. Bit equality
    is for two runs of one object.
    """
    tolerance = rounding_tolerance(pipeline, guidance_scale, num_inference_steps)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
