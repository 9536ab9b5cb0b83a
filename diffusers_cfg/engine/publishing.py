"""Publish a run on the Hub: at its end, and in the background at each checkpoint."""

import logging
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from diffusers_cfg.config import CommandError, UserError
from diffusers_cfg.hub import PublishError, prepare_repository, publish
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)


class NotPublished(CommandError):
    """Training succeeded but the model could not be published."""

    # EX_TEMPFAIL of sysexits.h, "try again later"
    exit_code = 75


class BackgroundPublisher:
    """
    Publish checkpoints while the run continues. One that comes during another's upload is skipped, and a failure is a
    warning: the next upload may succeed.
    """

    def __init__(self, repo_id: str, token: str | None):
        self.repo_id, self.token = repo_id, token
        self.executor, self.upload = ThreadPoolExecutor(1), None

    def publish(self, pipeline: DiffusionPipeline, step: int) -> None:
        """Copy the pipeline as it is now, and begin to upload the copy."""
        if self.upload is not None and not self.upload.done():
            logger.info("Step %d is not published: the upload of the one before has not ended.", step)
            return
        folder = tempfile.mkdtemp()
        try:
            pipeline.save_pretrained(folder)
        except (OSError, SafetensorError) as error:  # which safetensors raises for a full disk too
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("Step %d was not published: it could not be copied: %s", step, error)
            return
        self.upload: Future = self.executor.submit(self._publish, folder, step)

    def _publish(self, folder: str, step: int) -> None:
        try:
            publish(folder, self.repo_id, commit_message=f"Step {step}", token=self.token, verify=False)
        except Exception as error:  # nobody else would see it, and it must not end the run
            logger.warning("Step %d was not published: %s", step, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Wait for the upload that has not ended."""
        self.executor.shutdown()


def check_hub(config: TrainConfig) -> str:
    """
    Check before training that the model can be pushed to the Hub. Return the full name of the repository.

    Raises:
        UserError: the token is missing or cannot write, or the repository holds something else.
    """
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        return prepare_repository(
            name, config.hub_private_repo or None, config.hub_token, config.overwrite_hub_repo, not config.dry_run
        )
    except PublishError as error:
        raise UserError(f"--push_to_hub: {error}") from error


def publish_run(config: TrainConfig, repo_id: str) -> None:
    """Publish the output folder of a run, and print where. Raises NotPublished if it cannot be."""
    try:
        url = publish(config.output_dir, repo_id, token=config.hub_token, overwrite=True)
    except PublishError as error:
        raise NotPublished(
            f"{error}\nThe run is done and its model is saved in {config.output_dir}. Publish it with:\n"
            f"  python training/publish.py {config.output_dir} --repo_id {repo_id}"
        ) from error
    print(f"Published, and checked that it draws the same image: {url}")
