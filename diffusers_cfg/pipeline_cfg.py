"""Class labels and a guidance scale to images (Ho & Salimans 2022, Algorithm 2)."""

# Copied from diffusers_cfg.unet_2d_cfg
# This file is saved with every model, so it must run alone under plain diffusers: it imports the standard library,
# torch and diffusers only, and keeps its helpers inside the class.

import importlib
import inspect
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


class CFGPipeline(DiffusionPipeline):
    r"""
    Class-conditional images with classifier-free guidance.

    `guidance_scale` is the **paper's w**: ε̃ = (1 + w) ε(z, c) - w ε(z). 0 is the plain conditional model, -1 the plain
    unconditional one. Most other pipelines of diffusers take s = 1 + w.

    Args:
        unet (`UNet2DCFGModel`): Predicts from (z, timestep, class_labels); has `num_classes` and `null_class_label`.
        scheduler (`SchedulerMixin`): `LogSNRScheduler`, or one of diffusers' made by `from_config` from its config.
        vae (`AutoencoderKL`, *optional*): Autoencoder of a model that was trained on its latents.
        id2label (`dict`, *optional*): Name of each class id. Keys may be strings, as JSON makes them.
        conditioning_dropout_prob (`float`, *optional*): The p_uncond that the model was trained with.
        guide_unet (`UNet2DCFGModel`, *optional*): Weaker network for the same classes, to guide away from instead of
            from the null class: autoguidance (Karras et al. 2024, arXiv 2406.02507).
        guider (`BaseGuidance`, *optional*): One of diffusers' guiders, which replaces the rule above.
        num_inference_steps (`int`, *optional*): Default number of sampling steps.

    Raises:
        ValueError: If `id2label` names a class that the UNet does not have, or gives one name to two classes.
    """

    model_cpu_offload_seq = "guide_unet->unet->vae"
    _optional_components = ["vae", "guide_unet", "guider"]
    _callback_tensor_inputs = ["latents", "pred"]

    # Tested to sample these models; other schedulers accept the same config and draw noise.
    schedulers = (
        "LogSNRScheduler",
        # Copied from diffusers_cfg.scheduling_log_snr.LogSNRScheduler
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
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

    # Guiders that do not work on these models, and why.
    refused_guiders = {
        "MagnitudeAwareGuidance": "it takes sequences of tokens only, not images",
        "SmoothedEnergyGuidance": "it never blurs the attention, and draws what ClassifierFreeGuidance draws",
    }

    # The files of this package that define components, by module: their classes replace the folder's copies in
    # `load_config`, and nothing else is taken from a folder's index.
    component_classes = {"unet_2d_cfg": ("UNet2DCFGModel",), "scheduling_log_snr": ("LogSNRScheduler",)}

    # Copied from diffusers_cfg.unet_2d_cfg.UNet2DCFGModel
    # The text of this very class, written beside its weights by `CFGPipeline.save_pretrained`. It is read at import:
    # repositories loaded as remote code share one path, and by the time of saving the file there may be another's.
    remote_code = Path(__file__).read_text(encoding="utf-8")

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        conditioning_dropout_prob: float | None = None,
        guide_unet: UNet2DModel | None = None,
        guider: BaseGuidance | None = None,
        num_inference_steps: int | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide_unet=guide_unet, guider=guider)
        self._noise_process = self._noise_process_of(scheduler)  # the one the network was trained on
        if id2label is not None:
            id2label = {str(class_id): name for class_id, name in id2label.items()}
            unknown = [class_id for class_id in id2label if not 0 <= int(class_id) < unet.num_classes]
            if unknown:
                raise ValueError(f"id2label names the classes {unknown}, but the UNet has 0 … {unet.num_classes - 1}.")
            repeated = sorted(name for name, count in Counter(id2label.values()).items() if count > 1)
            if repeated:
                raise ValueError(f"id2label gives the names {repeated} to more than one class.")
        self.register_to_config(
            id2label=id2label,
            conditioning_dropout_prob=conditioning_dropout_prob,
            num_inference_steps=num_inference_steps,
        )
        self.image_processor = VaeImageProcessor()

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class id; empty if the classes have no names."""
        return {int(class_id): name for class_id, name in (self.config.id2label or {}).items()}

    @property
    def num_inference_steps(self) -> int:
        """Default number of sampling steps: what the pipeline was saved with, or else 64."""
        return self.config.num_inference_steps or 64

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the UNet models: latents, or images without a VAE."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that `encode` takes and `decode` gives."""
        if self.vae is None:
            return self.sample_shape
        _, height, width = self.sample_shape
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)  # each level of the VAE but the last halves the size
        return self.vae.config.in_channels, scale * height, scale * width

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | dict[int | str, float] | Sequence[int | str | dict[int | str, float]] | torch.Tensor,
        guidance_scale: float | Sequence[float] | torch.Tensor | Callable[[float], Any] | None = None,
        num_inference_steps: int | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        negative_class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        guider: BaseGuidance | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["CFGPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draw images of the given classes.

        Args:
            class_labels (`int`, `str`, `dict`, a list of them or `torch.Tensor`): Ids `0 … num_classes - 1`, names or
                mixes; -1 is the null class. Integers are ids; names are looked up in `id2label`. A `dict` such as
                `{"three": 0.7, "eight": 0.3}` mixes classes: its weights are at least 0 and add up to one, and weigh
                the class embeddings. A tensor holds ids, `(labels,)`, or weights, `(labels, num_classes)`.
            guidance_scale (`float`, a list of them, one per label or per image, or `Callable`): The paper's w, 1 by
                default; s = 1 + w. A distilled network takes 0 … `unet.max_guidance_scale`. A callable gives it (or
                the list) at each step's log-SNR: w(λ), λ = log(α²/σ²).
            num_inference_steps (`int`, *optional*): T; by default `CFGPipeline.num_inference_steps`. Each step
                evaluates the network on every image once if no image is guided (w = 0 or w = -1 for all of them) or
                the network takes w as an input, else twice in one batch.
            num_images_per_label (`int`): Number of images drawn for each label, next to each other in the output.
            generator (`torch.Generator` or a list of them, one per image, *optional*): Source of all noise. With a list
                an image does not depend on the batch that it is drawn in.
            latents (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): z at λ_min, drawn from
                N(0, I).
            negative_class_labels (as `class_labels`, one or one per label, *optional*): Classes to guide away from. By
                default the null class; with a `guide_unet` the same classes as that network sees them.
            guidance_interval (`tuple[float, float]`, *optional*): Guide only where σ_lo < σ/α ≤ σ_hi (Kynkäänniemi et
                al. 2024, arXiv 2404.07724; σ/α = exp(-λ/2) is their σ). A step outside costs one evaluation.
            guidance_rescale (`float`): φ in [0, 1] of Lin et al. 2023, arXiv 2305.08891, section 3.4, against
                saturation: pulls the guided prediction's standard deviation towards the conditional one's.
            guider (`BaseGuidance`, *optional*): One of diffusers' guiders instead of the pipeline's own, with its own
                scale and its own `start` and `stop`. Most of them take s = 1 + w unless told
                `use_original_formulation=True`.
            output_type (`str`): `"pil"`; `"np"` (images, height, width, channels) or `"pt"` (images, channels, height,
                width) with values in [0, 1]; `"latent"` for the last z.
            return_dict (`bool`): Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (*optional*): Called as `f(pipe, step, timestep, tensors)` after each step; may return
                a dictionary with new `latents`.
            callback_on_step_end_tensor_inputs: Names of the tensors it is given, of `"latents"` and `"pred"`.

        Returns:
            `ImagePipelineOutput` or `tuple`: `images`, in the order of the labels.

        Raises:
            ValueError: If an argument is wrong. The message names the value and the choices; nothing is computed.
            FloatingPointError: If the images have values that are not finite.
        """
        # 1. Check and lay out everything per image
        guider = guider if guider is not None else self.guider
        if num_inference_steps is None:
            num_inference_steps = self.num_inference_steps
        self._check_arguments(num_inference_steps, num_images_per_label, output_type)
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_interval, guidance_rescale)
        rescale = guidance_rescale or None
        self._check_guider(
            guider, guidance_scale=guidance_scale, guidance_interval=guidance_interval, guidance_rescale=rescale
        )
        self._check_networks(guider=guider, negative_class_labels=negative_class_labels, guidance_rescale=rescale)
        self._check_scheduler()
        device = self._execution_device
        class_labels = self._network_labels("class_labels", class_labels)
        class_labels, guide_labels = self._guide_labels(class_labels, negative_class_labels)
        class_labels = class_labels.repeat_interleave(num_images_per_label, 0).to(device)
        guide_labels = guide_labels.repeat_interleave(num_images_per_label, 0).to(device)
        num_images = len(class_labels)

        # 2. λ_min … λ_max, w at each of them, and z ~ N(0, I)
        self._set_timesteps(num_inference_steps, device)
        scales = self._guidance_scales(guidance_scale, guidance_interval, num_images, num_images_per_label)
        needs_cond, needs_uncond = self._needed_passes(scales)
        self._warn_if_never_dropped(guide_labels, any(needs_uncond))
        scales = scales.view(*scales.shape, 1, 1, 1).to(device)  # (steps, images, 1, 1, 1)
        latents = self._prepare_latents(latents, num_images, generator, device)
        step_kwargs = self._step_kwargs(generator)
        dtype = self.unet.dtype  # read once: diffusers searches all modules for it

        # 3. Algorithm 2
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            z = self.scheduler.scale_model_input(latents, t).to(dtype)
            if guider is None:
                preds = self.predictions(z, t, class_labels, guide_labels, scales[i], needs_cond[i], needs_uncond[i])
                pred = self.guide(*preds, scales[i], guidance_rescale)
            else:
                pred = self.guider_prediction(guider, z, t, i, class_labels, guide_labels)
            latents = self.scheduler.step(pred, t, latents, **step_kwargs).prev_sample

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "pred": pred}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, t, chosen) or {}).get("latents", latents)

        # 4. x̃ to images
        images = latents if output_type == "latent" else self.decode(latents)
        if not torch.isfinite(images).all():
            raise FloatingPointError(
                f"The images have values that are not finite: the UNet's predictions overflowed (dtype "
                f"{self.unet.dtype}, guidance_scale up to {scales.max().item():g}). Try torch.bfloat16 or "
                "torch.float32, or a smaller guidance_scale."
            )
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def predictions(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor,
        guide_labels: torch.Tensor,
        w: torch.Tensor,
        needs_cond: bool = True,
        needs_uncond: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        r"""
        Predict ε(z, c) and ε(z) by two passes in one batch; or the guided prediction in one pass, with a network that
        takes w as an input.

        Args:
            z (`torch.Tensor` of shape `(batch, channels, height, width)`): Noisy samples, scaled by the scheduler, in
                the dtype of `unet`.
            t (`torch.Tensor` of shape `()` or `(batch,)`): Network's time.
            class_labels (`torch.Tensor` of shape `(batch,)`): c. Or weights, `(batch, num_classes + 1)`.
            guide_labels (`torch.Tensor`, the same shape): Labels that replace ∅, for `guide_unet` or else `unet`.
            w (`torch.Tensor` of shape `(batch, 1, 1, 1)`): Guidance scales.
            needs_cond (`bool`), needs_uncond (`bool`): `False` skips that pass, where w makes its weight zero.

        Returns:
            Two `torch.Tensor` of the shape of z, in float32; `None` for one that was skipped.
        """
        guide = self.unet if self.guide_unet is None else self.guide_unet
        if self.unet.max_guidance_scale is not None:
            return self.unet(z, t, class_labels=class_labels, guidance_scale=w.flatten()).sample.float(), None
        if not needs_uncond:
            return self.unet(z, t, class_labels=class_labels).sample.float(), None
        if not needs_cond:
            return None, guide(z, t, class_labels=guide_labels).sample.float()
        if guide is not self.unet:
            pred_cond = self.unet(z, t, class_labels=class_labels).sample.float()
            return pred_cond, guide(z, t, class_labels=guide_labels).sample.float()
        t = torch.cat([t, t]) if t.ndim else t
        pred = self.unet(torch.cat([z, z]), t, class_labels=torch.cat([class_labels, guide_labels])).sample
        return pred.float().chunk(2)

    @staticmethod
    def guide(
        pred_cond: torch.Tensor | None,
        pred_uncond: torch.Tensor | None,
        w: torch.Tensor,
        guidance_rescale: float = 0.0,
    ) -> torch.Tensor:
        r"""
        Return the guided prediction ε̃ = (1 + w) ε(z, c) - w ε(z), equation 6. It holds for ε, v and x alike: each is
        affine in ε at a given z, and the weights add up to one.

        Args:
            pred_cond, pred_uncond (`torch.Tensor` or `None`): Predictions as `predictions` returns them.
            w (`torch.Tensor` of shape `(batch, 1, 1, 1)`): Guidance scales.
            guidance_rescale (`float`): φ in [0, 1]; 0 changes nothing.

        Returns:
            `torch.Tensor` of the shape of the predictions.
        """
        if pred_cond is None or pred_uncond is None:
            return pred_cond if pred_uncond is None else pred_uncond
        pred = (1 + w) * pred_cond - w * pred_uncond
        return rescale_noise_cfg(pred, pred_cond, guidance_rescale) if guidance_rescale else pred

    @staticmethod
    def _needed_passes(scales: torch.Tensor) -> tuple[list[bool], list[bool]]:
        """Return whether any image needs ε(z, c), and whether any needs ε(z), at each step."""
        return tuple((scales != w).flatten(1).any(1).tolist() for w in (-1, 0))

    def guider_prediction(
        self,
        guider: BaseGuidance,
        z: torch.Tensor,
        t: torch.Tensor,
        step: int,
        class_labels: torch.Tensor,
        guide_labels: torch.Tensor,
    ) -> torch.Tensor:
        """
        Predict with one of diffusers' guiders, by as many passes as it asks for.

        Args:
            guider (`BaseGuidance`): The guider, which gets `step` as its state.
            z, t, class_labels, guide_labels: As in `predictions`.
            step (`int`): Index of the sampling step, from 0.

        Returns:
            `torch.Tensor` of the shape of z, in float32.
        """
        guider.set_state(step=step, num_inference_steps=len(self.scheduler.timesteps), timestep=t)
        batches = guider.prepare_inputs({"class_labels": (class_labels, guide_labels)})
        for batch in batches:
            guider.prepare_models(self.unet)
            try:
                batch.noise_pred = self.unet(z, t, class_labels=batch.class_labels).sample.float()
            finally:
                guider.cleanup_models(self.unet)
        return guider(batches).pred

    def encode(
        self, images: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Encode images to what the UNet models: a draw from the VAE's posterior, shifted and scaled as its config says.
        Without a VAE, return the images.

        Args:
            images (`torch.Tensor` of shape `(batch, *image_shape)`): Images in [-1, 1].
            generator (`torch.Generator` or a list of one per image, *optional*): Source of the posterior's noise.

        Returns:
            `torch.Tensor` of shape `(batch, *sample_shape)`.
        """
        if self.vae is None:
            return images
        return self.draw_latents(self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters, generator)

    def draw_latents(
        self, moments: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Draw latents from the VAE's posterior, as `encode` does.

        Args:
            moments (`torch.Tensor` of shape `(batch, 2 * channels, height, width)`): Mean and log-variance.
            generator (`torch.Generator` or a list of one per image, *optional*): Source of the noise.

        Returns:
            `torch.Tensor` of shape `(batch, *sample_shape)`.
        """
        latents = DiagonalGaussianDistribution(moments).sample(generator)
        return (latents - self._vae_shift) * self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents `(batch, *sample_shape)` to images `(batch, *image_shape)`, nominally in [-1, 1]."""
        if self.vae is None:
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self._vae_shift
        return self.vae.decode(latents).sample

    @property
    def _vae_shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

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

    def _check_guidance(self, guidance_interval: tuple[float, float] | None, guidance_rescale: float) -> None:
        if guidance_interval is not None:
            low, high = guidance_interval
            if not 0 <= low < high:
                raise ValueError(
                    f"guidance_interval must be (σ_lo, σ_hi) with 0 ≤ σ_lo < σ_hi, but is ({low}, {high})."
                )
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], but is {guidance_rescale}.")

    def _check_guider(self, guider: BaseGuidance | None, **own: Any) -> None:
        given = [name for name, value in {**own, "guide_unet": self.guide_unet}.items() if value is not None]
        if guider is not None and given:
            raise ValueError(
                f"{', '.join(given)} cannot be combined with the guider {type(guider).__name__}, which has its own "
                "rule. Set its scale, start and stop when you create it, or set pipe.guider = None."
            )
        if type(guider).__name__ in self.refused_guiders:
            reason = self.refused_guiders[type(guider).__name__]
            raise ValueError(f"{type(guider).__name__} cannot guide this model: in this diffusers {reason}.")

    def _check_networks(self, **needs_two_passes: Any) -> None:
        given = {**needs_two_passes, "guide_unet": self.guide_unet}
        given = [name for name, value in given.items() if value is not None]
        if self.unet.max_guidance_scale is not None and given:
            raise ValueError(
                f"{', '.join(given)} cannot be used with this model: it was distilled to guide in one pass, and this "
                "needs a second one. Use the model that it was distilled from."
            )
        for name in ("num_classes", "dtype"):
            ours, theirs = getattr(self.unet, name), getattr(self.guide_unet or self.unet, name)
            if ours != theirs:
                raise ValueError(f"guide_unet has {name} {theirs}, but the UNet has {ours}. They must be the same.")

    def _check_scheduler(self) -> None:
        """Refuse schedulers that would silently draw noise: most of them accept the config of any other."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        if not any(base.__name__ in self.schedulers for base in type(self.scheduler).__mro__):
            raise ValueError(f"{name} is not supported. Supported schedulers: {', '.join(self.schedulers)}.")
        if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"{name} is configured for flow matching (use_flow_sigmas={config.get('use_flow_sigmas')}, "
                f"prediction_type={config.get('prediction_type')!r}), but this model is a variance-preserving "
                f"diffusion. Create it with {name}.from_config(pipe.scheduler.config)."
            )

        network, (prediction_type, alphas_cumprod) = self._noise_process, self._noise_process_of(self.scheduler)
        difference = (alphas_cumprod - network[1]).abs().max().item() if len(alphas_cumprod) == len(network[1]) else 1
        if prediction_type != network[0] or difference > 1e-4:
            raise ValueError(
                f"{name} does not match the noise process this model was trained with (prediction_type "
                f"{prediction_type!r} instead of {network[0]!r}; alphas_cumprod differs by up to {difference:.2g}). "
                f"Create it with {name}.from_config(pipe.scheduler.config), from the model's own scheduler."
            )

    @staticmethod
    def _noise_process_of(scheduler: SchedulerMixin) -> tuple[str | None, torch.Tensor]:
        """Return a scheduler's prediction type and α² at each training timestep."""
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", torch.empty(0))
        return scheduler.config.get("prediction_type"), alphas_cumprod.double().cpu()

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            # A solver that rounds its timesteps and looks up the first one would take the second of two equal ones.
            self.scheduler.set_begin_index(0)
        self._check_first_sigma()
        self._check_stride(num_inference_steps)

    def _check_first_sigma(self) -> None:
        """Check, after `set_timesteps`, that a scheduler that steps in σ/α does not start at the end of the process."""
        sigma = float(self.scheduler.init_noise_sigma)
        if sigma > 1000:
            raise ValueError(
                f"{type(self.scheduler).__name__} starts at σ/α = {sigma:.0f}, where one step multiplies the network's "
                "error by as much. Keep use_exponential_sigmas and sigma_max as they are in pipe.scheduler.config."
            )

    def _check_stride(self, num_inference_steps: int) -> None:
        """Refuse numbers of steps for which DDIM, which always steps by ⌊N / T⌋ timesteps, silently falls short."""
        if "DDIM" not in type(self.scheduler).__name__:
            return
        num_train_timesteps, timesteps = self.scheduler.config.num_train_timesteps, self.scheduler.timesteps
        stride = num_train_timesteps // num_inference_steps
        if (timesteps[:-1] - timesteps[1:] != stride).any():
            divisors = [steps for steps in range(1, num_train_timesteps + 1) if num_train_timesteps % steps == 0]
            nearest = min(divisors, key=lambda steps: abs(steps - num_inference_steps))
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot take {num_inference_steps} steps: it steps by {stride} "
                f"timesteps, but its {num_inference_steps} timesteps are farther apart. Use num_inference_steps="
                f"{nearest}, another divisor of {num_train_timesteps}, or another scheduler."
            )

    # Labels pass two checks. `_check_class_id` and `_check_weights` see what a user entered, where the null class is -1
    # and `num_classes` is an error. `unet.check_class_labels` sees what the network takes, where it is the last row.

    def _network_labels(self, name: str, labels: Any) -> torch.Tensor:
        """
        Convert labels in any form to what the network takes.

        Args:
            name (`str`): Name of the argument, for messages.
            labels: Ids, names, mixes or tensors, as `__call__` documents them.

        Returns:
            `torch.Tensor`: Ids, int64 `(labels,)`, or weights, float32 `(labels, num_classes + 1)`.
        """
        if isinstance(labels, torch.Tensor):
            labels = labels.cpu().reshape(labels.shape or (1,))
            if labels.is_floating_point():
                self._check_weights(name, labels)
                labels = torch.nn.functional.pad(labels, (0, 1))  # no weight on the null class
            elif labels.ndim == 1 and not labels.is_complex():
                for label in labels.tolist():
                    self._check_class_id(name, label)
        else:
            if isinstance(labels, (str, dict)) or not hasattr(labels, "__iter__"):
                labels = [labels]
            labels = list(labels)
            label2id = {class_name: class_id for class_id, class_name in self.id2label.items()}
            mixes = [label.items() if isinstance(label, dict) else [(label, 1.0)] for label in labels]
            mixes = [[(self._class_id(name, label, label2id), weight) for label, weight in mix] for mix in mixes]
            if any(isinstance(label, dict) for label in labels):
                labels = torch.zeros(len(mixes), self.unet.num_classes + 1)
                for row, mix in zip(labels, mixes, strict=True):
                    for class_id, weight in mix:
                        row[class_id] += weight
            else:
                labels = torch.tensor([class_id for mix in mixes for class_id, _ in mix], dtype=torch.int64)
        if labels.numel() == 0:
            raise ValueError(f"{name} is empty. Give at least one class id or name.")
        self.unet.check_class_labels(labels, len(labels))
        if labels.is_floating_point():
            return labels.float()
        return labels.to(torch.int64) % (self.unet.num_classes + 1)  # -1 is the null class, the last row

    def _check_class_id(self, name: str, class_id: int) -> None:
        """Check an id that a user entered: `0 … num_classes - 1`, or -1 for the null class."""
        if -1 <= class_id < self.unet.num_classes:
            return
        one_based = ", counted from 1?" if class_id == self.unet.num_classes else "."
        raise ValueError(
            f"{name} has the unknown id {class_id}{one_based} The classes are {self._known_classes()}; -1 is the null "
            "class."
        )

    def _check_weights(self, name: str, weights: torch.Tensor) -> None:
        """Check the shape of a tensor of weights that a user entered: `(labels, num_classes)`."""
        num_classes, shape = self.unet.num_classes, tuple(weights.shape)
        if len(shape) == 2 and shape[1] == num_classes:
            return
        one_based = ", counted from 1?" if shape[1:] == (num_classes + 1,) else "."
        raise ValueError(
            f"{name} has weights of shape {shape} ({weights.dtype}), but must have one column for each of the classes "
            f"0 … {num_classes - 1}, shape (labels, {num_classes}){one_based} Only a mix such as {{-1: 0.5, 0: 0.5}} "
            "takes a weight for the null class, -1; ids must be integers."
        )

    def _guide_labels(self, class_labels: torch.Tensor, negative: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return c and the labels that replace ∅ in the same form: both ids, or both weights."""
        if negative is not None:
            guide_labels = self._network_labels("negative_class_labels", negative)
            if len(guide_labels) not in (1, len(class_labels)):
                raise ValueError(
                    f"negative_class_labels has {len(guide_labels)} labels, but must have one, or one for each of the "
                    f"{len(class_labels)} class_labels."
                )
            guide_labels = guide_labels.expand(len(class_labels), *guide_labels.shape[1:])
        elif self.guide_unet is not None:
            guide_labels = class_labels
        else:
            guide_labels = torch.full((len(class_labels),), self.unet.null_class_label)
        if class_labels.ndim != guide_labels.ndim:
            class_labels, guide_labels = self._weights(class_labels), self._weights(guide_labels)
        return class_labels, guide_labels

    def _weights(self, labels: torch.Tensor) -> torch.Tensor:
        """Return ids `(labels,)` as weights `(labels, num_classes + 1)`, and weights as they are."""
        if labels.is_floating_point():
            return labels
        return torch.nn.functional.one_hot(labels, self.unet.num_classes + 1).float()

    def _class_id(self, name: str, label: int | str, label2id: dict[str, int]) -> int:
        """Return the checked id of a label, `-1 … num_classes - 1`."""
        if isinstance(label, str):
            if not label2id:
                raise ValueError(f"{name} has the name {label!r}, but this model's classes have no names. Use ids.")
            if label not in label2id:
                raise ValueError(f"{name} has the unknown name {label!r}. The classes are {self._known_classes()}.")
            return label2id[label]
        try:
            class_id = None if isinstance(label, bool) else operator.index(label)
        except TypeError:
            class_id = None
        if class_id is None:
            raise ValueError(f"{name} has {label!r}, which is neither an integer id nor a name.")
        self._check_class_id(name, class_id)
        return class_id

    def _known_classes(self) -> str:
        """Return the classes as a message lists them, at most 50 names."""
        named = [f"{class_name!r} ({class_id})" for class_id, class_name in sorted(self.id2label.items())]
        if not named:
            return f"0 … {self.unet.num_classes - 1}"
        return ", ".join(named[:50]) + (f", … ({len(named)} in all)" if len(named) > 50 else "")

    def _guidance_scales(
        self,
        guidance_scale: float | Sequence[float] | torch.Tensor | Callable[[float], Any] | None,
        guidance_interval: tuple[float, float] | None,
        num_images: int,
        num_images_per_label: int,
    ) -> torch.Tensor:
        """Return w at each step and for each image, float32 `(steps, images)` on the CPU; 0 outside the interval."""
        log_snr = self.log_snr()
        if callable(guidance_scale):
            rows = [
                self._scale_per_image(guidance_scale(x), num_images, num_images_per_label) for x in log_snr.tolist()
            ]
        else:
            if guidance_scale is None:
                guidance_scale = min(1.0, self.unet.max_guidance_scale or 1.0)
            rows = [self._scale_per_image(guidance_scale, num_images, num_images_per_label)] * len(log_snr)
        scales = torch.stack(rows)
        if guidance_interval is not None:
            (low, high), sigma = guidance_interval, (-log_snr / 2).exp()
            inside = (low < sigma) & (sigma <= high)
            if not inside.any():
                raise ValueError(
                    f"None of the {len(sigma)} steps lies in guidance_interval ({low}, {high}]: σ/α goes from "
                    f"{sigma.max():.4g} to {sigma.min():.4g}. Use a wider interval or more steps."
                )
            scales = torch.where(inside[:, None], scales, 0.0)
        largest = self.unet.max_guidance_scale
        if largest is not None and not ((scales >= 0) & (scales <= largest)).all():
            raise ValueError(
                f"guidance_scale goes from {scales.min():g} to {scales.max():g}, but this model was distilled for 0 … "
                f"{largest:g}. Use the model that it was distilled from, or class_labels=-1 for unconditional images."
            )
        return scales

    def _scale_per_image(self, guidance_scale: Any, num_images: int, num_images_per_label: int) -> torch.Tensor:
        """Return w for each image, float32 `(images,)` on the CPU, from one number, one per label or one per image."""
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

    def log_snr(self) -> torch.Tensor:
        """Return λ = log(α²/σ²) at each of the scheduler's timesteps, float64 `(steps,)` on the CPU."""
        timesteps = self.scheduler.timesteps.double().cpu()
        if hasattr(self.scheduler, "log_snr"):
            return self.scheduler.log_snr(self.scheduler.u(timesteps))
        log_snr = self.scheduler.alphas_cumprod.double().cpu().logit()
        before = timesteps.floor().long().clamp(0, len(log_snr) - 2)
        return torch.lerp(log_snr[before], log_snr[before + 1], timesteps - before)

    def _warn_if_never_dropped(self, guide_labels: torch.Tensor, needs_uncond: bool) -> None:
        """Warn if ε(z) is needed, but the model was trained without dropping labels."""
        null_class = guide_labels.ndim == 1 and bool((guide_labels == self.unet.null_class_label).any())
        if needs_uncond and self.guide_unet is None and null_class and self.config.conditioning_dropout_prob == 0:
            logging.get_logger(__name__).warning(
                "This model was trained with conditioning_dropout_prob = 0: its null class was never trained, so "
                "guidance and unconditional samples are meaningless. Use guidance_scale=0, or train with 0.1 to 0.2."
            )

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Check the given z at λ_min or draw it, and scale it as the scheduler starts; float32 on `device`."""
        shape = (num_images, *self.sample_shape)
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"generator is a list of {len(generator)}, but {num_images} images are drawn.")
        if latents is None:
            # float32 whatever the UNet computes in: at the noisy end a step needs the digits.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but must have {shape}.")
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def _step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Return the arguments that this scheduler's `step` takes beyond the three that all of them take."""
        accepted = inspect.signature(self.scheduler.step).parameters
        # DDIM otherwise steps along an ε that contradicts the clipped x̃, which leaves speckles.
        wanted = {"generator": generator, "use_clipped_model_output": True}
        return {name: value for name, value in wanted.items() if name in accepted}

    # A saved folder loads with and without running the repository's code. The first,
    # `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, needs the code in the folder, named by
    # model_index.json. The second, `CFGPipeline.from_pretrained(folder)`, has the code installed and runs none of it.

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained`, with optional components that were assigned later."""
        self._record_optional_components()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _record_optional_components(self) -> None:
        """Record optional components in the config: diffusers does not where they are assigned after construction."""
        self.register_modules(**{name: getattr(self, name) for name in self._optional_components})

    def to_json_string(self) -> str:
        """Return model_index.json, which names this package's components by the files that `save_config` writes."""
        self._record_optional_components()
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
        self._record_optional_components()
        directory = Path(save_directory)
        for name, component in self.components.items():
            if hasattr(component, "remote_code"):
                module = self.config[name][0].rpartition(".")[2]
                (directory / name).mkdir(parents=True, exist_ok=True)
                (directory / name / f"{module}.py").write_text(component.remote_code, encoding="utf-8")
            if (directory / name / "config.json").is_file():
                # diffusers records where the component was loaded from, a path of this machine.
                config = json.loads((directory / name / "config.json").read_text(encoding="utf-8"))
                config.pop("_name_or_path", None)
                (directory / name / "config.json").write_text(
                    json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
                )
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "pipeline_cfg.py").write_text(self.remote_code, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> dict[str, Any] | tuple[dict[str, Any], ...]:
        """
        Load model_index.json for `CFGPipeline.from_pretrained`, with this package's classes in place of the folder's
        copies, so that no code of the folder is needed, asked for or run. Takes the arguments of
        `DiffusionPipeline.load_config` and returns what it returns.

        Raises:
            ValueError: If the index describes another pipeline, or a component that is neither diffusers' nor this
                package's.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        index, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        index = cls._with_installed_classes(index, str(pretrained_model_name_or_path))
        return (index, *rest) if isinstance(loaded, tuple) else index

    @classmethod
    def _with_installed_classes(cls, index: dict[str, Any], source: str) -> dict[str, Any]:
        """Return the index with this package's modules in place of the folder's, or refuse it."""
        class_name = index.get("_class_name")
        if isinstance(class_name, list):
            class_name = class_name[-1]
        if class_name != cls.__name__:
            raise ValueError(
                f"{source} describes a {class_name}, not a {cls.__name__}. Load it with DiffusionPipeline."
            )
        index = {**index, "_class_name": class_name}
        for name, value in index.items():
            if not isinstance(value, list) or value[0] in (None, "diffusers"):
                continue
            module, component_class = value[0], value[1]
            if component_class not in cls.component_classes.get(module, ()):
                raise ValueError(
                    f"{source} wants {component_class} from {module} for its {name}, which is neither diffusers' nor "
                    f"this package's. {cls.__name__}.from_pretrained runs no code of a repository. If you have read it "
                    "and trust it, use DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
                )
            # diffusers finds a component's module only if it was imported, and this package imports at first use.
            index[name] = [importlib.import_module(f"{__package__}.{module}").__name__, component_class]
        return index
