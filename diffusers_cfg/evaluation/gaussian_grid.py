"""Train denoising diffusion GANs on a grid of 25 Gaussians in the plane, whose modes can be counted exactly.

The experiment is that of Xiao et al. 2021 (arXiv 2112.07804, figure 6). The steps and the losses are those of images.
"""

import json
import logging
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusers_cfg.denoising_gan import (
    DenoisingSteps,
    discriminator_loss,
    generator_loss,
    squared_gradient,
    vp_betas,
)
from diffusers_cfg.evaluation.mode_coverage import divergence_from_uniform
from diffusers_cfg.evaluation.mode_reports import plot_points
from diffusers_cfg.files import read_safetensors, write_safetensors
from diffusers_cfg.randomness import seed_of, seeded_generator

logger = logging.getLogger(__name__)

# The grid of 5×5 means has unit variance, which the noise process assumes, and a standard deviation of 0.05 spacings.
SIDE, RELATIVE_STD = 5, 0.05
SPACING = (2 + RELATIVE_STD**2) ** -0.5
STD = RELATIVE_STD * SPACING
MEANS = SPACING * (torch.cartesian_prod(*2 * [torch.arange(SIDE)]) - (SIDE - 1) / 2)  # (25, 2)
# A sample is of high quality within 3 standard deviations of its nearest mean.
HIGH_QUALITY = 3


class GridSettings(NamedTuple):
    """
    The settings of a run. The defaults suit one CPU core: the paper trains networks of 512 units for 50,000 steps.

    Attributes:
        num_timesteps (`int`): T.
        seed (`int`): the seed of the weights, the data and the noise.
        steps (`int`), batch_size (`int`): the number of steps, each of both networks, and of points in each.
        units (`int`), latent_dim (`int`): units of each of the three hidden layers, and size of z.
        learning_rate (`float`), learning_rate_discriminator (`float`): peak learning rates, which follow a cosine to 0.
        r1_gamma (`float`), lazy_reg (`int`): γ of R1 and the number of steps between penalties. It is smaller than for
            images, since D must change within a mode's width of 0.035.
        ema_decay (`float`): the decay of the average of the generator's weights.
    """

    num_timesteps: int
    seed: int
    steps: int = 6000
    batch_size: int = 256
    units: int = 128
    latent_dim: int = 2
    learning_rate: float = 5e-4
    learning_rate_discriminator: float = 2e-3
    r1_gamma: float = 1e-3
    lazy_reg: int = 4
    ema_decay: float = 0.999


