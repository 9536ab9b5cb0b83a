"""A `UNet2DModel` with a null class: one network for ε(z, c) and ε(z) (Ho & Salimans 2022, section 3.2).

This file travels with every saved model, so it must run alone under plain diffusers: it imports the standard library,
torch and diffusers only, and keeps its helpers inside the class.
"""

import inspect
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DModel  # noqa: F401 (diffusers finds how to load this class by ModelMixin here)
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput


class UNet2DCFGModel(UNet2DModel):
    r"""
    A class-conditional `UNet2DModel` whose last class-embedding row is the null class ∅ of classifier-free guidance.

    The constructor is that of `UNet2DModel`; set `num_class_embeds` to the number of classes **plus one**. The weights
    load into a stock `UNet2DModel` and back.

    ```python
    unet = UNet2DCFGModel(sample_size=32, in_channels=1, out_channels=1, num_class_embeds=10 + 1)
    unet(z, t, class_labels=torch.tensor([3, -1])).sample  # ε(z, c = 3) and ε(z)
    ```

    Args:
        max_guidance_scale (`float`, *optional*): the largest w of a network that was distilled to predict what another
            one predicts with guidance, and takes w as an input (Meng et al. 2023, arXiv 2210.03142). Without it there
            is no such input.

    Raises:
        ValueError: `max_guidance_scale` is not a positive number.
    """

    # The text of this very class, for `CFGPipeline.save_pretrained`. It is read now and not when saving: repositories
    # loaded as remote code share one path, and the file there may by then hold another repository's text.
    remote_code = Path(__file__).read_text(encoding="utf-8")

    class ClassEmbedding(torch.nn.Embedding):
        """The rows of labels, or the mixes of rows that weights make; and what is added for w."""

        def forward(self, conditions: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
            class_labels, added = conditions
            if class_labels.is_floating_point():
                rows = class_labels.to(self.weight.dtype) @ self.weight
            else:
                rows = super().forward(class_labels)
            return rows if added is None else rows + added

    def __init__(self, *args, max_guidance_scale: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(self.class_embedding, torch.nn.Embedding):
            rows = self.class_embedding.weight.data
            self.class_embedding = self.ClassEmbedding.from_pretrained(rows, freeze=False)
        self.guidance_embedding = None
        if max_guidance_scale is not None:
            if not 0 < max_guidance_scale < float("inf"):
                raise ValueError(f"max_guidance_scale must be a positive number, but is {max_guidance_scale}.")
            self.register_to_config(max_guidance_scale=max_guidance_scale)
            channels = self.time_embedding.linear_1.in_features
            self.guidance_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.guidance_embedding = TimestepEmbedding(channels, self.time_embedding.linear_2.out_features)
            # It starts as the network that it is made from: the conditional one, whatever w.
            torch.nn.init.zeros_(self.guidance_embedding.linear_2.weight)
            torch.nn.init.zeros_(self.guidance_embedding.linear_2.bias)

    # By its parameters diffusers knows what belongs in a config.
    __init__.__signature__ = inspect.signature(UNet2DModel.__init__).replace(
        parameters=[
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            inspect.signature(__init__).parameters["max_guidance_scale"],
        ]
    )

    @property
    def max_guidance_scale(self) -> float | None:
        """The largest w that the network takes as an input; `None` if it takes none, and guidance needs two passes."""
        return self.config.get("max_guidance_scale")

    @property
    def num_classes(self) -> int:
        """Number of real classes, `num_class_embeds - 1`. They are labelled `0 … num_classes - 1`."""
        num_class_embeds = self.config.num_class_embeds
        if num_class_embeds is None or num_class_embeds < 2 or self.config.class_embed_type is not None:
            raise ValueError(
                f"{type(self).__name__} needs a class embedding with a row for the null class, but its config has "
                f"num_class_embeds={num_class_embeds} and class_embed_type={self.config.class_embed_type!r}: set "
                "num_class_embeds to the number of classes plus one and leave class_embed_type at None."
            )
        return num_class_embeds - 1

    @property
    def null_class_label(self) -> int:
        """Label of the null class ∅: the last row of the class embedding, `num_classes`."""
        return self.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """
        That of the weights. diffusers looks through all modules for it, and its `forward` asks twice: a small network
        would spend a tenth of its time on that.
        """
        if hasattr(self.conv_in, "_diffusers_hook"):  # layerwise casting computes in another one
            return super().dtype
        return self.conv_in.weight.dtype

    def check_class_labels(self, class_labels: torch.Tensor, batch_size: int) -> None:
        """
        Check the values of a batch of labels. Reading them waits for the device, so this is called where labels enter
        (`CFGPipeline`, the training data); `forward` calls it on the CPU only, where it costs nothing.

        Args:
            class_labels (`torch.Tensor` of shape `(batch_size,)`): integers in `-1 … num_classes`. Or weights of the
                classes, the null class last, `(batch_size, num_classes + 1)`: 0 or more, and one in all.
            batch_size (`int`): number of samples that the labels are for.

        Raises:
            ValueError: the labels are neither integers nor weights, are not one per sample, or one is out of range.
        """
        self._check_class_labels_layout(class_labels, batch_size)
        if class_labels.is_floating_point():
            wrong = [row for row in class_labels.tolist() if not (min(row) >= 0 and abs(sum(row) - 1) < 1e-3)]
            if wrong:
                raise ValueError(f"The weights of the classes must be 0 or more and add up to one, but are {wrong[0]}.")
            return
        wrong = sorted({label for label in class_labels.tolist() if not -1 <= label <= self.null_class_label})
        if wrong:
            raise ValueError(
                f"class_labels {wrong} are out of range: this model has the classes 0 … {self.num_classes - 1}, and "
                f"-1 (or {self.null_class_label}) for the null class."
            )

    def _check_class_labels_layout(self, class_labels: torch.Tensor, batch_size: int) -> None:
        if class_labels.is_floating_point() and class_labels.shape == (batch_size, self.num_classes + 1):
            return
        if class_labels.is_floating_point() or class_labels.is_complex() or class_labels.dtype == torch.bool:
            raise ValueError(
                f"class_labels must be integers, or weights of shape ({batch_size}, {self.num_classes + 1}), but their "
                f"dtype is {class_labels.dtype} and their shape {tuple(class_labels.shape)}."
            )
        if class_labels.shape != (batch_size,):
            raise ValueError(
                f"class_labels must hold one label per sample, shape ({batch_size},), but their shape is "
                f"{tuple(class_labels.shape)}."
            )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): the noisy sample z.
            timestep (`torch.Tensor` of shape `()` or `(batch,)`): the network's time. Pass a tensor: diffusers cuts a
                Python float to an integer.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): integers; `-1` is the null class for that
                sample, `None` is the null class for the whole batch. Or weights, `(batch, num_classes + 1)`, which mix
                the rows of the class embedding.
            return_dict (`bool`): whether to return a `UNet2DOutput` instead of a tuple.
            guidance_scale (`torch.Tensor` of shape `(batch,)`, *optional*): the paper's w in [0, `max_guidance_scale`],
                for a network that takes it; `None` is 0.

        Returns:
            `UNet2DOutput` or `tuple`: the prediction, of the shape of `sample`.

        Raises:
            ValueError: the labels are neither integers nor weights, or not one per sample; or there is a w, and the
                network takes none. A label out of range raises on the CPU; on other devices reading it would stall
                every step, and `check_class_labels` is there to be called before.
        """
        batch_size = sample.shape[0]
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.null_class_label, device=sample.device)
        elif class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_class_labels(class_labels, batch_size)
        else:
            self._check_class_labels_layout(class_labels, batch_size)
        if not class_labels.is_floating_point():
            class_labels = torch.where(class_labels == -1, self.null_class_label, class_labels)
        # The parent hands them on to the class embedding, and adds what comes to the embedding of the time.
        conditions = class_labels, self._embed_guidance_scale(guidance_scale, sample)
        return super().forward(sample, timestep, class_labels=conditions, return_dict=return_dict)

    def _embed_guidance_scale(self, w: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor | None:
        if self.guidance_embedding is None:
            if w is not None:
                raise ValueError(
                    "This network takes no guidance_scale: it was not distilled (its config has no max_guidance_scale)."
                )
            return None
        if w is None:
            w = torch.zeros(len(sample), device=sample.device)
        # By its root, as a small w changes more than a large one; up to 100 the sinusoids turn at most sixteen times.
        position = 100 * (w / self.max_guidance_scale).sqrt()
        return self.guidance_embedding(self.guidance_proj(position).to(self.dtype))
