"""Compare the samples of two copies of a model."""

import torch

from diffusers_cfg.hub import rounding_tolerance
from diffusers_cfg.pipeline_cfg import CFGPipeline


def assert_same_draws(
    actual: torch.Tensor, expected: torch.Tensor, pipeline: CFGPipeline, guidance_scale: float, num_inference_steps: int
) -> None:
    """
    Assert that two tensors of images are equal up to `rounding_tolerance`, as samples of two copies of a model are.

    Separately loaded copies have different memory addresses, and on some CPUs their sums are rounded differently. Only
    two runs of the same object are equal bit by bit.
    """
    tolerance = rounding_tolerance(pipeline, guidance_scale, num_inference_steps)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
