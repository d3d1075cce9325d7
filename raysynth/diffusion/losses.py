"""What diffusion training minimises, one number a sample."""

from __future__ import annotations

from torch import Tensor

from raysynth.config.model import LossName, PredictionType
from raysynth.diffusion.schedule import NoiseSchedule, prediction_target, x_0_weights


def diffusion_loss(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    prediction: Tensor,
    x_0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    weight: Tensor | None = None,
    *,
    loss: LossName = "l2",
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean error of each sample's prediction, (B,) (Ho et al. 2020, eq. 14).

    Args:
        schedule: the noise schedule.
        prediction_type: what the network predicts.
        prediction: the network's output for x_t, (B, C, ...).
        x_0: clean samples.
        noise: the noise in x_t.
        timestep: integers (B,).
        weight: of every pixel, (B, 1, ...); None: all count the same.
        loss: `l2` takes squared errors, `l1` absolute ones.
        snr_gamma: weigh timesteps by `min_snr_weight` with this gamma; None: all the same.
    """
    target = prediction_target(schedule, prediction_type, x_0, noise, timestep)
    difference = prediction.float() - target.float()
    errors = difference.square() if loss == "l2" else difference.abs()
    if weight is None:
        losses = errors.flatten(1).mean(dim=1)
    else:
        weights = weight.expand_as(errors)
        losses = (weights * errors).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)
    if snr_gamma is None:
        return losses
    return losses * min_snr_weight(schedule, prediction_type, timestep, snr_gamma).to(losses)


def min_snr_weight(
    schedule: NoiseSchedule, prediction_type: PredictionType, timestep: Tensor, gamma: float
) -> Tensor:
    """Weight of a squared error of the prediction, float64 (B,) (Hang et al. 2023, section 3).

    It is min(snr, gamma) for squared errors of x_0. As x_0 = p x_t + q prediction, those are q^2
    times the prediction's, hence min(snr, gamma) q^2: min(snr, gamma) / snr for epsilon,
    min(snr, gamma) / (snr + 1) for v_prediction, and min(snr, gamma) sigma^2 for flow.
    """
    alpha, sigma = schedule.at(timestep)
    _, q = x_0_weights(prediction_type, alpha, sigma)
    return (alpha / sigma).square().clamp(max=gamma) * q.square()
