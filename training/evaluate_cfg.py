"""Measure a trained model over guidance scales w: the paper's tables 1 and 2 and figure 4, for any model.

accelerate launch training/evaluate_cfg.py --model cfg-model
accelerate launch training/evaluate_cfg.py --model me/cfg-imagenet64 --num_samples 50000 --feature_extractor inception

For each w it draws labelled samples and compares them with the data that the model was trained on. A sweep that was
stopped goes on where it was.
"""

import json
import math
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from config import STATISTICS_DIR, DataConfig, TrainConfig, UserError
from sample import (
    SampleSet,
    add_sampling_flags,
    check_positive,
    claim_folder,
    draw_sets,
    load_pipeline,
    sampling_settings,
)

PAPERS_SCALES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0, 3.0, 4.0]
DATA_FLAGS = ["dataset_name", "dataset_config_name", "dataset_split", "train_data_dir", "image_column", "label_column"]


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="evaluate_cfg.py", description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    add_sampling_flags(parser)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=PAPERS_SCALES, help="The paper's w.")
    parser.add_argument("--num_samples", type=int, default=2000, help="Samples for each w; the paper takes 50,000.")
    parser.add_argument(
        "--class_labels", choices=["balanced", "random", "data"], default="balanced",
        help="Classes in turn, at random, or as often as in the data.",
    )  # fmt: skip
    parser.add_argument(
        "--feature_extractor", default="small",
        help="small: a classifier that is trained on the data; inception (needs torch-fidelity); dinov2; or an image "
        "classifier of the Hub.",
    )  # fmt: skip
    parser.add_argument("--output_dir", help="Where to write; by default MODEL/evaluation, for the model card to show.")
    parser.add_argument("--statistics_dir", default=STATISTICS_DIR, help="Where to keep the real images' statistics.")
    data = parser.add_argument_group("data", "By default the data that the model was trained on.")
    for field in fields(DataConfig):
        if field.name in DATA_FLAGS:
            data.add_argument(f"--{field.name}", help=field.metadata["help"])
    return parser.parse_args(argv)


def evaluate_cfg(args: Namespace) -> list[dict[str, Any]]:
    # Imported here and not above: they take seconds, which --help and a wrong flag need not wait for.
    import torch
    from evaluation import Evaluation
    from grid import draw_grid
    from loop import make_accelerator
    from report import write_report

    check_positive(args, "num_samples", "batch_size")
    accelerator = make_accelerator(TrainConfig(report_to="none"))
    pipeline = load_pipeline(args, accelerator.device)
    check_scales(args, pipeline)
    given = {name: getattr(args, name) for name in DATA_FLAGS if getattr(args, name) is not None}
    with accelerator.main_process_first():
        dataset, id2label, data_name = load_data(args.model, given, pipeline, accelerator.is_main_process)
    evaluation = Evaluation(
        accelerator, dataset, id2label, args.feature_extractor, args.num_samples, Path(args.statistics_dir)
    )

    model_dir = Path(args.model) if Path(args.model).is_dir() else Path()
    output_dir = Path(args.output_dir or model_dir / "evaluation")  # where the model card looks
    class_labels = choose_class_labels(args, dataset.class_labels, pipeline.unet.num_classes)
    sets = {w: SampleSet(output_dir / "samples" / f"w={w:g}", args.num_samples) for w in args.guidance_scales}
    if accelerator.is_main_process:
        claim_folder(output_dir / "samples", {"class_labels": args.class_labels, **sampling_settings(args, pipeline)})
    draw_sets(args, accelerator, pipeline, sets, class_labels)
    results = measure_sets(accelerator, evaluation, sets)

    if accelerator.is_main_process:
        record = {"dataset": data_name, **evaluation.record(), **sampling_record(args, pipeline), "results": results}
        write_report(output_dir, record, args.feature_extractor)
        columns = [id2label[class_id] for class_id in class_labels[: min(pipeline.unet.num_classes, 10)].tolist()]
        rows = [samples.first_images(len(columns)) for samples in sets.values()]
        draw_grid(torch.stack(rows), [f"w = {w:g}" for w in sets], columns).save(output_dir / "grid.png")
        print(f"\n{args.model}, evaluated on {data_name}\n\n{(output_dir / 'metrics.md').read_text(encoding='utf-8')}")
        print(f"The table, the figures behind it and pictures are in {output_dir}.")
    accelerator.end_training()
    return results


def measure_sets(accelerator, evaluation, sets: dict[float, SampleSet]) -> list[dict[str, Any]]:
    """The metrics of each w, on the main process; all of them share the shards."""
    import torch
    from tqdm.auto import tqdm

    results = []
    for w, samples in tqdm(sets.items(), "Measuring", leave=False, disable=not accelerator.is_main_process):
        summary = evaluation.new_summary()
        for shard in samples.shards[accelerator.process_index :: accelerator.num_processes]:
            content = samples.load(shard)
            images = torch.from_numpy(content.images).movedim(-1, 1)
            evaluation.add(summary, torch.tensor(shard), images, torch.from_numpy(content.class_labels))
        summary.reduce(accelerator)
        if accelerator.is_main_process:
            evaluations = samples.load(samples.shards[0]).network_evaluations
            results.append({"guidance_scale": w, "network_evaluations": evaluations, **evaluation.measure(summary)})
    return results


