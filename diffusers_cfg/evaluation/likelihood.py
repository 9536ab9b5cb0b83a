"""Estimate the variational bound on the negative log-likelihood of images under a model (Kingma et al. 2021,
arXiv 2107.00630, sections 3 and 4). The seed and an image's index determine the image's random numbers.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

import torch

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.config import UserError
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.noise_schedule import Schedule, linear
from diffusers_cfg.randomness import seeded_generator
from diffusers_cfg.variational_bound import (
    continuous_weight,
    diffuse,
    discrete_times,
    discrete_weight,
    noise_error,
    prior_term,
    reconstruction_term,
)

# By how much the ends of a schedule may differ from those of a process, in units of γ: rounding to float32.
END_TOLERANCE = 1e-4
# The names of the terms in reports.
PARTS = ("prior", "reconstruction", "diffusion")


class ImageTerms(NamedTuple):
    """
    The terms of the bound of each image in nats, float64 on the CPU: -log p(x|c) ≤ prior + reconstruction +
    diffusion[:, 0] with the image's class c, and -log p(x) with the null class in `diffusion[:, 1]`.
    """

    prior: torch.Tensor  # (images,)
    reconstruction: torch.Tensor  # (images,)
    diffusion: torch.Tensor  # (images, 2); NaN for an unlabelled image, or without the null class
    gamma: torch.Tensor  # (images, times): the noise levels at which the network was evaluated
    error: torch.Tensor  # (images, times, 2): ‖ε - ε̂‖²

    @classmethod
    def concatenate(cls, parts: Iterable[Self]) -> Self:
        """Return the terms of several groups of images as one."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def given_class(self) -> torch.Tensor:
        """The bound on -log p(x|c), `(images,)`; NaN for unlabelled images."""
        return self.prior + self.reconstruction + self.diffusion[:, 0]

    @property
    def network_evaluations(self) -> int:
        """The number of network evaluations."""
        return int((~self.error.isnan()).sum())


def has_null_class(pipeline: CFGPipeline) -> bool:
    """Return whether the null class of a model was trained, as far as is known."""
    return pipeline.config.conditioning_dropout_prob != 0


def check_model(pipeline: CFGPipeline) -> None:
    """Raise `UserError` for a model without a likelihood of images, or whose precision would change it."""
    if pipeline.vae is not None:
        raise UserError(
            "The model has an autoencoder. The bound needs a network of images: the likelihood of latents is not one "
            "of 8-bit images."
        )
    if pipeline.unet.dtype != torch.float32:
        raise UserError(
            f"The network is in {pipeline.unet.dtype}, which rounds z by more than its noise at the clean end. Load it "
            "in float32."
        )


def check_ends(process: LogSNRScheduler, schedule: Schedule) -> None:
    """Raise `UserError` unless the ends of a schedule lie inside a noise process and in this order."""
    first, last = (-end for end in schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).gamma.tolist())
    low, high = process.config.log_snr_min, process.config.log_snr_max
    if not low - END_TOLERANCE <= last < first <= high + END_TOLERANCE:
        raise UserError(
            f"The bound goes from log-SNR {first:g} to {last:g}, but must go down, and the model knows only "
            f"{high:g} … {low:g}. Choose --log_snr_max and --log_snr_min in this range."
        )


