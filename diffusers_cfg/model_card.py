"""Write the model card of a saved pipeline from its files and the files of its training run."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .model_card_sections import (
    accuracy_section,
    by_rule,
    citation_section,
    classes_section,
    grid_caption,
    guidance_section,
    introduction,
    is_unconditional,
    likelihood_section,
    limits_section,
    model_kind,
    reproduction_section,
    results_section,
    samples_caption,
    schedule_section,
    training_section,
    usage_section,
)
from .model_files import (
    EVALUATION,
    GRID,
    INDEX,
    LIKELIHOOD,
    NULL_CLASS,
    RUN,
    SAMPLES,
    class_picture,
    example_classes,
    find_samples,
    read_json,
)

# The Hub's identifiers of the metrics that it knows.
METRIC_TYPES = {"FID": "fid", "KID": "kid", "IS": "inception_score", "Fréchet distance": "frechet_distance"}

# The text between these markers is replaced at every push; the rest of the card belongs to its author. Published cards
# are recognized by END and by the first words of BEGIN, so neither may change.
BEGIN = "<!-- Written by diffusers-cfg and replaced at every push. Add your own text below the end marker. -->"
END = "<!-- End of what diffusers-cfg writes. -->"
# Published cards are also searched for this link.
DEMO = "Try it in the browser: [demo]("


def model_card(
    folder: Path,
    repo_id: str,
    existing: str | None = None,
    pictured: Collection[int] = (),
    space: str | None = None,
) -> str:
    """
    Return the model card of a saved pipeline.

    Args:
        folder (`Path`): Saved pipeline. `run.json`, `evaluation/` and samples are read if they exist.
        repo_id (`str`): Repository or folder from which the card's examples load the pipeline.
        existing (`str`, *optional*): Current card of the repository. The text outside the markers is kept, and so is
            metadata that this function does not write.
        pictured (`Collection[int]`): Classes of which the repository has a `class_picture`.
        space (`str`, *optional*): Space with a demo of the model. By default the one that `existing` links to.

    Returns:
        `str`: The card: YAML metadata and Markdown. Unknown facts are omitted.
    """
    index, run, evaluation, likelihood = (read_json(folder / name) for name in (INDEX, RUN, EVALUATION, LIKELIHOOD))
    unet, classifier, scheduler = (
        read_json(folder / name)
        for name in ("unet/config.json", "classifier/config.json", "scheduler/scheduler_config.json")
    )
    kind, has_samples = model_kind(scheduler, unet), find_samples(folder) is not None

    # The Hub's button "Use this model" prints `pipe(TEXT)` with the text of the first entry.
    names = index.get("id2label") or {}
    gallery = {
        SAMPLES: (samples_caption(run, kind), has_samples),
        GRID: (grid_caption(evaluation), (folder / GRID).is_file()),
    }
    widget = [
        {"text": names[str(class_id)], **({"output": {"url": class_picture(class_id)}} if class_id in pictured else {})}
        for class_id in example_classes(index, run)
        if str(class_id) in names
    ]
    widget += [{"text": caption, "output": {"url": name}} for name, (caption, exists) in gallery.items() if exists]
    tags = ["denoising-diffusion-gan"] if kind == "generator" else []
    tags += [] if kind == "generator" or is_unconditional(unet) else ["classifier-free-guidance"]
    tags += ["classifier-guidance"] if classifier else []
    tags += ["class-conditional"] if example_classes(index, run) != [NULL_CLASS] else []
    data = card_metadata(repo_id, run, evaluation, likelihood, widget, tags)
    sections = [
        introduction(repo_id, index, unet, classifier, run, has_samples, kind),
        demo_section(space or linked_space(existing)),
        usage_section(repo_id, index, unet, run, kind),
        guidance_section(index, unet, scheduler, run),
        classes_section(index),
        training_section(index, unet, classifier, scheduler, run, kind),
        accuracy_section(run),
        schedule_section(folder),
        reproduction_section(run),
        results_section(folder, evaluation),
        likelihood_section(folder),
        limits_section(kind),
        citation_section(index, run, kind),
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


def demo_section(space: str | None) -> str:
    """Return a link to the Space with a demo of the model; empty without one."""
    return f"{DEMO}https://huggingface.co/spaces/{space})." if space else ""


def linked_space(card: str | None) -> str | None:
    """Return the Space that a card links to by `demo_section`, if it does."""
    match = re.search(rf"{re.escape(DEMO)}https://huggingface\.co/spaces/([\w.-]+/[\w.-]+)\)", card or "")
    return match[1] if match else None


def card_metadata(
    repo_id: str,
    run: dict[str, Any],
    evaluation: dict[str, Any],
    likelihood: dict[str, Any],
    widget: list[dict[str, Any]],
    tags: list[str],
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
        tags=["diffusers", "diffusers-cfg", *tags, "image-generation"],
        **facts,
    )


def sample_metrics(evaluation: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return the name, the conditions and the value of each metric of samples at w = 0 and at the best w."""
    if not evaluation:
        return []
    return [
        (
            name,
            f"at w = {row['guidance_scale']:g}{by_rule(evaluation)}, {evaluation['num_samples']} samples, "
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
