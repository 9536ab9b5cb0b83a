"""Write the model card of a saved pipeline from its files and the files of its training run."""

import json
import re
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .model_files import (
    CONFIG,
    CURVES,
    EVALUATION,
    GRID,
    INDEX,
    LIKELIHOOD,
    LIKELIHOOD_TABLE,
    RUN,
    SAMPLES,
    SCHEDULE_FIGURE,
    SCHEDULE_PICTURE,
    TABLE,
    TRAINING_FIGURE,
    VARIANCE_FIGURE,
    find_samples,
    read_json,
)

# The largest number of classes with a picture of their own.
MAX_PICTURES = 8

CAPTIONS = {
    SAMPLES: "One row per class, one column per guidance scale w",
    GRID: "One row per guidance scale w; each column uses the same noise",
}

SCHEDULE_CAPTION = "The noise schedule between its ends, beside three others: −log SNR and SNR over time"
LIKELIHOOD_FIGURES = {
    SCHEDULE_FIGURE: SCHEDULE_CAPTION,
    VARIANCE_FIGURE: "The variance of the loss over time, for several noise schedules",
    TRAINING_FIGURE: "Bits per dimension over training",
}

# The Hub's identifiers of the metrics that it knows.
METRIC_TYPES = {"FID": "fid", "KID": "kid", "IS": "inception_score", "Fréchet distance": "frechet_distance"}

# The text between these markers is replaced at every push; the rest of the card belongs to its author. Published cards
# are recognized by END and by the first words of BEGIN, so neither may change.
BEGIN = "<!-- Written by diffusers-cfg and replaced at every push. Add your own text below the end marker. -->"
END = "<!-- End of what diffusers-cfg writes. -->"

GUIDANCE_PAPER = """@article{ho2022classifier,
  title   = {Classifier-Free Diffusion Guidance},
  author  = {Ho, Jonathan and Salimans, Tim},
  journal = {arXiv:2207.12598},
  year    = {2022}
}"""
VARIATIONAL_PAPER = """@article{kingma2021variational,
  title   = {Variational Diffusion Models},
  author  = {Kingma, Diederik P. and Salimans, Tim and Poole, Ben and Ho, Jonathan},
  journal = {arXiv:2107.00630},
  year    = {2021}
}"""


def class_picture(class_id: int) -> str:
    """Return the name of the picture of a class in the repository."""
    return f"samples/class-{class_id}.png"


def example_classes(index: dict[str, Any], run: dict[str, Any]) -> list[int]:
    """Return the ids of the first classes with a name that had images in training."""
    absent = run.get("method", {}).get("classes_without_images", [])
    named = sorted(int(class_id) for class_id in index.get("id2label") or {})
    return [class_id for class_id in named if class_id not in absent][:MAX_PICTURES]


def model_card(folder: Path, repo_id: str, existing: str | None = None, pictured: Collection[int] = ()) -> str:
    """
    Return the model card of a saved pipeline.

    Args:
        folder (`Path`): Saved pipeline. `run.json`, `evaluation/` and samples are read if they exist.
        repo_id (`str`): Repository or folder from which the card's examples load the pipeline.
        existing (`str`, *optional*): Current card of the repository. The text outside the markers is kept, and so is
            metadata that this function does not write.
        pictured (`Collection[int]`): Classes of which the repository has a `class_picture`.

    Returns:
        `str`: The card: YAML metadata and Markdown. Unknown facts are omitted.
    """
    index, run, evaluation, likelihood = (read_json(folder / name) for name in (INDEX, RUN, EVALUATION, LIKELIHOOD))
    unet, scheduler = (
        read_json(folder / "unet" / "config.json"),
        read_json(folder / "scheduler" / "scheduler_config.json"),
    )
    has_samples = find_samples(folder) is not None

    # The Hub's button "Use this model" prints `pipe(TEXT)` with the text of the first entry.
    names, gallery = index.get("id2label") or {}, {SAMPLES: has_samples, GRID: (folder / GRID).is_file()}
    widget = [
        {"text": names[str(class_id)], **({"output": {"url": class_picture(class_id)}} if class_id in pictured else {})}
        for class_id in example_classes(index, run)
    ]
    widget += [{"text": CAPTIONS[name], "output": {"url": name}} for name, exists in gallery.items() if exists]
    data = card_metadata(repo_id, run, evaluation, likelihood, widget)
    sections = [
        introduction(repo_id, index, unet, run, has_samples, is_variational(scheduler, unet)),
        usage_section(repo_id, index, run),
        guidance_section(index, unet),
        classes_section(index),
        training_section(index, unet, scheduler, run),
        schedule_section(folder),
        reproduction_section(run),
        results_section(folder),
        likelihood_section(folder),
        LIMITS,
        citation_section(is_variational(scheduler, unet)),
    ]
    body = "\n\n".join([BEGIN, *(section for section in sections if section), END])
    if existing is None:
        return f"---\n{data.to_yaml()}\n---\n\n{body}\n"

    card = ModelCard(existing, ignore_metadata_errors=True)
    data = ModelCardData(**{**card.data.to_dict(), **data.to_dict()}, ignore_metadata_errors=True)
    before, *rest = re.split(r"<!-- Written by diffusers-cfg\b.*?-->", card.text, maxsplit=1)
    _, end, after = "".join(rest).partition(END)
    if not end:  # a card that this package did not write
        before, after = "", card.text
    text = f"{before.strip()}\n\n{body}\n\n{after.strip()}".strip()
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def card_metadata(
    repo_id: str,
    run: dict[str, Any],
    evaluation: dict[str, Any],
    likelihood: dict[str, Any],
    widget: list[dict[str, Any]],
) -> ModelCardData:
    """Return the card's metadata: license, dataset, gallery, and the results at w = 0 and at the best w."""
    facts: dict[str, Any] = {}
    if run.get("license"):
        facts["license"] = run["license"]
    if run.get("dataset_id"):
        facts["datasets"] = [run["dataset_id"]]
    if run.get("base_model"):
        facts["base_model"] = run["base_model"]
    if widget:
        facts["widget"] = widget
    measured = sample_metrics(evaluation) + likelihood_metrics(likelihood)
    if measured and run.get("dataset"):
        facts["model_name"] = repo_id.split("/")[-1]
        facts["eval_results"] = [
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=run.get("dataset_id") or run["dataset"],
                dataset_name=run["dataset"],
                metric_type=METRIC_TYPES.get(metric) or metric.replace(" ", "_"),
                metric_name=f"{metric} {conditions}",
                metric_value=round(value, 4),
            )
            for metric, conditions, value in measured
        ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "diffusers-cfg", "classifier-free-guidance", "class-conditional", "image-generation"],
        **facts,
    )


