"""Define a `UNet2DModel` with a null class: one network for ε(z, c) and ε(z) (Ho & Salimans 2022, section 3.2)."""

# This file is saved with every model, so it must run alone under plain diffusers: it imports the standard library,
# torch and diffusers only, and keeps its helpers inside the class.

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel  # noqa: F401 (diffusers looks for ModelMixin in this module)
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput


class UNet2DCFGModel(UNet2DModel):
    r"""
    A class-conditional `UNet2DModel` whose last class-embedding row is the null class ∅ of classifier-free guidance.

    The constructor is that of `UNet2DModel` with three more arguments. Set `num_class_embeds` to the number of classes
    **plus one**; with `None` the network is unconditional, and takes no labels. Without the three, each class loads the
    other's weights.

    ```python
    unet = UNet2DCFGModel(sample_size=32, in_channels=1, out_channels=1, num_class_embeds=10 + 1)
    unet(z, t, class_labels=torch.tensor([3, -1])).sample  # ε(z, c = 3) and ε(z)
    ```

    Args:
        max_guidance_scale (`float`, *optional*): Largest w of a network that takes w as an input and predicts with
            guidance in one pass, because it was trained so (Chen et al. 2025, arXiv 2501.15420) or distilled (Meng et
            al. 2023, arXiv 2210.03142). By default the network does not take w.
        fourier_frequencies (`list[float]`, *optional*): Angular frequencies ω. The first convolution then sees sin(ωz)
            and cos(ωz) beside z, which tell apart values that are close together (Kingma et al. 2021, arXiv 2107.00630,
            section 4.5: ω = 2ⁿπ). Such a network takes z in float32. By default it sees z alone.
        latent_dim (`int`, *optional*): Size of the latent vector of a generator, for a denoising diffusion GAN (Xiao et
            al. 2021, arXiv 2112.07804). A generator returns a sample of x in [-1, 1] instead of a prediction, and takes
            the random vector that selects it; with 0 it takes none. By default the network is not a generator.

    Raises:
        ValueError: If `max_guidance_scale` is not a positive number, `fourier_frequencies` not a list of such,
            `latent_dim` not such a size, or `num_class_embeds` not a number of classes.
    """

    class FourierConv(torch.nn.Conv2d):
        """A convolution over z, sin(ωz) and cos(ωz), `(batch, channels, height, width)`, in float32."""

        def __init__(self, in_channels: int, out_channels: int, frequencies: list[float]) -> None:
            super().__init__(in_channels * (1 + 2 * len(frequencies)), out_channels, kernel_size=3, padding=1)
            self.frequencies = frequencies

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            """Return the features of z. Raise `ValueError` for half precision, whose rounding the sines amplify."""
            if input.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"A network with fourier_frequencies cannot take samples in {input.dtype}, which rounds away what "
                    "the frequencies tell apart. Load it in torch.float32; torch.autocast can be used."
                )
            angles = [frequency * input for frequency in self.frequencies]
            waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(torch.cat([input, *waves], dim=1))

    # Source of this module, which `CFGPipeline.save_pretrained` writes next to the weights. Read at import: all
    # repositories loaded as remote code share one path, so the file there may later belong to a different repository.
    remote_code = Path(__file__).read_text(encoding="utf-8")

    # Layers are allocated before the weights are read, so a damaged config must not ask for too much memory.
    max_num_class_embeds, max_num_frequencies, max_latent_dim = 1_000_001, 64, 65_536
    max_layers_per_block = 100
    # A float32 angle ωz has hardly a correct digit left beyond, and far beyond no finite sine.
    max_frequency = 1e6

    # Not decorated with `register_to_config`: the parent registers its own arguments, and those of this class are
    # registered only if set, so that `UNet2DModel` reads the config without a warning.
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        max_guidance_scale: float | None = None,
        fourier_frequencies: list[float] | None = None,
        latent_dim: int | None = None,
    ) -> None:
        self._check_settings(layers_per_block, num_class_embeds, max_guidance_scale, fourier_frequencies)
        self._check_generator(latent_dim, max_guidance_scale, time_embedding_type)
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        self.guidance_embedding = None
        if max_guidance_scale is not None:
            self.register_to_config(max_guidance_scale=max_guidance_scale)
            channels = self.time_embedding.linear_1.in_features
            self.guidance_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.guidance_embedding = TimestepEmbedding(channels, self.time_embedding.linear_2.out_features)
            # Zero, so that the network starts without guidance for every w, a student as its conditional teacher.
            torch.nn.init.zeros_(self.guidance_embedding.linear_2.weight)
            torch.nn.init.zeros_(self.guidance_embedding.linear_2.bias)
        if fourier_frequencies is not None:
            self.register_to_config(fourier_frequencies=list(fourier_frequencies))
            self.conv_in = self.FourierConv(in_channels, self.conv_in.out_channels, list(fourier_frequencies))
        self.latent_mapping = None
        if latent_dim is not None:
            self.register_to_config(latent_dim=latent_dim)
        if latent_dim:
            channels, act = self.time_embedding.linear_2.out_features, torch.nn.SiLU
            layers = [torch.nn.Linear(latent_dim, channels)]
            layers += [layer for _ in range(3) for layer in (act(), torch.nn.Linear(channels, channels))]
            for layer in layers[::2]:
                # Keeps the variance. With torch's default the latent vector would hardly count beside the class.
                torch.nn.init.kaiming_normal_(layer.get_parameter("weight"))
            self.latent_mapping = torch.nn.Sequential(*layers)

    def _check_settings(
        self, layers_per_block: Any, num_class_embeds: Any, max_guidance_scale: Any, fourier_frequencies: Any
    ) -> None:
        """Check the settings that `UNet2DModel` does not check, before anything is allocated."""
        if isinstance(layers_per_block, int) and layers_per_block > self.max_layers_per_block:
            raise ValueError(
                f"layers_per_block must be at most {self.max_layers_per_block}, but is {layers_per_block}."
            )
        if num_class_embeds is not None and (
            type(num_class_embeds) is not int or not 0 < num_class_embeds <= self.max_num_class_embeds
        ):
            raise ValueError(
                "num_class_embeds must be the number of classes plus one, an integer of at most "
                f"{self.max_num_class_embeds}, but is {num_class_embeds!r}."
            )
        if max_guidance_scale is not None and not self._is_positive(max_guidance_scale):
            raise ValueError(f"max_guidance_scale must be a positive number, but is {max_guidance_scale!r}.")
        if fourier_frequencies is not None and not (
            isinstance(fourier_frequencies, (list, tuple))
            and 0 < len(fourier_frequencies) <= self.max_num_frequencies
            and all(self._is_positive(value) and value <= self.max_frequency for value in fourier_frequencies)
        ):
            raise ValueError(
                f"fourier_frequencies must be a list of up to {self.max_num_frequencies} positive numbers of at most "
                f"{self.max_frequency:g}, but is {str(fourier_frequencies)[:100]}."
            )

    def _check_generator(self, latent_dim: Any, max_guidance_scale: Any, time_embedding_type: str) -> None:
        """Check the settings of a generator."""
        if latent_dim is None:
            return
        if type(latent_dim) is not int or not 0 <= latent_dim <= self.max_latent_dim:
            raise ValueError(f"latent_dim must be an integer in 0 … {self.max_latent_dim}, but is {latent_dim!r}.")
        if max_guidance_scale is not None:
            raise ValueError(
                f"A network cannot have both latent_dim ({latent_dim}) and max_guidance_scale ({max_guidance_scale}): "
                "a generator cannot guide in one pass."
            )
        if time_embedding_type == "fourier":
            raise ValueError(
                "A generator cannot have time_embedding_type='fourier', which takes the logarithm of the time, since "
                "its times start at 0. Use 'positional'."
            )

    @staticmethod
    def _is_positive(value: Any) -> bool:
        """Return whether a value is a positive, finite number."""
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """
        Load config.json. The arguments and return values are those of `UNet2DModel.load_config`.

        Raises:
            ValueError: If the file contains anything other than the settings of a model.
        """
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(config, dict):
            raise ValueError(
                f"{cls.config_name} must contain the settings of a {cls.__name__}, but contains {config!r}."
            )
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """
        Load a network from safetensors that hold all of its weights. The arguments and return values are those of
        `UNet2DModel.from_pretrained`.

        Raises:
            OSError: If files do not exist or cannot be read.
            ValueError: If the weights and the network have different tensors, the config is invalid, or weights in
                another format are requested.
        """
        if kwargs.get("use_safetensors") not in (True, None):
            raise ValueError(
                f"use_safetensors={kwargs['use_safetensors']} is not supported: loading weights in other formats can "
                "run code. Leave it out."
            )
        kwargs["use_safetensors"] = True
        if not kwargs.get("ignore_mismatched_sizes"):
            kwargs["low_cpu_mem_usage"] = True  # leaves tensors that are in no file on the meta device
        returns_info = kwargs.pop("output_loading_info", False)
        name = str(Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or ""))
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except OSError as error:
            if os.path.exists(name):
                raise
            raise OSError(f"{name} does not exist, and cannot be loaded from the Hub: {error}") from error
        except Exception as error:  # invalid settings raise exceptions of many types
            raise ValueError(f"{name} cannot be loaded: {error}") from error
        network, info = loaded
        empty = [key for key, value in network.state_dict().items() if value.is_meta]
        wrong = {"missing": {*info["missing_keys"], *empty}, "unexpected": info["unexpected_keys"]}
        found = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])})" for kind, keys in wrong.items() if keys]
        if found:
            raise ValueError(
                f"The weights in {name} are not those of its {cls.config_name}. Tensors: {', '.join(found)}. The files "
                "are damaged, or belong to different models. Copy or download them again."
            )
        return (network, info) if returns_info else network

    def set_attention_backend(self, backend: str) -> None:
        """Raise `ValueError`: diffusers accepts any backend here, but the layers of `UNet2DModel` do not read it."""
        raise ValueError(
            f"set_attention_backend({backend!r}) would have no effect: the attention of UNet2DModel always calls "
            "torch's scaled_dot_product_attention. enable_xformers_memory_efficient_attention() does have an effect."
        )

    @property
    def noise_process(self) -> dict[str, Any] | None:
        """
        The noise process that the network was trained with; `None` if it is not known. Training sets it, and
        `CFGPipeline` compares each scheduler with it. It is saved with the network.
        """
        # A private name, because `UNet2DModel` keeps such settings without a warning.
        return self.config.get("_noise_process")

    @noise_process.setter
    def noise_process(self, process: dict[str, Any]) -> None:
        self.register_to_config(_noise_process=process)

    @property
    def max_guidance_scale(self) -> float | None:
        """The largest w that the network takes as an input; `None` if guidance needs two passes."""
        return self.config.get("max_guidance_scale")

    @property
    def latent_dim(self) -> int | None:
        """The size of the latent vector of a generator; `None` if the network is not a generator."""
        return self.config.get("latent_dim")

    @property
    def num_classes(self) -> int:
        """The number of classes without the null class, `num_class_embeds - 1`. Labels are `0 … num_classes - 1`."""
        num_class_embeds = self.config.num_class_embeds
        if num_class_embeds is None or num_class_embeds < 2 or self.config.class_embed_type is not None:
            raise ValueError(
                f"{type(self).__name__} needs a class embedding with a row for the null class, but its config has "
                f"num_class_embeds={num_class_embeds} and class_embed_type={self.config.class_embed_type!r}. Set "
                "num_class_embeds to the number of classes plus one and class_embed_type to None. An unconditional "
                "network needs a pipeline with a classifier."
            )
        return num_class_embeds - 1

    @property
    def null_class_label(self) -> int:
        """The label of the null class ∅, `num_classes`: the last row of the class embedding."""
        return self.num_classes

    def check_class_labels(
        self, class_labels: torch.Tensor, batch_size: int, name: str = "class_labels", num_classes: int | None = None
    ) -> None:
        """
        Check a batch of labels for the network. They may contain `null_class_label`, which `CFGPipeline` refuses in
        labels that a user enters.

        Reads the values of the labels, which synchronizes with the device. Call this method once per batch, before the
        network. `forward` calls it only for labels on the CPU.

        Args:
            class_labels (`torch.Tensor` of shape `(batch_size,)`): Integers in `-1 … num_classes`. Or floating-point
                weights of the classes, `(batch_size, num_classes + 1)`, with the null class last. Weights are at least
                0, and each row adds up to one.
            batch_size (`int`): Number of samples.
            name (`str`, *optional*, defaults to `"class_labels"`): Name of the argument, for messages.
            num_classes (`int`, *optional*): Number of classes; by default that of the network.

        Raises:
            ValueError: If the labels are neither integers nor weights, are not one per sample, or are out of range.
        """
        num_classes = num_classes or self.num_classes
        self._check_class_labels_layout(class_labels, batch_size, name, num_classes)
        if class_labels.is_floating_point():
            wrong = [row for row in class_labels.tolist() if not (min(row) >= 0 and abs(sum(row) - 1) < 1e-3)]
            if wrong:
                shown = str(wrong[0])[:100]
                raise ValueError(f"The weights in {name} must be at least 0 and add up to one, but are {shown}.")
            return
        wrong = sorted({label for label in class_labels.tolist() if not -1 <= label <= num_classes})
        if wrong:
            raise ValueError(
                f"{name} {str(wrong)[:100]} are out of range. The classes are 0 … {num_classes - 1}; -1 or "
                f"{num_classes} is the null class."
            )

    def _check_class_labels_layout(
        self, class_labels: torch.Tensor, batch_size: int, name: str, num_classes: int
    ) -> None:
        """Check dtype and shape, without reading values."""
        if class_labels.is_floating_point() and class_labels.shape == (batch_size, num_classes + 1):
            return
        if class_labels.is_floating_point() or class_labels.is_complex() or class_labels.dtype == torch.bool:
            raise ValueError(
                f"{name} must be integers, or weights of shape ({batch_size}, {num_classes + 1}), but have "
                f"dtype {class_labels.dtype} and shape {tuple(class_labels.shape)}."
            )
        if class_labels.shape != (batch_size,):
            raise ValueError(
                f"{name} must contain one label per sample, shape ({batch_size},), but have shape "
                f"{tuple(class_labels.shape)}."
            )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: torch.Tensor | None = None,
        latent: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Predict from noisy samples, their timesteps and classes: `UNet2DModel.forward` with more terms in the embedding.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Noisy samples z, in the network's
                compute dtype.
            timestep (`torch.Tensor` of shape `()` or `(batch,)`): Timestep. Pass a tensor: as in diffusers, a Python
                float is truncated to an integer.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Integers; `-1` or `null_class_label` is the
                null class. Or weights, `(batch, num_classes + 1)`, which mix the rows of the class embedding. By
                default the null class for the whole batch. An unconditional network takes `None`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `UNet2DOutput` instead of a tuple.
            guidance_scale (`torch.Tensor` of shape `(batch,)`, *optional*): The paper's w in [0, `max_guidance_scale`],
                for a network that takes w. By default 0.
            latent (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): A vector from N(0, I) for each sample,
                which a generator with a `latent_dim` needs. Its length has no effect.

        Returns:
            `UNet2DOutput` or `tuple`: The prediction, `(batch, out_channels, height, width)`. That of a generator is an
            x in [-1, 1].

        Raises:
            ValueError: If the labels are neither integers nor weights, or not one per sample; if `latent` does not have
                the shape that the network takes; or if `guidance_scale` is passed to a network that does not take w, or
                is not one per sample. The ranges of labels and w are checked only on the CPU, because reading them on
                other devices would stall every step; call `check_class_labels` before.
        """
        if self.class_embedding is not None or class_labels is not None:
            class_labels = self._fill_class_labels(class_labels, sample)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        # 1. emb = time + (class + guidance scale + latent vector)
        timesteps = self._expand_timestep(timestep, sample)
        emb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        conditions = torch.zeros_like(emb) if class_labels is None else self._embed_class_labels(class_labels)
        if self.guidance_embedding is not None or guidance_scale is not None:
            conditions = conditions + self._embed_guidance_scale(guidance_scale, sample)
        if self.latent_mapping is not None or latent is not None:
            conditions = conditions + self._embed_latent(latent, sample)
        emb = emb + conditions.to(sample.dtype)

        # 2. in and down
        skip_sample = sample  # the image, which blocks with `skip_conv` take in addition to the features
        sample = self.conv_in(sample)
        residuals = (sample,)
        for block in self.down_blocks:
            if hasattr(block, "skip_conv"):
                sample, block_residuals, skip_sample = block(hidden_states=sample, temb=emb, skip_sample=skip_sample)
            else:
                sample, block_residuals = block(hidden_states=sample, temb=emb)
            residuals += block_residuals

        # 3. middle
        if self.mid_block is not None:
            sample = self.mid_block(sample, emb)

        # 4. up and out
        skip_sample = None
        for block in self.up_blocks:
            count = len(block.resnets)  # pyright: ignore[reportArgumentType] a ModuleList
            residuals, block_residuals = residuals[:-count], residuals[-count:]
            if hasattr(block, "skip_conv"):
                sample, skip_sample = block(sample, block_residuals, emb, skip_sample)
            else:
                sample = block(sample, block_residuals, emb)
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        if skip_sample is not None:
            sample = sample + skip_sample
        if self.config.time_embedding_type == "fourier":
            sample = sample / timesteps.view(-1, 1, 1, 1)
        if self.latent_dim is not None:
            sample = sample.tanh()

        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def _fill_class_labels(self, class_labels: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
        """Check the labels and replace `None` and -1 by the row of the null class."""
        batch_size = sample.shape[0]
        if class_labels is None:
            return torch.full((batch_size,), self.null_class_label, device=sample.device)
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_class_labels(class_labels, batch_size)
        else:
            self._check_class_labels_layout(class_labels, batch_size, "class_labels", self.num_classes)
        if class_labels.is_floating_point():
            return class_labels
        return torch.where(class_labels == -1, self.null_class_label, class_labels)

    @staticmethod
    def _expand_timestep(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        """Expand the timestep to `(batch,)`, as in `UNet2DModel`."""
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, dtype=torch.long, device=sample.device)
        if timestep.ndim == 0:
            timestep = timestep.to(sample.device)
        return timestep * torch.ones(sample.shape[0], dtype=timestep.dtype, device=timestep.device)

    def _embed_class_labels(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Return the row of each label, or the mix of all rows by weights, `(batch, channels)`."""
        assert self.class_embedding is not None
        if not class_labels.is_floating_point():
            return self.class_embedding(class_labels)
        # Call the module instead of reading its weight, which hooks may move or cast between calls.
        rows = self.class_embedding(torch.arange(self.num_classes + 1, device=class_labels.device))
        return class_labels.to(rows.dtype) @ rows

    def _embed_guidance_scale(self, w: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
        """Return the embedding of w, `(batch, channels)`; `None` is 0."""
        largest = self.max_guidance_scale
        if self.guidance_embedding is None or largest is None:
            raise ValueError(
                "This network does not take guidance_scale, since its config has no max_guidance_scale. Use "
                "CFGPipeline, which guides with two passes."
            )
        if w is None:
            w = torch.zeros(len(sample), device=sample.device)
        is_read = w.device.type == "cpu" and not torch.compiler.is_compiling()
        if w.shape != (len(sample),) or (is_read and not ((w >= 0) & (w <= largest)).all()):
            raise ValueError(
                f"guidance_scale must contain one w per sample, shape ({len(sample)},), in 0 … {largest:g}, the range "
                f"that this network was trained for, but is {str(w.tolist())[:100]}."
            )
        # The root, because a small w changes the prediction more; up to 100 the sinusoids have at most sixteen periods.
        position = 100 * (w / largest).sqrt()
        return self.guidance_embedding(self.guidance_proj(position).to(sample.dtype))

    def _embed_latent(self, latent: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
        """Return the embedding of the latent vectors, `(batch, channels)`."""
        expected = (len(sample), self.latent_dim) if self.latent_mapping is not None else None
        if latent is None or tuple(latent.shape) != expected:
            required = (
                f"a tensor of shape {expected}, because this network is a generator with latent_dim={self.latent_dim}"
                if expected
                else f"None, because this network takes no latent vector (its latent_dim is {self.latent_dim})"
            )
            shown = latent if latent is None else f"of shape {tuple(latent.shape)}"
            raise ValueError(f"latent must be {required}, but is {shown}.")
        assert self.latent_mapping is not None
        latent = latent.float()  # The squares of large values overflow in half precision.
        latent = latent / (latent.square().mean(1, keepdim=True) + 1e-8).sqrt()
        return self.latent_mapping(latent.to(sample.dtype))
