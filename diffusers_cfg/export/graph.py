"""Export the guided prediction of a pipeline as one ONNX graph, and compare the graph with the pipeline."""

import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.config import UserError

# Of the largest value of the prediction
TOLERANCE = 1e-3
MAX_BYTES = 2**31 - 2**20  # A protocol buffer, such as an ONNX file, has less than 2 GiB.


class GuidedPrediction(torch.nn.Module):
    """The guided prediction of a pipeline, as a module that can be exported."""

    def __init__(self, pipeline: CFGPipeline) -> None:
        super().__init__()
        self.unet, self.guide_unet, self.pipeline = pipeline.unet, pipeline.guide_unet, pipeline

    def forward(self, z: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """
        Return the guided prediction, in the shape of z.

        Args:
            z (`torch.Tensor` of shape `(batch, channels, height, width)`): noisy samples.
            t (`torch.Tensor` of shape `()`): timestep, float32.
            class_labels (`torch.Tensor` of shape `(batch,)`): int64; `num_classes` is the null class.
            w (`torch.Tensor` of shape `(batch,)`): guidance scales.
        """
        w = w.view(-1, 1, 1, 1)
        null_labels = torch.full_like(class_labels, self.unet.null_class_label)
        guide_labels = null_labels if self.guide_unet is None else class_labels
        return self.pipeline.guide(*self.pipeline.predictions(z, t, class_labels, guide_labels, w), w)


def check_exportable(pipeline: CFGPipeline, max_bytes: int = MAX_BYTES) -> None:
    """Raise `UserError` for a pipeline whose guidance is not one graph of z, t, c and w, or that is too large."""
    if pipeline.unet.latent_dim is not None:
        raise UserError(
            "A denoising diffusion GAN cannot be exported: it draws a latent vector and noise in each step. Export a "
            "diffusion model."
        )
    if pipeline.unet.config.num_class_embeds is None:
        raise UserError(
            "A model with an unconditional network cannot be exported: its classifier guides by a gradient, which "
            "ONNX does not have. Export a model with classifier-free guidance."
        )
    if pipeline.guider is not None:
        raise UserError(
            f"A model with a {type(pipeline.guider).__name__} cannot be exported. Save it with pipe.guider = None, "
            "and it is exported with the pipeline's own guidance."
        )
    networks = [network for network in (pipeline.unet, pipeline.guide_unet) if network is not None]
    size = sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
    if size > max_bytes:
        raise UserError(
            f"The weights have {size / 2**20:,.0f} MiB, and at most {max_bytes / 2**20:,.0f} MiB can be exported in "
            "this format. Export a smaller model."
        )


def guidance_range(pipeline: CFGPipeline) -> tuple[float, float]:
    """Return the smallest and the largest w to offer: what a one-pass network was trained for, or -1 … 4."""
    largest = pipeline.unet.max_guidance_scale
    return (-1.0, 4.0) if largest is None else (0.0, largest)


def inputs_of(pipeline: CFGPipeline, batch_size: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return random inputs z, t, class_labels and w of the graph, with the null class and with the ends of w."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch_size, *pipeline.sample_shape, generator=generator)
    t = torch.rand((), generator=generator) * (pipeline.scheduler.config.num_train_timesteps - 1)
    class_labels = torch.arange(batch_size).flip(0) % (pipeline.num_classes + 1)
    return z, t, class_labels, torch.linspace(*guidance_range(pipeline), batch_size)


def export_graph(pipeline: CFGPipeline, batch_size: int) -> bytes:
    """
    Return the guided prediction as an ONNX model.

    Args:
        pipeline (`CFGPipeline`): the pipeline, on the CPU.
        batch_size (`int`): the number of images, which the graph fixes.

    Returns:
        `bytes`: the model, with the inputs of `GuidedPrediction.forward` and the output `prediction`.

    Raises:
        UserError: if the network has an operation that ONNX lacks.
    """
    module = GuidedPrediction(pipeline).eval()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the internals of torch's exporter
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                module,
                inputs_of(pipeline, batch_size, seed=0),
                input_names=["z", "t", "class_labels", "w"],
                output_names=["prediction"],
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            problem = str(error).strip().partition("\n")[0]
            raise UserError(f"PyTorch cannot export the network of this model to ONNX: {problem}") from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
        assert program is not None
        program.save(str(Path(folder, "model.onnx")))
        return Path(folder, "model.onnx").read_bytes()


def check_graph(graph: bytes, pipeline: CFGPipeline, batch_size: int, seed: int) -> float:
    """
    Compare a graph with the pipeline, at three random timesteps.

    Returns:
        `float`: the largest difference, relative to the largest prediction.

    Raises:
        UserError: if it exceeds `TOLERANCE`.
    """
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    module, differences = GuidedPrediction(pipeline).eval(), []
    for offset in range(3):
        inputs = inputs_of(pipeline, batch_size, seed + offset)
        names = [node.name for node in session.get_inputs()]
        (found,) = session.run(None, dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True)))
        with torch.no_grad():
            expected = module(*inputs).numpy()
        differences.append(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
    difference = float(max(differences))
    if not difference <= TOLERANCE:  # it may be NaN
        raise UserError(
            f"The graph differs from the pipeline by {difference:.2g} of the largest prediction, more than "
            f"{TOLERANCE}. Nothing was written. Use other versions of onnxscript and onnxruntime."
        )
    return difference
