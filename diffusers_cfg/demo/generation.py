"""Generate the images that a visitor of the page asks for, and the code that generates them too."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from PIL import Image

NULL_CLASS = -1
AS_SAVED = "as saved"
MAX_IMAGES = 64
# The page passes numbers as float64, which is exact up to here.
MAX_SEED = 2**53 - 1


class Range(NamedTuple):
    """The limits and the default of a number that the page asks for."""

    low: float
    high: float
    default: float


@dataclass(frozen=True)
class Request:
    """
    What a visitor of the page asks for. What does not apply to the model is ignored.

    Args:
        class_ids (`list[int]`): ids of the classes, -1 for the null class.
        mix (`bool`): whether to mix the classes in each image, instead of generating images of each class.
        weights (`str`): weights of the classes of a mix, separated by spaces; empty for equal weights. They are divided
            by their sum.
        guidance_scale (`float`): the paper's w.
        classifier_guidance_scale (`float`): the scale s of classifier guidance.
        num_inference_steps (`int`): number of sampling steps.
        sampler (`str`): name of a scheduler, or "as saved".
        seed (`int`): seed of the first image of each class. The next images have the next seeds.
        num_images (`int`): images per class, or of the mix.
    """

    class_ids: list[int]
    mix: bool = False
    weights: str = ""
    guidance_scale: float = 1.0
    classifier_guidance_scale: float = 0.0
    num_inference_steps: int = 12
    sampler: str = AS_SAVED
    seed: int = 0
    num_images: int = 1


@dataclass(frozen=True)
class Demo:
    """
    A pipeline and what the page has to know about it.

    Args:
        pipe (`CFGPipeline`): the pipeline, loaded with or without remote code.
        source (`str`): the folder or repository from which the shown code loads the pipeline.
        arguments (`dict`, *optional*): other arguments with which it is loaded, such as `revision` and `variant`.
        absent (`Collection[int]`, *optional*): classes that had no images in training, which are not offered.
        samplers (`dict`, *optional*): schedulers of the package diffusers-cfg, by name, if it is installed.

    Raises:
        ValueError: If the samples of the pipeline are not pictures.
    """

    pipe: Any  # a CFGPipeline of this package or of a repository's code
    source: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    absent: Collection[int] = ()
    samplers: Mapping[str, type] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (channels := self.pipe.image_shape[0]) not in (1, 3):
            raise ValueError(
                f"{self.source} has samples of {channels} channels, which are not pictures, and no autoencoder that "
                "decodes them. Save the pipeline with its vae."
            )
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def classes(self) -> dict[int, str]:
        """The name of each class that can be chosen, by id."""
        names = {class_id: str(class_id) for class_id in range(self.pipe.num_classes)} | self.pipe.id2label
        named = {class_id: name for class_id, name in names.items() if class_id not in self.absent}
        return named if named and not self._has_null_class else {**named, NULL_CLASS: "unconditional"}

    @property
    def _has_null_class(self) -> bool:
        """Whether the null class was trained, as far as the pipeline says."""
        return self.pipe.config.conditioning_dropout_prob != 0

    @property
    def guidance(self) -> Range | None:
        """The range of w; `None` if w changes nothing, or a guider has its own scale."""
        unet = self.pipe.unet
        if self.pipe.guider is not None or unet.config.num_class_embeds is None or [*self.classes] == [NULL_CLASS]:
            return None
        if unet.max_guidance_scale is not None:
            return Range(0.0, unet.max_guidance_scale, min(1.0, unet.max_guidance_scale))
        is_guided = unet.latent_dim is None and self._has_null_class
        return Range(-1.0, 8.0, 1.0 if is_guided else 0.0)

    @property
    def classifier_guidance(self) -> Range | None:
        """The range of the scale s of classifier guidance; `None` if there is no classifier, or it is not used."""
        unet = self.pipe.unet
        if self.pipe.classifier is None or unet.max_guidance_scale is not None or unet.latent_dim is not None:
            return None
        return Range(0.0, 10.0, 1.0 if unet.config.num_class_embeds is None else 0.0)

    @property
    def steps(self) -> Range | None:
        """The range of the number of steps; `None` for a generator or a few-step student, which have only their own."""
        unet, default = self.pipe.unet, self.pipe.num_inference_steps
        is_student = unet.max_guidance_scale is not None and isinstance(self.pipe.scheduler, DDIMScheduler)
        return None if unet.latent_dim is not None or is_student else Range(1, max(256, default), default)

    @property
    def sampler_classes(self) -> dict[str, type]:
        """The supported schedulers other than the saved one, by name; empty if the model has only its own."""
        found = {name: self.samplers.get(name) or getattr(diffusers, name, None) for name in self.pipe.schedulers}
        others = {name: scheduler for name, scheduler in found.items() if scheduler is not None}
        others.pop(type(self.pipe.scheduler).__name__, None)
        return {} if self.steps is None else others


def check_request(demo: Demo, request: Request) -> None:
    """Raise `ValueError` for a value that the page cannot use. The pipeline checks what remains."""
    if not request.class_ids:
        raise ValueError("No class is chosen. Choose at least one.")
    if unknown := [class_id for class_id in request.class_ids if class_id not in demo.classes]:
        raise ValueError(f"The model has no class {unknown[0]!r}. The ids are {sorted(demo.classes)}.")
    numbers: list[tuple[str, Any, Range | None, bool]] = [
        ("w", request.guidance_scale, demo.guidance, False),
        ("s of the classifier", request.classifier_guidance_scale, demo.classifier_guidance, False),
        ("The number of steps", request.num_inference_steps, demo.steps, True),
        ("The seed", request.seed, Range(0, MAX_SEED, 0), True),
        ("The number of images", request.num_images, Range(1, MAX_IMAGES, 1), True),
    ]
    for name, value, limits, is_whole in numbers:
        if limits is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not limits.low <= value <= limits.high or (is_whole and value != int(value)):
            kind = "a whole number" if is_whole else "a number"
            raise ValueError(f"{name} must be {kind} from {limits.low:.16g} to {limits.high:.16g}, but is {value!r}.")
    if demo.sampler_classes and request.sampler not in (AS_SAVED, *demo.sampler_classes):
        raise ValueError(f"The sampler {request.sampler!r} is not one of: {', '.join(demo.sampler_classes)}.")
    total = (1 if request.mix else len(request.class_ids)) * int(request.num_images)
    if total > MAX_IMAGES:
        raise ValueError(
            f"{len(request.class_ids)} classes with {request.num_images:g} images each are {total} images. At most "
            f"{MAX_IMAGES} can be generated at once."
        )


def mix_weights(request: Request) -> list[float]:
    """Return the weights of the classes of a mix, which add up to 1. Raise `ValueError` if they are invalid."""
    words = request.weights.replace(",", " ").split() or ["1"] * len(request.class_ids)
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = [math.nan]
    total = sum(weights)
    if len(weights) != len(request.class_ids) or not all(w >= 0 for w in weights) or not 0 < total < math.inf:
        raise ValueError(
            f"The weights {request.weights!r} do not fit {len(request.class_ids)} classes. Enter a number of at least "
            "0 for each class, separated by spaces, or nothing for equal weights."
        )
    return [weight / total for weight in weights]


def class_labels(demo: Demo, request: Request) -> list[Any]:
    """Return the `class_labels` of a request: the names, or else the ids, or one mix of them."""
    labels = [demo.pipe.id2label.get(class_id, class_id) for class_id in request.class_ids]
    return [dict(zip(labels, mix_weights(request), strict=True))] if request.mix else labels


def call_arguments(demo: Demo, request: Request) -> dict[str, Any]:
    """Return the arguments of the pipeline's call for a request, without the generators."""
    arguments: dict[str, Any] = {"class_labels": class_labels(demo, request)}
    if demo.guidance is not None:
        arguments["guidance_scale"] = float(request.guidance_scale)
    if demo.classifier_guidance is not None:
        arguments["classifier_guidance_scale"] = float(request.classifier_guidance_scale)
    if demo.steps is not None:
        arguments["num_inference_steps"] = int(request.num_inference_steps)
    return {**arguments, "num_images_per_label": int(request.num_images)}


