import numpy as np
import pytest

from raysynth.evaluation.adherence import attribute_coverage, found_shares, size_agreement


def _table() -> np.ndarray:
    """Ten boxes: eight found; of eight stray ones, one."""
    table = np.zeros((10, 6), np.float32)
    table[:8, 0] = 1
    table[:, 2] = np.arange(5, 15)
    table[:, 3] = table[:, 2] + 1
    table[8:, 3] = np.nan
    table[0, 5] = 1
    table[8:, 5] = np.nan
    return table


def test_shares_of_asked_and_stray_boxes() -> None:
    shares = found_shares(_table(), "synthetic")
    assert shares["synthetic"].found == 0.8
    assert shares["synthetic"].n == 10
    assert shares["synthetic_stray"].found == 1 / 8
    assert shares["synthetic"].interval[0] < 0.8 < shares["synthetic"].interval[1]


def test_sizes_agree_where_nodules_were_found() -> None:
    sizes = size_agreement(_table())
    assert sizes.n == 8
    assert sizes.median_error_mm == pytest.approx(1)
    assert sizes.spearman == pytest.approx(1)
    assert len(sizes.measured_mm) == 8


def test_no_boxes_give_no_figures() -> None:
    nothing = np.zeros((0, 0), np.float32)
    assert found_shares(nothing, "real")["real"].found is None
    assert size_agreement(nothing).median_error_mm is None


def test_coverage_compares_with_all_readers_of_lidc() -> None:
    attributes = np.zeros((50, 5), np.uint8)
    attributes[:, 4] = 5
    coverage = attribute_coverage(attributes)
    assert list(coverage) == ["texture"]
    # Methods, section 0: 73.2 % of the 6,859 annotations are solid.
    assert coverage["texture"].reference[4] == pytest.approx(0.732, abs=0.005)
    assert coverage["texture"].distance == pytest.approx(1 - 0.732, abs=0.005)
