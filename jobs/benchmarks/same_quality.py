"""How few steps still draw as well as 1,000: a toy lung model under every sampler.

python -m jobs.benchmarks.same_quality [--folder DIR] [--samples N] [--only WORD]

The first run in a folder trains the models of the demo on one core, for six minutes at most, and
draws two reference sets by DDPM with all 1,000 steps; both stay in the folder, later runs start
from them. All sets answer the same requests, each with noise of its own.

Quality is KID (`ct-conv@1`, whole slices) to the reference. Swapping, request by request, what the
two reference sets hold gives many pairs of equal quality: the 95 % interval of their KID is the
reference's own, and a sampler whose KID does not pass its upper end cannot be told from 1,000
steps by this many samples. A curve that leaves the interval at few steps shows that KID can tell.

Times are of finished slices, decoding included, drawn 16 at a time by all samplers in turn, without
guidance, on one thread. The ratio is to DDIM with 250 steps (the setting of Lung-DDPM), drawn by
the same engine, which is no slower than the loops of others (`same_bytes`). Prints the table and a
line of JSON; exits 1 unless some sampler is 12 times as fast at equal quality, and names the
nearest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.benchmarks.ratios import Row, Seconds, facts_of_run, median_row, paired_ratio, report
from raysynth import stages
from raysynth.config import ExperimentConfig, load_recipe
from raysynth.config.sampling import SamplerName
from raysynth.demo import recipes_folder
from raysynth.metrics.features import load_extractor
from raysynth.metrics.kernel import cubic_mmd2
from raysynth.sampling.batch import plan_run_samples
from raysynth.sampling.draw import SliceSampler
from raysynth.sampling.planner import PlannedSample
from raysynth.session import connect
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

TARGET, NUM_PAIRS = 12.0, 400
SLOW: tuple[SamplerName, int] = ("ddim", 250)
STEPS: dict[SamplerName, tuple[int, ...]] = {
    "ddim": (2, 3, 4, 6, 8, 10, 15, 20, 50),
    "dpm_solver++": (2, 3, 4, 6, 8, 10, 15, 20),
    "unipc": (2, 3, 4, 6, 8, 10, 15, 20),
}
TRAINING_S = {"phantom_demo_kl": 100, "phantom_demo": 250}

Way = tuple[SamplerName, int]
Images = NDArray[np.int16]
Features = NDArray[np.float32]


@dataclass(frozen=True)
class Quality:
    """KID to the reference, and the upper end of the reference's own interval."""

    kid: float
    limit: float

    def __str__(self) -> str:
        return f"KID {1e3 * self.kid:8.3f}e-3 {'inside' if self.is_equal else 'OUTSIDE'}"

    @property
    def is_equal(self) -> bool:
        """Whether it cannot be told from 1,000 steps."""
        return self.kid <= self.limit


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/same_quality"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", default="", help="samplers whose name holds this word")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = _prepared(options.folder, options.samples)
    plan = _plan(config)
    facts = facts_of_run("torch", "diffusers") | {"samples": len(plan), "seed": config.seed}

    reference = _reference(config, plan)
    ways = [SLOW, *((name, steps) for name, all_of in STEPS.items() for steps in all_of)]
    ways = [way for way in ways if way == SLOW or options.only in way[0]]
    drawn, spent = _draw_in_turn(config, plan, ways)

    extract = load_extractor("ct-conv")
    first, second = (extract(images) for images in reference)
    own, mixed = _own_kid(first, second)
    low, limit = np.percentile(own, [2.5, 97.5]).tolist()
    facts["own_interval_of_kid"] = [low, limit]
    quality = {
        way: Quality(float(np.mean([cubic_mmd2(extract(drawn[way]), m) for m in mixed])), limit)
        for way in ways
    }
    return _report(facts, quality, spent)


