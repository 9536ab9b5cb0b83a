"""Write the sections of a model card."""

import json
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Literal

from .citations import (
    CLASSIFIER_PAPER,
    DISTILLATION_PAPER,
    GAN_PAPER,
    GUIDANCE_PAPER,
    ONE_PASS_PAPER,
    VARIATIONAL_PAPER,
)
from .model_files import (
    CONFIG,
    CURVES,
    GRID,
    LIKELIHOOD_TABLE,
    NULL_CLASS,
    SAMPLES,
    SCHEDULE_FIGURE,
    SCHEDULE_PICTURE,
    TABLE,
    TRAINING_FIGURE,
    VARIANCE_FIGURE,
    example_classes,
)

# "generator" is that of a denoising diffusion GAN.
Kind = Literal["diffusion", "variational", "generator"]
NAMES: dict[Kind, str] = {
    "diffusion": "diffusion model",
    "variational": "[variational diffusion model](https://arxiv.org/abs/2107.00630)",
    "generator": "[denoising diffusion GAN](https://arxiv.org/abs/2112.07804)",
}

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
SCHEDULE_CAPTION = "The noise schedule between its ends, beside three others: −log SNR and SNR over time"
LIKELIHOOD_FIGURES = {
    SCHEDULE_FIGURE: SCHEDULE_CAPTION,
    VARIANCE_FIGURE: "The variance of the loss over time, for several noise schedules",
    TRAINING_FIGURE: "Bits per dimension over training",
}
PAPERS: dict[Kind, list[str]] = {
    "diffusion": [GUIDANCE_PAPER],
    "variational": [GUIDANCE_PAPER, VARIATIONAL_PAPER],
    "generator": [GAN_PAPER, GUIDANCE_PAPER],
}
# How a network has learned to take w, and the paper, by a fact that its run has recorded. A student has both.
ONE_PASS_SOURCES = {
    "student_steps": (
        ", which it was taught by a teacher ([Meng et al. 2023](https://arxiv.org/abs/2210.03142))",
        DISTILLATION_PAPER,
    ),
    "max_guidance_scale": (
        ", for which it was trained ([Chen et al. 2025](https://arxiv.org/abs/2501.15420))",
        ONE_PASS_PAPER,
    ),
}


def model_kind(scheduler: dict[str, Any], unet: dict[str, Any]) -> Kind:
    """Return the kind of a model by its configs. A student of a variational diffusion model is a diffusion model."""
    if unet.get("latent_dim") is not None:
        return "generator"
    schedule = scheduler.get("log_snr_schedule", scheduler.get("_log_snr_schedule"))
    return "variational" if schedule == "linear" and unet.get("max_guidance_scale") is None else "diffusion"


def is_unconditional(unet: dict[str, Any]) -> bool:
    """Return whether a network takes no class labels, so that only a classifier can guide it."""
    return unet["num_class_embeds"] is None


def one_pass_source(run: dict[str, Any]) -> tuple[str, str]:
    """Return how the network of a run has learned to take w, and the paper; empty if the run has not recorded it."""
    return next((source for fact, source in ONE_PASS_SOURCES.items() if fact in run.get("method", {})), ("", ""))


def has_component(index: dict[str, Any], name: str) -> bool:
    """Return whether a pipeline was saved with an optional component."""
    return bool(index.get(name, [None])[0])


def trained_classifier(run: dict[str, Any]) -> bool:
    """Return whether a run trained the classifier of its pipeline, and not the diffusion model."""
    return run.get("method", {}).get("trained_network") == "classifier"


def by_rule(evaluation: dict[str, Any]) -> str:
    """Return words that name the rule of guidance of an evaluation; empty for classifier-free guidance."""
    rule = evaluation.get("guidance", {}).get("rule")
    return f" by the rule {rule}" if rule else ""


