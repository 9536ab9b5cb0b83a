"""Write a model card from the files of a saved pipeline and of the run that trained it, and from nothing else."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

# Files that a training run and an evaluation write next to the pipeline.
RUN, SAMPLES = "run.json", "samples.png"
EVALUATION, TABLE, CURVES, GRID = (
    f"evaluation/{name}" for name in ("metrics.json", "metrics.md", "curves.png", "grid.png")
)
FACTS = (RUN, EVALUATION, TABLE, CURVES, GRID)

PICTURES = {
    SAMPLES: "A row for each class, a column for each w",
    GRID: "A row for each w, the same noise down each column",
}

# Names in the Hub's index of results, for the metrics that it has.
METRIC_TYPES = {"FID": "fid", "KID": "kid", "IS": "inception_score", "Fréchet distance": "frechet_distance"}

# Text between these marks is replaced at every push; the rest of a card is its author's. A card is recognized by the
# first words of BEGIN.
BEGIN = "<!-- Written by diffusers-cfg and replaced at the next push. Your own text belongs below the end mark. -->"
END = "<!-- End of what diffusers-cfg writes. -->"

CITATION = """```bibtex
@article{ho2022classifier,
  title   = {Classifier-Free Diffusion Guidance},
  author  = {Ho, Jonathan and Salimans, Tim},
  journal = {arXiv:2207.12598},
  year    = {2022}
}
```"""


def model_card(folder: Path, repo_id: str, existing: str | None = None) -> str:
    """
    Return the card of a saved pipeline.

    Args:
        folder (`Path`): Saved pipeline; `run.json`, `evaluation/` and samples are read if they exist.
        repo_id (`str`): Name that the card loads the pipeline by.
        existing (`str`, *optional*): Card of the repository. Its text outside the marks is kept, and metadata that this
            function does not write.

    Returns:
        `str`: Metadata in YAML, and Markdown. Unknown facts are left out.
    """
    index, run, evaluation = (read_json(folder / name) for name in ("model_index.json", RUN, EVALUATION))
    unet, scheduler = (
        read_json(folder / "unet" / "config.json"),
        read_json(folder / "scheduler" / "scheduler_config.json"),
    )
    has_samples = find_samples(folder) is not None

    gallery = {SAMPLES: has_samples, GRID: (folder / GRID).is_file()}
    metadata = card_metadata(repo_id, run, evaluation, [name for name, is_there in gallery.items() if is_there])
    sections = [
        introduction(repo_id, index, unet, run, has_samples),
        how_to_load(repo_id, index),
        the_scale(index, unet),
        classes(index),
        training(index, unet, scheduler, run),
        results(folder),
        LIMITS,
        f"## Citation\n\n{CITATION}",
    ]
    body = "\n\n".join([BEGIN, *(section for section in sections if section), END])
    if existing is None:
        return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"

    card = ModelCard(existing, ignore_metadata_errors=True)
    metadata = ModelCardData(**{**card.data.to_dict(), **metadata.to_dict()}, ignore_metadata_errors=True)
    before, *rest = re.split(r"<!-- Written by diffusers-cfg\b.*?-->", card.text, maxsplit=1)
    _, end, after = "".join(rest).partition(END)
    if not end:  # a card by someone else, or the Hub's empty one
        before, after = "", card.text
    text = f"{before.strip()}\n\n{body}\n\n{after.strip()}".strip()
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_samples(folder: Path) -> Path | None:
    """Return a folder's picture of samples, or else the last grid that a training run drew."""
    if (folder / SAMPLES).is_file():
        return folder / SAMPLES
    grids = (folder / "samples").glob("step-*.png")
    return max(grids, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def card_metadata(repo_id: str, run: dict, evaluation: dict, pictures: list[str]) -> ModelCardData:
    """Return the card's metadata: license, dataset, gallery, and results at the w that matter."""
    facts: dict[str, Any] = {}
    if run.get("license"):
        facts["license"] = run["license"]
    if run.get("dataset_id"):
        facts["datasets"] = [run["dataset_id"]]
    if run.get("base_model"):
        facts["base_model"] = run["base_model"]
    if pictures:
        facts["widget"] = [{"text": PICTURES[name], "output": {"url": name}} for name in pictures]
    if evaluation and run.get("dataset"):
        facts["model_name"] = repo_id.split("/")[-1]
        facts["eval_results"] = [
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=run.get("dataset_id") or run["dataset"],
                dataset_name=run["dataset"],
                metric_type=METRIC_TYPES.get(name, name.replace(" ", "_")),
                metric_name=f"{name} at w = {row['guidance_scale']:g}, {evaluation['num_samples']} samples, "
                f"{row['network_evaluations']:g} network evaluations, features of "
                f"{evaluation['feature_extractor']['name']}",
                metric_value=round(row[metric], 4),
            )
            for row in evaluation["results"]
            if row["guidance_scale"] in {0, *evaluation["best"].values()}  # the table has them all
            for metric, name in evaluation["metric_names"].items()
            if metric in row
        ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "diffusers-cfg", "classifier-free-guidance", "class-conditional", "image-generation"],
        **facts,
    )


