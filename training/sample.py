# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Generate images with a trained model as a folder of PNGs, a grid, or an npz file for ADM's evaluator.

python training/sample.py --model cfg-model --class_labels three 7 --guidance_scale 2 --num_samples 20
accelerate launch training/sample.py --model me/cfg-digits --num_samples 50000 --format npz
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.evaluation.settings import SampleConfig


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    config = parse_config(SampleConfig, argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.sampling import draw_to_folder

    accelerator = make_accelerator()
    draw_to_folder(config, accelerator)
    if accelerator.is_main_process:
        print(f"Wrote {config.num_samples} images to {config.output_dir}.")


if __name__ == "__main__":
    run_command(main)