def grid_caption(evaluation: dict[str, Any]) -> str:
    """Return the caption of the grid of samples of an evaluation."""
    return f"One row per guidance scale w{by_rule(evaluation)}; each column uses the same noise"


def samples_caption(run: dict[str, Any], kind: Kind) -> str:
    """Return the caption of the samples of a training run."""
    columns = "columns of different noise" if kind == "generator" else "one column per guidance scale w"
    return f"One row per class, {columns}{' of the classifier' if trained_classifier(run) else ''}"


def introduction(
    repo_id: str, index: dict, unet: dict, classifier: dict, run: dict, has_samples: bool, kind: Kind
) -> str:
    """Return the title, a sentence about the model, and its samples."""
    size, channels = unet["sample_size"], unet["in_channels"]
    height, width = (size, size) if isinstance(size, int) else size
    images = (
        "latents"
        if index.get("vae", [None])[0]
        else {1: "grayscale images", 3: "colour images"}.get(channels, "images")
    )
    data = f" of {run['dataset']}" if run.get("dataset") else ""
    num_classes = classifier["num_classes"] if is_unconditional(unet) else unet["num_class_embeds"] - 1
    classes, article = f", {num_classes} classes", "A class-conditional"
    if example_classes(index, run) == [NULL_CLASS]:
        classes = ""
    if not classes or is_unconditional(unet):
        article = "An unconditional"
    guided = kind != "generator" and not is_unconditional(unet)
    trained = " for [classifier-free guidance](https://arxiv.org/abs/2207.12598)" if guided else ""
    trained = f"trained{trained} with {package_link()}"
    if classifier:
        trained += ". It has a classifier of noisy images, for [classifier guidance](https://arxiv.org/abs/2105.05233)"
    text = (
        f"# {repo_id.split('/')[-1]}\n\n{article} {NAMES[kind]} of {height}×{width} {images}{data}{classes}, {trained}."
    )
    if has_samples:
        text += f"\n\n![{samples_caption(run, kind)}]({SAMPLES})"
    return text


def package_link() -> str:
    """Return the name of this package, with a link to its repository if the package's metadata has an address."""
    try:
        urls = metadata("diffusers-cfg").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    addresses = [url.partition(", ")[2] for url in urls]
    return next((f"[diffusers-cfg]({url})" for url in addresses if url.startswith("https://")), "diffusers-cfg")


def example_scales(index: dict[str, Any], unet: dict[str, Any], kind: Kind) -> str:
    """Return the scales of the examples, which amount to w = 1."""
    if has_component(index, "guider") or kind == "generator":
        return ""
    if not has_component(index, "classifier") or unet.get("max_guidance_scale") is not None:
        return ", guidance_scale=1.0"
    if is_unconditional(unet):
        return ", classifier_guidance_scale=2.0"
    return ", guidance_scale=0.0, classifier_guidance_scale=1.0"


def usage_section(repo_id: str, index: dict[str, Any], unet: dict[str, Any], run: dict[str, Any], kind: Kind) -> str:
    """Return code that loads the model with and without remote code."""
    class_id = example_classes(index, run)[0]
    label = json.dumps((index.get("id2label") or {}).get(str(class_id), class_id), ensure_ascii=False)
    scale = example_scales(index, unet, kind)
    return f"""## Use

The Hub's button "Use this model" leaves out `trust_remote_code=True`, without which diffusers cannot load this model.

With diffusers only. This runs the code in the repository, so read it first:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
image = pipe(class_labels=[{label}]{scale}).images[0]
```

With the package diffusers-cfg. This does not run code from the repository:

```python
from diffusers_cfg import CFGPipeline

pipe = CFGPipeline.from_pretrained("{repo_id}")
image = pipe(class_labels=[{label}]{scale}).images[0]
```"""


