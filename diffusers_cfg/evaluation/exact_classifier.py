"""Train a classifier of noisy samples of the mixture, and compare its guidance with the exact guidance."""

from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_cfg import CFGPipeline, LogSNRScheduler, NoisyClassifier2DModel
from diffusers_cfg.evaluation.mixture import GaussianMixtureClassifier, GaussianMixtureModel, three_gaussians
from diffusers_cfg.evaluation.reports import table

# Values of λ at which classifiers are compared
LOG_SNRS = (-20.0, -10.0, -5.0, -2.0, 0.0, 2.0, 3.0, 4.0, 6.0)


class ClassifierOfZ(NoisyClassifier2DModel):
    """The same network with z instead of αz as its input. Like every classifier it is given αz, and divides by α."""

    scheduler = LogSNRScheduler()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha, _ = self.scheduler.alpha_sigma(self.scheduler.u(timestep))
        return super().forward(sample / alpha.to(sample).view(-1, 1, 1, 1), timestep)


def train_mixture_classifier(
    model: GaussianMixtureModel,
    steps: int,
    classifier_class: type[NoisyClassifier2DModel] = NoisyClassifier2DModel,
    batch_size: int = 128,
) -> NoisyClassifier2DModel:
    """
    Train a small classifier on samples of a mixture at times u ~ U[0, 1), as `train_classifier.py` does.

    Args:
        model (`GaussianMixtureModel`): the mixture, whose classes are equally likely.
        steps (`int`): number of steps of Adam. The learning rate falls from 3e-3 to 0.
        classifier_class (`type`): `NoisyClassifier2DModel` or `ClassifierOfZ`.
        batch_size (`int`): samples of a step. No sample is used twice.
    """
    torch.manual_seed(0)
    generator, scheduler = torch.Generator().manual_seed(1), model.scheduler
    classifier = classifier_class(
        sample_size=model.config.sample_size,
        in_channels=model.config.in_channels,
        num_classes=model.num_classes,
        down_block_types=("DownBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
        noise_process=GaussianMixtureClassifier(model).noise_process,
    )
    optimizer = torch.optim.Adam(classifier.parameters())
    for step in range(steps):
        labels = torch.randint(model.num_classes, (batch_size,), generator=generator)
        x = model.sample(labels, generator)
        u = torch.rand(batch_size, generator=generator)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in scheduler.alpha_sigma(u))
        z = alpha * x + sigma * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(classifier(alpha * z, scheduler.timestep(u)), labels)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval()


def guidance_errors(classifier: torch.nn.Module, num_samples: int = 2048) -> tuple[list[float], list[float]]:
    """
    Measure at each of `LOG_SNRS` how far a classifier moves x̃, and how far that is from the exact E[x|z, c] - E[x|z].

    Both use the pipeline's `classifier_guidance` at s = 1 for noisy samples of the mixture and their classes.

    Returns:
        Two lists: the root mean square of the exact move, and that of the error.
    """
    scheduler = LogSNRScheduler(prediction_type="sample")
    model = three_gaussians(scheduler).double()
    pipeline = CFGPipeline(model, scheduler, classifier=classifier)  # pyright: ignore[reportArgumentType]
    labels = torch.arange(num_samples) % model.num_classes
    generator = torch.Generator().manual_seed(2)
    moves, errors = [], []
    for log_snr in LOG_SNRS:
        u = scheduler.u_at(torch.tensor(log_snr, dtype=torch.float64)).clamp(0, 1)
        alpha, sigma = scheduler.alpha_sigma(u)
        x = model.sample(labels, generator)
        z = alpha * x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        conditional, marginal = (model.expected_noise_and_sample(z, alpha, sigma, c)[1] for c in (labels, None))
        exact = conditional - marginal
        classes = F.one_hot(labels, model.num_classes).float()
        move = pipeline.classifier_guidance(z, scheduler.timestep(u), classes, torch.ones(num_samples), log_snr)
        moves.append(exact.square().mean().sqrt().item())
        errors.append((move - exact).square().mean().sqrt().item())
    return moves, errors


def trained_classifier(output_dir: Path, steps: tuple[int, ...] = (0, 100, 1000, 4000)) -> str:
    """Compare classifiers after several numbers of training steps, and one that sees z, with the exact one over λ."""
    model = three_gaussians(LogSNRScheduler())
    classifiers = {f"sees αz, {count:,} steps": train_mixture_classifier(model, count) for count in steps}
    classifiers[f"sees z, {steps[-1]:,} steps"] = train_mixture_classifier(model, steps[-1], ClassifierOfZ)
    rows = []
    for name, classifier in classifiers.items():
        moves, errors = guidance_errors(classifier)
        rows.append([name, *(f"{error / move:.2g}" for error, move in zip(errors, moves, strict=True))])
    rows.insert(0, ["exact move of x̃", *(f"{move:.2g}" for move in moves)])
    return (
        "## A trained classifier\n\nRMS error of the move of x̃ by classifier guidance at s = 1, relative to the RMS of "
        "the exact move E[x|z, c] - E[x|z], over λ.\n\n" + table(["", *(f"λ = {value:g}" for value in LOG_SNRS)], rows)
    )
