"""A pipeline's repository on the Hub: one call publishes it, and door two loads it without running its code."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from . import pipeline_cfg
from .model_card import FACTS, SAMPLES, find_samples, model_card

logger = logging.getLogger(__name__)

# What a repository consists of, and all that is ever uploaded: a list of what is allowed, so that optimizer states,
# logs, and settings with paths and tokens stay at home.
COMPONENTS = ("unet", "scheduler", "vae", "guide_unet", "guider")
COMPONENT_FILES = (
    "config.json",
    "scheduler_config.json",
    "guider_config.json",
    "*.safetensors",
    "*.safetensors.index*.json",
    "*_cfg.py",
    "scheduling_log_snr.py",
)
ROOT_FILES = ("model_index.json", "pipeline_cfg.py", *FACTS)
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
MAX_TRIES = 5

# Run in a process of its own: it has nothing but what was published.
DRAW = """
import sys
import torch
from diffusers_cfg import CFGPipeline

source, revision, variant, target = sys.argv[1:]
pipe = CFGPipeline.from_pretrained(source, revision=revision or None, variant=variant or None)
pipe.set_progress_bar_config(disable=True)
image = pipe(0, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(image, target)
"""


class PublishError(RuntimeError):
    """The repository could not be published. What was to be published is unharmed, and can be published again."""


class CFGPipeline(pipeline_cfg.CFGPipeline):
    __doc__ = pipeline_cfg.CFGPipeline.__doc__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "CFGPipeline":
        """
        Load a pipeline from a folder or from the Hub, with this package's classes: no code of the repository is run, or
        even downloaded. Takes the arguments of `DiffusionPipeline.from_pretrained`: `revision`, `variant`, `dtype`,
        `token`, `cache_dir`, `local_files_only`, …

        Raises:
            ValueError: the repository is of another kind of pipeline, or needs code that is not this package's; or
                other weights than safetensors are asked for.
        """
        if kwargs.get("custom_pipeline") is not None:
            raise ValueError(
                f"custom_pipeline={kwargs['custom_pipeline']!r}: {cls.__name__} runs no other code than its own. Use "
                "DiffusionPipeline.from_pretrained."
            )
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("Weights are read from safetensors only: other formats can run code.")
        folder = str(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            folder = cls._download(folder, kwargs)
        return super().from_pretrained(folder, **kwargs)

    @staticmethod
    def _download(repo_id: str, kwargs: dict[str, Any]) -> str:
        """Bring the files of a repository into the cache, or find them there. Returns the folder."""
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        # A component without weights of the variant is loaded with those that it has.
        for suffix in dict.fromkeys((variant, "")):
            folder = snapshot_download(
                repo_id,
                allow_patterns=[
                    *("model_index.json", *FACTS, SAMPLES),
                    *("*/config.json", "*/scheduler_config.json", f"*/*.safetensors.index{suffix}.json"),
                    *(
                        f"*/diffusion_pytorch_model{suffix}.safetensors",
                        f"*/diffusion_pytorch_model{suffix}-*.safetensors",
                    ),
                ],
                **hub_arguments,
            )
            models = [config.parent for config in Path(folder).glob("*/config.json")]
            if all(any(model.glob("*.safetensors")) for model in models):
                break
        return folder

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        As `DiffusionPipeline.save_pretrained`, in safetensors only; `push_to_hub=True` publishes the folder as
        `push_to_hub` would, and takes its arguments.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError("safe_serialization=False: weights are written as safetensors only, which run no code.")
        names = ("repo_id", "commit_message", "private", "token", "create_pr", "overwrite")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if push_to_hub:
            hub_arguments.setdefault("repo_id", Path(save_directory).name)
            publish(save_directory, variant=kwargs.get("variant"), **hub_arguments)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        overwrite: bool = False,
    ) -> str:
        """
        Publish the pipeline, its code and a model card in one commit, and check that what was published draws the same
        image. The card is filled from the files of the run that the pipeline was loaded from.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own namespace. Made if it does not exist.
            commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), create_pr
                (`bool`): as in diffusers.
            variant (`str`, *optional*): publish the weights under this name, such as `"fp16"`, beside those there are.
            overwrite (`bool`): publish into a repository that holds something else.

        Returns:
            `str`: the address of the commit.

        Raises:
            PublishError: it could not be published, or what was published does not draw the same image.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            source = Path(self.name_or_path or folder)
            for name in FACTS:
                if (source / name).is_file():
                    (Path(folder) / name).parent.mkdir(exist_ok=True)
                    shutil.copy(source / name, Path(folder) / name)
            if (samples := find_samples(source)) is not None:
                shutil.copy(samples, Path(folder) / SAMPLES)
            return publish(
                folder, repo_id, commit_message, private, token, create_pr, variant=variant, overwrite=overwrite
            )


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> str:
    """
    Publish a saved pipeline, such as the output folder of a training run, in one commit. Arguments, result and errors
    are those of `CFGPipeline.push_to_hub`; `verify=False` leaves out the check at the end.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise PublishError(f"{folder} is not a saved pipeline: it has no model_index.json.")
    try:
        repo_id = prepare_repository(repo_id, private, token, overwrite)
        card = model_card(folder, repo_id, read_card(repo_id, token))
        operations = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in allowed_files(folder)]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        if (samples := find_samples(folder)) is not None:
            operations.append(CommitOperationAdd(SAMPLES, samples))
        commit = retry(
            lambda: HfApi(token=token).create_commit(
                repo_id, operations, commit_message=commit_message or "Upload CFGPipeline", create_pr=create_pr
            )
        )
    except PublishError:
        raise
    except Exception as error:  # the network fails in many ways, and none of them is to look like a failure of the run
        raise PublishError(f"{repo_id} could not be published: {error}") from error
    if verify:
        verify_published(folder, repo_id, commit.pr_revision if create_pr else commit.oid, token, variant)
    return commit.commit_url


def prepare_repository(
    repo_id: str, private: bool | None, token: str | None, overwrite: bool, create: bool = True
) -> str:
    """
    Check the token and the repository, and make it if it does not exist and is to. Returns its full name.

    Raises:
        PublishError: the token is missing, wrong or cannot write; or the repository holds something else.
    """
    api = HfApi(token=token)
    try:
        user = retry(api.whoami)
    except Exception as error:
        raise PublishError(
            f"The Hub does not accept the token, or there is none: {error}. Log in with `hf auth login`, or pass one."
        ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishError("The token can only read. Make one that can write in the settings of your account.")
    if "/" not in repo_id:
        repo_id = f"{user['name']}/{repo_id}"
    try:
        try:
            files = set(retry(lambda: api.list_repo_files(repo_id)))
        except RepositoryNotFoundError:
            if not create:
                return repo_id
            return retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        ours = overwrite or not files - {".gitattributes", "README.md"} or holds_pipeline(repo_id, files, token)
    except Exception as error:
        raise PublishError(f"{repo_id} cannot be made or looked at: {error}") from error
    if not ours:
        raise PublishError(
            f"{repo_id} exists and holds something else ({', '.join(sorted(files)[:5])}, …). Choose another name, or "
            "ask for it to be overwritten."
        )
    return repo_id


def holds_pipeline(repo_id: str, files: set[str], token: str | None) -> bool:
    """Whether a repository is one of this package's."""
    if "model_index.json" not in files:
        return False
    index = json.loads(Path(hf_hub_download(repo_id, "model_index.json", token=token)).read_text(encoding="utf-8"))
    return index.get("_class_name") == ["pipeline_cfg", "CFGPipeline"]


