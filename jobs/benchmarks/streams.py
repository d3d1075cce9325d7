"""Epochs of training samples: raysynth's reader against the ways others stream the same voxels.

python -m jobs.benchmarks.streams [--volumes N] [--repeats N] [--only WORD]

Volumes of 256^3 int16 voxels (32 are the full workload) are cut into slices of 256 x 256, 64 a
shard, and patches of 64^3, a shard a volume. An epoch shows every sample once: shards or volumes in
shuffled order, shuffled inside. Every byte goes into a CRC32C of its sample, and unless they all
are those of the voxels that were written, nothing is reported. Readers run in processes of their
own, one after the other, in rotating order, with one OpenMP thread; files are in the page cache.

Rates and ratios are per second of processor time, which other load hardly disturbs. Some readers
show a part of the samples only (column "samples"): they cost the same for each. Peak memory is what
an epoch adds to the process; for a memory map, and for .nii files, that is page cache. The last
line is everything as JSON. Exits 1 where a target is missed; peers that are not installed are left
out, and named.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from jobs.benchmarks.ratios import forget_peak, memory_bytes
from jobs.benchmarks.sample_data import (
    PER_VOLUME,
    SHAPES,
    Crcs,
    crcs_of,
    cut,
    is_installed,
    load_nifti,
    load_sample,
    make_data,
    samples_of,
    volume_paths,
)
from raysynth.data.stream import SampleStream
from raysynth.store.reader import SampleSet
from raysynth.store.repository import open_root
from storage_schema.v1 import MAX_SHARD_ROWS

BATCH_SIZE = 8

Epoch = Callable[[np.random.Generator], Iterator[tuple[int, Any]]]
"""One pass in the order that a generator draws: (row, sample)."""

Reader = Callable[[Path, str], Epoch]
"""(folder of the data, kind of samples) -> epochs."""


@dataclass(frozen=True)
class Measured:
    """What a process did with one kind: (wall, processor) seconds of its first two epochs."""

    first: tuple[float, float]
    steady: tuple[float, float]
    peak_bytes: int
    crcs: Crcs


Runs = dict[tuple[str, str], list[Measured]]
"""By reader and kind: all repeats."""


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--volumes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="", help="peers whose name holds this word")
    options = parser.parse_args(arguments)
    names = [name for name in READERS if options.only in name or name == "raysynth"]
    facts: dict[str, Any] = {"load": [os.getloadavg()[0]], "versions": _versions()}
    with tempfile.TemporaryDirectory(prefix="raysynth-streams-") as path:
        crcs, facts["data"] = make_data(Path(path), options.volumes)
        facts["patients"] = _patients(Path(path) / "store")
        runs = _run_all(Path(path), names, options.repeats)
    facts["load"].append(os.getloadavg()[0])
    facts["not_installed"] = [name for name in names if (name, "slices") not in runs]
    for (name, kind), of_one in runs.items():
        count = min(_limit(name, kind) or len(crcs[kind]), len(crcs[kind]))
        if not all(is_right(run, crcs[kind], count) for run in of_one):
            print(f"{name} gives other {kind} than were written: nothing is comparable")
            return 1
    return _report(runs, facts)


# The readers. Each takes the folder and the kind of samples.


def by_units(read: Callable[[int], Sequence[Any]], units: int) -> Epoch:
    """Epochs of whole shards, volumes or samples, whichever a unit is."""

    def epoch(random: np.random.Generator) -> Iterator[tuple[int, Any]]:
        for unit in random.permutation(units).tolist():
            samples = read(unit)
            for place in random.permutation(len(samples)).tolist():
                yield unit * len(samples) + place, samples[place]

    return epoch


def by_shards(read: Callable[[int, int], Any], count: int) -> Epoch:
    """Epochs of whole shards; `read` gives the rows [start, stop) of `count`."""
    rows = MAX_SHARD_ROWS
    return by_units(lambda shard: read(shard * rows, (shard + 1) * rows), count // rows)


def stream(samples: SampleSet, column: str, open_shards: int) -> SampleStream:
    """The stream that training reads, with one column."""
    return SampleStream(
        samples, [column], seed=0, global_batch_size=BATCH_SIZE, open_shards=open_shards
    )


def stream_epochs(samples: SampleSet, open_shards: int) -> Epoch:
    """Epochs of one endless stream, which reads ahead from one into the next."""
    ours = stream(samples, "hu", open_shards)
    batches = ours.batches()

    def epoch(_: np.random.Generator) -> Iterator[tuple[int, Any]]:
        for batch in itertools.islice(batches, ours.order.epoch_length // BATCH_SIZE):
            yield from zip(ours.order.at(batch["position"]).tolist(), batch["hu"], strict=True)

    return epoch


def _raysynth(folder: Path, kind: str) -> Epoch:
    samples = samples_of(folder / "store", kind)
    return by_shards(partial(samples.read, "hu"), samples.count)


def _stream(folder: Path, kind: str, open_shards: int) -> Epoch:
    return stream_epochs(samples_of(folder / "store", kind), open_shards)


def _zarr(folder: Path, kind: str, plain: bool, pipeline: str | None = None) -> Epoch:
    if pipeline is not None:
        zarr.config.set({"codec_pipeline.path": pipeline})
    root = zarr.open_group(folder / "plain", mode="r") if plain else open_root(folder / "store")
    array: Any = root[f"samples/{kind}/hu"]
    return by_shards(lambda start, stop: array[start:stop], array.shape[0])


def _tensorstore(folder: Path, kind: str) -> Epoch:
    import tensorstore

    files = {"driver": "file", "path": str(folder / f"plain/samples/{kind}/hu")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": files}).result()
    return by_shards(lambda start, stop: array[start:stop].read().result(), array.shape[0])


def _memory_map(folder: Path, kind: str) -> Epoch:
    paths = volume_paths(folder, ".npy")
    return by_units(lambda unit: cut(np.load(paths[unit], mmap_mode="r"), kind), len(paths))


def _nibabel(folder: Path, kind: str, suffix: str) -> Epoch:
    paths = volume_paths(folder, suffix)
    return by_units(lambda unit: cut(load_nifti(paths[unit]), kind), len(paths))


def _nibabel_sample(folder: Path, kind: str, suffix: str) -> Epoch:
    paths = volume_paths(folder, suffix)

    def read(row: int) -> list[Any]:
        volume, number = divmod(row, PER_VOLUME[kind])
        return [load_sample(paths[volume], kind, number)]

    return by_units(read, len(paths) * PER_VOLUME[kind])


def _monai(folder: Path, kind: str, persistent: bool, matched: bool) -> Epoch:
    """Caches volumes, in NIfTI's order of axes as MONAI loads them, or in that of the samples."""
    from monai.data import CacheDataset, PersistentDataset
    from monai.transforms import Lambda, LoadImage

    paths = [str(path) for path in volume_paths(folder, ".nii.gz")]
    load = (
        Lambda(load_nifti, track_meta=False)
        if matched
        else LoadImage(image_only=True, dtype=np.int16)
    )
    dataset: Any
    if persistent:
        dataset = PersistentDataset(paths, load, Path(tempfile.mkdtemp(dir=folder)))
    else:
        dataset = CacheDataset(paths, load, progress=False)

    def read(unit: int) -> list[Any]:
        volume = np.asarray(dataset[unit])
        return cut(volume if matched else volume.T, kind)

    return by_units(read, len(paths))