class GridNetwork(nn.Module):
    """
    An MLP with three hidden layers, whose inputs are points or latent vectors, and the step as a one-hot vector.

    Args:
        num_inputs (`int`), num_outputs (`int`): the numbers of input and output values of each sample.
        settings (`GridSettings`): the number of steps and of units.
    """

    def __init__(self, num_inputs: int, num_outputs: int, settings: GridSettings) -> None:
        super().__init__()
        self.num_timesteps = settings.num_timesteps
        widths = [num_inputs + settings.num_timesteps, *3 * [settings.units]]
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, a=0.2)
        hidden = [module for layer in layers for module in (layer, nn.LeakyReLU(0.2))]
        self.body = nn.Sequential(*hidden, nn.Linear(settings.units, num_outputs))

    def forward(self, t: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Return `(batch, num_outputs)` from steps t, int64 `(batch,)`, and inputs, `(batch, num_inputs)` together."""
        return self.body(torch.cat([*inputs, nn.functional.one_hot(t, self.num_timesteps).float()], dim=1))


def draw_grid(num_points: int, generator: torch.Generator) -> torch.Tensor:
    """Return points of the mixture, `(num_points, 2)`."""
    modes = torch.randint(len(MEANS), (num_points,), generator=generator)
    return MEANS[modes] + STD * torch.randn(num_points, 2, generator=generator)


def train_on_grid(settings: GridSettings) -> GridNetwork:
    """Return the averaged generator of a run. It neither reads nor changes torch's global random state."""
    steps, rng = DenoisingSteps(vp_betas(settings.num_timesteps)), seeded_generator("cpu", settings.seed, "grid")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings.seed, "grid", "weights"))
        generator = GridNetwork(2 + settings.latent_dim, 2, settings)
        discriminator = GridNetwork(4, 1, settings)
        averaged = GridNetwork(2 + settings.latent_dim, 2, settings)
    averaged.load_state_dict(generator.state_dict())
    averaged.requires_grad_(False)
    optimizers, schedules = [], []
    rates = (settings.learning_rate_discriminator, settings.learning_rate)
    for network, rate in zip((discriminator, generator), rates, strict=True):
        optimizers.append(torch.optim.Adam(network.parameters(), rate, betas=(0.0, 0.99), fused=True))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], settings.steps))

    def draw_pair(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return t, a real x_prev, x_next and a generated x_prev."""
        t = torch.randint(settings.num_timesteps, (len(x),), generator=rng)
        noises = torch.randn(3, *x.shape, generator=rng)
        real, x_next = steps.diffuse(x, t, noises[0], noises[1])
        latent = torch.randn(len(x), settings.latent_dim, generator=rng)
        return t, real, x_next, steps.denoise(generator(t, x_next, latent), x_next, t, noises[2])

    for step in range(settings.steps):
        x = draw_grid(settings.batch_size, rng)
        with torch.no_grad():
            t, real, x_next, fake = draw_pair(x)
        is_penalised = step % settings.lazy_reg == 0
        on_real = discriminator(t, real.requires_grad_(is_penalised), x_next)[:, 0]
        loss = discriminator_loss("non_saturating", on_real, discriminator(t, fake, x_next)[:, 0])
        if is_penalised:
            loss = loss + settings.r1_gamma / 2 * squared_gradient(on_real, real)
        take_step(optimizers[0], loss)
        t, _, x_next, fake = draw_pair(x)
        discriminator.requires_grad_(False)
        take_step(optimizers[1], generator_loss("non_saturating", None, discriminator(t, fake, x_next)[:, 0]))
        discriminator.requires_grad_(True)
        for schedule in schedules:
            schedule.step()
        for average, parameter in zip(averaged.parameters(), generator.parameters(), strict=True):
            average.lerp_(parameter, 1 - settings.ema_decay)
    return averaged


def trained_on_grid(settings: GridSettings, path: Path) -> tuple[GridNetwork, float]:
    """
    Return the generator of a run, and the CPU seconds that its training took. They are read from a file if it has these
    settings, and otherwise written to it.
    """
    key = json.dumps(settings._asdict())
    if path.is_file():
        weights, metadata = read_safetensors(path)
        if metadata.get("settings") == key:
            network = GridNetwork(2 + settings.latent_dim, 2, settings)
            network.load_state_dict(weights)
            return network, float(metadata["seconds"])
        logger.warning("%s has other settings (%s) and is trained again.", path, metadata.get("settings"))
    started = time.process_time()
    network = train_on_grid(settings)
    seconds = time.process_time() - started
    write_safetensors(network.state_dict(), {"settings": key, "seconds": str(seconds)}, path)
    return network, seconds


def take_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Take a step on the mean of a loss, `(batch,)`."""
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()


@torch.no_grad()
def sample_grid_model(network: GridNetwork, settings: GridSettings, num_samples: int) -> torch.Tensor:
    """Return samples of a trained generator, `(num_samples, 2)`."""
    steps, rng = DenoisingSteps(vp_betas(settings.num_timesteps)), seeded_generator("cpu", settings.seed, "samples")
    x = torch.randn(num_samples, 2, generator=rng)
    for step in reversed(range(settings.num_timesteps)):
        t = torch.full((num_samples,), step)
        latent = torch.randn(num_samples, settings.latent_dim, generator=rng)
        x = steps.denoise(network(t, x, latent), x, t, torch.randn(num_samples, 2, generator=rng))
    return x


def grid_coverage(points: torch.Tensor) -> dict[str, Any]:
    """
    Return how well points cover the modes.

    Args:
        points (`torch.Tensor` of shape `(points, 2)`): the points.

    Returns:
        `modes`, the number of modes with a point of high quality; `high_quality`, the share of such points; and `kl`,
        KL(q‖uniform) of the nearest mode in nats.
    """
    distances, nearest = torch.cdist(points, MEANS).min(dim=1)
    is_close = distances <= HIGH_QUALITY * STD
    return {
        "modes": len(nearest[is_close].unique()),
        "high_quality": is_close.float().mean().item(),
        "kl": divergence_from_uniform(nearest.bincount(minlength=len(MEANS))),
    }


def compare_on_grid(num_timesteps: list[int], seeds: list[int], num_samples: int, output_dir: Path) -> dict[str, Any]:
    """
    Train and measure a model for each number of steps T and each seed, and write a picture of the samples of the first
    seed beside the data, gaussians.png. Models in the folder `gaussians` are reused.

    Args:
        num_timesteps (`list[int]`), seeds (`list[int]`): the numbers of steps, and the seeds.
        num_samples (`int`): the number of samples of each model.
        output_dir (`Path`): the output folder.

    Returns:
        `dict[str, Any]`: `runs`, the coverage of each model; `references`, that of perfect samples and of a model
        that has learned no mode; and the settings.
    """
    perfect = draw_grid(num_samples, seeded_generator("cpu", "perfect samples"))
    # A cell of one spacing around each mean
    square = SIDE * SPACING * (torch.rand(num_samples, 2, generator=seeded_generator("cpu", "square")) - 0.5)
    panels, runs = {"data": perfect}, []
    for steps in num_timesteps:
        for seed in seeds:
            settings = GridSettings(steps, seed)
            path = output_dir / "gaussians" / f"T={steps}" / f"seed={seed}.safetensors"
            network, seconds = trained_on_grid(settings, path)
            points = sample_grid_model(network, settings, num_samples)
            runs.append({"num_timesteps": steps, "seed": seed, **grid_coverage(points), "seconds": seconds})
            panels.setdefault(f"T = {steps}", points)
            logger.info("25 Gaussians, T = %d, seed %d: %s", steps, seed, runs[-1])
    plot_points(panels, output_dir / "gaussians.png")
    shared = {name: value for name, value in settings._asdict().items() if name not in ("num_timesteps", "seed")}
    return {
        "num_samples": num_samples,
        "settings": shared,
        "runs": runs,
        "references": {"perfect": grid_coverage(perfect), "uniform square": grid_coverage(square)},
    }
