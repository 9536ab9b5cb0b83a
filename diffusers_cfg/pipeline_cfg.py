"""Class labels and a guidance scale to images (Ho & Salimans 2022, Algorithm 2).

This file travels with every saved model, so it must run alone under plain diffusers: it imports the standard library,
torch and diffusers only, and keeps its helpers inside the class.
"""

import inspect
import json
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


class CFGPipeline(DiffusionPipeline):
    r"""
    Class-conditional images with classifier-free guidance.

    `guidance_scale` is the **paper's w**: ε̃ = (1 + w) ε(z, c) - w ε(z). 0 is the plain conditional model, -1 the plain
    unconditional one. Most other pipelines of diffusers take s = 1 + w.

    Args:
        unet (`UNet2DCFGModel`): predicts from (z, timestep, class_labels); has `num_classes` and `null_class_label`.
        scheduler (`SchedulerMixin`): `LogSNRScheduler`, or one of diffusers' made by `from_config` from its config.
        vae (`AutoencoderKL`, *optional*): for models that were trained on its latents.
        id2label (`dict`, *optional*): name of each class id. Keys may be strings, as JSON makes them.
        conditioning_dropout_prob (`float`, *optional*): the p_uncond that the model was trained with.

    Raises:
        ValueError: `id2label` names a class that the UNet does not have, or gives one name to two classes.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "pred"]

    # Those that were seen to sample these models; the others draw noise from the same config.
    schedulers = (
        "LogSNRScheduler",
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    )

    # The text of this very class, for `save_config`. It is read now and not when saving: repositories loaded as remote
    # code share one path, and the file there may by then hold another repository's text.
    remote_code = Path(__file__).read_text(encoding="utf-8")

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        conditioning_dropout_prob: float | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        if id2label is not None:
            id2label = {str(class_id): name for class_id, name in id2label.items()}
            unknown = [class_id for class_id in id2label if not 0 <= int(class_id) < unet.num_classes]
            if unknown:
                raise ValueError(f"id2label names the classes {unknown}, but the UNet has 0 … {unet.num_classes - 1}.")
            repeated = sorted(name for name, count in Counter(id2label.values()).items() if count > 1)
            if repeated:
                raise ValueError(f"id2label gives the names {repeated} to more than one class.")
        self.register_to_config(id2label=id2label, conditioning_dropout_prob=conditioning_dropout_prob)
        self.image_processor = VaeImageProcessor()

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class id; empty if the classes have no names."""
        return {int(class_id): name for class_id, name in (self.config.id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | Sequence[float] | torch.Tensor = 1.0,
        num_inference_steps: int = 64,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["CFGPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draw images of the given classes.

        Args:
            class_labels (`int`, `str`, a list of them or `torch.Tensor` of shape `(labels,)`): ids, names or a mix. -1
                is the null class. Ids are what integers mean; a name is looked up in `id2label`.
            guidance_scale (`float`, or a list of them, one per label or per image): the paper's w; s = 1 + w.
            num_inference_steps (`int`): T. Each step evaluates the network on every image once if no image is guided
                (w = 0 or w = -1 for all of them), else twice in one batch.
            num_images_per_label (`int`): images drawn for each label, next to each other in the output.
            generator (`torch.Generator` or a list of them, one per image, *optional*): source of all noise. With a list
                an image does not depend on the batch that it is drawn in.
            latents (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): z at λ_min, drawn from
                N(0, I).
            output_type (`str`): `"pil"`; `"np"` (images, height, width, channels) or `"pt"` (images, channels, height,
                width) with values in [0, 1]; `"latent"` for the last z.
            return_dict (`bool`): whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (*optional*): called as `f(pipe, step, timestep, tensors)` after each step; what it
                returns may replace `latents`.
            callback_on_step_end_tensor_inputs: the tensors it is given, of `"latents"` and `"pred"`.

        Returns:
            `ImagePipelineOutput` or `tuple`: `images`, the labels in the order given.

        Raises:
            ValueError: an argument is wrong; the message names the value and what is possible. Nothing is computed.
            FloatingPointError: the images came out with values that are not finite.
        """
        # 1. Check and lay out everything per image
        self._check_arguments(num_inference_steps, num_images_per_label, output_type)
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)
        self._check_scheduler()
        device = self._execution_device
        class_labels = self._class_ids(class_labels).repeat_interleave(num_images_per_label)
        guidance_scale = self._guidance_scales(guidance_scale, len(class_labels), num_images_per_label)
        needs_cond = any(w != -1 for w in guidance_scale.tolist())
        needs_uncond = any(w != 0 for w in guidance_scale.tolist())
        self._warn_if_never_dropped(needs_uncond)
        class_labels, w = class_labels.to(device), guidance_scale.view(-1, 1, 1, 1).to(device)

        # 2. z ~ N(0, I)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._check_first_sigma()
        latents = self._prepare_latents(latents, len(class_labels), generator, device)
        step_kwargs = self._step_kwargs(generator)

        # 3. Algorithm 2
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            z = self.scheduler.scale_model_input(latents, t)
            pred = self.guided_prediction(z, t, class_labels, w, needs_cond, needs_uncond)
            latents = self.scheduler.step(pred, t, latents, **step_kwargs).prev_sample

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred": pred}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, t, chosen) or {}).get("latents", latents)

        # 4. x̃ to images
        images = latents if output_type == "latent" else self.decode(latents)
        if not torch.isfinite(images).all():
            raise FloatingPointError(
                f"The images hold values that are not finite: the UNet's predictions overflowed (dtype "
                f"{self.unet.dtype}, guidance_scale {sorted(set(guidance_scale.tolist()))}). Try torch.bfloat16 or "
                "torch.float32, or a smaller guidance_scale."
            )
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def guided_prediction(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor,
        w: torch.Tensor,
        needs_cond: bool = True,
        needs_uncond: bool = True,
    ) -> torch.Tensor:
        r"""
        The guided prediction ε̃ = (1 + w) ε(z, c) - w ε(z), equation 6. It holds for ε, v and x alike: each is affine in
        ε at a given z, and the weights add up to one.

        Args:
            z (`torch.Tensor` of shape `(batch, channels, height, width)`): the scaled noisy samples.
            t (`torch.Tensor` of shape `()`): the network's time.
            class_labels (`torch.Tensor` of shape `(batch,)`): c.
            w (`torch.Tensor` that broadcasts over z): the guidance scales.
            needs_cond (`bool`), needs_uncond (`bool`): `False` leaves that pass out, where w makes its weight zero.

        Returns:
            `torch.Tensor` of the shape of z, in float32.
        """
        z = z.to(self.unet.dtype)
        if not needs_uncond:
            return self.unet(z, t, class_labels=class_labels).sample.float()
        null_labels = torch.full_like(class_labels, self.unet.null_class_label)
        if not needs_cond:
            return self.unet(z, t, class_labels=null_labels).sample.float()

        pred = self.unet(torch.cat([z, z]), t, class_labels=torch.cat([class_labels, null_labels])).sample
        pred_cond, pred_uncond = pred.float().chunk(2)
        return (1 + w) * pred_cond - w * pred_uncond

    # ----- latent models -----

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Images `(batch, channels, height, width)` in [-1, 1] to what the UNet models: a draw from the VAE's posterior,
        shifted and scaled as its config says; without a VAE the images themselves.
        """
        if self.vae is None:
            return images
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.sample(generator)
        return (latents - self._vae_shift) * self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`: images `(batch, channels, height, width)`, in [-1, 1] up to what the model adds."""
        if self.vae is None:
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self._vae_shift
        return self.vae.decode(latents).sample

    @property
    def _vae_shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    # ----- arguments -----

    def _check_arguments(self, num_inference_steps: int, num_images_per_label: int, output_type: str) -> None:
        for name, value in {
            "num_inference_steps": num_inference_steps,
            "num_images_per_label": num_images_per_label,
        }.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, but is {value!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")

    def _check_callback_inputs(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {unknown} are not among {self._callback_tensor_inputs}."
            )

    def _check_scheduler(self) -> None:
        """Refuse what would draw noise without complaint: most schedulers accept the config of any other."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        if not any(base.__name__ in self.schedulers for base in type(self.scheduler).__mro__):
            raise ValueError(
                f"{name} cannot sample this model, or was never seen to: it is made for flow matching, for EDM's "
                f"preconditioning or for another purpose. Those that can are {', '.join(self.schedulers)}."
            )
        if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"{name} is set to flow matching (use_flow_sigmas={config.get('use_flow_sigmas')}, prediction_type="
                f"{config.get('prediction_type')!r}), and this is a variance-preserving diffusion model. Make it with "
                f"{name}.from_config(pipe.scheduler.config)."
            )

    def _check_first_sigma(self) -> None:
        """Known after `set_timesteps`: the schedulers that step in σ/α must not start at the end of the process."""
        sigma = float(self.scheduler.init_noise_sigma)
        if sigma > 1000:
            raise ValueError(
                f"{type(self.scheduler).__name__} starts at σ/α = {sigma:.0f}, where one step multiplies the network's "
                "error by as much. Leave use_karras_sigmas and sigma_max as they are in pipe.scheduler.config."
            )

    def _class_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> torch.Tensor:
        """Labels in any form to ids, int64 `(labels,)`."""
        if isinstance(class_labels, torch.Tensor):
            ids = class_labels.reshape(1) if class_labels.ndim == 0 else class_labels
        else:
            if isinstance(class_labels, str) or not hasattr(class_labels, "__iter__"):
                class_labels = [class_labels]
            label2id = {name: class_id for class_id, name in self.id2label.items()}
            ids = torch.tensor([self._class_id(label, label2id) for label in class_labels], dtype=torch.int64)
        if ids.numel() == 0:
            raise ValueError("class_labels is empty: give at least one class id or name.")
        self.unet.check_class_labels(ids, len(ids))
        return ids.to(torch.int64)

    def _class_id(self, label: int | str, label2id: dict[str, int]) -> int:
        if isinstance(label, str):
            if not label2id:
                raise ValueError(
                    f"class_labels has the name {label!r}, but this model's classes have no names: use ids."
                )
            if label not in label2id:
                raise ValueError(
                    f"class_labels has the unknown name {label!r}. The classes are {self._known_classes()}."
                )
            return label2id[label]
        try:
            class_id = None if isinstance(label, bool) else operator.index(label)
        except TypeError:
            class_id = None
        if class_id is None:
            raise ValueError(f"class_labels has {label!r}, which is neither an integer id nor a name.")
        if not -1 <= class_id <= self.unet.null_class_label:
            raise ValueError(f"class_labels has the unknown id {class_id}. The classes are {self._known_classes()}.")
        return class_id

    def _known_classes(self) -> str:
        last = self.unet.num_classes - 1
        named = [f"{name!r} ({class_id})" for class_id, name in sorted(self.id2label.items())]
        if not named:
            return f"0 … {last}, and -1 for the null class"
        return ", ".join(named[:50]) + (f", … ({len(named)} in all)" if len(named) > 50 else "")

    def _guidance_scales(
        self, guidance_scale: float | Sequence[float] | torch.Tensor, num_images: int, num_images_per_label: int
    ) -> torch.Tensor:
        """w per image, float32 `(images,)`."""
        w = torch.as_tensor(guidance_scale, dtype=torch.float32, device="cpu")
        num_labels = num_images // num_images_per_label
        if w.ndim == 0:
            w = w.expand(num_images)
        elif w.shape == (num_labels,):
            w = w.repeat_interleave(num_images_per_label)
        elif w.shape != (num_images,):
            raise ValueError(
                f"guidance_scale has shape {tuple(w.shape)}, but must be one number, one per label ({num_labels}) or "
                f"one per image ({num_images})."
            )
        wrong = [value for value in w.tolist() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"guidance_scale must be finite, but has {wrong}.")
        return w

    def _warn_if_never_dropped(self, needs_uncond: bool) -> None:
        if needs_uncond and self.config.conditioning_dropout_prob == 0:
            logging.get_logger(__name__).warning(
                "This model was trained with conditioning_dropout_prob = 0: its null class was never trained, so "
                "guidance and unconditional samples mean nothing. Use guidance_scale=0, or train with 0.1 to 0.2."
            )

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (num_images, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"generator is a list of {len(generator)}, but {num_images} images are asked for.")
        if latents is None:
            # float32 whatever the UNet computes in: at the noisy end a step needs the digits.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but must have {shape}.")
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def _step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """What this scheduler's `step` takes beyond the three arguments that all of them take."""
        accepted = inspect.signature(self.scheduler.step).parameters
        # DDIM otherwise steps along an ε that contradicts the clipped x̃, and leaves speckle.
        wanted = {"generator": generator, "use_clipped_model_output": True}
        return {name: value for name, value in wanted.items() if name in accepted}

    # ----- a folder that loads by two doors -----
    #
    # `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` wants the code in the folder and model_index
    # naming it; `CFGPipeline.from_pretrained(folder)` has the code already and must run none of the folder's.

    def to_json_string(self) -> str:
        """model_index.json, where a component of this package is named by the file `save_config` puts beside it."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = ["pipeline_cfg", type(self).__name__]
        index.pop("_name_or_path", None)
        for name, component in self.components.items():
            if hasattr(component, "remote_code"):
                module, class_name = index[name]
                index[name] = [module.rpartition(".")[2], class_name]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json, and the code that a plain `DiffusionPipeline` needs to load the folder."""
        directory = Path(save_directory)
        for name, component in self.components.items():
            if hasattr(component, "remote_code"):
                module = self.config[name][0].rpartition(".")[2]
                (directory / name).mkdir(parents=True, exist_ok=True)
                (directory / name / f"{module}.py").write_text(component.remote_code, encoding="utf-8")
            if (directory / name / "config.json").is_file():
                # diffusers writes down where the component was loaded from, a path of this machine.
                config = json.loads((directory / name / "config.json").read_text(encoding="utf-8"))
                config.pop("_name_or_path", None)
                (directory / name / "config.json").write_text(
                    json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
                )
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "pipeline_cfg.py").write_text(self.remote_code, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """
        Read model_index.json for `CFGPipeline.from_pretrained`: this class, and its neighbours' classes in place of the
        folder's copies, so that no code of the folder is needed, asked for or run. (diffusers reads the file in more
        than one place, all through this method.)
        """
        index = super()._dict_from_json_file(json_file)
        class_name = index.get("_class_name")
        if isinstance(class_name, list):
            class_name = class_name[-1]
        if class_name != cls.__name__:
            raise ValueError(
                f"{json_file} describes a {class_name}, not a {cls.__name__}: load it with DiffusionPipeline."
            )
        index["_class_name"] = class_name
        for name, value in index.items():
            if not isinstance(value, list) or value[0] in (None, "diffusers"):
                continue
            neighbour = f"{__package__}.{value[0]}"
            if neighbour not in sys.modules:
                raise ValueError(
                    f"{json_file} wants {value[1]} from {value[0]} for its {name}, which is neither diffusers' nor "
                    f"this package's. {cls.__name__}.from_pretrained runs no code of a repository; if you have read "
                    "and trust it, use DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
                )
            index[name] = [neighbour, value[1]]
        return index
