# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Distill guidance into one pass per step, and then into fewer sampling steps (Meng et al. 2023).

python training/distill_guidance.py --teacher cfg-model --output_dir one-pass
python training/distill_guidance.py --teacher one-pass --student_steps 8 --output_dir eight-steps

The one-pass student takes w as an input. Data and optimization settings default to the teacher's, if its folder holds
them. Other flags are those of train_cfg.py.
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.method_settings import DistillationConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    preemption = Preemption().install()
    config = parse_config(DistillationConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.methods.distillation import GuidanceDistillation

    evaluation = None
    if config.eval_steps:  # It imports matplotlib, which builds a font cache at its first import.
        from diffusers_cfg.evaluation.in_training import training_evaluation as evaluation

    Trainer(config, GuidanceDistillation, preemption, evaluation).run()


if __name__ == "__main__":
    run_command(main)
