"""What every engine holds on each of two workers, and the sampling engine, against the formulas.

python -m jobs.benchmarks.memory [--width 320]

A U-Net on slices of 8 x 8, whose activations are nothing beside its weights, takes three steps of
the training loop's engines on two workers; the third one's peak is compared with
`raysynth.training.memory.state_of` and the counted activations. Then the sampling engine draws
volumes with a small network and large activations, and its peak is compared with
`raysynth.sampling.footprint`. Peaks are those of the processes, above what these held before.
Prints a table and a line of JSON; exits 1 where a peak is more than 5 % from its formula (drawing:
more than 10 % above it).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.ratios import facts_of_run, forget_peak, memory_bytes
from raysynth.condition import Condition
from raysynth.config import ExperimentConfig, LayoutDiffusionConfig, parse_recipe
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.models.denoiser import build_denoiser
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.sampling.footprint import drawing_footprint
from raysynth.training.build import fresh_network, objective_of
from raysynth.training.context import LocalContext
from raysynth.training.ema import Ema
from raysynth.training.engines import open_engine
from raysynth.training.footprint import example_batch, training_footprint
from raysynth.training.memory import state_of

MIB = 2**20
AT_MOST, AT_MOST_DRAWING = 0.05, 0.10
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"num_workers": 1},
    "ddp": {"engine": "ddp"},
    **{f"ZeRO-{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
SLICES = """
data: {{samples: {{kind: slices, size: 16, field_of_view_mm: 64}}}}
model:
  family: layout_diffusion
  channels: [{width}, {width}]
  attention_levels: [false, false]
  num_head_channels: 32
training: {{num_workers: 2, global_batch_size: 4, micro_batch_size: 1, open_shards: 2}}
"""
VOLUMES = """
data: {samples: {kind: patches, size: 64}}
model:
  family: layout_diffusion
  channels: [16, 32]
  attention_levels: [false, false]
  num_res_blocks: 1
  num_head_channels: 16
  norm_num_groups: 16
sampling: {batch_size: 2}
"""


@dataclass(frozen=True)
class Peak:
    """Bytes at the fullest moment: measured, and by formula."""

    name: str
    measured: int
    formula: int

    @property
    def off(self) -> float:
        """Share by which the measured one is above the formula."""
        return self.measured / self.formula - 1


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=320)
    options = parser.parse_args(arguments)
    # Freed memory goes back at once: what a process holds is what its tensors hold.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    facts = facts_of_run("torch", "deepspeed")
    peaks = [_trained(name, options.width) for name in ENGINES]
    (drawn,) = _in_processes(_draw, 1)
    peaks.append(Peak("drawing", *drawn))
    print(f"{'':12s}{'MiB':>10s}{'formula':>10s}{'off':>9s}")
    missed = []
    for one in peaks:
        is_drawing = one.name == "drawing"
        is_missed = one.off > AT_MOST_DRAWING if is_drawing else abs(one.off) > AT_MOST
        missed += [one.name] * is_missed
        print(
            f"{one.name:12s}{one.measured / MIB:10.1f}{one.formula / MIB:10.1f}{one.off:+9.1%}"
            + ("  MISSED" if is_missed else "")
        )
    print(json.dumps(facts | {"peaks": [asdict(one) for one in peaks], "missed": missed}))
    return int(bool(missed))


def _config(name: str, width: int) -> ExperimentConfig:
    config = parse_recipe(SLICES.format(width=width), name="memory")
    training = config.training.model_copy(update=ENGINES[name])
    return config.model_copy(update={"training": training})


def _trained(name: str, width: int) -> Peak:
    config = _config(name, width)
    footprint = training_footprint(config)
    counts = footprint.num_parameters, footprint.num_trained
    training = config.training
    kind: Any = "plain" if training.num_workers == 1 else training.engine
    state = state_of(*counts, training.num_workers, kind, training.zero_stage, accumulates=True)
    formula = state.peak(footprint.activation_bytes(1))
    measured = _in_processes(_train, training.num_workers, name, width)
    return Peak(name, max(peak for peak, _ in measured), formula)


def _in_processes(
    measure: Callable[..., tuple[int, int]], count: int, *arguments: Any
) -> list[tuple[int, int]]:
    with tempfile.TemporaryDirectory() as folder:
        with closing(socket.socket()) as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(
            _process, (count, port, folder, measure, arguments), nprocs=count
        )
        texts = [(Path(folder) / f"{rank}.json").read_text() for rank in range(count)]
    return [tuple(json.loads(text)) for text in texts]


def _process(
    rank: int, count: int, port: int, folder: str, measure: Callable[..., Any], arguments: Any
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measure(*arguments)))


def _train(name: str, width: int) -> tuple[int, int]:
    """Peak of the third step; and nothing."""
    config = _config(name, width)
    context = LocalContext.from_environment()
    batch = example_batch(config, 1)
    small = config.model_copy(
        update={"model": config.model.model_copy(update={"channels": (32, 32)})}
    )
    _steps(small, context, batch)  # what libraries keep for themselves is there now
    before = memory_bytes("VmRSS")
    return _steps(config, context, batch) - before, 0


def _steps(config: ExperimentConfig, context: LocalContext, batch: Any) -> int:
    objective = objective_of(config, fresh_network(config, None), None)
    with open_engine(objective.module, config.training, context) as engine:
        ema = Ema(engine.owned(), 0.999)
        for step in range(1, 4):
            if step == 3:
                forget_peak()
            for _ in range(engine.num_micro_batches):  # gradients are there in the second
                with engine.micro_batch():
                    engine.backward(objective.loss(engine.module, batch, engine.device)["loss"])
            engine.step(1e-4)
            ema.update(step)
        return memory_bytes("VmHWM")


def _draw() -> tuple[int, int]:
    config = parse_recipe(VOLUMES, name="memory")
    assert isinstance(config.model, LayoutDiffusionConfig)
    shape = config.samples.shape
    footprint = drawing_footprint(config)
    assert footprint is not None
    torch.nn.functional.conv3d(torch.zeros(1, 16, 8, 8, 8), torch.zeros(16, 16, 3, 3, 3))
    before = memory_bytes("VmRSS")
    engine = SamplingEngine(
        build_denoiser(config.model, 1, shape[0], spatial_dims=3),
        NoiseSchedule.from_config(config.model),
        config.model.prediction_type,
        (1, *shape),
        shape[0],
        config.sampling.batch_size,
    )
    for seed in range(config.sampling.batch_size):
        engine.admit(SampleRequest(str(seed), seed, Condition(), "ddim", 4))
    engine.step()
    forget_peak()
    engine.step()
    return memory_bytes("VmHWM") - before, footprint.peak_bytes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
