"""Generate images from class labels with classifier-free guidance (Ho & Salimans 2022, Algorithm 2)."""

# Copied from diffusers_cfg.unet_2d_cfg
# This file is saved with every model, so it must run alone under plain diffusers: it imports the standard library,
# torch and diffusers only, and keeps its helpers inside the class.

import contextlib
import copy
import importlib
import inspect
import json
import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


class CFGPipeline(DiffusionPipeline):
    r"""
    Pipeline for class-conditional image generation with classifier-free guidance.

    `guidance_scale` is the **paper's w**: ε̃ = (1 + w) ε(z, c) - w ε(z). 0 is the plain conditional model, -1 the plain
    unconditional one. Most other diffusers pipelines take s = 1 + w.

    One pipeline may be called from several threads, and inside its own callbacks. Only `interrupt`, `num_timesteps`,
    `guidance_scale` and `log_snr()` are then those of the last call, and the guiders that change the network's layers
    (AutoGuidance, SkipLayerGuidance, PerturbedAttentionGuidance) need one call at a time.

    Args:
        unet (`UNet2DCFGModel`): Network that predicts from z, the timestep and the class labels.
        scheduler (`SchedulerMixin`): A `LogSNRScheduler`, or a diffusers scheduler created by `from_config` from its
            config. It must have the noise process that the network was trained with, `unet.noise_process`; of a
            network that records none, this scheduler states it. For a generator (`unet.latent_dim` is set), a
            `DDPMScheduler` with the `trained_betas` of its steps, which samples their posterior exactly.
        vae (`AutoencoderKL` or `AutoencoderDC`, *optional*): Autoencoder for a model that was trained on latents.
        id2label (`dict`, *optional*): Name of each class id. Keys may be strings, as in JSON.
        conditioning_dropout_prob (`float`, *optional*): The p_uncond that the model was trained with.
        guide_unet (`UNet2DCFGModel`, *optional*): Weaker network for the same classes. Its predictions replace those
            for the null class: autoguidance (Karras et al. 2024, arXiv 2406.02507).
        guider (`BaseGuidance`, *optional*): A diffusers guider, which replaces the rule above.
        classifier (`NoisyClassifier2DModel`, *optional*): A classifier p(c | z) of noisy samples, for classifier
            guidance (Dhariwal & Nichol 2021, arXiv 2105.05233), with the classes and the noise process of `unet`. With
            a classifier, `unet` may be unconditional.
        num_inference_steps (`int`, *optional*): Default number of sampling steps.

    Raises:
        ValueError: If an argument is invalid, the components do not fit each other, or the scheduler does not have the
            noise process of the network.
    """

    model_cpu_offload_seq = "guide_unet->unet->classifier->vae"
    _optional_components = ["vae", "guide_unet", "guider", "classifier"]
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
        "UniPCMultistepScheduler",
    )
    # The sampler of a generator, and the settings with which it samples the posterior q(x_prev | x_next, x) of an x in
    # [-1, 1]: other ones replace x or the variance without an error.
    generator_scheduler = "DDPMScheduler"
    generator_settings = {"variance_type": "fixed_small", "clip_sample_range": 1.0, "thresholding": False}

    # Guiders that do not work with these models, and why.
    refused_guiders = {
        "MagnitudeAwareGuidance": "it accepts only token sequences, not images",
        "SmoothedEnergyGuidance": "it never blurs the attention, so it returns the images of ClassifierFreeGuidance",
    }

    # This package's modules that define components. `load_config` uses their classes instead of the folder's copies
    # and refuses all other modules.
    component_classes = {
        "unet_2d_cfg": ("UNet2DCFGModel",),
        "scheduling_log_snr": ("LogSNRScheduler",),
        "classifier_2d": ("NoisyClassifier2DModel",),
    }

    # Copied from diffusers_cfg.unet_2d_cfg.UNet2DCFGModel
    # Source of this module, which `CFGPipeline.save_pretrained` writes next to the weights. Read at import: all
    # repositories loaded as remote code share one path, so the file there may later belong to a different repository.
    remote_code = Path(__file__).read_text(encoding="utf-8")

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        conditioning_dropout_prob: float | None = None,
        guide_unet: UNet2DModel | None = None,
        guider: BaseGuidance | None = None,
        num_inference_steps: int | None = None,
        classifier: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        components = {"unet": unet, "scheduler": scheduler, "vae": vae, "guide_unet": guide_unet, "guider": guider}
        components["classifier"] = classifier
        for name, component in components.items():
            self._check_type(name, component)
        self.register_modules(**components)
        self._first_process = self._stated_process(scheduler)
        self._check_components()
        settings = self._checked_settings(id2label, conditioning_dropout_prob, num_inference_steps)
        if unet.noise_process is not None and all(value is None for value in settings.values()):
            logging.get_logger(__name__).warning(
                "A trained network without id2label, conditioning_dropout_prob and num_inference_steps: these are "
                "settings of the pipeline, not of its components. CFGPipeline.from_pipe(pipe) keeps them."
            )
        self.register_to_config(**settings)
        self._check_classifier_names()
        self.image_processor = VaeImageProcessor()

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_type(name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "CFGPipeline":
        """
        Create a pipeline with the components and settings of another one.

        Args:
            pipeline (`DiffusionPipeline`): The other pipeline. Both share its components.
            **kwargs: Components and settings that replace those of `pipeline`, and `dtype`, which converts the shared
                components. By default they are not converted, unlike in `DiffusionPipeline.from_pipe`.

        Returns:
            `CFGPipeline`: The pipeline.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        known = {**pipeline.config, **pipeline.components}
        components, settings = cls._get_signature_keys(cls)
        kept = {name: value for name, value in known.items() if name in {*components, *settings}}
        created = cls(**{**kept, **kwargs})
        created.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return created if dtype is None else created.to(dtype=dtype)

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each class id; empty if the classes have no names."""
        return {int(class_id): name for class_id, name in (self.config.id2label or {}).items()}

    @property
    def num_classes(self) -> int:
        """The number of classes, without the null class: that of the classifier if the network is unconditional."""
        return self.classifier.num_classes if self._is_unconditional else self.unet.num_classes

    @property
    def _is_unconditional(self) -> bool:
        """Whether the labels are for the classifier alone, because the network takes none."""
        return self.classifier is not None and self.unet.config.num_class_embeds is None

    @property
    def num_inference_steps(self) -> int:
        """The default number of sampling steps: T of a generator, or else the value saved with the pipeline, or 64."""
        return self._generator_steps or self.config.num_inference_steps or 64

    @property
    def _generator_steps(self) -> int | None:
        """The only number of steps T of a generator; `None` for other networks."""
        process = None if self.unet.latent_dim is None else self._trained_process
        return process.get("num_train_timesteps") if process else None

    @property
    def guidance_scale(self) -> float | Sequence[float] | torch.Tensor | Callable[[float], Any] | None:
        """The guidance scale of the last call; `None` with a guider. For one that changes, pass a function of λ."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop, by `pipe._interrupt = True`: the call then skips its remaining steps."""
        return self._interrupt

    _guidance_scale, _num_timesteps, _interrupt, _log_snr = None, 0, False, None

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
        config = self.vae.config
        # Each level of the encoder but the last halves the size.
        scale = 2 ** (len(config.get("encoder_block_out_channels") or config["block_out_channels"]) - 1)
        return config.in_channels, scale * height, scale * width

    @torch.inference_mode(False)  # inpainting takes gradients of what the call computes
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
        classifier_guidance_scale: float | Sequence[float] | torch.Tensor | Callable[[float], Any] | None = None,
        image: PipelineImageInput | None = None,
        strength: float | None = None,
        mask_image: PipelineImageInput | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images of the given classes, or with `image` change that image towards them. With `mask_image`, change
        only the part of it where the mask is white.

        Args:
            class_labels (`int`, `str`, `dict`, `list` or `torch.Tensor`): One label or a list of labels. A label is a
                class id in `0 … num_classes - 1`, -1 for the null class, a name from `id2label`, or a mix of classes.
                A mix is a `dict` such as `{"three": 0.7, "eight": 0.3}`: its values are the weights of the class
                embeddings, which must be at least 0 and add up to one. A tensor contains ids, `(labels,)`, or weights,
                `(labels, num_classes)`.
            guidance_scale (`float`, `list[float]`, `torch.Tensor` or `Callable`, *optional*): The paper's w, for all
                images, for each label or for each image; s = 1 + w. Defaults to 1, or to 0 for a generator, whose
                samples guidance would extrapolate. A network that guides in one pass takes 0 …
                `unet.max_guidance_scale`. A callable is called with the log-SNR of each step, λ = log(α²/σ²), and
                returns w(λ), a number or a list. An unconditional network takes only -1, its default.
            num_inference_steps (`int`, *optional*, defaults to `CFGPipeline.num_inference_steps`): T. A generator takes
                only its own. A step evaluates the network twice per image, in one batch. It evaluates the network once
                if w = 0 or w = -1 for all images, or if the network takes w as an input.
            num_images_per_label (`int`, *optional*, defaults to 1): Number of images for each label. They are adjacent
                in the output.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of all noise. With a list of
                one generator per image, an image does not depend on the rest of its batch.
            latents (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): z at λ_min. By default
                sampled from N(0, I). With `image`, the noise that is added to it.
            negative_class_labels (`int`, `str`, `dict`, `list` or `torch.Tensor`, *optional*): Classes to guide away
                from, one label for all images or one for each of `class_labels`. Defaults to the null class, or to
                `class_labels` if the pipeline has a `guide_unet`.
            guidance_interval (`tuple[float, float]`, *optional*): Guide only where σ_lo < σ/α ≤ σ_hi (Kynkäänniemi et
                al. 2024, arXiv 2404.07724; σ/α = exp(-λ/2) is their σ). A step outside the interval evaluates the
                network once.
            guidance_rescale (`float`, *optional*, defaults to 0.0): φ in [0, 1] of Lin et al. 2023, arXiv 2305.08891,
                section 3.4. Reduces saturation by moving the standard deviation of the guided prediction towards that
                of the conditional prediction. What classifier guidance adds is not rescaled.
            guider (`BaseGuidance`, *optional*): A diffusers guider to use instead of the pipeline's own, with its own
                scale, `start` and `stop`. Most guiders take s = 1 + w unless `use_original_formulation=True` is set.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`; `"np"` (images, height, width, channels) or
                `"pt"` (images, channels, height, width) with values in [0, 1]; `"latent"` for the final z.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an `ImagePipelineOutput` instead of
                a tuple.
            callback_on_step_end (`Callable`, *optional*): Function called after each step as
                `callback_on_step_end(pipe, step, timestep, tensors)`. It may return a dictionary with new `latents`,
                and end the sampling by `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Names of the tensors to pass to the callback:
                `"latents"` and `"pred"`.
            classifier_guidance_scale (`float`, `list[float]`, `torch.Tensor` or `Callable`, *optional*): The scale s of
                classifier guidance, ε̃ - s σ ∇_z log p(c | z), in any form of `guidance_scale`. Defaults to 0, or to 1
                for an unconditional network. If the classifier is exact, `guidance_scale=w` draws the same images as
                `guidance_scale=0, classifier_guidance_scale=w` and as `guidance_scale=-1,
                classifier_guidance_scale=1 + w`. The gradient is taken once per step, in float32, for the images and
                the steps with s ≠ 0 and in `guidance_interval`. A mix of classes has the weighted mean of their
                log p(c | z), and that of `negative_class_labels` is subtracted.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*): Image to start from, of the
                model's size: one for all images, one for each label or one for each image. Arrays `(images, height,
                width, channels)` and tensors `(images, channels, height, width)` have values in [0, 1]. Sampling starts
                from z = αx + σε at an intermediate step (SDEdit, Meng et al. 2021, arXiv 2108.01073).
            strength (`float`, *optional*): Fraction of the steps that are taken, in (0, 1]. Defaults to 0.8, or to 1
                with `mask_image`. At 1 the result does not depend on `image` where the mask is white.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`, *optional*): Mask of the size of
                `image`, in the same forms, with one channel. White (from 0.5) is generated, black is kept: see
                `inpainting_guidance`. In the latents of a VAE, a position is kept if all of its pixels are black.

        Returns:
            `ImagePipelineOutput` or `tuple`: `images`, in the order of the labels.

        Raises:
            ValueError: If an argument is invalid. Arguments are checked before the network is evaluated.
            FloatingPointError: If the images or the gradient of the classifier contain non-finite values.

        Examples:

        ```py
        >>> pipe = CFGPipeline.from_pretrained("path/to/model")
        >>> images = pipe(class_labels=["three", 7], guidance_scale=2.0).images
        >>> images = pipe({"three": 0.7, "eight": 0.3}, guidance_scale=2.0, guidance_interval=(0.3, 5.0)).images
        >>> changed = pipe(class_labels="five", image=images[0], strength=0.6).images
        ```
        """
        # 1. Check the components and arguments, and expand the labels to one per image
        self._check_components()
        self._check_classifier_names()
        guider = guider if guider is not None else self.guider
        if num_inference_steps is None:
            num_inference_steps = self.num_inference_steps
        if guidance_scale is None and guider is None:
            guidance_scale = self._default_guidance_scale
        if classifier_guidance_scale is None:
            classifier_guidance_scale = 1.0 if self._is_unconditional else 0.0
        num_inference_steps = self._checked_steps(num_inference_steps)
        num_images_per_label = self._positive_integer("num_images_per_label", num_images_per_label)
        self._check_arguments(
            guidance_scale=guidance_scale,
            classifier_guidance_scale=classifier_guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            strength=strength,
        )
        strength = self._checked_strength(image, strength, mask_image)
        rescale = guidance_rescale or None
        self._check_type("guider", guider)
        self._check_guider(
            guider, guidance_scale=guidance_scale, guidance_interval=guidance_interval, guidance_rescale=rescale
        )
        self._check_networks(guider=guider, negative_class_labels=negative_class_labels, guidance_rescale=rescale)
        device = self._execution_device
        class_labels = self._network_labels("class_labels", class_labels)
        class_labels, guide_labels = self._guide_labels(class_labels, negative_class_labels)
        class_labels = class_labels.repeat_interleave(num_images_per_label, 0)
        guide_labels = guide_labels.repeat_interleave(num_images_per_label, 0)
        classes = self._weights(class_labels)[:, :-1]  # without ∅, since log p(∅ | z) = 0
        if negative_class_labels is not None:
            classes = classes - self._weights(guide_labels)[:, :-1]
        num_images = len(class_labels)

        # 2. Set λ_min … λ_max and w at each λ, and sample z ~ N(0, I). A step changes its scheduler and its guider, so
        #    each call has its own.
        scheduler, guider = self._copy(self.scheduler), self._copy(guider)
        self._set_timesteps(scheduler, num_inference_steps)
        log_snr = self._log_snr_of(scheduler)
        self._check_noise_levels(scheduler, num_inference_steps, log_snr)
        first = self._first_step(scheduler, num_inference_steps, strength)
        log_snr = log_snr[first:]
        per_image = log_snr, num_images, num_images_per_label
        pixels, mask = self._image_and_mask(image, mask_image, num_images, num_images_per_label)
        interval = None if self._is_unconditional else guidance_interval  # w = 0 outside of it would be conditional
        scales = self._guidance_scales("guidance_scale", guidance_scale, interval, *per_image)
        self._check_guidance_scales(scales)
        classifier_scales = self._guidance_scales(
            "classifier_guidance_scale", classifier_guidance_scale, guidance_interval, *per_image
        )
        is_classified = (classifier_scales != 0) & classes.any(1)  # (steps, images)
        num_classified, classified = is_classified.sum(1).tolist(), is_classified.nonzero()  # (steps,), (gradients, 2)
        self._check_classifier_guidance(classifier_scales)
        needs_cond, needs_uncond = self._needed_passes(scales)
        self._warn_if_never_dropped(guide_labels, any(needs_uncond))
        self._warn_about_dropout()
        # Everything that the steps need is copied to the device here, so that no step waits for it.
        class_labels, guide_labels, classes = (labels.to(device) for labels in (class_labels, guide_labels, classes))
        scales = scales.view(*scales.shape, 1, 1, 1).to(device)  # (steps, images, 1, 1, 1)
        gradient_rows = classified[:, 1].to(device).split(num_classified)
        gradient_scales = classifier_scales[is_classified].to(device).split(num_classified)
        noise = self._prepare_latents(latents, num_images, generator, device)
        sample = noise * scheduler.init_noise_sigma
        inpainting = None
        if pixels is not None and (first or mask is not None):
            x = self.encode(2 * pixels.to(device) - 1, generator).float()
            inpainting = None if mask is None else (x, mask.to(device))
            if first:
                sample = scheduler.add_noise(x, noise, scheduler.timesteps[first : first + 1])
        step_kwargs = self._step_kwargs(scheduler, generator)
        dtype = self.unet.dtype  # read once: diffusers searches all modules for it
        timesteps, classifier = scheduler.timesteps[first:].to(device), self.classifier
        self._log_snr, self._num_timesteps, self._guidance_scale = log_snr, len(timesteps), guidance_scale
        self._interrupt, gradients_are_finite = False, []

        def predict(z: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
            """Return the guided prediction of step i at z, float32."""
            z = z.to(dtype)
            latent = self._draw_latent(num_images, generator, device)
            if guider is not None:
                return self.guider_prediction(guider, z, t, i, len(timesteps), class_labels, guide_labels, latent)
            w, needs = scales[i], (needs_cond[i], needs_uncond[i])
            preds = self.predictions(z, t, class_labels, guide_labels, w, *needs, latent)
            return self.guide(*preds, w, guidance_rescale)

        # 3. Algorithm 2
        for i, t in enumerate(self.progress_bar(timesteps)):  # pyright: ignore[reportCallIssue, reportArgumentType]
            if self._interrupt:
                break
            if self.classifier is not classifier:
                raise ValueError(
                    f"The classifier was replaced during the call, before step {i + 1} of {len(timesteps)}. Assign "
                    "pipe.classifier between calls. To guide some of the steps only, pass guidance_interval, or a "
                    "function of the log-SNR as classifier_guidance_scale."
                )
            z = scheduler.scale_model_input(sample, t)
            if inpainting is None:
                pred = predict(z, t, i)
            else:
                pred = self.inpainting_guidance(partial(predict, t=t, i=i), z, *inpainting, log_snr[i].item())
            if num_classified[i]:
                rows, s = gradient_rows[i], gradient_scales[i]
                guidance = self.classifier_guidance(z[rows], t, classes[rows], s, log_snr[i].item())
                gradients_are_finite.append(guidance.isfinite().flatten(1).all(1))
                pred = pred.index_add(0, rows, guidance)
            # DDIM and DDPM read the timestep, which is free on the CPU.
            sample = scheduler.step(pred, scheduler.timesteps[first + i], sample, **step_kwargs).prev_sample
            if inpainting is not None:
                sample = self._keep(sample, *inpainting, noise, scheduler, first + i)

            if callback_on_step_end is not None:
                self._check_gradients(gradients_are_finite, classified, log_snr)  # before it sees the latents
                tensors = {"latents": sample, "pred": pred}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                sample = self._callback_latents(callback_on_step_end(self, i, t, chosen), chosen, sample)

        # 4. Decode x̃
        self._check_gradients(gradients_are_finite, classified, log_snr)
        images = sample if output_type == "latent" else self.decode(sample)
        if not torch.isfinite(images).all():
            w = scales.max().item() if guider is None else getattr(guider, "guidance_scale", math.nan)
            s = classifier_scales.abs().max().item()
            guidance = f", classifier_guidance_scale up to {s:g}" if s else ""
            raise FloatingPointError(
                f"The images contain non-finite values: the predictions overflowed (dtype of the UNet {dtype}, "
                f"guidance_scale up to {w:g}{guidance}). Use torch.bfloat16 or torch.float32, or smaller scales."
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
        latent: torch.Tensor | None = None,
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
            latent (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): Latent vectors of a generator, the same
                for both passes.

        Returns:
            Two `torch.Tensor` of the shape of z, in float32; `None` for a pass that was skipped.
        """
        guide = self.unet if self.guide_unet is None else self.guide_unet
        inputs = {} if latent is None else {"latent": latent}
        if self._is_unconditional:
            return None, self.unet(z, t).sample.float()
        if self.unet.max_guidance_scale is not None:
            return self.unet(z, t, class_labels=class_labels, guidance_scale=w.flatten()).sample.float(), None
        if not needs_uncond:
            return self.unet(z, t, class_labels=class_labels, **inputs).sample.float(), None
        if not needs_cond:
            return None, guide(z, t, class_labels=guide_labels, **inputs).sample.float()
        if guide is not self.unet:
            pred_cond = self.unet(z, t, class_labels=class_labels, **inputs).sample.float()
            return pred_cond, guide(z, t, class_labels=guide_labels, **inputs).sample.float()
        t = torch.cat([t, t]) if t.ndim else t
        labels = torch.cat([class_labels, guide_labels])
        inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        pred = self.unet(torch.cat([z, z]), t, class_labels=labels, **inputs).sample
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

    def classifier_guidance(
        self, z: torch.Tensor, t: torch.Tensor, classes: torch.Tensor, scale: torch.Tensor, log_snr: float
    ) -> torch.Tensor:
        r"""
        Return what classifier guidance adds to a prediction: -s σ ∇_z log p(c | z) to ε (Dhariwal & Nichol 2021,
        Algorithm 2), 1/α of it to v, and -σ/α of it to x, which are affine in ε at a given z.

        Args:
            z (`torch.Tensor` of shape `(batch, channels, height, width)`): Noisy samples, scaled by the scheduler.
            t (`torch.Tensor` of shape `()`): Timestep.
            classes (`torch.Tensor` of shape `(batch, num_classes)`): Weight of each log p(c | z) in their sum.
            scale (`torch.Tensor` of shape `(batch,)`): s.
            log_snr (`float`): λ at the timestep.

        Returns:
            `torch.Tensor` of the shape of z, in float32.
        """
        alpha, sigma = self._alpha_sigma(log_snr)
        # With y = αz the gradient is ∇_z = α ∇_y, so that nothing is divided by α, which is 4.5e-5 at λ = -20.
        factor = {"epsilon": -sigma * alpha, "v_prediction": -sigma, "sample": sigma**2}
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
            y, t, classes = (alpha * z.detach().float()).requires_grad_(), t.clone(), classes.clone()
            log_prob = (classes * self.classifier(y, t).log_softmax(1)).sum()
            (gradient,) = torch.autograd.grad(log_prob, y)
        return scale.view(-1, 1, 1, 1) * factor[self.scheduler.config["prediction_type"]] * gradient

    def inpainting_guidance(
        self,
        predict: Callable[[torch.Tensor], torch.Tensor],
        z: torch.Tensor,
        x: torch.Tensor,
        mask: torch.Tensor,
        log_snr: float,
    ) -> torch.Tensor:
        r"""
        Return a prediction that is guided towards samples which equal x where the mask is 0.

        ΠGDM (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems") approximates p(x_kept | z)
        by N(x̂_kept, r² I), where x̂ is the prediction of x. Its gradient changes x̂ by

            σ²/α ∇_z log p(x_kept | z) = σ²/(α r²) (∂x̂/∂z)ᵀ (x - x̂)_kept,   r² = σ_d² σ² / (α² σ_d² + σ²).

        r² is the variance of x given z if x ~ N(0, σ_d² I). σ_d is 0.5 for images (Karras et al. 2022) and 1 for
        latents. Where σ/α > 10, z tells nothing about x, and the prediction is not changed.

        Args:
            predict (`Callable`): Function that returns the prediction at z.
            z, x (`torch.Tensor` of shape `(batch, *sample_shape)`): Noisy and clean samples.
            mask (`torch.Tensor` of shape `(batch, 1, height, width)`): 1 where the sample is generated.
            log_snr (`float`): λ at the timestep.

        Returns:
            `torch.Tensor` of the shape of z, in float32.
        """
        if log_snr < -2 * math.log(10):
            return predict(z)
        alpha, sigma = self._alpha_sigma(log_snr)
        sigma_data = 0.5 if self.vae is None else 1.0
        kind = self.scheduler.config["prediction_type"]
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            pred = predict(z)
            x_pred = {"epsilon": (z - sigma * pred) / alpha, "v_prediction": alpha * z - sigma * pred, "sample": pred}[
                kind
            ]
            error = ((1 - mask) * (x - x_pred)).detach()
            (gradient,) = torch.autograd.grad((error * x_pred).sum(), z)
        change = (alpha**2 + (sigma / sigma_data) ** 2) / alpha * gradient  # of x̂
        return pred.detach() + {"epsilon": -alpha / sigma, "v_prediction": -1 / sigma, "sample": 1.0}[kind] * change

    @staticmethod
    def _keep(
        sample: torch.Tensor,
        x: torch.Tensor,
        mask: torch.Tensor,
        noise: torch.Tensor,
        scheduler: SchedulerMixin,
        index: int,
    ) -> torch.Tensor:
        """
        Replace the kept part of z after a step by αx + σε at the noise level that the step has reached.

        Args:
            sample, x (`torch.Tensor` of shape `(images, *sample_shape)`): z and the clean sample.
            mask (`torch.Tensor` of shape `(images, 1, height, width)`): 1 where the sample is generated.
            noise (`torch.Tensor` of shape `(images, *sample_shape)`): ε, the same for all steps.
            scheduler (`SchedulerMixin`): The scheduler that took the step.
            index (`int`): Index of the timestep of the step.
        """
        is_last = index + 1 == len(scheduler.timesteps)
        if not is_last and (index + 1) % scheduler.order:  # inside a step of a solver that takes several evaluations
            return sample
        kept = x if is_last else scheduler.add_noise(x, noise, scheduler.timesteps[index + 1 : index + 2])
        return torch.where(mask > 0, sample, kept)

    @staticmethod
    def _alpha_sigma(log_snr: float) -> tuple[float, float]:
        """Return α and σ at λ, with α² + σ² = 1."""
        return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))

    def _check_gradients(self, are_finite: list[torch.Tensor], classified: torch.Tensor, log_snr: torch.Tensor) -> None:
        """
        Raise FloatingPointError if a gradient of the classifier is not finite. Reads the device once for all steps.

        Args:
            are_finite (`list[torch.Tensor]`): For each step with gradients so far, bool `(guided images,)`.
            classified (`torch.Tensor` of shape `(gradients, 2)`): Step and image of each gradient of the call.
            log_snr (`torch.Tensor` of shape `(steps,)`): λ at each step.
        """
        if not are_finite:
            return
        finite = torch.cat(are_finite).cpu()
        if not finite.all():
            wrong = classified[: len(finite)][~finite]
            step = wrong[0, 0]  # later ones follow from it
            images = wrong[wrong[:, 0] == step, 1].tolist()
            raise FloatingPointError(
                f"The gradient of the classifier is not finite at step {step + 1} of {self.num_timesteps} (λ = "
                f"{log_snr[step]:.2f}), for the images {self._shown(images)}. Use a smaller classifier_guidance_scale, "
                "or a classifier whose training did not diverge."
            )

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
        num_timesteps: int,
        class_labels: torch.Tensor,
        guide_labels: torch.Tensor,
        latent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Predict with a diffusers guider, which chooses the number of passes.

        Args:
            guider (`BaseGuidance`): The guider. `step` is set as its state.
            z, t, class_labels, guide_labels, latent: As in `predictions`.
            step (`int`): Index of the sampling step, from 0.
            num_timesteps (`int`): Number of sampling steps.

        Returns:
            `torch.Tensor` of the shape of z, in float32.
        """
        guider.set_state(step, num_timesteps, timestep=t)  # pyright: ignore[reportArgumentType] says LongTensor
        inputs = {} if latent is None else {"latent": latent}
        labels = {"class_labels": (class_labels, guide_labels)}
        batches = guider.prepare_inputs(labels)  # pyright: ignore[reportArgumentType] says BlockState
        for batch in batches:
            guider.prepare_models(self.unet)
            try:
                batch.noise_pred = self.unet(z, t, class_labels=batch.class_labels, **inputs).sample.float()
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
        encoded = self.vae.encode(images.to(self.vae.dtype))
        return self.draw_latents(encoded.latent_dist.parameters if self._has_posterior else encoded.latent, generator)

    def draw_latents(
        self, moments: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Sample latents from the VAE's posterior, as in `encode`.

        Args:
            moments (`torch.Tensor` of shape `(batch, 2 * channels, height, width)`): Mean and log-variance; the
                latents themselves, `(batch, channels, height, width)`, if the VAE is an `AutoencoderDC`, which has no
                posterior.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise. A list has one
                generator per image.

        Returns:
            `torch.Tensor` of shape `(batch, *sample_shape)`.
        """
        latents = moments
        if self._has_posterior:
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
    def _has_posterior(self) -> bool:
        """Whether the VAE encodes an image as a distribution of latents."""
        return isinstance(getattr(self.vae, "_orig_mod", self.vae), AutoencoderKL)

    @property
    def _vae_shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @classmethod
    def _require(cls, name: str, value: Any, is_valid: bool, required: str) -> None:
        """Raise ValueError if a value is not valid."""
        if not is_valid:
            raise ValueError(f"{name} must be {required}, but is {cls._shown(value)}.")

    @staticmethod
    def _shown(value: Any) -> str:
        """Return a value formatted for a message: in one line, of at most 100 characters."""
        if isinstance(value, (torch.nn.Module, SchedulerMixin, BaseGuidance)):
            return f"a {type(value).__name__}"
        shown = repr(value)
        if "\n" in shown:
            shape = getattr(value, "shape", None)
            shown = " ".join(shown.split()) if shape is None else f"a {type(value).__name__} of shape {tuple(shape)}"
        return shown if len(shown) <= 100 else f"{shown[:100]} …"

    @classmethod
    def _numbers(cls, name: str, value: Any, required: str = "a number") -> torch.Tensor:
        """Convert a number, or a list or an array of numbers, to float64 on the CPU. Raise ValueError for all else."""
        numbers = None
        values = value if isinstance(value, (list, tuple)) else [value]
        if not any(isinstance(number, (bool, str, bytes, bytearray)) for number in values):
            with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
                given = torch.as_tensor(value)
                if cls._has_values(given) and not given.is_complex() and given.dtype != torch.bool:
                    # Converted again: without a dtype, Python's floats become float32.
                    numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        cls._require(name, value, numbers is not None, required)
        assert numbers is not None
        return numbers

    @staticmethod
    def _has_values(tensor: torch.Tensor) -> bool:
        """Return whether the values of a tensor can be read: it is neither sparse nor on the meta device."""
        return tensor.layout == torch.strided and not tensor.is_meta

    @classmethod
    def _is_number(cls, value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
        """Return whether a value is one number in [low, high]."""
        try:
            number = cls._numbers("number", value)
        except ValueError:
            return False
        return number.ndim == 0 and low <= number.item() <= high

    @classmethod
    def _positive_integer(cls, name: str, value: Any) -> int:
        """Convert a positive integer of any type to an `int`. Raise ValueError for all else."""
        integer = 0
        if cls._is_number(value):
            with contextlib.suppress(TypeError):
                integer = operator.index(value)
        cls._require(name, value, integer > 0, "a positive integer")
        return integer

    def _check_type(self, name: str, component: Any) -> None:
        """Check the type of a component. Accept any value of other names."""
        has_process = hasattr(component, "noise_process") and not isinstance(component, type)
        is_network = has_process and hasattr(component, "latent_dim")
        is_none = component is None
        types = {
            "unet": (is_network, "a UNet2DCFGModel"),
            "guide_unet": (is_network or is_none, "a UNet2DCFGModel or None"),
            "scheduler": (isinstance(component, SchedulerMixin), "a scheduler object, not a class"),
            "vae": (
                isinstance(getattr(component, "_orig_mod", component), (AutoencoderKL, AutoencoderDC)) or is_none,
                "an AutoencoderKL, an AutoencoderDC or None",
            ),
            "guider": (isinstance(component, BaseGuidance) or is_none, "a diffusers guider object or None"),
            "classifier": ((has_process and not is_network) or is_none, "a NoisyClassifier2DModel or None"),
        }
        if name in types:
            self._require(name, component, *types[name])

    def _check_components(self) -> None:
        """Check that the components fit each other, and that the scheduler has the network's noise process."""
        unet, guide, vae, classifier = self.unet, self.guide_unet, self.vae, self.classifier
        channels, size = unet.config.in_channels, unet.config.sample_size
        for name, network in (("unet", unet), ("guide_unet", guide or unet)):
            record = network.noise_process
            is_record = record is None or isinstance(record, Mapping)
            self._require(f"{name}.noise_process", record, is_record, "a dictionary or None")
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        # Each level but the last halves the size.
        multiple = 2 ** (max(len(network.config.block_out_channels) for network in (unet, guide or unet)) - 1)
        is_size = len(sides) == 2 and all(type(side) is int and side > 0 and side % multiple == 0 for side in sides)
        num_classes, out_channels = self.num_classes, unet.config.out_channels
        required = f"a positive multiple of {multiple}, or two of them as height and width"
        self._require("unet.config.sample_size", size, is_size, required)
        self._require("unet.config.out_channels", out_channels, out_channels == channels, f"in_channels, {channels}")
        if vae is not None:
            found = vae.config.latent_channels
            self._require("vae.config.latent_channels", found, found == channels, f"the UNet's {channels}")
        if classifier is not None:
            theirs, ours = classifier.config.sample_size, [*sides]
            theirs = [*theirs] if isinstance(theirs, (list, tuple)) else [theirs, theirs]
            self._require("classifier.config.sample_size", theirs, theirs == ours, f"the UNet's {ours}")
            for name, ours, theirs in (
                ("num_classes", num_classes, classifier.num_classes),
                ("config.in_channels", channels, classifier.config.in_channels),
            ):
                self._require(f"classifier.{name}", theirs, theirs == ours, f"the UNet's {ours}")
        if guide is not None:
            self._require("guide_unet", guide, not self._is_unconditional, "None, because the UNet is unconditional")
            for name, ours, theirs in (
                ("num_classes", num_classes, guide.num_classes),
                ("config.in_channels", channels, guide.config.in_channels),
                ("config.out_channels", channels, guide.config.out_channels),
                ("latent_dim", unet.latent_dim, guide.latent_dim),
            ):
                self._require(f"guide_unet.{name}", theirs, theirs == ours, f"the UNet's {ours}")
            ours, theirs = self._trained_process, self._with_schedule(guide.noise_process)
            self._require("guide_unet.noise_process", theirs, theirs in (None, ours), f"the UNet's {ours}")
            largest, required = guide.max_guidance_scale, "None: a network that guides in one pass cannot guide another"
            self._require("guide_unet.max_guidance_scale", largest, largest is None, required)
        self._check_scheduler()
        self._check_classified_process()

    def _check_classified_process(self) -> None:
        """Check that the classifier has the noise process of the network, except what the network predicts."""
        if self.classifier is None:
            return
        theirs, ours = self.classifier.noise_process, self._trained_process or {}
        self._require("classifier.noise_process", theirs, isinstance(theirs, Mapping), "recorded in its config")
        differs = [
            f"{key} {self._shown(theirs.get(key))} instead of {self._shown(value)}"
            for key, value in ours.items()
            if key != "prediction_type" and theirs.get(key) != value
        ]
        if differs:
            raise ValueError(
                f"classifier was trained with another noise process than the UNet ({'; '.join(differs)}). Train one "
                "for this model with training/train_classifier.py."
            )

    def _check_classifier_names(self) -> None:
        """Check that the classes of the classifier have the names of the pipeline's, if both have names."""
        names = self.classifier.config.id2label if self.classifier is not None else None
        theirs, ours = {int(class_id): name for class_id, name in (names or {}).items()}, self.id2label
        if theirs and ours and theirs != ours:
            raise ValueError(
                "classifier was trained for classes with other names or in another order, such as "
                f"{self._shown(sorted(theirs.items() ^ ours.items())[:2])}. Use a classifier for the classes of this "
                "model."
            )

    def _checked_settings(
        self, id2label: Any, conditioning_dropout_prob: Any, num_inference_steps: Any
    ) -> dict[str, Any]:
        """Return the settings of the pipeline as they are saved. Raise ValueError if one is invalid."""
        p, num_classes = conditioning_dropout_prob, self.num_classes
        is_dict = id2label is None or isinstance(id2label, Mapping)
        is_prob = p is None or self._is_number(p, 0, 1)
        self._require("id2label", id2label, is_dict, "a dictionary such as {0: 'cat', 1: 'dog'}")
        self._require("conditioning_dropout_prob", p, is_prob, "in [0, 1] or None")
        if id2label is not None:
            names, ids = list(id2label.values()), [str(class_id) for class_id in id2label]
            unknown = sorted({*ids} - {str(class_id) for class_id in range(num_classes)})
            if unknown:
                raise ValueError(f"id2label has the class ids {unknown}, but the UNet has 0 … {num_classes - 1}.")
            wrong = [name for name in names if not isinstance(name, str)]
            self._require("A name in id2label", wrong and wrong[0], not wrong, "a string")
            for kind, values in (("names", names), ("ids", ids)):
                repeated = sorted(value for value, count in Counter(values).items() if count > 1)
                if repeated:
                    raise ValueError(f"id2label uses the {kind} {repeated} for more than one class. Use unique {kind}.")
            id2label = dict(zip(ids, names, strict=True))
        if num_inference_steps is not None:
            num_inference_steps = self._checked_steps(num_inference_steps)
        return {
            "id2label": id2label,
            "conditioning_dropout_prob": None if p is None else float(p),
            "num_inference_steps": num_inference_steps,
        }

    def _checked_steps(self, num_inference_steps: Any) -> int:
        """Convert a number of sampling steps to an `int`. Raise ValueError if it is invalid for the network."""
        steps, only = self._positive_integer("num_inference_steps", num_inference_steps), self._generator_steps
        if only not in (None, steps):
            raise ValueError(
                f"num_inference_steps is {steps}, but this model was trained to generate in {only} steps and in no "
                "other number. Leave it out."
            )
        return steps

    def _check_arguments(self, **arguments: Any) -> None:
        """Check the types and ranges of the call's arguments, except labels and what depends on their number."""
        known = self._callback_tensor_inputs
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "guidance_scale": (
                lambda w: not isinstance(w, (type, BaseGuidance)),
                "a number, a list of numbers or a function of the log-SNR; a guider is passed as guider",
            ),
            "classifier_guidance_scale": (
                lambda s: not isinstance(s, (type, torch.nn.Module)),
                "a number, a list of numbers or a function of the log-SNR; a classifier is a component of the pipeline",
            ),
            "guidance_interval": (self._is_interval, "(σ_lo, σ_hi) with 0 ≤ σ_lo < σ_hi"),
            "guidance_rescale": (lambda rescale: self._is_number(rescale, 0, 1), "in [0, 1]"),
            "generator": (
                lambda g: g is None or all(isinstance(x, torch.Generator) for x in (g if isinstance(g, list) else [g])),
                "a torch.Generator, such as torch.Generator().manual_seed(0), or a list with one for each image",
            ),
            "output_type": (
                lambda kind: isinstance(kind, str) and kind in ("pil", "np", "pt", "latent"),
                "'pil', 'np', 'pt' or 'latent'",
            ),
            "strength": (lambda value: value is None or (self._is_number(value, 0, 1) and value > 0), "in (0, 1]"),
            "return_dict": (lambda value: isinstance(value, bool), "True or False"),
            "callback_on_step_end": (
                lambda function: function is None or (callable(function) and not isinstance(function, type)),
                "a function",
            ),
            "callback_on_step_end_tensor_inputs": (
                lambda names: isinstance(names, (list, tuple)) and all(name in known for name in names),
                f"a list of names in {known}",
            ),
        }
        for name, value in arguments.items():
            is_valid, required = rules[name]
            self._require(name, value, is_valid(value), required)

    @classmethod
    def _is_interval(cls, value: Any) -> bool:
        """Return whether a value is None or an increasing pair of numbers of at least 0."""
        if value is None:
            return True
        try:
            low, high = cls._numbers("guidance_interval", value).tolist()
            return 0 <= low < high
        except (TypeError, ValueError):
            return False

    def _callback_latents(
        self, returned: Any, passed: Mapping[str, torch.Tensor], sample: torch.Tensor
    ) -> torch.Tensor:
        """Return the latents that a callback returned, or `sample` if it returned none or what it was passed."""
        if returned is None:
            return sample
        is_valid = isinstance(returned, Mapping) and all(
            name == "latents" or (name in passed and value is passed[name]) for name, value in returned.items()
        )
        self._require("What callback_on_step_end returns", returned, is_valid, "None or a dictionary of new 'latents'")
        latents = returned.get("latents", sample)
        if latents is not sample:
            self._check_latents("The latents of callback_on_step_end", latents, tuple(sample.shape))
        return latents.to(sample)

    def _check_latents(self, name: str, latents: Any, shape: tuple[int, ...]) -> None:
        """Check latents that a user passed: finite floating-point numbers of the right shape."""
        is_tensor = isinstance(latents, torch.Tensor) and latents.is_floating_point() and self._has_values(latents)
        self._require(name, latents, is_tensor, "a dense, floating-point torch.Tensor")
        if latents.shape != shape:
            raise ValueError(f"{name} have shape {tuple(latents.shape)}, but must have {shape}.")
        if not latents.isfinite().all():
            raise ValueError(f"{name} must be finite, but contain NaN or infinite values.")

    @staticmethod
    def _copy(component: Any) -> Any:
        """Return a copy that shares the tensors of a scheduler or a guider, but not the attributes that a call sets."""
        component = copy.copy(component)
        for name, value in vars(component).items() if component is not None else ():
            if isinstance(value, list):
                setattr(component, name, list(value))
        return component

    def _check_guider(self, guider: BaseGuidance | None, **own: Any) -> None:
        """Check that the guider works with these models and is not combined with the pipeline's own rule, `own`."""
        scale = getattr(guider, "guidance_scale", 0.0)
        self._require("guider.guidance_scale", scale, self._is_number(scale, -1e38, 1e38), "a finite number")
        given = [name for name, value in {**own, "guide_unet": self.guide_unet}.items() if value is not None]
        if guider is not None and given:
            raise ValueError(
                f"{', '.join(given)} cannot be combined with the guider {type(guider).__name__}, which replaces the "
                "pipeline's rule. Pass a scale, start and stop to the guider, or set pipe.guider = None."
            )
        if guider is not None and self._is_unconditional:
            raise ValueError(
                f"{type(guider).__name__} compares predictions for several classes, but the network of this model is "
                "unconditional. Use classifier_guidance_scale."
            )
        if type(guider).__name__ in self.refused_guiders:
            reason = self.refused_guiders[type(guider).__name__]
            raise ValueError(f"{type(guider).__name__} cannot guide this model: in this version of diffusers {reason}.")

    def _check_networks(self, **needs_two_passes: Any) -> None:
        """Check that a one-pass network needs no second pass, that dtypes are equal and that weights are present."""
        if self._is_unconditional and needs_two_passes.get("guidance_rescale") is not None:
            raise ValueError(
                "guidance_rescale has no effect on this model: its network is unconditional, and there is no "
                "conditional prediction to compare with. Leave it out."
            )
        given = {**needs_two_passes, "guide_unet": self.guide_unet}
        given = [name for name, value in given.items() if value is not None]
        if self.unet.max_guidance_scale is not None and given:
            raise ValueError(
                f"{', '.join(given)} cannot be used with this model: it was trained to guide in one pass, but a "
                "second pass would be needed. Use a model that guides in two, such as the teacher of a distilled one."
            )
        dtype, guide_dtype = self.unet.dtype, (self.guide_unet or self.unet).dtype
        self._require("guide_unet.dtype", guide_dtype, guide_dtype == dtype, f"the UNet's {dtype}")
        for name in self.model_cpu_offload_seq.split("->"):
            network: torch.nn.Module | None = getattr(self, name)
            if network is None or not any(parameter.is_meta for parameter in network.parameters()):
                continue
            # accelerate keeps offloaded weights on the meta device, and has hooks that load them.
            if not any(hasattr(module, "_hf_hook") for module in network.modules()):
                raise ValueError(f"The {name} is on the meta device, where networks have no weights. Load it again.")

    def _check_scheduler(self) -> None:
        """Check the scheduler. Most schedulers accept the config of any other one and then silently return noise."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        hint = f"Create it with {name}.from_config(pipe.scheduler.config), using the model's original scheduler."
        is_generator = self.unet.latent_dim is not None
        supported = (self.generator_scheduler,) if is_generator else self.schedulers
        if not any(base.__name__ in supported for base in type(self.scheduler).__mro__):
            kind = " by a generator, which samples the posterior of its own steps" if is_generator else ""
            raise ValueError(f"{name} is not supported{kind}. Supported schedulers: {', '.join(supported)}.")
        if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"{name} is configured for flow matching (use_flow_sigmas={config.get('use_flow_sigmas')}, "
                f"prediction_type={config.get('prediction_type')!r}), but this model was trained with a "
                f"variance-preserving process. {hint}"
            )

        low, high = (config.get(f"sigma_{end}") for end in ("min", "max"))
        known = [sigma for sigma in (low, high) if sigma is not None]
        is_range = all(self._is_number(sigma) and 0 < sigma < math.inf for sigma in known)
        is_range = is_range and (len(known) < 2 or low < high)
        self._require(f"(sigma_min, sigma_max) of {name}", (low, high), is_range, "positive, and sigma_max the larger")

        process = self._trained_process
        if process is None or ("trained_betas" in process) != is_generator:
            source = "has no trained_betas" if is_generator else "was not made from a LogSNRScheduler"
            record, found = self.unet.noise_process, "does not record one"
            if record is not None:
                found = f"has latent_dim={self.unet.latent_dim} but records {self._shown(record)}"
            raise ValueError(
                f"The noise process of this model is not known: its UNet {found}, and its {name} {source}. {hint}"
            )
        expected = self._reference(process)
        stated, alphas_cumprod = self._stated_process(self.scheduler), self.scheduler.alphas_cumprod.double().cpu()
        is_same_length = alphas_cumprod.shape == expected.shape
        difference = (alphas_cumprod - expected).abs().max().item() if is_same_length else 1
        stated = {"prediction_type": config.get("prediction_type"), **(stated or {})}
        if is_generator:
            stated |= {key: config.get(key) for key in self.generator_settings}
            process = {**process, **self.generator_settings}
        differs = [
            f"{key} {own!r} instead of {process[key]!r}"
            for key, own in stated.items()
            if key in process and own != process[key]
        ]
        if not difference <= 1e-4:  # it may be NaN
            differs.append(f"alphas_cumprod differs by up to {difference:.2g}")
        if differs:
            raise ValueError(
                f"{name} does not match the noise process this model was trained with ({'; '.join(differs)}). {hint}"
            )

    @property
    def _trained_process(self) -> dict[str, Any] | None:
        """The noise process that the UNet records, or else that of the scheduler the pipeline was created with."""
        return self._with_schedule(self.unet.noise_process) or self._first_process

    @staticmethod
    def _with_schedule(process: dict[str, Any] | None) -> dict[str, Any] | None:
        """Add the schedule of λ to the process of a network from a version that knew only this one."""
        return {"log_snr_schedule": "arctan", **process} if process and "trained_betas" not in process else process

    @staticmethod
    def _stated_process(scheduler: SchedulerMixin) -> dict[str, Any] | None:
        """
        Return the noise process in the config of a scheduler that was made from a `LogSNRScheduler`, or from the β of a
        generator; `None` for others.
        """
        config = scheduler.config
        # `LogSNRScheduler.solver` makes the names private
        process = {name: config.get(name, config.get(f"_{name}")) for name in ("log_snr_min", "log_snr_max")}
        if None not in process.values():
            process["log_snr_schedule"] = config.get("log_snr_schedule", config.get("_log_snr_schedule", "arctan"))
        elif config.get("trained_betas") is not None:
            betas = config["trained_betas"]
            process = {"trained_betas": list(betas) if hasattr(betas, "__iter__") else betas}
        else:
            return None
        return {**{name: config.get(name) for name in ("prediction_type", "num_train_timesteps")}, **process}

    @classmethod
    def _reference(cls, process: dict[str, Any]) -> torch.Tensor:
        """Return α² at each training timestep of a noise process."""
        if "trained_betas" in process:
            betas, count = process["trained_betas"], process.get("num_train_timesteps")
            is_valid = type(count) is int and isinstance(betas, list) and 0 < len(betas) == count <= 1000
            is_valid = is_valid and all(isinstance(beta, float) and 0 < beta < 1 for beta in betas)
            is_valid = is_valid and process.get("prediction_type") == "sample"
            required = "the prediction_type 'sample', and a list of num_train_timesteps trained_betas in (0, 1)"
            cls._require("The noise process", process, is_valid, required)
            return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
        names = ("prediction_type", "num_train_timesteps", "log_snr_min", "log_snr_max", "log_snr_schedule")
        values: list[Any] = [process.get(name) for name in names]
        prediction_type, steps, low, high, schedule = values
        is_valid = cls._is_number(low, -60, 60) and cls._is_number(high, -60, 60) and low < high
        is_valid = is_valid and type(steps) is int and 2 <= steps <= 1_000_000 and isinstance(prediction_type, str)
        is_valid = is_valid and schedule in ("arctan", "linear")
        required = (
            "a prediction_type, num_train_timesteps, log_snr_min < log_snr_max in ±60, and the log_snr_schedule arctan "
            "or linear"
        )
        cls._require("The noise process", process, is_valid, required)
        return cls._log_snr_at(process, torch.arange(steps)).sigmoid()

    @classmethod
    def _log_snr_at(cls, process: dict[str, Any], timesteps: torch.Tensor) -> torch.Tensor:
        """
        Return λ = log(α²/σ²) of a noise process at timesteps, float64 on the CPU.

        These are the noise levels of the networks. A solver may interpolate between timesteps, where its own σ differs.
        """
        if "trained_betas" in process:
            log_snr = cls._reference(process).logit()
            return log_snr[timesteps.long().cpu().clamp(0, len(log_snr) - 1)]  # `_check_noise_levels` names others
        # As in `LogSNRScheduler`: λ = -2 log tan(au + b), or linear in u
        u = (timesteps.double().cpu() + 1) / process["num_train_timesteps"]
        high, low = process["log_snr_max"], process["log_snr_min"]
        if process["log_snr_schedule"] == "linear":
            return high + (low - high) * u
        b, end = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
        return -2 * torch.tan(b + (end - b) * u).log()

    @staticmethod
    def _set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
        """Set a scheduler's timesteps, on the CPU, where reading them does not synchronize with the device."""
        scheduler.set_timesteps(num_inference_steps, device="cpu")
        if hasattr(scheduler, "set_begin_index"):
            # Without it, solvers whose first two rounded timesteps are equal start at the second one.
            scheduler.set_begin_index(0)

    def _check_noise_levels(self, scheduler: SchedulerMixin, num_inference_steps: int, log_snr: torch.Tensor) -> None:
        """Check, after `set_timesteps`, that the steps start below the noisy end of the process and reach the data."""
        name, sigma = type(scheduler).__name__, float(scheduler.init_noise_sigma)
        if sigma > 1000:
            raise ValueError(
                f"{name} starts at σ/α = {sigma:.0f}, where one step multiplies the network's error by the same "
                "factor. Keep use_exponential_sigmas and sigma_max from pipe.scheduler.config."
            )
        if not log_snr.isfinite().all() or (hasattr(scheduler, "sigmas") and scheduler.sigmas[-1] > 1):
            raise ValueError(
                f"{name} cannot take {num_inference_steps} steps: they do not reach the data. Use more steps, or a "
                "different scheduler."
            )
        self._check_stride(scheduler, num_inference_steps)
        expected = list(range(num_inference_steps))[::-1]
        if self.unet.latent_dim is not None and (found := scheduler.timesteps.tolist()) != expected:
            raise ValueError(
                f"{name} would take the timesteps {found}, but a generator was trained for {expected}. Set "
                "timestep_spacing='trailing' and steps_offset=0 in its config."
            )

    @staticmethod
    def _check_stride(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
        """Check that T steps of DDIM, each of ⌊N / T⌋ timesteps, reach the end of the process."""
        name = type(scheduler).__name__
        if "DDIM" not in name:
            return
        num_train_timesteps, timesteps = scheduler.config.num_train_timesteps, scheduler.timesteps
        stride = num_train_timesteps // num_inference_steps
        if (timesteps[:-1] - timesteps[1:] != stride).any():
            divisors = [steps for steps in range(1, num_train_timesteps + 1) if num_train_timesteps % steps == 0]
            nearest = min(divisors, key=lambda steps: abs(steps - num_inference_steps))
            raise ValueError(
                f"{name} cannot take {num_inference_steps} steps: it steps by {stride} timesteps, which does not match "
                f"the spacing of its {num_inference_steps} timesteps. Use num_inference_steps={nearest}, another "
                f"divisor of {num_train_timesteps}, or a different scheduler."
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
            self._require(name, labels, self._has_values(labels), "a dense tensor, not on the meta device")
            labels = labels.cpu().reshape(labels.shape or (1,))
            if labels.is_floating_point():
                self._check_weights(name, labels)
                labels = torch.nn.functional.pad(labels, (0, 1))  # no weight on the null class
            elif labels.ndim == 1 and not labels.is_complex():
                for label in labels.tolist():
                    self._check_class_id(name, label)
        else:
            is_list = not isinstance(labels, (bytes, bytearray, set, frozenset, type))
            self._require(name, labels, is_list, "one label or a list of labels")
            is_one = isinstance(labels, (str, dict)) or getattr(labels, "ndim", None) == 0
            labels = [labels] if is_one or not hasattr(labels, "__iter__") else list(labels)
            label2id = {class_name: class_id for class_id, class_name in self.id2label.items()}
            mixes = [label.items() if isinstance(label, dict) else [(label, 1.0)] for label in labels]
            mixes = [[(self._class_id(name, label, label2id), weight) for label, weight in mix] for mix in mixes]
            if any(isinstance(label, dict) for label in labels):
                labels = torch.zeros(len(mixes), self.num_classes + 1)
                for row, mix in zip(labels, mixes, strict=True):
                    for class_id, weight in mix:
                        what = f"The weight of class {class_id} in {name}"
                        self._require(what, weight, self._is_number(weight, 0), "a number of at least 0")
                        row[class_id] += weight
            else:
                labels = torch.tensor([class_id for mix in mixes for class_id, _ in mix], dtype=torch.int64)
        if labels.numel() == 0:
            raise ValueError(f"{name} is empty. Pass at least one class id or name.")
        self.unet.check_class_labels(labels, len(labels), name, self.num_classes)
        if labels.is_floating_point():
            return labels.float()
        return labels.to(torch.int64) % (self.num_classes + 1)  # -1 is the null class, the last row

    def _check_class_id(self, name: str, class_id: int) -> None:
        """Check an id that a user entered: `0 … num_classes - 1`, or -1 for the null class."""
        if -1 <= class_id < self.num_classes:
            return
        one_based = ", counted from 1?" if class_id == self.num_classes else "."
        raise ValueError(
            f"{name} contains the unknown id {class_id}{one_based} The classes are {self._known_classes()}; -1 is the "
            "null class."
        )

    def _check_weights(self, name: str, weights: torch.Tensor) -> None:
        """Check the shape of a tensor of weights that a user entered: `(labels, num_classes)`."""
        num_classes, shape = self.num_classes, tuple(weights.shape)
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
            guide_labels = torch.full((len(class_labels),), self.num_classes)
        if class_labels.ndim != guide_labels.ndim:
            class_labels, guide_labels = self._weights(class_labels), self._weights(guide_labels)
        return class_labels, guide_labels

    def _weights(self, labels: torch.Tensor) -> torch.Tensor:
        """Convert ids `(labels,)` to weights `(labels, num_classes + 1)`; return weights unchanged."""
        if labels.is_floating_point():
            return labels
        return torch.nn.functional.one_hot(labels, self.num_classes + 1).float()

    def _class_id(self, name: str, label: int | str, label2id: dict[str, int]) -> int:
        """Return the checked id of a label, `-1 … num_classes - 1`."""
        if isinstance(label, str):
            if not label2id:
                raise ValueError(
                    f"{name} contains the name {self._shown(label)}, but this model has no class names. Use ids."
                )
            if label not in label2id:
                raise ValueError(
                    f"{name} contains the unknown name {self._shown(label)}. The classes are {self._known_classes()}."
                )
            return label2id[label]
        try:
            is_bool = isinstance(label, bool) or str(getattr(label, "dtype", "")).endswith("bool")  # NumPy or torch
            class_id = None if is_bool else operator.index(label)
        except (TypeError, ValueError, RuntimeError):
            class_id = None
        if class_id is None:
            raise ValueError(f"{name} contains {self._shown(label)}, which is neither an integer id nor a name.")
        self._check_class_id(name, class_id)
        return class_id

    def _known_classes(self) -> str:
        """Return the classes formatted for a message, with at most 50 names."""
        named = [f"{class_name!r} ({class_id})" for class_id, class_name in sorted(self.id2label.items())]
        if not named:
            return f"0 … {self.num_classes - 1}"
        return ", ".join(named[:50]) + (f", … ({len(named)} in all)" if len(named) > 50 else "")

    def _guidance_scales(
        self,
        name: str,
        guidance_scale: float | Sequence[float] | torch.Tensor | Callable[[float], Any] | None,
        guidance_interval: tuple[float, float] | None,
        log_snr: torch.Tensor,
        num_images: int,
        num_images_per_label: int,
    ) -> torch.Tensor:
        """Return a scale at each λ and for each image, float32 `(steps, images)` on the CPU; 0 outside the interval."""
        values = [1.0 if guidance_scale is None else guidance_scale]  # None: a guider sets it
        if callable(guidance_scale):
            name, values = f"What {name} returns", [guidance_scale(x) for x in log_snr.tolist()]
        rows = [self._scale_per_image(name, value, num_images, num_images_per_label) for value in values]
        scales = torch.stack(rows).expand(len(log_snr), -1)
        if guidance_interval is not None:
            (low, high), sigma = self._numbers("guidance_interval", guidance_interval).tolist(), (-log_snr / 2).exp()
            inside = (low < sigma) & (sigma <= high)
            if not inside.any():
                raise ValueError(
                    f"None of the {len(sigma)} steps is in guidance_interval ({low}, {high}]: σ/α goes from "
                    f"{sigma.max():.4g} to {sigma.min():.4g}. Use a wider interval or more steps."
                )
            scales = torch.where(inside[:, None], scales, 0.0)
        return scales

    @property
    def _default_guidance_scale(self) -> float:
        """The w of a call without one."""
        if self._is_unconditional:
            return -1.0
        return 0.0 if self.unet.latent_dim is not None else min(1.0, self.unet.max_guidance_scale or 1.0)

    def _check_guidance_scales(self, scales: torch.Tensor) -> None:
        """Check that the network supports the values of w, `(steps, images)`."""
        if self._is_unconditional and (other := scales[scales != -1]).numel():
            raise ValueError(
                f"guidance_scale is {other[0]:g}, but the network of this model is unconditional. Leave it out, and "
                "pass classifier_guidance_scale."
            )
        largest = self.unet.max_guidance_scale
        if largest is not None and (outside := scales[~((scales >= 0) & (scales <= largest))]).numel():
            raise ValueError(
                f"guidance_scale is {outside[0]:g}, but this model was trained for 0 … {largest:g}. Use a model that "
                "guides in two passes, or class_labels=-1 for unconditional images."
            )

    def _check_classifier_guidance(self, scales: torch.Tensor) -> None:
        """Check that the model can be guided by a classifier, unless all scales `(steps, images)` are zero."""
        if not scales.any():
            return
        given = f"classifier_guidance_scale is {scales[scales != 0][0]:g}, but"
        if self.unet.latent_dim is not None:
            raise ValueError(
                f"{given} this model is a generator, whose output is an image and no prediction that a gradient could "
                "change. Leave it out."
            )
        if self.classifier is None:
            raise ValueError(
                f"{given} this model has no classifier. Train one with training/train_classifier.py, or use "
                "guidance_scale alone."
            )
        if self.unet.max_guidance_scale is not None:
            raise ValueError(
                f"{given} this model was trained to guide in one pass, without a classifier. Use one that takes two."
            )
        parameters = list(self.classifier.parameters())
        dtypes = {self.classifier.dtype, *(parameter.dtype for parameter in parameters)} - {torch.float32}
        if dtypes:
            raise ValueError(
                f"{given} the classifier is in {', '.join(sorted(map(str, dtypes)))}, and its gradient is taken in "
                "torch.float32. Call pipe.classifier.to(torch.float32). The other networks may have another dtype."
            )
        if any(parameter.is_inference() for parameter in parameters):
            raise ValueError(
                f"{given} the classifier was made under torch.inference_mode, so torch cannot take its gradient. Load "
                "it outside of torch.inference_mode. Calls of the pipeline may be inside."
            )

    def _scale_per_image(
        self, name: str, guidance_scale: Any, num_images: int, num_images_per_label: int
    ) -> torch.Tensor:
        """Expand w, a number or one number per label or per image, to float32 `(images,)` on the CPU."""
        given = self._numbers(name, guidance_scale, "a number, or a list with one per label or per image")
        w = given.float()
        if wrong := given[~w.isfinite()].tolist():
            raise ValueError(f"{name} must be finite in float32, but contains {self._shown(wrong)}.")
        num_labels = num_images // num_images_per_label
        if w.ndim == 0:
            w = w.expand(num_images)
        elif w.shape == (num_labels,):
            w = w.repeat_interleave(num_images_per_label)
        elif w.shape != (num_images,):
            raise ValueError(
                f"{name} has shape {tuple(w.shape)}, but must be one number, one per label ({num_labels}) or "
                f"one per image ({num_images})."
            )
        return w

    def log_snr(self) -> torch.Tensor:
        """Return λ = log(α²/σ²) at each timestep of the last call, float64 `(steps,)` on the CPU."""
        return self._log_snr_of(self.scheduler) if self._log_snr is None else self._log_snr

    def _log_snr_of(self, scheduler: SchedulerMixin) -> torch.Tensor:
        """Return λ at each of a scheduler's timesteps, as in `log_snr`."""
        process = self._trained_process
        assert process is not None  # `_check_scheduler` refuses an unknown one
        return self._log_snr_at(process, scheduler.timesteps)

    def _warn_if_never_dropped(self, guide_labels: torch.Tensor, needs_uncond: bool) -> None:
        """Warn if ε(z) is needed, but the model was trained without dropping labels."""
        null_class = guide_labels.ndim == 1 and bool((guide_labels == self.num_classes).any())
        needs_uncond = needs_uncond and self.guide_unet is None and not self._is_unconditional
        if needs_uncond and null_class and self.config.conditioning_dropout_prob == 0:
            logging.get_logger(__name__).warning(
                "This model was trained with conditioning_dropout_prob = 0: its null class is untrained, so guidance "
                "and unconditional samples are meaningless. Use guidance_scale=0, or train with 0.1 to 0.2."
            )

    def _warn_about_dropout(self) -> None:
        """Warn about networks in training mode, where dropout makes their predictions random."""
        for name in ("unet", "guide_unet", "classifier"):
            network = getattr(self, name)
            modules = network.modules() if network is not None and network.training else ()
            if any(isinstance(module, torch.nn.Dropout) and module.training and module.p for module in modules):
                logging.get_logger(__name__).warning(
                    "The %s is in training mode, where its dropout changes its predictions at random. Call "
                    "pipe.%s.eval() before the pipeline.",
                    name,
                    name,
                )

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Check or sample z at λ_min; float32 on `device`."""
        shape = (num_images, *self.sample_shape)
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"generator has {len(generator)} generators, but must have one for each of {num_images} images."
            )
        if latents is None:
            # float32 even for a UNet in half precision: a step at the noisy end needs the precision.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            self._check_latents("latents", latents, shape)
        return latents.to(device=device, dtype=torch.float32)

    def _checked_strength(self, image: Any, strength: Any, mask_image: Any) -> float | None:
        """Return the strength, by default 0.8, or 1 with a mask; `None` without an image, which both need."""
        if image is None:
            for name, value in (("strength", strength), ("mask_image", mask_image)):
                self._require(name, value, value is None, "None without image; pass image too")
            return None
        default = 0.8 if mask_image is None else 1.0
        return default if strength is None else float(strength)

    @staticmethod
    def _first_step(scheduler: SchedulerMixin, num_inference_steps: int, strength: float | None) -> int:
        """Return the index of the first of a scheduler's timesteps that is used, and let the scheduler start there."""
        if strength is None:
            return 0
        steps = int(num_inference_steps * strength)
        if not steps:
            raise ValueError(
                f"strength {strength:g} leaves none of {num_inference_steps} steps. Use at least "
                f"1/{num_inference_steps}, or more steps."
            )
        first = (num_inference_steps - steps) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return first

    def _image_and_mask(
        self, image: Any, mask_image: Any, num_images: int, num_images_per_label: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Convert an image and its mask.

        Returns:
            Pixels in [0, 1], `(images, *image_shape)`, and 1 where a sample is generated, else 0, `(images, 1, height,
            width)` of the sample; both float32, or `None` without.
        """
        if image is None:
            return None, None
        pixels = self._pixels("image", image, self.image_shape[0], num_images, num_images_per_label)
        if mask_image is None:
            return pixels, None
        is_generator = self._generator_steps is not None
        self._require("mask_image", mask_image, not is_generator, "left out for a generator, whose steps are too few")
        mask = self._pixels("mask_image", mask_image, 1, num_images, num_images_per_label)
        return pixels, F.adaptive_max_pool2d((mask >= 0.5).float(), self.sample_shape[1:])

    def _pixels(self, name: str, image: Any, channels: int, num_images: int, num_images_per_label: int) -> torch.Tensor:
        """Convert images in any form to `(images, channels, height, width)` of `image_shape` in [0, 1], float32."""
        listed = list(image) if isinstance(image, (list, tuple)) else [image]
        transparent = {"LA", "La", "PA", "RGBA", "RGBa"}
        modes = [item.mode for item in listed if getattr(item, "mode", None) in transparent]
        required = f'one without transparency; use {name}.convert("RGB")'
        self._require(f"The mode of {name}", modes and modes[0], not modes, required)
        # Sizes are not changed: that would distort the image.
        processor = VaeImageProcessor(
            do_resize=False,
            do_normalize=False,
            do_convert_rgb=channels == 3,
            do_convert_grayscale=channels == 1,
            vae_latent_channels=0,  # no images are latents
        )
        try:
            pixels = processor.preprocess(listed if isinstance(image, tuple) else image).float()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} must be a PIL image, an array (images, height, width, channels), a tensor (images, channels, "
                f"height, width) or a list of these, all of one size, but is {self._shown(image)}."
            ) from error
        shape, num_labels = (channels, *self.image_shape[1:]), num_images // num_images_per_label
        if pixels.shape[1:] != shape:
            raise ValueError(
                f"{name} has the shape {tuple(pixels.shape[1:])} (channels, height, width), but this model needs "
                f"{shape}. Resize or crop it."
            )
        values = pixels.min().item(), pixels.max().item()
        self._require(
            f"The range of {name}", values, 0 <= values[0] <= values[1] <= 1, "in [0, 1]; divide 8-bit values by 255"
        )
        if len(pixels) not in (1, num_labels, num_images):
            raise ValueError(
                f"{name} contains {len(pixels)} images, but must contain one, one per label ({num_labels}) or one per "
                f"image ({num_images})."
            )
        return pixels.repeat_interleave(num_images // len(pixels), 0)

    def _draw_latent(
        self, num_images: int, generator: torch.Generator | list[torch.Generator] | None, device: torch.device
    ) -> torch.Tensor | None:
        """Sample the latent vectors of a step, `(images, latent_dim)`, float32; `None` for a network without."""
        latent_dim = self.unet.latent_dim
        return randn_tensor((num_images, latent_dim), generator=generator, device=device) if latent_dim else None

    @staticmethod
    def _step_kwargs(
        scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None
    ) -> dict[str, Any]:
        """Return the additional arguments that a scheduler's `step` accepts."""
        accepted = inspect.signature(scheduler.step).parameters
        # By default DDIM steps along an ε that contradicts the clipped x̃, which leaves speckles.
        available = {"generator": generator, "use_clipped_model_output": True}
        return {name: value for name, value in available.items() if name in accepted}

    # A saved folder loads with and without remote code. `DiffusionPipeline.from_pretrained(folder,
    # trust_remote_code=True)` runs the code in the folder, which model_index.json names.
    # `CFGPipeline.from_pretrained(folder)` uses the installed package and runs no code from the folder.

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """
        Save the pipeline to a folder, including optional components that were assigned after construction. Takes the
        arguments of `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: If `safe_serialization=False` is passed.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False is not supported: loading pickled weights can run code. Leave it out."
            )
        self._record_optional_components()
        super().save_pretrained(save_directory, safe_serialization, *args, **kwargs)

    def _record_optional_components(self) -> None:
        """Record optional components in the config. diffusers records them only at construction."""
        self.register_modules(**{name: getattr(self, name) for name in self._optional_components})

    def to_json_string(self) -> str:
        """Return the text of model_index.json, which names the module files that `save_config` writes."""
        self._record_optional_components()
        index = json.loads(super().to_json_string())
        index["_class_name"] = ["pipeline_cfg", type(self).__name__]
        index.pop("_name_or_path", None)
        if self.classifier is None:
            index.pop("classifier")  # Older versions, without this component, would warn about it.
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