def seeds_of(request: Request) -> list[int]:
    """Return the seed of each image of a class. All classes have the same, so that they start from the same noise."""
    return list(range(int(request.seed), int(request.seed) + int(request.num_images)))


def sampling_pipeline(demo: Demo, request: Request) -> DiffusionPipeline:
    """Return the pipeline with the sampler of a request. The demo's own is not changed: other visitors may use it."""
    if not demo.sampler_classes or request.sampler == AS_SAVED:
        return demo.pipe
    scheduler_class, saved = demo.sampler_classes[request.sampler], demo.pipe.scheduler
    scheduler: SchedulerMixin = (
        saved.solver(scheduler_class) if hasattr(saved, "solver") else scheduler_class.from_config(saved.config)
    )
    pipe = type(demo.pipe).from_pipe(demo.pipe, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    demo: Demo, request: Request, on_step: Callable[[int, int], Any] | None = None
) -> tuple[list[Image.Image], list[str]]:
    """
    Generate the images of a request, as the code of `code_of` does.

    Args:
        demo (`Demo`): the pipeline.
        request (`Request`): what to generate.
        on_step (`Callable`, *optional*): called after each step with the number of steps taken and of all steps.

    Returns:
        The images, of the pipeline's own size, and a caption for each: its class and its seed.

    Raises:
        ValueError: If a value of the request is invalid.
        FloatingPointError: If the images contain non-finite values.
    """
    check_request(demo, request)
    arguments, seeds = call_arguments(demo, request), seeds_of(request)
    labels = arguments["class_labels"]

    def report(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if on_step is not None:
            on_step(step + 1, pipe.num_timesteps)
        return {}

    pipe: Any = sampling_pipeline(demo, request)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds * len(labels)]
    images = pipe(**arguments, generator=generators, callback_on_step_end=report).images
    names = [demo.classes[class_id] for class_id in request.class_ids]
    if request.mix:
        names = [" + ".join(f"{weight:.2g} {name}" for name, weight in zip(names, mix_weights(request), strict=True))]
    return images, [f"{name}, seed {seed}" for name in names for seed in seeds]


