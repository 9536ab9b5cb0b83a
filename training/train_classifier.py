# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Train a classifier of noisy images, for classifier guidance of a diffusion model (Dhariwal & Nichol 2021).

python training/train_classifier.py --pretrained_model_name_or_path cfg-model
accelerate launch training/train_classifier.py --pretrained_model_name_or_path me/cfg-photos --train_data_dir photos \
    --resolution 64 --output_dir photos-classifier

The output folder is the diffusion model with its classifier, in one pipeline.
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.method_settings import ClassifierConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    preemption = Preemption().install()
    config = parse_config(ClassifierConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.methods.classifier import ClassifierGuidance

    evaluation = None
    if config.eval_steps:  # It imports matplotlib, which builds a font cache at its first import.
        from diffusers_cfg.evaluation.in_training import training_evaluation as evaluation

    Trainer(config, ClassifierGuidance, preemption, evaluation).run()


if __name__ == "__main__":
    run_command(main)
