"""The report of a run: one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysynth.condition import Box
from raysynth.report import charts
from raysynth.report.charts import Estimate as Estimate
from raysynth.report.charts import SweepPanel
from raysynth.report.pictures import (
    DISPLAY_WINDOW_HU,
    grey,
    overlay_svg,
    png_data_uri,
    scroll,
    webp_data_uri,
)
from raysynth.volume import RELATIVE_RANGE
from raysynth.window import LUNG_WINDOW_HU

Losses = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Model name -> samples seen and losses there."""


@dataclass(frozen=True)
class Tile:
    """One slice, or planes of a volume in one picture, as the report shows it."""

    hu: NDArray[np.int16]
    layout: NDArray[np.uint8] | None = None
    boxes: Sequence[Box] = ()
    caption: str = ""


@dataclass(frozen=True)
class Scroll:
    """Volumes that an animation runs through side by side.

    Attributes:
        volumes: HU (z, y, x) by name; the name says which is real.
        caption: below it.
    """

    volumes: Mapping[str, NDArray[np.int16]]
    caption: str


@dataclass(frozen=True)
class MetricRow:
    """One metric, and what stands beside it, by heading."""

    key: str
    value: Estimate
    columns: Mapping[str, Estimate]
    standing: str = ""


@dataclass(frozen=True)
class SweepSection:
    """A guidance-scale sweep.

    Attributes:
        panels: of the chart.
        table: heading and rows.
        chosen: the scale that the rule takes, if any.
        sentences: on the choice.
        keys: of the metrics.
    """

    panels: Sequence[SweepPanel]
    table: Sequence[Sequence[str]]
    chosen: float | None
    sentences: Sequence[str]
    keys: str


@dataclass(frozen=True)
class ReportData:
    """All that a report shows; see the fields' names in the template.

    `reference` says what the synthetic samples are held against: `real`, or `phantom`; `space` what
    a sample is: a `slice` or a `volume`. `scrolls` and `compared` (rows of four: reference, layout,
    sample and difference) are of volumes.
    """

    title: str
    reference: str
    facts: dict[str, str]
    notices: Sequence[str]
    nodules: Sequence[Tile]
    real: Sequence[Tile]
    synthetic: Sequence[Tile]
    denoising: Sequence[Tile]
    headline: str
    scorecard: Sequence[Sequence[str]]
    metrics: Sequence[MetricRow]
    shown_metrics: Sequence[str]
    strata: Sequence[Sequence[str]]
    sensitivity: Sequence[Sequence[str]]
    adherence: dict[str, str]
    requested_mm: NDArray[np.float64]
    measured_mm: NDArray[np.float64]
    attribute_names: Sequence[str]
    requested_scores: NDArray[np.float64]
    reference_scores: NDArray[np.float64]
    consistency: Sequence[Sequence[str]]
    fills: Sequence[Sequence[str]]
    diversity: Sequence[Sequence[str]]
    losses: Losses
    seconds: dict[str, float]
    recipe: str
    attribution: Sequence[str]
    sweep: SweepSection | None = None
    limits: dict[str, str] = field(default_factory=dict)
    window_hu: tuple[float, float] = DISPLAY_WINDOW_HU
    space: str = "slice"
    scrolls: Sequence[Scroll] = ()
    compared: Sequence[Sequence[Tile]] = ()


@dataclass(frozen=True)
class StorePage:
    """What `raysynth inspect` shows of a store.

    Attributes:
        galleries: by heading.
        hu_counts: voxels by tissue, in bins of `hu_edges`.
        spacing_mm: (cases, 3).
        diameter_mm: (nodules,).
        strata: a table's heading and rows; none without nodules.
    """

    title: str
    problems: Sequence[str]
    facts: dict[str, str]
    galleries: dict[str, Sequence[Tile]]
    hu_edges: NDArray[np.int64]
    hu_counts: dict[str, NDArray[np.int64]]
    spacing_mm: NDArray[np.float64]
    diameter_mm: NDArray[np.float64]
    strata: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ComparisonPage:
    """What `raysynth compare` shows.

    Attributes:
        notices: what a reader must know beside the figures.
        table: what each recipe costs, heading and rows.
        distances: heading, and a row for each region.
        verdicts: a sentence for each pair of recipes.
        scorecards: by recipe, heading and rows.
        real: held-out slices.
        galleries: slices by recipe.
        window_hu: of the pictures.
    """

    title: str
    notices: Sequence[str]
    table: Sequence[Sequence[str]]
    distances: Sequence[Sequence[str]]
    verdicts: Sequence[str]
    scorecards: Mapping[str, Sequence[Sequence[str]]]
    real: Sequence[Tile]
    galleries: Mapping[str, Sequence[Tile]]
    window_hu: tuple[float, float] = DISPLAY_WINDOW_HU


@dataclass(frozen=True)
class AuditPage:
    """What `raysynth audit` shows.

    Attributes:
        verdict: `passed` or `failed`.
        reasons: why, a sentence each.
        notices: what a reader must know beside the figures.
        tables: by what was compared, heading and rows.
        pairs: three at a time: a sample, its nearest training sample, their difference.
    """

    title: str
    verdict: str
    reasons: Sequence[str]
    notices: Sequence[str]
    tables: Mapping[str, Sequence[Sequence[str]]]
    pairs: Sequence[Tile]


