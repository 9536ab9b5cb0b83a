# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-cfg[train]"]
#
# [tool.uv.sources]
# diffusers-cfg = { path = "..", editable = true }
# ///
"""Publish the output folder of a training run to the Hub, with its code and a model card, or a page of export.py.

python training/publish.py cfg-model --repo_id me/cfg-model
python training/publish.py cfg-model --space me/demo
python training/publish.py exported --space me/page
"""

from diffusers_cfg.config import CommandParser, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv`, by default `sys.argv[1:]`."""
    parser = CommandParser(description="Publish the output folder of a training run to the Hub, with a model card.")
    parser.add_argument(
        "folder", help="The output folder of a training run, any saved pipeline, or a page of export.py."
    )
    parser.add_argument(
        "--repo_id",
        help="The repository, NAMESPACE/NAME, which is created if it does not exist. With --space it defaults to the "
        "name of the folder in the namespace of the Space.",
    )
    parser.add_argument("--space", help="A Space, NAMESPACE/NAME, to publish, which shows the model or the page.")
    parser.add_argument("--private", action="store_true", help="Create a private repository.")
    parser.add_argument("--token", help="A token with write access; defaults to the token of `hf auth login`.")
    parser.add_argument("--commit_message", help="The commit message; defaults to 'Upload CFGPipeline'.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Publish even if the repository or the Space contains something else.",
    )
    args = parser.parse_args(argv)
    if not (args.repo_id or args.space):
        parser.error("one of the arguments --repo_id, --space is required")
    if args.space is not None and (args.private or args.create_pr):
        parser.error("--space needs a public model, and cannot be combined with --private or --create_pr")
    # Imported here so that --help and flag errors do not wait for torch.
    from diffusers_cfg.engine.publishing import NotPublished
    from diffusers_cfg.repository import PublishError
    from diffusers_cfg.space import publish_folder

    try:
        print(publish_folder(**{**vars(args), "private": args.private or None}))
    except PublishError as error:
        raise NotPublished(f"publish.py: error: {error}") from error


if __name__ == "__main__":
    run_command(main)
