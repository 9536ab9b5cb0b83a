"""Define the noise process and the sampler of Ho & Salimans 2022 (sections 2 and 4, Algorithm 2)."""

# Copied from diffusers_cfg.unet_2d_cfg
# This file is saved with every model, so it must run alone under plain diffusers: it imports the standard library,
# torch and diffusers only, and keeps its helpers inside the class.

import math
from ctypes import c_float
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class LogSNRSchedulerOutput(BaseOutput):
    """
    Output of `LogSNRScheduler.step`.

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, …)`): z at the next, less noisy λ; x̃ itself after the last step.
        pred_original_sample (`torch.Tensor` of shape `(batch, …)`): Predicted clean sample x̃, clipped if the scheduler
            clips.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class LogSNRScheduler(SchedulerMixin, ConfigMixin):
    r"""
    A scheduler for variance-preserving diffusion in continuous log-SNR λ = log(α²/σ²), with z = αx + σε.

    A uniform u ∈ [0, 1] gives λ = -2 log tan(au + b), from λ_max at u = 0 (clean) to λ_min at u = 1 (noise), or with
    `log_snr_schedule="linear"` λ = λ_max + (λ_min - λ_max) u. The network's time, and every `timestep` argument, is

        timestep = num_train_timesteps · u - 1,   a float in [-1, num_train_timesteps - 1].

    The integers 0 … num_train_timesteps - 1 are the timesteps of diffusers' discrete schedulers, which read the same
    process from `config.trained_betas`: `DDIMScheduler.from_config(pipe.scheduler.config)` samples the same model.

    Sampling is Algorithm 2 with T = `num_inference_steps` network evaluations at u evenly spaced from 1 to 0. At the
    noisy end the division by α multiplies an error of the network by up to exp(-λ_min/2) = 22026, so by default x̃ is
    clipped to the range of the data. The paper does not say whether it clips.

    Args:
        num_train_timesteps (`int`): Length of the network's time axis.
        log_snr_min (`float`): λ_min, the noisy end.
        log_snr_max (`float`): λ_max, the clean end; at most 15 for `"linear"`.
        log_snr_schedule (`str`): λ as a function of u, `"arctan"` (above) or `"linear"` (variational diffusion models,
            Kingma et al. 2021, arXiv 2107.00630, where λ_min and λ_max are learned).
        prediction_type (`str`): What the network predicts: `"epsilon"`, `"v_prediction"` (αε - σx) or `"sample"` (x).
        variance_interpolation (`float`): The paper's v in [0, 1]. The sampling variance is (σ̃²)^(1-v) (σ²)^v, between
            those of the posterior (0) and of the forward process (1). The paper uses 0.3 at 64×64 and 0.2 at 128×128.
        clip_sample (`bool`): Whether to bound x̃. Set it to `False` for latents, which have no fixed range.
        clip_sample_range (`float`): Bound of x̃, which is clipped to ± this value.
        thresholding (`bool`): Whether to bound x̃ by a quantile of |x̃| (Imagen's dynamic thresholding, arXiv
            2205.11487), at most `sample_max_value`, and divide by the bound. The default `sample_max_value` of 1 clips
            to ±1. `DPMSolverMultistepScheduler` and `UniPCMultistepScheduler` have no other way to clip.
        dynamic_thresholding_ratio (`float`): Quantile of |x̃|, in [0, 1].
        sample_max_value (`float`): Largest bound.
        timestep_spacing (`str`), use_exponential_sigmas (`bool`), sigma_min (`float`), sigma_max (`float`),
        lambda_min_clipped (`float`): Read only by diffusers' schedulers; this scheduler always goes from λ_min to
            λ_max. Schedulers that step in σ/α cannot start at 22026, where errors are amplified and not clipped. They
            start at 80, as EDM (arXiv 2206.00364, table 1), and end at about one level of 8 bits. Even steps in λ
            between these two were the closest to the exact solution, see `training/EXACTNESS.md`.
        trained_betas (`list[float]`, *optional*): Derived from the arguments above for diffusers' schedulers. A value
            that is passed is replaced.

    Raises:
        ValueError: If an argument is out of range.
    """

    order = 1
    init_noise_sigma = 1.0
    _compatibles = [
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
    ]

    # Copied from diffusers_cfg.unet_2d_cfg.UNet2DCFGModel
    # Source of this module, which `CFGPipeline.save_pretrained` writes next to the weights. Read at import: all
    # repositories loaded as remote code share one path, so the file there may later belong to a different repository.
    remote_code = Path(__file__).read_text(encoding="utf-8")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        log_snr_min: float = -20.0,
        log_snr_max: float = 20.0,
        prediction_type: str = "epsilon",
        variance_interpolation: float = 0.3,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = True,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        use_exponential_sigmas: bool = True,
        sigma_min: float = 0.01,
        sigma_max: float = 80.0,
        lambda_min_clipped: float = -5.1,
        trained_betas: list[float] | None = None,
        log_snr_schedule: str = "arctan",
    ) -> None:
        if type(num_train_timesteps) is not int or not 2 <= num_train_timesteps <= 1_000_000:
            raise ValueError(f"num_train_timesteps must be in 2 … 1000000, but is {num_train_timesteps!r}.")
        numbers = {"log_snr_min": log_snr_min, "log_snr_max": log_snr_max}
        numbers |= {"variance_interpolation": variance_interpolation, "sigma_min": sigma_min, "sigma_max": sigma_max}
        for name, value in numbers.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, but is {value!r}.")
        if not -60 <= log_snr_min < log_snr_max <= 60:
            raise ValueError(
                f"log_snr_min must be less than log_snr_max and both must be within ±60, where α and σ fit in float32, "
                f"but are log_snr_min={log_snr_min} and log_snr_max={log_snr_max}."
            )
        if log_snr_schedule not in ("arctan", "linear"):
            raise ValueError(f"log_snr_schedule must be arctan or linear, but is {log_snr_schedule!r}.")
        if log_snr_schedule == "linear" and log_snr_max > 15:
            raise ValueError(
                f"log_snr_max must be at most 15 for a linear schedule, but is {log_snr_max}. Beyond, α² rounds to 1 "
                "in the float32 betas that diffusers' schedulers read."
            )
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, but is {prediction_type!r}.")
        if not 0 <= variance_interpolation <= 1:
            raise ValueError(
                f"variance_interpolation (the paper's v) must be in [0, 1], but is {variance_interpolation}."
            )

        # λ = -2 log tan(au + b), so σ = sin(au + b) and α = cos(au + b).
        self._b = math.atan(math.exp(-log_snr_max / 2))
        self._a = math.atan(math.exp(-log_snr_min / 2)) - self._b

        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._log_snrs: list[float] | None = None
        self._step_index: int | None = None

        alpha, _ = self.alpha_sigma(self.u(torch.arange(num_train_timesteps, dtype=torch.float64)))
        self.alphas_cumprod = (alpha**2).float()
        # diffusers does not pass arguments with default values on to a different scheduler class. Here the defaults
        # define the process, so no value may count as a default.
        self.register_to_config(
            thresholding=thresholding and clip_sample,
            sigma_min=max(sigma_min, math.exp(-log_snr_max / 2)),
            sigma_max=min(sigma_max, math.exp(-log_snr_min / 2)),
            trained_betas=self._betas((alpha**2).tolist()),
            _use_default_values=[],
        )

    @staticmethod
    def _betas(alphas_cumprod: list[float]) -> list[float]:
        """Return the β whose float32 cumulative product is `alphas_cumprod`; each β corrects earlier rounding."""
        betas, product = [], 1.0
        for target in alphas_cumprod:
            if not product:
                raise ValueError(
                    "log_snr_min and log_snr_max are too small for so few timesteps: α² falls by more than a float32 β "
                    "can express. Raise log_snr_max or num_train_timesteps."
                )
            beta = c_float(1 - target / product).value  # rounded to float32, 20 times as fast as with a tensor
            product *= c_float(1 - beta).value
            betas.append(beta)
        return betas

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # diffusers' schedulers warn about settings that they do not know, except those with private names.
    _own_settings = ("log_snr_min", "log_snr_max", "log_snr_schedule", "variance_interpolation")

    def solver(self, scheduler_class: type[SchedulerMixin]) -> SchedulerMixin:
        """
        Create a diffusers scheduler for the same model: `scheduler_class.from_config(self.config)` without warnings.
        `LogSNRScheduler.from_config(solver.config)` restores this scheduler.
        """
        config = {f"_{name}" if name in self._own_settings else name: value for name, value in self.config.items()}
        return scheduler_class.from_config(config)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """Accept this class's own settings also under the private names that `solver` gives them."""
        own = {name: config_dict[f"_{name}"] for name in cls._own_settings if f"_{name}" in config_dict}
        config_dict = {name: value for name, value in config_dict.items() if name.removeprefix("_") not in own}
        return super().extract_init_dict({**config_dict, **own}, **kwargs)

    def timestep(self, u: torch.Tensor) -> torch.Tensor:
        """Return the timestep at u ∈ [0, 1], `num_train_timesteps · u - 1`, in the shape and dtype of u."""
        return self.config.num_train_timesteps * u - 1

    def u(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return u ∈ [0, 1] at a timestep, the inverse of `timestep`. Integers become float32."""
        timestep = timestep if timestep.is_floating_point() else timestep.float()
        return (timestep + 1) / self.config.num_train_timesteps

    def alpha_sigma(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return α and σ at u ∈ [0, 1], in the shape and dtype of u; α² + σ² = 1."""
        if self.config.log_snr_schedule == "linear":
            log_snr = self.log_snr(u)
            return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        # cos(au + b) as a sine of the distance to π/2: the float32 cosine of a number near π/2 has no correct digits,
        # and α is 4.5e-5 at u = 1.
        alpha = torch.sin(self._a * (1 - u) + (math.pi / 2 - self._a - self._b))
        sigma = torch.sin(self._a * u + self._b)
        return alpha, sigma

    def log_snr(self, u: torch.Tensor) -> torch.Tensor:
        """Return λ = log(α²/σ²) at u ∈ [0, 1], in the shape and dtype of u."""
        if self.config.log_snr_schedule == "linear":
            return self.config.log_snr_max + (self.config.log_snr_min - self.config.log_snr_max) * u
        alpha, sigma = self.alpha_sigma(u)
        return 2 * (alpha.log() - sigma.log())

    def u_at(self, log_snr: torch.Tensor) -> torch.Tensor:
        """Return u at λ ∈ [λ_min, λ_max], the inverse of `log_snr`, in the shape and dtype of λ."""
        if self.config.log_snr_schedule == "linear":
            return (self.config.log_snr_max - log_snr) / (self.config.log_snr_max - self.config.log_snr_min)
        return (torch.atan(torch.exp(-log_snr / 2)) - self._b) / self._a

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Add noise to clean samples: z = αx + σε.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, …)`): x.
            noise (`torch.Tensor` of the same shape): ε ~ N(0, I).
            timesteps (`torch.Tensor` of shape `(batch,)`): Integers or floats in [-1, num_train_timesteps - 1].

        Returns:
            `torch.Tensor`: z, in the shape and dtype of x.
        """
        alpha, sigma = self._alpha_sigma_like(original_samples, timesteps)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Return v = αε - σx, the target of `prediction_type="v_prediction"` (Salimans & Ho 2022, arXiv 2202.00512).

        Args:
            sample (`torch.Tensor` of shape `(batch, …)`): x, clean samples.
            noise (`torch.Tensor` of the same shape): ε ~ N(0, I).
            timesteps (`torch.Tensor` of shape `(batch,)`): As in `add_noise`.

        Returns:
            `torch.Tensor`: v, in the shape and dtype of x.
        """
        alpha, sigma = self._alpha_sigma_like(sample, timesteps)
        return alpha * noise - sigma * sample

    def _alpha_sigma_like(self, sample: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return α and σ at `timesteps`, of shape `(batch, 1, …)` and the dtype of `sample`."""
        alpha, sigma = self.alpha_sigma(self.u(timesteps.to(sample.device)))
        shape = (-1,) + (1,) * (sample.ndim - 1)
        return alpha.view(shape).to(sample.dtype), sigma.view(shape).to(sample.dtype)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Set the λ of Algorithm 2: u evenly spaced from 1 (λ_min) to 0 (λ_max), both included.

        Args:
            num_inference_steps (`int`): T, the number of network evaluations, at least 1.
            device (`str` or `torch.device`, *optional*): Device of `timesteps`.

        Raises:
            ValueError: If `num_inference_steps` is not an integer of at least 1.
        """
        is_integer = hasattr(num_inference_steps, "__index__") and not isinstance(num_inference_steps, bool)
        if not is_integer or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer of at least 1, but is {num_inference_steps!r}.")
        u = torch.linspace(1, 0, num_inference_steps, dtype=torch.float64)
        self.num_inference_steps = num_inference_steps
        self.timesteps = self.timestep(u).to(device=device, dtype=torch.float32)
        # Kept on the host in double precision, so that a step does not synchronize with the device or lose digits.
        self._log_snrs = self.log_snr(u).tolist()
        self._step_index = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample` unchanged: the network's input is z, whose variance the process preserves."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LogSNRSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Take one step of Algorithm 2, from z at λ to z at the next λ' > λ.

        Args:
            model_output (`torch.Tensor` of shape `(batch, …)`): The (guided) prediction, of type `prediction_type`.
            timestep (`torch.Tensor` of shape `()`): Element of `timesteps` at which `model_output` was predicted. Used
                only in the first step; the following steps are counted.
            sample (`torch.Tensor` of the same shape): z.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise. A list has one
                generator per sample.
            return_dict (`bool`): Whether to return a `LogSNRSchedulerOutput` instead of a tuple.

        Returns:
            `LogSNRSchedulerOutput` or `tuple`: z at λ' (x̃ after the last step), in the dtype of `sample`, and x̃.

        Raises:
            ValueError: If `set_timesteps` was not called, or `timestep` is not in `timesteps`.
        """
        if self._log_snrs is None:
            raise ValueError("The number of steps is not set. Call set_timesteps before step.")
        if self._step_index is None:
            self._step_index = self._index_of(timestep)
        i = self._step_index
        self._step_index += 1

        z, log_snr = sample.float(), self._log_snrs[i]
        x = self.predict_original_sample(model_output.float(), z, log_snr)
        if i == len(self._log_snrs) - 1:
            prev_sample = x
        else:
            prev_sample = self._posterior_sample(z, x, log_snr, self._log_snrs[i + 1], generator)

        prev_sample, x = prev_sample.to(sample.dtype), x.to(sample.dtype)
        if not return_dict:
            return prev_sample, x
        return LogSNRSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x)

    def _index_of(self, timestep: torch.Tensor | float) -> int:
        """Return the index of `timestep` in `timesteps`."""
        matches = (self.timesteps == timestep).nonzero()
        if len(matches) == 0:
            raise ValueError(
                f"timestep {float(timestep)} is not one of the {self.num_inference_steps} values of "
                "scheduler.timesteps. Loop over scheduler.timesteps."
            )
        return int(matches[0].item())

    def predict_original_sample(
        self, model_output: torch.Tensor, sample: torch.Tensor, log_snr: float | torch.Tensor
    ) -> torch.Tensor:
        """
        Convert a prediction at z and λ to the clean sample x̃, clipped if the scheduler clips.

        Args:
            model_output (`torch.Tensor` of shape `(batch, …)`): Prediction, of type `prediction_type`.
            sample (`torch.Tensor` of the same shape): z.
            log_snr (`float` or `torch.Tensor` that broadcasts against z): λ.

        Returns:
            `torch.Tensor`: x̃, in the shape of z.
        """
        alpha, sigma = self._alpha_sigma_of(log_snr)
        if self.config.prediction_type == "epsilon":
            x = (sample - sigma * model_output) / alpha
        elif self.config.prediction_type == "v_prediction":
            x = alpha * sample - sigma * model_output
        else:
            x = model_output
        return self._clip(x)

    def _posterior_sample(
        self,
        z: torch.Tensor,
        x: torch.Tensor,
        log_snr: float,
        next_log_snr: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Sample z' ~ N(μ̃(z, x), (σ̃²)^(1-v) (σ²)^v), equations 3 and 4 and the sampling variance of section 2."""
        v = self.config.variance_interpolation
        (alpha, sigma), (next_alpha, next_sigma) = self._alpha_sigma_of(log_snr), self._alpha_sigma_of(next_log_snr)
        ratio = math.exp(log_snr - next_log_snr)  # e^(λ - λ')
        one_minus_ratio = -math.expm1(log_snr - next_log_snr)

        mean = ratio * (next_alpha / alpha) * z + one_minus_ratio * next_alpha * x
        posterior_variance = one_minus_ratio * next_sigma**2
        forward_variance = one_minus_ratio * sigma**2
        variance = posterior_variance ** (1 - v) * forward_variance**v
        noise = randn_tensor(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        return mean + math.sqrt(variance) * noise

    @staticmethod
    def _alpha_sigma_of(log_snr: float | torch.Tensor) -> tuple[float, float] | tuple[torch.Tensor, torch.Tensor]:
        """Return α = sigmoid(λ)^½ and σ = sigmoid(-λ)^½."""
        if isinstance(log_snr, torch.Tensor):
            return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))

    def _clip(self, x: torch.Tensor) -> torch.Tensor:
        """Bound x̃ `(batch, …)` by the range of the data, or by a quantile of |x̃|."""
        if not self.config.clip_sample:
            return x
        if self.config.thresholding and self.config.sample_max_value > 1:
            bound = torch.quantile(x.flatten(1).abs(), self.config.dynamic_thresholding_ratio, dim=1)
            bound = bound.clamp(1, self.config.sample_max_value).view(-1, *(1,) * (x.ndim - 1))
            return x.clamp(-bound, bound) / bound
        return x.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
