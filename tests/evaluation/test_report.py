"""What the report says in words follows from the figures."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from raysynth.evaluation.intervals import Figure
from raysynth.evaluation.judge import MetricResult
from raysynth.evaluation.limits import limits
from raysynth.evaluation.report import metric_row
from raysynth.report.html import MetricRow

SIZES = {"n": 3, "median_absolute_error_mm": 1.25}


def found(metrics: dict[str, Any], share: float | None = 0.75) -> dict[str, Any]:
    return {
        "adherence": {"synthetic": {"found": share}},
        "sizes": {"synthetic": SIZES},
        "consistency": {},
        "metrics": metrics,
    }


def metric(value: float, floor: float | None, *, known: bool = True) -> dict[str, Any]:
    interval = (floor, floor) if known and floor is not None else None
    disjoint = {"floor": value > floor} if floor is not None and known else {}
    columns = {} if floor is None else {"floor": {"value": floor, "interval": interval}}
    return {"value": value, "columns": columns, "disjoint": disjoint}


def test_only_floors_that_are_known_are_counted() -> None:
    metrics = {
        "above": metric(3.0, 1.0),
        "at": metric(1.0, 1.0),
        "one patient": metric(3.0, None),
        "two patients": metric(3.0, 1.0, known=False),
    }
    assert limits(found(metrics), (80.0, 60.0), [], {})["metrics"].startswith("1 of 2 distances")
    nothing = {"one patient": metrics["one patient"], "two patients": metrics["two patients"]}
    assert "nothing is known" in limits(found(nothing), (80.0, 60.0), [], {})["metrics"]


def test_a_row_has_what_is_known_of_few_patients() -> None:
    few = MetricResult(
        value=3.0,
        interval=(2.0, 4.0),
        n=8,
        dim=4,
        columns={"untrained": Figure(9.0, (8.0, 10.0)), "floor": Figure(1.0, None)},
        disjoint={"untrained": True},
        resampled="samples",
        reference_patients=2,
    )
    row = metric_row("fid", json.loads(json.dumps(asdict(few))))
    columns = {"floor": (1.0, None), "untrained": (9.0, (8.0, 10.0))}
    assert row == MetricRow("fid", (3.0, (2.0, 4.0)), columns)


def test_both_curves_are_spoken_of() -> None:
    falling, flat = np.linspace(2, 1, 100), np.ones(100)
    curves = {"ae": (np.arange(100), flat), "ldm": (np.arange(100), falling)}
    text = limits(found({}), (80.0, 60.0), [], curves)["losses"]
    assert "+0% (ae)" in text
    change = falling[-10:].mean() / falling[-20:-10].mean() - 1
    assert f"{change:+.0%} (ldm)" in text


@pytest.mark.parametrize(("synthetic", "words"), [(60.0, "texture is missing"), (80.0, "no less")])
def test_texture_and_missing_nodules_are_named(synthetic: float, words: str) -> None:
    text = limits(found({}, share=0.75), (80.0, synthetic), [], {})["gallery"]
    assert words in text
    assert "In 25% of the synthetic slices" in text
    assert "In " not in limits(found({}, share=None), (80.0, synthetic), [], {})["gallery"]
