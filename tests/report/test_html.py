"""The report: self-contained, complete, and drawn where things are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from raysynth.case import Label
from raysynth.report.charts import SweepPanel
from raysynth.report.html import (
    ComparisonPage,
    MetricRow,
    ReportData,
    SweepSection,
    Tile,
    UsefulnessPage,
    write_comparison,
    write_report,
    write_usefulness,
)
from raysynth.report.pictures import grey, overlay_svg


def _tile(caption: str) -> Tile:
    layout = np.full((32, 32), Label.BODY, np.uint8)
    layout[8:24, 4:14] = Label.RIGHT_LUNG
    layout[12:16, 6:10] = Label.NODULE
    return Tile(
        np.where(layout == Label.BODY, 40, -850).astype(np.int16),
        layout,
        [(12, 6, 16, 10)],
        caption,
    )


def _data() -> ReportData:
    seen = np.arange(10.0)
    return ReportData(
        title="a <run>",
        reference="real",
        facts={"cases": "3"},
        notices=["indicative"],
        nodules=[_tile("nodule one")],
        real=[_tile("real one")],
        synthetic=[_tile("synthetic one")],
        denoising=[_tile("step 1")],
        headline="no headline",
        scorecard=[["", "verdict"], ["privacy", "not known"]],
        strata=[["nodules", "KID"], ["texture 1", "0.75"]],
        sensitivity=[["metric", "blur"], ["fid", "1 → 2"]],
        metrics=[
            MetricRow("fid/slice/all/x@1/8", (2.0, (1.5, 2.5)), {"floor": (1.0, (0.5, 1.5))}),
            MetricRow("fid/slice/lung/x@1/8", (2.25, (1.75, 2.5)), {"floor": (0.125, None)}),
        ],
        shown_metrics=("fid",),
        adherence={"found": "50 %"},
        requested_mm=np.array([5.0, 10.0]),
        measured_mm=np.array([np.nan, 9.0]),
        attribute_names=["texture"],
        requested_scores=np.full((1, 5), 0.2),
        reference_scores=np.full((1, 5), 0.2),
        consistency=[["score", "synthetic"], ["texture", "0.41 [0.3, 0.5]"]],
        fills=[["", "step"], ["filled as asked", "1.02 times"]],
        diversity=[["", "two samples"], ["ms_ssim/slice/all/x@1/9", "0.53 [0.5, 0.56]"]],
        losses={"model": (seen, np.exp(-seen))},
        seconds={"train": 1.5},
        recipe="name: run",
        attribution=["made from nothing"],
        sweep=SweepSection(
            [
                SweepPanel("FID", [1, 3], [(2.0, (1.0, 3.0)), (1.5, None)], (1.0, (0.5, 1.5))),
                SweepPanel("found", [1, 3], [(0.5, None), (0.7, (0.6, 0.8))], None),
            ],
            [["guidance scale", "FID"], ["3 (chosen)", "1.5"]],
            3.0,
            ["Rule: the best."],
            "fid/slice/all/x@1/8",
        ),
    )


def test_the_page_needs_nothing_from_outside_and_shows_everything(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "report.html"
    write_report(_data(), path)
    page = path.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "a &lt;run&gt;" in page
    for text in (
        "nodule one",
        "real one",
        "synthetic one",
        "step 1",
        "fid/slice/all/x@1/8",
        "2 [1.5, 2.5]",
        "0.41 [0.3, 0.5]",
        "1.02 times",
        "0.53 [0.5, 0.56]",
        "0.125 (no interval)",
        "made from nothing",
        "3 (chosen)",
        "Rule: the best.",
        "no headline",
        "texture 1",
        "1 → 2",
    ):
        assert text in page
    assert page.count("<svg") >= 7
    assert not list(path.parent.glob("*.part"))


def test_a_comparison_shows_patients_and_recipes_in_the_window_of_the_models(
    tmp_path: Path,
) -> None:
    path = tmp_path / "compare.html"
    write_comparison(
        ComparisonPage(
            title="beside each other",
            notices=["all patients are phantoms"],
            table=[["recipe", "an image"], ["one", "0.1 s"]],
            distances=[["FID of", "one", "floor: neighbouring slices"], ["liver", "2", "1"]],
            verdicts=["one is closer"],
            scorecards={"one": [["", "verdict"], ["privacy", "not known"]]},
            real=[_tile("a patient")],
            galleries={"one": [_tile("a drawing")]},
            window_hu=(-160, 240),
        ),
        path,
    )
    page = path.read_text()
    assert "Window -160 to 240 HU" in page
    for text in ("all patients are phantoms", "a patient", "a drawing", "one is closer", "copied"):
        assert text in page
    assert page.count("<table>") == 3


def test_a_trial_of_usefulness_shows_a_table_and_verdicts_for_each_task(tmp_path: Path) -> None:
    path = tmp_path / "usefulness.html"
    rows = [["arm", "accuracy"], ["real", "85.76 ± 1.69"]]
    write_usefulness(
        UsefulnessPage(
            title="Is it of use?",
            notices=["all patients are phantoms"],
            tables={"classification": rows, "localisation": rows},
            verdicts={"classification": ["it <helps>"], "localisation": ["it hurts"]},
            excluded="3 samples were left out.",
        ),
        path,
    )
    page = path.read_text()
    for text in ("phantoms", "it &lt;helps&gt;", "it hurts", "85.76 ± 1.69", "3 samples were left"):
        assert text in page
    assert page.count("<table>") == 2


def test_the_overlay_lies_on_its_pixels() -> None:
    tile = _tile("")
    svg = overlay_svg(tile.layout, tile.boxes)
    path = re.search(r'class="nodule" d="M([^"Z]+)', svg)
    assert path
    points = np.array(path[1].split(), float).reshape(-1, 2)
    # The nodule covers columns 6-9 and rows 12-15, so its outline spans 6 to 10 and 12 to 16.
    assert np.allclose([points.min(0), points.max(0)], [[6, 12], [10, 16]], atol=0.51)


def test_grey_spans_the_display_window() -> None:
    assert grey(np.array([-2000, -1150, 350, 3000], np.int16)).tolist() == [0, 0, 255, 255]
