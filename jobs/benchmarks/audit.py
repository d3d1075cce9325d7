"""Does the privacy audit find planted copies (reliability S9)?

python -m jobs.benchmarks.audit [--planted N] [--patients N] [--seed N]

Into honest samples, crops of patients whom the audit has never seen, copies of training samples are
planted: exact ones, under noise of up to 5 HU, flipped or transposed, shifted by 4 pixels, and all
of it together. Then the audit runs as it does on a store. With RAYSYNTH_REAL_DATA set the samples
are LIDC-IDRI's nodule slices (8-bit grey values; 5 HU are 5/1400 of their range), else phantoms.
Takes some minutes of one core. Prints a table and a line of JSON; exits 1 unless all exact copies
are found, 95 % of each other kind, and at most 1 % of the honest samples are flagged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from jobs.benchmarks.ratios import facts_of_run
from raysynth.case import Intensity
from raysynth.config import AuditConfig, PhantomSource, SliceSamples
from raysynth.errors import UnreadableCase
from raysynth.evaluation.audit_pictures import Look
from raysynth.evaluation.audit_region import RegionAudit, audit_region
from raysynth.evaluation.statistics import clopper_pearson
from raysynth.formats.lidc_slices import find_crops, patient_of, read_crop
from raysynth.metrics.memorization import SHIFT_PX
from raysynth.phantom.patient import phantom_case
from raysynth.preprocess.slices import cut_slices, plan_slices
from raysynth.progress import progress
from raysynth.session import connect
from raysynth.store.reader import SampleSet, case_attrs
from raysynth.store.writer import create_sample_set, create_volume, set_index, write_rows
from raysynth.volume import AIR_HU, RELATIVE_RANGE
from raysynth.window import LUNG_WINDOW_HU
from storage_schema.v1 import SPLITS, sample_set, synthetic_run

Kind = Literal["exact", "noise", "flip", "shift", "all together"]
TARGETS: dict[Kind, float] = {
    "exact": 1.0,
    "noise": 0.95,
    "flip": 0.95,
    "shift": 0.95,
    "all together": 0.95,
}
MAX_FALSE_ALARMS = 0.01
NOISE_HU, SHIFT = 5, 4

SHARES = {"train": 0.4, "test": 0.3}
"""Of patients; the rest is honest samples."""


@dataclass(frozen=True)
class Slices:
    """Real slices with a box each, and who they are of."""

    hu: NDArray[np.int16]
    box: NDArray[np.int16]
    patient: NDArray[np.int64]
    intensity: Intensity

    def take(self, rows: NDArray[Any]) -> Slices:
        """Some of them."""
        return Slices(self.hu[rows], self.box[rows], self.patient[rows], self.intensity)


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--planted", type=int, default=100, help="of each kind")
    parser.add_argument(
        "--patients", type=int, default=20, help="phantoms, if there is no real data"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    data = os.environ.get("RAYSYNTH_REAL_DATA")
    slices = _real(Path(data)) if data else _phantoms(options.patients)
    names = rng.permutation(np.unique(slices.patient))
    cuts = np.cumsum([round(share * len(names)) for share in SHARES.values()])
    groups = [np.isin(slices.patient, part) for part in np.split(names, cuts)]
    train, held_out, honest = (slices.take(group) for group in groups)
    planted = {kind: plant(kind, train, options.planted, rng) for kind in TARGETS}
    facts = facts_of_run("numpy") | {
        "texture": "LIDC-IDRI slices" if data else "phantoms",
        "patients": [len(np.unique(part.patient)) for part in (train, held_out, honest)],
    }
    started, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, connect():
        found, flagged = _audit(Path(folder), train, held_out, [honest, *planted.values()])
    facts |= {"seconds": time.monotonic() - started, "driver_cpu_s": time.process_time() - cpu}
    sizes = np.cumsum([len(honest.hu), *(len(part.hu) for part in planted.values())])[:-1]
    of_honest, *of_planted = np.split(flagged, sizes)
    return _report(of_honest, dict(zip(planted, of_planted, strict=True)), found, facts)


def plant(kind: Kind, train: Slices, count: int, rng: np.random.Generator) -> Slices:
    """Copies of random training slices."""
    rows = rng.choice(len(train.hu), count, replace=len(train.hu) < count)
    copies = train.take(rows)
    hu, box = copies.hu.copy(), copies.box.copy()
    together = kind == "all together"
    for image, place in zip(hu, box, strict=True):
        if kind == "flip" or together:
            image[:], place[:] = flipped(image, place, int(rng.integers(1, 8)))
        if kind == "shift" or together:
            image[:] = shifted(image, rng.permutation(DIRECTIONS)[0] * SHIFT, train.intensity)
    if kind == "noise" or together:
        low, high = RELATIVE_RANGE if train.intensity == "relative" else LUNG_WINDOW_HU
        reach = NOISE_HU / (LUNG_WINDOW_HU[1] - LUNG_WINDOW_HU[0]) * (high - low)
        hu = np.rint(hu + rng.uniform(-reach, reach, hu.shape)).astype(np.int16)
    return Slices(hu, box, copies.patient, copies.intensity)


DIRECTIONS = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])


def flipped(
    image: NDArray[np.int16], box: NDArray[np.int16], version: int
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """A square slice under one of the seven flips and transposes, with its box."""
    side = len(image)
    corners = np.array(box, np.int16).reshape(2, 2)  # (start, stop), (y, x)
    if version & 4:
        image, corners = image.T, corners[:, ::-1]
    for axis, bit in ((0, 1), (1, 2)):
        if version & bit:
            image = np.flip(image, axis)
            corners = corners.copy()
            corners[:, axis] = side - corners[::-1, axis]
    return image.copy(), corners.ravel()


def shifted(
    image: NDArray[np.int16], step: NDArray[np.int64], intensity: Intensity
) -> NDArray[np.int16]:
    """A slice moved by whole pixels, under a box that stays; what comes in is air."""
    air = RELATIVE_RANGE[0] if intensity == "relative" else AIR_HU
    padded = np.pad(image, SHIFT, constant_values=air)
    y, x = SHIFT - step
    return padded[y : y + len(image), x : x + len(image)]


def _audit(
    folder: Path, train: Slices, held_out: Slices, run: Sequence[Slices]
) -> tuple[RegionAudit, NDArray[np.bool_]]:
    """Runs the audit on a sample set and a run that lie in a folder."""
    root = zarr.open_group(folder, mode="w")
    real = [train, held_out]
    split = np.repeat([SPLITS.index("train"), SPLITS.index("test")], [len(one.hu) for one in real])
    sets = {
        "real": _write(root, "samples/slices", real, {"split": split}),
        "synthetic": _write(root, "synthetic/run", run, {}),
    }
    patients = np.concatenate([one.patient for one in real])
    side = train.hu.shape[1]
    look = Look("nodule", 32 if side >= 64 else 16, SHIFT_PX, 1, LUNG_WINDOW_HU)
    with progress("audit", sets["synthetic"].count) as view:
        found, scores = audit_region(look, sets, patients, None, AuditConfig(), 0, view)
    return found, scores.flagged


def _write(
    root: zarr.Group, path: str, parts: Sequence[Slices], index: dict[str, NDArray[Any]]
) -> SampleSet:
    hu = np.concatenate([part.hu for part in parts])
    make = sample_set if path.startswith("samples") else synthetic_run
    spec = make(len(hu), hu.shape[1:])
    attributes: dict[str, Any] = {a.name: "" for a in spec.attributes}
    attributes |= {"kind": "slices", "pixel_mm": 1.0, "intensity": parts[0].intensity}
    group = create_sample_set(root, path, spec, attributes)
    set_index(group, {"box": np.concatenate([part.box for part in parts]), **index})
    write_rows(group, 0, {"hu": hu})
    return SampleSet(group)


def _real(data: Path) -> Slices:
    """LIDC-IDRI's nodule slices, each with the box around what its readers agree on."""
    hu, box, patient = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(data / "lidc-slices-2d" / "lidc_slices_core.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        for files in find_crops(Path(folder)):
            try:
                volume, nodule, _ = read_crop(files, 0.5)
            except UnreadableCase:
                continue
            (_, y, x), (_, height, width) = nodule.corner_zyx, nodule.mask.shape
            hu.append(volume.hu[0])
            box.append((y, x, y + height, x + width))
            patient.append(int(patient_of(files[0]).rpartition("-")[2]))
    return Slices(np.stack(hu), np.array(box, np.int16), np.array(patient), "relative")


def _phantoms(count: int) -> Slices:
    """Slices of built-in patients with a nodule each."""
    source = PhantomSource(
        num_patients=count,
        spacing_mm=(2.5, 3.0, 3.0),
        nodules_per_patient=(12, 16),
        min_diameter_mm=10,
    )
    samples = SliceSamples(size=128, spacing_mm=2.5, field_of_view_mm=256, nodule_free_every=0)
    hu, box, patient = map(np.concatenate, zip(*_cut_phantoms(source, samples), strict=True))
    return Slices(hu, box, patient, "hu")


def _cut_phantoms(
    source: PhantomSource, samples: SliceSamples
) -> Iterator[tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int64]]]:
    for number in range(source.num_patients):
        case = phantom_case(source, number, "train")
        root = zarr.group()
        create_volume(root, case)
        plans = plan_slices(case_attrs(root, case.case_id), samples)
        cut = cut_slices(case, plans, samples)
        yield cut.hu, cut.box, np.full(len(plans), number)


