import numpy as np
import pytest

from raysynth.config.sampling import Cohort
from raysynth.evaluation.adherence import (
    CohortShare,
    attribute_coverage,
    cohort_shares,
    found_shares,
    size_agreement,
)
from raysynth.evaluation.measure import ADHERENCE_COLUMNS


def _table() -> np.ndarray:
    """Ten boxes: eight found; of eight stray ones, one."""
    table = np.zeros((10, len(ADHERENCE_COLUMNS)), np.float32)
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
    assert sizes.spearman_interval is not None
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


def test_a_cohort_is_compared_with_what_was_drawn_and_found() -> None:
    cohort = Cohort.model_validate({"texture": {"non_solid": 0.5}, "diameter_mm": {"15_up": 0.1}})
    found, requested_mm = np.array([1, 1, 0, 0]), np.array([4.0, 20.0, 7.0, 9.0])
    adherence = np.zeros((4, len(ADHERENCE_COLUMNS)), np.float32)
    adherence[:, ADHERENCE_COLUMNS.index("found")] = found
    adherence[:, ADHERENCE_COLUMNS.index("requested_mm")] = requested_mm
    shares = cohort_shares(cohort, np.array([1, 5, 1, 3], np.uint8), adherence)
    assert shares["texture"]["non_solid"] == CohortShare(0.5, 0.5, 0.5)
    assert shares["texture"]["part_solid"] == CohortShare(None, 0.25, 0.0)
    assert shares["diameter_mm"]["15_up"] == CohortShare(0.1, 0.25, 0.5)
    assert cohort_shares(Cohort(), np.array([1, 5, 1, 3], np.uint8), adherence) == {}
