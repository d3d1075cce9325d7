"""A batch of samples by the engine against the loops of diffusers and MONAI: equal latents.

python -m jobs.benchmarks.same_bytes [--volumes] [--repeats N] [--steps N] [--no-compile]

Eight requests of 50 DDIM steps under guidance 2, latents 4 x 32 x 32 (or, two requests, volumes of
32^3 voxels), from the same network and the same noise. All ways encode conditions once, take both
halves of the guidance in one call, and run under `inference_mode` (MONAI's under its own
`no_grad`), on one thread. diffusers' loop also runs as a careful user would have it: channels last
and compiled. Nothing is reported unless the latents agree to 1e-5 of their size. Ways run in turn.
"GEMM alone" is the time that the network's multiplications would take at the rate of a large matrix
product, measured in the same run: no loop can be faster. Prints a table and a line of JSON; exits 1
where a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jobs.benchmarks.ratios import Row, Seconds, facts_of_run, median_row, paired_ratio, report
from jobs.benchmarks.sampling import make_network
from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config import LayoutDiffusionConfig
from raysynth.diffusion.schedule import build_schedule
from raysynth.models.conditioner import ConditionBatch, EncodedCondition, collate
from raysynth.models.denoiser import Denoiser, build_denoiser
from raysynth.sampling.engine import SampleRequest, SamplingEngine

GUIDANCE, TOLERANCE = 2.0, 1e-5
DIFFUSERS, MONAI, STRONG = "diffusers loop", "MONAI inferer", "diffusers loop, compiled"
AT_LEAST = {DIFFUSERS: 1.5, STRONG: 1.0, MONAI: 1.8}

Way = Callable[[], Tensor]
"""Draws all requests: (batch_size, *latent_shape)."""


@dataclass(frozen=True)
class Case:
    """What is drawn: latents, the conditions' grid, how many at once, and what is asked for."""

    latent_shape: tuple[int, ...]
    sample_size: int
    batch_size: int
    condition: Callable[[int], Condition]

    def collate(self, conditions: Sequence[Condition]) -> ConditionBatch:
        """Conditions as the network takes them."""
        return collate(conditions, self.sample_size, len(self.latent_shape) - 1)

    def make_network(self) -> Denoiser:
        """A network that no guidance lets overflow."""
        if len(self.latent_shape) == 3:
            return make_network((32, 48, 64), self.latent_shape)
        torch.manual_seed(0)
        config = LayoutDiffusionConfig(
            channels=(16, 32, 64),
            attention_levels=(False, False, True),
            num_res_blocks=1,
            num_head_channels=16,
            norm_num_groups=16,
        )
        denoiser = build_denoiser(config, 1, self.sample_size, spatial_dims=3).eval()
        with torch.no_grad():
            for parameter in denoiser.parameters():  # MONAI starts output layers at zero
                if not parameter.any():
                    parameter.normal_(std=0.02)
        return denoiser


def _boxed(number: int) -> Condition:
    return Condition(box=(40, 16 + number, 60, 36 + number), attributes=(3, 4, 1, 2, 5))


def _lungs(number: int) -> Condition:
    layout = np.full((32, 32, 32), Label.BODY, np.uint8)
    layout[4:28, 6:26, 4 + number : 14] = Label.RIGHT_LUNG
    return Condition(layout)