@torch.no_grad()
def estimate(
    pipeline: CFGPipeline,
    images: torch.Tensor,
    class_labels: torch.Tensor,
    *,
    seed: int = 0,
    first_index: int = 0,
    times_per_image: int = 64,
    diffusion_steps: int = 0,
    schedule: Schedule | None = None,
    batch_size: int = 250,
    null_class: bool = True,
    progress: Callable[[int], object] | None = None,
) -> ImageTerms:
    """
    Estimate the bound of images. The terms of an image depend on its index and the seed, not on the other images, and
    use the same noise for the class and the null class, and for every number of steps.

    Args:
        pipeline (`CFGPipeline`): the model, in eval mode. Guidance plays no part; a one-pass network is evaluated at
            w = 0.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): uint8, or float32 with 256 levels in
            [-1, 1].
        class_labels (`torch.Tensor` of shape `(images,)`): the class ids, -1 for unlabelled images.
        seed (`int`), first_index (`int`): the seed, and the index of the first image.
        times_per_image (`int`): K, the number of times tᵢ = (i + u)/K at which the network is evaluated.
        diffusion_steps (`int`): T of the bound; 0 is continuous time.
        schedule (`Schedule`, *optional*): γ(t) on the CPU, from which the ends of the bound are taken. By default
            linear over the whole noise process.
        batch_size (`int`): number of noisy images that the network evaluates at a time.
        null_class (`bool`): whether to evaluate the null class as well.
        progress (`Callable`, *optional*): called with the number of network evaluations after each batch.

    Returns:
        `ImageTerms`: the terms of each image.

    Raises:
        UserError: if the model has an autoencoder, is not in float32 or does not predict finite values, or the ends lie
            outside its noise process.
        ValueError: if a class is unknown.
    """
    process = noise_process(pipeline)
    schedule = schedule or linear(-process.config.log_snr_max, -process.config.log_snr_min)
    check_model(pipeline)
    check_ends(process, schedule)
    pipeline.unet.check_class_labels(class_labels, len(images))
    labels = [class_labels, torch.full_like(class_labels, pipeline.unet.null_class_label if null_class else -1)]
    images = to_float(images) if images.dtype == torch.uint8 else images
    parts = []
    for rows in torch.arange(len(images)).split(max(1, batch_size // times_per_image)):
        generators = [seeded_generator("cpu", seed, "likelihood", first_index + row) for row in rows.tolist()]
        u = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
        times = (torch.arange(times_per_image) + u[:, None]) / times_per_image
        x, shape = images[rows].to(pipeline.device), images.shape[1:]
        first_noise, noise = (
            torch.stack([torch.randn(*counts, *shape, generator=generator) for generator in generators]).to(x.device)
            for counts in ((), (times_per_image,))
        )
        gamma, weight, ends = noise_levels(schedule, times, diffusion_steps)
        gamma_0, gamma_1 = ends.float().to(x.device)
        error = torch.stack(
            [
                errors(pipeline, process, x, noise, gamma, kind[rows], batch_size, progress or (lambda _: None))
                for kind in labels
            ],
            dim=-1,
        )
        # One image at a time: the reconstruction needs 256 numbers for each element.
        reconstruction = [
            reconstruction_term(one[None], epsilon[None], gamma_0) for one, epsilon in zip(x, first_noise, strict=True)
        ]
        diffusion = (weight[..., None] * error).mean(1)
        prior = prior_term(x, gamma_1).double().cpu()
        parts.append(ImageTerms(prior, torch.cat(reconstruction).double().cpu(), diffusion, gamma, error))
    return ImageTerms.concatenate(parts)


def noise_levels(
    schedule: Schedule, times: torch.Tensor, diffusion_steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return γ and the factor of ‖ε - ε̂‖² in the diffusion term, in the shape of the times, and the two ends of γ. With T
    steps, t is rounded up to a multiple of 1/T.
    """
    ends = schedule(torch.tensor([0.0, 1.0], dtype=times.dtype)).gamma
    if diffusion_steps == 0:
        values = schedule(times)
        return values.gamma, continuous_weight(values.gamma_slope), ends
    gamma_s, gamma_t = (schedule(time).gamma for time in discrete_times(times, diffusion_steps))
    return gamma_t, discrete_weight(gamma_s, gamma_t, diffusion_steps), ends


def errors(
    pipeline: CFGPipeline,
    process: LogSNRScheduler,
    x: torch.Tensor,
    noise: torch.Tensor,
    gamma: torch.Tensor,
    class_labels: torch.Tensor,
    batch_size: int,
    progress: Callable[[int], object],
) -> torch.Tensor:
    """
    Return ‖ε - ε̂‖² of some images at several noise levels, `(images, times)`, float64 on the CPU.

    Args:
        pipeline (`CFGPipeline`), process (`LogSNRScheduler`): the model and its noise process.
        x (`torch.Tensor` of shape `(images, …)`): images, on the device of the model.
        noise (`torch.Tensor` of shape `(images, times, …)`): ε, on the same device.
        gamma (`torch.Tensor` of shape `(images, times)`): γ, float64 on the CPU.
        class_labels (`torch.Tensor` of shape `(images,)`): the classes; -1, an unlabelled image, has NaN as result.
        batch_size (`int`), progress (`Callable`): as in `estimate`.
    """
    u = process.u_at(-gamma).clamp(0, 1).float()
    result = torch.full(gamma.shape, torch.nan, dtype=torch.float64)
    image, time = (class_labels >= 0)[:, None].expand(gamma.shape).nonzero(as_tuple=True)
    for first in range(0, len(image), batch_size):
        i, k = image[first : first + batch_size], time[first : first + batch_size]
        level, epsilon = gamma[i, k].float().to(x.device), noise[i, k]
        z = diffuse(x[i], epsilon, level)
        labels, timesteps = class_labels[i].to(x.device), process.timestep(u[i, k]).to(x.device)
        pred = pipeline.unet(z, timesteps, class_labels=labels).sample
        error = noise_error(process.config.prediction_type, pred, x[i], epsilon, level).double().cpu()
        if not error.isfinite().all():
            first_bad = -level[(~error.isfinite()).nonzero()[0, 0]].item()
            raise UserError(
                f"The network's prediction at log-SNR {first_bad:.4g} is not finite: its weights are damaged, or its "
                "training diverged. Evaluate another --model or --variant."
            )
        result[i, k] = error
        progress(len(i))
    return result