def code_of(demo: Demo, request: Request) -> str:
    """Return Python code that generates the images of a request, as `images`. Raise `ValueError` as `generate` does."""
    check_request(demo, request)
    arguments, seeds = call_arguments(demo, request), seeds_of(request)
    num_labels = len(arguments["class_labels"])
    imports, setting = ["from diffusers import DiffusionPipeline"], []
    if demo.sampler_classes and request.sampler != AS_SAVED:
        name, solver = request.sampler, hasattr(demo.pipe.scheduler, "solver")
        if hasattr(diffusers, name):
            imports = [f"from diffusers import DiffusionPipeline, {name}"]
        else:
            imports.append(f"from diffusers_cfg import {name}")
        made = f"pipe.scheduler.solver({name})" if solver else f"{name}.from_config(pipe.scheduler.config)"
        setting = [f"pipe.scheduler = {made}"]
    loading = {**demo.arguments, "trust_remote_code": True}
    loaded = f"pipe = DiffusionPipeline.from_pretrained({', '.join([repr(demo.source), *keywords(loading)])})"
    if (device := demo.pipe.device.type) != "cpu":
        loaded += f'.to("{device}")'
    repeated = f"[*range({seeds[0]}, {seeds[-1] + 1})]" + (f" * {num_labels}" if num_labels > 1 else "")
    lines = [
        "import torch",
        *imports,
        "",
        loaded,
        *setting,
        f"seeds = {repeated}",
        "images = pipe(",
        *[f"    {argument}," for argument in keywords(arguments)],
        "    generator=[torch.Generator().manual_seed(seed) for seed in seeds],",
        ").images",
    ]
    return "\n".join(lines)


def keywords(arguments: Mapping[str, Any]) -> list[str]:
    """Return arguments as they are written in a call."""
    return [f"{name}={value!r}" for name, value in arguments.items()]
