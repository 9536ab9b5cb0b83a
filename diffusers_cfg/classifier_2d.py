"""Define a classifier of noisy images, p(c | z, timestep), for classifier guidance (Dhariwal & Nichol 2021)."""

# Copied from diffusers_cfg.unet_2d_cfg
# This file is saved with every model, so it must run alone under plain diffusers: it imports the standard library,
# torch and diffusers only, and keeps its helpers inside the class.

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block


class NoisyClassifier2DModel(ModelMixin, ConfigMixin):
    r"""
    A classifier of noisy images: the down path of a `UNet2DModel`, the mean over positions, and a linear layer
    (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4, with their attention pooling replaced by the mean).

    The network sees αz instead of z = αx + σε: the best linear estimate of x if x has unit variance. It vanishes at the
    noisy end, and with it ∇_z log p(c | z), as it must: guidance moves x̃ by s σ²/α ∇_z log p(c | z), where 1/α is 22026
    at λ = -20. The gradient of a network that sees z does not vanish.

    ```python
    classifier = NoisyClassifier2DModel(sample_size=32, in_channels=1, num_classes=10)
    classifier(alpha * z, t).log_softmax(1)  # log p(c | z, t)
    ```

    Args:
        sample_size (`int` or `tuple[int, int]`): Height and width of the samples.
        in_channels (`int`): Channels of the samples.
        num_classes (`int`): Number of classes.
        down_block_types (`tuple[str, ...]`): Type of the block of each level: `DownBlock2D`, or `AttnDownBlock2D` with
            self-attention.
        block_out_channels (`tuple[int, ...]`): Channels of each level. Each level but the last halves the size.
        layers_per_block (`int`): Residual blocks of each level.
        dropout (`float`): Dropout probability inside the residual blocks.
        attention_head_dim (`int`): Channels of an attention head.
        norm_num_groups (`int`): Groups of the group norms.
        add_attention (`bool`): Whether the block after the last level has self-attention.
        id2label (`dict`, *optional*): Name of each class id. Keys may be strings, as in JSON. `CFGPipeline` compares
            it with its own.
        noise_process (`dict`, *optional*): The noise process of its training: `num_train_timesteps`, `log_snr_min`,
            `log_snr_max` and `log_snr_schedule` of a `LogSNRScheduler`. `CFGPipeline` compares it with its own.

    Raises:
        ValueError: If a setting is invalid.
    """

    _supports_gradient_checkpointing = True

    # Copied from diffusers_cfg.unet_2d_cfg.UNet2DCFGModel
    # Source of this module, which `CFGPipeline.save_pretrained` writes next to the weights. Read at import: all
    # repositories loaded as remote code share one path, so the file there may later belong to a different repository.
    remote_code = Path(__file__).read_text(encoding="utf-8")

    # Layers are allocated before the weights are read, so a damaged config must not ask for too much memory.
    max_num_classes = 1_000_000
    max_layers_per_block = 100

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int],
        in_channels: int,
        num_classes: int,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 2,
        dropout: float = 0.0,
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        add_attention: bool = True,
        id2label: dict[int, str] | dict[str, str] | None = None,
        noise_process: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._check_head(num_classes, id2label, noise_process)
        self._check_layers()
        channels, temb_channels = block_out_channels[0], 4 * block_out_channels[0]
        self.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels, temb_channels)
        self.conv_in = torch.nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.down_blocks = torch.nn.ModuleList()
        for level, (block_type, out_channels) in enumerate(zip(down_block_types, block_out_channels, strict=True)):
            block = get_down_block(
                block_type,
                num_layers=layers_per_block,
                in_channels=channels,
                out_channels=out_channels,
                temb_channels=temb_channels,
                add_downsample=level < len(block_out_channels) - 1,
                resnet_eps=1e-5,
                resnet_act_fn="silu",
                resnet_groups=norm_num_groups,
                attention_head_dim=attention_head_dim,
                downsample_padding=1,
                dropout=dropout,
            )
            self.down_blocks.append(block)
            channels = out_channels
        self.mid_block = UNetMidBlock2D(
            in_channels=channels,
            temb_channels=temb_channels,
            dropout=dropout,
            resnet_eps=1e-5,
            resnet_act_fn="silu",
            resnet_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
            add_attention=add_attention,
        )
        self.norm_out = torch.nn.GroupNorm(norm_num_groups, channels, eps=1e-5)
        self.act = torch.nn.SiLU()
        self.head = torch.nn.Linear(channels, num_classes)

    def _check_head(self, num_classes: Any, id2label: Any, noise_process: Any) -> None:
        """Check the classes and the noise process."""
        if type(num_classes) is not int or not 2 <= num_classes <= self.max_num_classes:
            raise ValueError(f"num_classes must be an integer in 2 … {self.max_num_classes}, but is {num_classes!r}.")
        ids = {str(class_id) for class_id in range(num_classes)}
        if id2label is not None and not (
            isinstance(id2label, dict)
            and all(str(class_id) in ids and isinstance(name, str) for class_id, name in id2label.items())
        ):
            raise ValueError(
                f"id2label must be a dictionary from class ids in 0 … {num_classes - 1} to names, but is "
                f"{str(id2label)[:100]}."
            )
        if noise_process is not None and not isinstance(noise_process, dict):
            raise ValueError(f"noise_process must be a dictionary or None, but is {str(noise_process)[:100]}.")

    def _check_layers(self) -> None:
        """Check the settings of the layers before anything is allocated: errors of diffusers do not name them."""
        config = self.config
        types, channels = config.down_block_types, config.block_out_channels
        size, head_dim, groups = config.sample_size, config.attention_head_dim, config.norm_num_groups
        integer = "a positive integer"
        for name, required, values in (
            (
                "sample_size",
                f"{integer} or two",
                size if isinstance(size, (list, tuple)) and len(size) == 2 else [size],
            ),
            ("in_channels", integer, [config.in_channels]),
            (
                "block_out_channels",
                f"{integer} for each level",
                channels if isinstance(channels, (list, tuple)) else [0],
            ),
            ("layers_per_block", integer, [config.layers_per_block]),
            ("attention_head_dim", integer, [head_dim]),
            ("norm_num_groups", integer, [groups]),
        ):
            if not all(type(value) is int and value > 0 for value in values):
                raise ValueError(f"{name} must be {required}, but is {str(config[name])[:100]}.")
        if config.layers_per_block > self.max_layers_per_block:
            raise ValueError(
                f"layers_per_block must be at most {self.max_layers_per_block}, but is {config.layers_per_block}."
            )
        if not isinstance(types, (list, tuple)) or not {*types} <= {"DownBlock2D", "AttnDownBlock2D"}:
            raise ValueError(
                f"down_block_types must be a list of DownBlock2D or AttnDownBlock2D, but is {str(types)[:100]}."
            )
        if not 0 < len(types) == len(channels):
            raise ValueError(
                f"down_block_types has {len(types)} levels, but block_out_channels has {len(channels)}. Give one of "
                "each for every level."
            )
        attended = [count for kind, count in zip(types, channels, strict=True) if kind == "AttnDownBlock2D"]
        attended += [channels[-1]] if config.add_attention else []
        for name, divisor, values in (
            ("norm_num_groups", groups, channels),
            ("attention_head_dim", head_dim, attended),
        ):
            if wrong := [value for value in values if value % divisor]:
                raise ValueError(f"{name} is {divisor}, which does not divide the {wrong[0]} channels of a level.")
        dropout = config.dropout
        if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], but is {dropout!r}.")

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load config.json, as `ModelMixin.load_config`. Raise `ValueError` if it contains no settings of a model."""
        # Copied from diffusers_cfg.unet_2d_cfg.UNet2DCFGModel
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
        Load a classifier from safetensors that hold all of its weights, as `ModelMixin.from_pretrained`.

        Raises:
            OSError: If files do not exist or cannot be read.
            ValueError: If the weights and the classifier have different tensors, the config is invalid, or weights in
                another format are requested.
        """
        # Copied from diffusers_cfg.unet_2d_cfg.UNet2DCFGModel
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

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.config.num_classes

    @property
    def noise_process(self) -> dict[str, Any] | None:
        """The noise process that the classifier was trained with; `None` if it is not known."""
        return self.config.noise_process

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """
        Return the logits of p(c | z, timestep).

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): αz, noisy samples times α.
            timestep (`torch.Tensor` of shape `()` or `(batch,)`): Timestep, which need not be an integer.

        Returns:
            `torch.Tensor` of shape `(batch, num_classes)`.
        """
        timestep = timestep.to(sample.device).expand(len(sample))
        emb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        sample = self.conv_in(sample)
        for block in self.down_blocks:
            sample, _ = block(hidden_states=sample, temb=emb)
        sample = self.mid_block(sample, emb)
        return self.head(self.act(self.norm_out(sample)).mean((2, 3)))
