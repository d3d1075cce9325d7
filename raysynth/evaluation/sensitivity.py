"""Does a metric see what it is trusted to see? Held-out patients, made worse by degrees.

One half of the held-out patients is the reference, the other is blurred, made noisy, shifted in
intensity, robbed of its nodules or of some of its modes. A metric that does not become worse with
each of these on real patients is no evidence of anything, so it gets into no headline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysynth.case import LUNG_LABELS, Label
from raysynth.config import EvaluationConfig
from raysynth.evaluation.judge import DISTANCES, GROUPS, MIN_SAMPLES, OVERLAP, distance_of
from raysynth.evaluation.measure import Computed, Place, told
from raysynth.evaluation.regions import cut_regions, made_whole
from raysynth.evaluation.sets import boxes_of, load_extractors, space_of
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from raysynth.window import measurable

MAX_SAMPLES = 256
MAX_PIXELS = 2**26
"""Of all samples together: every degradation is made of all of them. 32 volumes of 128 voxels a
side, or the largest slices."""

NUM_SPLITS = 20

PLAIN = ("blur", 0.0)
"""Not degraded."""

DROPPING = "mode dropping"

LEVELS: dict[str, tuple[float, ...]] = {
    "blur": (0.5, 1.0, 2.0),
    "noise": (25.0, 50.0, 100.0),
    "shift": (25.0, 50.0, 100.0),
    "removal": (1 / 3, 2 / 3, 1.0),
    DROPPING: (0.25, 0.5, 0.75),
}
"""Standard deviation of a Gaussian in pixels; of white noise, and an offset, in HU; the share of
samples whose nodule is covered with lung; the share of samples left out at one end of the features'
first principal component, and made up for by repeating the others."""

OF_NODULES = "removal"
"""Seen where nodules are looked at; no distance of whole slices needs to notice."""

RANDOM_FEATURES = ("ct-conv",)
"""Extractors that learned nothing: what they say is a smoke test."""

RING_PX = 4
"""Lung this near to a nodule covers it."""

EVIDENCE = "evidence"
PHANTOMS = "smoke test: phantoms"


@dataclass(frozen=True)
class Sensitivity:
    """How a metric answers to images that get worse.

    Attributes:
        n: samples on either side.
        curves: the metric by degradation: undegraded, then at each of `LEVELS`; means over
            `NUM_SPLITS` halvings of the patients.
        blind_to: degradations with which it does not become worse at every step.
    """

    n: int
    curves: dict[str, tuple[float, ...]]
    blind_to: tuple[str, ...]


@dataclass(frozen=True)
class _HeldOut:
    """Samples of held-out patients."""

    hu: NDArray[np.int16]
    layout: NDArray[np.uint8]
    box: NDArray[np.int16]
    made_of: tuple[int, ...] = ()


def sensitivity(
    real: SampleSet,
    patients: NDArray[np.int64],
    held_out: NDArray[np.bool_],
    config: EvaluationConfig,
    made_of: tuple[int, ...] = (),
) -> dict[str, Sensitivity]:
    """How every metric of every region and extractor answers, by its key without N.

    Needs a Ray session.

    Args:
        real: the sample set.
        patients: number of each sample's patient.
        held_out: samples of patients that no model was trained on.
        config: extractors.
        made_of: labels of the region `generated`, see `raysynth.evaluation.regions.cut_regions`.

    Returns:
        Nothing where the held-out patients are too few for two halves.
    """
    import ray

    rng = np.random.default_rng(seed_of("sensitivity", real.count))
    count = min(MAX_SAMPLES, max(2 * MIN_SAMPLES, MAX_PIXELS // int(np.prod(real.shape))))
    rows = np.sort(rng.permutation(np.flatnonzero(held_out))[:count])
    if len(np.unique(patients[rows])) < 2:
        return {}
    samples = ray.put(_read(real, rows, made_of))
    space = space_of(real)
    task = ray.remote(num_cpus=1)(_features)
    futures = {PLAIN: task.remote(samples, *PLAIN, config)} | {
        (kind, level): task.remote(samples, kind, level, config)
        for kind in DEGRADE
        for level in LEVELS[kind]
    }
    found = {
        asked: told(ray.get(future), real.attrs["intensity"]) for asked, future in futures.items()
    }
    answers = {}
    for place, (shown, _) in found[PLAIN].items():
        halves = _halves(patients[rows][shown], rng)
        if min(len(side) for half in halves for side in half) >= MIN_SAMPLES:
            worsened = _worsened(place, found)
            for group in DISTANCES:
                for metric, answer in _answers(group, worsened, halves).items():
                    answers["/".join((metric, space, *place))] = answer
    return answers


def standing(key: str, answers: Mapping[str, Sensitivity], phantoms: bool) -> str:
    """What a figure is worth: `EVIDENCE`, or why it is none.

    Args:
        key: of a metric.
        answers: from `sensitivity`.
        phantoms: whether all patients are.
    """
    metric, space, region, extractor, _ = key.split("/")
    if phantoms:
        return PHANTOMS
    if extractor.startswith(RANDOM_FEATURES):
        return "smoke test: random features"
    region = region.removeprefix(made_whole("")).partition("_")[0]
    answer = answers.get(f"{metric}/{space}/{region}/{extractor}")
    if answer is None:
        return "not tested on patients made worse"
    if answer.blind_to:
        return f"not evidence: blind to {', '.join(answer.blind_to)}"
    return EVIDENCE


def _halves(
    patients: NDArray[np.int64], rng: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of patient-disjoint halves, equally many of each, several times at random."""
    names = np.unique(patients)
    halves = []
    for _ in range(NUM_SPLITS):
        in_first = np.isin(patients, rng.permutation(names)[: len(names) // 2])
        one, other = (rng.permutation(np.flatnonzero(side)) for side in (in_first, ~in_first))
        count = min(len(one), len(other))
        halves.append((one[:count], other[:count]))
    return halves


def _read(real: SampleSet, rows: NDArray[np.int64], made_of: tuple[int, ...]) -> _HeldOut:
    parts: dict[str, list[NDArray[Any]]] = {"hu": [], "layout": []}
    for shard in np.unique(rows // real.rows_per_shard):
        start, stop = real.shard_rows(int(shard))
        inside = rows[(rows >= start) & (rows < stop)] - start
        for name, chunks in parts.items():
            chunks.append(real.read(name, start, stop)[inside])
    hu, layout = (np.concatenate(chunks) for chunks in parts.values())
    shown = measurable(hu, real.attrs["intensity"])
    return _HeldOut(shown, layout, boxes_of(real)[rows], made_of)


def _features(half: _HeldOut, kind: str, level: float, config: EvaluationConfig) -> Computed:
    hu = DEGRADE[kind](half, level) if level else half.hu
    return {
        (region, extractor.name): (part.rows, extractor(part.hu))
        for region, part in cut_regions(hu, half.layout, half.box, made_of=half.made_of).items()
        for extractor in load_extractors(config, hu.ndim - 1)
        if len(part.rows)
    }


def _worsened(
    place: Place, found: Mapping[tuple[str, float], Computed]
) -> dict[str, list[NDArray[np.float32]]]:
    """Features at one place by degradation: of the samples as they are, then at each level."""
    plain = found[PLAIN][place][1]
    return {
        kind: [plain, *(found[kind, level][place][1] for level in LEVELS[kind])]
        for kind in DEGRADE
        if kind != OF_NODULES or place[0].startswith("nodule")
    }


def _answers(
    group: str,
    worsened: Mapping[str, Sequence[NDArray[np.float32]]],
    halves: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> dict[str, Sensitivity]:
    """Means over the halves: one split alone is nearer or further by chance."""
    plain = worsened["blur"][0]
    rows: dict[str, list[list[Sequence[float]]]] = {kind: [] for kind in (*worsened, DROPPING)}
    for one, other in halves:
        reference = plain[one]
        distance = distance_of(group, reference)
        for kind, steps in worsened.items():
            rows[kind].append([distance(reference, features[other]) for features in steps])
        left = [_without_modes(plain[other], share) for share in LEVELS[DROPPING]]
        rows[DROPPING].append([distance(reference, one) for one in (plain[other], *left)])
    means = {kind: np.mean(values, axis=0) for kind, values in rows.items()}  # (steps, metrics)
    answers = {}
    for number, metric in enumerate(GROUPS.get(group, (group,))):
        worse = -1 if metric in OVERLAP else 1
        curves = {kind: tuple(steps[:, number].tolist()) for kind, steps in means.items()}
        blind = [kind for kind, steps in curves.items() if not np.all(worse * np.diff(steps) > 0)]
        answers[metric] = Sensitivity(len(halves[0][0]), curves, tuple(blind))
    return answers


def _blurred(half: _HeldOut, sigma_px: float) -> NDArray[np.int16]:
    blurred = np.empty_like(half.hu)
    for image, to in zip(half.hu, blurred, strict=True):
        to[:] = np.rint(ndimage.gaussian_filter(image.astype(np.float32), sigma_px))
    return blurred


def _noisy(half: _HeldOut, sd_hu: float) -> NDArray[np.int16]:
    rng = np.random.default_rng(seed_of("noise"))
    noisy = np.empty_like(half.hu)
    for image, to in zip(half.hu, noisy, strict=True):
        to[:] = np.rint(image + sd_hu * rng.standard_normal(image.shape))
    return noisy


def _shifted(half: _HeldOut, offset_hu: float) -> NDArray[np.int16]:
    shifted: NDArray[np.int16] = half.hu + np.int16(offset_hu)
    return shifted


def _without_nodules(half: _HeldOut, share: float) -> NDArray[np.int16]:
    """Nodules of some samples covered with pixels drawn from the lung around them."""
    rng = np.random.default_rng(seed_of("removal"))
    hu = half.hu.copy()
    for row in rng.permutation(len(hu))[: round(share * len(hu))]:
        nodule = half.layout[row] == Label.NODULE
        near = ndimage.binary_dilation(nodule, iterations=RING_PX)
        lung = half.hu[row][near & np.isin(half.layout[row], LUNG_LABELS)]
        if nodule.any() and len(lung):
            hu[row][nodule] = rng.choice(lung, int(nodule.sum()))
    return hu


def _without_modes(features: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    centred = features.astype(np.float64) - features.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    kept = np.argsort(centred @ axes[0])[: max(1, round((1 - share) * len(features)))]
    return features[np.resize(kept, len(features))]


DEGRADE: dict[str, Callable[[_HeldOut, float], NDArray[np.int16]]] = {
    "blur": _blurred,
    "noise": _noisy,
    "shift": _shifted,
    "removal": _without_nodules,
}
