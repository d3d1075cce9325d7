"""What a reader study shows: real samples of the store, and as many synthetic ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, field_validator

from raysynth.case import CONDITION_ATTRIBUTES, Intensity, Split
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.seeding import seed_of
from raysynth.serving.answers import NAME
from raysynth.serving.gallery import median_scores
from raysynth.serving.schemas import MAX_SEED, Strict
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from storage_schema.v1 import SPLITS

MAX_STUDY_BYTES = 2**30
"""Of all images of a study."""

MAX_READERS = 50

Matched = Literal["has_nodule", "sphericity", "margin", "lobulation", "spiculation", "texture"]
ReaderName = Annotated[str, Field(pattern=NAME)]


class ReaderStudyIn(Strict):
    """A reader study that shall be made."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "title": "Lung slices, autumn",
                    "run": "phantom_demo",
                    "readers": ["reader-1", "reader-2"],
                    "per_kind": 50,
                    "match": ["has_nodule"],
                }
            ]
        }
    )

    title: str = Field("Reader study", min_length=1, max_length=120)
    """Readers see it."""
    run: str = Field(pattern=NAME)
    """The synthetic run of the recipe's store."""
    readers: Annotated[tuple[ReaderName, ...], Field(min_length=1, max_length=MAX_READERS)]
    """What they are called in the answers: pseudonyms, rather than names."""
    split: Split = "test"
    """Whose real samples are shown."""
    per_kind: int = Field(50, ge=1, le=500)
    """Real items that count; there are as many synthetic ones."""
    calibration: int = Field(2, ge=0, le=20)
    """Items of each kind before those, of which readers are told what they were."""
    repeat_share: float = Field(0.1, ge=0, le=0.3)
    """Of the items that count: shown to the same reader again, later."""
    task: Literal["choice", "rating"] = "choice"
    """Real or synthetic; `rating` asks also how real it looks, from 1 to 5."""
    match: tuple[Matched, ...] = ()
    """Properties which as many real as synthetic items have."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Of the drawing, and of every reader's order."""
    tell_share: bool = False
    """Whether readers are told that half of the items are synthetic."""

    @field_validator("readers")
    @classmethod
    def _readers_differ(cls, readers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(readers)) < len(readers):
            raise ValueError("a name is there twice: give each reader another")
        return readers


@dataclass(frozen=True)
class Items:
    """What is shown.

    Attributes:
        images: int16 (n, ...), those of calibration first.
        is_synthetic: of each.
        pixel_mm: side of a pixel.
        depth_mm: between planes.
        intensity: what the values are.
        value_range: least and largest value that an image may have.
    """

    images: NDArray[np.int16]
    is_synthetic: list[bool]
    pixel_mm: float
    depth_mm: float
    intensity: Intensity
    value_range: tuple[int, int]


def choose_items(config: ExperimentConfig, wanted: ReaderStudyIn) -> Items:
    """Draws the items of a study out of the recipe's store.

    Args:
        config: the recipe.
        wanted: how many, of which.

    Raises:
        InputError: there is no such run, it does not fit the real samples, or there are too few.
    """
    root = open_root(config.store_url)
    real = SampleSet(open_group(root, f"samples/{config.samples.name}"))
    try:
        run = SampleSet(open_group(root, f"synthetic/{wanted.run}"))
    except InputError as error:
        raise InputError(f"run: {error}") from error
    _check_alike(real, run, wanted)
    rows = np.flatnonzero(real.index["split"] == SPLITS.index(wanted.split))
    rng = np.random.default_rng(seed_of("study items", wanted.seed))
    strata_real = _strata(real, median_scores(real.index["ratings"]), wanted.match)
    strata_drawn = _strata(run, run.index["attributes"], wanted.match)
    count = wanted.calibration + wanted.per_kind
    pairs = _pairs(
        _by_stratum(rows, strata_real, real.index["case"], rng),
        _by_stratum(np.arange(run.count), strata_drawn, run.index["source_sample"], rng),
        rng,
    )
    if len(pairs) < count:
        matched = f", matched by {', '.join(wanted.match)}," if wanted.match else ""
        raise InputError(
            f"per_kind: {count} items of each kind are needed, calibration included; "
            f"{len(rows)} {wanted.split} samples and {run.count} of run {wanted.run}{matched} give "
            f"{len(pairs)}"
        )
    return _read(config, real, run, pairs[:count], wanted, rng)


