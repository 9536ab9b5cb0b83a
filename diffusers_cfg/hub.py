"""Publish pipelines to the Hub and load them without running remote code."""

import io
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import yaml_dump

from . import pipeline_cfg
from .loading import (
    HUB_ARGUMENTS,
    CompleteAutoencoder,
    check_components,
    check_index,
    check_pipeline_folder,
    find_folder,
)
from .model_card import model_card
from .model_files import (
    CONFIG,
    FACTS,
    INDEX,
    RUN,
    SAMPLES,
    class_picture,
    example_classes,
    find_samples,
    read_json,
)
from .repository import PublishError, prepare_repository, read_card, retry

# The only files that are uploaded. An allowlist, so that optimizer states, logs, and settings with paths and tokens are
# never published.
COMPONENTS = ("unet", "scheduler", "vae", "guide_unet", "guider", "classifier")
COMPONENT_FILES = (
    "config.json",
    "scheduler_config.json",
    "guider_config.json",
    "*.safetensors",
    "*.safetensors.index*.json",
    "*_cfg.py",
    "scheduling_log_snr.py",
    "classifier_2d.py",
)
# The scale s at which a classifier guides the example images
CLASSIFIER_SCALE = 1.0
ROOT_FILES = (INDEX, "pipeline_cfg.py", *FACTS)