def guidance_section(index: dict[str, Any], unet: dict[str, Any], scheduler: dict[str, Any], run: dict) -> str:
    """Explain `guidance_scale` and `classifier_guidance_scale` for this model."""
    if unet.get("max_guidance_scale") is not None:
        source, _ = one_pass_source(run)
        return (
            f"`guidance_scale` is the paper's w, in 0 … {unet['max_guidance_scale']:g}. The model takes w as an input, "
            f"and predicts ε̃ = (1 + w) ε(z, c) − w ε(z) with one network evaluation per step instead of two{source}. "
            "Most other diffusers pipelines take s = 1 + w."
        )
    if is_unconditional(unet):
        return (
            "`classifier_guidance_scale` is the scale s of "
            "[classifier guidance](https://arxiv.org/abs/2105.05233): ε̃ = ε(z) − s σ ∇ log p(c | z). The diffusion "
            "model takes no labels, and `class_labels` are for the classifier alone. The default 1 samples p(x | c) "
            "if the classifier is exact, and s = 1 + w is then classifier-free guidance at w."
        )
    if has_component(index, "guider"):
        return (
            f"The pipeline uses diffusers' `{index['guider'][1]}`, which has its own rule and scale. Set "
            "`pipe.guider = None` to guide with `guidance_scale`, the paper's w."
        )
    if unet.get("latent_dim") is not None:
        return generator_section(index, scheduler["num_train_timesteps"], example_classes(index, run) == [NULL_CLASS])
    text = (
        "`guidance_scale` is the paper's w: ε̃ = (1 + w) ε(z, c) − w ε(z). 0 is the plain conditional model and −1 the "
        "plain unconditional one. Most other diffusers pipelines take s = 1 + w."
    )
    without_dropout = index.get("conditioning_dropout_prob") == 0
    if without_dropout:
        text += " **This model was trained without label dropout and cannot be guided by itself. Use 0.**"
    if has_component(index, "guide_unet"):
        text += " A second, weaker network in `guide_unet` replaces ε(z): autoguidance (arXiv 2406.02507)."
    if has_component(index, "classifier"):
        unconditional = "" if without_dropout else "`guidance_scale=-1, classifier_guidance_scale=1 + w` and "
        text += (
            "\n\n`classifier_guidance_scale` is the scale s of [classifier guidance]"
            "(https://arxiv.org/abs/2105.05233), which subtracts s σ ∇ log p(c | z) from the ε̃ above. It is 0 by "
            "default. Other values take one gradient of the classifier per step. If the classifier were exact, "
            f"{unconditional}`guidance_scale=0, classifier_guidance_scale=w` would sample as classifier-free guidance "
            "at w."
        )
    return text


def generator_section(index: dict[str, Any], num_timesteps: int, is_unlabelled: bool) -> str:
    """Explain the steps and `guidance_scale` of a generator."""
    evaluations = "one evaluation" if num_timesteps == 1 else f"{num_timesteps} evaluations, one per step,"
    text = (
        f"An image takes {evaluations} of the generator, which was trained for these steps: the pipeline takes no "
        "other number of steps and no other scheduler."
    )
    if is_unlabelled:
        return f"{text} It was trained without labels: pass `class_labels=-1`, the null class."
    text += " `guidance_scale`, w, is 0 by default. −1 is the plain unconditional generator."
    if index.get("conditioning_dropout_prob") == 0:
        return f"{text} **This model was trained without label dropout and cannot be guided. Use 0.**"
    return (
        f"{text} Other values extrapolate x̂ = (1 + w) G(xₜ, z, t, c) − w G(xₜ, z, t, ∅), clipped to [−1, 1], with two "
        "evaluations per step. G returns samples, whereas the predictions that guidance was made for are means, so "
        "this can raise the class accuracy, and lowers the fidelity."
    )


