"""Synthetic volumes for the benchmarks of reading: the same voxels in every form compared."""

from __future__ import annotations

import importlib
import itertools
import logging
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import nibabel
import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.store.reader import SampleSet
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import sample_set

EDGE, PATCH, NOISE_HU = 256, 64, 25
SHAPES = {"slices": (EDGE, EDGE), "patches": (PATCH, PATCH, PATCH)}
PER_VOLUME = {"slices": EDGE, "patches": (EDGE // PATCH) ** 3}

Crcs = dict[int, int]
"""Row of a sample set -> CRC32C of its voxels."""


def make_volume(number: int) -> NDArray[np.int16]:
    """A smooth body with lungs, and noise of 25 HU, (z, y, x)."""
    z, y, x = np.ogrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]
    body = (y / 0.7) ** 2 + (x / 0.9) ** 2 < 1
    lungs = ((abs(x) - 0.42) / 0.3) ** 2 + (y / 0.5) ** 2 + (z / 0.95) ** 2 < 1
    hu = np.where(lungs, -850, np.where(body, 40, -1000)).astype(np.float32)
    hu += (30 * np.sin(4 * x + number) * np.cos(3 * y) * np.cos(5 * z)).astype(np.float32)
    hu += NOISE_HU * np.random.default_rng(number).standard_normal(hu.shape, np.float32)
    return hu.round().clip(-1024, 3071).astype(np.int16)


def cut(volume: Any, kind: str) -> list[Any]:
    """All samples of a volume (z, y, x), as views."""
    return [volume[_place(number, kind)] for number in range(PER_VOLUME[kind])]


def make_data(
    folder: Path, volumes: int, kinds: Sequence[str] = tuple(SHAPES)
) -> tuple[dict[str, Crcs], dict[str, Any]]:
    """Writes the volumes in every form.

    Returns:
        The CRC32C of every row of both kinds; and of the data: how many times smaller than raw it
        is stored, and raw MB written per second of processor time.
    """
    crcs: dict[str, Crcs] = {kind: {} for kind in kinds}
    seconds = {"Icechunk": 0.0, "plain Zarr": 0.0, ".nii.gz": 0.0}

    def build(root: zarr.Group) -> None:
        roots = {"Icechunk": root, "plain Zarr": zarr.open_group(folder / "plain", mode="w")}
        for group, kind in itertools.product(roots.values(), kinds):
            _declare(group, kind, volumes)
        for number in range(volumes):
            hu = make_volume(number)
            for kind in kinds:
                samples, count = np.stack(cut(hu, kind)), PER_VOLUME[kind]
                crcs[kind].update(crcs_of(enumerate(samples, number * count)))
                for name, group in roots.items():
                    started = time.process_time()
                    write_rows(group[f"samples/{kind}"], number * count, {"hu": samples})
                    seconds[name] += (time.process_time() - started) / len(kinds)
            np.save(folder / f"{number}.npy", hu)
            # NIfTI's first axis is the fastest: the file has the voxels in the order of `hu`.
            image = nibabel.Nifti1Image(hu.T, np.eye(4))
            nibabel.save(image, folder / f"{number}.nii")
            started = time.process_time()
            nibabel.save(image, folder / f"{number}.nii.gz")
            seconds[".nii.gz"] += time.process_time() - started

    with StoreRun(folder / "store", "benchmark", "1") as run:
        run.declare(build, "Volumes")
        run.publish("made")
    raw = volumes * EDGE**3 * 2
    rates = {name: round(raw / 1e6 / spent) for name, spent in seconds.items()}
    ratios = {kind: round(raw / stored_bytes(folder, kind), 2) for kind in kinds}
    return crcs, {"volumes": volumes, "compression": ratios, "write_mb_per_s": rates}


def stored_bytes(folder: Path, kind: str) -> int:
    """Bytes of all shards; Icechunk stores the same ones as plain Zarr."""
    shards = (folder / f"plain/samples/{kind}/hu/c").rglob("*")
    return sum(path.stat().st_size for path in shards if path.is_file())


def _declare(root: zarr.Group, kind: str, volumes: int) -> None:
    count = volumes * PER_VOLUME[kind]
    attributes = {
        "kind": kind,
        "pixel_mm": 1.0,
        "spacing_mm": 1.0,
        "field_of_view_mm": float(SHAPES[kind][-1]),
        "intensity": "hu",
        "fingerprint": "none",
        "settings": {},
        "parent_snapshot": "none",
        "cases": [str(number) for number in range(volumes)],
    }
    spec = sample_set(count, SHAPES[kind])
    group = create_sample_set(root, f"samples/{kind}", spec, attributes)
    cases = np.arange(count) // PER_VOLUME[kind]
    set_index(group, {"case": cases, "split": np.zeros(count)})


def _place(number: int, kind: str) -> tuple[slice | int, ...]:
    if kind == "slices":
        return (number,)
    corner = np.unravel_index(number, [EDGE // PATCH] * 3)
    return tuple(slice(int(c) * PATCH, (int(c) + 1) * PATCH) for c in corner)


def volume_paths(folder: Path, suffix: str) -> list[Path]:
    """The files of one form, a volume each."""
    return [folder / f"{number}{suffix}" for number in range(len(list(folder.glob("*.npy"))))]


def load_nifti(path: Path | str) -> NDArray[np.int16]:
    """A whole volume (z, y, x)."""
    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj).T


def load_sample(path: Path | str, kind: str, number: int) -> NDArray[np.int16]:
    """One sample of a volume; nibabel reads, or unpacks, no more than it must."""
    image: Any = nibabel.load(path)
    z, y, x = (*_place(number, kind), slice(None), slice(None))[:3]
    return np.asarray(image.dataobj[x, y, z]).T


def is_installed(module: str) -> bool:
    """In a process of one reader: imports what it needs, and keeps its warnings quiet."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # MONAI warns of readers that nobody asked for
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def samples_of(store: Path | str, kind: str) -> SampleSet:
    """The sample set of a kind in an Icechunk store."""
    return SampleSet(open_root(store)[f"samples/{kind}"])  # type: ignore[arg-type]


def crcs_of(samples: Iterable[tuple[int, Any]]) -> Crcs:
    """Reads every byte of (row, sample) pairs, no row twice."""
    crcs: Crcs = {}
    for row, sample in samples:
        assert row not in crcs, f"row {row} was shown twice"
        crcs[row] = google_crc32c.value(np.ascontiguousarray(sample).reshape(-1))
    return crcs
