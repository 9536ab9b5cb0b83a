"""Measure a trained model over guidance scales w, on the data that it was trained on.

    python training/evaluate_cfg.py --model cfg-model --guidance_scales 0 1 2

For each w: the share of the samples that a classifier fitted to the real images assigns to the class asked for, and
precision and recall in pixel space. Made for small pictures of few kinds, such as digits.
"""

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from config import TrainConfig, UserError


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="evaluate_cfg.py", description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="The output folder of a training run.")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[0, 0.5, 1, 2, 4], help="The paper's w.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Samples for each w, the classes in turn.")
    parser.add_argument("--num_inference_steps", type=int, default=64, help="Sampling steps T.")
    parser.add_argument("--scheduler", help="A class of diffusers to sample with, instead of the model's own.")
    parser.add_argument("--batch_size", type=int, default=250, help="Samples drawn at a time.")
    parser.add_argument("--seed", type=int, default=0, help="Each sample is determined by this and its index.")
    parser.add_argument("--output_file", help="Where to write the figures as JSON; by default MODEL/evaluation.json.")
    return parser.parse_args(argv)


def evaluate_cfg(args: Namespace) -> list[dict]:
    # Imported here and not above: they take seconds, which --help and a wrong flag need not wait for.
    from metrics import precision_recall

    pipeline, pixels, class_labels = load_model_and_data(args.model, args.seed)
    if args.scheduler is not None:
        pipeline.scheduler = make_scheduler(args.scheduler, pipeline)
    classifier, held_out_accuracy = fit_classifier(pixels, class_labels)
    real, also_real = pixels[: args.num_samples], pixels[args.num_samples : 2 * args.num_samples]

    results = []
    for w in args.guidance_scales:
        call = {"guidance_scale": w, "num_inference_steps": args.num_inference_steps}
        fake, wanted = draw_samples(pipeline, args.num_samples, args.seed, args.batch_size, **call)
        precision, recall = precision_recall(real, fake)
        results.append(
            {
                "guidance_scale": w,
                "class_accuracy": class_accuracy(classifier, fake, wanted),
                "precision": precision,
                "recall": recall,
                # Some schedulers evaluate twice a step
                "network_evaluations": len(pipeline.scheduler.timesteps) * (1 if w in (0, -1) else 2),
            }
        )

    sampler = f"{args.num_inference_steps} steps of {type(pipeline.scheduler).__name__}"
    print(f"\n{args.model}: {args.num_samples} samples for each w, {sampler}")
    print(f"{'w':>6} {'class accuracy':>15} {'precision':>10} {'recall':>7}")
    for row in results:
        print(f"{row['guidance_scale']:6g} {row['class_accuracy']:15.3f} {row['precision']:10.3f} {row['recall']:7.3f}")
    floor = None
    if len(also_real) > 3:
        floor = precision_recall(real, also_real)
        print(f"{'real':>6} {held_out_accuracy:15.3f} {floor[0]:10.3f} {floor[1]:7.3f}   ({len(also_real)} held out)")
    record = {
        **{name: getattr(args, name) for name in ("num_samples", "num_inference_steps", "seed")},
        "scheduler": type(pipeline.scheduler).__name__,
        "classifier_held_out_accuracy": held_out_accuracy,
        "real_precision_recall": floor,
        "results": results,
    }
    output_file = Path(args.output_file or Path(args.model) / "evaluation.json")
    output_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return results


def load_model_and_data(model: str, seed: int):
    """A run's pipeline, and the labelled images it was trained on: pixels in [0, 1] and ids, in a random order."""
    import torch
    from checkpoint import CONFIG_FILE
    from data import load_labelled_images, stack_images
    from model import image_channels
    from randomness import seeded_generator

    from diffusers_cfg import CFGPipeline

    settings = Path(model) / CONFIG_FILE
    if not settings.is_file():
        raise UserError(f"--model {model} is not the output folder of a training run: it has no {CONFIG_FILE}.")
    config = TrainConfig.load(settings)
    pipeline = CFGPipeline.from_pretrained(model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)

    data = stack_images(load_labelled_images(config), config, image_channels(pipeline), show_progress=True)
    order = torch.randperm(len(data), generator=seeded_generator("cpu", seed, "evaluation"))
    order = order[data.class_labels[order] >= 0]
    return pipeline, data.images[order].flatten(1).float() / 255, data.class_labels[order]


def make_scheduler(name: str, pipeline):
    """One of the schedulers that the pipeline takes, by name, with its noise process."""
    import diffusers

    if name not in pipeline.schedulers or not hasattr(diffusers, name):
        known = ", ".join(known for known in pipeline.schedulers if hasattr(diffusers, known))
        raise UserError(f"--scheduler {name} cannot sample this model. Those of diffusers that can are {known}.")
    return getattr(diffusers, name).from_config(pipeline.scheduler.config)


def draw_samples(pipeline, num_samples: int, seed: int, batch_size: int, **call):
    """Samples of the classes in turn: pixels `(num_samples, features)` in [0, 1], in 8 bits, and the classes."""
    import torch
    from randomness import seeded_generator
    from tqdm.auto import tqdm

    wanted = torch.arange(num_samples) % pipeline.unet.num_classes
    images = [
        pipeline(
            class_labels=wanted[indices],
            generator=[seeded_generator("cpu", seed, "sample", i) for i in indices.tolist()],
            output_type="pt",
            **call,
        ).images.cpu()
        for indices in tqdm(torch.arange(num_samples).split(batch_size), "Sampling", leave=False)
    ]
    return (torch.cat(images).flatten(1) * 255).round() / 255, wanted


def class_accuracy(classifier, pixels, wanted) -> float:
    """The share of the images that the classifier takes for what they were meant to be."""
    return float((classifier.predict(pixels.numpy()) == wanted.numpy()).mean())


def fit_classifier(pixels, class_labels):
    """A support vector machine on up to 20,000 real images, and its accuracy on those that it has not seen."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    pixels, class_labels = pixels[:25_000].numpy(), class_labels[:25_000].numpy()
    fitted = len(pixels) * 4 // 5
    classifier = make_pipeline(PCA(min(50, pixels.shape[1], fitted), whiten=True, random_state=0), SVC(C=10))
    classifier.fit(pixels[:fitted], class_labels[:fitted])
    return classifier, float(classifier.score(pixels[fitted:], class_labels[fitted:]))


if __name__ == "__main__":
    try:
        evaluate_cfg(parse_args())
    except UserError as error:
        sys.exit(f"evaluate_cfg.py: error: {error}")
