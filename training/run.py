"""A training run from its settings to a saved and published model. What is trained, on what loss, its caller says."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError
from preemption import EXIT_RESUME, Preempted, Preemption
from publish import EXIT_NOT_PUBLISHED, BackgroundPublisher


def run(
    config: TrainConfig,
    prepare: Callable[[Any], tuple[Any, Any]],
    preemption: Preemption | None = None,
    probe_labels: bool = True,
) -> None:
    """
    Train what `prepare` makes for the images of the data set: a pipeline, and the loss that its network is to minimise,
    a function as `loop.Loss` of what the network sees: images in [-1, 1], or latents.
    """
    # Imported here and not above: they take seconds, which --help and a wrong flag need not wait for.
    from checkpoint import check_output_dir, find_checkpoint, save_variants
    from data import load_labelled_images, num_images, training_dataset
    from evaluation import training_evaluation
    from latents import cache_latents
    from loop import make_accelerator, train
    from model import image_channels
    from plan import describe_plan
    from record import write_run_record

    # Everything that can be wrong is found before anything is written
    check_output_dir(config)
    accelerator = make_accelerator(config)
    checkpoint = find_checkpoint(config)
    if config.push_to_hub and accelerator.is_main_process:
        check_hub(config)
    with accelerator.main_process_first():  # the others find the data in the cache
        images = load_labelled_images(config)
    pipeline, loss = prepare(images)
    dataset = training_dataset(images, config, image_channels(pipeline), show_progress=accelerator.is_main_process)
    if config.dry_run:
        if accelerator.is_main_process:
            print(describe_plan(config, accelerator, dataset, pipeline, checkpoint))
        return
    evaluate = training_evaluation(config, accelerator, dataset, images.id2label) if config.eval_steps else None
    if config.cache_latents:
        dataset = cache_latents(config, accelerator, dataset, pipeline.vae)

    def loss_of(unet, x, c, draws):
        if pipeline.vae is not None:
            x = (pipeline.draw_latents if config.cache_latents else pipeline.encode)(x, draws.generators("posterior"))
        return loss(unet, x, c, draws)

    publisher = None
    if config.push_to_hub and config.hub_strategy == "checkpoint" and accelerator.is_main_process:
        publisher = BackgroundPublisher(config.hub_model_id, config.hub_token)
    state = train(
        config,
        accelerator,
        dataset,
        pipeline,
        loss_of,
        checkpoint,
        preemption or Preemption(),
        after_checkpoint=publisher and (lambda state: publisher.publish(pipeline, state.step)),
        evaluate=evaluate,
        probe_labels=probe_labels,
    )

    is_main_process = accelerator.is_main_process
    if is_main_process:
        pipeline.save_pretrained(config.output_dir)
        save_variants(state, Path(config.output_dir) / "unet")
        write_run_record(config, accelerator, state, num_images(dataset))
        some_class = images.id2label[0]
        print(
            f"\nSaved to {config.output_dir}; a grid of samples is in {config.output_dir}/samples. Load and guide it:\n"
            f'  pipe = DiffusionPipeline.from_pretrained("{config.output_dir}", trust_remote_code=True)\n'
            f'  pipe(class_labels=["{some_class}"], guidance_scale=1.0).images[0].save("{some_class}.png")'
        )
    accelerator.end_training()  # nobody waits for the upload
    if publisher is not None:
        publisher.close()
    if config.push_to_hub and is_main_process:
        publish_run(config)


def check_hub(config: TrainConfig) -> None:
    """Find out now, and not after a month, whether the model can be published; the repository gets its full name."""
    from diffusers_cfg.hub import PublishError, prepare_repository

    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        config.hub_model_id = prepare_repository(
            name, config.hub_private_repo or None, config.hub_token, config.overwrite_hub_repo, not config.dry_run
        )
    except PublishError as error:
        raise UserError(f"--push_to_hub: {error}") from error


def publish_run(config: TrainConfig) -> None:
    from diffusers_cfg.hub import PublishError, publish

    try:
        url = publish(config.output_dir, config.hub_model_id, token=config.hub_token, overwrite=True)
    except PublishError as error:
        print(
            f"{Path(sys.argv[0]).name}: {error}\nThe run is done and its model is safe in {config.output_dir}. Publish "
            f"it with:\n  python training/publish.py {config.output_dir} --repo_id {config.hub_model_id}",
            file=sys.stderr,
        )
        sys.exit(EXIT_NOT_PUBLISHED)
    print(f"Published, and checked that it draws the same image: {url}")


def as_script(name: str, train: Callable[[Preemption], None]) -> None:
    """Train until it is done, or a signal says otherwise; the exit code says which."""
    preemption = Preemption()
    preemption.install()
    try:
        train(preemption)
    except Preempted:
        print("Stopped and saved. The same command with --resume_from_checkpoint latest goes on.", file=sys.stderr)
        sys.exit(EXIT_RESUME)
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
