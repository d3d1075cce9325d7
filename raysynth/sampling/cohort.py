"""Which nodules a run asks for: LIDC's own, or in the shares of texture and size of a cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from raysynth.case import ATTRIBUTES
from raysynth.config.sampling import Cohort, DiameterClass, TextureClass
from raysynth.errors import InputError
from raysynth.formats.lidc import LidcRecord, nodule_records

Scores = tuple[int, ...]

TEXTURES: tuple[str, ...] = get_args(TextureClass)
DIAMETERS: tuple[str, ...] = get_args(DiameterClass)

TEXTURE_EDGES = (2, 4)
"""Lower bounds of the second and third class, in scores."""

DIAMETER_EDGES_MM = (6.0, 8.0, 15.0)

NUM_SWEEPS = 200
TOLERANCE = 1e-3

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Stratum:
    """Nodules of one texture and size, as readers saw them.

    Attributes:
        records: the nodules.
        scores: of each, by the readers who saw that texture.
        weights: of the records, summing to 1; None: all the same.
    """

    records: Sequence[LidcRecord]
    scores: Sequence[Sequence[Scores]]
    weights: NDArray[np.float64] | None = None

    def draw(self, rng: np.random.Generator) -> tuple[LidcRecord, Scores]:
        """A nodule, and the nine scores of one reader."""
        count = len(self.records)
        equal = self.weights is None
        which = int(rng.integers(count) if equal else rng.choice(count, p=self.weights))
        scores = self.scores[which]
        return self.records[which], scores[int(rng.integers(len(scores)))]


@dataclass(frozen=True)
class Strata:
    """Strata with their shares of a run, which sum to 1."""

    strata: Sequence[Stratum]
    shares: NDArray[np.float64]

    def of(self, number: int) -> Stratum:
        """That of a run's sample: the first n samples have the shares, as nearly as n allows.

        Multiples of the golden ratio fill [0, 1) more evenly than random numbers do.
        """
        place = ((number + 0.5) * GOLDEN) % 1.0
        row = int(np.searchsorted(np.cumsum(self.shares), place, side="right"))
        return self.strata[min(row, len(self.strata) - 1)]


def plan_strata(cohort: Cohort | None, smallest_mm: float) -> Strata:
    """The strata of a cohort; without one, a single stratum of all nodules.

    The joint distribution is LIDC's, brought to the shares asked for by iterative proportional
    fitting (Deming & Stephan 1940): nothing else of it changes. Classes that the cohort leaves out
    share what is left as in LIDC.

    Raises:
        InputError: no nodule is large enough, or LIDC has none of a kind that is asked for.
    """
    records = [record for record in nodule_records() if record.diameter_mm >= smallest_mm]
    if not records:
        raise InputError(
            f"no LIDC nodule measures {smallest_mm:g} mm: lower data.samples.min_nodule_mm"
        )
    if cohort is None:
        everything = Stratum(records, [record.ratings for record in records])
        return Strata([everything], np.ones(1))
    cells: dict[tuple[int, int], list[tuple[LidcRecord, list[Scores]]]] = {}
    for record in records:
        by_texture: dict[int, list[Scores]] = {}
        for scores in record.ratings:
            by_texture.setdefault(texture_class(scores[_TEXTURE]), []).append(scores)
        size = diameter_class(record.diameter_mm)
        for texture, readers in by_texture.items():
            cells.setdefault((texture, size), []).append((record, readers))
    mass = np.zeros((len(TEXTURES), len(DIAMETERS)))
    strata: dict[tuple[int, int], Stratum] = {}
    for cell, seen in cells.items():
        weights = np.array([len(readers) / len(record.ratings) for record, readers in seen])
        mass[cell] = weights.sum()
        nodules, readers_of = [one[0] for one in seen], [one[1] for one in seen]
        strata[cell] = Stratum(nodules, readers_of, weights / weights.sum())
    shares = _fit(mass / mass.sum(), cohort)
    order = sorted(strata)
    return Strata([strata[cell] for cell in order], np.array([shares[cell] for cell in order]))


def texture_class(score: float) -> int:
    """Row of `TEXTURES` of a score 1 to 5."""
    return int(np.digitize(score, TEXTURE_EDGES))


def diameter_class(diameter_mm: float) -> int:
    """Row of `DIAMETERS`."""
    return int(np.digitize(diameter_mm, DIAMETER_EDGES_MM))


_TEXTURE = ATTRIBUTES.index("texture")


def _fit(natural: NDArray[np.float64], cohort: Cohort) -> NDArray[np.float64]:
    """Cell shares with the cohort's sums of rows (textures) and columns (diameters)."""
    targets = (
        _filled_up("texture", TEXTURES, cohort.texture, natural.sum(axis=1)),
        _filled_up("diameter_mm", DIAMETERS, cohort.diameter_mm, natural.sum(axis=0)),
    )
    shares = natural.copy()
    for _ in range(NUM_SWEEPS):
        for axis, target in enumerate(targets):
            sums = shares.sum(axis=1 - axis)
            factor = np.divide(target, sums, out=np.zeros_like(sums), where=sums > 0)
            shares *= np.expand_dims(factor, 1 - axis)
    if np.abs(shares.sum(axis=1) - targets[0]).max() > TOLERANCE:
        raise InputError(
            f"sampling.cohort: LIDC has no nodules from which textures {cohort.texture} and "
            f"diameters {cohort.diameter_mm} could be had together: ask for less extreme shares"
        )
    return shares


def _filled_up(
    factor: str, classes: Sequence[str], asked: Mapping[Any, float], natural: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The share of every class."""
    for name, share in asked.items():
        if share > 0 and natural[classes.index(name)] == 0:
            raise InputError(
                f"sampling.cohort.{factor}: {share:g} {name}, but no LIDC nodule of at least "
                "data.samples.min_nodule_mm is: lower that, or ask for none"
            )
    others = np.array([0.0 if name in asked else natural[row] for row, name in enumerate(classes)])
    left = 1 - sum(asked.values())
    filled = others * (left / others.sum()) if others.sum() else others
    return filled + [asked.get(name, 0.0) for name in classes]
