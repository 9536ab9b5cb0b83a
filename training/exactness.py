"""Show that guidance and its samplers do what they should where the truth is known, and draw the figures of it.

    python training/exactness.py --output_dir figures
    python training/exactness.py --output_dir figures --model cfg-model --guide_model weak-model

The truth is a mixture of three Gaussians, a class each, whose ε(z, c) and ε(z) are closed forms. With --model the rules
of guidance are compared on a trained model. Tables are printed and written to tables.md beside the figures.
"""

import math
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from functools import cache
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import torch
from config import STATISTICS_DIR, TrainConfig, UserError
from evaluate_cfg import load_data
from evaluation import Evaluation
from grid import draw_grid
from loop import make_accelerator
from mixture import GaussianMixtureModel, three_gaussians
from report import table
from sample import draw_images
from scipy.integrate import solve_ivp

from diffusers_cfg import CFGPipeline, LogSNRScheduler, UNet2DCFGModel

# Solvers of the probability flow, and the order of convergence that each claims.
SOLVERS = {
    "DDIMScheduler": 1,
    "EulerDiscreteScheduler": 1,
    "HeunDiscreteScheduler": 2,
    "DPMSolverMultistepScheduler": 2,
    "UniPCMultistepScheduler": 2,
    "DEISMultistepScheduler": 2,
}
STEPS = (10, 20, 40, 100, 200)  # all divide 1000, as DDIM wants it


# ----- the truth -----


def guided_eps(model: GaussianMixtureModel, z: torch.Tensor, alpha, sigma, class_labels, w: float) -> torch.Tensor:
    """ε̃, stated apart from the pipeline's rule, which is compared with it: w + 1 of the way from ε(z) to ε(z, c)."""
    return torch.lerp(model.eps(z, alpha, sigma), model.eps(z, alpha, sigma, class_labels), 1 + w)


def guided_flow(
    model: GaussianMixtureModel, noise: torch.Tensor, class_labels: torch.Tensor, w: float, sigma_max: float
) -> torch.Tensor:
    """
    Where the probability flow of the guided field takes each z ~ N(0, I) from the noise level σ/α = `sigma_max`.

    In y = z/α and σ' = σ/α the flow is dy/dσ' = ε̃ (Song et al. 2021, arXiv 2010.02502, equation 14). This is what a
    deterministic sampler approximates. It is not a draw from p(x|c)^(1+w) p(x)^(-w), nor is any sampler's with w ≠ 0
    (Bradley & Nakkiran 2024, arXiv 2408.09000).

    Args:
        model: in float64.
        noise (`torch.Tensor` of shape `(batch, channels, height, width)`): z at the start.
        class_labels (`torch.Tensor` of shape `(batch,)`), w: of the guided field.
        sigma_max: the start in σ/α; the end is 1e-6.

    Returns:
        `torch.Tensor` of the shape of the noise, float64: x, to about 1e-8.
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
    Draws from the reverse diffusion of the guided field, which stochastic samplers approximate: Euler-Maruyama in
    y = z/α over σ' = σ/α, in float64, with steps even in log σ'. Shape `(batch, channels, height, width)`.
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
    """The paper's sampler on its own λ without its noise: z' = α'x̃ + σ'ε̃, in float64."""
    alpha, sigma = model.scheduler.alpha_sigma(torch.linspace(1, 0, steps, dtype=torch.float64))
    z = noise.double()
    for i in range(steps):
        eps = guided_eps(model, z, alpha[i], sigma[i], class_labels, w)
        x = (z - sigma[i] * eps) / alpha[i]
        z = x if i == steps - 1 else alpha[i + 1] * x + sigma[i + 1] * eps
    return z


def rms_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The root of the mean squared distance between the rows of two batches."""
    return (a.double() - b.double()).flatten(1).square().sum(1).mean().sqrt().item()


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 16) -> float:
    """Mean Wasserstein-1 distance of two equally large clouds in the plane, projected onto evenly spaced directions."""
    angles = torch.arange(directions, dtype=torch.float64) * math.pi / directions
    axes = torch.stack([angles.cos(), angles.sin()])
    projected = [(cloud.double().flatten(1) @ axes).sort(dim=0).values for cloud in (a, b)]
    return (projected[0] - projected[1]).abs().mean().item()


