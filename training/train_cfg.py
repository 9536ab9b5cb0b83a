"""Train a class-conditional diffusion model with classifier-free guidance (Ho & Salimans 2022, Algorithm 1).

accelerate launch training/train_cfg.py
accelerate launch training/train_cfg.py --train_data_dir photos --resolution 64 --output_dir photos-model
accelerate launch training/train_cfg.py --config training/configs/mnist.yaml --output_dir mnist-model
"""

from config import TrainConfig, parse_config
from preemption import Preemption
from run import as_script, run


def train_cfg(config: TrainConfig, preemption: Preemption | None = None) -> None:
    # Imported here and not above: they take seconds, which --help and a wrong flag need not wait for.
    from model import build_pipeline

    def prepare(images):
        pipeline = build_pipeline(config, images)
        return pipeline, algorithm_1(config, pipeline)

    run(config, prepare, preemption)


def algorithm_1(config: TrainConfig, pipeline):
    from conditioning import drop_class_labels
    from model import noise_process
    from objectives import prediction_target, squared_error

    scheduler, null_class_label = noise_process(pipeline), pipeline.unet.null_class_label

    def loss_of(unet, x, c, draws):
        """The loss of each sample of a batch (x, c)."""
        c = drop_class_labels(c, config.conditioning_dropout_prob, null_class_label, draws.dropout)
        t = scheduler.timestep(draws.u)  # λ ~ p(λ), by way of u ~ U[0, 1]
        z = scheduler.add_noise(x, draws.noise, t)  # z = αx + σε
        pred = unet(z, t, class_labels=c).sample
        return squared_error(pred, prediction_target(scheduler, x, draws.noise, t))

    return loss_of


if __name__ == "__main__":
    as_script("train_cfg.py", lambda preemption: train_cfg(parse_config(), preemption))