def _check_alike(real: SampleSet, run: SampleSet, wanted: ReaderStudyIn) -> None:
    """Anything but what the images show would tell them apart."""
    for name, of_real, of_run in (
        ("size", real.shape, run.shape),
        ("pixels in mm", real.pixel_mm, run.pixel_mm),
        ("intensity", real.attrs["intensity"], run.attrs["intensity"]),
    ):
        if of_real != of_run:
            raise InputError(
                f"run: {wanted.run} has another {name} ({of_run}) than the real samples "
                f"({of_real}): readers would know them by it; take a run that was drawn alike"
            )
    count = 2 * (wanted.calibration + wanted.per_kind)
    if (size := count * int(np.prod(real.shape)) * 2) > MAX_STUDY_BYTES:
        raise InputError(
            f"per_kind: the images of {count} items take {size:,} bytes; a study may have "
            f"{MAX_STUDY_BYTES:,}"
        )


def _strata(
    samples: SampleSet, scores: NDArray[np.uint8], match: Sequence[str]
) -> list[tuple[int, ...]]:
    """Of each sample: the values of the properties that are matched."""
    columns = [
        samples.index["has_nodule"]
        if name == "has_nodule"
        else scores[:, CONDITION_ATTRIBUTES.index(name)]
        for name in match
    ]
    return [tuple(int(column[row]) for column in columns) for row in range(samples.count)]


def _by_stratum(
    rows: NDArray[np.int64],
    strata: Sequence[tuple[int, ...]],
    sources: NDArray[np.int32],
    rng: np.random.Generator,
) -> dict[tuple[int, ...], list[int]]:
    """Rows of each stratum in random order, one of every case before the second of any.

    Neighbouring slices of a case are one another's likeness: of those, readers would judge less
    than it seems.
    """
    seen: defaultdict[int, int] = defaultdict(int)
    turns = []
    for row in rng.permutation(rows).tolist():
        source = int(sources[row])
        turns.append((seen[source] if source >= 0 else 0, row))
        seen[source] += 1
    found: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for _, row in sorted(turns, key=lambda turn: turn[0]):  # stable: random within a turn
        found[strata[row]].append(row)
    return found


def _pairs(
    real: dict[tuple[int, ...], list[int]],
    drawn: dict[tuple[int, ...], list[int]],
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """Rows of a real and a synthetic sample of the same stratum; any first ones have all strata."""
    ordered = []
    for stratum in sorted(real.keys() & drawn.keys()):
        pairs = list(zip(real[stratum], drawn[stratum], strict=False))
        places = (np.arange(len(pairs)) + rng.random(len(pairs))) / len(pairs)
        ordered += list(zip(places.tolist(), pairs, strict=True))
    return [pair for _, pair in sorted(ordered)]


def _read(
    config: ExperimentConfig,
    real: SampleSet,
    run: SampleSet,
    pairs: Sequence[tuple[int, int]],
    wanted: ReaderStudyIn,
    rng: np.random.Generator,
) -> Items:
    images = np.empty((2 * len(pairs), *real.shape), np.int16)
    kinds: list[bool] = []
    for first, last in ((0, wanted.calibration), (wanted.calibration, len(pairs))):
        # A number in the list of items says nothing of what the item is.
        turns = rng.permutation(2 * (last - first)).tolist()
        for turn in turns:
            pair, is_synthetic = pairs[first + turn // 2], turn % 2
            row = pair[is_synthetic]
            images[len(kinds)] = (run if is_synthetic else real).read("hu", row, row + 1)[0]
            kinds.append(bool(is_synthetic))
    # Scanners pad with values that no model draws, and metal goes beyond any model's window: both
    # kinds keep to what both reach.
    axes = tuple(range(1, images.ndim))
    least, most = images.min(axis=axes), images.max(axis=axes)
    drawn = np.array(kinds)
    low = int(max(least[drawn].min(), least[~drawn].min()))
    high = int(min(most[drawn].max(), most[~drawn].max()))
    if low >= high:
        raise InputError(f"run: {wanted.run} has no value in common with the real samples")
    return Items(
        images.clip(low, high),
        kinds,
        real.pixel_mm,
        config.samples.spacing_mm,
        real.attrs["intensity"],
        (low, high),
    )
