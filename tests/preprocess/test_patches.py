from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from raysynth.case import LUNG_LABELS, Case, Label, Nodule
from raysynth.config.data import PatchSamples
from raysynth.preprocess.patches import NO_BOX, PatchPlan, cut_patches, plan_patches
from raysynth.volume import AIR_HU, Triple, Volume
from tests.preprocess.test_slices import OFF_CENTRE, SHAPE, SPACING, ball, make_case, outline

SAMPLES = PatchSamples(size=32, field_of_view_mm=48.0)
EVERY_WAY = [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, -1)]


def mirrored(case: Case, direction: Triple) -> Case:
    """The same patient, stored with axes that run the other way where the sign is negative."""
    turn = tuple(slice(None, None, int(sign)) for sign in direction)
    nodules = []
    for nodule in case.nodules:
        corner = [
            start if sign > 0 else size - start - length
            for start, length, size, sign in zip(
                nodule.corner_zyx, nodule.mask.shape, SHAPE, direction, strict=True
            )
        ]
        centre = [
            place if sign > 0 else size - 1 - place
            for place, size, sign in zip(nodule.centre_zyx, SHAPE, direction, strict=True)
        ]
        nodules.append(
            Nodule(
                (centre[0], centre[1], centre[2]),
                (corner[0], corner[1], corner[2]),
                nodule.mask[turn],
                nodule.diameter_mm,
                nodule.ratings,
            )
        )
    assert case.layout is not None
    hu, layout = case.volume.hu[turn].copy(), case.layout[turn].copy()
    volume = Volume(hu, SPACING, direction=np.diag(direction))
    return replace(case, volume=volume, layout=layout, nodules=tuple(nodules))


def test_a_cube_on_the_grid_is_the_volume_itself() -> None:
    random = np.random.default_rng(0)
    hu = random.integers(-1000, 1000, (40, 50, 60)).astype(np.int16)
    layout = random.choice([1, 2, 4], (40, 50, 60)).astype(np.uint8)
    case = replace(make_case(), volume=Volume(hu, (2.0, 2.0, 2.0)), layout=layout)
    samples = PatchSamples(size=16, field_of_view_mm=32.0)
    plan = PatchPlan(case.case_id, -1, (2 * 17.5, 2 * 27.5, 2 * 31.5))
    batch = cut_patches(case, [plan], samples)
    cube = np.s_[10:26, 20:36, 24:40]
    np.testing.assert_array_equal(batch.hu[0], hu[cube])
    np.testing.assert_array_equal(batch.layout[0], layout[cube])


def test_a_linear_ramp_comes_out_exactly_at_any_voxel_size() -> None:
    z, y, x = np.indices(SHAPE) * np.reshape(SPACING, (3, 1, 1, 1))
    ramp = (4 * z - 2 * y + 3 * x).astype(np.int16)
    case = replace(make_case(), volume=Volume(ramp, SPACING))
    samples = PatchSamples(size=12, field_of_view_mm=15.0)
    middle = (28.0, 90.0, 110.0)
    batch = cut_patches(case, [PatchPlan(case.case_id, -1, middle)], samples)
    offsets = (np.arange(12) - 5.5) * 1.25
    dz, dy, dx = np.ix_(offsets, offsets, offsets)
    expected = 4 * (middle[0] + dz) - 2 * (middle[1] + dy) + 3 * (middle[2] + dx)
    np.testing.assert_allclose(batch.hu[0], expected, atol=0.51)


@pytest.mark.parametrize("direction", EVERY_WAY)
def test_the_box_lies_around_the_nodule_however_the_volume_is_stored(direction: Triple) -> None:
    straight = make_case(OFF_CENTRE)
    case = mirrored(straight, direction)
    batch = cut_patches(case, plan_patches(outline(case), SAMPLES), SAMPLES)
    expected = cut_patches(straight, plan_patches(outline(straight), SAMPLES), SAMPLES)
    np.testing.assert_array_equal(batch.hu, expected.hu)
    np.testing.assert_array_equal(batch.layout, expected.layout)
    np.testing.assert_array_equal(batch.box, expected.box)
    z0, y0, x0, z1, y1, x1 = batch.box[0]
    assert z1 - z0 == y1 - y0 == x1 - x0 == 12  # 18 mm at 1.5 mm
    nodule = batch.layout[0] == Label.NODULE
    inside = np.zeros_like(nodule)
    inside[z0:z1, y0:y1, x0:x1] = True
    assert (inside | ~nodule).all()
    hu = batch.hu[0].astype(float)
    assert hu[nodule].mean() - hu[~inside].mean() > 500
    # Half a voxel of the scan around the ball's own volume.
    assert nodule.sum() * 1.5**3 == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.15)
    assert batch.ratings[0, 0].tolist() == list(OFF_CENTRE.ratings[0])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_nodule_is_missed_once_an_axis_of_the_voxels_is_flipped(axis: int) -> None:
    case = make_case(OFF_CENTRE)
    plans = plan_patches(outline(case), SAMPLES)
    flipped = replace(case, volume=Volume(np.flip(case.volume.hu, axis).copy(), SPACING))
    hu = cut_patches(flipped, plans, SAMPLES)
    nodule = hu.layout[0] == Label.NODULE
    right = cut_patches(case, plans, SAMPLES).hu[0][nodule].mean()
    assert right - hu.hu[0][nodule].mean() > 300


