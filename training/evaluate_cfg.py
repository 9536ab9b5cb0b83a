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
accelerate launch training/evaluate_cfg.py --model cfg-imagenet64 --num_samples 50000 --feature_extractor inception \
    --reference VIRTUAL_imagenet64_labeled.npz

For each w the command generates labelled samples and compares them with the training data of the model. An interrupted
sweep resumes from its existing samples. `--report_to` sends the results to trackers.
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.evaluation.settings import TrackedEvaluationConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    config = parse_config(TrackedEvaluationConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from PIL import Image

    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.engine.tracking import Table, Trackers
    from diffusers_cfg.evaluation.reports import sweep_cells, sweep_curves, sweep_table
    from diffusers_cfg.evaluation.sweep import output_folder, run_sweep
    from diffusers_cfg.settings import TrainConfig

    folder = output_folder(config)
    tracking = TrainConfig(
        output_dir=str(folder),
        report_to=config.report_to,
        tracker_project_name=config.tracker_project_name,
        run_name=config.run_name or f"{config.model_name}-evaluation",
    )
    accelerator = make_accelerator(tracking)
    trackers = Trackers(tracking, accelerator, config.public())
    record = run_sweep(config, accelerator, on_start=trackers.start)
    if accelerator.is_main_process:
        print(f"\n{config.model}, evaluated on {record['dataset']}\n\n{sweep_table(record)}")
        print(f"The tables, the metrics, the curves and the pictures are in {folder}.")
        curves = sweep_curves(record, "evaluation/")
        last = len(curves) - 1
        trackers.log_curves("evaluation/w", curves)
        trackers.log_table("evaluation/table", Table(*sweep_cells(record), sweep_table(record)), last)
        for name in ("curves", "grid"):
            trackers.log_image(f"evaluation/{name}", Image.open(folder / f"{name}.png"), last)
    trackers.finish()


if __name__ == "__main__":
    run_command(main)
