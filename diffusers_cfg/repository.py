"""Check the token, the rights and the contents of a model repository or a Space on the Hub before publishing to it."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from .loading import check_token, first_line
from .model_files import INDEX, read_object

logger = logging.getLogger(__name__)

MAX_TRIES = 5
# The tag of what this package publishes
TAG = "diffusers-cfg"


class PublishError(RuntimeError):
    """An error in publishing a repository. The local files are unchanged and can be published again."""


def prepare_repository(
    repo_id: str,
    private: bool | None,
    token: str | None,
    overwrite: bool,
    create: bool = True,
    create_pr: bool = False,
    space_sdk: str | None = None,
) -> str:
    """
    Check the token and the repository, and create the repository if it does not exist.

    Args:
        repo_id (`str`), private (`bool`, *optional*), token (`str`, *optional*), overwrite (`bool`): As in
            `CFGPipeline.push_to_hub`.
        create (`bool`): Whether to create a missing repository.
        create_pr (`bool`): Whether a pull request is opened, for which the token needs no write access.
        space_sdk (`str`, *optional*): SDK of a Space, such as `"gradio"` or `"static"`. By default the repository is
            one of a model.

    Returns:
        `str`: Full name of the repository.

    Raises:
        PublishError: If the token is missing or invalid or cannot write, or the repository has other contents.
    """
    api, repo_type = HfApi(token=token), "model" if space_sdk is None else "space"
    try:
        check_token(token)
        user = retry(api.whoami)
    except Exception as error:
        raise PublishError(without_user(error)) from error
    if access_token(user).get("role") == "read":
        raise PublishError("The token can only read. Create a token with write access in your account settings.")
    if "/" not in repo_id:
        repo_id = f"{user['name']}/{repo_id}"
    try:
        try:
            files = set(retry(lambda: api.list_repo_files(repo_id, repo_type=repo_type)))
        except RepositoryNotFoundError:
            check_can_create(user, repo_id)
            if not create:
                return repo_id
            settings: dict[str, Any] = {"private": private, "repo_type": repo_type, "space_sdk": space_sdk}
            repo_id = retry(lambda: api.create_repo(repo_id, exist_ok=True, **settings)).repo_id
            files = set()
        if not create_pr:
            retry(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))
        is_empty = not files - {".gitattributes", "README.md"}
        if space_sdk is None:
            is_ours = overwrite or is_empty or holds_pipeline(repo_id, files, token)
        else:
            is_ours = overwrite or not files or holds_space(repo_id, space_sdk, None if is_empty else TAG, token)
    except PublishError:
        raise
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 403:
            raise PublishError(
                f"The token may not write to {repo_id}. Give it write access in your account settings, or choose a "
                "repository of your own."
            ) from error
        raise PublishError(f"{repo_id} cannot be created or read: {first_line(error)}") from error
    if not is_ours:
        content = "a CFGPipeline" if space_sdk is None else f"a {space_sdk} Space of diffusers-cfg"
        raise PublishError(
            f"{repo_id} exists and does not contain {content} ({', '.join(sorted(files)[:5])}, …). Choose a "
            "different name or pass overwrite."
        )
    return repo_id


def without_user(error: Exception) -> str:
    """Explain why the Hub does not say whose token it is."""
    log_in = "Log in with `hf auth login`, or pass a token with write access."
    if isinstance(error, LocalTokenNotFoundError):
        return f"No token for the Hub was found. {log_in}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"The Hub does not accept the token. {log_in}"
    if isinstance(error, ValueError):  # of check_token
        return str(error)
    return f"The Hub cannot be reached: {first_line(error)}. Check the network, and try again."


def access_token(user: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `whoami` says about the token."""
    return user.get("auth", {}).get("accessToken", {})


def check_can_create(user: Mapping[str, Any], repo_id: str) -> None:
    """
    Check that a token may create a repository, as far as `whoami` says.

    Args:
        user (`Mapping`): Answer of `whoami`.
        repo_id (`str`): `namespace/name`.

    Raises:
        PublishError: If the namespace belongs to others, or a fine-grained token may not write to it.
    """
    token = access_token(user)
    scopes = token.get("fineGrained", {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None:
        writable = [scope["entity"]["name"] for scope in scopes if "repo.write" in scope["permissions"]]
    elif token.get("role") == "write":
        organizations = [org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read"]
        writable = [user["name"], *organizations]
    else:
        return
    if repo_id.split("/")[0].lower() not in map(str.lower, writable):
        raise PublishError(
            f"The token may not create {repo_id}: it can write to {', '.join(writable) or 'nothing'}. Give it write "
            "access in your account settings, or choose a repository of your own."
        )


def holds_pipeline(repo_id: str, files: set[str], token: str | None) -> bool:
    """Return whether a repository contains a pipeline saved by this package."""
    if INDEX not in files:
        return False
    try:
        index = read_object(Path(retry(lambda: hf_hub_download(repo_id, INDEX, token=token))))
    except ValueError:
        return False
    return index.get("_class_name") == ["pipeline_cfg", "CFGPipeline"]


def holds_space(repo_id: str, sdk: str, tag: str | None, token: str | None) -> bool:
    """Return whether a Space has an SDK and, if one is given, a tag."""
    text = read_card(repo_id, token, "space")
    data = RepoCard(text, ignore_metadata_errors=True).data.to_dict() if text else {}
    return data.get("sdk") == sdk and (tag is None or tag in (data.get("tags") or []))


def read_card(repo_id: str, token: str | None, repo_type: str = "model") -> str | None:
    """Download the text of the card of a repository, its README.md; `None` if there is no card."""
    try:
        arguments: dict[str, Any] = {"repo_type": repo_type, "token": token, "force_download": True}
        path = retry(lambda: hf_hub_download(repo_id, "README.md", **arguments))
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def retry(call: Callable[[], Any]) -> Any:
    """Call a function, and retry with exponential backoff while the Hub is overloaded (429) or fails (5xx)."""
    for attempt in range(MAX_TRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if attempt == MAX_TRIES - 1 or status is None or not (status == 429 or status >= 500):
                raise
            wait = error.response.headers.get("Retry-After", "")  # seconds, or a date
            pause = float(wait) if wait.isdigit() else float(2**attempt)
            logger.warning("The Hub responded with status %s. Retrying in %.0f s.", status, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")
