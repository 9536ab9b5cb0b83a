"""Express a deterministic diffusers scheduler as linear combinations, which any program can follow."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin

from diffusers_cfg.config import UserError

# Of values near 1: float32 rounds a few hundred sums.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Schedule:
    r"""
    A sampler of n network evaluations from noise ε ~ N(0, I):

        z_i = C_i0 ε + Σ_{j<i} C_i,j+1 x̃_j                  the input of evaluation i = 0 … n - 1, at timesteps[i]
        x̃_i = clip(a_i z_i + b_i F(z_i, timesteps[i]))      the predicted sample; F is the guided prediction

    and the image is z_n. All solvers of the pipeline that draw no noise between steps have this form.

    Args:
        timesteps (`list[float]`): n timesteps.
        from_prediction (`list[list[float]]`): n pairs (a_i, b_i).
        combinations (`list[list[float]]`): n + 1 rows of C, row i of length i + 1.
        clip (`float`, *optional*): bound of |x̃|; by default none.
    """

    timesteps: list[float]
    from_prediction: list[list[float]]
    combinations: list[list[float]]
    clip: float | None

    def draw(self, noise: torch.Tensor, predict: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        """
        Sample.

        Args:
            noise (`torch.Tensor` of shape `(batch, …)`): ε.
            predict (`Callable`): the guided prediction, of z_i and i.

        Returns:
            `torch.Tensor` of the shape of `noise`.
        """
        known = [noise]
        for i, (a, b) in enumerate(self.from_prediction):
            z = self._combine(i, known)
            x = a * z + b * predict(z, i)
            known.append(x if self.clip is None else x.clamp(-self.clip, self.clip))
        return self._combine(len(self.timesteps), known)

    def _combine(self, i: int, known: list[torch.Tensor]) -> torch.Tensor:
        """Return z_i."""
        return sum(c * tensor for c, tensor in zip(self.combinations[i], known, strict=True))  # pyright: ignore

    def to_json(self) -> dict[str, Any]:
        """Return the schedule for JSON, with nine significant digits, as float32 has."""
        return {name: rounded(value) for name, value in asdict(self).items()}


def rounded(value: Any) -> Any:
    """Round the numbers in nested lists to nine significant digits."""
    if isinstance(value, list):
        return [rounded(element) for element in value]
    return value if value is None else float(f"{value:.9g}")


def make_schedule(scheduler: SchedulerMixin, num_inference_steps: int) -> Schedule:
    """
    Return the schedule of a scheduler, and test it against the scheduler.

    Args:
        scheduler (`SchedulerMixin`): a scheduler that a `CFGPipeline` accepts.
        num_inference_steps (`int`): the number of steps.

    Raises:
        UserError: if the scheduler draws noise between steps, or has no such form.
    """
    name = type(scheduler).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            schedule = _linear_schedule(scheduler, num_inference_steps)
            difference = _difference(schedule, scheduler, num_inference_steps)
    except NotImplementedError as error:
        raise UserError(f"{name} cannot sample this model: {error}. Pass another --scheduler.") from error
    if not difference <= TOLERANCE:  # it may be NaN
        raise UserError(
            f"{name} cannot be exported: with {num_inference_steps} steps it draws noise between "
            "steps, or is not a linear function of the predictions. Pass --scheduler DPMSolverMultistepScheduler."
        )
    return schedule


def _linear_schedule(scheduler: SchedulerMixin, num_inference_steps: int) -> Schedule:
    """Derive the coefficients: what the scheduler returns for unit vectors in place of ε and of each x̃."""
    settings = {"thresholding": False, "clip_sample": False}
    known = {name: value for name, value in settings.items() if name in _settings_of(scheduler)}
    linear = _started(type(scheduler).from_config(scheduler.config, **known), num_inference_steps)
    size = len(linear.timesteps) + 1
    units = torch.eye(size, dtype=torch.float64).view(size, 1, size, 1, 1)
    z, inputs, from_prediction = units[0] * linear.init_noise_sigma, [], []
    for i, t in enumerate(linear.timesteps):
        scaled = linear.scale_model_input(z, t)
        a, b = _from_prediction(linear, i)
        z = linear.step((units[i + 1] - a * scaled) / b, t, z).prev_sample
        inputs.append(scaled)
        from_prediction.append([a, b])
    rows = [row.flatten()[: i + 1].tolist() for i, row in enumerate([*inputs, z])]
    return Schedule(linear.timesteps.tolist(), from_prediction, rows, _bound(scheduler))


def _difference(schedule: Schedule, scheduler: SchedulerMixin, num_inference_steps: int) -> float:
    """Return the largest difference between the z_i of a schedule and of its scheduler, given x̃ near ±1."""
    generator, scheduler = torch.Generator().manual_seed(0), _started(scheduler, num_inference_steps)
    noise, *samples = torch.randn(len(schedule.timesteps) + 1, 1, 1, 8, 8, generator=generator, dtype=torch.float64)
    options = {"use_clipped_model_output": True}  # as the pipeline does
    options = {name: value for name, value in options.items() if name in inspect.signature(scheduler.step).parameters}
    inputs, expected = [], []

    def predict(z: torch.Tensor, i: int) -> torch.Tensor:
        inputs.append(z)
        a, b = schedule.from_prediction[i]
        return (samples[i] - a * z) / b

    inputs.append(schedule.draw(noise, predict))
    z = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(z, t)
        expected.append(scaled)
        a, b = schedule.from_prediction[i]
        z = scheduler.step((samples[i] - a * scaled) / b, t, z, **options).prev_sample
    return (torch.cat(inputs) - torch.cat([*expected, z])).abs().max().item()


def _settings_of(scheduler: SchedulerMixin) -> set[str]:
    """Return the names of a scheduler's own settings. Its config also has those of other schedulers."""
    return set(inspect.signature(type(scheduler).__init__).parameters)


def _started(scheduler: SchedulerMixin, num_inference_steps: int) -> Any:
    """Return a copy of a scheduler at its first step."""
    started: Any = type(scheduler).from_config(scheduler.config)
    started.set_timesteps(num_inference_steps)
    if hasattr(started, "set_begin_index"):
        started.set_begin_index(0)
    return started


def _bound(scheduler: SchedulerMixin) -> float | None:
    """Return the bound to which a scheduler clips x̃; `None` for none. A bound that depends on x̃ is not linear."""
    settings, config = _settings_of(scheduler), scheduler.config
    if "thresholding" in settings and config.thresholding:
        return float(config.sample_max_value)
    return float(config.clip_sample_range) if "clip_sample" in settings and config.clip_sample else None


def _from_prediction(scheduler: Any, i: int) -> tuple[float, float]:
    """Return a and b of x̃ = a z + b F at a step, from its α and σ, for a prediction F of ε, v = αε - σx or x."""
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[i])  # σ/α
        alpha = (1 + ratio**2) ** -0.5
        sigma = ratio * alpha
    else:
        alpha_squared = float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])
        alpha, sigma = alpha_squared**0.5, (1 - alpha_squared) ** 0.5
    return {
        "epsilon": (1 / alpha, -sigma / alpha),
        "v_prediction": (alpha, -sigma),
        "sample": (0.0, 1.0),
    }[scheduler.config.prediction_type]