class CFGPipeline(pipeline_cfg.CFGPipeline):
    __doc__ = pipeline_cfg.CFGPipeline.__doc__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "CFGPipeline":
        """
        Load a pipeline from a folder or from the Hub with this package's classes. Code in the repository is neither
        downloaded nor run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `namespace/name` on the Hub.
            **kwargs: Arguments of `DiffusionPipeline.from_pretrained`: `revision`, `variant`, `dtype`, `token`,
                `cache_dir`, `local_files_only`, …

        Returns:
            `CFGPipeline`: The pipeline.

        Raises:
            OSError: If there is no such folder or repository, or it contains no pipeline.
            ValueError: If the repository contains a different kind of pipeline or needs its own code, if a file is
                missing or damaged, or if weights in a format other than safetensors are requested.

        Examples:

        ```py
        >>> from diffusers_cfg import CFGPipeline

        >>> pipe = CFGPipeline.from_pretrained("namespace/name")
        >>> image = pipe(class_labels=3, guidance_scale=2.0).images[0]
        ```
        """
        if kwargs.get("custom_pipeline") is not None:
            raise ValueError(
                f"custom_pipeline={kwargs['custom_pipeline']!r} is not supported: {cls.__name__} does not run remote "
                "code. Use DiffusionPipeline.from_pretrained."
            )
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                f"use_safetensors={kwargs['use_safetensors']} is not supported: loading weights in other formats can "
                "run code. Leave it out."
            )
        kwargs.pop("trust_remote_code", None)  # remote code is never run
        source = str(pretrained_model_name_or_path)
        folder = Path(cls.download(pretrained_model_name_or_path, **kwargs))
        check_pipeline_folder(folder, source)
        # `load_config` is annotated to return a tuple as well, but does so only with `return_unused_kwargs`.
        index = cast(dict[str, Any], cls.load_config(folder))
        check_components(folder, index, kwargs.get("variant"), kwargs.keys())
        try:
            return super().from_pretrained(str(folder), **kwargs)
        except Exception as error:  # damaged files and configs raise exceptions of many types
            problem = str(error) if str(folder) in str(error) else f"{source} cannot be loaded: {error}"
            raise ValueError(problem) from error

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> str:
        """
        Download the configs and weights of a repository to the cache, without its code.

        Args:
            pretrained_model_name (`str` or `os.PathLike`): `namespace/name`, or a folder, which is returned.
            **kwargs: Arguments of `from_pretrained`. Those that do not select or download files are ignored.

        Returns:
            `str`: Path of the folder in the cache.

        Raises:
            OSError: If the repository does not exist or cannot be downloaded.
        """
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        folder = Path()
        # Components without weights for the variant are loaded with their default weights.
        for suffix in dict.fromkeys((variant, "")):
            weights = (f"*/diffusion_pytorch_model{suffix}{shard}.safetensors" for shard in ("", "-*"))
            configs = ("*/config.json", "*/*er_config.json", f"*/*.safetensors.index{suffix}.json")
            folder = find_folder(pretrained_model_name, [INDEX, *FACTS, SAMPLES, *configs, *weights], **hub_arguments)
            models = [config.parent for config in folder.glob("*/config.json")]
            if all(any(model.glob("*.safetensors")) for model in models):
                break
        return str(folder)

    @classmethod
    def _with_installed_classes(cls, index: dict[str, Any], source: str) -> dict[str, Any]:
        """Check the form of the index, and load the autoencoder with a class that checks its weights."""
        check_index(index, source)
        index = super()._with_installed_classes(index, source)
        if index.get("vae", [None])[0]:
            index["vae"] = [CompleteAutoencoder.__module__, CompleteAutoencoder.__name__]
        return index

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Save the pipeline to a folder, with safetensors weights only.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to save to. Created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to publish the folder after saving, as the
                method `push_to_hub` does.
            **kwargs: Arguments of `DiffusionPipeline.save_pretrained`, and with `push_to_hub=True` those of the method
                `push_to_hub`.

        Raises:
            ValueError: If `safe_serialization=False` is passed.
            PublishError: If publishing failed.
        """
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
        Publish the pipeline, its code and a model card in one commit, and check that the published model generates the
        same image. The card is written from the files of the training run in the folder that the pipeline was loaded
        from.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own namespace. Created if it does not exist.
            commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), create_pr
                (`bool`, *optional*, defaults to `False`): As in `DiffusionPipeline.push_to_hub`.
            variant (`str`, *optional*): Variant to publish the weights as, such as `"fp16"`. The repository's existing
                weights are kept.
            overwrite (`bool`, *optional*, defaults to `False`): Whether to publish to a repository with other contents.

        Returns:
            `str`: URL of the commit.

        Raises:
            PublishError: If publishing failed, or the published model does not generate the same image.

        Examples:

        ```py
        >>> from diffusers_cfg import CFGPipeline

        >>> pipe = CFGPipeline.from_pretrained("path/to/model")
        >>> url = pipe.push_to_hub("namespace/name")
        ```
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
    space: str | None = None,
) -> str:
    """
    Publish a saved pipeline, such as the output folder of a training run, in one commit. Arguments, return value and
    errors are those of `CFGPipeline.push_to_hub`. `verify=False` skips the pictures of classes and the final check. The
    card links to `space`, a Space with a demo of the model.
    """
    folder = checked_folder(folder)
    try:
        repo_id = prepare_repository(repo_id, private, token, overwrite, create_pr=create_pr)
        # Generated before the upload, so that a model that cannot generate is not published.
        images = example_images(folder, variant) if verify else {}
        pictures = {label: png(image) for label, image in images.items() if image.shape[1] in (1, 3)}
        card = model_card(folder, repo_id, read_card(repo_id, token), pictures, space)
        operations = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in allowed_files(folder)]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        if config := read_json(folder / RUN).get("config"):
            operations.append(CommitOperationAdd(CONFIG, yaml_dump(config, sort_keys=False).encode()))
        if (samples := find_samples(folder)) is not None:
            operations.append(CommitOperationAdd(SAMPLES, samples))
        operations += [CommitOperationAdd(class_picture(label), data) for label, data in pictures.items()]
        commit = retry(
            lambda: HfApi(token=token).create_commit(
                repo_id, operations, commit_message=commit_message or "Upload CFGPipeline", create_pr=create_pr
            )
        )
    except PublishError:
        raise
    except Exception as error:  # network errors have many types, and none may fail a finished training run
        raise PublishError(f"{repo_id} could not be published: {error}") from error
    if images:
        revision = commit.pr_revision if create_pr else commit.oid
        verify_published(next(iter(images.items())), folder, repo_id, revision, token, variant)
    return commit.commit_url


def checked_folder(folder: str | os.PathLike) -> Path:
    """Return the path of a folder with a saved pipeline. Raise `PublishError` if it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        problem = f"{folder} is a file" if folder.exists() else f"The folder {folder} does not exist"
        raise PublishError(f"{problem}. Pass the output folder of a training run.")
    try:
        check_pipeline_folder(folder, str(folder))
    except FileNotFoundError as error:
        raise PublishError(str(error)) from error
    return folder


def allowed_files(folder: Path) -> list[Path]:
    """Return the files of a saved pipeline that may be uploaded."""
    found = [folder / name for name in ROOT_FILES]
    found += [path for name in COMPONENTS for pattern in COMPONENT_FILES for path in (folder / name).glob(pattern)]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def example_images(folder: Path, variant: str | None = None) -> dict[int, torch.Tensor]:
    """
    Generate an image of each of the first classes, with the pipeline's defaults and the same noise.

    Args:
        folder (`Path`): Saved pipeline.
        variant (`str`, *optional*): As in `publish`.

    Returns:
        `dict`: Images in [0, 1], `(1, channels, height, width)`, by class id.

    Raises:
        PublishError: If the pipeline cannot be loaded or generates no image.
    """
    try:
        pipe = CFGPipeline.from_pretrained(folder, variant=variant)
        pipe.set_progress_bar_config(disable=True)
        labels = example_classes(read_json(folder / INDEX), read_json(folder / RUN))
        return {label: example_image(pipe, label) for label in labels}
    except Exception as error:
        raise PublishError(f"{folder} was not published, because it could not generate an image: {error}") from error


