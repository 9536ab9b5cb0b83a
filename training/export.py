# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[export]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Export a model to ONNX, or to a static page that samples in the browser.

python training/export.py --model cfg-model --format html --output_dir exported
python training/export.py --model cfg-model --format onnx --output_dir exported
"""

from diffusers_cfg.config import parse_config, run_command
from diffusers_cfg.export.settings import ExportConfig, check_environment


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    config = parse_config(ExportConfig, argv)
    check_environment(config)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.export.export import export_model

    for path in export_model(config):
        print(f"Wrote {path} ({path.stat().st_size / 1e6:.2f} MB).")


if __name__ == "__main__":
    run_command(main)
