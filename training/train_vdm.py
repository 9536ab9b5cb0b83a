# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Train a class-conditional variational diffusion model, with a learned noise schedule (Kingma et al. 2021).

python training/train_vdm.py
python training/train_vdm.py --train_data_dir photos --resolution 64 --output_dir photos-vdm
accelerate launch training/train_vdm.py --config training/configs/mnist.yaml --output_dir mnist-vdm
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.engine.preemption import Preemption
from diffusers_cfg.method_settings import VDMConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    preemption = Preemption().install()
    config = parse_config(VDMConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.trainer import Trainer
    from diffusers_cfg.methods.vdm import VariationalDiffusion

    evaluation = None
    if config.eval_steps:  # It imports matplotlib, which builds a font cache at its first import.
        from diffusers_cfg.evaluation.in_training import likelihood_evaluation as evaluation

    Trainer(config, VariationalDiffusion, preemption, evaluation).run()


if __name__ == "__main__":
    run_command(main)
