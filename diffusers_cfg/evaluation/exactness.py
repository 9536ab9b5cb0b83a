"""Compare guidance and its samplers with a known exact solution, and guidance rules on a trained model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from diffusers_cfg import CFGPipeline
from diffusers_cfg.evaluation.class_labels import balanced_class_labels, classes_of
from diffusers_cfg.evaluation.grids import make_grid
from diffusers_cfg.evaluation.measure import measure
from diffusers_cfg.evaluation.mixture import (
    GaussianMixtureModel,
    ToyProblem,
    deterministic_limit,
    guided_diffusion,
    rms_distance,
    sliced_wasserstein,
)
from diffusers_cfg.evaluation.records import noise_process
from diffusers_cfg.evaluation.reports import new_figure, save_figure, table
from diffusers_cfg.evaluation.sampling import (
    check_call,
    choose_scheduler,
    draw_images,
    guidance_scales,
    load_pipeline,
)
from diffusers_cfg.evaluation.settings import EvaluationConfig, format_number
from diffusers_cfg.evaluation.statistics import BATCH_SIZE, RealStatistics
from diffusers_cfg.evaluation.sweep import check_scales, load_data
from diffusers_cfg.files import check_writable, save_image

# Solvers of the probability flow, and their nominal orders of convergence.
SOLVERS = {
    "DDIMScheduler": 1,
    "EulerDiscreteScheduler": 1,
    "HeunDiscreteScheduler": 2,
    "DPMSolverMultistepScheduler": 2,
    "UniPCMultistepScheduler": 2,
    "DEISMultistepScheduler": 2,
}
STEPS = (10, 20, 40, 100, 200)  # divisors of 1000, as DDIM requires


def mixture_figure(output_dir: Path, num_samples: int = 60_000) -> str:
    """Plot the samples of the guided flow for several w above the tilted densities. Return the spread by w."""
    toy, scales, limit, bins = ToyProblem(num_samples), (0.0, 0.5, 1.0, 2.0, 4.0), 1.1, 160
    toy.use_scheduler("UniPCMultistepScheduler")
    edges = np.linspace(-limit, limit, bins + 1)
    centers = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    grid = torch.cartesian_prod(centers, centers).view(-1, 1, 1, 2)
    log_conditionals = torch.stack(
        [toy.model.log_prob(grid, class_labels=torch.full((len(grid),), c)) for c in range(3)]
    )
    log_marginal = toy.model.log_prob(grid)

    panels, spread = [[log_marginal.exp()], [log_marginal.exp()]], []
    for w in scales:
        samples = toy.draw(w, 50).flatten(1).double()
        histogram, *_ = np.histogram2d(*samples.T.numpy(), bins=[edges, edges])
        panels[0].append(torch.from_numpy(histogram).flatten())
        panels[1].append(torch.lerp(log_marginal, log_conditionals, 1 + w).softmax(1).sum(0))
        spread.append(f"{w:g}: {samples[toy.class_labels == 0].std(0).mean():.3f}")

    columns = 1 + len(scales)
    figure = new_figure(2, columns, size=(2.1 * columns, 4.2), title="Three classes under guidance", sharey=True)
    axes = np.array(figure.axes).reshape(2, -1)
    for row, label in enumerate(("samples of the guided flow", "∝ p(x|c)¹⁺ʷ p(x)⁻ʷ")):
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
    save_figure(figure, output_dir / "mixture.png")
    return (
        f"## The mixture\n\nStandard deviation of the samples of one class by w ({toy.model.stds[0]:g} without "
        f"guidance): {', '.join(spread)}"
    )


def convergence(output_dir: Path, num_samples: int = 256) -> str:
    """Measure the error of each solver of the probability flow by the number of steps, for w = 0, 1 and 3."""
    toy, tables = ToyProblem(num_samples), []
    figure = new_figure(1, 3, size=(10.8, 3.6), title="RMS distance to the exact guided flow", sharey=True)
    for axis, w in zip(figure.axes, (0.0, 1.0, 3.0), strict=True):
        exact = toy.flow(w, math.exp(-toy.scheduler.config.log_snr_min / 2))
        limit = {
            steps: rms_distance(deterministic_limit(toy.model, toy.noise, toy.class_labels, w, steps), exact)
            for steps in (*STEPS, 128)
        }
        rows = [["paper's λ, noise left out", *(f"{limit[steps]:.1e}" for steps in STEPS), order_of(limit), "1"]]
        axis.loglog(STEPS, [limit[steps] for steps in STEPS], "k--", label="paper's λ, noise left out")
        for name, order in SOLVERS.items():
            toy.use_scheduler(name)
            errors = {steps: toy.error(w, steps) for steps in STEPS}
            rows.append([name, *(f"{errors[steps]:.1e}" for steps in STEPS), order_of(errors), str(order)])
            axis.loglog(STEPS, list(errors.values()), ".-", label=name.replace("Scheduler", ""))
        axis.set(title=f"w = {w:g}", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        header = ["solver", *(f"T = {steps}" for steps in STEPS), "observed order", "nominal order"]
        tables.append(f"w = {w:g}; paper's λ, noise left out, at T = 128: {limit[128]:.1e}\n\n{table(header, rows)}")
    figure.axes[0].legend(fontsize=7)
    save_figure(figure, output_dir / "convergence.png")
    return "## Solvers of the probability flow\n\n" + "\n\n".join(tables)


def order_of(errors: dict[int, float]) -> str:
    """Estimate the order of convergence from 20 to 40 steps, and format it for a table."""
    return f"{math.log2(errors[20] / errors[40]):.1f}"


def stochastic(output_dir: Path, num_samples: int = 30_000) -> str:
    """Compare the distribution of stochastic samplers with the reverse diffusion of the same guided field."""
    toy, steps, rows = ToyProblem(num_samples), (10, 20, 50, 256), []
    samplers: dict[str, tuple[str, dict[str, Any]]] = {
        **{f"paper, v = {v:g}": ("LogSNRScheduler", {"variance_interpolation": v}) for v in (0.0, 0.3, 1.0)},
        "DDPM": ("DDPMScheduler", {}),
        "DPM-Solver++ (SDE)": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    }
    for w in (0.0, 1.0):
        truth, also_truth = (
            guided_diffusion(toy.model, toy.class_labels, w, 2000, torch.Generator().manual_seed(seed))
            for seed in (2, 3)
        )
        for name, (scheduler, settings) in samplers.items():
            toy.use_scheduler(scheduler, **settings)
            distances = [sliced_wasserstein(toy.draw(w, T, latents=None), truth) for T in steps]
            rows.append([f"{w:g}", name, *(f"{distance:.4f}" for distance in distances)])
        rows.append([f"{w:g}", "second draw of the truth", *[f"{sliced_wasserstein(also_truth, truth):.4f}"] * 4])
        toy.use_scheduler("UniPCMultistepScheduler")
        distance = sliced_wasserstein(toy.draw(w, 50), truth)
        rows.append([f"{w:g}", "probability flow", *[f"{distance:.4f}"] * 4])
    return (
        f"## Stochastic samplers\n\nSliced Wasserstein-1 distance between {num_samples:,} samples of each sampler and "
        f"{num_samples:,} of the reverse diffusion.\n\n" + table(["w", "sampler", *(f"T = {T}" for T in steps)], rows)
    )


class PlainDDIM(DDIMScheduler):
    """DDIM that ignores the pipeline's `use_clipped_model_output`: ε is not recomputed from a clipped x̃."""

    def step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, generator: torch.Generator | None = None
    ) -> Any:
        return super().step(model_output, timestep, sample, generator=generator)