def introduction(repo_id: str, index: dict, unet: dict, run: dict, has_samples: bool) -> str:
    """Return the title, a sentence about the model, and its samples."""
    size, channels = unet["sample_size"], unet["in_channels"]
    height, width = (size, size) if isinstance(size, int) else size
    kind = (
        "latents"
        if index.get("vae", [None])[0]
        else {1: "grayscale images", 3: "colour images"}.get(channels, "images")
    )
    data = f" of {run['dataset']}" if run.get("dataset") else ""
    text = (
        f"# {repo_id.split('/')[-1]}\n\nA class-conditional diffusion model of {height}×{width} {kind}{data}, "
        f"{unet['num_class_embeds'] - 1} classes, trained for "
        "[classifier-free guidance](https://arxiv.org/abs/2207.12598) with diffusers-cfg."
    )
    if has_samples:
        text += f"\n\n![A row for each class, a column for each guidance scale w]({SAMPLES})"
    return text


def how_to_load(repo_id: str, index: dict) -> str:
    """Return how to load the model with and without running the repository's code."""
    label = json.dumps(next(iter((index.get("id2label") or {}).values()), 0), ensure_ascii=False)
    scale = "" if has_guider(index) else ", guidance_scale=1.0"
    return f"""## Use

With diffusers alone. The repository's own code is run; read it first:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
image = pipe(class_labels=[{label}]{scale}).images[0]
```

With the package diffusers-cfg installed. No code of the repository is run:

```python
from diffusers_cfg import CFGPipeline

pipe = CFGPipeline.from_pretrained("{repo_id}")
image = pipe(class_labels=[{label}]{scale}).images[0]
```"""


def has_guider(index: dict) -> bool:
    """Return whether the pipeline was saved with one of diffusers' guiders."""
    return bool(index.get("guider", [None])[0])


def the_scale(index: dict, unet: dict) -> str:
    """Return what `guidance_scale` means for this model."""
    if unet.get("max_guidance_scale") is not None:
        return (
            f"`guidance_scale` is the paper's w, in 0 … {unet['max_guidance_scale']:g}. The model was distilled "
            "([Meng et al. 2023](https://arxiv.org/abs/2210.03142)): by one network evaluation a step it draws what "
            "ε̃ = (1 + w) ε(z, c) − w ε(z) draws by two. Most other pipelines of diffusers take s = 1 + w."
        )
    if has_guider(index):
        return (
            f"The pipeline comes with diffusers' `{index['guider'][1]}`, which brings its own rule and scale. Set "
            "`pipe.guider = None` to guide by `guidance_scale`, the paper's w."
        )
    text = (
        "`guidance_scale` is the paper's w: ε̃ = (1 + w) ε(z, c) − w ε(z). 0 is the plain conditional model and −1 the "
        "plain unconditional one. Most other pipelines of diffusers take s = 1 + w."
    )
    if index.get("conditioning_dropout_prob") == 0:
        text += " **This model was trained without dropping labels: it cannot be guided. Use 0.**"
    if index.get("guide_unet", [None])[0]:
        text += " A second, weaker network in `guide_unet` takes the place of ε(z): autoguidance (arXiv 2406.02507)."
    return text


def classes(index: dict, most: int = 1000) -> str:
    """Return a table of the classes' names, at most `most` of them."""
    id2label = index.get("id2label") or {}
    if not id2label:
        return ""
    names = sorted((int(class_id), name.replace("|", r"\|")) for class_id, name in id2label.items())
    rows = [f"| {class_id} | {name} |" for class_id, name in names]
    more = f"\n\n… {len(rows)} in all." if len(rows) > most else ""
    return "## Classes\n\n| id | name |\n|---|---|\n" + "\n".join(rows[:most]) + more


def training(index: dict, unet: dict, scheduler: dict, run: dict) -> str:
    """Return a table of the facts about the training run."""
    seconds = run.get("seconds")
    # Under the names of LogSNRScheduler, or the private ones that it gives diffusers' schedulers
    low, high = (scheduler.get(name, scheduler.get(f"_{name}")) for name in ("log_snr_min", "log_snr_max"))
    steps = index.get("num_inference_steps")
    facts = {
        "data": run.get("dataset"),
        "images": run.get("num_images"),
        "started from": run.get("base_model"),
        "label dropout p_uncond": index.get("conditioning_dropout_prob"),
        "prediction": scheduler.get("prediction_type"),
        "log-SNR λ": f"{low:g} … {high:g}" if low is not None else None,
        "sampled by": f"{index['scheduler'][1]}, {steps} steps by default" if steps else None,
        "parameters": f"{run['num_parameters'] / 1e6:.1f} M" if "num_parameters" in run else None,
        "channels": ", ".join(map(str, unet["block_out_channels"])),
        "steps": run.get("steps"),
        "images per step": run.get("batch_size"),
        "peak learning rate": run.get("learning_rate"),
        "average of the weights (EMA)": run.get("ema"),
        "precision": {"no": "fp32"}.get(run.get("mixed_precision"), run.get("mixed_precision")),
        "hardware": run.get("hardware"),
        "time": f"{seconds / 3600:.1f} h" if seconds and seconds > 5400 else seconds and f"{seconds / 60:.0f} min",
        "seed": run.get("seed"),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(rows)


def results(folder: Path) -> str:
    """Return the evaluation's table and pictures; empty without an evaluation."""
    if not (folder / TABLE).is_file():
        return ""
    text = f"## Results\n\n{(folder / TABLE).read_text(encoding='utf-8').strip()}"
    if (folder / CURVES).is_file():
        text += f"\n\n![Quality over the guidance scale]({CURVES})"
    if (folder / GRID).is_file():
        text += f"\n\n![{PICTURES[GRID]}]({GRID})"
    return text


LIMITS = """## Intended use and limits

For research and for learning. The model draws what its training data holds, with its gaps and its biases. A larger w
makes samples truer to their class and less varied. `from_pipe` and `device_map="balanced"` do not work where the model
is loaded as remote code."""
