"""`raysynth inspect`: is a store valid, what does it hold, and what does that look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from raysynth.condition import Box
from raysynth.data.statistics import (
    HU_EDGES,
    SIZE_EDGES_MM,
    TEXTURES,
    StoreStatistics,
    statistics,
)
from raysynth.errors import RaysynthError
from raysynth.prompt import write_prompt
from raysynth.report.html import StorePage, Tile, write_store_page
from raysynth.store.reader import SampleSet, case_attrs, case_ids, read_case
from raysynth.store.repository import open_root
from raysynth.store.validate import StoreSummary, sample_groups, summary, validate
from raysynth.window import measurable

MAX_CASES = 6
MAX_SAMPLES = 12
VIEW_PIXELS = 256
"""Pictures of volumes are thinned to about so many pixels a side."""


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        problems: one line each; none: the store is valid.
        summary: what it holds; None if it is too damaged to say.
        mean_hu: over all volumes, by label name; counted for a page or if all is read.
        page: the picture page, if one was asked for.
    """

    problems: list[str]
    summary: StoreSummary | None
    mean_hu: dict[str, float]
    page: str | None


def inspect_store(url: str, page: Path | None = None, *, full: bool = False) -> Inspection:
    """Validates a store against the schema, counts, and draws a page of pictures.

    Args:
        url: local path or s3:// URL.
        page: where to write the HTML page; None: nowhere.
        full: check every shard, not only the first and last of each array.

    Raises:
        InputError: there is no store of this schema version.
    """
    problems = [f"{problem.path or '/'}: {problem.what}" for problem in validate(url, full)]
    try:
        counted = summary(url)
        volumes = statistics(url) if page is not None or full else None
        if page is not None and volumes is not None:
            write_store_page(_page(url, problems, counted, volumes), page)
    except (RaysynthError, KeyError, TypeError, ValueError, IndexError):
        if not problems:
            raise
        return Inspection(problems, None, {}, None)
    mean_hu = volumes.mean_hu if volumes is not None else {}
    return Inspection(problems, counted, mean_hu, str(page) if page else None)


def _page(
    url: str, problems: list[str], counted: StoreSummary, volumes: StoreStatistics
) -> StorePage:
    root = open_root(url, counted.snapshot)
    galleries: dict[str, Sequence[Tile]] = {
        "Volumes: middle of the lungs, axial and coronal": _volume_tiles(root)
    }
    for path, group in sample_groups(root):
        samples = SampleSet(group)
        if "hu" in samples.group:
            galleries[path] = _sample_tiles(samples)
    facts = {
        "cases": f"{counted.cases}",
        "patients": f"{counted.patients}",
        "nodules": f"{counted.nodules}",
        "quarantined": f"{counted.quarantined}",
        "stored": f"{counted.stored_bytes / 2**20:.0f} MiB",
        **{path: f"{count:,}" for path, count in counted.samples.items()},
        **{f"audit of {run}": verdict for run, verdict in counted.audits.items()},
        **{f"{path}: scale": f"{scale:.3f}" for path, scale in _latent_scales(root).items()},
    }
    return StorePage(
        title=f"Store {Path(url).name}",
        problems=problems,
        facts=facts,
        galleries=galleries,
        hu_edges=HU_EDGES,
        hu_counts=volumes.histograms,
        spacing_mm=volumes.spacing_mm,
        diameter_mm=volumes.diameter_mm,
        strata=_strata_rows(volumes),
    )


def _latent_scales(root: zarr.Group) -> dict[str, float]:
    return {
        path: float(group.attrs["latent_scale"])  # type: ignore[arg-type]
        for path, group in sample_groups(root)
        if "latent_scale" in group.attrs
    }


def _strata_rows(volumes: StoreStatistics) -> list[list[str]]:
    """Nodules by size and texture: a heading, and one row a class, each cell split by split."""
    if not len(volumes.diameter_mm):
        return []
    edges = [*SIZE_EDGES_MM[1:], None]
    sizes = [
        f"below {high:g} mm" if not low else f"{low:g} to {high:g} mm" if high else f"{low:g} mm up"
        for low, high in zip(SIZE_EDGES_MM, edges, strict=True)
    ]
    rows = [["diameter", *TEXTURES]]
    for size, counts in zip(sizes, volumes.strata.transpose(1, 2, 0), strict=True):
        rows.append([size, *(" / ".join(map(str, cell)) for cell in counts.tolist())])
    return rows


def _volume_tiles(root: zarr.Group) -> list[Tile]:
    tiles = []
    for number, case_id in enumerate(case_ids(root)[:MAX_CASES], 1):
        case, attributes = read_case(root, case_id), case_attrs(root, case_id)
        hu = measurable(case.volume.hu, case.intensity)
        layout = case.layout if case.layout is not None else np.zeros(hu.shape, np.uint8)
        extent = attributes.lung_zyx or tuple((0, size) for size in hu.shape)
        z, y, _ = ((start + stop) // 2 for start, stop in extent)
        thin = max(1, hu.shape[2] // VIEW_PIXELS)
        axial = np.s_[z, ::thin, ::thin]
        # Head up, and about as many pixels to a millimetre as across.
        repeat = max(1, round(case.volume.spacing_mm[0] / (case.volume.spacing_mm[2] * thin)))
        coronal = np.s_[::-1, y, ::thin]
        tiles += [
            Tile(hu[axial], layout[axial], (), f"case {number}, {attributes.split}"),
            Tile(hu[coronal].repeat(repeat, 0), layout[coronal].repeat(repeat, 0), (), "coronal"),
        ]
    return tiles


def _sample_tiles(samples: SampleSet) -> list[Tile]:
    rows = np.linspace(0, samples.count - 1, min(MAX_SAMPLES, samples.count)).astype(int)
    tiles = []
    for row in rows.tolist():
        # Of a cube the middle plane, and of its box the square there.
        middle = tuple(size // 2 for size in samples.shape[:-2])
        corners = samples.index["box"][row].reshape(2, -1)[:, -2:]
        box: Box = tuple(corners.ravel().tolist())
        tiles.append(
            Tile(
                measurable(samples.read("hu", row, row + 1)[0][middle], samples.attrs["intensity"]),
                samples.read("layout", row, row + 1)[0][middle],
                [box] if box[0] >= 0 else (),
                _caption(samples, row),
            )
        )
    return tiles


def _caption(samples: SampleSet, row: int) -> str:
    """Which sample it is and, of a nodule, what the first reader said or what was asked for."""
    if "found" in samples.index and samples.index["attributes"][row].any():
        asked = ", ".join(map(str, samples.index["attributes"][row]))
        return f"row {row}: scores {asked}; {'' if samples.index['found'][row] else 'not '}found"
    if "nodule" not in samples.index or samples.index["nodule"][row] < 0:
        return f"row {row}"
    scores, diameter_mm = (samples.index[name][row] for name in ("ratings", "diameter_mm"))
    return f"row {row}: {write_prompt(scores[0].tolist(), float(diameter_mm))}"
