from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raysynth.case import Case, Label, Nodule
from raysynth.config.data import SliceSamples
from raysynth.preprocess.slices import SliceBatch, cut_slices, plan_slices
from raysynth.store.reader import VolumeAttrs
from raysynth.volume import AIR_HU, Triple, Volume

SHAPE = (24, 90, 110)
SPACING = (2.5, 2.0, 2.0)
RATINGS = ((5, 1, 6, 4, 5, 1, 1, 5, 3), (4, 1, 6, 3, 4, 2, 1, 5, 2))
SAMPLES = SliceSamples(size=64, spacing_mm=1.0, field_of_view_mm=160, nodule_free_every=3)


def ball(centre_mm: Triple, radius_mm: float) -> Nodule:
    """A nodule of the voxels within a radius; never less than one voxel."""
    grid = np.indices(SHAPE) * np.reshape(SPACING, (3, 1, 1, 1))
    inside = ((grid - np.reshape(centre_mm, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius_mm**2
    nearest = tuple(
        round(centre / spacing) for centre, spacing in zip(centre_mm, SPACING, strict=True)
    )
    inside[nearest] = True
    voxels = np.argwhere(inside)
    corner, end = voxels.min(axis=0), voxels.max(axis=0) + 1
    box = tuple(slice(start, stop) for start, stop in zip(corner, end, strict=True))
    z, y, x = voxels.mean(axis=0)
    return Nodule(
        (float(z), float(y), float(x)),
        (int(corner[0]), int(corner[1]), int(corner[2])),
        inside[box],
        2 * radius_mm,
        RATINGS,
    )


def make_case(*nodules: Nodule, direction: Triple = (1, 1, 1)) -> Case:
    """Lungs as two blocks in a body; nodules at 50 HU, and marks that tell the axes apart."""
    layout = np.zeros(SHAPE, np.uint8)
    layout[:, 5:85, 5:105] = Label.BODY
    layout[3:21, 20:70, 15:50] = Label.RIGHT_LUNG
    layout[3:21, 20:70, 60:95] = Label.LEFT_LUNG
    hu = np.choose(layout, [-1000, -850, -850, 0, 40]).astype(np.int16)
    for nodule in nodules:
        box = tuple(slice(*side) for side in nodule.box_zyx)
        layout[box][nodule.mask] = Label.NODULE
        hu[box][nodule.mask] = 50
    return Case(
        "case",
        "patient",
        "train",
        Volume(hu, SPACING, direction=np.diag(direction)),
        nodules,
        layout,
    )


def outline(case: Case) -> VolumeAttrs:
    """What a store knows of the case without its voxels."""
    return VolumeAttrs(
        case_id=case.case_id,
        patient_key=case.patient_key,
        split=case.split,
        intensity=case.intensity,
        shape=case.volume.shape,
        spacing_mm=case.volume.spacing_mm,
        origin_mm=case.volume.origin_mm,
        direction=case.volume.direction,
        nodules=case.nodules,
        source={},
        lung_zyx=((3, 21), (20, 70), (15, 95)),
        lung_planes=((3, 21),),
    )


def contrast(batch: SliceBatch, row: int) -> float:
    """HU in the middle of the box, less the HU around the box."""
    y0, x0, y1, x1 = batch.box[row]
    quarter = max(1, (y1 - y0) // 4)
    inside = batch.hu[row, y0 + quarter : y1 - quarter, x0 + quarter : x1 - quarter]
    around = batch.hu[row, y0 - 3 : y1 + 3, x0 - 3 : x1 + 3].astype(float)
    around[3:-3, 3:-3] = np.nan
    return float(inside.mean() - np.nanmean(around))


OFF_CENTRE = ball((35.0, 62.0, 58.0), 9.0)


@pytest.mark.parametrize("direction", [(1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, 1, 1), (-1, -1, -1)])
def test_the_box_lies_around_the_nodule(direction: Triple) -> None:
    case = make_case(OFF_CENTRE, direction=direction)
    plans = [plan for plan in plan_slices(outline(case), SAMPLES) if plan.nodule >= 0]
    batch = cut_slices(case, plans, SAMPLES)
    assert len(plans) == 18  # nine planes of 2.5 mm cross the ball, at 1 mm
    for row in range(3, len(plans) - 3):
        assert contrast(batch, row) > 700
        y0, x0, y1, x1 = batch.box[row]
        assert y1 - y0 == x1 - x0
        inside = np.argwhere(batch.layout[row] == Label.NODULE)
        assert inside.min(axis=0).tolist() >= [y0, x0]
        assert inside.max(axis=0).tolist() < [y1, x1]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_box_misses_once_an_axis_of_the_voxels_is_flipped(axis: int) -> None:
    case = make_case(OFF_CENTRE)
    plans = [plan for plan in plan_slices(outline(case), SAMPLES) if plan.nodule >= 0]
    flipped = replace(
        case, volume=Volume(np.flip(case.volume.hu, axis).copy(), case.volume.spacing_mm)
    )
    batch = cut_slices(flipped, plans, SAMPLES)
    assert contrast(batch, len(plans) // 2) < 300


@pytest.mark.parametrize("axis", [1, 2])
def test_samples_face_the_same_way_however_the_volume_is_stored(axis: int) -> None:
    case = make_case(OFF_CENTRE)
    signs = [1.0, 1.0, 1.0]
    signs[axis] = -1.0
    nodule = case.nodules[0]
    corner = list(nodule.corner_zyx)
    corner[axis] = SHAPE[axis] - corner[axis] - nodule.mask.shape[axis]
    assert case.layout is not None
    backwards = Case(
        "case",
        "patient",
        "train",
        Volume(np.flip(case.volume.hu, axis), SPACING, direction=np.diag(signs)),
        (replace(nodule, corner_zyx=tuple(corner), mask=np.flip(nodule.mask, axis)),),
        np.flip(case.layout, axis),
    )
    lungs = [(3, 21), (20, 70), (15, 95)]
    lungs[axis] = (SHAPE[axis] - lungs[axis][1], SHAPE[axis] - lungs[axis][0])
    stored = replace(outline(backwards), lung_zyx=tuple(lungs))
    batch = cut_slices(case, plan_slices(outline(case), SAMPLES), SAMPLES)
    twin = cut_slices(backwards, plan_slices(stored, SAMPLES), SAMPLES)
    np.testing.assert_allclose(twin.hu, batch.hu, atol=1)
    np.testing.assert_array_equal(twin.box, batch.box)
    assert np.mean(twin.layout != batch.layout) < 0.01  # half-way pixels


def test_the_left_lung_is_on_the_right_and_the_front_on_top() -> None:
    case = make_case(OFF_CENTRE)
    batch = cut_slices(case, plan_slices(outline(case), SAMPLES), SAMPLES)
    columns = [np.argwhere(batch.layout[0] == label)[:, 1].mean() for label in (2, 1)]
    assert columns[0] < columns[1]


def test_nodule_free_planes_show_lung_and_owe_nothing_to_a_nodule() -> None:
    case = make_case(OFF_CENTRE, ball((20.0, 90.0, 150.0), 1.0))
    for spacing_mm in (0.7, 1.0, 4.0):
        samples = SAMPLES.model_copy(
            update={"spacing_mm": spacing_mm, "nodule_free_every": 1, "min_nodule_mm": 5.0}
        )
        plans = plan_slices(outline(case), samples)
        free = [plan for plan in plans if plan.nodule < 0]
        assert free
        assert {plan.nodule for plan in plans} == {-1, 0}  # the small one has no slices
        batch = cut_slices(case, free, samples)
        assert not np.any(batch.layout == Label.NODULE)
        assert np.all(batch.box == -1)
        assert not batch.ratings.any()
        assert np.all(np.isin(batch.layout, (1, 2)).any(axis=(1, 2)))
        # The lung's own HU, no faint trace of the ball in the next plane.
        lung = np.isin(batch.layout, (1, 2))
        inner = ndimage.binary_erosion(lung, np.ones((1, 7, 7)))
        middle = [2 < plan.z_mm / 2.5 - 3 < 14 for plan in free]
        assert batch.hu[middle][inner[middle]].max() < -840


def test_one_in_so_many_and_none() -> None:
    case = make_case(OFF_CENTRE)
    counts = {}
    for every in (0, 1, 4):
        samples = SAMPLES.model_copy(update={"nodule_free_every": every})
        plans = plan_slices(outline(case), samples)
        counts[every] = sum(plan.nodule < 0 for plan in plans)
    assert counts[0] == 0
    assert counts[4] == -(-counts[1] // 4)


def test_centre_alone_is_the_plane_of_the_largest_area() -> None:
    case = make_case(OFF_CENTRE)
    samples = SAMPLES.model_copy(update={"nodule_slices": "centre", "nodule_free_every": 0})
    (plan,) = plan_slices(outline(case), samples)
    assert plan.z_mm == pytest.approx(35.0, abs=1.25 + 0.5)
    batch = cut_slices(case, [plan], samples)
    area_mm2 = np.count_nonzero(batch.layout[0] == Label.NODULE) * samples.pixel_mm**2
    assert area_mm2 == pytest.approx(np.pi * 81, rel=0.1)
    np.testing.assert_array_equal(batch.ratings[0, :2], RATINGS)
    assert not batch.ratings[0, 2:].any()


@settings(max_examples=30, deadline=None)
@given(
    centre=st.tuples(st.floats(12, 45), st.floats(50, 130), st.floats(40, 90)),
    radius=st.floats(0.1, 8.0),
    size=st.sampled_from([32, 64, 100]),
    spacing_mm=st.sampled_from([0.7, 2.5, 6.0]),
)
def test_no_planned_nodule_vanishes(
    centre: Triple, radius: float, size: int, spacing_mm: float
) -> None:
    case = make_case(ball(centre, radius))
    samples = SAMPLES.model_copy(
        update={"size": size, "spacing_mm": spacing_mm, "nodule_free_every": 0}
    )
    plans = plan_slices(outline(case), samples)
    assert plans
    batch = cut_slices(case, plans, samples)
    for layout, (y0, x0, y1, x1) in zip(batch.layout, batch.box, strict=True):
        assert 0 <= y0 < y1 <= size
        assert 0 <= x0 < x1 <= size
        assert y1 - y0 == x1 - x0 >= 2
        assert np.any(layout[y0:y1, x0:x1] == Label.NODULE)


def test_beyond_the_scan_lies_air() -> None:
    case = make_case()
    samples = SAMPLES.model_copy(update={"field_of_view_mm": 400.0})
    batch = cut_slices(case, plan_slices(outline(case), samples), samples)
    assert np.all(batch.hu[:, :5] == AIR_HU)
    assert np.all(batch.layout[:, :, :5] == Label.BACKGROUND)


def test_a_nodule_outside_the_image_gets_no_slices_but_frees_no_planes() -> None:
    case = make_case(ball((30.0, 90.0, 35.0), 3.0))
    samples = SAMPLES.model_copy(update={"field_of_view_mm": 80.0, "nodule_free_every": 1})
    plans = plan_slices(outline(case), samples)
    assert not any(plan.nodule >= 0 for plan in plans)
    assert not any(abs(plan.z_mm - 30.0) < 3.0 for plan in plans)


def test_crops_have_their_nodules_in_the_middle() -> None:
    case = make_case(ball((30.0, 90.0, 60.0), 5.0), ball((40.0, 60.0, 150.0), 8.0))
    samples = SliceSamples(
        size=32, spacing_mm=2.5, field_of_view_mm=64, centre="nodule", nodule_free_every=0
    )
    # A case whose lungs nobody found has its crops as well.
    plans = plan_slices(replace(outline(case), lung_zyx=None, lung_planes=()), samples)
    assert {plan.nodule for plan in plans} == {0, 1}
    batch = cut_slices(case, plans, samples)
    for plan, hu, layout, box in zip(plans, batch.hu, batch.layout, batch.box, strict=True):
        assert abs(box[0] + box[2] - 32) <= 2  # within a pixel
        assert abs(box[1] + box[3] - 32) <= 2
        assert layout[15:17, 15:17].max() == Label.NODULE
        # One at a time gives the same as all together.
        alone = cut_slices(case, [plan], samples)
        np.testing.assert_array_equal(alone.hu[0], hu)
        np.testing.assert_array_equal(alone.layout[0], layout)


def test_without_lungs_there_is_nothing_to_cut() -> None:
    case = make_case()
    assert plan_slices(replace(outline(case), lung_zyx=None, lung_planes=()), SAMPLES) == []
    assert cut_slices(case, [], SAMPLES).hu.shape == (0, 64, 64)


def test_slices_come_in_the_order_of_their_plans() -> None:
    case = make_case(OFF_CENTRE)
    plans = plan_slices(outline(case), SAMPLES)
    batch = cut_slices(case, plans, SAMPLES)
    mixed = cut_slices(case, plans[::-1], SAMPLES)
    np.testing.assert_array_equal(mixed.hu, batch.hu[::-1])
    np.testing.assert_array_equal(mixed.layout, batch.layout[::-1])