def sample_metrics(evaluation: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return the name, the conditions and the value of each metric of samples at w = 0 and at the best w."""
    if not evaluation:
        return []
    return [
        (
            name,
            f"at w = {row['guidance_scale']:g}, {evaluation['num_samples']} samples, "
            f"{row['network_evaluations']:g} network evaluations, features of "
            f"{evaluation['feature_extractor']['name']}",
            row[metric],
        )
        for row in evaluation["results"]
        if row["guidance_scale"] in {0, *evaluation["best"].values()}  # the table has all of them
        for metric, name in evaluation["metric_names"].items()
        if metric in row
    ]


def likelihood_metrics(likelihood: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return the name, the conditions and the value of the bound on p(x|c), or p(x), with the most steps."""
    if not likelihood:
        return []
    try:
        row = likelihood["results"][-1]
        name, bound = ("p(x|c)", row["conditional"]) if "conditional" in row else ("p(x)", row["null"])
        steps, number = row["diffusion_steps"] or "∞", bound["num_images"]
        conditions = f"of {name}, T = {steps}, {number} images, {likelihood['images']}"
        return [("bits per dimension", conditions, float(bound["bits_per_dim"]))]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{LIKELIHOOD} is damaged. Evaluate the model again, or delete the file.") from error


def is_variational(scheduler: dict[str, Any], unet: dict[str, Any]) -> bool:
    """Return whether a model is a variational diffusion model: by its noise process, and not a student of one."""
    schedule = scheduler.get("log_snr_schedule", scheduler.get("_log_snr_schedule"))
    return schedule == "linear" and unet.get("max_guidance_scale") is None


def introduction(repo_id: str, index: dict, unet: dict, run: dict, has_samples: bool, variational: bool) -> str:
    """Return the title, a sentence about the model, and its samples."""
    size, channels = unet["sample_size"], unet["in_channels"]
    height, width = (size, size) if isinstance(size, int) else size
    kind = (
        "latents"
        if index.get("vae", [None])[0]
        else {1: "grayscale images", 3: "colour images"}.get(channels, "images")
    )
    data = f" of {run['dataset']}" if run.get("dataset") else ""
    name = "[variational diffusion model](https://arxiv.org/abs/2107.00630)" if variational else "diffusion model"
    text = (
        f"# {repo_id.split('/')[-1]}\n\nA class-conditional {name} of {height}×{width} {kind}{data}, "
        f"{unet['num_class_embeds'] - 1} classes, trained for "
        f"[classifier-free guidance](https://arxiv.org/abs/2207.12598) with {package_link()}."
    )
    if has_samples:
        text += f"\n\n![{CAPTIONS[SAMPLES]}]({SAMPLES})"
    return text


def package_link() -> str:
    """Return the name of this package, with a link to its repository if the package's metadata has an address."""
    try:
        urls = metadata("diffusers-cfg").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    addresses = [url.partition(", ")[2] for url in urls]
    return next((f"[diffusers-cfg]({url})" for url in addresses if url.startswith("https://")), "diffusers-cfg")


def usage_section(repo_id: str, index: dict[str, Any], run: dict[str, Any]) -> str:
    """Return code that loads the model with and without remote code."""
    names = [index["id2label"][str(class_id)] for class_id in example_classes(index, run)]
    label = json.dumps(names[0] if names else 0, ensure_ascii=False)
    scale = "" if has_guider(index) else ", guidance_scale=1.0"
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


def has_guider(index: dict) -> bool:
    """Return whether the pipeline was saved with a diffusers guider."""
    return bool(index.get("guider", [None])[0])


def guidance_section(index: dict[str, Any], unet: dict[str, Any]) -> str:
    """Explain `guidance_scale` for this model."""
    if unet.get("max_guidance_scale") is not None:
        return (
            f"`guidance_scale` is the paper's w, in 0 … {unet['max_guidance_scale']:g}. The model was distilled "
            "([Meng et al. 2023](https://arxiv.org/abs/2210.03142)): it predicts ε̃ = (1 + w) ε(z, c) − w ε(z) with one "
            "network evaluation per step instead of two. Most other diffusers pipelines take s = 1 + w."
        )
    if has_guider(index):
        return (
            f"The pipeline uses diffusers' `{index['guider'][1]}`, which has its own rule and scale. Set "
            "`pipe.guider = None` to guide with `guidance_scale`, the paper's w."
        )
    text = (
        "`guidance_scale` is the paper's w: ε̃ = (1 + w) ε(z, c) − w ε(z). 0 is the plain conditional model and −1 the "
        "plain unconditional one. Most other diffusers pipelines take s = 1 + w."
    )
    if index.get("conditioning_dropout_prob") == 0:
        text += " **This model was trained without label dropout and cannot be guided. Use 0.**"
    if index.get("guide_unet", [None])[0]:
        text += " A second, weaker network in `guide_unet` replaces ε(z): autoguidance (arXiv 2406.02507)."
    return text


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
    index: dict[str, Any], unet: dict[str, Any], scheduler: dict[str, Any], run: dict[str, Any]
) -> str:
    """Return a table of facts about the training run."""
    seconds, precision, method = run.get("seconds"), run.get("mixed_precision"), run.get("method", {})
    duration = None
    if seconds is not None:
        duration = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
    # `LogSNRScheduler.solver` makes the names private for diffusers' schedulers
    low, high = (scheduler.get(name, scheduler.get(f"_{name}")) for name in ("log_snr_min", "log_snr_max"))
    steps = index.get("num_inference_steps")
    facts = {
        "dataset": run.get("dataset"),
        "images": run.get("num_images"),
        "pretrained model": run.get("base_model"),
        "label dropout p_uncond": index.get("conditioning_dropout_prob"),
        "prediction type": scheduler.get("prediction_type"),
        "noise schedule": method.get("noise_schedule"),
        "loss weighting": method.get("loss_weighting"),
        "log-SNR λ": f"{low:.4g} … {high:.4g}" if low is not None else None,
        "sampler": f"{index['scheduler'][1]}, {steps} steps by default" if steps else None,
        "parameters": f"{run['num_parameters'] / 1e6:.1f} M" if "num_parameters" in run else None,
        "channels": ", ".join(map(str, unet["block_out_channels"])),
        "steps": run.get("steps"),
        "batch size": run.get("batch_size"),
        "peak learning rate": run.get("learning_rate"),
        "EMA decay": run.get("ema"),
        "precision": "fp32" if precision == "no" else precision,
        "hardware": run.get("hardware"),
        "training time": duration,
        "seed": run.get("seed"),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(rows)


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
    if "config" in run:
        text += f"\n\n[{CONFIG}]({CONFIG}) has all settings that affect the weights, in the format of `--config`."
    return text


def results_section(folder: Path) -> str:
    """Return the table and figures of the evaluation; empty if there was none."""
    if not (folder / TABLE).is_file():
        return ""
    text = f"## Results\n\n{(folder / TABLE).read_text(encoding='utf-8').strip()}"
    if (folder / CURVES).is_file():
        text += f"\n\n![Metrics as a function of the guidance scale]({CURVES})"
    if (folder / GRID).is_file():
        text += f"\n\n![{CAPTIONS[GRID]}]({GRID})"
    return text


def likelihood_section(folder: Path) -> str:
    """Return the table and figures of the likelihood; empty if it was not evaluated."""
    if not (folder / LIKELIHOOD_TABLE).is_file():
        return ""
    text = f"## Likelihood\n\n{(folder / LIKELIHOOD_TABLE).read_text(encoding='utf-8').strip()}"
    figures = [f"![{title}]({name})" for name, title in LIKELIHOOD_FIGURES.items() if (folder / name).is_file()]
    return "\n\n".join([text, *figures])


def citation_section(variational: bool) -> str:
    """Return the papers to cite."""
    papers = [GUIDANCE_PAPER, VARIATIONAL_PAPER] if variational else [GUIDANCE_PAPER]
    return "\n\n".join(["## Citation", *(f"```bibtex\n{paper}\n```" for paper in papers)])


LIMITS = """## Intended use and limits

This model is intended for research and education. It reproduces the gaps and biases of its training data. A larger w
makes samples more typical of their class and less diverse. `device_map="balanced"` is not supported if the model is
loaded with remote code."""
