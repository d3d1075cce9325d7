"""Plans cubes from what is known of a case, and cuts them from its voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysynth.case import ATTRIBUTES, LUNG_LABELS, MAX_READERS, Case, Label, Nodule
from raysynth.config.data import PatchSamples
from raysynth.layout.compose import cube_box
from raysynth.preprocess.resample import (
    PlaneBlender,
    Weights,
    label_weights,
    linear_weights,
    majority,
    resample_plane,
    taps,
)
from raysynth.seeding import seed_of
from raysynth.store.reader import VolumeAttrs
from raysynth.volume import AIR_HU, Triple, Volume

NO_BOX = (-1,) * 6
MIN_BOX_VOXELS = 2
"""Least side of a nodule's box: a smaller one is lost on a latent grid."""


@dataclass(frozen=True)
class PatchPlan:
    """One cube to cut.

    Attributes:
        case_id: the case it comes from.
        nodule: number of the nodule that it is cut around and whose box and ratings it carries; -1:
            none was aimed at.
        middle_mm: middle of the cube along the volume's axes (z, y, x), from the centre of the
            first voxel; None: a lung voxel, drawn when the cube is cut.
        draw: tells the random cubes of a case apart.
    """

    case_id: str
    nodule: int
    middle_mm: Triple | None
    draw: int = 0


@dataclass(frozen=True)
class PatchBatch:
    """Cubes in the order of their plans; axes run towards head, back and the patient's left.

    Attributes:
        hu: int16 (n, size, size, size); AIR_HU outside the scan.
        layout: uint8 labels of the same shape.
        box: int16 (n, 6), the cube around the planned nodule (z0, y0, x0, z1, y1, x1); -1 if none.
        ratings: uint8 (n, MAX_READERS, 9), rows of readers padded with 0.
        middle_mm: float32 (n, 3), middles along the volume's own axes, from its first voxel.
    """

    hu: NDArray[np.int16]
    layout: NDArray[np.uint8]
    box: NDArray[np.int16]
    ratings: NDArray[np.uint8]
    middle_mm: NDArray[np.float32]


def plan_patches(case: VolumeAttrs, samples: PatchSamples) -> list[PatchPlan]:
    """The cubes that a case yields: nodule by nodule, then random ones; no voxels are looked at.

    A nodule gets none if it is too small for `samples`. A case without lungs yields nothing but
    cubes around nodules.
    """
    if samples.centre == "lungs":
        if case.lung_zyx is None:
            return []
        lungs_mm = [
            (start + stop - 1) / 2 * spacing
            for (start, stop), spacing in zip(case.lung_zyx, case.spacing_mm, strict=True)
        ]
        return [PatchPlan(case.case_id, -1, _triple(lungs_mm))]
    plans = []
    for number, nodule in enumerate(case.nodules):
        if nodule.diameter_mm >= samples.min_nodule_mm:
            voxels = [nodule.centre_zyx, *_drawn_voxels(case.case_id, number, nodule, samples)]
            for voxel in voxels:
                middle_mm = _inwards(np.multiply(voxel, case.spacing_mm), case, samples)
                plans.append(PatchPlan(case.case_id, number, middle_mm))
    if case.lung_zyx is not None:
        draws = range(samples.random_per_case)
        plans += [PatchPlan(case.case_id, -1, None, draw) for draw in draws]
    return plans


def cut_patches(case: Case, plans: Sequence[PatchPlan], samples: PatchSamples) -> PatchBatch:
    """Cuts the planned cubes of one case.

    Args:
        case: with its layout.
        plans: of this case, from `plan_patches` with the same `samples`.
        samples: size and field of view.
    """
    assert case.layout is not None, f"case {case.case_id} has no layout yet"
    shape = (len(plans), samples.size, samples.size, samples.size)
    batch = PatchBatch(
        hu=np.empty(shape, np.int16),
        layout=np.empty(shape, np.uint8),
        box=np.full((len(plans), 6), NO_BOX, np.int16),
        ratings=np.zeros((len(plans), MAX_READERS, len(ATTRIBUTES)), np.uint8),
        middle_mm=np.empty((len(plans), 3), np.float32),
    )
    lungs = None
    for row, plan in enumerate(plans):
        assert plan.case_id == case.case_id, plan
        middle_mm = plan.middle_mm
        if middle_mm is None:
            lungs = np.flatnonzero(np.isin(case.layout, LUNG_LABELS)) if lungs is None else lungs
            middle_mm = _inwards(_drawn_lung_mm(lungs, case, plan, samples), case.volume, samples)
        batch.middle_mm[row] = middle_mm
        _cut(batch, row, case, middle_mm, plan.nodule, samples)
    return batch


