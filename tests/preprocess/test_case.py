from __future__ import annotations

import numpy as np
import pytest

from raysynth.case import Case, Label, Nodule
from raysynth.errors import UnreadableCase
from raysynth.preprocess.case import prepare
from raysynth.volume import Volume
from tests.layout.conftest import make_chest

NODULE = Nodule((52.0, 75.0, 84.0), (51, 74, 83), np.ones((3, 3, 3), np.bool_), 4.0, ())


def case_of(volume: Volume, layout: np.ndarray | None = None) -> Case:
    return Case("case", "patient", "train", volume, (NODULE,), layout)


def test_a_case_gets_its_layout_with_the_nodules_on_top() -> None:
    prepared = prepare(case_of(make_chest((5.0, 2.8, 2.8)).volume))
    assert prepared.layout is not None
    assert set(np.unique(prepared.layout)) == set(range(6))
    assert np.count_nonzero(prepared.layout == Label.NODULE) == 27


def test_a_layout_that_the_case_brings_is_kept() -> None:
    layout = np.full((40, 40, 40), Label.LEFT_LUNG, np.uint8)
    volume = Volume(np.zeros(layout.shape, np.int16), (2.5, 1.4, 1.4))
    assert prepare(case_of(volume, layout)).layout is layout


def test_a_case_without_lung_is_refused_unless_none_is_needed() -> None:
    slab = case_of(make_chest((5.0, 2.8, 2.8), with_lungs=False).volume)
    with pytest.raises(UnreadableCase, match="0 ml of lung") as refused:
        prepare(slab)
    assert refused.value.rule == "no-lung"
    assert prepare(slab, needs_lung=False).layout is not None


def test_a_coronal_stack_is_refused() -> None:
    coronal = np.eye(3)[[1, 0, 2]]
    volume = Volume(np.zeros((4, 4, 4), np.int16), (1.0, 1.0, 1.0), direction=coronal)
    with pytest.raises(UnreadableCase, match="90 degrees") as refused:
        prepare(case_of(volume))
    assert refused.value.rule == "orientation"
