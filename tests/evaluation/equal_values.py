"""Running values that must be equal up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple

import pytest

from raysynth.evaluation.running import RunningValue


def assert_equal_values(
    found: Mapping[str, RunningValue], expected: Mapping[str, RunningValue]
) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        for one, other in zip(astuple(found[key]), astuple(value), strict=True):
            assert one == (other if other is None else pytest.approx(other, rel=1e-9, abs=1e-12)), (
                key
            )
