"""What the recipe's store holds, in bounded pages: synthetic runs, and reference samples."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from raysynth.case import CONDITION_ATTRIBUTES, CONDITION_COLUMNS
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.serving.schemas import Score
from raysynth.store.reader import SampleSet, open_group, subgroups
from raysynth.store.repository import main_snapshot, open_root
from raysynth.volume import RELATIVE_RANGE
from raysynth.window import LUNG_WINDOW_HU
from storage_schema.v1 import SPLITS

MAX_PAGE = 100
"""Samples of one page."""

KEPT_SETS = 8
"""Sets whose columns are kept in memory."""


class Wanted(BaseModel):
    """Which samples of a set, and which page of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int = Field(0, ge=0, le=10**9)
    """How many that fit are passed over."""
    count: int = Field(48, ge=1, le=MAX_PAGE)
    has_nodule: bool | None = None
    found: bool | None = None
    """Of synthetic ones: whether the nodule that was asked for was found."""
    flagged: bool | None = None
    """Of audited ones: whether it counts as a copy of a training sample."""
    sphericity: Score | None = None
    margin: Score | None = None
    lobulation: Score | None = None
    spiculation: Score | None = None
    texture: Score | None = None
    by: Literal["row", "copy_score"] = "row"
    """What comes first: the first row, or what is likeliest a copy."""


class RunOut(BaseModel):
    """A synthetic run of the store, or the reference set."""

    name: str
    num_samples: int
    shape: tuple[int, ...]
    pixel_mm: float
    depth_mm: float
    intensity: str
    control: str | None = None
    """Of a run that is no sampling of its own: what it is the control of."""
    verdict: str | None = None
    """Of the privacy audit, if there was one."""


class StoredSample(BaseModel):
    """A sample of the store without its pixels."""

    row: int
    has_nodule: bool
    box: tuple[int, ...] | None
    attributes: dict[str, int]
    """Scores that were asked for; of reference samples the median of the readers'."""
    split: str | None = None
    found: bool | None = None
    diameter_mm: float | None = None
    """Measured in synthetic samples, annotated in reference samples."""
    contrast_hu: float | None = None
    copied_fraction: float | None = None
    copy_score: float | None = None
    flagged: bool | None = None


class SamplesOut(BaseModel):
    """A page of samples."""

    num_fitting: int
    """On all pages."""
    samples: list[StoredSample]


def runs(config: ExperimentConfig) -> list[RunOut]:
    """The synthetic runs of the store; none if there is no store."""
    try:
        root = open_root(config.store_url)
    except InputError:
        return []
    found = []
    for name in _names(root, "synthetic"):
        run = _set(config, f"synthetic/{name}")
        audits = _names(root, "audits")
        verdict = _set(config, f"audits/{name}").attrs["verdict"] if name in audits else None
        control = run.attrs["passport"].get("control")
        found.append(_facts(config, name, run, control=control, verdict=verdict))
    return found


def references(config: ExperimentConfig) -> RunOut:
    """The recipe's sample set.

    Raises:
        InputError: there is none.
    """
    name = config.samples.name
    return _facts(config, name, _set(config, f"samples/{name}"))


def run_page(config: ExperimentConfig, name: str, wanted: Wanted) -> SamplesOut:
    """A page of a run.

    Raises:
        InputError: there is no such run, or none that was audited where that is asked for.
    """
    run, audit = _set(config, f"synthetic/{name}"), None
    if name in _names(open_root(config.store_url), "audits"):
        audit = _set(config, f"audits/{name}")
    if audit is None and (wanted.flagged is not None or wanted.by == "copy_score"):
        raise InputError(f"run {name}: nobody has audited it; raysynth audit does")
    fits = _fitting(run, run.index["attributes"], wanted)
    if wanted.found is not None:
        asked = np.asarray(run.index["has_nodule"]) == 1
        fits &= asked & (run.index["found"] == wanted.found)
    if wanted.flagged is not None and audit is not None:
        fits &= audit.index["flagged"] == wanted.flagged
    rows = np.flatnonzero(fits)
    if wanted.by == "copy_score" and audit is not None:
        rows = rows[np.argsort(-audit.index["copy_score"][rows], kind="stable")]
    page = rows[wanted.first : wanted.first + wanted.count]
    samples = [_synthetic(run, audit, int(row)) for row in page]
    return SamplesOut(num_fitting=len(rows), samples=samples)


def reference_page(config: ExperimentConfig, wanted: Wanted) -> SamplesOut:
    """A page of the recipe's sample set.

    Raises:
        InputError: there is none, or what is asked for is known of synthetic samples alone.
    """
    if wanted.found is not None or wanted.flagged is not None or wanted.by != "row":
        raise InputError("found, flagged and by: these are known of synthetic runs alone")
    samples = _set(config, f"samples/{config.samples.name}")
    scores = median_scores(samples.index["ratings"])
    rows = np.flatnonzero(_fitting(samples, scores, wanted))
    page = rows[wanted.first : wanted.first + wanted.count]
    return SamplesOut(
        num_fitting=len(rows), samples=[_reference(samples, scores, int(row)) for row in page]
    )


