"""Define a mixture of Gaussians with closed-form ε(z, c) and ε(z), and compute the exact results of guiding it."""

import math
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from scipy.integrate import solve_ivp

from diffusers_cfg import CFGPipeline, LogSNRScheduler
from diffusers_cfg.evaluation.sampling import make_scheduler


class GaussianMixtureModel(torch.nn.Module):
    r"""
    The optimal network for p(x) = Σₖ πₖ N(μₖ, sₖ² I), where component k belongs to class cₖ.

    At z = αx + σε a component is N(αμₖ, vₖ I) with vₖ = α²sₖ² + σ², so that

        ε(z, c) = -σ ∇ log p(z | c) = σ Σₖ rₖ (z - αμₖ) / vₖ,   rₖ = p(k | z, c),

    and ε(z) is the same sum over the components of all classes. The model replaces a `UNet2DCFGModel` in
    `CFGPipeline(model, scheduler)`.

    Args:
        scheduler (`LogSNRScheduler`): maps timesteps to α and σ, and sets the `prediction_type`.
        means (`torch.Tensor` of shape `(components, channels, height, width)`): μ.
        stds (`torch.Tensor` of shape `(components,)`): s, positive.
        component_classes (`torch.Tensor` of shape `(components,)`): the class of each component, `0 … num_classes - 1`.
        probs (`torch.Tensor` of shape `(components,)`, *optional*): π, equal by default.
    """

    max_guidance_scale = None  # w is not an input
    noise_process = None  # that of the scheduler
    latent_dim = None  # not a generator
    means: torch.Tensor  # (components, channels · height · width)
    stds: torch.Tensor  # (components,)
    log_probs: torch.Tensor  # (components,)
    allowed: torch.Tensor  # (num_classes + 1, components), bool

    def __init__(
        self,
        scheduler: LogSNRScheduler,
        means: torch.Tensor,
        stds: torch.Tensor,
        component_classes: torch.Tensor,
        probs: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.num_classes = self.null_class_label = int(component_classes.max()) + 1
        channels, size = means.shape[1], tuple(means.shape[2:])
        # One level, which takes any size
        self.config = SimpleNamespace(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(channels,),
            sample_size=size,
            num_class_embeds=self.num_classes + 1,
        )
        probs = torch.ones(len(means)) if probs is None else probs
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("stds", stds)
        self.register_buffer("log_probs", (probs / probs.sum()).log())
        # Row c: the components of class c. The last row, of the null class, has all components.
        classes = torch.arange(self.num_classes)[:, None]
        allowed = torch.cat([component_classes == classes, torch.ones(1, len(means), dtype=torch.bool)])
        self.register_buffer("allowed", allowed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters of the mixture."""
        return self.means.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters of the mixture."""
        return self.means.device

    def check_class_labels(
        self, class_labels: torch.Tensor, batch_size: int, name: str = "class_labels", num_classes: int | None = None
    ) -> None:
        """Raise `ValueError` if a label is out of range, like `UNet2DCFGModel.check_class_labels`."""
        invalid = [label for label in class_labels.tolist() if not -1 <= label <= self.null_class_label]
        if invalid:
            raise ValueError(
                f"{name} {invalid} are out of range. Pass 0 … {self.num_classes - 1}, or -1 for the null class."
            )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> UNet2DOutput:
        """Return ε, v or x at z, depending on the scheduler's `prediction_type`. See `UNet2DCFGModel.forward`."""
        alpha, sigma = self.scheduler.alpha_sigma(self.scheduler.u(timestep.double()))
        alpha, sigma = (value.to(sample).view(-1, *(1,) * (sample.ndim - 1)) for value in (alpha, sigma))
        eps, x = self.expected_noise_and_sample(sample, alpha, sigma, class_labels)
        outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x}
        return UNet2DOutput(sample=outputs[self.scheduler.config.prediction_type])

    def eps(
        self,
        z: torch.Tensor,
        alpha: torch.Tensor | float,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ε(z, c), or ε(z) without labels, with the shape of z. See `expected_noise_and_sample`."""
        return self.expected_noise_and_sample(z, alpha, sigma, class_labels)[0]

    def expected_noise_and_sample(
        self,
        z: torch.Tensor,
        alpha: torch.Tensor | float,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E[ε | z, c] and E[x | z, c], shaped as z, `(batch, …)`. α and σ have shape `()` or `(batch,)`."""
        log_joint, deltas, variances = self._components(z, alpha, sigma, class_labels)
        responsibilities = log_joint.softmax(1)
        shrunk = responsibilities / variances
        eps = self._column(sigma) * torch.einsum("bk,bkd->bd", shrunk, deltas)
        x = responsibilities @ self.means + self._column(alpha) * torch.einsum(
            "bk,bkd->bd", shrunk * self.stds**2, deltas
        )
        return eps.view_as(z), x.view_as(z)

    def log_prob(
        self,
        z: torch.Tensor,
        alpha: torch.Tensor | float = 1.0,
        sigma: torch.Tensor | float = 0.0,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return log p(z | c), or log p(z) for the null class, `(batch,)`. By default z is the data."""
        log_joint, _, _ = self._components(z, alpha, sigma, class_labels)
        return log_joint.logsumexp(1)

    def sample(self, class_labels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Sample x ~ p(x | c), `(batch, channels, height, width)`, for labels `(batch,)`. -1 is the null class."""
        k = torch.multinomial(self._log_probs(class_labels).exp(), 1, generator=generator).squeeze(1)
        noise = torch.randn(self.means[k].shape, generator=generator, dtype=self.dtype)
        x = self.means[k] + self.stds[k, None] * noise
        return x.view(-1, self.config.in_channels, *self.config.sample_size)

    def _components(
        self,
        z: torch.Tensor,
        alpha: torch.Tensor | float,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log p(z, k | c), z - αμₖ and vₖ for each z (rows) and component k (columns)."""
        if class_labels is None:
            class_labels = torch.full((len(z),), self.null_class_label, device=z.device)
        alpha, sigma = self._column(alpha), self._column(sigma)
        deltas = z.flatten(1)[:, None] - alpha[..., None] * self.means
        variances = (alpha * self.stds) ** 2 + sigma**2
        log_gaussians = -(deltas.square().sum(2) / variances + deltas.shape[2] * (2 * math.pi * variances).log()) / 2
        return self._log_probs(class_labels) + log_gaussians, deltas, variances

    def _log_probs(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Return log p(k | c), `(batch, components)`."""
        return self.log_probs.masked_fill(~self.allowed[class_labels], -math.inf).log_softmax(1)

    def _column(self, value: torch.Tensor | float) -> torch.Tensor:
        return torch.as_tensor(value, dtype=self.dtype, device=self.device).reshape(-1, 1)


def three_gaussians(scheduler: LogSNRScheduler) -> GaussianMixtureModel:
    """Return a mixture of three classes of 1×2 images, one Gaussian each, as in figure 2 of Ho & Salimans 2022."""
    angles = torch.tensor([90.0, 210.0, 330.0]).deg2rad()
    means = 0.35 * torch.stack([angles.cos(), angles.sin()], 1).view(3, 1, 1, 2)
    return GaussianMixtureModel(scheduler, means, torch.full((3,), 0.15), torch.arange(3))


def guided_eps(
    model: GaussianMixtureModel,
    z: torch.Tensor,
    alpha: torch.Tensor | float,
    sigma: torch.Tensor | float,
    class_labels: torch.Tensor,
    w: float,
) -> torch.Tensor:
    """Return ε̃, extrapolated from ε(z) through ε(z, c) by 1 + w. Does not use the pipeline, which it verifies."""
    return torch.lerp(model.eps(z, alpha, sigma), model.eps(z, alpha, sigma, class_labels), 1 + w)


def guided_flow(
    model: GaussianMixtureModel, noise: torch.Tensor, class_labels: torch.Tensor, w: float, sigma_max: float
) -> torch.Tensor:
    """
    Integrate the probability flow of the guided field from each z ~ N(0, I) at the noise level σ/α = `sigma_max`.

    In y = z/α and σ' = σ/α the flow is dy/dσ' = ε̃ (Song et al. 2021, arXiv 2010.02502, equation 14). Deterministic
    samplers approximate this flow. For w ≠ 0 neither the flow nor any other sampler draws from p(x|c)^(1+w) p(x)^(-w)
    (Bradley & Nakkiran 2024, arXiv 2408.09000).

    Args:
        model (`GaussianMixtureModel`): the mixture, in float64.
        noise (`torch.Tensor` of shape `(batch, channels, height, width)`): z at the start.
        class_labels (`torch.Tensor` of shape `(batch,)`): the class of each image.
        w (`float`): the guidance scale.
        sigma_max (`float`): σ/α at the start. At the end it is 1e-6.

    Returns:
        `torch.Tensor`: x with the shape of `noise`, float64, accurate to about 1e-8.
    """

    def derivative(log_sigma: float, y: np.ndarray) -> np.ndarray:  # dy / d log σ' = σ' ε̃
        ratio = math.exp(log_sigma)
        alpha = 1 / math.sqrt(1 + ratio**2)
        z = alpha * torch.from_numpy(y).view(noise.shape)
        return (ratio * guided_eps(model, z, alpha, alpha * ratio, class_labels, w)).flatten().numpy()

    start = (noise.double() * math.sqrt(1 + sigma_max**2)).flatten().numpy()
    span = (math.log(sigma_max), math.log(1e-6))
    solution = solve_ivp(derivative, span, start, method="DOP853", rtol=1e-10, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).view(noise.shape)


def guided_diffusion(
    model: GaussianMixtureModel, class_labels: torch.Tensor, w: float, steps: int, generator: torch.Generator
) -> torch.Tensor:
    """
    Sample the reverse diffusion of the guided field, which stochastic samplers approximate, by Euler-Maruyama steps.

    The steps are in y = z/α over σ' = σ/α, uniform in log σ', in float64. Returns `(batch, channels, height, width)`.
    """
    sigmas = torch.logspace(math.log10(22026), -3, steps + 1, dtype=torch.float64).tolist()
    shape = (len(class_labels), model.config.in_channels, *model.config.sample_size)
    y = sigmas[0] * torch.randn(shape, dtype=torch.float64, generator=generator)
    for sigma, next_sigma in pairwise(sigmas):
        alpha = 1 / math.sqrt(1 + sigma**2)
        score = -guided_eps(model, alpha * y, alpha, alpha * sigma, class_labels, w) / sigma
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        y = y + (sigma**2 - next_sigma**2) * score + math.sqrt(sigma**2 - next_sigma**2) * noise
    return y


def deterministic_limit(
    model: GaussianMixtureModel, noise: torch.Tensor, class_labels: torch.Tensor, w: float, steps: int
) -> torch.Tensor:
    """Run the paper's sampler on its own λ, but without noise: z' = α'x̃ + σ'ε̃, in float64. Return x."""
    alpha, sigma = model.scheduler.alpha_sigma(torch.linspace(1, 0, steps, dtype=torch.float64))
    z = noise.double()
    for i in range(steps):
        eps = guided_eps(model, z, alpha[i], sigma[i], class_labels, w)
        x = (z - sigma[i] * eps) / alpha[i]
        z = x if i == steps - 1 else alpha[i + 1] * x + sigma[i + 1] * eps
    return z


def rms_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the root mean square of the distances between the rows of two batches."""
    return (a.double() - b.double()).flatten(1).square().sum(1).mean().sqrt().item()


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 16) -> float:
    """Return the sliced Wasserstein-1 distance of two equally large sets of points in the plane."""
    angles = torch.arange(directions, dtype=torch.float64) * math.pi / directions
    axes = torch.stack([angles.cos(), angles.sin()])
    projected = [(points.double().flatten(1) @ axes).sort(dim=0).values for points in (a, b)]
    return (projected[0] - projected[1]).abs().mean().item()


class GaussianMixtureClassifier(torch.nn.Module):
    """
    The exact classifier of a mixture, p(c | z) = p(z | c) p(c) / p(z). It replaces a `NoisyClassifier2DModel` in
    `CFGPipeline(model, scheduler, classifier=classifier)`.

    Args:
        model (`GaussianMixtureModel`): the mixture. In float64, its gradients are exact up to the rounding of float32.
    """

    dtype = torch.float32  # of its input

    def __init__(self, model: GaussianMixtureModel) -> None:
        super().__init__()
        self.model, self.num_classes, config = model, model.num_classes, model.scheduler.config
        names = ("num_train_timesteps", "log_snr_min", "log_snr_max", "log_snr_schedule")
        self.noise_process = {name: config[name] for name in names}
        self.config = SimpleNamespace(
            in_channels=model.config.in_channels, sample_size=model.config.sample_size, id2label=None
        )

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return log p(c | z) at αz, `(batch, num_classes)`, float64. See `NoisyClassifier2DModel.forward`."""
        alpha, sigma = self.model.scheduler.alpha_sigma(self.model.scheduler.u(timestep.double()))
        z = sample.double() / alpha
        log_joint = [
            self.model.log_prob(z, alpha, sigma, torch.full((len(z),), c, device=z.device))
            for c in range(self.num_classes)
        ]
        return torch.stack(log_joint, 1) + self.log_class_probs - self.model.log_prob(z, alpha, sigma)[:, None]

    @property
    def device(self) -> torch.device:
        """The device of the mixture."""
        return self.model.device

    @property
    def log_class_probs(self) -> torch.Tensor:
        """log p(c), `(num_classes,)`."""
        return self.model.log_probs.masked_fill(~self.model.allowed[:-1], -math.inf).logsumexp(1)


class ToyProblem:
    """
    A test problem for samplers: the three Gaussians in a pipeline, with a fixed batch of starting points.

    Args:
        num_samples (`int`): the size of the batch, whose classes alternate.
        settings: settings of the `LogSNRScheduler`. By default x̃ is not clipped.

    Attributes:
        model (`GaussianMixtureModel`): the mixture in float64, for exact results.
        pipeline (`CFGPipeline`): the mixture in float32, with the scheduler chosen by `use_scheduler`.
    """

    def __init__(self, num_samples: int = 256, **settings: Any) -> None:
        self.scheduler = LogSNRScheduler(**{"clip_sample": False, **settings})
        self.model = three_gaussians(self.scheduler).double()
        model = three_gaussians(self.scheduler)
        self.pipeline = CFGPipeline(model, self.scheduler)  # pyright: ignore[reportArgumentType]  (in place of a U-Net)
        self.pipeline.set_progress_bar_config(disable=True)
        self.noise = torch.randn(num_samples, 1, 1, 2, generator=torch.Generator().manual_seed(0))
        self.class_labels = torch.arange(num_samples) % 3
        self.flow = cache(lambda w, sigma_max: guided_flow(self.model, self.noise, self.class_labels, w, sigma_max))

    def use_scheduler(self, name: str, **settings: Any) -> None:
        """Set the pipeline's scheduler, a class of diffusers or `LogSNRScheduler`, with the given settings."""
        self.pipeline.scheduler = make_scheduler(name, self.scheduler, **settings)

    def draw(self, w: float, num_inference_steps: int, **call: Any) -> torch.Tensor:
        """Sample x from the batch of starting points, `(num_samples, 1, 1, 2)`."""
        call = {"latents": self.noise, "generator": torch.Generator().manual_seed(1), "output_type": "latent", **call}
        images = self.pipeline(self.class_labels, w, num_inference_steps=num_inference_steps, **call).images
        assert isinstance(images, torch.Tensor)
        return images

    def error(self, w: float, num_inference_steps: int) -> float:
        """Return the RMS distance to the exact flow that starts at the scheduler's first noise level."""
        images = self.draw(w, num_inference_steps)
        return rms_distance(images, self.flow(w, math.exp(-self.pipeline.log_snr()[0].item() / 2)))
