"""Plans axial slices from what is known of a case, and cuts them from its voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.case import ATTRIBUTES, MAX_READERS, Case, Label, Nodule
from raysynth.config.data import SliceSamples
from raysynth.layout.compose import square_box
from raysynth.preprocess.resample import (
    PlaneBlender,
    Weights,
    grid_positions,
    label_weights,
    linear_weights,
    majority,
    resample_plane,
    taps,
)
from raysynth.store.reader import VolumeAttrs
from raysynth.volume import AIR_HU

NO_BOX = (-1, -1, -1, -1)
MIN_BOX_PX = 2
"""Least side of a nodule's box: a smaller one is lost on a latent grid."""


@dataclass(frozen=True, order=True)
class SlicePlan:
    """One slice to cut.

    Attributes:
        case_id: the case it comes from.
        z_mm: its place along the volume's first axis, from the centre of voxel 0.
        nodule: number of the nodule that it shows and whose box and ratings it carries; -1: no
            nodule crosses the slice.
        middle_mm: middle of the image along the volume's (y, x) axes, from the centre of voxel 0.
    """

    case_id: str
    z_mm: float
    nodule: int
    middle_mm: tuple[float, float]


@dataclass(frozen=True)
class SliceBatch:
    """Slices in the order of their plans, in radiological orientation.

    Rows run towards the back, columns towards the patient's left.

    Attributes:
        hu: int16 (n, size, size); AIR_HU outside the scan.
        layout: uint8 labels (n, size, size).
        box: int16 (n, 4), the square around the planned nodule (y0, x0, y1, x1); -1 if none.
        ratings: uint8 (n, MAX_READERS, 9), rows of readers padded with 0.
        z_mm: float32 (n,), as planned.
    """

    hu: NDArray[np.int16]
    layout: NDArray[np.uint8]
    box: NDArray[np.int16]
    ratings: NDArray[np.uint8]
    z_mm: NDArray[np.float32]


def plan_slices(case: VolumeAttrs, samples: SliceSamples) -> list[SlicePlan]:
    """The slices that a case yields, from the feet upwards; no voxels are looked at.

    A plane crossed by two nodules is planned once for each. A nodule gets no slices if it is too
    small for `samples` or not wholly in the image; planes that it crosses still do not count as
    nodule-free. Around the lungs, a case without any yields nothing.
    """
    crops = samples.centre == "nodule"
    whole = tuple((0, size) for size in case.shape)
    frame_zyx = whole if samples.centre == "volume" else case.lung_zyx
    if frame_zyx is None and not crops:
        return []
    planes_mm = grid_positions(case.shape[0], case.spacing_mm[0], samples.spacing_mm)
    plans = []
    for number, nodule in enumerate(case.nodules):
        middle_mm = _middle_mm(nodule.box_zyx if crops else frame_zyx, case)
        if nodule.diameter_mm >= samples.min_nodule_mm and _in_image(
            nodule, case, middle_mm, samples.field_of_view_mm
        ):
            planes = _planes_of(nodule, planes_mm, case, samples)
            plans += [SlicePlan(case.case_id, z_mm, number, middle_mm) for z_mm in planes]
    if samples.nodule_free_every:
        middle_mm = _middle_mm(frame_zyx, case)
        free = _free_planes(planes_mm, case, samples)[:: samples.nodule_free_every]
        plans += [SlicePlan(case.case_id, z_mm, -1, middle_mm) for z_mm in free]
    return sorted(plans)


