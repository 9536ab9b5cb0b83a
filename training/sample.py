# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Draw images with a trained model: a folder of PNGs, a grid, or an npz file as ADM's evaluator reads it.

python training/sample.py --model cfg-model --class_labels three 7 --guidance_scale 2 --num_samples 20
accelerate launch training/sample.py --model me/cfg-digits --num_samples 50000 --format npz
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.evaluation.settings import SampleConfig


def main(argv: list[str] | None = None) -> None:
    config = parse_config(SampleConfig, argv)
    # Here and not above: torch takes seconds, which --help and a wrong flag need not wait for.
    from diffusers_cfg.engine.accelerator import make_accelerator
    from diffusers_cfg.evaluation.sampling import draw_to_folder

    accelerator = make_accelerator()
    draw_to_folder(config, accelerator)
    if accelerator.is_main_process:
        print(f"{config.num_samples} images are in {config.output_dir}.")


if __name__ == "__main__":
    run_command(main)