READERS: dict[str, Reader] = {
    "raysynth": _raysynth,
    "raysynth SampleStream, 1 open": partial(_stream, open_shards=1),
    "raysynth SampleStream, 8 open": partial(_stream, open_shards=8),
    ".nii.gz, file a sample": partial(_nibabel_sample, suffix=".nii.gz"),
    ".nii.gz, volume then cut": partial(_nibabel, suffix=".nii.gz"),
    ".nii, file a sample": partial(_nibabel_sample, suffix=".nii"),
    ".nii, volume then cut": partial(_nibabel, suffix=".nii"),
    "MONAI CacheDataset, axes matched": partial(_monai, persistent=False, matched=True),
    "MONAI PersistentDataset": partial(_monai, persistent=True, matched=False),
    "MONAI PersistentDataset, matched": partial(_monai, persistent=True, matched=True),
    "zarr, plain": partial(_zarr, plain=True),
    "zarr, Icechunk": partial(_zarr, plain=False),
    "zarr with zarrs, plain": partial(_zarr, plain=True, pipeline="zarrs.ZarrsCodecPipeline"),
    "limit: tensorstore, plain": _tensorstore,
    "limit: memory map": _memory_map,
}
LIMITS = {
    ".nii.gz, file a sample": {"slices": 8, "patches": 8},
    ".nii, file a sample": {"slices": 256, "patches": 128},
    ".nii.gz, volume then cut": {kind: 2 * count for kind, count in PER_VOLUME.items()},
}
"""Samples of an epoch to show, where all would take long and cost the same."""

