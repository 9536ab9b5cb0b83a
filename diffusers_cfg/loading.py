"""Find saved models in folders and on the Hub, and load them completely or not at all, without pickles."""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderDC, AutoencoderKL, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .classifier_2d import NoisyClassifier2DModel
from .model_files import INDEX, checkpoints, read_object
from .scheduling_log_snr import LogSNRScheduler
from .unet_2d_cfg import UNet2DCFGModel

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors", "*.safetensors.index.json")
# The classes of each component of a pipeline. A component of diffusers may have a subclass.
CLASSES: dict[str, tuple[type, ...]] = {
    "unet": (UNet2DCFGModel,),
    "scheduler": (SchedulerMixin,),
    "vae": (AutoencoderKL, AutoencoderDC),
    "guide_unet": (UNet2DCFGModel,),
    "guider": (BaseGuidance,),
    "classifier": (NoisyClassifier2DModel,),
}
OWN_CLASSES = {cls.__name__: cls for cls in (UNet2DCFGModel, LogSNRScheduler, NoisyClassifier2DModel)}
# The config files of components, the names of which differ by kind.
COMPONENT_CONFIGS = {"scheduler": "scheduler_config.json", "guider": "guider_config.json"}


def find_folder(name_or_path: str | os.PathLike, files: Sequence[str], **hub_arguments: Any) -> Path:
    """
    Return a folder, or download a repository from the Hub and return its folder in the cache.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder, or `namespace/name` on the Hub.
        files (`Sequence[str]`): Patterns of the files to download.
        **hub_arguments: Arguments of `snapshot_download`.

    Raises:
        TypeError: If `name_or_path` is neither a string nor a path.
        OSError: If there is no such folder, and no such repository on the Hub or in its cache.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"A model is a folder or the name of a repository on the Hub, but is {name_or_path!r}.")
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise NotADirectoryError(f"{name} is a file. Pass the folder that contains the model.")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise FileNotFoundError(f"The folder {name!r} does not exist.")
    try:
        check_token(hub_arguments.get("token"))
        return Path(snapshot_download(name, allow_patterns=[*files], **hub_arguments))
    except Exception as error:
        raise OSError(download_problem(name, error, hub_arguments)) from error


def download_problem(name: str, error: Exception, hub_arguments: Mapping[str, Any]) -> str:
    """Explain why a repository cannot be downloaded."""
    if isinstance(error, GatedRepoError):
        return f"{name} is gated. Accept its terms at {constants.ENDPOINT}/{name}, and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name} is neither a folder here nor a repository on the Hub that can be read "
            f"{'with this token' if get_token() or hub_arguments.get('token') else 'without a token'}. Check the "
            "spelling. For a private repository, log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {hub_arguments.get('revision')!r} on the Hub."
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"{name} is not a folder here, and the Hub does not accept the token. Log in with `hf auth login`."
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        elif hub_arguments.get("local_files_only"):
            reason = "local_files_only is set"
        else:
            reason = f"the Hub cannot be reached: {first_line(error.__cause__ or error)}"
        return f"{name} is neither a folder here nor a repository that was downloaded before, and {reason}."
    return f"{name} is not a folder here, and could not be downloaded from the Hub: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error of the Hub client, without its links."""
    return str(error).partition("\n")[0]


def check_token(token: str | bool | None) -> None:
    """Raise ValueError for a token that cannot be sent, since the client would print it in its error."""
    token = token if isinstance(token, str) else get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("The Hub token has spaces or other characters that no token has. Copy it again.")


def check_pipeline_folder(folder: Path, source: str) -> None:
    """
    Check that a folder contains a saved pipeline.

    Args:
        folder (`Path`): The folder.
        source (`str`): The folder or repository that the user named, for messages.

    Raises:
        FileNotFoundError: If it does not. The message says what the folder contains instead.
    """
    if (folder / INDEX).is_file():
        return
    if existing := checkpoints(folder):
        problem = (
            f"{source} has no {INDEX}, because its training run has not finished. Its newest checkpoint is "
            f"{existing[-1].name}: run the same command with --resume_from_checkpoint latest to finish."
        )
    elif (folder.resolve().parent / INDEX).is_file():
        problem = f"{source} is a part of a saved pipeline. Pass the folder that contains it."
    else:
        problem = f"{source} has no {INDEX}, so it is not a saved pipeline. Pass the output folder of a training run."
    raise FileNotFoundError(problem)