def cut_slices(case: Case, plans: Sequence[SlicePlan], samples: SliceSamples) -> SliceBatch:
    """Cuts the planned slices of one case; planes that no plan needs are not touched.

    Args:
        case: with its layout.
        plans: of this case, from `plan_slices` with the same `samples`.
        samples: size and field of view.
    """
    assert case.layout is not None, f"case {case.case_id} has no layout yet"
    count, size = len(plans), samples.size
    batch = SliceBatch(
        hu=np.empty((count, size, size), np.int16),
        layout=np.empty((count, size, size), np.uint8),
        box=np.full((count, 4), NO_BOX, np.int16),
        ratings=np.zeros((count, MAX_READERS, len(ATTRIBUTES)), np.uint8),
        z_mm=np.array([plan.z_mm for plan in plans], np.float32),
    )
    # Crops around different nodules lie in different frames.
    for middle_mm in sorted({plan.middle_mm for plan in plans}):
        rows = [row for row, plan in enumerate(plans) if plan.middle_mm == middle_mm]
        _cut_frame(batch, np.array(rows), case, plans, samples)
    return batch


def _cut_frame(
    batch: SliceBatch,
    rows: NDArray[np.int64],
    case: Case,
    plans: Sequence[SlicePlan],
    samples: SliceSamples,
) -> None:
    """Fills the rows of a batch whose slices share one frame."""
    assert case.layout is not None
    frame = _Frame.of(case, plans[rows[0]].middle_mm, samples)
    z_mm = np.array([plans[row].z_mm for row in rows])
    along_z = linear_weights(
        case.volume.shape[0], case.volume.spacing_mm[0], z_mm, samples.spacing_mm
    )
    blender = PlaneBlender(case.volume.hu, frame.along_y, frame.along_x)
    anatomy = _Anatomy(case.layout, frame)
    for place in np.argsort(z_mm, kind="stable"):  # a blender wants ascending planes
        row, plan = rows[place], plans[rows[place]]
        assert plan.case_id == case.case_id, plan
        hu = blender.blend(*taps(along_z, place))
        batch.hu[row] = np.where(frame.outside, AIR_HU, np.rint(hu))
        batch.layout[row] = anatomy.at(round(plan.z_mm / case.volume.spacing_mm[0]))
        shown = _planes_shown(plan.z_mm, case.volume.spacing_mm[0], samples.spacing_mm)
        for number, nodule in enumerate(case.nodules):
            pixels = _pixels_of(nodule, shown, frame)
            batch.layout[row][pixels] = Label.NODULE
            if number == plan.nodule:
                batch.box[row] = square_box(pixels, min_side=MIN_BOX_PX)
                for reader, scores in enumerate(nodule.ratings[:MAX_READERS]):
                    batch.ratings[row, reader] = scores


def _middle_mm(box: Sequence[tuple[int, int]] | None, case: VolumeAttrs) -> tuple[float, float]:
    """Middle of a box of voxels along (y, x)."""
    assert box is not None, f"case {case.case_id} shows no lung"
    y, x = (
        (start + stop - 1) / 2 * spacing
        for (start, stop), spacing in zip(box[1:], case.spacing_mm[1:], strict=True)
    )
    return y, x


@dataclass(frozen=True)
class _Frame:
    """The image's square in a case's planes: weights of the case's rows and columns per pixel."""

    along_y: Weights
    along_x: Weights
    label_y: Weights
    label_x: Weights
    outside: NDArray[np.bool_]

    @classmethod
    def of(cls, case: Case, middle_mm: tuple[float, float], samples: SliceSamples) -> _Frame:
        """The frame around `middle_mm`, turned so that rows run back and columns run left."""
        offsets_mm = (np.arange(samples.size) - (samples.size - 1) / 2) * samples.pixel_mm
        volume, matrices = case.volume, []
        for axis, middle in ((1, middle_mm[0]), (2, middle_mm[1])):
            grid = (volume.shape[axis], volume.spacing_mm[axis], middle + offsets_mm)
            turn = volume.standard_order[axis]
            matrices += [
                weights(*grid, samples.pixel_mm)[turn]
                for weights in (linear_weights, label_weights)
            ]
        along_y, label_y, along_x, label_x = matrices
        covered_y, covered_x = (np.diff(along.indptr) > 0 for along in (along_y, along_x))
        return cls(along_y, along_x, label_y, label_x, ~np.outer(covered_y, covered_x))


