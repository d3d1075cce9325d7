"""Ingest of DICOM series against SimpleITK, MONAI and dicom2nifti (benchmark B1).

python -m jobs.benchmarks.ingest [--series 12] [--slices 200] [--side 512] [--repeats 1]
                                 [--only WORD ...] [--large]

Writes invented chests as DICOM into a temporary folder (two in twelve as JPEG), then reads them
all in every way that is installed, each in processes of its own, in rotating order, from a warm
page cache. raysynth keeps a case on the scanner's grid and finds its anatomy: `ingest` is all of
that; `store` leaves the anatomy out and so does what SimpleITK's and MONAI's plain ways do: read,
HU, write. Their `1 mm` ways resample as well, which raysynth does when it cuts samples. A `loop` is
what people write: one series after the other, with all the threads that the library takes. The
other ways have two workers of one thread, as raysynth has. Voxels and geometry of all ways are
compared first; it exits 1 if they differ, or where a target is missed. Ray takes 9 of a run's
seconds, however long it is: `--series 48` shows what a larger archive gets, and `--only` leaves out
peers whose name has none of the words. `--large` instead measures what one worker takes for one
scan of 700 slices.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

WORKERS = 2
EXTENT_MM = (300.0, 360.0, 360.0)
MIB = 2**20
LARGE = {"series": 1, "slices": 700, "side": 512}

Seconds = dict[str, float]


def main(arguments: list[str]) -> int:
    """Runs the benchmark, or as a child one of its ways; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--series", type=int, default=12)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="words of peers' names")
    parser.add_argument("--large", action="store_true", help="one scan of 700 slices, one worker")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.way:
        way, scans, out = options.way
        print(json.dumps(WAYS[way](Path(scans), Path(out))))
        return 0
    if options.large:
        vars(options).update(LARGE)
    with tempfile.TemporaryDirectory(prefix="raysynth-b1-") as folder:
        scans = Path(folder, "scans")
        coding = write_scans(scans, options.series, options.slices, options.side)
        raw_mb = options.series * options.slices * options.side**2 * 2 / 1e6
        load = os.getloadavg()[0]
        facts: dict[str, Any] = {"raw_mb": raw_mb, "coding": coding, "load": load}
        print(
            f"{options.series} series of {options.slices} x {options.side}^2 int16, "
            f"{raw_mb:.0f} MB, {coding}; {WORKERS} workers of {os.cpu_count()}, load {load:.2f}"
        )
        if options.large:
            return _report_large(facts, _measure("raysynth ingest", scans, Path(folder, "out")))
        return _compare(scans, Path(folder), _chosen(options.only), options.repeats, facts)


# Scans


def write_scans(folder: Path, series: int, slices: int, side: int) -> str:
    """Writes invented chests, a folder a series; says how they are coded."""
    packed = [n > 0 and (series - 1 - n) % 6 == 0 for n in range(series)]
    tasks = [(folder / f"series-{n:02d}", slices, side, packed[n]) for n in range(series)]
    with ProcessPoolExecutor(WORKERS) as pool:
        list(pool.map(_write_series, *zip(*tasks, strict=True)))
    return f"{packed.count(False)} Explicit Little Endian, {packed.count(True)} lossless JPEG"


def chest(slices: int, side: int, seed: int) -> NDArray[np.int16]:
    """HU of an ellipse with two lungs, a trachea and a spine, and noise of 25 HU; feet first."""
    y, x = np.ogrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    body = (x / 0.9) ** 2 + (y / 0.65) ** 2 < 1
    spine = (x / 0.09) ** 2 + ((y - 0.42) / 0.09) ** 2 < 1
    trachea = (x / 0.045) ** 2 + ((y + 0.1) / 0.045) ** 2 < 1
    lungs = ((np.abs(x) - 0.45) / 0.3) ** 2 + (y / 0.45) ** 2
    random = np.random.default_rng(seed)
    noise = random.normal(0, 25, 4 * side * side).astype(np.int16)
    hu = np.empty((slices, side, side), np.int16)
    for plane, height in enumerate(np.linspace(-1, 1, slices)):
        hu[plane] = np.where(body, 40, -1000)
        hu[plane][lungs < 1 - (height / 0.8) ** 2] = -850
        hu[plane][spine] = 400
        if height > 0.1:
            hu[plane][trachea] = -1000
        start = random.integers(len(noise) - side * side)
        hu[plane] += noise[start : start + side * side].reshape(side, side)
    return hu.clip(-1024, 3071)


