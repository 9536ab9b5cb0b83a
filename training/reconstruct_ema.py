# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Reconstruct an average of the weights of any length after training, from the snapshots of its post-hoc EMA.

python training/train_cfg.py --posthoc_ema_steps 100
python training/reconstruct_ema.py --model cfg-model --sigma_rel 0.15 --output_dir cfg-model-0.15

The length σ_rel is the standard deviation of the average over time, relative to the length of the run (Karras et al.
2023, arXiv 2312.02696).
"""

from diffusers_cfg.config import CommandParser, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    parser = CommandParser(
        description="Save a trained model with an average of its weights of another length (arXiv 2312.02696)."
    )
    parser.add_argument("--model", required=True, help="The output folder of a run with --posthoc_ema_steps.")
    parser.add_argument(
        "--sigma_rel",
        required=True,
        type=float,
        help="The length σ_rel, between 0 and 0.2887; the closer to the tracked 0.05 and 0.1, the more exact.",
    )
    parser.add_argument("--output_dir", required=True, help="The folder to save the model to.")
    args = parser.parse_args(argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.accelerator import configure_logging
    from diffusers_cfg.engine.reconstruction import reconstruct
    from diffusers_cfg.methods.vdm import save_with_schedule

    configure_logging(is_main_process=True)
    savers = {"noise_schedule": save_with_schedule}
    error = reconstruct(args.model, args.sigma_rel, args.output_dir, savers)
    print(f"Saved the model to {args.output_dir}. Relative error of the profile of its average: {error:.2%}")


if __name__ == "__main__":
    run_command(main)
