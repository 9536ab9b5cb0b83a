# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Evaluate a trained model over guidance scales w, as in the paper's tables 1 and 2 and figure 4.

accelerate launch training/evaluate_cfg.py --model cfg-model
accelerate launch training/evaluate_cfg.py --model me/cfg-imagenet64 --num_samples 50000 --feature_extractor inception

For each w the command generates labelled samples and compares them with the training data of the model. An interrupted
sweep resumes from its existing samples.
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.evaluation.settings import EvaluationConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    config = parse_config(EvaluationConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.reports import sweep_table
    from diffusers_cfg.evaluation.sweep import output_folder, run_sweep

    accelerator = make_accelerator()
    record = run_sweep(config, accelerator)
    if accelerator.is_main_process:
        print(f"\n{config.model}, evaluated on {record['dataset']}\n\n{sweep_table(record)}")
        print(f"The table, the metrics, the curves and the sample grid are in {output_folder(config)}.")


if __name__ == "__main__":
    run_command(main)