def chest_of(folder: Path) -> NDArray[np.int16]:
    """The voxels that were written into a series' folder."""
    import pydicom

    files = list(folder.iterdir())
    side = int(pydicom.dcmread(files[0], stop_before_pixels=True).Rows)
    return chest(len(files), side, seed=_number(folder))


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _series_uid(folder: Path) -> str:
    return f"1.2.826.0.1.3680043.8.498.1.{_number(folder) + 1}"


def _write_series(folder: Path, slices: int, side: int, is_packed: bool) -> None:
    from imagecodecs import ljpeg_encode
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1

    folder.mkdir(parents=True)
    z_mm, y_mm, x_mm = (mm / n for mm, n in zip(EXTENT_MM, (slices, side, side), strict=True))
    for plane, hu in enumerate(chest(slices, side, seed=_number(folder))):
        tags = Dataset()
        tags.file_meta = FileMetaDataset()
        tags.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        tags.SOPClassUID, tags.Modality = CTImageStorage, "CT"
        tags.SeriesInstanceUID = _series_uid(folder)
        tags.StudyInstanceUID = f"{tags.SeriesInstanceUID}.1"
        tags.SOPInstanceUID = f"{tags.SeriesInstanceUID}.2.{plane + 1}"
        tags.PatientID, tags.InstanceNumber = f"invented-{_number(folder)}", plane + 1
        tags.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        tags.ImagePositionPatient = [-EXTENT_MM[2] / 2, -EXTENT_MM[1] / 2, round(plane * z_mm, 6)]
        tags.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        tags.PixelSpacing, tags.SliceThickness = [y_mm, x_mm], round(z_mm, 6)
        tags.Rows = tags.Columns = side
        tags.SamplesPerPixel, tags.PhotometricInterpretation = 1, "MONOCHROME2"
        tags.BitsAllocated, tags.BitsStored, tags.HighBit = 16, 12, 11
        tags.PixelRepresentation = 0
        tags.RescaleSlope, tags.RescaleIntercept = 1, -1024
        stored = (hu + 1024).astype("<u2")
        tags.PixelData = stored.tobytes()
        if is_packed:
            tags.file_meta.TransferSyntaxUID = JPEGLosslessSV1
            tags.PixelData = encapsulate([ljpeg_encode(stored, bitspersample=12)])
            tags["PixelData"].is_undefined_length = True
        tags.save_as(folder / f"{plane:04d}.dcm", enforce_file_format=True)


# Ways to read them. Each runs in a child, and returns its seconds after the start-up.


def _raysynth(scans: Path, out: Path, anatomy: bool) -> Seconds:
    """`raysynth ingest`; or the same run with cases that keep no anatomy."""
    from raysynth.data.ingest import ingest
    from raysynth.data.sources import list_cases
    from raysynth.data.units import write_units
    from raysynth.session import connect
    from raysynth.store.run import StoreRun

    spent = {"commit": 0.0}
    for name in ("commit", "publish"):
        setattr(StoreRun, name, _timed(getattr(StoreRun, name), spent))
    config = recipe(scans, out)
    with connect(num_cpus=WORKERS):
        start = time.perf_counter()
        if anatomy:
            ingest(config)
        else:
            units = {ref.case_id: ref for ref in list_cases(config)[0]}
            with StoreRun(config.store_url, "ingest", "plain") as run:
                assert not write_units(run, units, _store, stage="store", noun="cases")
                run.publish("stored")
        work_s = time.perf_counter() - start
    return {"work_s": work_s, "commit_s": spent["commit"]}