def _cut(
    batch: PatchBatch,
    row: int,
    case: Case,
    middle_mm: Triple,
    aimed_at: int,
    samples: PatchSamples,
) -> None:
    assert case.layout is not None
    frame = _Frame.around(middle_mm, case, samples)
    near = tuple(_span(*weights) for weights in zip(frame.along, frame.label, strict=True))
    along_z, along_y, along_x = (w[:, part] for w, part in zip(frame.along, near, strict=True))
    label_z, label_y, label_x = (w[:, part] for w, part in zip(frame.label, near, strict=True))
    blender = PlaneBlender(case.volume.hu[near], along_y, along_x)
    labels = case.layout[near]
    covered_z, covered_y, covered_x = (np.diff(w.indptr) > 0 for w in (along_z, along_y, along_x))
    outside = ~np.outer(covered_y, covered_x)
    hu, layout = batch.hu[row], batch.layout[row]
    # Upwards through the volume, which a blender wants, whichever way its planes are stored.
    for plane in np.argsort(frame.offsets_mm):
        if not covered_z[plane]:
            hu[plane], layout[plane] = AIR_HU, Label.BACKGROUND
            continue
        hu[plane] = np.where(outside, AIR_HU, np.rint(blender.blend(*taps(along_z, plane))))
        planes, weights = taps(label_z, plane)
        layout[plane] = majority(labels[planes], weights, label_y, label_x)
    for number, nodule in enumerate(case.nodules):
        voxels = _voxels_of(nodule, frame)
        layout[voxels] = Label.NODULE
        if number == aimed_at:
            batch.box[row] = cube_box(voxels, min_side=MIN_BOX_VOXELS)
            for reader, scores in enumerate(nodule.ratings[:MAX_READERS]):
                batch.ratings[row, reader] = scores


@dataclass(frozen=True)
class _Frame:
    """A cube in a case's grid: for each axis, weights of old voxels for the cube's own.

    Attributes:
        along: of intensities, (z, y, x).
        label: of labels.
        offsets_mm: of the cube's planes along the volume's first axis.
    """

    along: tuple[Weights, Weights, Weights]
    label: tuple[Weights, Weights, Weights]
    offsets_mm: NDArray[np.floating]

    @classmethod
    def around(cls, middle_mm: Triple, case: Case, samples: PatchSamples) -> _Frame:
        """The cube around a place, turned so that its axes run towards head, back and left."""
        offsets_mm = (np.arange(samples.size) - (samples.size - 1) / 2) * samples.pixel_mm
        volume = case.volume
        along, label = [], []
        for axis, turn in enumerate(volume.standard_order):
            places_mm = middle_mm[axis] + offsets_mm[turn]
            grid = (volume.shape[axis], volume.spacing_mm[axis], places_mm, samples.pixel_mm)
            along.append(linear_weights(*grid))
            label.append(label_weights(*grid))
        return cls(_three(along), _three(label), offsets_mm[volume.standard_order[0]])


def _voxels_of(nodule: Nodule, frame: _Frame) -> NDArray[np.bool_]:
    """Voxels of the cube that the nodule covers by half or more; at least one where it shows."""
    (z0, z1), (y0, y1), (x0, x1) = nodule.box_zyx
    label_z, label_y, label_x = frame.label
    planes = np.stack(
        [
            resample_plane(plane, label_y[:, y0:y1], label_x[:, x0:x1])
            for plane in nodule.mask.astype(np.float32)
        ]
    )
    cover = np.tensordot(label_z[:, z0:z1].toarray(), planes, axes=1)
    shown: NDArray[np.bool_] = cover >= min(0.5, cover.max()) if cover.any() else cover > 0
    return shown


def _span(along: Weights, label: Weights) -> slice:
    """The part of an axis that a cube needs anything of."""
    needed = np.concatenate([along.indices, label.indices])
    return slice(int(needed.min()), int(needed.max()) + 1) if len(needed) else slice(0, 0)


def _drawn_voxels(
    case_id: str, number: int, nodule: Nodule, samples: PatchSamples
) -> NDArray[np.int64]:
    """Voxels of a nodule for the cubes after its first, (n, 3)."""
    random = np.random.default_rng(seed_of("patches", samples.seed, case_id, number))
    voxels = np.argwhere(nodule.mask) + nodule.corner_zyx
    return voxels[random.integers(len(voxels), size=samples.patches_per_nodule - 1)]


def _drawn_lung_mm(
    lungs: NDArray[np.int64], case: Case, plan: PatchPlan, samples: PatchSamples
) -> NDArray[np.float64]:
    random = np.random.default_rng(seed_of("lungs", samples.seed, case.case_id, plan.draw))
    voxel = np.unravel_index(lungs[random.integers(len(lungs))], case.volume.shape)
    return np.multiply(voxel, case.volume.spacing_mm)


def _inwards(
    middle_mm: NDArray[np.float64], grid: VolumeAttrs | Volume, samples: PatchSamples
) -> Triple:
    """A cube's middle, moved so that the cube lies in the volume, or around one that is smaller."""
    last_mm = (np.array(grid.shape) - 1) * grid.spacing_mm
    # Voxels reach half their size beyond their centres, the volume's and the cube's alike.
    reach_mm = (samples.field_of_view_mm - np.array(grid.spacing_mm)) / 2
    low, high = reach_mm, last_mm - reach_mm
    return _triple(np.where(low <= high, np.clip(middle_mm, low, high), last_mm / 2))


def _triple(values: Sequence[float] | NDArray[np.float64]) -> Triple:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _three(weights: list[Weights]) -> tuple[Weights, Weights, Weights]:
    z, y, x = weights
    return z, y, x