def check_index(index: Any, source: str) -> None:
    """
    Check the form of a model_index.json: an object that names the module and the class of each component.

    Args:
        index: Content of the file.
        source (`str`): Folder or repository with the file, for messages.

    Raises:
        ValueError: If the content has the wrong form, or a component has the wrong class.
    """
    if not isinstance(index, dict):
        raise ValueError(f"{INDEX} in {source} must contain a JSON object, but contains {json.dumps(index)[:100]}.")
    if index.get("_class_name") in ([], None):
        raise ValueError(f"{INDEX} in {source} names no pipeline in _class_name.")
    for name in {**CLASSES, **index}:
        kinds, value = CLASSES.get(name), index.get(name, [None, None])
        is_setting = kinds is None and not isinstance(value, list)
        is_absent = value == [None, None] and name not in ("unet", "scheduler")
        if is_setting or is_absent:
            continue
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)):
            expected = f"the module and the class of the {name}" if kinds else f"no list as {name}"
            raise ValueError(f"{INDEX} in {source} must contain {expected}, but contains {json.dumps(value)}.")
        module, class_name = value
        # `load_config` refuses unknown modules.
        if kinds is None:
            continue
        found = getattr(diffusers, class_name, None) if module == "diffusers" else OWN_CLASSES.get(class_name, kinds[0])
        if not (isinstance(found, type) and issubclass(found, kinds)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{source} has {class_name} of {module} as its {name}, not a kind of {expected}.")


def check_components(
    folder: Path, index: Mapping[str, Any], variant: str | None = None, passed: Collection[str] = ()
) -> None:
    """
    Check that each component in model_index.json has its config, and weights if it is a network.

    Args:
        folder (`Path`): A saved pipeline.
        index (`Mapping`): Content of its model_index.json.
        variant (`str`, *optional*): Variant of the weights. At least one component must have it.
        passed (`Collection[str]`): Names of the components that are not loaded from the folder.

    Raises:
        ValueError: If a file is missing or has the wrong form. The message names it.
    """
    components = [name for name, value in index.items() if isinstance(value, list) and value[0] and name not in passed]
    networks = [name for name in components if name not in COMPONENT_CONFIGS]
    for name in components:
        read_object(folder / name / COMPONENT_CONFIGS.get(name, "config.json"))
    weights = [check_weights(folder / name) for name in networks]
    matches = [re.fullmatch(r"\w+\.(.+?)(-\d{5}-of-\d{5})?\.safetensors", name) for names in weights for name in names]
    variants = {match[1] for match in matches if match}
    if variant and weights and variant not in variants:
        raise ValueError(
            f"{folder} has no weights of the variant {variant!r}. Its variants are {', '.join(sorted(variants))}."
            if variants
            else f"{folder} has no variants. Leave out the variant {variant!r}."
        )


def check_weights(folder: Path) -> list[str]:
    """Return the names of a network's safetensors files. Raise ValueError if there are none."""
    names = sorted(path.name for path in folder.glob("diffusion_pytorch_model*.safetensors"))
    if not names:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        refused = f", only {pickles[0]}, which is not loaded because a pickle can run code" if pickles else ""
        raise ValueError(f"{folder} has no weights in diffusion_pytorch_model.safetensors{refused}.")
    return names


class CompleteAutoencoder(ModelMixin):
    """A loader of an autoencoder that refuses kinds that are not supported, and missing or unexpected weights."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> AutoencoderKL | AutoencoderDC:
        """
        Load an autoencoder from a folder. The arguments are those of `AutoencoderKL.from_pretrained`.

        Raises:
            ValueError: If the folder contains a different kind of autoencoder, or its weights do not fit its config.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "")
        class_name = read_object(folder / "config.json").get("_class_name")
        kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderDC)}
        if class_name not in kinds:
            raise ValueError(f"{folder} contains a {class_name}. The supported autoencoders are {' and '.join(kinds)}.")
        check_weights(folder)
        try:
            loaded: Any = kinds[class_name].from_pretrained(
                folder, **{**kwargs, "use_safetensors": True, "output_loading_info": True}
            )
        except Exception as error:  # files and configs that are damaged raise exceptions of many types
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        vae, info = loaded
        check_loaded(folder, info)
        return vae


def check_loaded(folder: Path, info: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError if weights were missing or unexpected, given the `output_loading_info` of `from_pretrained`."""
    tensors = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    wrong = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in tensors.items() if names]
    if wrong:
        raise ValueError(f"The weights in {folder} are not those of its config.json. Tensors: {', '.join(wrong)}.")


def load_autoencoder(name_or_path: str) -> AutoencoderKL | AutoencoderDC:
    """Load an autoencoder from a folder or from the Hub. Raise OSError or ValueError if that fails."""
    folder = find_folder(name_or_path, ["config.json", *WEIGHTS])
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name_or_path} has no config.json, so it is not an autoencoder. Of a pipeline, pass the folder vae."
        )
    return CompleteAutoencoder.from_pretrained(folder)


def load_guide_unet(name_or_path: str) -> UNet2DCFGModel:
    """Load the network in `unet` of a pipeline or a checkpoint. Raise OSError or ValueError if that fails."""
    folder = find_folder(name_or_path, [f"unet/{name}" for name in ("config.json", *WEIGHTS)]) / "unet"
    read_object(folder / "config.json")
    check_weights(folder)
    return UNet2DCFGModel.from_pretrained(folder)
