import numpy as np

from raysynth.case import Label
from raysynth.evaluation.measure import Measures
from raysynth.evaluation.references import paste
from raysynth.evaluation.regions import cut_crops, cut_regions, is_generated, nodule_boxes
from raysynth.metrics.nodule import RADIOMIC_NAMES, radiomic_features

MADE_OF = (Label.LEFT_LUNG, Label.RIGHT_LUNG, Label.NODULE)


def _volumes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three volumes: with a nodule, without, and without any lung."""
    layout = np.full((3, 24, 24, 24), Label.BODY, np.uint8)
    layout[:2, 4:20, 4:20, 4:20] = Label.LEFT_LUNG
    layout[0, 8:14, 9:15, 10:16] = Label.NODULE
    hu = np.where(layout == Label.LEFT_LUNG, -850, 40).astype(np.int16)
    hu[0, 8:14, 9:15, 10:16] = 25
    box = np.full((3, 6), -1, np.int16)
    box[0] = (8, 9, 10, 14, 15, 16)
    return hu, layout, box


def test_regions_of_volumes_are_those_of_slices_with_an_axis_more() -> None:
    hu, layout, box = _volumes()
    regions = cut_regions(hu, layout, box)
    assert set(regions) == {"all", "lung", "nodule16"}
    assert regions["lung"].rows.tolist() == [0, 1]
    outside = layout[:2] == Label.BODY
    assert (regions["lung"].hu[outside] == -1000).all()
    assert np.array_equal(regions["lung"].hu[~outside], hu[:2][~outside])
    (crop,) = regions["nodule16"].hu
    assert np.array_equal(crop, hu[0, 3:19, 4:20, 5:21])


def test_crops_reach_out_into_air() -> None:
    hu, _, _ = _volumes()
    crop = cut_crops(hu[:1], np.array([[0, 0, 0, 4, 4, 4]], np.int16), 16)[0]
    assert (crop[:6] == -1000).all()
    assert np.array_equal(crop[6:, 6:, 6:], hu[0, :10, :10, :10])


def test_what_was_made_is_shown_alone_of_real_and_synthetic_volumes_alike() -> None:
    hu, layout, box = _volumes()
    hole = np.isin(layout, MADE_OF)
    synthetic = cut_regions(hu, layout, box, hole, MADE_OF)
    real = cut_regions(hu, layout, box, made_of=MADE_OF)
    assert set(synthetic) == {"all", "generated", "generated_lung", "nodule16"}
    assert set(real) == {"all", "lung", "generated", "nodule16"}
    for regions in (synthetic, real):
        made = regions["generated"]
        assert made.rows.tolist() == [0, 1]
        assert np.array_equal(made.hu, np.where(hole[:2], hu[:2], -1000))
    only_nodules = cut_regions(hu, layout, box, made_of=(Label.NODULE,))["generated"]
    assert only_nodules.rows.tolist() == [0]
    assert {name for name in synthetic if is_generated(name)} == {"generated", "generated_lung"}


def test_the_largest_nodule_of_a_layout_has_the_box() -> None:
    _, layout, box = _volumes()
    layout[0, 5, 5, 5] = Label.NODULE
    assert np.array_equal(nodule_boxes(layout), box)


def test_a_donors_cube_covers_the_middle_of_the_hosts() -> None:
    host = np.zeros((12, 12, 12), np.int16)
    donor = np.arange(12**3, dtype=np.int16).reshape(host.shape) + 1
    pasted, place = paste(host, donor, (4, 4, 4, 6, 6, 6), (2, 3, 4, 6, 7, 8))
    assert place == (3, 3, 3, 7, 7, 7)
    assert np.array_equal(pasted[3:7, 3:7, 3:7], donor[2:6, 3:7, 4:8])
    assert np.count_nonzero(pasted) == 4**3


def test_the_nodule_in_the_box_is_measured_in_volumes_whatever_else_there_is() -> None:
    hu, layout, box = _volumes()
    hu = hu + np.random.default_rng(0).integers(-9, 9, hu.shape).astype(np.int16)
    alone = Measures()
    alone.update(0, hu, layout, box, 1.5, (), ())
    # Another nodule, out of the reach of the ring around the first.
    layout[0, 18:20, 4:6, 4:6] = Label.NODULE
    both = Measures()
    both.update(0, hu, layout, box, 1.5, (), ())
    place = ("nodule", "radiomics3d@1")
    rows, features = both.tables[place].compute()
    assert rows.tolist() == [0]
    assert np.array_equal(features, alone.tables[place].compute()[1])
    whole = np.zeros(hu[:1].shape, bool)
    whole[0, 8:14, 9:15, 10:16] = True
    expected = dict(zip(RADIOMIC_NAMES, radiomic_features(hu[:1], whole, 1.5)[0], strict=True))
    found = dict(zip(RADIOMIC_NAMES, features[0], strict=True))
    # The crop's edges play no part, but in the blur that surfaces are smoothed with.
    assert found == {**expected, "circularity": found["circularity"]}
    assert np.array_equal(both.boxes.compute()[1][0], box[0])