def _store(root: Any, ref: Any) -> None:
    """Read, HU, write."""
    from raysynth.data.sources import read_case
    from raysynth.store.writer import create_volume, write_volume

    case = read_case(ref)
    write_volume(create_volume(root, case), case)


def recipe(scans: Path, out: Path) -> Any:
    """The recipe that ingests the scans into `out`."""
    from raysynth.config import ExperimentConfig

    source = {"kind": "dicom", "path": scans}
    model = {"family": "autoencoder_kl", "channels": (8, 8, 8), "norm_num_groups": 4}
    values = {"name": "benchmark", "work_dir": out, "data": {"source": source}, "model": model}
    return ExperimentConfig.model_validate(values)


def _timed(function: Callable[..., Any], spent: Seconds) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent["commit"] += time.perf_counter() - start

    return wrapper


def _with(
    convert: Callable[[Path, Path], None], scans: Path, out: Path, workers: int = WORKERS
) -> Seconds:
    """One call a series, two at a time or one after the other."""
    folders = sorted(scans.iterdir())
    targets = [out / f"{folder.name}.nii" for folder in folders]
    start = time.perf_counter()
    if workers == 1:
        list(map(convert, folders, targets))
    else:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(convert, folders, targets))
    return {"work_s": time.perf_counter() - start}


def _simple_itk(
    folder: Path, target: Path, spacing_mm: float | None, suffix: str, threads: int = 1
) -> None:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    if spacing_mm is not None:
        size = [
            int(np.ceil(n * mm / spacing_mm))
            for n, mm in zip(image.GetSize(), image.GetSpacing(), strict=True)
        ]
        grid = (image.GetOrigin(), (spacing_mm,) * 3, image.GetDirection())
        image = sitk.Resample(
            image, size, sitk.Transform(), sitk.sitkLinear, *grid, -1000, image.GetPixelID()
        )
    sitk.WriteImage(image, f"{target}{suffix}")


def _monai(folder: Path, target: Path, spacing_mm: float | None) -> None:
    from monai.data import ITKReader, PydicomReader
    from monai.transforms import Compose, LoadImage, Orientation, SaveImage, Spacing

    reader = ITKReader() if importlib.util.find_spec("itk") else PydicomReader()
    save = SaveImage(
        output_dir=target.parent,
        output_postfix="",
        output_dtype=np.int16,
        resample=False,
        separate_folder=False,
        print_log=False,
    )
    spacing = [] if spacing_mm is None else [Spacing((spacing_mm,) * 3, mode="bilinear")]
    load = LoadImage(reader, image_only=True, ensure_channel_first=True)
    image = Compose([load, Orientation("RAS", labels=None), *spacing])(folder)
    save(image, meta_data={**image.meta, "filename_or_obj": target.stem})


