"""How long a training step waits for its batch: raysynth's stream against loaders with one worker.

python -m jobs.benchmarks.stall [--steps N] [--volumes N] [--only WORD]

A step takes four crops of 48^3 from samples of 64^3 through a small 3D network on one core, forward
and backward, about 50 ms; whatever brings the samples has the other core. Steps alone, on a batch
that is there already, alternate with steps that ask for theirs. The stall is 1 - time of the steps
if each were the median one alone / wall time; "waited" is the part of it before a step begins. What
comes before the first batch (files opened, caches filled) is "set up", and no stall. Peers crop and
convert in their worker. raysynth's stream brings samples as they are stored, and a training step
begins by making numbers of them: there that is part of the step, alone or not. Each runs in a
process of its own; files are in the page cache. The last line is everything as JSON; exits 1 where
raysynth stalls more than 2 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from jobs.benchmarks.sample_data import (
    PATCH,
    PER_VOLUME,
    cut,
    is_installed,
    load_nifti,
    load_sample,
    make_data,
    samples_of,
    volume_paths,
)
from raysynth.data.stream import SampleStream

CROP, BATCH_SIZE, STEP_S, CHANNELS = 48, 4, 0.05, 16
ROUNDS, UNTIMED, MOST_STALL = 5, 5, 0.02
COUNT = PER_VOLUME["patches"]


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--volumes", type=int, default=16)
    parser.add_argument("--only", default="", help="ways whose name holds this word")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    facts: dict[str, Any] = {"load": [os.getloadavg()[0]], "steps": options.steps}
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="raysynth-stall-") as path,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh,
    ):
        _, facts["data"] = make_data(Path(path), options.volumes, ["patches"])
        blocks = fresh.submit(_calibrate).result()
        measured = {
            name: fresh.submit(_run, name, Path(path), blocks, options.steps).result()
            for name in WAYS
            if options.only in name
        }
    facts["load"].append(os.getloadavg()[0])
    facts["not_installed"] = [name for name, row in measured.items() if row is None]
    return _report({name: row for name, row in measured.items() if row is not None}, facts)


# The ways to get batches: each yields float32 (4, 1, 48, 48, 48), HU / 1000; raysynth's stream
# int16 (4, 64, 64, 64), of which `_crops` makes that.


def _stream(folder: Path, open_shards: int) -> Iterator[NDArray[np.int16]]:
    stream = SampleStream(
        samples_of(folder / "store", "patches"),
        ["hu"],
        seed=0,
        global_batch_size=BATCH_SIZE,
        open_shards=open_shards,
    )
    for batch in stream.batches():
        yield batch["hu"]


def _crops(samples: NDArray[np.int16], random: np.random.Generator) -> Tensor:
    crops = np.stack([_crop(sample, random) for sample in samples])
    return torch.from_numpy(crops).float().div_(1000)


def _crop(sample: NDArray[np.int16], random: np.random.Generator) -> NDArray[np.int16]:
    """One crop, (1, z, y, x)."""
    z, y, x = random.integers(PATCH - CROP + 1, size=3)
    return sample[None, z : z + CROP, y : y + CROP, x : x + CROP]


def _ready(sample: NDArray[np.int16], random: np.random.Generator) -> Tensor:
    return torch.from_numpy(_crop(sample, random).astype(np.float32)).div_(1000)


class _FileASample(Dataset[Tensor]):
    """Opens a volume for every sample."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.random = paths, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.paths) * COUNT

    def __getitem__(self, row: int) -> Tensor:
        volume, number = divmod(row, COUNT)
        return _ready(load_sample(self.paths[volume], "patches", number), self.random)


