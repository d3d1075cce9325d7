"""What diffusion training minimises, one number a sample."""

from __future__ import annotations

from torch import Tensor

from raysynth.diffusion.schedule import NoiseSchedule, PredictionType, prediction_target


def diffusion_loss(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    prediction: Tensor,
    x_0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of each sample's prediction, (B,) (Ho et al. 2020, eq. 14).

    Args:
        schedule: the noise schedule.
        prediction_type: what the network predicts.
        prediction: the network's output for x_t, (B, C, ...).
        x_0: clean samples.
        noise: the noise in x_t.
        timestep: integers (B,).
        weight: of every pixel, (B, 1, ...); None: all count the same.
    """
    target = prediction_target(schedule, prediction_type, x_0, noise, timestep)
    errors = (prediction.float() - target.float()).square()
    if weight is None:
        return errors.flatten(1).mean(dim=1)
    weights = weight.expand_as(errors)
    return (weights * errors).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)
