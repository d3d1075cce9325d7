"""The sampling engine against loops of diffusers, on the same network and the same noise.

python -m jobs.benchmarks.sampling [REPEATS]

Prints, for one request and for eight requests of 10, 20 or 50 DDIM steps, the time of each way to
draw them, interleaved, and how many times as fast the engine is (paired, with a 95 % bootstrap
interval); for one request also with compiled networks, which takes some minutes. Outputs are
compared first. Everything runs on one thread, so processor seconds are what an idle machine would
take, and the ratios are of them: other load hardly disturbs them. Exits 1 where a target is missed.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from raysynth.condition import Condition
from raysynth.config.model import LatentDiffusionConfig
from raysynth.diffusion.schedule import build_schedule
from raysynth.models.conditioner import ConditionBatch, EncodedCondition, collate
from raysynth.models.denoiser import Denoiser, build_denoiser
from raysynth.sampling.engine import SampleRequest, SamplingEngine

LATENT_SHAPE, SAMPLE_SIZE = (4, 16, 16), 64
MIXED_STEPS = (50, 10, 20, 50, 10, 20, 50, 10)
ENGINE_SLOTS = 4
"""For eight requests. More slots gain little per row here, and stand idle while the last finish."""

Latents = dict[str, torch.Tensor]
Policy = Callable[[], Latents]


@dataclass(frozen=True)
class Comparison:
    """Ways to draw the same requests; ratios are of each to the first.

    `targets` are the least ratios that other ways must show.
    """

    title: str
    policies: dict[str, Policy]
    targets: dict[str, float]


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    repeats = int(arguments[0]) if arguments else 11
    torch.set_num_threads(1)
    denoiser = make_network((32, 64, 80), LATENT_SHAPE)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    print(
        f"{count / 1e6:.2f} M parameters, latent {LATENT_SHAPE}, torch {torch.__version__}, "
        f"1 thread of {os.cpu_count()}, load {os.getloadavg()[0]:.2f}"
    )
    _print_batch_curve(denoiser)
    _print_overhead()
    missed = False
    for guidance_scale in (2.0, 1.0):
        for comparison in _comparisons(denoiser, guidance_scale):
            _check_equal(comparison)
            missed |= not _measure(comparison, repeats)
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    return int(missed)


def make_network(channels: tuple[int, ...], latent_shape: tuple[int, ...]) -> Denoiser:
    """A small U-Net of system A, whose layers that begin as zero are filled as by training."""
    torch.manual_seed(0)
    config = LatentDiffusionConfig(
        autoencoder="none",
        channels=channels,
        attention_levels=(False, True, True),
        num_res_blocks=1,
        num_head_channels=16,
        norm_num_groups=16,
    )
    denoiser = build_denoiser(config, latent_shape[0], latent_shape[1]).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():  # zero at the start; a trained network's are not
                parameter.normal_(std=0.02)
    return denoiser


def _request(number: int, steps: int, guidance_scale: float) -> SampleRequest:
    condition = Condition(box=(20, 8 + number, 30, 18 + number), attributes=(3, 4, 1, 2, 5))
    return SampleRequest(f"{number}", number, condition, "ddim", steps, guidance_scale)


def _comparisons(denoiser: Denoiser, guidance_scale: float) -> list[Comparison]:
    one = [_request(0, 50, guidance_scale)]
    mixed = [_request(i, steps, guidance_scale) for i, steps in enumerate(MIXED_STEPS)]
    # Copies: engines change their network's memory format.
    loops = _DiffusersLoops(deepcopy(denoiser), guided=guidance_scale != 1)
    compiled_loops = _DiffusersLoops(deepcopy(denoiser), guided=guidance_scale != 1)
    compiled_loops.network = torch.compile(compiled_loops.network, dynamic=False)
    single, compiled, several = (
        SamplingEngine(
            deepcopy(denoiser),
            build_schedule("scaled_linear"),
            "epsilon",
            LATENT_SHAPE,
            SAMPLE_SIZE,
            slots,
            guided=guidance_scale != 1,
            compiled=is_compiled,
        )
        for slots, is_compiled in ((1, False), (1, True), (ENGINE_SLOTS, False))
    )
    by_steps = sorted(mixed, key=lambda request: -request.num_inference_steps)
    return [
        Comparison(
            f"1 request, 50 DDIM steps, guidance {guidance_scale:g}",
            {
                "raysynth engine": lambda: _drawn(single, one),
                "diffusers loop": lambda: loops.one_by_one(one),
            },
            {"diffusers loop": 1.0},
        ),
        Comparison(
            f"1 request, 50 DDIM steps, guidance {guidance_scale:g}, compiled",
            {
                "raysynth engine, compiled": lambda: _drawn(compiled, one),
                "diffusers loop": lambda: loops.one_by_one(one),
                "diffusers loop, compiled": lambda: compiled_loops.one_by_one(one),
            },
            {"diffusers loop": 1.0},
        ),
        Comparison(
            f"8 requests of 10-50 DDIM steps, guidance {guidance_scale:g}",
            {
                "raysynth engine": lambda: _drawn(several, by_steps),
                "diffusers, one by one": lambda: loops.one_by_one(mixed),
                "diffusers, padded batch": lambda: loops.padded(mixed),
                "diffusers, grouped by steps": lambda: loops.grouped(mixed),
            },
            {"diffusers, one by one": 1.3},
        ),
    ]


def _drawn(engine: SamplingEngine, requests: list[SampleRequest]) -> Latents:
    return {finished.sample_id: finished.x_0 for finished in engine.run(requests)}


class _DiffusersLoops:
    """What careful users of diffusers write: one batched call a step, conditions encoded once."""

    def __init__(self, denoiser: Denoiser, guided: bool) -> None:
        self.denoiser, self.network, self.guided = denoiser, denoiser.predict, guided

    def one_by_one(self, requests: list[SampleRequest]) -> Latents:
        """As a pipeline is called: one request after another."""
        return {name: x_0 for one in requests for name, x_0 in self._batch([one]).items()}

    def grouped(self, requests: list[SampleRequest]) -> Latents:
        """Requests of equal step counts share a batch."""
        groups = defaultdict(list)
        for request in requests:
            groups[request.num_inference_steps].append(request)
        return {name: x_0 for group in groups.values() for name, x_0 in self._batch(group).items()}

    @torch.inference_mode()
    def padded(self, requests: list[SampleRequest]) -> Latents:
        """One batch for all; whoever has finished stays in it until the last one has."""
        schedulers = [_scheduler(request) for request in requests]
        x_t, encoded = self._start(requests)
        for step in range(max(len(scheduler.timesteps) for scheduler in schedulers)):
            timesteps = torch.stack(
                [s.timesteps[min(step, len(s.timesteps) - 1)] for s in schedulers]
            )
            prediction = self._predict(x_t, timesteps, encoded, requests[0].guidance_scale)
            for row, scheduler in enumerate(schedulers):
                if step < len(scheduler.timesteps):
                    x_t[row] = scheduler.step(
                        prediction[row], scheduler.timesteps[step], x_t[row], return_dict=False
                    )[0]
        return {request.sample_id: x_t[row] for row, request in enumerate(requests)}

    @torch.inference_mode()
    def _batch(self, requests: list[SampleRequest]) -> Latents:
        scheduler = _scheduler(requests[0])
        x_t, encoded = self._start(requests)
        for timestep in scheduler.timesteps:
            prediction = self._predict(
                x_t, timestep.expand(len(x_t)), encoded, requests[0].guidance_scale
            )
            x_t = scheduler.step(prediction, timestep, x_t, return_dict=False)[0]
        return {request.sample_id: x_t[row] for row, request in enumerate(requests)}

    def _start(self, requests: list[SampleRequest]) -> tuple[torch.Tensor, EncodedCondition]:
        noise = [
            torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(request.seed))
            for request in requests
        ]
        null = [Condition()] * len(requests) if self.guided else []
        conditions = [*null, *(request.condition for request in requests)]
        return torch.stack(noise), self.denoiser.encode(collate(conditions, SAMPLE_SIZE))

    def _predict(
        self,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        encoded: EncodedCondition,
        guidance_scale: float,
    ) -> torch.Tensor:
        if not self.guided:
            return self.network(x_t, timesteps, encoded)
        both = self.network(torch.cat([x_t] * 2), torch.cat([timesteps] * 2), encoded)
        null, conditional = both.chunk(2)
        return null + guidance_scale * (conditional - null)


def _scheduler(request: SampleRequest) -> Any:
    scheduler: Any = DDIMScheduler(  # type: ignore[no-untyped-call]
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(request.num_inference_steps)
    return scheduler


class _NoNetwork(torch.nn.Module):
    """Costs nothing, so that what a loop adds to its network calls can be measured alone."""

    def encode(self, condition: ConditionBatch) -> EncodedCondition:
        """Nothing."""
        return EncodedCondition(torch.zeros(len(condition), 1, 1, 1), None)

    def predict(self, x_t: torch.Tensor, *_: object) -> torch.Tensor:
        """No noise anywhere."""
        return torch.zeros_like(x_t)


def _print_overhead() -> None:
    """Microseconds a step that are not the network's, one guided request."""
    denoiser: Any = _NoNetwork()
    policies = _comparisons(denoiser, guidance_scale=2.0)[0].policies
    for name, policy in policies.items():
        seconds = []
        for _ in range(20):
            start = time.process_time()
            policy()
            seconds.append(time.process_time() - start)
        print(f"{name}: {1e6 * min(seconds) / 50:.0f} us a step besides the network")


