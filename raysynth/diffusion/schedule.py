"""Noise schedules, and the algebra between x_0, x_t, noise and a network's prediction.

Symbols follow DDPM (Ho et al. 2020): x_t = alpha_t x_0 + sigma_t noise with
alpha_t = sqrt(alphas_cumprod[t]) and sigma_t = sqrt(1 - alphas_cumprod[t]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raysynth.config.model import Diffusion

PredictionType = Literal["epsilon", "sample", "v_prediction"]
ScheduleName = Literal["linear", "scaled_linear", "cosine"]


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise x_t holds at each timestep 0 .. num_train_timesteps - 1.

    Attributes:
        betas: variance added by each forward step, float64 (num_train_timesteps,).
        alphas_cumprod: share of x_0's variance that is left, float64 (num_train_timesteps,).
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def num_train_timesteps(self) -> int:
        """Number of noise levels the network is trained on."""
        return len(self.betas)

    @classmethod
    def from_config(cls, config: Diffusion) -> NoiseSchedule:
        """The schedule a model is configured for."""
        return build_schedule(config.schedule, config.num_train_timesteps)


def build_schedule(name: ScheduleName, num_train_timesteps: int = 1000) -> NoiseSchedule:
    """One of the usual schedules, with the values diffusers gives it.

    `linear`: betas 1e-4 to 0.02 (DDPM). `scaled_linear`: sqrt(beta) linear from .00085 to .012
    (latent diffusion). `cosine`: Nichol & Dhariwal 2021, eq. 17, betas capped at .999.
    """
    steps = num_train_timesteps
    match name:
        case "linear":
            betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        case "scaled_linear":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
        case "cosine":
            time = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return NoiseSchedule(betas, torch.cumprod(1 - betas, dim=0))


def alpha_sigma(schedule: NoiseSchedule, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of each sample, shaped to multiply `like` (B, C, ...).

    Args:
        schedule: the noise schedule.
        timestep: integers (B,).
        like: gives number of axes, type and device.
    """
    alpha_bar = schedule.alphas_cumprod.to(timestep.device)[timestep]
    alpha_bar = alpha_bar.view(-1, *[1] * (like.ndim - 1))
    return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)


def q_sample(schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t, drawn from q(x_t | x_0) (DDPM eq. 4)."""
    alpha, sigma = alpha_sigma(schedule, timestep, x_0)
    return alpha * x_0 + sigma * noise


def prediction_target(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    x_0: Tensor,
    noise: Tensor,
    timestep: Tensor,
) -> Tensor:
    """What a perfect network returns for x_t. v = alpha noise - sigma x_0 (Salimans & Ho 2022)."""
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "v_prediction":
            alpha, sigma = alpha_sigma(schedule, timestep, x_0)
            return alpha * noise - sigma * x_0


def x_0_weights(prediction_type: PredictionType, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Weights p, q such that x_0 = p x_t + q prediction."""
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    match prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        case "v_prediction":
            return alpha, -sigma


def predicted_x_0(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    x_t: Tensor,
    prediction: Tensor,
    timestep: Tensor,
) -> Tensor:
    """The x_0 that a network's prediction for x_t implies, each sample at its own timestep."""
    alphas_cumprod = schedule.alphas_cumprod.to(timestep.device)[timestep]
    p, q = (
        weight.view(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        for weight in x_0_weights(prediction_type, alphas_cumprod)
    )
    return p * x_t + q * prediction
