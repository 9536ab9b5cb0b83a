# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Measure a trained model over guidance scales w: the paper's tables 1 and 2 and figure 4, for any model.

accelerate launch training/evaluate_cfg.py --model cfg-model
accelerate launch training/evaluate_cfg.py --model me/cfg-imagenet64 --num_samples 50000 --feature_extractor inception

For each w it draws labelled samples and compares them with the data that the model was trained on. A sweep that was
stopped resumes from the samples that it has drawn.
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.evaluation.settings import EvaluationConfig


def main(argv: list[str] | None = None) -> None:
    config = parse_config(EvaluationConfig, argv)
    # Here and not above: torch takes seconds, which --help and a wrong flag need not wait for.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.reports import sweep_table
    from diffusers_cfg.evaluation.sweep import output_folder, run_sweep

    accelerator = make_accelerator()
    record = run_sweep(config, accelerator)
    if accelerator.is_main_process:
        print(f"\n{config.model}, evaluated on {record['dataset']}\n\n{sweep_table(record)}")
        print(f"The table, the figures behind it and pictures are in {output_folder(config)}.")


if __name__ == "__main__":
    run_command(main)