def _print_batch_curve(denoiser: Denoiser) -> None:
    """f(b): milliseconds a row of a network call, by rows. It says what batching can gain."""
    costs = []
    for rows in (1, 2, 4, 8, 16):
        encoded = denoiser.encode(collate([Condition()] * rows, SAMPLE_SIZE))
        x_t, timestep = torch.randn(rows, *LATENT_SHAPE), torch.full((rows,), 500)
        seconds = []
        with torch.inference_mode():
            for _ in range(12):
                start = time.process_time()
                denoiser.predict(x_t, timestep, encoded)
                seconds.append(time.process_time() - start)
        costs.append(f"{1e3 * min(seconds) / rows:.2f}")
    print("ms a row at 1 / 2 / 4 / 8 / 16 rows: " + " / ".join(costs))


def _check_equal(comparison: Comparison) -> None:
    """All ways must give the same latents; this also warms them up."""
    first, *others = (policy() for policy in comparison.policies.values())
    worst = max(
        float((other[name] - x_0).abs().max() / x_0.abs().max().clamp(min=1))
        for other in others
        for name, x_0 in first.items()
    )
    print(f"\n{comparison.title}: outputs differ by at most {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit("the ways do not draw the same samples: nothing to compare")


def _measure(comparison: Comparison, repeats: int) -> bool:
    """Times all ways in turn, in rotating order; returns whether the targets are met."""
    names = list(comparison.policies)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    wall_seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            start, wall_start = time.process_time(), time.perf_counter()
            comparison.policies[name]()
            seconds[name].append(time.process_time() - start)
            wall_seconds[name].append(time.perf_counter() - wall_start)
    met = True
    for name in names:
        wall = 1e3 * np.median(wall_seconds[name])
        line = f"  {name:28s} {1e3 * np.median(seconds[name]):8.1f} ms (wall {wall:.1f})"
        if name != names[0]:
            ratio, low, high = _paired_ratio(seconds[name], seconds[names[0]])
            line += f"   engine is {ratio:.2f}x as fast [{low:.2f}, {high:.2f}]"
            target = comparison.targets.get(name)
            if target is not None:
                met &= ratio >= target
                line += f"   target {target:g}: {'met' if ratio >= target else 'MISSED'}"
        print(line)
    return met


def _paired_ratio(peer: list[float], engine: list[float]) -> tuple[float, float, float]:
    """Median ratio over repeats, and its 95 % bootstrap interval."""
    ratios = np.array(peer) / np.array(engine)
    draws = np.random.default_rng(0).choice(ratios, size=(4000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
