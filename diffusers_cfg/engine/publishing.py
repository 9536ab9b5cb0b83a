"""Publish a run on the Hub, at its end and in the background at each checkpoint."""

import logging
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from diffusers import DiffusionPipeline

from diffusers_cfg.config import CommandError, UserError
from diffusers_cfg.files import disk_errors
from diffusers_cfg.hub import publish
from diffusers_cfg.repository import PublishError, prepare_repository
from diffusers_cfg.settings import TrainConfig

logger = logging.getLogger(__name__)


class NotPublished(CommandError):
    """An error after training has succeeded but publishing has failed."""

    # EX_TEMPFAIL of sysexits.h, "try again later"
    exit_code = 75


class BackgroundPublisher:
    """
    A publisher of checkpoints that uploads in the background. It skips a checkpoint while an upload is in progress. A
    failed upload is logged as a warning, because the next upload may succeed.

    Args:
        repo_id (`str`): the repository on the Hub.
        token (`str`, *optional*): the Hub token; by default that of `hf auth login`.
    """

    def __init__(self, repo_id: str, token: str | None) -> None:
        self.repo_id, self.token = repo_id, token
        self.executor, self.upload = ThreadPoolExecutor(1), None

    def publish(self, pipeline: DiffusionPipeline, step: int) -> None:
        """Save a copy of the pipeline, and start to upload it."""
        if self.upload is not None and not self.upload.done():
            logger.info("Step %d is not published, because an upload is still in progress.", step)
            return
        folder = tempfile.mkdtemp()
        try:
            with disk_errors():
                pipeline.save_pretrained(folder)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("Failed to save a copy of step %d for publishing: %s", step, error)
            return
        self.upload: Future = self.executor.submit(self._publish, folder, step)

    def _publish(self, folder: str, step: int) -> None:
        try:
            publish(folder, self.repo_id, commit_message=f"Step {step}", token=self.token, verify=False)
        except Exception as error:  # The executor would hide the error, and a failed upload must not end the run.
            logger.warning("Failed to publish step %d: %s", step, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Wait until the current upload has finished."""
        self.executor.shutdown()


def check_hub(config: TrainConfig) -> str:
    """
    Check before training that the model can be pushed to the Hub, and return the full name of the repository.

    Raises:
        UserError: if the token is missing or cannot write, or the repository has other contents.
    """
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        return prepare_repository(
            name, config.hub_private_repo or None, config.hub_token, config.overwrite_hub_repo, not config.dry_run
        )
    except PublishError as error:
        raise UserError(f"--push_to_hub: {error}") from error


def publish_run(config: TrainConfig, repo_id: str) -> None:
    """Publish the output folder of a run and print the URL. Raise NotPublished if it fails."""
    try:
        url = publish(config.output_dir, repo_id, token=config.hub_token, overwrite=True)
    except PublishError as error:
        raise NotPublished(
            f"{error}\nTraining has finished, and the model is saved in {config.output_dir}. Publish it with:\n"
            f"  python training/publish.py {config.output_dir} --repo_id {repo_id}"
        ) from error
    print(f"Published to {url}. The published model generates the same image as the local one.")