class Plane:
    """The exact model in a pipeline, and a batch of starts to compare samplers by."""

    def __init__(self, num_samples: int = 256, **settings):
        self.scheduler = LogSNRScheduler(**{"clip_sample": False, **settings})
        self.model = three_gaussians(self.scheduler).double()
        self.pipeline = CFGPipeline(three_gaussians(self.scheduler), self.scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.noise = torch.randn(num_samples, 1, 1, 2, generator=torch.Generator().manual_seed(0))
        self.class_labels = torch.arange(num_samples) % 3
        self.flow = cache(lambda w, sigma_max: guided_flow(self.model, self.noise, self.class_labels, w, sigma_max))

    def swap(self, name: str, **settings) -> None:
        cls = getattr(diffusers, name, LogSNRScheduler)
        self.pipeline.scheduler = cls.from_config(self.scheduler.config, **settings)

    def draw(self, w: float, num_inference_steps: int, **call) -> torch.Tensor:
        """x from the batch's starts by the pipeline and its present scheduler."""
        call = {"latents": self.noise, "generator": torch.Generator().manual_seed(1), "output_type": "latent", **call}
        return self.pipeline(self.class_labels, w, num_inference_steps=num_inference_steps, **call).images

    def error(self, w: float, num_inference_steps: int) -> float:
        """RMS distance to the flow from the noise level that the scheduler starts at."""
        images = self.draw(w, num_inference_steps)
        return rms_distance(images, self.flow(w, math.exp(-self.pipeline._log_snr()[0].item() / 2)))


# ----- the tables and figures -----


def convergence(plane: Plane, output_dir: Path) -> str:
    """Error of each solver of the probability flow over the number of steps, for w = 0, 1 and 3."""
    tables, figure = [], new_figure(1, 3, "RMS distance to the exact guided flow")
    for axis, w in zip(figure.axes, (0.0, 1.0, 3.0), strict=True):
        limit_sigma = math.exp(-plane.scheduler.config.log_snr_min / 2)
        limit = {
            steps: rms_distance(
                deterministic_limit(plane.model, plane.noise, plane.class_labels, w, steps), plane.flow(w, limit_sigma)
            )
            for steps in (*STEPS, 128)
        }
        rows = [["paper's λ, noise left out", *(f"{limit[steps]:.1e}" for steps in STEPS), order_of(limit), "1"]]
        axis.loglog(STEPS, [limit[steps] for steps in STEPS], "k--", label="paper's λ, noise left out")
        for name, order in SOLVERS.items():
            plane.swap(name)
            errors = {steps: plane.error(w, steps) for steps in STEPS}
            rows.append([name, *(f"{errors[steps]:.1e}" for steps in STEPS), order_of(errors), str(order)])
            axis.loglog(STEPS, list(errors.values()), ".-", label=name.replace("Scheduler", ""))
        axis.set(title=f"w = {w:g}", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        header = ["solver", *(f"T = {steps}" for steps in STEPS), "order seen", "order claimed"]
        tables.append(
            f"w = {w:g}; the paper's λ without its noise at T = 128: {limit[128]:.1e}\n\n{table(header, rows)}"
        )
    figure.axes[0].legend(fontsize=7)
    save(figure, output_dir / "convergence.png")
    return "## Solvers of the probability flow\n\n" + "\n\n".join(tables)


def order_of(errors: dict[int, float]) -> str:
    return f"{math.log2(errors[20] / errors[40]):.1f}"


def stochastic(output_dir: Path, num_samples: int = 30_000) -> str:
    """Distance in distribution of the stochastic samplers from the reverse diffusion of the same guided field."""
    plane, steps, rows = Plane(num_samples), (10, 20, 50, 256), []
    samplers = {f"paper, v = {v:g}": ("LogSNRScheduler", {"variance_interpolation": v}) for v in (0.0, 0.3, 1.0)}
    samplers["DDPM"] = ("DDPMScheduler", {})
    samplers["DPM-Solver++ (SDE)"] = ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
    for w in (0.0, 1.0):
        truth, also_truth = (
            guided_diffusion(plane.model, plane.class_labels, w, 2000, torch.Generator().manual_seed(seed))
            for seed in (2, 3)
        )
        for name, (scheduler, settings) in samplers.items():
            plane.swap(scheduler, **settings)
            distances = [sliced_wasserstein(plane.draw(w, T, latents=None), truth) for T in steps]
            rows.append([f"{w:g}", name, *(f"{distance:.4f}" for distance in distances)])
        rows.append([f"{w:g}", "another draw of the truth", *[f"{sliced_wasserstein(also_truth, truth):.4f}"] * 4])
        plane.swap("UniPCMultistepScheduler")
        distance = sliced_wasserstein(plane.draw(w, 50), truth)
        rows.append([f"{w:g}", "the probability flow", *[f"{distance:.4f}"] * 4])
    return (
        f"## Stochastic samplers\n\nSliced Wasserstein-1 distance of {num_samples:,} samples to as many of the reverse "
        "diffusion.\n\n" + table(["w", "sampler", *(f"T = {T}" for T in steps)], rows)
    )


def network_error(output_dir: Path, size: float = 0.01) -> str:
    """What becomes of a small error in the network's output: why strong guidance fails, and what mends it."""

    # A fixed vector of RMS `size` for each label, as a trained network is off in its own way for each.
    offsets = torch.randn(4, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    offsets = size * offsets / offsets.square().mean((1, 2, 3), keepdim=True).sqrt()

    def add_error(model, args, kwargs, out) -> None:
        out.sample = out.sample + offsets[kwargs["class_labels"]]

    variants = {
        "ε predicted, x̃ as it comes": ({"clip_sample": False}, True),
        "ε predicted, x̃ clipped, its ε kept": ({"clip_sample": True}, False),
        "ε predicted, x̃ clipped, its ε recomputed": ({"clip_sample": True}, True),
        "v predicted, x̃ as it comes": ({"clip_sample": False, "prediction_type": "v_prediction"}, True),
        "v predicted, x̃ clipped, its ε recomputed": ({"clip_sample": True, "prediction_type": "v_prediction"}, True),
    }
    rows, scales = [], (0.0, 1.0, 2.0, 4.0)
    free = Plane()
    free.swap("DDIMScheduler")
    for name, (settings, recomputed) in variants.items():
        exact, wrong = Plane(**settings), Plane(**settings)
        wrong.pipeline.unet.register_forward_hook(add_error, with_kwargs=True)
        for plane in (exact, wrong):
            plane.swap("DDIMScheduler")
            if not recomputed:
                plane.pipeline._step_kwargs = lambda generator: {}  # without use_clipped_model_output
        cells = []
        for w in scales:
            truth, right = free.draw(w, 50), exact.draw(w, 50)
            cells.append(f"{rms_distance(wrong.draw(w, 50), truth):.3f} ({rms_distance(right, truth):.3f})")
        rows.append([name, *cells])
    return (
        f"## A network that is wrong by {size:g}\n\nRMS distance to the samples of the exact model with nothing "
        "clipped, of a model whose output is off by a constant (in brackets: of the exact one); 50 steps of DDIM.\n\n"
        + table(["", *(f"w = {w:g}" for w in scales)], rows)
    )


def mixture_figure(output_dir: Path, num_samples: int = 60_000) -> str:
    """The seed's figure: the mixture, and its guided conditionals as w rises; below what they are often taken for."""
    plane, scales, limit, bins = Plane(num_samples), (0.0, 0.5, 1.0, 2.0, 4.0), 1.1, 160
    plane.swap("UniPCMultistepScheduler")
    edges = np.linspace(-limit, limit, bins + 1)
    centers = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    grid = torch.cartesian_prod(centers, centers).view(-1, 1, 1, 2)
    log_conditionals = torch.stack(
        [plane.model.log_prob(grid, class_labels=torch.full((len(grid),), c)) for c in range(3)]
    )
    log_marginal = plane.model.log_prob(grid)

    figure = new_figure(2, 1 + len(scales), "Three classes under guidance", size=2.1)
    axes = np.array(figure.axes).reshape(2, -1)
    panels, spread = [[log_marginal.exp()], [log_marginal.exp()]], []
    for w in scales:
        samples = plane.draw(w, 50).flatten(1).double()
        histogram, *_ = np.histogram2d(*samples.T.numpy(), bins=[edges, edges])
        panels[0].append(torch.from_numpy(histogram).flatten())
        panels[1].append(torch.lerp(log_marginal, log_conditionals, 1 + w).softmax(1).sum(0))
        spread.append(f"{w:g}: {samples[plane.class_labels == 0].std(0).mean():.3f}")
    for row, label in enumerate(("the guided flow's samples", "∝ p(x|c)¹⁺ʷ p(x)⁻ʷ")):
        axes[row, 0].set_ylabel(label)
        for column, density in enumerate(panels[row]):
            axes[row, column].imshow(
                density.view(bins, bins).T,
                origin="lower",
                extent=[-limit, limit] * 2,
                cmap="magma",
                interpolation="nearest",
            )
            axes[row, column].set(xticks=[], yticks=[])
            axes[0, column].set_title("p(x)" if column == 0 else f"w = {scales[column - 1]:g}", fontsize=10)
    save(figure, output_dir / "mixture.png")
    return (
        f"## The mixture\n\nStandard deviation of the samples of one class ({plane.model.stds[0]:g} without guidance), "
        f"by w: {', '.join(spread)}"
    )


def rules(args: Namespace, output_dir: Path) -> str:
    """Every rule of guidance at equal w on a trained model."""
    pipeline = CFGPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    dataset, id2label, _ = load_data(args.model, {}, pipeline, show_progress=True)
    accelerator, n = make_accelerator(TrainConfig(report_to="none")), args.num_samples
    evaluation = Evaluation(accelerator, dataset, id2label, "small", n, STATISTICS_DIR)
    w, guiders = args.guidance_scale, diffusers.guiders
    original = {"guidance_scale": w, "use_original_formulation": True}
    chosen = {
        "w = 0": {"guidance_scale": 0.0},
        "classifier-free guidance": {"guidance_scale": w},
        "interval (0.2, 5]": {"guidance_scale": w, "guidance_interval": (0.2, 5.0)},
        "w sigmoid(-log SNR)": {"guidance_scale": lambda log_snr: w / (1 + math.exp(log_snr))},
        "rescale 0.7": {"guidance_scale": w, "guidance_rescale": 0.7},
        "away from class 0": {"guidance_scale": w, "negative_class_labels": 0},
        "AdaptiveProjectedGuidance": {"guider": guiders.AdaptiveProjectedGuidance(**original, eta=0.0)},
        "ClassifierFreeZeroStarGuidance": {
            "guider": guiders.ClassifierFreeZeroStarGuidance(**original, zero_init_steps=0)
        },
        "TangentialClassifierFreeGuidance": {"guider": guiders.TangentialClassifierFreeGuidance(**original)},
    }
    if args.guide_model is not None:
        guide_unet = UNet2DCFGModel.from_pretrained(args.guide_model, subfolder="unet")
        chosen["autoguidance by --guide_model"] = {"guidance_scale": w, "guide_unet": guide_unet}
    metrics = ["frechet_distance", "class_accuracy", "precision", "recall"]
    class_labels, rows, pictures = torch.arange(n) % len(id2label), [], []
    for name, call in chosen.items():
        pipeline.guide_unet = call.pop("guide_unet", None)
        call["num_inference_steps"] = args.num_inference_steps
        drawn = [
            draw_images(pipeline, class_labels[places], places.tolist(), args.seed, **call)
            for places in torch.arange(n).split(250)
        ]
        fake = torch.cat([images for images, _ in drawn])
        summary = evaluation.new_summary()
        evaluation.add(summary, torch.arange(n), fake, class_labels)
        row = evaluation.measure(summary)
        cells = [*(f"{row[metric]:.3f}" for metric in metrics), f"{saturated(fake):.3f}", f"{drawn[0][1]:.0f}"]
        rows.append([name, *cells])
        pictures.append(fake[: len(id2label)] / 255)
    draw_grid(torch.stack(pictures), list(chosen), list(id2label.values())).save(output_dir / "rules.png")
    real = saturated(dataset.images)
    header = ["rule", "Fréchet distance", *metrics[1:], "saturated", "evaluations an image"]
    return (
        f"## Rules at w = {w:g} on {Path(args.model).name}\n\n{n} samples, {args.num_inference_steps} steps of UniPC. "
        f"Saturated: the share of pixels that are 0 or 255; {real:.3f} of the real ones.\n\n" + table(header, rows)
    )


def saturated(images: torch.Tensor) -> float:
    return ((images == 0) | (images == 255)).float().mean().item()


# ----- drawing -----


def new_figure(rows: int, columns: int, title: str, size: float = 3.6):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots(rows, columns, figsize=(size * columns, size * rows), layout="constrained", sharey=True)
    figure.suptitle(title)
    return figure


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=100)


# ----- the command -----


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="exactness.py", description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", required=True, help="Where to write the figures and tables.md.")
    parser.add_argument("--model", help="The output folder of a training run, to compare the rules of guidance on.")
    parser.add_argument("--guide_model", help="That of a weaker one for the same data, for autoguidance.")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="The w at which the rules are compared.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Samples of each rule.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="Steps of each rule.")
    parser.add_argument("--seed", type=int, default=0, help="Each sample is determined by this and its index.")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    diffusers.utils.logging.set_verbosity_error()
    parts = [mixture_figure, lambda folder: convergence(Plane(), folder), stochastic, network_error]
    if args.model is not None:
        parts.append(lambda folder: rules(args, folder))
    sections = []
    for part in parts:
        sections.append(part(output_dir))
        print(f"\n{sections[-1]}", flush=True)
    (output_dir / "tables.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"exactness.py: error: {error}")
