"""Publish Spaces on the Hub: pages that generate images with a published model."""

import re
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, SpaceCardData, constants

from .demo.generation import Demo
from .hub import CFGPipeline, checked_folder, publish
from .model_files import RUN, read_json
from .repository import TAG, PublishError, prepare_repository, read_card, retry
from .scheduling_log_snr import LogSNRScheduler

# This folder is copied to Spaces, under the name that app.py imports it by.
DEMO_FOLDER = Path(__file__).parent / "demo"
APP = """\"\"\"Generate images with {repo_id}.\"\"\"

from diffusers import DiffusionPipeline

from cfg_demo.generation import Demo
from cfg_demo.page import launch

# The repository's code is run, and the revision is pinned, so that later changes to it are not.
arguments = {{"revision": "{revision}"}}
pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True, **arguments)

if __name__ == "__main__":
    launch(Demo(pipe, "{repo_id}", arguments, absent={absent}))
"""
README = """# {title}

A page that generates images with [{repo_id}](https://huggingface.co/{repo_id}), at revision `{revision}`. It was
published with diffusers-cfg, by `training/publish.py --space`, which replaces its files.
"""
PAGE = "index.html"
PAGE_README = """# {title}

A page that samples a diffusion model in the reader's browser, without a server. It was made with diffusers-cfg, by
`training/export.py`, and published by `training/publish.py --space`, which replaces its files.
"""


def load_demo(model: str, variant: str | None = None) -> Demo:
    """
    Load a model with this package's classes, to show it.

    Args:
        model (`str`): Folder or repository.
        variant (`str`, *optional*): Variant of the weights.

    Raises:
        OSError: If there is no such model.
        ValueError: If it cannot be loaded, or its samples are not pictures.
    """
    pipe = CFGPipeline.from_pretrained(model, variant=variant)
    absent = read_json(Path(pipe.name_or_path) / RUN).get("method", {}).get("classes_without_images", [])
    arguments = {} if variant is None else {"variant": variant}
    return Demo(pipe, model, arguments, absent, {"LogSNRScheduler": LogSNRScheduler})


def publish_space(
    repo_id: str,
    files: Mapping[str, bytes],
    data: SpaceCardData,
    text: str,
    token: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
) -> str:
    """
    Publish a Space in one commit. Metadata of an existing Space that `data` does not contain is kept.

    Args:
        repo_id (`str`): `namespace/name`, or a name in your own namespace. Created if it does not exist.
        files (`Mapping[str, bytes]`): Contents of the files by name, without README.md.
        data (`SpaceCardData`): Metadata with an `sdk`, such as `"gradio"` or `"static"`, which must be that of an
            existing Space.
        text (`str`): Markdown of README.md.
        token (`str`, *optional*), private (`bool`, *optional*), overwrite (`bool`, *optional*, defaults to `False`): As
            in `CFGPipeline.push_to_hub`.

    Returns:
        `str`: URL of the Space.

    Raises:
        PublishError: If the Space could not be published, or exists with other contents or another SDK.
    """
    repo_id = prepare_repository(repo_id, private, token, overwrite, space_sdk=data.sdk)
    try:
        # The tag marks the Space as one of this package, which may replace it.
        metadata = {**data.to_dict(), "tags": list(dict.fromkeys([*(data.tags or []), TAG]))}
        if existing := read_card(repo_id, token, "space"):
            metadata = {**RepoCard(existing, ignore_metadata_errors=True).data.to_dict(), **metadata}
        card = f"---\n{SpaceCardData(**metadata, ignore_metadata_errors=True).to_yaml()}\n---\n\n{text}"
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        arguments: dict[str, Any] = {"repo_type": "space", "commit_message": "Upload the demo"}
        retry(lambda: HfApi(token=token).create_commit(repo_id, operations, **arguments))
    except Exception as error:  # network errors have many types
        raise PublishError(f"The Space {repo_id} could not be published: {error}") from error
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def publish_with_demo(
    folder: str,
    repo_id: str | None,
    space: str,
    commit_message: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> tuple[str, str]:
    """
    Publish a saved pipeline and a Gradio Space that shows it. The model card links to the Space, and the Space loads
    the revision of the model that was published with it.

    Args:
        folder (`str`): As in `publish`.
        repo_id (`str`, *optional*): Repository of the model. By default it has the name of the folder and the namespace
            of the Space.
        space (`str`): Repository of the Space, `namespace/name` or a name in your own namespace.
        commit_message (`str`, *optional*), token (`str`, *optional*), overwrite (`bool`, *optional*, defaults to
            `False`): As in `publish`.

    Returns:
        The URL of the model's commit and the URL of the Space.

    Raises:
        PublishError: If the model cannot be shown, a repository cannot be written, or publishing failed. Both
            repositories are checked before anything is uploaded.
    """
    try:
        absent = load_demo(str(checked_folder(folder))).absent  # which checks that the page can show it
    except (OSError, ValueError) as error:
        raise PublishError(str(error)) from error
    space = prepare_repository(space, None, token, overwrite, create=False, space_sdk="gradio")
    repo_id = repo_id or f"{space.split('/')[0]}/{Path(folder).resolve().name}"
    repo_id = prepare_repository(repo_id, None, token, overwrite, create=False)
    if HfApi(token=token).repo_exists(repo_id) and retry(lambda: HfApi(token=token).model_info(repo_id)).private:
        raise PublishError(
            f"{repo_id} is private, and a Space cannot read it without a token of yours. Make it public, or publish it "
            "without --space."
        )

    url = publish(folder, repo_id, commit_message, token=token, overwrite=overwrite, space=space)
    revision = url.rpartition("/commit/")[2]
    title, facts = space.split("/")[1], {"repo_id": repo_id, "revision": revision}
    files = {
        "app.py": APP.format(absent=sorted(absent), **facts),
        **{f"cfg_demo/{path.name}": path.read_text(encoding="utf-8") for path in DEMO_FOLDER.glob("*.py")},
        "requirements.txt": "".join(f"{requirement}\n" for requirement in space_requirements()),
    }
    gradio = next(text.partition("==")[2] for text in space_requirements() if text.startswith("gradio=="))
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=gradio, app_file="app.py", models=[repo_id], emoji="🎲", pinned=False
    )
    try:
        contents = {name: text.encode() for name, text in files.items()}
        return url, publish_space(space, contents, data, README.format(title=title, **facts), token, None, overwrite)
    except PublishError as error:
        raise PublishError(f"The model was published ({url}), but not its demo. {error}") from error


