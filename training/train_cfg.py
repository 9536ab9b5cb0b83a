# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Train a class-conditional diffusion model with classifier-free guidance (Ho & Salimans 2022, Algorithm 1).

python training/train_cfg.py
python training/train_cfg.py --train_data_dir photos --resolution 64 --output_dir photos-model
accelerate launch training/train_cfg.py --config training/configs/mnist.yaml --output_dir mnist-model
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.method_settings import CFGConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    preemption = Preemption().install()
    config = parse_config(CFGConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.methods.cfg import ClassifierFreeGuidance

    evaluation = None
    if config.eval_steps:  # It imports matplotlib, which builds a font cache at its first import.
        from diffusers_cfg.evaluation.in_training import training_evaluation as evaluation

    Trainer(config, ClassifierFreeGuidance, preemption, evaluation).run()


if __name__ == "__main__":
    run_command(main)
