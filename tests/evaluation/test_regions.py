import numpy as np

from raysynth.case import Label
from raysynth.evaluation.regions import cut_regions


def _slices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hu = np.full((3, size, size), 40, np.int16)
    layout = np.full(hu.shape, Label.BODY, np.uint8)
    layout[:, 20:50, 10:40] = Label.LEFT_LUNG
    layout[0, 30:34, 20:24] = Label.NODULE
    hu[layout != Label.BODY] = -850
    hu[0, 30:34, 20:24] = 25
    box = np.array([[30, 20, 34, 24], [-1, -1, -1, -1], [0, 0, 4, 4]], np.int16)
    return hu, layout, box


def test_the_nodule_region_is_centred_on_the_box_and_padded_with_air() -> None:
    hu, layout, box = _slices(96)
    region = cut_regions(hu, layout, box)["nodule32"]
    assert region.hu.shape == (2, 32, 32)
    assert region.rows.tolist() == [0, 2]
    np.testing.assert_array_equal(region.hu[0], hu[0, 16:48, 6:38])
    assert (region.hu[0, 14:18, 14:18] == 25).all()
    assert (region.hu[1, :14] == -1000).all()
    np.testing.assert_array_equal(region.hu[1, 14:, 14:], hu[2, :18, :18])


def test_small_slices_have_smaller_crops_under_another_name() -> None:
    regions = cut_regions(*_slices(64))
    assert regions["nodule16"].hu.shape == (2, 16, 16)
    assert "nodule32" not in regions


def test_the_lung_region_keeps_what_was_asked_for_as_lung() -> None:
    hu, layout, box = _slices(64)
    lung = cut_regions(hu, layout, box)["lung"].hu
    inside = layout != Label.BODY
    np.testing.assert_array_equal(lung[inside], hu[inside])
    assert (lung[~inside] == -1000).all()
    hu[:, 20:25] = 40  # a slice that ignores its layout shows chest wall in its lung
    assert (cut_regions(hu, layout, box)["lung"].hu[:, 20:25, 10:40] == 40).all()


def test_no_nodule_at_all_gives_an_empty_region() -> None:
    hu, layout, _ = _slices(64)
    assert len(cut_regions(hu, layout, np.full((3, 4), -1, np.int16))["nodule16"].rows) == 0


def test_abdominal_organs_are_seen_in_the_soft_tissue_window() -> None:
    hu, layout, box = _slices(64)
    layout[:2, 5:15, 5:15] = Label.LIVER
    hu[0, 5:15, 5:15], hu[1, 5:15, 5:15] = 40, 300
    liver = cut_regions(hu, layout, box)["liver"]
    assert liver.rows.tolist() == [0, 1]
    inside = layout[:2] == Label.LIVER
    assert (liver.hu[0][inside[0]] == -300).all()  # half of the window, half of -1000 to 400
    assert (liver.hu[1][inside[1]] == 400).all()
    assert (liver.hu[~inside] == -1000).all()


def test_of_filled_slices_only_organs_that_were_made_in_whole_are_judged() -> None:
    hu, layout, box = _slices(64)
    layout[:, 5:15, 5:15] = Label.LIVER
    layout[:, 5:15, 20:25] = Label.SPLEEN
    hole = layout == Label.LIVER
    hole[1, 5, 5] = False  # a pixel of it is the patient's
    hole[2, 5:15, 20:23] = True
    regions = cut_regions(hu, layout, box, hole)
    assert regions["generated_liver"].rows.tolist() == [0, 2]
    assert not {"liver", "generated_spleen", "generated_lung"} & set(regions)
    assert len(regions["all"].rows) == 3
