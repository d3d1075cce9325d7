"""Do slices show what was asked for: nodules found again, their sizes, and the scores asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from raysynth.case import CONDITION_ATTRIBUTES, CONDITION_COLUMNS
from raysynth.config.sampling import Cohort
from raysynth.evaluation.intervals import Interval, Z, correlation, wilson
from raysynth.evaluation.measure import ADHERENCE_COLUMNS
from raysynth.formats.lidc import nodule_records
from raysynth.sampling.cohort import DIAMETERS, TEXTURES, diameter_class, texture_class

MAX_SIZE_PAIRS = 2000


@dataclass(frozen=True)
class FoundShare:
    """In how many of some boxes a nodule was found, with Wilson's 95 % interval."""

    found: float | None
    interval: Interval
    n: int


@dataclass(frozen=True)
class SizeAgreement:
    """Measured against requested diameters, where a nodule was found.

    Attributes:
        n: nodules found.
        median_error_mm: measured minus requested.
        median_absolute_error_mm: the same without its sign.
        spearman: rank correlation; None if a side does not vary.
        spearman_interval: 95 % (Bonett & Wright 2000).
        requested_mm: of the first `MAX_SIZE_PAIRS`.
        measured_mm: of the same.
    """

    n: int
    median_error_mm: float | None
    median_absolute_error_mm: float | None
    spearman: float | None
    spearman_interval: Interval | None
    requested_mm: tuple[float, ...]
    measured_mm: tuple[float, ...]


@dataclass(frozen=True)
class MeanCount:
    """A mean over samples with its 95 % interval (normal)."""

    mean: float
    interval: Interval
    n: int


@dataclass(frozen=True)
class CohortShare:
    """One class of a cohort.

    Attributes:
        asked: by the recipe; None: it leaves this class open.
        requested: share of the samples' requests, as they are drawn in their layouts.
        found: the same of the requests that were found again; None: nothing was.
    """

    asked: float | None
    requested: float
    found: float | None


@dataclass(frozen=True)
class AttributeCoverage:
    """Shares of the scores 1 to 5 of one attribute.

    Attributes:
        requested: of the synthetic samples.
        reference: of all readers of the LIDC database.
        distance: total variation, 0 (alike) to 1 (no score in common).
    """

    requested: tuple[float, ...]
    reference: tuple[float, ...]
    distance: float


def found_shares(adherence: NDArray[np.float32], name: str) -> dict[str, FoundShare]:
    """Shares found in the boxes of one set of samples, and in stray ones.

    Args:
        adherence: (n, columns), see `ADHERENCE_COLUMNS`.
        name: of the set.

    Returns:
        `name`: boxes asked for (or annotated); `name_stray`: boxes of other slices, put where no
        nodule was asked for. A set adheres as far as the first exceeds the second.
    """
    columns = _columns(adherence)
    stray = columns["stray_found"]
    return {
        name: _share(columns["found"]),
        f"{name}_stray": _share(stray[np.isfinite(stray)]),
    }


def size_agreement(adherence: NDArray[np.float32]) -> SizeAgreement:
    """How measured diameters follow those asked for."""
    columns = _columns(adherence)
    found = columns["found"] > 0
    requested, measured = columns["requested_mm"][found], columns["measured_mm"][found]
    if not len(requested):
        return SizeAgreement(0, None, None, None, None, (), ())
    error = measured - requested
    varies = len(np.unique(requested)) > 1 and len(np.unique(measured)) > 1
    spearman = float(spearmanr(requested, measured).statistic) if varies else None
    return SizeAgreement(
        n=len(requested),
        median_error_mm=float(np.median(error)),
        median_absolute_error_mm=float(np.median(np.abs(error))),
        spearman=spearman,
        spearman_interval=None if spearman is None else correlation(spearman, len(requested)),
        requested_mm=tuple(round(float(mm), 2) for mm in requested[:MAX_SIZE_PAIRS]),
        measured_mm=tuple(round(float(mm), 2) for mm in measured[:MAX_SIZE_PAIRS]),
    )


def cohort_shares(
    cohort: Cohort, texture: NDArray[np.uint8], adherence: NDArray[np.float32]
) -> dict[str, dict[str, CohortShare]]:
    """What became of the shares that a cohort asks for, by factor and class.

    Args:
        cohort: of the recipe.
        texture: requested scores of samples with a box, (n,).
        adherence: of the same, (n, columns).
    """
    columns = _columns(adherence)
    found = columns["found"] > 0
    classes: dict[str, tuple[Sequence[str], Mapping[Any, float], NDArray[np.int_]]] = {
        "texture": (TEXTURES, cohort.texture, np.array([texture_class(s) for s in texture])),
        "diameter_mm": (
            DIAMETERS,
            cohort.diameter_mm,
            np.array([diameter_class(mm) for mm in columns["requested_mm"]]),
        ),
    }
    return {
        factor: {
            name: CohortShare(
                asked.get(name),
                float(np.mean(rows == number)),
                float(np.mean(rows[found] == number)) if found.any() else None,
            )
            for number, name in enumerate(names)
        }
        for factor, (names, asked, rows) in classes.items()
        if asked and len(rows)
    }


def mean_count(counts: NDArray[np.floating]) -> MeanCount | None:
    """Of counts in (n,) samples; None without any."""
    if not len(counts):
        return None
    mean, spread = float(counts.mean()), Z * float(counts.std()) / len(counts) ** 0.5
    return MeanCount(mean, (mean - spread, mean + spread), len(counts))


def attribute_coverage(attributes: NDArray[np.uint8]) -> dict[str, AttributeCoverage]:
    """Requested scores beside those of LIDC's readers, by attribute.

    Args:
        attributes: requested scores (n, 5), 0 where none was given.

    Returns:
        Nothing for attributes that were never given.
    """
    ratings = np.concatenate([np.array(record.ratings) for record in nodule_records()])
    coverage = {}
    for name, scores, readers in zip(
        CONDITION_ATTRIBUTES, attributes.T, ratings[:, CONDITION_COLUMNS].T, strict=True
    ):
        if scores.any():
            requested, reference = _score_shares(scores), _score_shares(readers)
            distance = 0.5 * float(np.abs(requested - reference).sum())
            coverage[name] = AttributeCoverage(
                tuple(requested.tolist()), tuple(reference.tolist()), distance
            )
    return coverage


def _score_shares(scores: NDArray[np.integer]) -> NDArray[np.float64]:
    counts = np.bincount(scores, minlength=6)[1:6].astype(np.float64)
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


def _share(found: NDArray[np.float32]) -> FoundShare:
    successes = int(np.sum(found > 0))
    share = successes / len(found) if len(found) else None
    return FoundShare(share, wilson(successes, len(found)), len(found))


def _columns(adherence: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    table = adherence.reshape(-1, len(ADHERENCE_COLUMNS))
    return dict(zip(ADHERENCE_COLUMNS, table.T, strict=True))
