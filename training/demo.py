# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[demo]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Open a page in the browser that generates images with a trained model.

python training/demo.py --model cfg-model
python training/demo.py --model me/cfg-digits --port 8000
"""

from diffusers_cfg.config import CommandParser, UserError, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    parser = CommandParser(description="Open a page in the browser that generates images with a trained model.")
    parser.add_argument("--model", required=True, help="The output folder of a training run, or a Hub repository.")
    parser.add_argument("--variant", help="The variant of the weights to load, such as ema999.")
    parser.add_argument("--port", type=int, help="The port of the page; by default the first free one from 7860.")
    args = parser.parse_args(argv)
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.demo.page import check_gradio, check_port, launch
    from diffusers_cfg.space import load_demo

    try:
        check_gradio()
        if args.port is not None:
            check_port(args.port)
        demo = load_demo(args.model, args.variant)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(str(error)) from error
    page = launch(demo, server_port=args.port, prevent_thread_lock=True, quiet=True)
    print(f"Open {page.local_url} in a browser. Ctrl-C ends the demo.", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_command(main)