def _run_monai(scans: Path, out: Path, spacing_mm: float | None, workers: int = WORKERS) -> Seconds:
    import monai.data  # noqa: F401 - once, before the workers fork
    import torch

    torch.set_num_threads(WORKERS // workers)
    return _with(partial(_monai, spacing_mm=spacing_mm), scans, out, workers)


def _dicom2nifti(folder: Path, target: Path) -> None:
    from dicom2nifti import dicom_series_to_nifti

    dicom_series_to_nifti(folder, f"{target}.gz", reorient_nifti=False)


def _limit(scans: Path, out: Path) -> Seconds:
    """The least there is to do: read the files, pack the pixels as the store does, write them."""
    folders = sorted(scans.iterdir())
    seconds = {}
    for name, work in (("read_s", _read_files), ("write_s", _pack)):
        with ProcessPoolExecutor(WORKERS) as pool:
            spent = list(pool.map(work, folders, [out / folder.name for folder in folders]))
        seconds[name] = sum(spent) / WORKERS
    return seconds


def _read_files(folder: Path, _: Path) -> float:
    start = time.perf_counter()
    for file in folder.iterdir():
        file.read_bytes()
    return time.perf_counter() - start


def _pack(folder: Path, target: Path) -> float:
    from numcodecs.blosc import SHUFFLE, compress

    hu = chest_of(folder)
    start = time.perf_counter()
    with target.open("wb") as file:
        for plane in range(0, len(hu), 8):
            file.write(compress(hu[plane : plane + 8].copy(), b"lz4", 5, SHUFFLE))
    return time.perf_counter() - start


def _write_speed(scans: Path, out: Path) -> Seconds:
    """The same volume through Icechunk and into a plain Zarr folder, in turn; commits not counted.

    Those have a line of their own.
    """
    import zarr

    from raysynth.case import Case
    from raysynth.store.run import StoreRun
    from raysynth.store.writer import create_volume, write_volume
    from raysynth.volume import Volume

    case = Case("case", "patient", "train", Volume(chest_of(min(scans.iterdir())), (1.5, 0.7, 0.7)))
    seconds: dict[str, list[float]] = {"plain_s": [], "icechunk_s": []}

    def write(root: zarr.Group, name: str) -> None:
        start = time.perf_counter()
        write_volume(create_volume(root, case), case)
        seconds[name].append(time.perf_counter() - start)

    for repeat in range(6):
        os.sync()
        write(zarr.create_group(out / f"plain-{repeat}", zarr_format=3), "plain_s")
        with StoreRun(out / f"store-{repeat}", "ingest", "once") as run:
            run.declare(partial(write, name="icechunk_s"), "one", ["one"])
        shutil.rmtree(out / f"plain-{repeat}")
        shutil.rmtree(out / f"store-{repeat}")
    # The first of each also pays for imports and the making of pools.
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


WAYS: dict[str, Callable[[Path, Path], Seconds]] = {
    "raysynth ingest": partial(_raysynth, anatomy=True),
    "raysynth store": partial(_raysynth, anatomy=False),
    "SimpleITK 1 mm loop": partial(
        _with,
        partial(_simple_itk, spacing_mm=1.0, suffix=".gz", threads=WORKERS),
        workers=1,
    ),
    "MONAI 1 mm loop": partial(_run_monai, spacing_mm=1.0, workers=1),
    "SimpleITK 1 mm .nii.gz": partial(_with, partial(_simple_itk, spacing_mm=1.0, suffix=".gz")),
    "SimpleITK .nii.gz": partial(_with, partial(_simple_itk, spacing_mm=None, suffix=".gz")),
    "SimpleITK .nii": partial(_with, partial(_simple_itk, spacing_mm=None, suffix="")),
    "MONAI 1 mm .nii.gz": partial(_run_monai, spacing_mm=1.0),
    "MONAI .nii.gz": partial(_run_monai, spacing_mm=None),
    "dicom2nifti .nii.gz": partial(_with, _dicom2nifti),
}
FLOORS = {"limit": _limit, "write speed": _write_speed}
"""What is measured once, beside the ways."""

TARGETS = (
    ("SimpleITK 1 mm loop", "raysynth ingest", 4.0),
    ("MONAI 1 mm loop", "raysynth ingest", 6.0),
    ("SimpleITK .nii.gz", "raysynth store", 4.0),
    ("MONAI .nii.gz", "raysynth store", 6.0),
)
"""A peer's wall time over ours: a user's script, and like for like."""


# Measuring them


@dataclass
class Run:
    """One child: seconds, and peak MiB of it with all its processes and of the largest one."""

    wall_s: float
    cpu_s: float
    all_mib: float
    one_mib: float
    told: Seconds

    @property
    def start_s(self) -> float:
        """Before and after the work: imports, and Ray's start and end."""
        return self.wall_s - self.told.get("work_s", 0.0)


class _Watch(threading.Thread):
    """Looks at a process and its descendants, up to five times a second.

    To count shared pages the kernel walks through all of a process's: with Ray's dozen processes,
    five times a second took one core of two. So it looks for a twentieth of the time.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.ended = psutil.Process(pid), threading.Event()
        self.cpu_s: dict[int, float] = {}
        self.all_mib = self.one_mib = 0.0

    def run(self) -> None:
        pause_s = 0.2
        while not self.ended.wait(pause_s):
            started, total = time.perf_counter(), 0.0
            with suppress(psutil.Error):
                for process in [self.root, *self.root.children(recursive=True)]:
                    with suppress(psutil.Error, OSError, IndexError):  # it ended
                        self.cpu_s[process.pid] = sum(process.cpu_times()[:2])
                        # Shared pages count once: each process gets its share of them.
                        total += process.memory_full_info().pss / MIB
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        highest = int(status.partition("VmHWM:")[2].split()[0]) / 1024
                        self.one_mib = max(self.one_mib, highest)
            self.all_mib = max(self.all_mib, total)
            pause_s = max(0.2, 20 * (time.perf_counter() - started))


def _measure(way: str, scans: Path, out: Path) -> Run:
    """Runs one way in a child."""
    out.mkdir()
    os.sync()  # what the last one wrote
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.benchmarks.ingest", "--way", way, str(scans), str(out)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        watch = _Watch(child.pid)
        watch.start()
        output, _ = child.communicate()
        wall_s = time.perf_counter() - start
        watch.ended.set()
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{way} failed:\n{log.read()[-3000:]}")
    told = json.loads(output.splitlines()[-1])
    return Run(wall_s, sum(watch.cpu_s.values()), watch.all_mib, watch.one_mib, told)


def _chosen(only: list[str]) -> list[str]:
    """Our ways, and the installed ones of peers whose name has one of the words."""
    absent = [] if importlib.util.find_spec("dicom2nifti") else ["dicom2nifti .nii.gz"]
    named = (way for way in WAYS if any(word in way for word in ("raysynth", *only)))
    return [way for way in named if way not in absent]


def _compare(
    scans: Path, folder: Path, ways: list[str], repeats: int, facts: dict[str, Any]
) -> int:
    for name, measure in FLOORS.items():
        (folder / name).mkdir()
        facts |= measure(scans, folder / name)
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for repeat in range(repeats):
        shift = repeat % len(ways)
        for way in ways[shift:] + ways[:shift]:
            runs[way].append(_measure(way, scans, folder / way))
        _check_equal(scans, {way: folder / way for way in ways})
        for way in ways:
            shutil.rmtree(folder / way)
    return _report(runs, facts)


# Are they equal?


def _check_equal(scans: Path, outs: dict[str, Path]) -> None:
    """Raises unless every way gave the voxels and the geometry that were invented."""
    from raysynth.seeding import load_key, pseudonym
    from raysynth.store.reader import read_case
    from raysynth.store.repository import open_root
    from raysynth.volume import Volume

    folders = sorted(scans.iterdir())
    for folder in {folders[0], folders[-1]}:  # the last one is packed
        hu = chest_of(folder)
        z_mm, y_mm, x_mm = (mm / n for mm, n in zip(EXTENT_MM, hu.shape, strict=True))
        truth = Volume(hu, (round(z_mm, 6), y_mm, x_mm), (0, -EXTENT_MM[1] / 2, -EXTENT_MM[2] / 2))
        for way, out in outs.items():
            if "raysynth" in way:
                case_id = pseudonym(load_key(out / "pseudonym.key"), "series", _series_uid(folder))
                volume = read_case(open_root(out / "store"), case_id).volume
                gap = float(np.abs(volume.hu - truth.hu.astype(np.int32)).max())
                equal = gap == 0 and np.allclose(volume.spacing_mm, truth.spacing_mm)
                equal &= np.allclose(volume.position_mm((1, 2, 3)), truth.position_mm((1, 2, 3)))
            else:
                equal, gap = _compare_image(next(out.glob(f"{folder.name}.nii*")), truth, way)
            if not equal:
                raise SystemExit(f"{way}: {folder.name} differs by {gap:.3g} HU: not comparable")


def _compare_image(file: Path, truth: Any, way: str) -> tuple[bool, float]:
    """Whether 5,000 random voxels are what `truth` has at their places, and the largest gap."""
    import SimpleITK as sitk
    from scipy.ndimage import map_coordinates

    image = sitk.ReadImage(str(file))
    voxels = sitk.GetArrayFromImage(image)
    index = np.random.default_rng(0).integers(0, voxels.shape, (5000, 3))  # (z, y, x)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    points = image.GetOrigin() + (index[:, ::-1] * image.GetSpacing()) @ direction.T  # (x, y, z)
    there = truth.index_of(points[:, ::-1])
    inside = np.all((there > -1e-2) & (there < np.array(truth.shape) - 0.99), axis=1)
    expected = map_coordinates(truth.hu, there.T, np.float64, order=1, mode="nearest")
    gap = float(np.abs(voxels[tuple(index.T)] - expected)[inside].max())
    if "1 mm" in way:  # rounded or cut to whole HU; places in single precision
        return bool(inside.mean() > 0.9 and gap <= 1.5), gap
    on_grid = np.abs(there - np.rint(there)).max() < 1e-2 and inside.all()
    return bool(on_grid and sorted(voxels.shape) == sorted(truth.shape) and round(gap) == 0), gap


# What came out


def _report(runs: dict[str, list[Run]], facts: dict[str, Any]) -> int:
    """Prints the table, the targets and the JSON line."""
    names = ("wall_s", "start_s", "cpu_s", "all_mib", "one_mib")
    columns = (*names, "MB/s", "of ingest", "without start")
    print(f"{'way':24}" + "".join(f"{name:>14}" for name in columns))
    ours = runs["raysynth ingest"]
    rows: dict[str, dict[str, float]] = {}
    for way, of_way in runs.items():
        row = {name: float(np.median([getattr(run, name) for run in of_way])) for name in names}
        pairs = list(zip(of_way, ours, strict=True))
        work = [one.told["work_s"] / our.told["work_s"] for one, our in pairs]
        row["MB/s"] = facts["raw_mb"] / row["wall_s"]
        row["of ingest"] = float(np.median([one.wall_s / our.wall_s for one, our in pairs]))
        row["without start"] = float(np.median(work))
        rows[way] = row
        print(f"{way:24}" + "".join(f"{row[name]:14.2f}" for name in columns))
    limit_s = max(facts["read_s"], facts["write_s"])
    print(f"limit {limit_s:.2f} s: reading {facts['read_s']:.2f}, packing {facts['write_s']:.2f}")
    seconds = {way: row["wall_s"] for way, row in rows.items()}
    commit_s = float(np.median([run.told["commit_s"] for run in ours]))
    checks = [
        *(
            (f"{peer} / {our}", seconds[peer] / seconds[our], ">=", target)
            for peer, our, target in TARGETS
            if peer in seconds
        ),
        ("limit / raysynth ingest", limit_s / seconds["raysynth ingest"], ">=", 0.6),
        ("limit / raysynth store", limit_s / seconds["raysynth store"], ">=", 0.6),
        ("GiB of ingest's processes", rows["raysynth ingest"]["all_mib"] / 1024, "<=", 2.0),
        ("plain Zarr / Icechunk, writing", facts["plain_s"] / facts["icechunk_s"], ">=", 0.85),
        ("commits / raysynth ingest", commit_s / seconds["raysynth ingest"], "<=", 0.05),
    ]
    return _judge(checks, {**facts, "ways": rows})


def _report_large(facts: dict[str, Any], run: Run) -> int:
    print(f"{run.wall_s:.1f} s in all, {run.told['work_s']:.1f} s after the start-up")
    checks = [("GiB of the worker", run.one_mib / 1024, "<=", 2.0)]
    return _judge(checks, {**facts, "wall_s": run.wall_s, "all_mib": run.all_mib})


def _judge(checks: list[tuple[str, float, str, float]], facts: dict[str, Any]) -> int:
    """Prints the targets, then everything as JSON; returns the exit code."""
    facts |= {"load_at_end": os.getloadavg()[0], "targets": {}}
    for name, value, sign, target in checks:
        met = bool(value >= target if sign == ">=" else value <= target)
        facts["targets"][name] = {"value": round(float(value), 3), "met": met}
        print(f"{name:42} {value:7.3f}  target {sign} {target:g}: {'met' if met else 'MISSED'}")
    print(json.dumps(facts, default=float))
    return int(not all(check["met"] for check in facts["targets"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
