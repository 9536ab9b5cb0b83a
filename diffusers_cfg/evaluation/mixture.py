"""Data whose scores are known: a mixture of Gaussians with classes, behind the network's interface."""

import math
from types import SimpleNamespace

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_cfg import LogSNRScheduler


class GaussianMixtureModel(torch.nn.Module):
    r"""
    The network that training would converge to on p(x) = Σₖ πₖ N(μₖ, sₖ² I), where component k belongs to class cₖ.

    At z = αx + σε a component is N(αμₖ, vₖ I) with vₖ = α²sₖ² + σ², so that

        ε(z, c) = -σ ∇ log p(z | c) = σ Σₖ rₖ (z - αμₖ) / vₖ,   rₖ = p(k | z, c),

    and ε(z) is the same sum over the components of all classes. Computed in the dtype of z. It takes the place of a
    `UNet2DCFGModel`: `CFGPipeline(model, scheduler)`.

    Args:
        scheduler (`LogSNRScheduler`): says which λ a timestep is.
        means (`torch.Tensor` of shape `(components, channels, height, width)`): μ.
        stds (`torch.Tensor` of shape `(components,)`): s, positive.
        component_classes (`torch.Tensor` of shape `(components,)`): the class of each component, `0 … num_classes - 1`.
        probs (`torch.Tensor` of shape `(components,)`, *optional*): π, equal by default.
    """

    max_guidance_scale = None  # it takes no w, as networks that were not distilled

    def __init__(
        self,
        scheduler: LogSNRScheduler,
        means: torch.Tensor,
        stds: torch.Tensor,
        component_classes: torch.Tensor,
        probs: torch.Tensor | None = None,
    ):
        super().__init__()
        self.scheduler = scheduler
        self.num_classes = self.null_class_label = int(component_classes.max()) + 1
        self.config = SimpleNamespace(in_channels=means.shape[1], sample_size=tuple(means.shape[2:]))
        probs = torch.ones(len(means)) if probs is None else probs
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("stds", stds)
        self.register_buffer("log_probs", (probs / probs.sum()).log())
        # Which components a label allows: those of its class; for the null class, the last row, all.
        classes = torch.arange(self.num_classes)[:, None]
        allowed = torch.cat([component_classes == classes, torch.ones(1, len(means), dtype=torch.bool)])
        self.register_buffer("allowed", allowed)

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    @property
    def device(self) -> torch.device:
        return self.means.device

    def check_class_labels(self, class_labels: torch.Tensor, batch_size: int) -> None:
        """As `UNet2DCFGModel.check_class_labels`: raises ValueError for a label that is not one of the model's."""
        wrong = [label for label in class_labels.tolist() if not -1 <= label <= self.null_class_label]
        if wrong:
            raise ValueError(f"class_labels {wrong} are out of range: this model has 0 … {self.num_classes - 1}.")

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> UNet2DOutput:
        """What the scheduler's `prediction_type` says, at z; the arguments of `UNet2DCFGModel.forward`."""
        alpha, sigma = self.scheduler.alpha_sigma(self.scheduler.u(timestep.double()))
        alpha, sigma = (value.to(sample).view(-1, *(1,) * (sample.ndim - 1)) for value in (alpha, sigma))
        eps, x = self.expected_noise_and_sample(sample, alpha, sigma, class_labels)
        outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x}
        return UNet2DOutput(sample=outputs[self.scheduler.config.prediction_type])

    def eps(self, *args, **kwargs) -> torch.Tensor:
        """ε(z, c), or ε(z) without labels: the first of `expected_noise_and_sample`."""
        return self.expected_noise_and_sample(*args, **kwargs)[0]

    def expected_noise_and_sample(
        self,
        z: torch.Tensor,
        alpha: torch.Tensor | float,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """E[ε | z, c] and E[x | z, c] at z `(batch, …)`, α and σ of shape `()` or `(batch,)`; each the shape of z."""
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
        """log p(z | c), and log p(z) for the null class: `(batch,)`. With α = 1 and σ = 0 that of the data."""
        log_joint, _, _ = self._components(z, alpha, sigma, class_labels)
        return log_joint.logsumexp(1)

    def sample(self, class_labels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """x ~ p(x | c) for labels `(batch,)`, -1 the null class: `(batch, channels, height, width)`."""
        k = torch.multinomial(self._log_probs(class_labels).exp(), 1, generator=generator).squeeze(1)
        noise = torch.randn(self.means[k].shape, generator=generator, dtype=self.dtype)
        x = self.means[k] + self.stds[k, None] * noise
        return x.view(-1, self.config.in_channels, *self.config.sample_size)

    def _components(
        self, z: torch.Tensor, alpha: torch.Tensor | float, sigma: torch.Tensor | float, class_labels
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each component k: log p(z, k | c), z - αμ and v. A row for each z."""
        if class_labels is None:
            class_labels = torch.full((len(z),), self.null_class_label, device=z.device)
        alpha, sigma = self._column(alpha), self._column(sigma)
        deltas = z.flatten(1)[:, None] - alpha[..., None] * self.means
        variances = (alpha * self.stds) ** 2 + sigma**2
        log_gaussians = -(deltas.square().sum(2) / variances + deltas.shape[2] * (2 * math.pi * variances).log()) / 2
        return self._log_probs(class_labels) + log_gaussians, deltas, variances

    def _log_probs(self, class_labels: torch.Tensor) -> torch.Tensor:
        """log p(k | c): `(batch, components)`."""
        return self.log_probs.masked_fill(~self.allowed[class_labels], -math.inf).log_softmax(1)

    def _column(self, value: torch.Tensor | float) -> torch.Tensor:
        return torch.as_tensor(value, dtype=self.dtype, device=self.device).reshape(-1, 1)


def three_gaussians(scheduler: LogSNRScheduler) -> GaussianMixtureModel:
    """Three classes in the plane, a Gaussian each, as in figure 2 of Ho & Salimans: images of 1×2 pixels."""
    angles = torch.tensor([90.0, 210.0, 330.0]).deg2rad()
    means = 0.35 * torch.stack([angles.cos(), angles.sin()], 1).view(3, 1, 1, 2)
    return GaussianMixtureModel(scheduler, means, torch.full((3,), 0.15), torch.arange(3))