def classes_section(index: dict[str, Any], max_rows: int = 1000) -> str:
    """Return a table of the class names with at most `max_rows` rows; empty if the classes have no names."""
    id2label = index.get("id2label") or {}
    if not id2label:
        return ""
    names = sorted((int(class_id), name.replace("|", r"\|")) for class_id, name in id2label.items())
    rows = [f"| {class_id} | {name} |" for class_id, name in names]
    more = f"\n\n… {len(rows)} in total." if len(rows) > max_rows else ""
    return "## Classes\n\n| id | name |\n|---|---|\n" + "\n".join(rows[:max_rows]) + more


def training_section(
    index: dict[str, Any],
    unet: dict[str, Any],
    classifier: dict[str, Any],
    scheduler: dict[str, Any],
    run: dict[str, Any],
    kind: Kind,
) -> str:
    """Return a table of facts about the training run: that of the diffusion model, or of the classifier."""
    seconds, precision, method = run.get("seconds"), run.get("mixed_precision"), run.get("method", {})
    duration = None
    if seconds is not None:
        duration = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
    # `LogSNRScheduler.solver` makes the names private for diffusers' schedulers
    low, high = (scheduler.get(name, scheduler.get(f"_{name}")) for name in ("log_snr_min", "log_snr_max"))
    steps, rate = index.get("num_inference_steps"), run.get("learning_rate")
    if "learning_rate_discriminator" in method:
        rate = f"{rate}, discriminator {method['learning_rate_discriminator']}"
    by_default = "" if kind == "generator" else " by default"
    of_classifier, network, owner, local, note = trained_classifier(run), unet, "", None, ""
    if of_classifier:
        network, owner, local = classifier, " of the classifier", "a local folder"
        note = "This is the training of the classifier. The diffusion model was trained before and is unchanged.\n\n"
    facts = {
        "dataset": run.get("dataset"),
        "images": run.get("num_images"),
        "diffusion model" if of_classifier else "pretrained model": run.get("base_model", local),
        "label dropout p_uncond": None if of_classifier else index.get("conditioning_dropout_prob"),
        "prediction type": None if of_classifier else scheduler.get("prediction_type"),
        "denoising steps T": scheduler.get("num_train_timesteps") if kind == "generator" else None,
        "latent dimension": unet.get("latent_dim"),
        "loss": method.get("loss", "").replace("_", "-") or None,
        "penalty": penalty(method),
        "noise schedule": method.get("noise_schedule"),
        "loss weighting": method.get("loss_weighting"),
        "log-SNR λ": f"{low:.4g} … {high:.4g}" if low is not None else None,
        "sampler": f"{index['scheduler'][1]}, {steps} step{'s' * (steps > 1)}{by_default}" if steps else None,
        f"parameters{owner}": f"{run['num_parameters'] / 1e6:.1f} M" if "num_parameters" in run else None,
        f"channels{owner}": ", ".join(map(str, network["block_out_channels"])),
        "steps": run.get("steps"),
        "batch size": run.get("batch_size"),
        "optimizer": OPTIMIZERS.get((run.get("config") or {}).get("optimizer", "")),
        "peak learning rate": rate,
        "EMA decay": run.get("ema"),
        "post-hoc EMA σ_rel": run.get("posthoc_ema", {}).get("sigma_rel"),
        "precision": "fp32" if precision == "no" else precision,
        "hardware": run.get("hardware"),
        "training time": duration,
        "seed": run.get("seed"),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return f"## Training\n\n{note}| | |\n|---|---|\n" + "\n".join(rows)


def accuracy_section(run: dict[str, Any]) -> str:
    """Return a table of the accuracy of the classifier by the noise of the images; empty if it was not measured."""
    accuracy = run.get("method", {}).get("classifier_accuracy")
    if not accuracy:
        return ""
    levels = [name.removeprefix("log_snr_").replace("_to_", " … ").replace("-", "−") for name in accuracy]
    rows = [f"| {level} | {value:.2f} |" for level, value in zip(levels, accuracy.values(), strict=True)]
    text = "Accuracy of the classifier on held-out images, by the log-SNR λ of their noise:"
    return f"{text}\n\n| λ | accuracy |\n|---|---|\n" + "\n".join(rows)


def penalty(method: dict[str, Any]) -> str | None:
    """Return the gradient penalty of a discriminator; `None` if there was none."""
    gamma, interval = method.get("r1_gamma"), method.get("lazy_reg")
    if not gamma:
        return None
    name = "R1 and R2" if method.get("loss") == "relativistic" else "R1"
    return f"{name}, γ = {gamma}, every {f'{interval} steps' if interval != 1 else 'step'}"


def schedule_section(folder: Path) -> str:
    """Return the picture of the noise schedule of a training run; empty if there is none, or the evaluation has it."""
    if not (folder / SCHEDULE_PICTURE).is_file() or (folder / SCHEDULE_FIGURE).is_file():
        return ""
    return f"![{SCHEDULE_CAPTION}]({SCHEDULE_PICTURE})"


def reproduction_section(run: dict[str, Any]) -> str:
    """Return the versions, the command and the settings of the training run; empty if they are not known."""
    if "versions" not in run:
        return ""
    own, *others = (f"{name} {version}" for name, version in run["versions"].items())
    text = f"## Reproduce\n\nTrained with {own.replace('diffusers-cfg', package_link())}, {' and '.join(others)}"
    text += f":\n\n```bash\n{run['command']}\n```" if "command" in run else "."
    if "command" in run and trained_classifier(run):
        # The command has the last component of a local path, which looks like a name
        model = f"{run['base_model']} on the Hub" if "base_model" in run else "a local folder"
        text += f"\n\nThe diffusion model of the command, `--pretrained_model_name_or_path`, is {model}."
    if "config" in run:
        text += f"\n\n[{CONFIG}]({CONFIG}) has all settings that affect the weights, in the format of `--config`."
    return text


def results_section(folder: Path, evaluation: dict[str, Any]) -> str:
    """Return the table and figures of the evaluation; empty if there was none."""
    if not (folder / TABLE).is_file():
        return ""
    text = f"## Results\n\n{(folder / TABLE).read_text(encoding='utf-8').strip()}"
    if (folder / CURVES).is_file():
        text += f"\n\n![Metrics as a function of the guidance scale{by_rule(evaluation)}]({CURVES})"
    if (folder / GRID).is_file():
        text += f"\n\n![{grid_caption(evaluation)}]({GRID})"
    return text


def likelihood_section(folder: Path) -> str:
    """Return the table and figures of the likelihood; empty if it was not evaluated."""
    if not (folder / LIKELIHOOD_TABLE).is_file():
        return ""
    text = f"## Likelihood\n\n{(folder / LIKELIHOOD_TABLE).read_text(encoding='utf-8').strip()}"
    figures = [f"![{title}]({name})" for name, title in LIKELIHOOD_FIGURES.items() if (folder / name).is_file()]
    return "\n\n".join([text, *figures])


def limits_section(kind: Kind) -> str:
    """Return the intended use of the model, and its limits."""
    return LIMITS.format(variety=GAN_VARIETY if kind == "generator" else GUIDED_VARIETY)


def citation_section(index: dict[str, Any], run: dict[str, Any], kind: Kind) -> str:
    """Return the papers to cite."""
    _, one_pass = one_pass_source(run)
    papers = [*PAPERS[kind], one_pass, CLASSIFIER_PAPER if has_component(index, "classifier") else ""]
    return "\n\n".join(["## Citation", *(f"```bibtex\n{paper}\n```" for paper in papers if paper)])


LIMITS = """## Intended use and limits

This model is intended for research and education. It reproduces the gaps and biases of its training data. {variety} \
`device_map="balanced"` is not supported if the model is
loaded with remote code."""
GUIDED_VARIETY = "A larger w\nmakes samples more typical of their class and less diverse."
GAN_VARIETY = "Like\nother GANs, it may leave out some of the variety of that data."
