"""What holds of nodules in slices holds of nodules in volumes."""

import numpy as np
import pytest

from raysynth.case import Label
from raysynth.condition import Box
from raysynth.sampling.adherence import (
    count_unrequested,
    find_nodule,
    requested_diameter_mm,
    stray_box,
)

PIXEL_MM = 1.5
SIZE = 32
CENTRE = np.array([14.0, 18.0, 12.0])
LUNG = np.ones((SIZE,) * 3, bool)


def _volume(
    diameter_px: float, nodule_hu: float = 20.0, centre: np.ndarray = CENTRE, noise_hu: float = 25.0
) -> np.ndarray:
    """Noisy lung with a ball whose edge voxels are partly filled."""
    fine = (np.indices((3 * SIZE,) * 3) + 0.5) / 3
    distance = np.sqrt(((fine - centre[:, None, None, None]) ** 2).sum(0))
    inside = (distance < diameter_px / 2).reshape(SIZE, 3, SIZE, 3, SIZE, 3)
    noise = np.random.default_rng(0).normal(0, noise_hu, (SIZE,) * 3)
    return np.rint(-860 + (nodule_hu + 860) * inside.mean((1, 3, 5)) + noise).astype(np.int16)


def _box(side: int, centre: np.ndarray = CENTRE) -> Box:
    first = [round(c - side / 2) for c in centre]
    return (*first, *(start + side for start in first))


@pytest.mark.parametrize("diameter_px", [2, 3, 6, 12])
@pytest.mark.parametrize("lung", [LUNG, None], ids=["lung-known", "lung-unknown"])
def test_a_ball_is_found_and_measured(diameter_px: int, lung: np.ndarray | None) -> None:
    centre = CENTRE + 0.5 * (diameter_px % 2)
    hu, box = _volume(diameter_px, centre=centre), _box(diameter_px, centre)
    measured = find_nodule(hu, lung, box, PIXEL_MM)
    assert measured.found
    assert measured.diameter_mm == pytest.approx(diameter_px * PIXEL_MM, abs=0.6 * PIXEL_MM)
    assert measured.offset_mm < 0.5 * PIXEL_MM
    assert measured.mask is not None
    assert measured.mask.shape == hu.shape


def test_without_noise_the_diameter_is_that_of_the_ball() -> None:
    measured = find_nodule(_volume(8, noise_hu=0), LUNG, _box(8), PIXEL_MM)
    assert measured.diameter_mm == pytest.approx(8 * PIXEL_MM, rel=0.01)
    assert measured.offset_mm == pytest.approx(0, abs=1e-6)
    assert measured.contrast_hu == pytest.approx(880)


@pytest.mark.parametrize(
    ("hu", "box"),
    [
        pytest.param(_volume(0), _box(6), id="nothing-there"),
        pytest.param(_volume(6, nodule_hu=-800), _box(6), id="too-faint"),
        pytest.param(_volume(6), _box(6, CENTRE + 8), id="elsewhere"),
        pytest.param(_volume(24), _box(6), id="far-too-large"),
        pytest.param(_volume(1.5), _box(10), id="far-too-small"),
    ],
)
def test_what_is_not_a_nodule_is_not_found(hu: np.ndarray, box: Box) -> None:
    assert not find_nodule(hu, LUNG, box, PIXEL_MM).found


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 1, 0)])
def test_turned_and_mirrored_volumes_measure_alike(axes: tuple[int, int, int]) -> None:
    hu, box = _volume(6), _box(6)
    asked = find_nodule(hu, LUNG, box, PIXEL_MM)
    turned = tuple(box[axis] for axis in axes) + tuple(box[3 + axis] for axis in axes)
    turned_hu = hu.transpose(axes)
    mirrored = (SIZE - turned[3], *turned[1:3], SIZE - turned[0], *turned[4:])
    for image, place in ((turned_hu, turned), (turned_hu[::-1], mirrored)):
        other = find_nodule(image, LUNG, place, PIXEL_MM)
        assert other.diameter_mm == pytest.approx(asked.diameter_mm)
        assert other.offset_mm == pytest.approx(asked.offset_mm)
        layout = np.full(hu.shape, Label.LEFT_LUNG, np.uint8)
        assert count_unrequested(image, layout, None, PIXEL_MM) == 1
        assert count_unrequested(image, layout, place, PIXEL_MM) == 0


def test_requested_diameter_is_that_of_the_ball_of_equal_volume() -> None:
    layout = np.full((SIZE,) * 3, Label.LEFT_LUNG, np.uint8)
    box = _box(10)
    assert requested_diameter_mm(layout, box, PIXEL_MM) == 15
    layout[12:16, 16:20, 10:14] = Label.NODULE
    expected = 2 * (64 * 3 / (4 * np.pi)) ** (1 / 3) * PIXEL_MM
    assert requested_diameter_mm(layout, box, PIXEL_MM) == pytest.approx(expected)


def test_stray_boxes_lie_in_the_lung_and_clear_of_the_own_one() -> None:
    lung = np.zeros((SIZE,) * 3, bool)
    lung[4:28, 4:28, 4:20] = True
    own = (6, 6, 6, 12, 12, 12)
    # Apart along the first axis alone; overlapping; out of the lung.
    others = [(20, 6, 6, 26, 12, 12), (10, 10, 10, 14, 14, 14), (0, 0, 0, 6, 6, 6)]
    rng = np.random.default_rng(0)
    assert {stray_box(lung, own, others, rng) for _ in range(20)} == {others[0]}
    assert stray_box(lung, own, others[1:], rng) is None


def test_balls_are_compact_and_vessels_are_not() -> None:
    layout = np.full((SIZE,) * 3, Label.LEFT_LUNG, np.uint8)
    layout[:2] = Label.BODY
    hu = _volume(8)
    hu[20:23, 4:7, 2:30] = 0  # a vessel along an axis
    assert count_unrequested(hu, layout, None, PIXEL_MM) == 1
    assert count_unrequested(hu, layout, _box(8), PIXEL_MM) == 0
    hu[2:6, 4:8, 20:24] = 0  # grows from the wall
    assert count_unrequested(hu, layout, _box(8), PIXEL_MM) == 0
    hu[24:28, 20:24, 20:24] = 0
    assert count_unrequested(hu, layout, _box(8), PIXEL_MM) == 1