def _prepared(folder: Path, samples: int) -> ExperimentConfig:
    """The demo's recipe in the folder, its models trained."""
    recipes = recipes_folder()
    autoencoder, model = (
        load_recipe(
            recipes / f"{name}.yaml",
            [
                f"work_dir={folder}",
                f"training.max_seconds={seconds}",
                "training.threads_per_worker=1",
                f"sampling.num_samples={samples}",
                "sampling.guidance_scale=1",
            ],
        ).absolute()
        for name, seconds in TRAINING_S.items()
    )
    if not model.bundle_path.exists():
        with connect():
            stages.ingest(model)
            stages.shard(model)
            stages.train(autoencoder)
            stages.encode(model)
            stages.train(model)
    return model


def _plan(config: ExperimentConfig) -> list[PlannedSample]:
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, f"samples/{config.slices.name}"))
    return plan_run_samples(config, samples)


def _sampler(config: ExperimentConfig, way: Way) -> SliceSampler:
    changes = {"sampler": way[0], "num_inference_steps": way[1]}
    return SliceSampler(config.bundle_path, config.sampling.model_copy(update=changes), config.seed)


def _reference(config: ExperimentConfig, plan: list[PlannedSample]) -> list[Images]:
    """Two sets of slices by 1,000 steps of DDPM, kept in the folder."""
    sampler, sets = _sampler(config, ("ddpm", 1000)), []
    for number in (2, 3):
        path = config.work_dir / f"reference-{len(plan)}-{number}.npy"
        if not path.exists():
            print(f"drawing {path} by 1,000 steps", flush=True)
            images = sampler.draw([one.redrawn(number) for one in plan])
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.save(file, images)
            os.replace(part, path)
        sets.append(np.load(path))
    return sets


def _draw_in_turn(
    config: ExperimentConfig, plan: list[PlannedSample], ways: list[Way]
) -> tuple[dict[Way, Images], dict[Way, list[Seconds]]]:
    """What each way makes of the plan, and what each batch of it took."""
    samplers = {way: _sampler(config, way) for way in ways}
    images: dict[Way, list[Images]] = defaultdict(list)
    spent: dict[Way, list[Seconds]] = defaultdict(list)
    size = config.sampling.batch_size
    samplers[ways[-1]].draw(plan[:1])  # torch sets itself up
    for number, start in enumerate(range(0, len(plan), size)):
        shift = number % len(ways)
        for way in ways[shift:] + ways[:shift]:
            started = Seconds.now()
            images[way].append(samplers[way].draw(plan[start : start + size]))
            spent[way].append(started.elapsed())
    return {way: np.concatenate(parts) for way, parts in images.items()}, spent


def _own_kid(first: Features, second: Features) -> tuple[list[float], list[Features]]:
    """KID of pairs of equal quality, and one set of each pair."""
    random = np.random.default_rng(0)
    own, mixed = [], []
    for _ in range(NUM_PAIRS):
        swapped = random.random((len(first), 1)) < 0.5
        one, other = np.where(swapped, second, first), np.where(swapped, first, second)
        own.append(cubic_mmd2(one, other))
        mixed.append(one)
    return own, mixed


def _report(
    facts: dict[str, Any], quality: dict[Way, Quality], spent: dict[Way, list[Seconds]]
) -> int:
    ratios = {way: paired_ratio(spent[SLOW], spent[way]) for way in spent if way != SLOW}
    equal = [way for way in ratios if quality[way].is_equal]
    # The target is asked of the fastest way of equal quality; where there is none, of the fastest.
    best = max(equal or ratios, key=lambda way: ratios[way][0])
    facts["fastest_at_equal_kid"] = f"{best[0]} {best[1]}" if equal else "none"
    tables: dict[str, list[Row]] = defaultdict(list)
    for way, seconds in spent.items():
        row = median_row(f"{way[0]:13s}{way[1]:4d}   {quality[way]}", seconds)
        if way in ratios:
            target = TARGET if way == best else None
            row = Row(row.name, row.cpu_ms, row.wall_ms, *ratios[way], at_least=target)
        tables[f"batches of 16 by {way[0]}"].append(row)
    return report(facts, dict(tables), of="times as fast as DDIM-250") or int(not equal)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
