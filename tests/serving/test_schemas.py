"""From bodies to conditions of volumes, for a model that is told of layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raysynth.case import Label
from raysynth.errors import InputError
from raysynth.models.facts import BundleFacts
from raysynth.serving.arrays import Sent
from raysynth.serving.schemas import SampleIn, condition_from

LAYOUT, REFERENCE, REGION, COARSE = (f"{number:032x}" for number in range(4))
SIZE = 8


def facts() -> BundleFacts:
    return BundleFacts.model_validate(
        {
            "model": {
                "family": "layout_diffusion",
                "channels": (8, 8),
                "attention_levels": (False, False),
                "norm_num_groups": 4,
            },
            "samples": {"kind": "patches", "size": SIZE, "field_of_view_mm": 16.0},
            "intensity": "hu",
            "sources": ("phantom",),
            "snapshot": "none",
            "patients": {"train": 1, "val": 0, "test": 1},
            "indicative": True,
            "seen_samples": 0,
        }
    )


def arrays() -> dict[str, Sent]:
    layout = np.zeros((SIZE,) * 3, np.uint8)
    layout[2:6, 2:6, 2:6] = Label.LEFT_LUNG
    layout[3:5, 3:5, 3:5] = Label.NODULE
    region = np.zeros((SIZE,) * 3, np.uint8)
    region[0] = 1
    hu = np.arange(SIZE**3).reshape((SIZE,) * 3) - 900.4
    return {
        LAYOUT: Sent(layout),
        REFERENCE: Sent(hu, (2.0, 2.0, 2.0)),
        REGION: Sent(region),
        COARSE: Sent(hu, (2.5, 2.0, 2.0)),
    }


def condition(**body: Any) -> Any:
    sent = arrays()
    return condition_from(SampleIn(**body), facts(), lambda upload, field: sent[upload])


def test_what_the_layout_shows_is_drawn_and_the_rest_stays() -> None:
    made = condition(layout=LAYOUT, reference=REFERENCE)
    sent = arrays()
    assert made.known_hu.dtype == np.int16
    np.testing.assert_array_equal(made.known_hu, np.rint(sent[REFERENCE].values))
    np.testing.assert_array_equal(made.known_mask, sent[LAYOUT].values == 0)
    np.testing.assert_array_equal(made.layout, sent[LAYOUT].values)


def test_a_region_or_a_box_says_what_is_drawn() -> None:
    made = condition(layout=LAYOUT, reference=REFERENCE, region=REGION)
    np.testing.assert_array_equal(made.known_mask, arrays()[REGION].values == 0)
    made = condition(reference=REFERENCE, box=(1, 2, 3, 4, 5, 6))
    assert np.count_nonzero(~made.known_mask) == 27
    assert not made.known_mask[1:4, 2:5, 3:6].any()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"layout": LAYOUT, "reference": COARSE}, r"^reference with voxels of 2.5, 2, 2 mm"),
        ({"reference": REFERENCE}, "^region: say what"),
        ({"region": REGION}, "^region: give the reference"),
        ({"layout_png": "aGVsbG8="}, "^layout_png: this model draws volumes"),
        ({"layout": REFERENCE}, "^layout: give whole numbers"),
        ({"layout": LAYOUT, "box": (0, 0, 0, 9, 9, 9)}, "^box"),
    ],
)
def test_what_makes_no_sense_is_named(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        condition(**body)