class _Anatomy:
    """A layout's planes in the image's frame; neighbouring slices often share one."""

    def __init__(self, layout: NDArray[np.uint8], frame: _Frame) -> None:
        self._layout = layout
        self._frame = frame
        self._plane = -1
        self._labels: NDArray[np.uint8] | None = None

    def at(self, plane: int) -> NDArray[np.uint8]:
        if plane != self._plane or self._labels is None:
            here = self._layout[plane : plane + 1]
            self._labels = majority(here, [1.0], self._frame.label_y, self._frame.label_x)
            self._plane = plane
        return self._labels


def _pixels_of(nodule: Nodule, planes: range, frame: _Frame) -> NDArray[np.bool_]:
    """Pixels of the image that the nodule covers by half or more; at least one where it shows."""
    (z0, z1), (y0, y1), (x0, x1) = nodule.box_zyx
    crossed = nodule.mask[max(0, planes.start - z0) : max(0, min(planes.stop, z1) - z0)]
    mask = np.any(crossed, axis=0, keepdims=False).astype(np.float32)
    cover = resample_plane(mask, frame.label_y[:, y0:y1], frame.label_x[:, x0:x1])
    return cover >= min(0.5, cover.max()) if cover.any() else cover > 0


def _planes_of(
    nodule: Nodule, planes_mm: NDArray[np.floating], case: VolumeAttrs, samples: SliceSamples
) -> list[float]:
    """Where slices through a nodule lie: through its largest area alone, or all."""
    spacing_mm = case.spacing_mm[0]
    areas = nodule.mask.sum(axis=(1, 2))
    if samples.nodule_slices == "centre":
        largest_mm = (nodule.corner_zyx[0] + int(areas.argmax())) * spacing_mm
        return [float(planes_mm[np.abs(planes_mm - largest_mm).argmin()])]
    crossed = set((np.flatnonzero(areas) + nodule.corner_zyx[0]).tolist())
    return [
        float(z_mm)
        for z_mm in planes_mm
        if crossed.intersection(_planes_shown(z_mm, spacing_mm, samples.spacing_mm))
    ]


def _free_planes(
    planes_mm: NDArray[np.floating], case: VolumeAttrs, samples: SliceSamples
) -> list[float]:
    """Planes, of lung unless all count, whose pixels owe nothing to any nodule."""
    spacing_mm = case.spacing_mm[0]
    crossed = {
        nodule.corner_zyx[0] + int(plane)
        for nodule in case.nodules
        for plane in np.flatnonzero(nodule.mask.any(axis=(1, 2)))
    }
    along_z = linear_weights(case.shape[0], spacing_mm, planes_mm, samples.spacing_mm)
    free = []
    for row, z_mm in enumerate(planes_mm):
        plane = round(z_mm / spacing_mm)
        in_lung = samples.centre == "volume" or any(
            start <= plane < stop for start, stop in case.lung_planes
        )
        seen = crossed.intersection(taps(along_z, row)[0].tolist())
        if in_lung and not seen:
            free.append(float(z_mm))
    return free


def _planes_shown(z_mm: float, spacing_mm: float, new_spacing_mm: float) -> range:
    """The case's planes that a slice stands for: all of its own thickness, or the nearest one."""
    half_mm = max(spacing_mm, new_spacing_mm) / 2
    first = np.ceil((z_mm - half_mm) / spacing_mm - 1e-6)
    last = np.floor((z_mm + half_mm) / spacing_mm + 1e-6)
    return range(max(0, int(first)), int(last) + 1)


def _in_image(
    nodule: Nodule, case: VolumeAttrs, middle_mm: tuple[float, float], field_of_view_mm: float
) -> bool:
    """Whether the image's square holds the whole nodule."""
    return all(
        middle - field_of_view_mm / 2 <= (start - 0.5) * spacing
        and (stop - 0.5) * spacing <= middle + field_of_view_mm / 2
        for (start, stop), spacing, middle in zip(
            nodule.box_zyx[1:], case.spacing_mm[1:], middle_mm, strict=True
        )
    )