def _report(
    honest: NDArray[np.bool_],
    planted: dict[Kind, NDArray[np.bool_]],
    found: RegionAudit,
    facts: dict[str, Any],
) -> int:
    threshold, alarms = found.threshold, int(honest.sum())
    low, high = clopper_pearson(alarms, len(honest))
    met = [alarms <= MAX_FALSE_ALARMS * len(honest)]
    print(
        f"{found.train} training samples of {found.train_patients} patients, {found.held_out} "
        f"held-out ones of {found.held_out_patients}; flagged above {threshold.score:.2f}"
    )
    print(
        f"{'honest':14s}{alarms:5d} of {len(honest)} flagged, {alarms / len(honest):.2%} "
        f"[{low:.2%}, {high:.2%}], target <= 1 %: {'met' if met[0] else 'MISSED'}"
    )
    for kind, flagged in planted.items():
        hits = int(flagged.sum())
        met.append(hits >= TARGETS[kind] * len(flagged))
        print(
            f"{kind:14s}{hits:5d} of {len(flagged)} found, target {TARGETS[kind]:.0%}: "
            f"{'met' if met[-1] else 'MISSED'}"
        )
    figures: dict[str, int] = {kind: int(flagged.sum()) for kind, flagged in planted.items()}
    figures |= {"honest": len(honest), "false_alarms": alarms}
    print(json.dumps(facts | {"found": figures, "met": all(met)}))
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