def example_image(pipe: pipeline_cfg.CFGPipeline, label: int) -> torch.Tensor:
    """
    Generate one image with a pipeline's default number of steps and guidance scale. A classifier guides it too, so that
    the image depends on all networks.
    """
    is_guided = pipe.classifier is not None and pipe.unet.max_guidance_scale is None  # a one-pass network refuses it
    scale = CLASSIFIER_SCALE if is_guided else None
    generator = torch.Generator().manual_seed(0)
    images = pipe(label, generator=generator, output_type="pt", classifier_guidance_scale=scale).images
    assert isinstance(images, torch.Tensor)  # because of `output_type`
    return images


def png(image: torch.Tensor) -> bytes:
    """Encode an image in [0, 1], `(1, channels, height, width)`, as PNG."""
    file = io.BytesIO()
    VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image))[0].save(file, "PNG")
    return file.getvalue()


def verify_published(
    example: tuple[int, torch.Tensor],
    folder: Path,
    repo_id: str,
    revision: str,
    token: str | None = None,
    variant: str | None = None,
) -> None:
    """
    Check that the published model generates the same image as the model in the folder, up to `rounding_tolerance`.

    Args:
        example (`tuple`): Class id and image, from `example_images`.
        folder (`Path`): Saved pipeline that generated the image, for messages.
        repo_id (`str`), revision (`str`): Published pipeline.
        token (`str`, *optional*), variant (`str`, *optional*): As in `publish`.

    Raises:
        PublishError: If the published model cannot generate the image, or the images differ.
    """
    label, local = example
    try:
        pipe = CFGPipeline.from_pretrained(repo_id, variant=variant, revision=revision, token=token)
        pipe.set_progress_bar_config(disable=True)
        published = example_image(pipe, label)
    except Exception as error:
        raise PublishError(f"{repo_id} was published, but could not generate an image: {error}") from error
    difference = (local - published).abs().max().item() if local.shape == published.shape else math.inf
    # At w = 1 also for a generator, which draws with w = 0: its training makes it steeper than a random network, and
    # rounding errors reached 0.7 of the tolerance at w = 0. An exact classifier at s adds s to w.
    if not difference <= rounding_tolerance(pipe, 1.0 + CLASSIFIER_SCALE * (pipe.classifier is not None)):
        raise PublishError(
            f"{repo_id} was published, but does not generate the same image as {folder}: pixels in [0, 1] differ by up "
            f"to {difference:.2g}. Publish it again."
        )


def rounding_tolerance(
    pipeline: pipeline_cfg.CFGPipeline, guidance_scale: float = 1.0, num_inference_steps: int | None = None
) -> float:
    """
    Return the largest difference from rounding between two images that one model generates from separate copies of its
    weights, or on different machines.

    Args:
        pipeline (`CFGPipeline`): The model.
        guidance_scale (`float`): Largest w; the scale of the pipeline's guider is used if it is larger.
        num_inference_steps (`int`, *optional*): T; by default the pipeline's own.

    Returns:
        `float`: Tolerance for images in [0, 1] or latents of about unit size.
    """
    # The order of the sums in a layer depends on memory alignment and the number of threads. It changes the output by a
    # relative error of about the dtype's ε. The layers' errors are independent, so the prediction's is about √depth ε.
    # Guidance weighs two predictions by |1 + w| and |w|, and each of the T steps adds its error once.
    networks = [component for component in pipeline.components.values() if isinstance(component, torch.nn.Module)]
    depth = sum(parameter.ndim > 1 for network in networks for parameter in network.parameters())
    w = max(abs(guidance_scale), abs(getattr(pipeline.guider, "guidance_scale", 0.0)))
    steps = num_inference_steps or pipeline.num_inference_steps
    # A network with Fourier features also sees sin(ωz) and cos(ωz), which change by up to ω times the error of z.
    slope = 1 + 2 * max(pipeline.unet.config.get("fourier_frequencies") or [0])
    return torch.finfo(pipeline.unet.dtype).eps * math.sqrt(depth) * steps * (1 + 2 * w) * slope
