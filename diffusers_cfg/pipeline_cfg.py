"""Generate images from class labels with classifier-free guidance (Ho & Salimans 2022, Algorithm 2)."""

# Copied from diffusers_cfg.unet_2d_cfg
# This file is saved with every model, so it must run alone under plain diffusers: it imports the standard library,
# torch and diffusers only, and keeps its helpers inside the class.

import importlib
import inspect
import json
import math
import operator
import os
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
    Pipeline for class-conditional image generation with classifier-free guidance.

    `guidance_scale` is the **paper's w**: ε̃ = (1 + w) ε(z, c) - w ε(z). 0 is the plain conditional model, -1 the plain
    unconditional one. Most other diffusers pipelines take s = 1 + w.

    Args:
        unet (`UNet2DCFGModel`): Network that predicts from z, the timestep and the class labels.
        scheduler (`SchedulerMixin`): A `LogSNRScheduler`, or a diffusers scheduler created by `from_config` from its
            config.
        vae (`AutoencoderKL`, *optional*): Autoencoder for a model that was trained on latents.
        id2label (`dict`, *optional*): Name of each class id. Keys may be strings, as in JSON.
        conditioning_dropout_prob (`float`, *optional*): The p_uncond that the model was trained with.
        guide_unet (`UNet2DCFGModel`, *optional*): Weaker network for the same classes. Its predictions replace those
            for the null class: autoguidance (Karras et al. 2024, arXiv 2406.02507).
        guider (`BaseGuidance`, *optional*): A diffusers guider, which replaces the rule above.
        num_inference_steps (`int`, *optional*): Default number of sampling steps.

    Raises:
        ValueError: If `id2label` names a class that the UNet does not have, or gives two classes the same name.
    """

    model_cpu_offload_seq = "guide_unet->unet->vae"
    _optional_components = ["vae", "guide_unet", "guider"]
    _callback_tensor_inputs = ["latents", "pred"]

    # Tested with these models. Other schedulers accept the same config and then return noise.
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

    # Guiders that do not work with these models, and why.
    refused_guiders = {
        "MagnitudeAwareGuidance": "it accepts only token sequences, not images",
        "SmoothedEnergyGuidance": "it never blurs the attention, so it returns the images of ClassifierFreeGuidance",
    }

    # This package's modules that define components. `load_config` uses their classes instead of the folder's copies
    # and refuses all other modules.
    component_classes = {"unet_2d_cfg": ("UNet2DCFGModel",), "scheduling_log_snr": ("LogSNRScheduler",)}

    # Copied from diffusers_cfg.unet_2d_cfg.UNet2DCFGModel
    # Source of this module, which `CFGPipeline.save_pretrained` writes next to the weights. Read at import: all
    # repositories loaded as remote code share one path, so the file there may later belong to a different repository.
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
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide_unet=guide_unet, guider=guider)
        self._noise_process = self._noise_process_of(scheduler)  # the process that the network was trained on
        if id2label is not None:
            id2label = {str(class_id): name for class_id, name in id2label.items()}
            unknown = [class_id for class_id in id2label if not 0 <= int(class_id) < unet.num_classes]
            if unknown:
                raise ValueError(f"id2label has the class ids {unknown}, but the UNet has 0 … {unet.num_classes - 1}.")
            repeated = sorted(name for name, count in Counter(id2label.values()).items() if count > 1)
            if repeated:
                raise ValueError(f"id2label uses the names {repeated} for more than one class. Use unique names.")
        self.register_to_config(
            id2label=id2label,
            conditioning_dropout_prob=conditioning_dropout_prob,
            num_inference_steps=num_inference_steps,
        )
        self.image_processor = VaeImageProcessor()

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each class id; empty if the classes have no names."""
        return {int(class_id): name for class_id, name in (self.config.id2label or {}).items()}

    @property
    def num_inference_steps(self) -> int:
        """The default number of sampling steps: the value saved with the pipeline, or 64."""
        return self.config.num_inference_steps or 64

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The channels, height and width of a sample of the UNet: of latents, or of images without a VAE."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The channels, height and width of the images that `encode` takes and `decode` returns."""
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
        negative_class_labels: (
            int | str | dict[int | str, float] | Sequence[int | str | dict[int | str, float]] | torch.Tensor | None
        ) = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        guider: BaseGuidance | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["CFGPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images of the given classes.

        Args:
            class_labels (`int`, `str`, `dict`, `list` or `torch.Tensor`): One label or a list of labels. A label is a
                class id in `0 … num_classes - 1`, -1 for the null class, a name from `id2label`, or a mix of classes.
                A mix is a `dict` such as `{"three": 0.7, "eight": 0.3}`: its values are the weights of the class
                embeddings, which must be at least 0 and add up to one. A tensor contains ids, `(labels,)`, or weights,
                `(labels, num_classes)`.
            guidance_scale (`float`, `list[float]`, `torch.Tensor` or `Callable`, *optional*, defaults to 1): The
                paper's w, for all images, for each label or for each image; s = 1 + w. A distilled network takes
                0 … `unet.max_guidance_scale`. A callable is called with the log-SNR of each step, λ = log(α²/σ²), and
                returns w(λ), a number or a list.
            num_inference_steps (`int`, *optional*, defaults to `CFGPipeline.num_inference_steps`): T. A step evaluates
                the network twice per image, in one batch. It evaluates the network once if w = 0 or w = -1 for all
                images, or if the network takes w as an input.
            num_images_per_label (`int`, *optional*, defaults to 1): Number of images for each label. They are adjacent
                in the output.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of all noise. With a list of
                one generator per image, an image does not depend on the rest of its batch.
            latents (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): z at λ_min. By default
                sampled from N(0, I).
            negative_class_labels (`int`, `str`, `dict`, `list` or `torch.Tensor`, *optional*): Classes to guide away
                from, one label for all images or one for each of `class_labels`. Defaults to the null class, or to
                `class_labels` if the pipeline has a `guide_unet`.
            guidance_interval (`tuple[float, float]`, *optional*): Guide only where σ_lo < σ/α ≤ σ_hi (Kynkäänniemi et
                al. 2024, arXiv 2404.07724; σ/α = exp(-λ/2) is their σ). A step outside the interval evaluates the
                network once.
            guidance_rescale (`float`, *optional*, defaults to 0.0): φ in [0, 1] of Lin et al. 2023, arXiv 2305.08891,
                section 3.4. Reduces saturation by moving the standard deviation of the guided prediction towards that
                of the conditional prediction.
            guider (`BaseGuidance`, *optional*): A diffusers guider to use instead of the pipeline's own, with its own
                scale, `start` and `stop`. Most guiders take s = 1 + w unless `use_original_formulation=True` is set.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`; `"np"` (images, height, width, channels) or
                `"pt"` (images, channels, height, width) with values in [0, 1]; `"latent"` for the final z.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an `ImagePipelineOutput` instead of
                a tuple.
            callback_on_step_end (`Callable`, *optional*): Function called after each step as
                `callback_on_step_end(pipe, step, timestep, tensors)`. It may return a dictionary with new `latents`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Names of the tensors to pass to the callback:
                `"latents"` and `"pred"`.

        Returns:
            `ImagePipelineOutput` or `tuple`: `images`, in the order of the labels.

        Raises:
            ValueError: If an argument is invalid. Arguments are checked before the network is evaluated.
            FloatingPointError: If the images contain non-finite values.

        Examples:

        ```py
        >>> pipe = CFGPipeline.from_pretrained("path/to/model")
        >>> images = pipe(class_labels=["three", 7], guidance_scale=2.0).images
        >>> images = pipe({"three": 0.7, "eight": 0.3}, guidance_scale=2.0, guidance_interval=(0.3, 5.0)).images
        ```
        """
        # 1. Check the arguments and expand the labels to one per image
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

        # 2. Set λ_min … λ_max and w at each λ, and sample z ~ N(0, I)
        self._set_timesteps(num_inference_steps, device)
        scales = self._guidance_scales(guidance_scale, guidance_interval, num_images, num_images_per_label)
        needs_cond, needs_uncond = self._needed_passes(scales)
        self._warn_if_never_dropped(guide_labels, any(needs_uncond))
        scales = scales.view(*scales.shape, 1, 1, 1).to(device)  # (steps, images, 1, 1, 1)
        sample = self._prepare_latents(latents, num_images, generator, device)
        step_kwargs = self._step_kwargs(generator)
        dtype = self.unet.dtype  # read once: diffusers searches all modules for it

        # 3. Algorithm 2
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(self.progress_bar(timesteps)):  # pyright: ignore[reportCallIssue, reportArgumentType]
            z = self.scheduler.scale_model_input(sample, t).to(dtype)
            if guider is None:
                preds = self.predictions(z, t, class_labels, guide_labels, scales[i], needs_cond[i], needs_uncond[i])
                pred = self.guide(*preds, scales[i], guidance_rescale)
            else:
                pred = self.guider_prediction(guider, z, t, i, class_labels, guide_labels)
            sample = self.scheduler.step(pred, t, sample, **step_kwargs).prev_sample

            if callback_on_step_end is not None:
                tensors = {"latents": sample, "pred": pred}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                sample = (callback_on_step_end(self, i, t, chosen) or {}).get("latents", sample)

        # 4. Decode x̃
        images = sample if output_type == "latent" else self.decode(sample)
        if not torch.isfinite(images).all():
            raise FloatingPointError(
                f"The images contain non-finite values: the UNet's predictions overflowed (dtype {self.unet.dtype}, "
                f"guidance_scale up to {scales.max().item():g}). Use torch.bfloat16 or torch.float32, or a smaller "
                "guidance_scale."
            )
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)  # pyright: ignore[reportArgumentType] may be a tensor

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
        Predict ε(z, c) and ε(z) with two passes in one batch. A network that takes w as an input predicts the guided
        ε̃ in one pass.

        Args:
            z (`torch.Tensor` of shape `(batch, channels, height, width)`): Noisy samples, scaled by the scheduler, in
                the dtype of `unet`.
            t (`torch.Tensor` of shape `()` or `(batch,)`): Timestep.
            class_labels (`torch.Tensor` of shape `(batch,)`): c. Or weights, `(batch, num_classes + 1)`.
            guide_labels (`torch.Tensor` of the same shape): Labels that replace ∅, for `guide_unet` if the pipeline has
                one.
            w (`torch.Tensor` of shape `(batch, 1, 1, 1)`): Guidance scales.
            needs_cond (`bool`), needs_uncond (`bool`): `False` skips that pass, whose weight is zero for all w.

        Returns:
            Two `torch.Tensor` of the shape of z, in float32; `None` for a pass that was skipped.
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
        Return the guided prediction ε̃ = (1 + w) ε(z, c) - w ε(z), equation 6. The same equation holds for v and x:
        both are affine in ε at a given z, and the weights add up to one.

        Args:
            pred_cond, pred_uncond (`torch.Tensor` or `None`): Predictions as returned by `predictions`.
            w (`torch.Tensor` of shape `(batch, 1, 1, 1)`): Guidance scales.
            guidance_rescale (`float`): φ in [0, 1]; 0 disables rescaling.

        Returns:
            `torch.Tensor` of the shape of the predictions.
        """
        if pred_cond is None or pred_uncond is None:
            pred = pred_cond if pred_uncond is None else pred_uncond
            assert pred is not None  # at least one pass has a weight
            return pred
        pred = (1 + w) * pred_cond - w * pred_uncond
        return rescale_noise_cfg(pred, pred_cond, guidance_rescale) if guidance_rescale else pred

    @staticmethod
    def _needed_passes(scales: torch.Tensor) -> tuple[list[bool], list[bool]]:
        """Return for each step whether any image needs ε(z, c), and whether any image needs ε(z)."""
        needs_cond, needs_uncond = ((scales != w).flatten(1).any(1).tolist() for w in (-1, 0))
        return needs_cond, needs_uncond

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
        Predict with a diffusers guider, which chooses the number of passes.

        Args:
            guider (`BaseGuidance`): The guider. `step` is set as its state.
            z, t, class_labels, guide_labels: As in `predictions`.
            step (`int`): Index of the sampling step, from 0.

        Returns:
            `torch.Tensor` of the shape of z, in float32.
        """
        num_inference_steps = len(self.scheduler.timesteps)
        guider.set_state(step, num_inference_steps, timestep=t)  # pyright: ignore[reportArgumentType] says LongTensor
        labels = {"class_labels": (class_labels, guide_labels)}
        batches = guider.prepare_inputs(labels)  # pyright: ignore[reportArgumentType] says BlockState
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
        Encode images to latents: a sample from the VAE's posterior, shifted and scaled according to the VAE's config.
        Without a VAE, return the images.

        Args:
            images (`torch.Tensor` of shape `(batch, *image_shape)`): Images in [-1, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the posterior's noise. A
                list has one generator per image.

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
        Sample latents from the VAE's posterior, as in `encode`.

        Args:
            moments (`torch.Tensor` of shape `(batch, 2 * channels, height, width)`): Mean and log-variance.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise. A list has one
                generator per image.

        Returns:
            `torch.Tensor` of shape `(batch, *sample_shape)`.
        """
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.sample(generator)  # pyright: ignore[reportArgumentType] takes lists too
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
                f"callback_on_step_end_tensor_inputs must be in {self._callback_tensor_inputs}, but contains {unknown}."
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
        """Check that the guider works with these models and is not combined with the pipeline's own rule, `own`."""
        given = [name for name, value in {**own, "guide_unet": self.guide_unet}.items() if value is not None]
        if guider is not None and given:
            raise ValueError(
                f"{', '.join(given)} cannot be combined with the guider {type(guider).__name__}, which replaces the "
                "pipeline's rule. Pass a scale, start and stop to the guider, or set pipe.guider = None."
            )
        if type(guider).__name__ in self.refused_guiders:
            reason = self.refused_guiders[type(guider).__name__]
            raise ValueError(f"{type(guider).__name__} cannot guide this model: in this version of diffusers {reason}.")

    def _check_networks(self, **needs_two_passes: Any) -> None:
        """Check that a distilled network needs only one pass, and that `guide_unet` matches `unet`."""
        given = {**needs_two_passes, "guide_unet": self.guide_unet}
        given = [name for name, value in given.items() if value is not None]
        if self.unet.max_guidance_scale is not None and given:
            raise ValueError(
                f"{', '.join(given)} cannot be used with this model: it was distilled to guide in one pass, but a "
                "second pass would be needed. Use the model that it was distilled from."
            )
        for name in ("num_classes", "dtype"):
            ours, theirs = getattr(self.unet, name), getattr(self.guide_unet or self.unet, name)
            if ours != theirs:
                raise ValueError(f"guide_unet has {name} {theirs}, but the UNet has {ours}. They must be the same.")

    def _check_scheduler(self) -> None:
        """Check the scheduler. Most schedulers accept the config of any other one and then silently return noise."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        if not any(base.__name__ in self.schedulers for base in type(self.scheduler).__mro__):
            raise ValueError(f"{name} is not supported. Supported schedulers: {', '.join(self.schedulers)}.")
        if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"{name} is configured for flow matching (use_flow_sigmas={config.get('use_flow_sigmas')}, "
                f"prediction_type={config.get('prediction_type')!r}), but this model was trained with a "
                f"variance-preserving process. Create it with {name}.from_config(pipe.scheduler.config), using the "
                "model's original scheduler."
            )

        network, (prediction_type, alphas_cumprod) = self._noise_process, self._noise_process_of(self.scheduler)
        difference = (alphas_cumprod - network[1]).abs().max().item() if len(alphas_cumprod) == len(network[1]) else 1
        if prediction_type != network[0] or difference > 1e-4:
            raise ValueError(
                f"{name} does not match the noise process this model was trained with (prediction_type "
                f"{prediction_type!r} instead of {network[0]!r}; alphas_cumprod differs by up to {difference:.2g}). "
                f"Create it with {name}.from_config(pipe.scheduler.config), using the model's original scheduler."
            )

    @staticmethod
    def _noise_process_of(scheduler: SchedulerMixin) -> tuple[str | None, torch.Tensor]:
        """Return a scheduler's prediction type and α² at each training timestep."""
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", torch.empty(0))
        return scheduler.config.get("prediction_type"), alphas_cumprod.double().cpu()

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        """Set the scheduler's timesteps and check them."""
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            # Without it, solvers whose first two rounded timesteps are equal start at the second one.
            self.scheduler.set_begin_index(0)
        self._check_first_sigma()
        self._check_stride(num_inference_steps)

    def _check_first_sigma(self) -> None:
        """Check, after `set_timesteps`, that a scheduler in σ/α does not start at the noisy end of the process."""
        sigma = float(self.scheduler.init_noise_sigma)
        if sigma > 1000:
            raise ValueError(
                f"{type(self.scheduler).__name__} starts at σ/α = {sigma:.0f}, where one step multiplies the network's "
                "error by the same factor. Keep use_exponential_sigmas and sigma_max from pipe.scheduler.config."
            )

    def _check_stride(self, num_inference_steps: int) -> None:
        """Check that T steps of DDIM, each of ⌊N / T⌋ timesteps, reach the end of the process."""
        if "DDIM" not in type(self.scheduler).__name__:
            return
        num_train_timesteps, timesteps = self.scheduler.config.num_train_timesteps, self.scheduler.timesteps
        stride = num_train_timesteps // num_inference_steps
        if (timesteps[:-1] - timesteps[1:] != stride).any():
            divisors = [steps for steps in range(1, num_train_timesteps + 1) if num_train_timesteps % steps == 0]
            nearest = min(divisors, key=lambda steps: abs(steps - num_inference_steps))
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot take {num_inference_steps} steps: it steps by {stride} "
                f"timesteps, which does not match the spacing of its {num_inference_steps} timesteps. Use "
                f"num_inference_steps={nearest}, another divisor of {num_train_timesteps}, or a different scheduler."
            )

    # Labels are checked twice. `_check_class_id` and `_check_weights` check the labels that a user entered: the null
    # class is -1, and `num_classes` is an error. `unet.check_class_labels` checks the labels that the network takes:
    # the null class is `num_classes`, the last row.

    def _network_labels(self, name: str, labels: Any) -> torch.Tensor:
        """
        Convert labels in any form to the labels that the network takes.

        Args:
            name (`str`): Name of the argument, for messages.
            labels: Ids, names, mixes or tensors, as in `__call__`.

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
            raise ValueError(f"{name} is empty. Pass at least one class id or name.")
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
            f"{name} contains the unknown id {class_id}{one_based} The classes are {self._known_classes()}; -1 is the "
            "null class."
        )

    def _check_weights(self, name: str, weights: torch.Tensor) -> None:
        """Check the shape of a tensor of weights that a user entered: `(labels, num_classes)`."""
        num_classes, shape = self.unet.num_classes, tuple(weights.shape)
        if len(shape) == 2 and shape[1] == num_classes:
            return
        one_based = ", counted from 1?" if shape[1:] == (num_classes + 1,) else "."
        raise ValueError(
            f"{name} has weights of shape {shape} ({weights.dtype}), but must have one column for each of the classes "
            f"0 … {num_classes - 1}, shape (labels, {num_classes}){one_based} To give the null class, -1, a weight, "
            "pass a mix such as {-1: 0.5, 0: 0.5}; ids must be integers."
        )

    def _guide_labels(self, class_labels: torch.Tensor, negative: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return c and the labels that replace ∅, both as ids or both as weights."""
        if negative is not None:
            guide_labels = self._network_labels("negative_class_labels", negative)
            if len(guide_labels) not in (1, len(class_labels)):
                raise ValueError(
                    f"negative_class_labels has {len(guide_labels)} labels, but must have one label, or one for each "
                    f"of the {len(class_labels)} class_labels."
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
        """Convert ids `(labels,)` to weights `(labels, num_classes + 1)`; return weights unchanged."""
        if labels.is_floating_point():
            return labels
        return torch.nn.functional.one_hot(labels, self.unet.num_classes + 1).float()

    def _class_id(self, name: str, label: int | str, label2id: dict[str, int]) -> int:
        """Return the checked id of a label, `-1 … num_classes - 1`."""
        if isinstance(label, str):
            if not label2id:
                raise ValueError(f"{name} contains the name {label!r}, but this model has no class names. Use ids.")
            if label not in label2id:
                raise ValueError(
                    f"{name} contains the unknown name {label!r}. The classes are {self._known_classes()}."
                )
            return label2id[label]
        try:
            class_id = None if isinstance(label, bool) else operator.index(label)
        except TypeError:
            class_id = None
        if class_id is None:
            raise ValueError(f"{name} contains {label!r}, which is neither an integer id nor a name.")
        self._check_class_id(name, class_id)
        return class_id

    def _known_classes(self) -> str:
        """Return the classes formatted for a message, with at most 50 names."""
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
                    f"None of the {len(sigma)} steps is in guidance_interval ({low}, {high}]: σ/α goes from "
                    f"{sigma.max():.4g} to {sigma.min():.4g}. Use a wider interval or more steps."
                )
            scales = torch.where(inside[:, None], scales, 0.0)
        largest = self.unet.max_guidance_scale
        if largest is not None and not ((scales >= 0) & (scales <= largest)).all():
            raise ValueError(
                f"guidance_scale is from {scales.min():g} to {scales.max():g}, but this model was distilled for 0 … "
                f"{largest:g}. Use the model that it was distilled from, or class_labels=-1 for unconditional images."
            )
        return scales

    def _scale_per_image(self, guidance_scale: Any, num_images: int, num_images_per_label: int) -> torch.Tensor:
        """Expand w, a number or one number per label or per image, to float32 `(images,)` on the CPU."""
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
            raise ValueError(f"guidance_scale must be finite, but contains {wrong}.")
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
                "This model was trained with conditioning_dropout_prob = 0: its null class is untrained, so guidance "
                "and unconditional samples are meaningless. Use guidance_scale=0, or train with 0.1 to 0.2."
            )

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Check or sample z at λ_min, and multiply it by the scheduler's initial σ; float32 on `device`."""
        shape = (num_images, *self.sample_shape)
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"generator has {len(generator)} generators, but must have one for each of {num_images} images."
            )
        if latents is None:
            # float32 even for a UNet in half precision: a step at the noisy end needs the precision.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but must have {shape}.")
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def _step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Return the additional arguments that this scheduler's `step` accepts."""
        accepted = inspect.signature(self.scheduler.step).parameters
        # By default DDIM steps along an ε that contradicts the clipped x̃, which leaves speckles.
        available = {"generator": generator, "use_clipped_model_output": True}
        return {name: value for name, value in available.items() if name in accepted}

    # A saved folder loads with and without remote code. `DiffusionPipeline.from_pretrained(folder,
    # trust_remote_code=True)` runs the code in the folder, which model_index.json names.
    # `CFGPipeline.from_pretrained(folder)` uses the installed package and runs no code from the folder.

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Save the pipeline to a folder, including optional components that were assigned after construction. Takes the
        arguments of `DiffusionPipeline.save_pretrained`.
        """
        self._record_optional_components()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _record_optional_components(self) -> None:
        """Record optional components in the config. diffusers records them only at construction."""
        self.register_modules(**{name: getattr(self, name) for name in self._optional_components})

    def to_json_string(self) -> str:
        """Return the text of model_index.json, which names the module files that `save_config` writes."""
        self._record_optional_components()
        index = json.loads(super().to_json_string())
        index["_class_name"] = ["pipeline_cfg", type(self).__name__]
        index.pop("_name_or_path", None)
        for name, component in self.components.items():
            if hasattr(component, "remote_code"):
                module, class_name = index[name]
                index[name] = [module.rpartition(".")[2], class_name]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json and the code that a plain `DiffusionPipeline` needs to load the folder."""
        self._record_optional_components()
        directory = Path(save_directory)
        for name, component in self.components.items():
            if hasattr(component, "remote_code"):
                module = self.config[name][0].rpartition(".")[2]
                (directory / name).mkdir(parents=True, exist_ok=True)
                (directory / name / f"{module}.py").write_text(component.remote_code, encoding="utf-8")
            if (directory / name / "config.json").is_file():
                # Remove the path that the component was loaded from, which diffusers records.
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
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> dict[str, Any] | tuple[dict[str, Any], ...]:
        """
        Load model_index.json with this package's classes in place of the folder's copies, so that
        `CFGPipeline.from_pretrained` runs no code from the folder. The arguments and return values are those of
        `DiffusionPipeline.load_config`.

        Raises:
            ValueError: If the index describes a different pipeline, or a component that belongs neither to diffusers
                nor to this package.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        index, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        index = cls._with_installed_classes(index, str(pretrained_model_name_or_path))
        return (index, *rest) if isinstance(loaded, tuple) else index

    @classmethod
    def _with_installed_classes(cls, index: dict[str, Any], source: str) -> dict[str, Any]:
        """Replace the folder's modules in the index by this package's; raise ValueError for unknown components."""
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
                    f"{source} uses {component_class} from {module} as its {name}, which belongs neither to diffusers "
                    f"nor to this package. {cls.__name__}.from_pretrained does not run code from a repository. If you "
                    "have read that code and trust it, use DiffusionPipeline.from_pretrained(..., "
                    "trust_remote_code=True)."
                )
            # Import the module now: diffusers looks it up in `sys.modules`, and this package imports lazily.
            index[name] = [importlib.import_module(f"{__package__}.{module}").__name__, component_class]
        return index
