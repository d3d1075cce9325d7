"""Samplers as tables: one row of weights a step, so that a batch may mix samplers and positions.

Every sampler here is linear in what it knows:

    x_next = a x_t + b x_0 + c x_0_prev + d x_0_prev2 + e noise

where x_0 is the network's present estimate, x_0_prev and x_0_prev2 are those one and two steps
before, and a-e follow from the noise levels alone. Rows of several tables make one vectorised
update of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raysynth.config.sampling import SamplerName
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError

NUM_WEIGHTS = 5
"""Of a step: a-e."""


@dataclass(frozen=True)
class StepTable:
    """The whole course of one sample, from noise to x_0.

    Attributes:
        timesteps: descending timesteps at which the network is called, int64 (K,).
        weights: a-e of every step, float64 (K, 5).
    """

    timesteps: Tensor
    weights: Tensor

    @property
    def is_stochastic(self) -> bool:
        """Whether any step draws noise."""
        return bool((self.weights[:, 4] != 0).any())


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
    second-order multistep solver, of first order in its first and last step (as diffusers), and
    `unipc` adds a corrector to it. On `rectified_flow`, `ddim` is Euler's method.

    Raises:
        InputError: the sampler or num_inference_steps does not fit the schedule.
    """
    if sampler == "ddpm" and not schedule.is_variance_preserving:
        raise InputError(
            "sampler ddpm needs a variance-preserving schedule: use ddim, dpm_solver++ or unipc"
        )
    timesteps = inference_timesteps(schedule, num_inference_steps)
    # The levels before each step, and x_0 as the last one: (K + 1,).
    alpha, sigma = schedule.at(timesteps)
    alpha, sigma = torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])
    match sampler:
        case "ddpm":
            weights = _ddpm(alpha, sigma)
        case "ddim":
            weights = _ddim(alpha, sigma)
        case "dpm_solver++":
            weights = _dpm_solver(alpha, sigma)
        case "unipc":
            weights = _unipc(alpha, sigma)
    return StepTable(timesteps, weights)


def sampler_step(
    weights: Sequence[Tensor],
    x_t: Tensor,
    x_0: Tensor,
    x_0_prev: Tensor,
    x_0_prev2: Tensor,
    noise: Tensor,
) -> Tensor:
    """The update a x_t + b x_0 + c x_0_prev + d x_0_prev2 + e noise of a batch.

    Args:
        weights: a-e, each (B, 1, ...).
        x_t: samples (B, C, ...).
        x_0: the network's estimate at this step.
        x_0_prev: the estimate one step before (any finite value at the first step).
        x_0_prev2: the estimate two steps before (any finite value at the first two).
        noise: standard normal (any finite value where e is 0).
    """
    a, b, c, d, e = weights
    x_next = torch.addcmul(a * x_t, b, x_0)
    return x_next.addcmul_(c, x_0_prev).addcmul_(d, x_0_prev2).addcmul_(e, noise)


def _ddpm(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Mean and variance of q(x_next | x_t, x_0) (Ho et al. 2020, eq. 7), strided."""
    ratio = alpha[:-1] / alpha[1:]
    beta = 1 - ratio.square()
    a = ratio * (sigma[1:] / sigma[:-1]).square()
    b = alpha[1:] * beta / sigma[:-1].square()
    e = beta.sqrt() * sigma[1:] / sigma[:-1]
    return _rows(a, b, e=e)


def _ddim(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Song et al. 2021, eq. 12 with sigma 0; epsilon is written as (x_t - alpha x_0) / sigma."""
    a = sigma[1:] / sigma[:-1]
    b = alpha[1:] - alpha[:-1] * a
    return _rows(a, b)


def _dpm_solver(alpha: Tensor, sigma: Tensor) -> Tensor:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2). Its first order is DDIM.

    With lambda = log(alpha / sigma), h = lambda_next - lambda and r = h_before / h, the step
    replaces x_0 by (1 + 1/(2r)) x_0 - 1/(2r) x_0_prev. Where the first step starts from pure noise,
    its h is infinite, and the second step is of first order, too.
    """
    a, b, *_ = _ddim(alpha, sigma).unbind(1)
    h = torch.log(alpha / sigma).diff()
    correction = torch.zeros_like(b)
    correction[1:-1] = h[1:-1] / (2 * h[:-2])
    return _rows(a, b * (1 + correction), -b * correction)


def _unipc(alpha: Tensor, sigma: Tensor) -> Tensor:
    """UniPC-2 with B(h) = exp(h) - 1, on x_0 (Zhao et al. 2023, sections 3.1 and 3.2).

    Its predictor UniP-2 is DPM-Solver++(2M). Before the next step, its corrector UniC repeats the
    last one with the new x_0. Both add to the step of DDIM, b of which is the weight of x_0_prev:

        predictor: b / (2r) (x_0_prev - x_0_prev2)
        corrector: b rho_0 / r (x_0_prev - x_0_prev2) + b rho_1 (x_0 - x_0_prev)

    So x_t + v (x_0_prev - x_0_prev2) + u (x_0 - x_0_prev) is the corrected sample. The rho solve
    rho_0 + rho_1 = g_1 and -r rho_0 + rho_1 = g_2, where g_n = n! h phi_(n+1)(-h) / (1 - exp(-h)).
    """
    a, b, c, *_ = _dpm_solver(alpha, sigma).unbind(1)
    b_before = _ddim(alpha, sigma)[:-1, 1]
    h = torch.log(alpha / sigma).diff()
    r, h = h[:-2] / h[1:-1], h[1:-1]
    g_1 = -1 / h - 1 / torch.expm1(-h)
    g_2 = -2 * g_1 / h - 1 / torch.expm1(-h)
    rho_0 = (g_1 - g_2) / (1 + r)
    u, v = torch.zeros_like(a), torch.zeros_like(a)
    u[1:2] = b_before[:1] / 2  # there is one step to correct, of first order
    u[2:] = b_before[1:] * (g_1 - rho_0)
    v[2:] = b_before[1:] * (rho_0 - 0.5) / r
    return _rows(a, b + a * u, c + a * (v - u), -a * v)


def _rows(
    a: Tensor, b: Tensor, c: Tensor | None = None, d: Tensor | None = None, e: Tensor | None = None
) -> Tensor:
    """The weights of K steps, (K, 5); those that are not given are 0."""
    zero = torch.zeros_like(a)
    return torch.stack([zero if part is None else part for part in (a, b, c, d, e)], dim=1)
