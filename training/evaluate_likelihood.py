# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Evaluate the variational bound of a model on held-out images, in bits per dimension (Kingma et al. 2021).

accelerate launch training/evaluate_likelihood.py --model vdm-model
accelerate launch training/evaluate_likelihood.py --model vdm-model --diffusion_steps 10 100 1000 0

The command bounds p(x|c) by the label, and p(x) by the null class and by the labels. An interrupted evaluation resumes.
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.evaluation.settings import LikelihoodConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    config = parse_config(LikelihoodConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.likelihood_reports import likelihood_table
    from diffusers_cfg.evaluation.likelihood_run import run_likelihood
    from diffusers_cfg.evaluation.sweep import output_folder

    accelerator = make_accelerator()
    record = run_likelihood(config, accelerator)
    if accelerator.is_main_process:
        print(f"\n{config.model}, evaluated on {record['dataset']}\n\n{likelihood_table(record)}")
        print(f"The tables, the results and the figures are in {output_folder(config)}.")


if __name__ == "__main__":
    run_command(main)