SLICES, VOLUMES = Case((4, 32, 32), 128, 8, _boxed), Case((1, 32, 32, 32), 32, 2, _lungs)


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--volumes", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true", help="leave compiled ways out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = VOLUMES if options.volumes else SLICES
    denoiser = case.make_network()
    facts = facts_of_run("torch", "diffusers", "monai") | {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "steps": options.steps,
        "latent_shape": case.latent_shape,
        "batch_size": case.batch_size,
        "gemm_alone_ms": round(_gemm_alone_ms(case, denoiser) * options.steps, 1),
    }
    ways = _ways(case, denoiser, options.steps, compiled=not options.no_compile)
    facts["largest_difference"] = difference = _largest_difference(ways)
    if difference > TOLERANCE:
        print(f"the latents differ by {difference:.1e}: not comparable")
        return 1
    spent: dict[str, list[Seconds]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(options.repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            started = Seconds.now()
            ways[name]()
            spent[name].append(started.elapsed())
    ours = [name for name in names if name.startswith("raysynth")]
    tables = {}
    for one in ours:
        rows = [median_row(one, spent[one])]
        for name in names:
            if name in ours:
                continue
            row = median_row(name, spent[name])
            target = AT_LEAST[name] if one == ours[-1] else None
            ratio = paired_ratio(spent[name], spent[one])
            rows.append(Row(name, row.cpu_ms, row.wall_ms, *ratio, at_least=target))
        tables[one] = rows
    return report(facts, tables, of="times as fast as this")


def _ways(case: Case, denoiser: Denoiser, steps: int, compiled: bool) -> dict[str, Way]:
    loops = _Loops(case, deepcopy(denoiser), steps)
    ways = {"raysynth": _engine(case, denoiser, steps, compiled=False)}
    if compiled:
        ways["raysynth, compiled"] = _engine(case, denoiser, steps, compiled=True)
    ways |= {DIFFUSERS: loops.diffusers, MONAI: loops.monai}
    if compiled:
        in_space = len(case.latent_shape) == 4
        memory_format = torch.channels_last_3d if in_space else torch.channels_last
        last: Any = deepcopy(denoiser)
        last = last.to(memory_format=memory_format)
        strong = _Loops(case, last, steps)
        strong.predict = torch.compile(last.predict, dynamic=False)
        strong.memory_format = memory_format
        ways[STRONG] = strong.diffusers
    return ways


def _engine(case: Case, denoiser: Denoiser, steps: int, compiled: bool) -> Way:
    engine = SamplingEngine(
        deepcopy(denoiser),  # engines change its memory format
        build_schedule("scaled_linear"),
        "epsilon",
        case.latent_shape,
        case.sample_size,
        case.batch_size,
        guided=True,
        compiled=compiled,
    )
    requests = [
        SampleRequest(str(number), number, case.condition(number), "ddim", steps, GUIDANCE)
        for number in range(case.batch_size)
    ]

    def draw() -> Tensor:
        drawn = {finished.sample_id: finished.x_0 for finished in engine.run(requests)}
        return torch.stack([drawn[request.sample_id] for request in requests])

    return draw


class _Loops:
    """The loops of other libraries round the same network."""

    def __init__(self, case: Case, denoiser: Denoiser, steps: int) -> None:
        self.case, self.denoiser, self.steps = case, denoiser, steps
        self.predict: Callable[..., Tensor] = denoiser.predict
        self.memory_format = torch.contiguous_format

    @torch.inference_mode()
    def diffusers(self) -> Tensor:
        """As a pipeline with classifier-free guidance does it."""
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler(  # type: ignore[no-untyped-call]
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        scheduler.set_timesteps(self.steps)
        x_t, encoded = self._start()
        for timestep in scheduler.timesteps:
            both = torch.cat([x_t] * 2)
            null, conditional = self.predict(both, timestep.expand(len(both)), encoded).chunk(2)
            guided = null + GUIDANCE * (conditional - null)
            x_t = scheduler.step(guided, timestep, x_t, return_dict=False)[0]
        return x_t

    def monai(self) -> Tensor:
        """By its inferer, whose own guidance fuses both halves."""
        import raysynth.models.monai  # noqa: F401, I001  # imports MONAI without what nobody needs
        from monai.inferers.inferer import DiffusionInferer
        from monai.networks.schedulers.ddim import DDIMScheduler

        stride = 1000 // self.steps
        scheduler: Any = DDIMScheduler(
            schedule="scaled_linear_beta",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            steps_offset=stride - 1,  # diffusers' trailing spacing
        )
        scheduler.set_timesteps(self.steps)
        x_t, encoded = self._start()

        def network(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            # Null conditions, then the requests': as the inferer stacks its own.
            return self.predict(x, timesteps.expand(len(x)), encoded)

        drawn: Any = DiffusionInferer(scheduler).sample(
            x_t,
            network,  # type: ignore[arg-type]
            conditioning=torch.zeros(self.case.batch_size, 1),
            cfg=GUIDANCE,
            verbose=False,
        )
        return torch.as_tensor(drawn)

    @torch.no_grad()
    def _start(self) -> tuple[Tensor, EncodedCondition]:
        count = self.case.batch_size
        noise = [
            torch.randn(self.case.latent_shape, generator=torch.Generator().manual_seed(number))
            for number in range(count)
        ]
        conditions = [Condition()] * count + [self.case.condition(n) for n in range(count)]
        x_t = torch.stack(noise).to(memory_format=self.memory_format)
        return x_t, self.denoiser.encode(self.case.collate(conditions))


def _largest_difference(ways: dict[str, Way]) -> float:
    """Of any way's latents from the first's, as a share of their size; this also warms all up."""
    first, *others = (way() for way in ways.values())
    size = max(1.0, float(first.abs().max()))
    return max(float((other - first).abs().max()) for other in others) / size


@torch.inference_mode()
def _gemm_alone_ms(case: Case, denoiser: Denoiser) -> float:
    """Of one guided step."""
    rows = 2 * case.batch_size
    encoded = denoiser.encode(case.collate([Condition()] * rows))
    with FlopCounterMode(display=False) as counter:
        denoiser.predict(torch.zeros(rows, *case.latent_shape), torch.zeros(rows).long(), encoded)
    size = 1024
    square = torch.randn(size, size)
    rates = []
    for _ in range(10):
        started = Seconds.now()
        torch.mm(square, square)
        rates.append(2 * size**3 / started.elapsed().cpu)
    return float(1e3 * counter.get_total_flops() / max(rates))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
