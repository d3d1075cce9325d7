import numpy as np
import pytest

from raysynth.evaluation.references import paste

HOST, DONOR = np.zeros((20, 24), np.int16), np.arange(480, dtype=np.int16).reshape(20, 24) + 1


@pytest.mark.parametrize(
    ("host_box", "donor_box", "expected"),
    [
        ((8, 8, 12, 12), (2, 3, 8, 9), (7, 7, 13, 13)),
        ((0, 0, 4, 4), (2, 3, 10, 11), (0, 0, 6, 6)),
        ((18, 22, 20, 24), (2, 3, 8, 9), (16, 20, 20, 24)),
    ],
)
def test_the_donors_box_covers_the_hosts_middle(host_box, donor_box, expected) -> None:
    pasted, (y0, x0, y1, x1) = paste(HOST, DONOR, host_box, donor_box)
    assert (y0, x0, y1, x1) == expected
    changed = np.argwhere(pasted)
    assert [*changed.min(axis=0), *(changed.max(axis=0) + 1)] == list(expected)
    shift_y = (host_box[0] + host_box[2]) // 2 - (donor_box[0] + donor_box[2]) // 2
    shift_x = (host_box[1] + host_box[3]) // 2 - (donor_box[1] + donor_box[3]) // 2
    assert np.array_equal(
        pasted[y0:y1, x0:x1], DONOR[y0 - shift_y : y1 - shift_y, x0 - shift_x : x1 - shift_x]
    )
    assert not HOST.any()