def read_card(repo_id: str, token: str | None) -> str | None:
    """The card that the repository has, as it stands there."""
    try:
        path = retry(lambda: hf_hub_download(repo_id, "README.md", token=token, force_download=True))
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def allowed_files(folder: Path) -> list[Path]:
    """The files of a saved pipeline that belong into its repository."""
    found = [folder / name for name in ROOT_FILES]
    found += [path for name in COMPONENTS for pattern in COMPONENT_FILES for path in (folder / name).glob(pattern)]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def verify_published(folder: Path, repo_id: str, revision: str, token: str | None, variant: str | None) -> None:
    """Draw an image from the folder and one from the Hub, in fresh processes. Raises PublishError if they differ."""
    with tempfile.TemporaryDirectory() as temporary:
        images = []
        for i, (source, at) in enumerate(((str(folder), ""), (repo_id, revision))):
            target = os.path.join(temporary, f"{i}.pt")
            # The token goes by the environment: arguments can be read by everyone on the machine.
            environment = {**os.environ, **({"HF_TOKEN": token} if token else {})}
            process = subprocess.run(
                [sys.executable, "-c", DRAW, source, at, variant or "", target],
                capture_output=True,
                text=True,
                env=environment,
            )
            if process.returncode != 0:
                raise PublishError(
                    f"{repo_id} was published, but an image could not be drawn from {source}:\n{process.stderr[-2000:]}"
                )
            images.append(torch.load(target, weights_only=True))
    if not torch.equal(*images):
        raise PublishError(f"{repo_id} was published, but does not draw the image that {folder} draws.")


def retry(call: Callable[[], Any]) -> Any:
    """Call, and again with growing pauses while the Hub is overloaded (429) or out of order (5xx)."""
    for attempt in range(MAX_TRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if attempt == MAX_TRIES - 1 or status is None or not (status == 429 or status >= 500):
                raise
            pause = float(error.response.headers.get("Retry-After", 2**attempt))
            logger.warning("The Hub answered %s; trying again in %.0f s.", status, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")