MODULES = {name: "raysynth.models.monai" for name in READERS if "MONAI" in name} | {
    "zarr with zarrs, plain": "zarrs",
    "limit: tensorstore, plain": "tensorstore",
}
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    ".nii.gz, file a sample": {"steady": (600, 300)},
    ".nii.gz, volume then cut": {"steady": (6, 6)},
    ".nii, file a sample": {"steady": (5, 15)},
    ".nii, volume then cut": {"steady": (0.3, 0.7)},
    "MONAI CacheDataset, axes matched": {"steady": (0.3, 0.3), "first": (4, 4), "memory": (8, 8)},
    "MONAI PersistentDataset": {"steady": (5, 3)},
    "zarr, plain": {"steady": (4, 1.6)},
    "zarr, Icechunk": {"steady": (4.5, 2)},
    "limit: tensorstore, plain": {"steady": (0.65, 1.5)},
    "limit: memory map": {"steady": (0.13, 0.3)},
}
"""Least values of `_comparisons`, for slices and for patches."""


# The measurement.


def _run_all(folder: Path, names: list[str], repeats: int) -> Runs:
    runs: Runs = {}
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    # What takes seconds to import, and is imported by several, has one process for all of them.
    groups = [list(group) for _, group in itertools.groupby(names, lambda n: MODULES.get(n, n))]
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        for repeat in range(repeats):
            shift = repeat * len(groups) // repeats
            for group in groups[shift:] + groups[:shift]:
                for key, run in fresh.submit(_run, group, folder).result().items():
                    runs.setdefault(key, []).append(run)
    return {(n, k): runs[n, k] for n, k in itertools.product(names, SHAPES) if (n, k) in runs}


def _limit(name: str, kind: str) -> int | None:
    return LIMITS[name][kind] if name in LIMITS else None


def _run(names: list[str], folder: Path) -> dict[tuple[str, str], Measured]:
    """In a fresh process: readers that need the same module; none where it is not installed."""
    if not is_installed(MODULES.get(names[0], "zarr")):
        return {}
    runs = {}
    for name, kind in itertools.product(names, SHAPES):
        # Eight open shards of eight would never be read again.
        if "8 open" not in name or samples_of(folder / "store", kind).num_shards > 8:
            runs[name, kind] = measure(partial(READERS[name], folder, kind), _limit(name, kind))
    return runs


def measure(open_reader: Callable[[], Epoch], limit: int | None = None) -> Measured:
    """Opens a reader and times two epochs of at most `limit` samples."""
    gc.collect()
    forget_peak()
    before = memory_bytes("VmRSS")
    clocks, crcs = [(time.perf_counter(), time.process_time())], {}
    epoch = open_reader()
    for number in range(2):
        crcs = crcs_of(itertools.islice(epoch(np.random.default_rng(number)), limit))
        clocks.append((time.perf_counter(), time.process_time()))
    first, steady = np.diff(clocks, axis=0).tolist()
    return Measured(first, steady, memory_bytes("VmHWM") - before, crcs)


def is_right(measured: Measured, expected: Crcs, count: int) -> bool:
    """Whether an epoch showed `count` samples, and every byte of them was right."""
    shown = measured.crcs
    return len(shown) == count and all(expected[row] == crc for row, crc in shown.items())


