"""Publish the output folder of a training run on the Hub, with its code and a model card.

python training/publish.py cfg-model --repo_id me/cfg-model
"""

import logging
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger(__name__)

# "Try again later", as sysexits.h has it: the run is done and its model is safe, only the Hub was not to be had.
EXIT_NOT_PUBLISHED = 75


class BackgroundPublisher:
    """
    Publishes checkpoints while the run goes on. One that comes while another is on its way is left out, and one that
    fails is a warning: the next may not.
    """

    def __init__(self, repo_id: str, token: str | None):
        self.repo_id, self.token = repo_id, token
        self.executor, self.upload = ThreadPoolExecutor(1), None

    def publish(self, pipeline, step: int) -> None:
        """Copy the pipeline as it is now, and begin to upload the copy."""
        if self.upload is not None and not self.upload.done():
            logger.info("Step %d is not published: the one before is still on its way.", step)
            return
        folder = tempfile.mkdtemp()
        pipeline.save_pretrained(folder)
        self.upload: Future = self.executor.submit(self._publish, folder, step)

    def _publish(self, folder: str, step: int) -> None:
        from diffusers_cfg.hub import PublishError, publish

        try:
            publish(folder, self.repo_id, commit_message=f"Step {step}", token=self.token, verify=False)
        except PublishError as error:
            logger.warning("Step %d was not published: %s", step, error)
        finally:
            shutil.rmtree(folder)

    def close(self) -> None:
        """Wait for the upload that is on its way."""
        self.executor.shutdown()


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="publish.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="The output folder of a training run, or another saved pipeline.")
    parser.add_argument("--repo_id", required=True, help="The repository, NAMESPACE/NAME. Made if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Make it a private one, if it is made.")
    parser.add_argument("--token", help="A token that can write; by default that of `hf auth login`.")
    parser.add_argument("--commit_message", help="By default 'Upload CFGPipeline'.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    parser.add_argument("--overwrite", action="store_true", help="Publish into a repository that holds something else.")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    from diffusers_cfg.hub import PublishError, publish

    try:
        url = publish(
            args.folder,
            args.repo_id,
            args.commit_message,
            private=args.private or None,
            token=args.token,
            create_pr=args.create_pr,
            overwrite=args.overwrite,
        )
    except PublishError as error:
        print(f"publish.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_NOT_PUBLISHED)
    print(f"Published, and checked that it draws the same image: {url}")


if __name__ == "__main__":
    main()
