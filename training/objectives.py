"""What the network is trained to predict. Functions over tensors: the network and the scheduler are arguments."""

import torch


def prediction_target(scheduler, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """
    What the network should have said at z = αx + σε: ε, v = αε - σx or x, as the scheduler's `prediction_type` says.

    Args:
        scheduler: has `config.prediction_type` and `get_velocity`.
        x (`torch.Tensor` of shape `(batch, …)`): clean samples.
        noise (`torch.Tensor` of that shape): ε.
        timesteps (`torch.Tensor` of shape `(batch,)`): the network's time.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(x, noise, timesteps)
        case "sample":
            return x
        case other:
            raise ValueError(f"There is no objective for prediction_type {other!r}.")


def squared_error(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """‖pred - target‖² of each sample, averaged over its elements: shape `(batch,)`, float32."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)