def test_a_cube_is_moved_into_the_volume_and_air_fills_what_is_too_small() -> None:
    corner = ball((2.5, 2.0, 2.0), 4.0)
    case = make_case(corner)
    case = replace(case, volume=Volume(np.full(SHAPE, 7, np.int16), SPACING))
    small = PatchSamples(size=16, field_of_view_mm=48.0)
    (plan,) = plan_patches(outline(case), small)
    assert plan.middle_mm == pytest.approx((24 - 1.25, 24 - 1.0, 24 - 1.0))
    assert (cut_patches(case, [plan], small).hu == 7).all()
    large = PatchSamples(size=32, field_of_view_mm=96.0)  # the volume is 60 mm high
    batch = cut_patches(case, plan_patches(outline(case), large), large)
    assert (batch.hu[0, :6] == AIR_HU).all()
    assert (batch.hu[0, 6:26] == 7).all()
    assert (batch.hu[0, 26:] == AIR_HU).all()
    assert not batch.layout[0, :6].any()


def test_further_cubes_of_a_nodule_lie_around_its_own_voxels() -> None:
    case = make_case(OFF_CENTRE, ball((40.0, 110.0, 160.0), 5.0))
    samples = PatchSamples(size=33, field_of_view_mm=33.0, patches_per_nodule=5)
    plans = plan_patches(outline(case), samples)
    assert [plan.nodule for plan in plans] == [0] * 5 + [1] * 5
    assert len({plan.middle_mm for plan in plans}) > 6
    batch = cut_patches(case, plans, samples)
    inside = [plan for plan in plans if min(plan.middle_mm or ()) > 16.5]
    assert len(inside) >= 5
    for row in map(plans.index, inside):
        assert batch.layout[row, 16, 16, 16] == Label.NODULE
    large_only = samples.model_copy(update={"min_nodule_mm": 12.0})
    assert {plan.nodule for plan in plan_patches(outline(case), large_only)} == {0}


def test_random_cubes_lie_around_lung_voxels_and_are_the_same_every_time() -> None:
    case = make_case()
    samples = PatchSamples(size=9, field_of_view_mm=9.0, random_per_case=6)
    plans = plan_patches(outline(case), samples)
    assert len(plans) == 6
    batch = cut_patches(case, plans, samples)
    assert np.isin(batch.layout[:, 4, 4, 4], LUNG_LABELS).all()
    assert len(np.unique(batch.middle_mm, axis=0)) == 6
    assert (batch.box == NO_BOX).all()
    alone = cut_patches(case, plans[3:4], samples)
    np.testing.assert_array_equal(alone.hu[0], batch.hu[3])
    other = cut_patches(case, plans, samples.model_copy(update={"seed": 1}))
    assert not np.array_equal(other.middle_mm, batch.middle_mm)


def test_a_whole_volume_is_one_cube_around_the_lungs() -> None:
    case = make_case(OFF_CENTRE)
    samples = PatchSamples(size=24, field_of_view_mm=240.0, centre="lungs")
    (plan,) = plan_patches(outline(case), samples)
    assert plan.middle_mm == pytest.approx((2.5 * 11.5, 2.0 * 44.5, 2.0 * 54.5))
    batch = cut_patches(case, [plan], samples)
    volume_ml = (batch.layout[0] == Label.LEFT_LUNG).sum()  # voxels of 10 mm: one millilitre
    assert case.layout is not None
    expected_ml = (case.layout == Label.LEFT_LUNG).sum() * 0.01
    assert volume_ml == pytest.approx(expected_ml, rel=0.2)
    assert (batch.layout[0] == Label.NODULE).any()
    assert plan_patches(replace(outline(case), lung_zyx=None, lung_planes=()), samples) == []
