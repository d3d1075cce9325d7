import numpy as np
import pytest

from raysynth.case import Label
from raysynth.sampling.adherence import (
    count_unrequested,
    find_nodule,
    requested_diameter_mm,
    stray_box,
)

PIXEL_MM = 1.5
CENTRE = np.array([40.0, 30.0])


def _slice(diameter_px: float, nodule_hu: float = 20.0, centre: np.ndarray = CENTRE) -> np.ndarray:
    """Noisy lung with a disc whose edge pixels are partly filled."""
    fine = (np.indices((256, 256)) + 0.5) / 4
    inside = np.hypot(*(fine - centre[:, None, None])) < diameter_px / 2
    share = inside.reshape(64, 4, 64, 4).mean((1, 3))
    noise = np.random.default_rng(0).normal(0, 25, (64, 64))
    return np.rint(-860 + (nodule_hu + 860) * share + noise).astype(np.int16)


def _box(side: int, centre: np.ndarray = CENTRE) -> tuple[int, int, int, int]:
    y0, x0 = (round(c - side / 2) for c in centre)
    return y0, x0, y0 + side, x0 + side


LUNG = np.ones((64, 64), bool)


@pytest.mark.parametrize("diameter_px", [2, 3, 6, 12])
@pytest.mark.parametrize("lung", [LUNG, None], ids=["lung-known", "lung-unknown"])
def test_a_nodule_is_found_and_measured(diameter_px: int, lung: np.ndarray | None) -> None:
    centre = CENTRE + 0.5 * (diameter_px % 2)  # the middle of the box
    hu, box = _slice(diameter_px, centre=centre), _box(diameter_px, centre)
    measured = find_nodule(hu, lung, box, PIXEL_MM)
    assert measured.found
    assert measured.diameter_mm == pytest.approx(diameter_px * PIXEL_MM, abs=0.5 * PIXEL_MM)
    assert measured.offset_mm < 0.5 * PIXEL_MM
    assert measured.contrast_hu == pytest.approx(880, abs=300 if diameter_px < 4 else 60)


@pytest.mark.parametrize(
    ("hu", "box"),
    [
        pytest.param(_slice(0), _box(6), id="nothing-there"),
        pytest.param(_slice(6, nodule_hu=-800), _box(6), id="too-faint"),
        pytest.param(_slice(6), _box(6, CENTRE + 14), id="elsewhere"),
        pytest.param(_slice(22), _box(6), id="far-too-large"),
        pytest.param(_slice(1.5), _box(10), id="far-too-small"),
        pytest.param(_slice(6) - _slice(6) + np.int16(40), _box(6), id="all-soft-tissue"),
        pytest.param(np.full((64, 64), -1000, np.int16), _box(6), id="air"),
    ],
)
def test_what_is_not_a_nodule_is_not_found(hu: np.ndarray, box: tuple[int, int, int, int]) -> None:
    assert not find_nodule(hu, LUNG, box, PIXEL_MM).found


def test_the_chest_wall_does_not_hide_a_nodule_that_touches_it() -> None:
    hu = _slice(8)
    lung = LUNG.copy()
    lung[:, :26] = False
    hu[:, :26] = 40
    assert find_nodule(hu, lung, _box(8), PIXEL_MM).found
    assert not find_nodule(hu, None, _box(8), PIXEL_MM).found  # without a layout it is one blob


def test_boxes_at_the_edge_of_the_slice_are_measured() -> None:
    centre = np.array([3.0, 61.0])
    assert find_nodule(_slice(6, centre=centre), LUNG, _box(6, centre), PIXEL_MM).found


def test_requested_diameter_comes_from_the_layout() -> None:
    layout = np.full((64, 64), Label.LEFT_LUNG, np.uint8)
    box = _box(10)
    assert requested_diameter_mm(layout, box, PIXEL_MM) == 15
    layout[38:42, 28:32] = Label.NODULE
    expected = 2 * np.sqrt(16 / np.pi) * PIXEL_MM
    assert requested_diameter_mm(layout, box, PIXEL_MM) == pytest.approx(expected)


def test_stray_boxes_lie_in_the_lung_and_clear_of_the_own_one() -> None:
    lung = np.zeros((64, 64), bool)
    lung[10:50, 10:30] = True
    own = (12, 12, 20, 20)
    others = [(14, 14, 18, 18), (0, 0, 4, 4), (40, 25, 45, 30), (48, 10, 52, 14)]
    rng = np.random.default_rng(0)
    assert {stray_box(lung, own, others, rng) for _ in range(20)} == {(40, 25, 45, 30)}
    assert stray_box(lung, own, others[:2], rng) is None


def test_a_nodule_in_soft_tissue_is_in_no_lung() -> None:
    """The layout says lung, but what was drawn around the nodule is muscle."""
    hu = _slice(6, nodule_hu=400)
    hu = np.where(hu < -500, np.int16(30), hu)
    assert not find_nodule(hu, LUNG, _box(6), PIXEL_MM).found


def test_what_was_found_is_outlined() -> None:
    measured = find_nodule(_slice(8), LUNG, _box(8), PIXEL_MM)
    assert measured.mask is not None
    fine = (np.indices((256, 256)) + 0.5) / 4
    disc = np.hypot(*(fine - CENTRE[:, None, None])) < 4
    wanted = disc.reshape(64, 4, 64, 4).mean((1, 3)) > 0.5
    both = np.count_nonzero(measured.mask & wanted)
    assert 2 * both / (measured.mask.sum() + wanted.sum()) > 0.95


def test_only_compact_things_inside_the_lung_are_unrequested() -> None:
    layout = np.full((64, 64), Label.LEFT_LUNG, np.uint8)
    layout[:, :4] = Label.BODY
    box = _box(8)
    hu = _slice(8)
    hu[:, :4] = 40
    assert count_unrequested(hu, layout, box, PIXEL_MM) == 0  # its own nodule
    assert count_unrequested(hu, layout, None, PIXEL_MM) == 1
    hu[10:15, 45:50] = 0  # another nodule
    hu[50:52, 10:50] = 0  # a vessel along the slice
    hu[58, 58] = 0  # a vessel across it, too small
    hu[20:26, 4:10] = 0  # grows from the wall
    assert count_unrequested(hu, layout, box, PIXEL_MM) == 1
    layout[8:17, 43:52] = Label.NODULE  # now it is annotated
    assert count_unrequested(hu, layout, box, PIXEL_MM) == 0
    assert count_unrequested(hu, np.zeros_like(layout), box, PIXEL_MM) == 0