def sampling_record(args: Namespace, pipeline) -> dict[str, Any]:
    """How the samples were drawn, without paths of this machine."""
    return {
        **{name: getattr(args, name) for name in ("class_labels", "num_inference_steps", "seed")},
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance": {
            "interval": args.guidance_interval,
            "rescale": args.guidance_rescale,
            "tolerance": args.guidance_tolerance,
            "guider": args.guider,
            "guide": args.guide_model and Path(args.guide_model).name,
        },
    }


def check_scales(args: Namespace, pipeline) -> None:
    wrong = [w for w in args.guidance_scales if not math.isfinite(w)]
    if wrong:
        raise UserError(f"--guidance_scales must be finite, but has {wrong}.")
    largest = pipeline.unet.max_guidance_scale
    if largest is not None and (wrong := [w for w in args.guidance_scales if not 0 <= w <= largest]):
        raise UserError(f"--guidance_scales has {wrong}, but {args.model} was distilled for 0 … {largest:g}.")
    guided = [w for w in args.guidance_scales if w != 0]
    if guided and pipeline.config.conditioning_dropout_prob == 0 and pipeline.guide_unet is None:
        raise UserError(
            f"--guidance_scales {guided}: {args.model} was trained with conditioning_dropout_prob = 0, so it has no "
            "null class to guide away from. Measure it at 0, or train with 0.1 to 0.2."
        )


def load_data(model: str, given: dict[str, Any], pipeline, show_progress: bool):
    """
    The real images as the model draws them, the names of their classes, and what the data is called: those that the
    model was trained on, unless settings are given that name others.

    Raises:
        UserError: it is not known what the model was trained on, or other data does not have its classes or channels.
    """
    from data import load_labelled_images, training_dataset
    from model import image_channels, image_resolution
    from record import local_name

    is_other_data = "dataset_name" in given or "train_data_dir" in given
    settings = {} if is_other_data else recorded_data(model, pipeline)
    config = DataConfig(**{**settings, **given, "resolution": image_resolution(pipeline), "streaming": False})
    images, channels = load_labelled_images(config), image_channels(pipeline)

    names = pipeline.id2label or images.id2label
    if len(images.id2label) != pipeline.unet.num_classes or names != images.id2label:
        raise UserError(
            f"The data has {len(images.id2label)} classes ({some(images.id2label)}), but {model} draws "
            f"{pipeline.unet.num_classes} ({some(names)}): give the data that it was trained on."
        )
    if is_other_data and images.channels != channels:
        kinds = {1: "grey", 3: "colour"}
        raise UserError(
            f"The data has {kinds[images.channels]} images, but {model} draws {kinds[channels]} ones: they cannot "
            "be compared."
        )
    if is_other_data and (smaller := smaller_than(images, config.resolution)):
        raise UserError(
            f"The data has images of {smaller[0]}×{smaller[1]}, but {model} draws {config.resolution}×"
            f"{config.resolution}: enlarged, they would be compared by their blur."
        )
    return training_dataset(images, config, channels, show_progress), images.id2label, local_name(config)


def recorded_data(model: str, pipeline) -> dict[str, Any]:
    """How the training run read its data, from its settings or from what was published of them."""
    from checkpoint import CONFIG_FILE

    settings = Path(model) / CONFIG_FILE
    if settings.is_file():
        config = TrainConfig.load(settings)
        return {field.name: getattr(config, field.name) for field in fields(DataConfig)}
    record = Path(pipeline.name_or_path) / "run.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if "data" not in known:
        raise UserError(
            f"It is not known what {model} was trained on, or the data is not public: give --dataset_name or "
            "--train_data_dir."
        )
    return known["data"]


def some(id2label: dict[int, str]) -> str:
    return ", ".join([name for _, name in sorted(id2label.items())][:5]) + (", …" if len(id2label) > 5 else "")


def smaller_than(images, resolution: int) -> tuple[int, int] | None:
    """The size of the first image, if it is smaller than the resolution."""
    size = images.open_image(0).size
    return size if min(size) < resolution else None


def choose_class_labels(args: Namespace, data_labels, num_classes: int):
    """The class asked for at each place of a set, int64 `(num_samples,)`, whatever w."""
    import torch
    from randomness import seeded_generator

    places = torch.arange(args.num_samples)
    if args.class_labels == "balanced":
        return places % num_classes
    labels = data_labels[data_labels >= 0] if args.class_labels == "data" else torch.arange(num_classes)
    chosen = [
        torch.randint(len(labels), (), generator=seeded_generator("cpu", args.seed, "class label", place))
        for place in places.tolist()
    ]
    return labels[torch.stack(chosen)]


if __name__ == "__main__":
    try:
        evaluate_cfg(parse_args())
    except UserError as error:
        sys.exit(f"evaluate_cfg.py: error: {error}")