def read_sample(config: ExperimentConfig, path: str, row: int) -> dict[str, Any]:
    """A sample with its pixels.

    Args:
        config: the recipe.
        path: `synthetic/<run>`, or `samples` for the recipe's sample set.
        row: of it.

    Returns:
        `hu`, `layout`, and `about`: what can be said of it.

    Raises:
        InputError: there is no such set, or no such row.
    """
    is_synthetic = path != "samples"
    samples = _set(config, path if is_synthetic else f"samples/{config.samples.name}")
    if row >= samples.count:
        raise InputError(f"row {row}: {path} has {samples.count} samples")
    about = {
        "synthetic": is_synthetic,
        "row": row,
        "pixel_mm": samples.pixel_mm,
        "depth_mm": config.samples.spacing_mm,
        "window_hu": RELATIVE_RANGE if samples.attrs["intensity"] == "relative" else LUNG_WINDOW_HU,
        "intensity": samples.attrs["intensity"],
        "box": _box(samples.index["box"][row]),
    }
    if is_synthetic:
        about |= {
            "bundle": samples.attrs["bundle"],
            "seed": int(samples.index["seed"][row]),
            "batch_shape": int(samples.index["batch_shape"][row]),
            "copied_fraction": float(samples.index["copied_fraction"][row]),
        }
    arrays = {name: samples.read(name, row, row + 1)[0] for name in ("hu", "layout")}
    return {**arrays, "about": about}


def _set(config: ExperimentConfig, path: str) -> SampleSet:
    return _open(config.store_url, main_snapshot(config.store_url), path)


def _facts(config: ExperimentConfig, name: str, samples: SampleSet, **more: Any) -> RunOut:
    return RunOut(
        name=name,
        num_samples=samples.count,
        shape=samples.shape,
        pixel_mm=samples.pixel_mm,
        depth_mm=config.samples.spacing_mm,
        intensity=samples.attrs["intensity"],
        **more,
    )


@lru_cache(maxsize=KEPT_SETS)
def _open(url: str, snapshot: str, path: str) -> SampleSet:
    """A set as it was at a snapshot, whose columns are read once."""
    return SampleSet(open_group(open_root(url, snapshot), path))


def _names(root: zarr.Group, path: str) -> list[str]:
    return [name for name, _ in subgroups(open_group(root, path))] if path in root else []


def _fitting(samples: SampleSet, scores: NDArray[np.uint8], wanted: Wanted) -> NDArray[np.bool_]:
    fits = np.ones(samples.count, np.bool_)
    if wanted.has_nodule is not None:
        fits &= samples.index["has_nodule"] == wanted.has_nodule
    for column, name in enumerate(CONDITION_ATTRIBUTES):
        if (score := getattr(wanted, name)) is not None:
            fits &= scores[:, column] == score
    return fits


def median_scores(ratings: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Medians over the readers (n, 5), rounded down; 0 where nobody gave a score."""
    given = np.where(ratings == 0, np.nan, ratings)[:, :, list(CONDITION_COLUMNS)]
    rated = ~np.isnan(given).all(axis=1)
    scores = np.zeros(rated.shape, np.uint8)
    for row, column in zip(*np.nonzero(rated), strict=True):
        scores[row, column] = np.nanmedian(given[row, :, column])
    return scores


def _synthetic(run: SampleSet, audit: SampleSet | None, row: int) -> StoredSample:
    index = run.index
    has_nodule = bool(index["has_nodule"][row])
    return StoredSample(
        row=row,
        has_nodule=has_nodule,
        box=_box(index["box"][row]),
        attributes=_scores(index["attributes"][row]),
        found=bool(index["found"][row]) if has_nodule else None,
        diameter_mm=_number(index["measured_diameter_mm"][row]),
        contrast_hu=_number(index["measured_contrast_hu"][row]),
        copied_fraction=float(index["copied_fraction"][row]),
        copy_score=None if audit is None else _number(audit.index["copy_score"][row]),
        flagged=None if audit is None else bool(audit.index["flagged"][row]),
    )


def _reference(samples: SampleSet, scores: NDArray[np.uint8], row: int) -> StoredSample:
    index = samples.index
    return StoredSample(
        row=row,
        has_nodule=bool(index["has_nodule"][row]),
        box=_box(index["box"][row]),
        attributes=_scores(scores[row]),
        split=SPLITS[int(index["split"][row])],
        diameter_mm=_number(index["diameter_mm"][row]),
    )


def _box(corners: Iterable[int]) -> tuple[int, ...] | None:
    box = tuple(int(one) for one in corners)
    return None if box[0] < 0 else box


def _scores(row: NDArray[np.uint8]) -> dict[str, int]:
    named = zip(CONDITION_ATTRIBUTES, row.tolist(), strict=True)
    return {name: score for name, score in named if score}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