def _patients(store: Path) -> dict[str, float]:
    """Mean number of patients in a batch of eight, by kind and number of open shards."""
    means = {}
    for kind, open_shards in itertools.product(SHAPES, (1, 8)):
        ours = stream(samples_of(store, kind), "case", open_shards)
        batches = ours.batches()
        epoch = itertools.islice(batches, ours.order.epoch_length // BATCH_SIZE)
        mean = np.mean([len(set(batch["case"].tolist())) for batch in epoch])
        means[f"{kind}, {open_shards} open"] = round(float(mean), 2)
        batches.close()
    return means


# The report.


def _compare(ours: Measured, peer: Measured) -> dict[str, float]:
    """How many times as good raysynth is, by what is compared."""

    def cpu_s(run: Measured, epoch: str) -> float:
        return float(getattr(run, epoch)[1]) / len(run.crcs)

    ratios = {epoch: cpu_s(peer, epoch) / cpu_s(ours, epoch) for epoch in ("steady", "first")}
    return ratios | {"memory": peer.peak_bytes / ours.peak_bytes}


def _report(runs: Runs, facts: dict[str, Any]) -> int:
    """Prints the table and the JSON line; returns the exit code."""
    loaded = " (loaded)" if max(facts["load"]) > 0.5 else ""
    for name, fact in facts.items():
        print(f"{name}: {fact}{loaded if name == 'load' else ''}")
    print(
        "\nreader                           kind    samples  /CPU-s steady     first  "
        "/s steady   CPU s       s  peak MiB  raysynth / peer [of all repeats]"
    )
    rows: list[dict[str, Any]] = []
    for (name, kind), of_one in runs.items():
        pairs = [_compare(*pair) for pair in zip(runs["raysynth", kind], of_one, strict=True)]
        targets = TARGETS.get(name, {"steady": (0, 0)})
        verdicts = {
            what: _verdict([pair[what] for pair in pairs], least[list(SHAPES).index(kind)])
            for what, least in targets.items()
        }
        rows.append({"reader": name, "kind": kind} | _rates(of_one) | verdicts)
        print(_line(rows[-1], verdicts if name != "raysynth" else {}))
    missed = [
        f"{row['reader']}, {row['kind']}, {what}"
        for row in rows
        for what in ("steady", "first", "memory")
        if what in row and row[what]["ratio"] < row[what]["target"]
    ]
    print(f"missed: {missed or 'nothing'}")
    print(json.dumps(facts | {"rows": rows, "missed": missed}))
    return int(bool(missed))


def _verdict(ratios: list[float], target: float) -> dict[str, float]:
    low, middle, high = np.percentile(ratios, [0, 50, 100]).tolist()
    return {"ratio": middle, "low": low, "high": high, "target": target}


def _rates(runs: list[Measured]) -> dict[str, Any]:
    count = len(runs[0].crcs)
    first = np.median([run.first for run in runs], axis=0)
    wall_s, cpu_s = np.median([run.steady for run in runs], axis=0).tolist()
    return {
        "samples": count,
        "steady_per_cpu_s": count / cpu_s,
        "first_per_cpu_s": count / float(first[1]),
        "steady_per_s": count / wall_s,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_mib": float(np.median([run.peak_bytes for run in runs])) / 2**20,
    }


def _line(row: dict[str, Any], verdicts: dict[str, dict[str, float]]) -> str:
    said = []
    for what, verdict in verdicts.items():
        ratio, target = verdict["ratio"], verdict["target"]
        text = f"{what} {ratio:.2f} [{verdict['low']:.2f}, {verdict['high']:.2f}]"
        met = "met" if ratio >= target else "MISSED"
        said.append(f"{text}, target {target:g}: {met}" if target else text)
    return (
        f"{row['reader']:33s}{row['kind']:8s}{row['samples']:7d}{row['steady_per_cpu_s']:15.0f}"
        f"{row['first_per_cpu_s']:10.0f}{row['steady_per_s']:11.0f}{row['cpu_s']:8.2f}"
        f"{row['wall_s']:8.2f}{row['peak_mib']:10.0f}  {'; '.join(said)}"
    )


def _versions() -> dict[str, str]:
    names = ("zarr", "icechunk", "numcodecs", "nibabel", "numpy", "monai", "tensorstore", "zarrs")
    found = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