def network_error(output_dir: Path, size: float = 0.01) -> str:
    """Measure the effect of a small error in the network's output, for each prediction type and way of clipping x̃."""
    # A constant error of RMS `size` for each label: a trained network's error also depends on the label.
    offsets = torch.randn(4, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    offsets = size * offsets / offsets.square().mean((1, 2, 3), keepdim=True).sqrt()

    def add_error(model: GaussianMixtureModel, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        out.sample = out.sample + offsets[kwargs["class_labels"]]

    variants = {
        "ε prediction, x̃ not clipped": ("epsilon", False, DDIMScheduler),
        "ε prediction, x̃ clipped, ε kept": ("epsilon", True, PlainDDIM),
        "ε prediction, x̃ clipped, ε recomputed": ("epsilon", True, DDIMScheduler),
        "v prediction, x̃ not clipped": ("v_prediction", False, DDIMScheduler),
        "v prediction, x̃ clipped, ε recomputed": ("v_prediction", True, DDIMScheduler),
    }
    rows, scales = [], (0.0, 1.0, 2.0, 4.0)
    unclipped = ToyProblem()
    unclipped.use_scheduler("DDIMScheduler")
    for name, (prediction_type, clip_sample, scheduler) in variants.items():
        exact, inexact = (ToyProblem(prediction_type=prediction_type, clip_sample=clip_sample) for _ in range(2))
        inexact.pipeline.unet.register_forward_hook(add_error, with_kwargs=True)
        for toy in (exact, inexact):
            toy.pipeline.scheduler = scheduler.from_config(toy.scheduler.config)
        cells = []
        for w in scales:
            truth = unclipped.draw(w, 50)
            errors = [rms_distance(toy.draw(w, 50), truth) for toy in (inexact, exact)]
            cells.append("{:.3f} ({:.3f})".format(*errors))
        rows.append([name, *cells])
    return (
        f"## A network with an error of {size:g}\n\nRMS distance between the samples of a model with a constant error "
        "and those of the exact model without clipping; 50 steps of DDIM. In parentheses: the same distance for the "
        "exact model.\n\n" + table(["", *(f"w = {w:g}" for w in scales)], rows)
    )


def check_rules(config: EvaluationConfig) -> None:
    """Raise `UserError` if the rules cannot be compared on the model with these settings."""
    pipeline = load_rules_pipeline(config, "cpu")
    check_writable(Path(config.statistics_dir), "--statistics_dir")
    check_scales(config, pipeline)
    for _, call in rules_of(config, pipeline):
        check_call(pipeline, **call)
    load_data(config.model, {}, pipeline, show_progress=False)


def load_rules_pipeline(config: EvaluationConfig, device: torch.device | str) -> CFGPipeline:
    """Load the models, with a solver of the probability flow. Raise `UserError` if that fails, or there is no flow."""
    pipeline = load_pipeline(config, device)
    noise_process(pipeline)  # refuses a generator
    pipeline.scheduler = choose_scheduler("UniPCMultistepScheduler", pipeline)
    return pipeline


def rules(output_dir: Path, accelerator: Accelerator, config: EvaluationConfig) -> str:
    """
    Compare guidance rules at the same w on a trained model.

    Args:
        output_dir (`Path`): the folder for `rules.png`.
        accelerator (`Accelerator`): a single process.
        config (`EvaluationConfig`): the models, the only w, and the sampling settings of each rule.

    Returns:
        The table, in Markdown.
    """
    pipeline = load_rules_pipeline(config, accelerator.device)
    (w,) = guidance_scales(config, pipeline)
    dataset, id2label, _ = load_data(config.model, {}, pipeline, show_progress=True)
    num_samples, statistics_dir = config.num_samples, Path(config.statistics_dir)
    real = RealStatistics(accelerator, dataset, id2label, "small", num_samples, statistics_dir)
    classes = classes_of(dataset.class_labels)
    class_labels = balanced_class_labels(classes, num_samples)
    metrics, rows, tiles = ["frechet_distance", "class_accuracy", "precision", "recall"], [], []
    for name, call in rules_of(config, pipeline):
        drawn = [
            draw_images(pipeline, class_labels[indices], indices.tolist(), config.seed, **call)
            for indices in torch.arange(num_samples).split(BATCH_SIZE)
        ]
        fake = torch.cat([images for images, _ in drawn])
        summary = real.summarizer.new_summary(num_samples)
        real.summarizer.add(summary, torch.arange(num_samples), fake, class_labels)
        row = measure(summary, real.reference, real.extractor.id2label)
        cells = [
            *(f"{row[metric]:.3f}" for metric in metrics),
            f"{saturated(fake):.3f}",
            f"{drawn[0][1].network_evaluations:.0f}",
        ]
        rows.append([name, *cells])
        tiles.append(fake[: len(classes)] / 255)
    columns = [id2label[class_id] for class_id in class_labels[: len(classes)].tolist()]
    save_image(make_grid(torch.stack(tiles), [name for name, *_ in rows], columns), output_dir / "rules.png")
    header = ["rule", "Fréchet distance", *metrics[1:], "saturated", "evaluations per image"]
    return (
        f"## Rules at w = {format_number(w)} on {config.model_name}\n\n{num_samples} samples, "
        f"{config.num_inference_steps} steps of UniPC. Saturated: the fraction of pixels that are 0 or 255; "
        f"{saturated(dataset.images):.3f} for the real images.\n\n" + table(header, rows)
    )


def rules_of(config: EvaluationConfig, pipeline: CFGPipeline) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the call arguments of each guidance rule. Only the last rule uses the guide."""
    (w,), guide_unet = guidance_scales(config, pipeline), pipeline.guide_unet
    guiders, original = diffusers.guiders, {"guidance_scale": w, "use_original_formulation": True}
    calls: dict[str, dict[str, Any]] = {
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
    autoguidance = "autoguidance by --guide_model"
    if guide_unet is not None:
        calls[autoguidance] = {"guidance_scale": w}
    for name, call in calls.items():
        pipeline.guide_unet = guide_unet if name == autoguidance else None
        yield name, {**call, "num_inference_steps": config.num_inference_steps}


def saturated(images: torch.Tensor) -> float:
    """Return the fraction of pixel values of uint8 images that are 0 or 255."""
    return ((images == 0) | (images == 255)).float().mean().item()
