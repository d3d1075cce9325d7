"""Samplers as tables: one row of weights a step, so that a batch may mix samplers and positions.

Every sampler here is linear in what it knows:

    x_next = a x_t + b x_0 + c x_0_prev + d noise

where x_0 is the network's present estimate, x_0_prev the one of the step before, and a-d follow
from the noise levels alone. Rows of several tables make one vectorised update of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError

SamplerName = Literal["ddpm", "ddim", "dpm_solver++"]


@dataclass(frozen=True)
class StepTable:
    """The whole course of one sample, from noise to x_0.

    Attributes:
        timesteps: descending timesteps at which the network is called, int64 (K,).
        weights: a, b, c, d of every step, float64 (K, 4).
    """

    timesteps: Tensor
    weights: Tensor

    @property
    def is_stochastic(self) -> bool:
        """Whether any step draws noise."""
        return bool((self.weights[:, 3] != 0).any())


def inference_timesteps(schedule: NoiseSchedule, num_inference_steps: int) -> Tensor:
    """Descending timesteps with `trailing` spacing: from the last one, in equal strides.

    The first call then sees pure noise, as in training (Lin et al. 2023, table 2); diffusers
    calls it `timestep_spacing="trailing"`. As many steps as training timesteps visit all.

    Raises:
        InputError: no step at all, or more than there are timesteps.
    """
    count = schedule.num_train_timesteps
    if not 1 <= num_inference_steps <= count:
        raise InputError(
            f"num_inference_steps {num_inference_steps}: this model allows 1 to {count}"
        )
    remaining = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64)
    return (remaining * count / num_inference_steps).round().long() - 1


def step_table(
    sampler: SamplerName, schedule: NoiseSchedule, num_inference_steps: int
) -> StepTable:
    """The table of a sampler. The last step of each returns its estimate of x_0.

    `ddpm` uses the posterior variance (diffusers' `fixed_small`), `ddim` eta 0, `dpm_solver++` the
    second-order multistep solver, of first order in its first and last step (as diffusers).

    Raises:
        InputError: num_inference_steps does not fit the schedule.
    """
    timesteps = inference_timesteps(schedule, num_inference_steps)
    alpha_bar = schedule.alphas_cumprod[timesteps]
    alpha_bar_next = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
    match sampler:
        case "ddpm":
            weights = _ddpm(alpha_bar, alpha_bar_next)
        case "ddim":
            weights = _ddim(alpha_bar, alpha_bar_next)
        case "dpm_solver++":
            weights = _dpm_solver(alpha_bar, alpha_bar_next)
    return StepTable(timesteps, weights)


def sampler_step(
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    x_t: Tensor,
    x_0: Tensor,
    x_0_prev: Tensor,
    noise: Tensor,
) -> Tensor:
    """The update a x_t + b x_0 + c x_0_prev + d noise of a batch.

    Args:
        weights: a, b, c, d, each (B, 1, ...).
        x_t: samples (B, C, ...).
        x_0: the network's estimate at this step.
        x_0_prev: the estimate at the step before (any finite value at the first step).
        noise: standard normal (any finite value where d is 0).
    """
    a, b, c, d = weights
    x_next = torch.addcmul(a * x_t, b, x_0)
    return x_next.addcmul_(c, x_0_prev).addcmul_(d, noise)


def _ddpm(alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """Mean and variance of q(x_next | x_t, x_0) (Ho et al. 2020, eq. 7), strided."""
    alpha = alpha_bar / alpha_bar_next
    beta = 1 - alpha
    a = alpha.sqrt() * (1 - alpha_bar_next) / (1 - alpha_bar)
    b = alpha_bar_next.sqrt() * beta / (1 - alpha_bar)
    d = (beta * (1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
    return torch.stack([a, b, torch.zeros_like(a), d], dim=1)


def _ddim(alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """Song et al. 2021, eq. 12 with sigma 0; epsilon is written as (x_t - alpha x_0) / sigma."""
    a = ((1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
    b = alpha_bar_next.sqrt() - alpha_bar.sqrt() * a
    zero = torch.zeros_like(a)
    return torch.stack([a, b, zero, zero], dim=1)


def _dpm_solver(alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2). Its first order is DDIM.

    With lambda = log(alpha / sigma), h = lambda_next - lambda and r = h_before / h, the step
    replaces x_0 by (1 + 1/(2r)) x_0 - 1/(2r) x_0_prev.
    """
    weights = _ddim(alpha_bar, alpha_bar_next)
    half_log_snr = 0.5 * torch.log(alpha_bar / (1 - alpha_bar))
    h = half_log_snr.diff()
    inner = slice(1, len(alpha_bar) - 1)
    correction = h[1:] / (2 * h[:-1])
    b = weights[inner, 1].clone()
    weights[inner, 1] = b * (1 + correction)
    weights[inner, 2] = -b * correction
    return weights
