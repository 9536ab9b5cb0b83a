"""Measure the models of the ablation of variational diffusion models, and write its tables and its figure."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from diffusers_cfg import CFGPipeline
from diffusers_cfg.evaluation.likelihood import PARTS
from diffusers_cfg.evaluation.likelihood_reports import with_error
from diffusers_cfg.evaluation.likelihood_run import TermSet, run_likelihood, term_folder
from diffusers_cfg.evaluation.likelihood_summary import standard_error
from diffusers_cfg.evaluation.loss_variance import LEAST
from diffusers_cfg.evaluation.reports import (
    caption,
    cell,
    new_figure,
    save_figure,
    spread,
    table,
    write_json,
    write_text,
)
from diffusers_cfg.evaluation.schedule_figures import LEARNED
from diffusers_cfg.evaluation.settings import EvaluationConfig, LikelihoodConfig, format_number
from diffusers_cfg.evaluation.sweep import check_folders, check_sampling, output_folder, run_sweep
from diffusers_cfg.method_settings import VDMConfig
from diffusers_cfg.settings import TrainConfig
from diffusers_cfg.variational_bound import bits_per_dim

# The metrics of samples in the table.
QUALITY = ("frechet_distance", "class_accuracy")
TITLE = "bits/dim of p(x\\|c)"
SEVERAL = "With several seeds, ± is the standard deviation over them instead, except for paired differences."


class Evaluation(NamedTuple):
    """
    The evaluations of one trained model.

    Attributes:
        variant (`str`), seed (`int`): the name of the model's settings, and its training seed.
        held_out (`LikelihoodConfig`), training (`LikelihoodConfig`): the bounds of held-out and of training images.
        samples (`dict[str, EvaluationConfig]`): the evaluation of samples, by sampler.
    """

    variant: str
    seed: int
    held_out: LikelihoodConfig
    training: LikelihoodConfig
    samples: dict[str, EvaluationConfig]


class Measurement(NamedTuple):
    """
    What was measured of one trained model, in bits per dimension.

    Attributes:
        variant (`str`), seed (`int`): the name of the model's settings, and its training seed.
        terms (`dict[str, torch.Tensor]`): the values of each held-out image, `(images,)`: `"conditional"`, the bound of
            p(x|c), its three terms by their names, and `"null"`, that of p(x) by the null class, if the model has one.
            `"training"` is the bound of p(x|c) of training images.
        ends (`tuple[float, float]`): γ₀ and γ₁ of the bound.
        variance (`dict[str, float]`): the variance of the one-sample diffusion term, by shape of γ(t) between these
            ends, and `LEAST`, the least that any shape can have.
        samples (`dict[str, dict[str, Any]]`): the contents of metrics.json, by sampler.
    """

    variant: str
    seed: int
    terms: dict[str, torch.Tensor]
    ends: tuple[float, float]
    variance: dict[str, float]
    samples: dict[str, dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """Return the measurement for JSON, with means and standard errors over images."""
        bounds = {name: {"mean": x.mean().item(), "error": standard_error(x)} for name, x in self.terms.items()}
        ends = {"gamma_0": self.ends[0], "gamma_1": self.ends[1]}
        named = {"variant": self.variant, "seed": self.seed, "bits_per_dim": bounds, **ends}
        samples = {sampler: record["results"] for sampler, record in self.samples.items()}
        return {**named, "loss_variance": self.variance, "samples": samples}


def evaluations_of(
    variant: str, config: TrainConfig, likelihood: LikelihoodConfig, samples: EvaluationConfig, samplers: dict[str, int]
) -> list[Evaluation]:
    """
    Return the evaluations of the model that a variant trains. A model of another process than that of the variational
    diffusion models has two: between the ends of `likelihood`, and over its own process.

    Args:
        variant (`str`): the name of the variant.
        config (`TrainConfig`): its training settings.
        likelihood (`LikelihoodConfig`): the settings of all bounds, with the ends of that of other models.
        samples (`EvaluationConfig`): the settings of all samples.
        samplers (`dict[str, int]`): the schedulers to sample with, and their numbers of steps.
    """
    model, evaluations = Path(config.output_dir), []
    own_ends = replace(likelihood, log_snr_max=None, log_snr_min=None)
    bounds = {variant: own_ends}
    if not isinstance(config, VDMConfig):
        bounds = {variant: likelihood, f"{variant}, own process": own_ends}
    for name, bound in bounds.items():
        held_out, training = (
            replace(bound, model=str(model), images=images, output_dir=str(model / "ablation" / name / images))
            for images in ("held_out", "training")
        )
        sampled = {
            f"{scheduler}, {steps} steps": replace(
                samples,
                model=str(model),
                scheduler=scheduler,
                num_inference_steps=steps,
                output_dir=str(model / "ablation" / f"{scheduler}-{steps}"),
            )
            for scheduler, steps in samplers.items()
        }
        evaluations.append(Evaluation(name, config.seed, held_out, training, {} if evaluations else sampled))
    return evaluations


def check_evaluation(evaluation: Evaluation, pipeline: CFGPipeline, config: TrainConfig) -> None:
    """Raise `UserError` for settings that a pipeline rejects, or folders that cannot be written."""
    for likelihood in (evaluation.held_out, evaluation.training):
        check_folders(likelihood, vars(config))
    for samples in evaluation.samples.values():
        check_sampling(samples, pipeline)
        check_folders(samples, vars(config))


def measure(evaluation: Evaluation, accelerator: Accelerator) -> Measurement | None:
    """
    Evaluate a trained model. Existing terms and samples are reused.

    Returns:
        `Measurement`: what was measured, on the main process; `None` on the others.
    """
    held_out, training = (run_likelihood(config, accelerator) for config in (evaluation.held_out, evaluation.training))
    sweeps = {sampler: run_sweep(config, accelerator) for sampler, config in evaluation.samples.items()}
    if not accelerator.is_main_process:
        return None
    terms = bits_of(evaluation.held_out, held_out)
    terms["training"] = bits_of(evaluation.training, training)["conditional"]
    ends = -held_out["log_snr_max"], -held_out["log_snr_min"]
    return Measurement(evaluation.variant, evaluation.seed, terms, ends, held_out["variance"], sweeps)


def bits_of(config: LikelihoodConfig, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the terms and the bounds of each image in bits/dim, from the files of an evaluation and its record."""
    nats = TermSet(term_folder(output_folder(config), 0), record["num_images"]).load_all()
    labelled = ~nats.given_class.isnan()
    values = {
        "conditional": nats.given_class[labelled],
        "prior": nats.prior[labelled],
        "reconstruction": nats.reconstruction[labelled],
        "diffusion": nats.diffusion[labelled, 0],
    }
    if "null" in record["results"][0]:
        values["null"] = nats.prior + nats.reconstruction + nats.diffusion[:, 1]
    bits = bits_per_dim(record["image_shape"])
    return {name: bits * value for name, value in values.items()}