def publish_folder(folder: str, repo_id: str | None, space: str | None, **settings: Any) -> str:
    """
    Publish what a folder contains: a saved pipeline, as a repository and with `space` also as a demo, or a page of
    `export.py`, as a Space.

    Args:
        folder (`str`), repo_id (`str`, *optional*), space (`str`, *optional*): As in `publish`, `publish_with_demo` and
            `publish_page`.
        settings (`dict`): Other arguments of `publish`.

    Returns:
        `str`: What was published, for the user.

    Raises:
        PublishError: If the folder contains neither, the arguments do not go with it, or publishing failed.
    """
    if Path(folder, PAGE).is_file() and not Path(folder, DiffusionPipeline.config_name).exists():
        if repo_id is not None or space is None:
            raise PublishError(f"{folder} contains a page of export.py, which is published by --space alone.")
        return f"Published the page: {publish_page(folder, space, settings['token'], settings['overwrite'])}"
    text = "Published, and verified that the published model generates the same image: "
    if space is None:
        assert repo_id is not None  # the command asks for one of both
        return text + publish(folder, repo_id, **settings)
    shared = {name: settings[name] for name in ("commit_message", "token", "overwrite")}
    url, demo = publish_with_demo(folder, repo_id, space, **shared)
    return f"{text}{url}\nPublished a demo, which starts in a few minutes: {demo}"


def publish_page(folder: str, space: str, token: str | None = None, overwrite: bool = False) -> str:
    """
    Publish the page of a folder as a static Space.

    Args:
        folder (`str`): Folder with the `index.html` of `export.py`.
        space (`str`), token (`str`, *optional*), overwrite (`bool`, *optional*, defaults to `False`): As in
            `publish_with_demo`.

    Returns:
        `str`: URL of the Space.

    Raises:
        PublishError: If the Space could not be published, or exists with other contents or another SDK.
    """
    title = space.split("/")[-1]
    data = SpaceCardData(title=title, sdk="static", app_file=PAGE, emoji="🎲", pinned=False)
    files = {PAGE: Path(folder, PAGE).read_bytes()}
    return publish_space(space, files, data, PAGE_README.format(title=title), token, overwrite=overwrite)


def space_requirements() -> list[str]:
    """
    Return the requirements of a Space: those of this package, which a published model needs too, with torch and
    diffusers in the versions that the model was published with, and the lowest supported Gradio.
    """
    found = []
    for text in requires("diffusers-cfg") or []:
        requirement, _, marker = (part.strip() for part in text.partition(";"))
        name = re.split(r"[^\w-]", requirement)[0]
        if name == "torch":
            found.append(f"torch=={version('torch').partition('+')[0]}")  # without the name of a build, such as +cpu
        elif name == "diffusers":
            found.append(f"diffusers=={diffusers.__version__}")
        elif not marker:
            found.append(requirement)
        elif name == "gradio" and "demo" in marker:
            found.append(requirement.replace(">=", "=="))
    return found
