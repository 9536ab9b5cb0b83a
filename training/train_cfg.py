"""Train a class-conditional diffusion model with classifier-free guidance (Ho & Salimans 2022, Algorithm 1).

accelerate launch training/train_cfg.py
accelerate launch training/train_cfg.py --train_data_dir photos --resolution 64 --output_dir photos-model
accelerate launch training/train_cfg.py --config training/configs/mnist.yaml --output_dir mnist-model
"""

import sys

from config import TrainConfig, UserError, parse_config


def train_cfg(config: TrainConfig) -> None:
    # Imported here and not above: they take seconds, which --help and a wrong flag need not wait for.
    from checkpoint import check_output_dir, find_checkpoint
    from conditioning import drop_class_labels
    from data import load_labelled_images, training_dataset
    from loop import make_accelerator, train
    from model import build_unet, load_vae
    from objectives import prediction_target, squared_error

    from diffusers_cfg import CFGPipeline, LogSNRScheduler

    # Everything that can be wrong is found before anything is written
    check_output_dir(config)
    accelerator = make_accelerator(config)
    checkpoint = find_checkpoint(config)
    with accelerator.main_process_first():  # the others find the data in the cache
        images = load_labelled_images(config)
    vae = load_vae(config)
    channels = images.channels if vae is None else vae.config.in_channels
    unet = build_unet(config, vae, channels, num_classes=len(images.id2label))
    dataset = training_dataset(images, config, channels, show_progress=accelerator.is_main_process)

    scheduler = LogSNRScheduler(
        log_snr_min=config.log_snr_min,
        log_snr_max=config.log_snr_max,
        prediction_type=config.prediction_type,
        clip_sample=vae is None,  # latents have no fixed range
    )
    pipeline = CFGPipeline(unet, scheduler, vae, images.id2label, config.conditioning_dropout_prob)

    def loss_of(unet, x, c, draws):
        """Algorithm 1, for a batch: the loss of each sample."""
        x = pipeline.encode(x, draws.generator)
        c = drop_class_labels(c, config.conditioning_dropout_prob, pipeline.unet.null_class_label, draws.dropout)
        t = scheduler.timestep(draws.u)  # λ ~ p(λ), by way of u ~ U[0, 1]
        z = scheduler.add_noise(x, draws.noise, t)  # z = αx + σε
        pred = unet(z, t, class_labels=c).sample
        return squared_error(pred, prediction_target(scheduler, x, draws.noise, t))

    train(config, accelerator, dataset, pipeline, loss_of, checkpoint)

    if accelerator.is_main_process:
        pipeline.save_pretrained(config.output_dir)
        some_class = images.id2label[0]
        print(
            f"\nSaved to {config.output_dir}; a grid of samples is in {config.output_dir}/samples. Load and guide it:\n"
            f'  pipe = DiffusionPipeline.from_pretrained("{config.output_dir}", trust_remote_code=True)\n'
            f'  pipe(class_labels=["{some_class}"], guidance_scale=1.0).images[0].save("{some_class}.png")'
        )
    accelerator.end_training()


if __name__ == "__main__":
    try:
        train_cfg(parse_config())
    except UserError as error:
        sys.exit(f"train_cfg.py: error: {error}")