def write_ablation(measurements: list[Measurement], likelihood: LikelihoodConfig, output_dir: Path) -> str:
    """
    Write ablation.json, table.md, quality.md and bits_per_dim.png.

    Args:
        measurements (`list[Measurement]`): what was measured of the models.
        likelihood (`LikelihoodConfig`): the settings that all bounds share.
        output_dir (`Path`): the output folder.

    Returns:
        `str`: the tables.
    """
    write_json({"models": [one.record() for one in measurements]}, output_dir / "ablation.json")
    tables = {"table.md": likelihood_table(measurements, likelihood.times_per_image)}
    if any(one.samples for one in measurements):
        tables["quality.md"] = quality_table(measurements)
    for name, text in tables.items():
        write_text(text, output_dir / name)
    plot_bounds(measurements, output_dir / "bits_per_dim.png")
    return "\n".join(tables.values())


def by_variant(measurements: list[Measurement]) -> dict[str, list[Measurement]]:
    """Return the measurements of each variant, in the order of the variants."""
    variants: dict[str, list[Measurement]] = {}
    for one in measurements:
        variants.setdefault(one.variant, []).append(one)
    return variants


def bound(runs: list[Measurement], name: str) -> str:
    """Format a bound: with one seed ± its standard error over images, with several ± its spread over seeds."""
    if any(name not in run.terms for run in runs):
        return ""
    means = [run.terms[name].mean().item() for run in runs]
    return spread(means) if len(runs) > 1 else with_error(means[0], standard_error(runs[0].terms[name]))


def paired_difference(runs: list[Measurement], others: list[Measurement]) -> tuple[float, float | None] | None:
    """
    Return by how much the bound of p(x|c) of a variant is above that of another, over the same held-out images and the
    seeds that both have, and the standard error over images. Return `None` if they share no seed.
    """
    by_seed = {other.seed: other.terms["conditional"] for other in others}
    differences = [run.terms["conditional"] - by_seed[run.seed] for run in runs if run.seed in by_seed]
    if not differences:
        return None
    per_image = torch.stack(differences).mean(0)
    return per_image.mean().item(), standard_error(per_image)


