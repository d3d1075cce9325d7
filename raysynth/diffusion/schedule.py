"""Noise schedules, and the algebra between x_0, x_t, noise and a network's prediction.

Everywhere x_t = alpha_t x_0 + sigma_t noise, and snr = (alpha_t / sigma_t)^2 (Kingma et al. 2021).
Variance-preserving schedules have alpha^2 = alphas_cumprod of DDPM (Ho et al. 2020) and
sigma^2 = 1 - alpha^2. Rectified flow has alpha = 1 - sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysynth.config.model import Diffusion, PredictionType, ScheduleName


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of x_0 and of noise x_t holds at each timestep 0 .. num_train_timesteps - 1.

    Attributes:
        alphas: factor of x_0, float64 (num_train_timesteps,).
        sigmas: factor of the noise, float64 (num_train_timesteps,).
    """

    alphas: Tensor
    sigmas: Tensor

    @property
    def num_train_timesteps(self) -> int:
        """Number of noise levels the network is trained on."""
        return len(self.alphas)

    @property
    def is_variance_preserving(self) -> bool:
        """Whether x_t has unit variance wherever x_0 has."""
        variances = self.alphas.square() + self.sigmas.square()
        return bool(torch.allclose(variances, torch.ones_like(variances)))

    def at(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """What x_0 and noise are multiplied with, float64, shaped as `timestep`, on its device."""
        return self.alphas.to(timestep.device)[timestep], self.sigmas.to(timestep.device)[timestep]

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same schedule on a device."""
        return NoiseSchedule(self.alphas.to(device), self.sigmas.to(device))

    @classmethod
    def from_config(cls, config: Diffusion) -> NoiseSchedule:
        """The schedule a model is configured for."""
        return build_schedule(config.schedule, config.num_train_timesteps)


def build_schedule(name: ScheduleName, num_train_timesteps: int = 1000) -> NoiseSchedule:
    """One of the usual schedules, with the values diffusers gives it.

    `linear`: betas 1e-4 to 0.02 (DDPM). `scaled_linear`: sqrt(beta) linear from .00085 to .012
    (latent diffusion). `cosine`: Nichol & Dhariwal 2021, eq. 17, betas capped at .999.
    `rectified_flow`: a straight line from x_0 to noise (Liu et al. 2023, eq. 1; Lipman et al. 2023,
    eq. 20 with sigma_min 0), which the last timestep reaches.
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
        case "rectified_flow":
            time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            return NoiseSchedule(1 - time, time)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return NoiseSchedule(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


def alpha_sigma(schedule: NoiseSchedule, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of each sample, shaped to multiply `like` (B, C, ...).

    Args:
        schedule: the noise schedule.
        timestep: integers (B,).
        like: gives number of axes, type and device.
    """
    axes = (-1, *[1] * (like.ndim - 1))
    alpha, sigma = schedule.at(timestep)
    return alpha.view(axes).to(like), sigma.view(axes).to(like)


def q_sample(schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t, drawn from q(x_t | x_0) (DDPM, eq. 4)."""
    alpha, sigma = alpha_sigma(schedule, timestep, x_0)
    return alpha * x_0 + sigma * noise


def prediction_target(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    x_0: Tensor,
    noise: Tensor,
    timestep: Tensor,
) -> Tensor:
    """What a perfect network returns for x_t.

    v = alpha noise - sigma x_0 (Salimans & Ho 2022); flow = noise - x_0, the velocity dx_t / dt of
    rectified flow (Liu et al. 2023, eq. 1, whose time runs the other way).
    """
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "v_prediction":
            alpha, sigma = alpha_sigma(schedule, timestep, x_0)
            return alpha * noise - sigma * x_0
        case "flow":
            return noise - x_0


def x_0_weights(
    prediction_type: PredictionType, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights p, q such that x_0 = p x_t + q prediction.

    `v_prediction` needs a variance-preserving alpha and sigma, `flow` alpha = 1 - sigma.
    """
    match prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        case "v_prediction":
            return alpha, -sigma
        case "flow":
            return torch.ones_like(sigma), -sigma


def predicted_x_0(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    x_t: Tensor,
    prediction: Tensor,
    timestep: Tensor,
) -> Tensor:
    """The x_0 that a network's prediction for x_t implies, each sample at its own timestep."""
    p, q = (
        weight.view(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        for weight in x_0_weights(prediction_type, *schedule.at(timestep))
    )
    return p * x_t + q * prediction