class _VolumeThenCut(IterableDataset[Tensor]):
    """Reads volume after volume, each for all of its samples."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[Tensor]:
        random = np.random.default_rng(0)
        while True:
            for volume in random.permutation(len(self.paths)).tolist():
                samples = cut(load_nifti(self.paths[volume]), "patches")
                for number in random.permutation(COUNT).tolist():
                    yield _ready(samples[number], random)


def _file_a_sample(folder: Path, suffix: str) -> Iterator[Tensor]:
    return _loaded(_FileASample(volume_paths(folder, suffix)), shuffle=True)


def _volume_then_cut(folder: Path) -> Iterator[Tensor]:
    return _loaded(_VolumeThenCut(volume_paths(folder, ".nii.gz")))


def _monai(folder: Path, persistent: bool) -> Iterator[Tensor]:
    """Caches the samples, before their random crop."""
    from monai.data import CacheDataset, PersistentDataset
    from monai.transforms import Compose, Lambda, RandSpatialCrop

    @functools.lru_cache(1)
    def samples(path: str) -> list[NDArray[np.int16]]:
        return cut(load_nifti(path), "patches")

    # MONAI would take a tuple apart.
    def sample(place: str) -> NDArray[np.int16]:
        path, _, number = place.rpartition("#")
        return np.ascontiguousarray(samples(path)[int(number)])[None]

    def convert(crop: Any) -> Tensor:
        return torch.as_tensor(crop).float().div_(1000)

    load = Lambda(sample, track_meta=False)
    crop = RandSpatialCrop([CROP] * 3, random_size=False)
    transform = Compose([load, crop, Lambda(convert, track_meta=False)])
    paths = volume_paths(folder, ".nii.gz")
    places = [f"{path}#{number}" for path in paths for number in range(COUNT)]
    dataset: Any
    if persistent:
        dataset = PersistentDataset(places, transform, folder / "cache")
        for row in range(len(places)):
            dataset[row]
    else:
        dataset = CacheDataset(places, transform, progress=False, copy_cache=False)
    return _loaded(dataset, shuffle=True)


def _torchio(folder: Path) -> Iterator[Tensor]:
    """Crops straight from the volumes."""
    import torchio

    subjects = [
        torchio.Subject(hu=torchio.ScalarImage(path)) for path in volume_paths(folder, ".nii.gz")
    ]
    queue = torchio.Queue(
        torchio.SubjectsDataset(subjects),
        max_length=4 * COUNT,
        samples_per_volume=COUNT,
        sampler=torchio.data.UniformSampler(CROP),
        num_workers=1,
    )
    while True:
        for batch in torchio.SubjectsLoader(queue, batch_size=BATCH_SIZE, num_workers=0):
            yield batch["hu"][torchio.DATA].float().div_(1000)


def _loaded(dataset: Dataset[Tensor], shuffle: bool = False) -> Iterator[Tensor]:
    """Endless batches of one worker."""
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        shuffle=shuffle,
        num_workers=1,
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        yield from loader


WAYS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "raysynth, 8 open shards": partial(_stream, open_shards=8),
    "raysynth, 1 open shard": partial(_stream, open_shards=1),
    "DataLoader, .nii.gz, file a sample": partial(_file_a_sample, suffix=".nii.gz"),
    "DataLoader, .nii.gz, volume then cut": _volume_then_cut,
    "DataLoader, .nii, file a sample": partial(_file_a_sample, suffix=".nii"),
    "MONAI CacheDataset": partial(_monai, persistent=False),
    "MONAI PersistentDataset": partial(_monai, persistent=True),
    "torchio Queue": _torchio,
}
MODULES = {
    "MONAI CacheDataset": "raysynth.models.monai",  # imports MONAI without what nobody needs
    "MONAI PersistentDataset": "raysynth.models.monai",
    "torchio Queue": "torchio",
}


# The steps.


def _step_of(blocks: int) -> Callable[[Any], None]:
    """A training step of a small network that predicts its input at half the resolution."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv3d(1, CHANNELS, 3, stride=2, padding=1)]
    for _ in range(blocks):
        layers += [nn.SiLU(), nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)]
    network = nn.Sequential(*layers, nn.SiLU(), nn.Conv3d(CHANNELS, 1, 1))
    optimizer = torch.optim.SGD(network.parameters(), 1e-4)

    def step(batch: Tensor | NDArray[np.int16]) -> None:
        if isinstance(batch, np.ndarray):
            batch = _crops(batch, random)
        loss = functional.mse_loss(network(batch), functional.avg_pool3d(batch, 2))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def _calibrate() -> int:
    """In a fresh process: the number of blocks that makes a step about 50 ms."""
    batch = torch.zeros(BATCH_SIZE, 1, *[CROP] * 3)
    few, more = (float(np.median(_alone(_step_of(blocks), batch, 8))) for blocks in (1, 3))
    return max(1, round(1 + 2 * (STEP_S - few) / (more - few)))


def _alone(step: Callable[[Any], None], batch: Any, steps: int) -> list[float]:
    """Seconds of steps whose batch is there."""
    torch.set_num_threads(1)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - started)
    return seconds


def _run(name: str, folder: Path, blocks: int, steps: int) -> dict[str, float] | None:
    """In a fresh process: the steps of one way; None where it is not installed."""
    if not is_installed(MODULES.get(name, "torch")):
        return None
    cores = sorted(os.sched_getaffinity(0))
    # What is started from here on stays on the last core; this thread leaves it afterwards.
    os.sched_setaffinity(0, {cores[-1]})
    started = time.perf_counter()
    batches = WAYS[name](folder)
    batch = next(batches)
    set_up_s = time.perf_counter() - started
    assert batch.shape in ((BATCH_SIZE, 1, *[CROP] * 3), (BATCH_SIZE, *[PATCH] * 3)), batch.shape
    os.sched_setaffinity(0, {cores[0]})
    row = _measure(batches, batch, _step_of(blocks), steps // ROUNDS)
    return {"set_up_s": set_up_s} | row


def _measure(
    batches: Iterator[Any], first: Any, step: Callable[[Any], None], steps: int
) -> dict[str, float]:
    """Alternates steps alone, on the first batch, with `steps` that ask for theirs."""
    _alone(step, first, UNTIMED)
    alone: list[float] = []
    wall_s = waited_s = 0.0
    for _ in range(ROUNDS):
        alone += _alone(step, first, max(2, steps // 4))
        for number in range(-UNTIMED, steps):  # the first ones were read while nobody asked
            started = time.perf_counter()
            batch = next(batches)
            got = time.perf_counter()
            step(batch)
            if number >= 0:
                waited_s += got - started
                wall_s += time.perf_counter() - started
    step_s = float(np.median(alone))
    stall = 1 - ROUNDS * steps * step_s / wall_s
    return {"step_ms": 1e3 * step_s, "wall_s": wall_s, "stall": stall, "waited": waited_s / wall_s}


def _report(rows: dict[str, dict[str, float]], facts: dict[str, Any]) -> int:
    """Prints the table and the JSON line; returns the exit code."""
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print("\nbatches from                          set up s  step ms  wall s   stall  waited")
    missed = []
    for name, row in rows.items():
        verdict = ""
        if "raysynth" in name:
            met = row["stall"] <= MOST_STALL
            verdict = f"   target {MOST_STALL:.0%}: {'met' if met else 'MISSED'}"
            missed += [] if met else [name]
        print(
            f"{name:38s}{row['set_up_s']:8.2f}{row['step_ms']:9.1f}{row['wall_s']:8.2f}"
            f"{row['stall']:8.1%}{row['waited']:8.1%}{verdict}"
        )
    print(json.dumps(facts | {"rows": rows, "missed": missed}))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