def likelihood_table(measurements: list[Measurement], times_per_image: int) -> str:
    """
    Return two Markdown tables with a row for each variant: the bounds, and the variance of the loss. Differences are
    those to the first variant.
    """
    variants = by_variant(measurements)
    (baseline, first), *_ = variants.items()
    shapes = list(dict.fromkeys(shape for one in measurements for shape in one.variance if shape != LEAST))
    bounds, variances = [], []
    for variant, runs in variants.items():
        difference = paired_difference(runs, first) if variant != baseline else None
        gaps = [run.terms["conditional"].mean().item() - run.terms["training"].mean().item() for run in runs]
        bounds.append(
            [
                *(variant, str(len(runs)), bound(runs, "conditional")),
                "" if difference is None else with_error(*difference, sign="+"),
                *(spread([run.terms[part].mean().item() for run in runs]) for part in PARTS),
                *(bound(runs, "null"), spread(gaps)),
                *(spread([run.ends[end] for run in runs], 2) for end in (0, 1)),
            ]
        )
        variances.append(
            [
                variant,
                *(spread([run.variance[shape] for run in runs if shape in run.variance], 2) for shape in shapes),
                spread([run.variance[LEAST] for run in runs], 2),
                spread([run.variance["linear"] / run.variance[LEARNED] for run in runs if LEARNED in run.variance], 2),
            ]
        )
    header = ["variant", "seeds", TITLE, f"minus {baseline}", *PARTS, "bits/dim of p(x)", "test − train", "γ₀", "γ₁"]
    several = f" {SEVERAL}" if any(len(runs) > 1 for runs in variants.values()) else ""
    return (
        f"{table(header, bounds)}\n\n"
        f"The bound in continuous time between γ₀ and γ₁, of {len(measurements[0].terms['conditional'])} held-out "
        f"images at {times_per_image} times each; p(x) is by the null class. ± of a bound is its standard error over "
        "images, and ± of a difference that of the paired difference, over the same images and seeds; neither includes "
        "the randomness of training."
        f"{several}\n\n"
        f"{table(['variant', *shapes, LEAST, f'linear / {LEARNED}'], variances)}\n\n"
        "Variance in (bits/dim)² of the diffusion term of one image at one time, under each shape of γ(t) between the "
        f"ends of the bound; {LEARNED} is the shape that the model was trained with, which a weighted loss fits to the "
        "variance of that loss.\n"
    )


def quality_table(measurements: list[Measurement]) -> str:
    """Return a Markdown table of bits/dim beside the Fréchet distance and the accuracy of samples at each w."""
    sampled = [one for one in measurements if one.samples]
    first = next(iter(sampled[0].samples.values()))
    columns = [(metric, number) for metric in QUALITY for number in range(len(first["results"]))]
    rows = [
        [
            *(variant, str(len(runs)), bound(runs, "conditional"), sampler),
            *(
                metric_cell([run.samples[sampler]["results"][number] for run in runs], metric)
                for metric, number in columns
            ),
        ]
        for variant, runs in by_variant(sampled).items()
        for sampler in runs[0].samples
    ]
    rows.append(["real", "", "", "", *(cell(first["floor"], metric) for metric, _ in columns)])
    scales = [format_number(row["guidance_scale"]) for row in first["results"]]
    header = [f"{first['metric_names'][metric]}, w = {scales[number]}" for metric, number in columns]
    several = f" {SEVERAL}" if len(sampled) > len(by_variant(sampled)) else ""
    return (
        f"{table(['variant', 'seeds', TITLE, 'sampler', *header], rows)}\n\n"
        f"{caption(first, 'each sampler with the steps in its row')}{several}\n"
    )


def metric_cell(rows: list[dict[str, Any]], metric: str) -> str:
    """Format a metric of samples: with one seed as in `cell`, with several ± its spread over seeds."""
    return cell(rows[0], metric) if len(rows) == 1 else spread([row[metric] for row in rows if metric in row])


def plot_bounds(measurements: list[Measurement], path: Path) -> None:
    """Plot the bound of p(x|c) of each variant and its standard error, a point for each seed."""
    names, seeds = list(by_variant(measurements)), sorted({one.seed for one in measurements})
    figure = new_figure(size=(7, 0.5 + 0.45 * len(names)))
    (axis,) = figure.axes
    for one in measurements:
        values, number = one.terms["conditional"], seeds.index(one.seed)
        height = names.index(one.variant) + 0.6 * (number + 0.5) / len(seeds) - 0.3  # within 0.3 of the variant's row
        axis.errorbar(values.mean().item(), height, xerr=standard_error(values), fmt="o", color=f"C{number}")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set(xlabel="bits/dim of p(x|c), held-out images")
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