@dataclass(frozen=True)
class UsefulnessPage:
    """What `raysynth downstream` shows.

    Attributes:
        notices: what a reader must know beside the figures.
        tables: heading and a row for each arm, by title.
        verdicts: a sentence for each arm, by the same titles.
        excluded: on samples that were left out.
    """

    title: str
    notices: Sequence[str]
    tables: Mapping[str, Sequence[Sequence[str]]]
    verdicts: Mapping[str, Sequence[str]]
    excluded: str


def write_report(data: ReportData, path: Path) -> None:
    """Renders a run's report to `path`, replacing what is there in one step."""
    _write(
        "report.html",
        path,
        data.window_hu,
        data=data,
        groups={
            name: [_tile(tile, data.window_hu) for tile in getattr(data, name)]
            for name in _GALLERIES
        },
        scrolls=[
            {
                "webp": webp_data_uri(scroll(one.volumes, data.window_hu)),
                "caption": one.caption,
                "names": " and ".join(one.volumes),
            }
            for one in data.scrolls
        ],
        compared=[[_tile(tile, data.window_hu) for tile in row] for row in data.compared],
        metric_charts=[
            _metric_chart(row)
            for row in data.metrics
            if row.key.partition("/")[0] in data.shown_metrics
        ],
        distances=_distances(data.metrics),
        losses=charts.loss_chart(data.losses) if data.losses else "",
        sizes=charts.size_chart(data.requested_mm, data.measured_mm),
        coverage=charts.coverage_chart(
            data.attribute_names, data.requested_scores, data.reference_scores
        )
        if data.attribute_names
        else "",
        swept=charts.sweep_chart(data.sweep.panels, data.sweep.chosen)
        if data.sweep and data.sweep.panels
        else "",
        times=charts.time_chart(data.seconds) if data.seconds else "",
    )


def write_store_page(data: StorePage, path: Path) -> None:
    """Renders a store's page to `path`, replacing what is there in one step."""
    _write(
        "store.html",
        path,
        DISPLAY_WINDOW_HU,
        data=data,
        groups=_groups(data.galleries, DISPLAY_WINDOW_HU),
        histogram=charts.histogram_chart(data.hu_edges, data.hu_counts),
        geometry=charts.geometry_chart(data.spacing_mm, data.diameter_mm),
    )


def write_comparison(data: ComparisonPage, path: Path) -> None:
    """Renders a comparison to `path`, replacing what is there in one step."""
    _write(
        "compare.html",
        path,
        data.window_hu,
        data=data,
        real=[_tile(tile, data.window_hu) for tile in data.real],
        groups=_groups(data.galleries, data.window_hu),
    )


def write_audit(data: AuditPage, path: Path) -> None:
    """Renders a privacy audit to `path`, replacing what is there in one step."""
    pairs = [_tile(tile, LUNG_WINDOW_HU) for tile in data.pairs]
    rows = [pairs[start : start + 3] for start in range(0, len(pairs), 3)]
    _write("audit.html", path, LUNG_WINDOW_HU, data=data, rows=rows)


def write_usefulness(data: UsefulnessPage, path: Path) -> None:
    """Renders a usefulness trial to `path`, replacing what is there in one step."""
    _write("usefulness.html", path, DISPLAY_WINDOW_HU, data=data)


def _write(template: str, path: Path, window_hu: tuple[float, float], **values: object) -> None:
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("raysynth.report"), autoescape=select_autoescape()
    )
    low, high = window_hu
    window = "all grey values" if window_hu == RELATIVE_RANGE else f"{low:g} to {high:g} HU"
    page = environment.get_template(template).render(window=window, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


_GALLERIES = ("nodules", "real", "synthetic", "denoising")


def _groups(
    galleries: Mapping[str, Sequence[Tile]], window_hu: tuple[float, float]
) -> dict[str, list[dict[str, object]]]:
    return {name: [_tile(tile, window_hu) for tile in tiles] for name, tiles in galleries.items()}


def _tile(tile: Tile, window_hu: tuple[float, float]) -> dict[str, object]:
    height, width = tile.hu.shape
    return {
        "png": png_data_uri(grey(tile.hu, window_hu)),
        "overlay": overlay_svg(tile.layout, tile.boxes),
        "width": width,
        "height": height,
        "caption": tile.caption,
    }


def _metric_chart(row: MetricRow) -> str:
    sets = {"synthetic": row.value, **row.columns}
    return charts.metric_chart(
        row.key, [(name, *entry, name == "synthetic") for name, entry in sets.items()]
    )


def _distances(rows: Sequence[MetricRow]) -> list[list[str]]:
    """Heading and rows of the table of all metrics."""
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    heading = ["metric / space / region / extractor / N", "synthetic", *names, "standing"]
    return [
        heading,
        *(
            [
                row.key,
                _text(row.value),
                *(_text(row.columns.get(name)) for name in names),
                row.standing,
            ]
            for row in rows
        ),
    ]


def _text(entry: Estimate | None) -> str:
    if entry is None:
        return "-"
    value, interval = entry
    return f"{value:.4g} " + ("(no interval)" if interval is None else _range(interval))


def _range(interval: tuple[float, float]) -> str:
    return "[{:.4g}, {:.4g}]".format(*interval)
