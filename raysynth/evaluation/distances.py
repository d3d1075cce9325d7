"""Every distance of a synthetic run: which samples are compared with which, and where."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig, HoleFilling, LayoutGuided
from raysynth.evaluation.fills import with_generated
from raysynth.evaluation.intervals import Arm
from raysynth.evaluation.judge import DISTANCES, PASTED, Arms, MetricResult, judge
from raysynth.evaluation.measure import Computed, Place
from raysynth.evaluation.references import neighbour_pairs, next_to
from raysynth.evaluation.sets import space_of
from raysynth.store.reader import SampleSet


def judge_places(
    computed: Mapping[str, Computed],
    sets: Mapping[str, SampleSet],
    patients: Mapping[str, NDArray[np.int64]],
    is_reference: NDArray[np.bool_],
    config: ExperimentConfig,
) -> dict[str, MetricResult]:
    """All metrics of a run, one Ray task a region and extractor.

    Args:
        computed: features of `real`, `synthetic` and what stands beside it, by set.
        sets: those of them that are in the store.
        patients: number of each sample's patient, by set.
        is_reference: real samples that others are judged by.
        config: the recipe.

    Returns:
        By key `metric/space/region/extractor@version/N`.
    """
    import ray

    fills = isinstance(config.model, HoleFilling)
    shown = dict(computed)
    if isinstance(config.model, HoleFilling | LayoutGuided):
        made_by_nobody = shown.keys() & {"real", PASTED}
        shown |= {name: with_generated(shown[name]) for name in made_by_nobody}
    if not fills and _are_mixed(sets["synthetic"]):
        boxed = {name: samples.index["box"][:, 0] >= 0 for name, samples in sets.items()}
        boxed[PASTED] = np.ones(len(patients.get(PASTED, ())), bool)
        shown = {name: found | _by_nodule(found, boxed[name]) for name, found in shown.items()}

    def arm(name: str, place: Place) -> Arm:
        rows, features = shown[name][place]
        return Arm(features, patients[name][rows])

    task = ray.remote(num_cpus=1)(judge)
    space = space_of(sets["real"])
    futures = []
    for place, (rows, _) in shown["real"].items():
        judged = {
            name: arm(name, place) for name in shown if name != "real" and place in shown[name]
        }
        if "synthetic" not in judged:
            continue
        real, neighbours = arm("real", place), None
        if fills:
            # The reference leaves these out, so they compare with it as everything else does.
            judged["neighbour"] = real.take(next_to(rows, sets["real"], is_reference))
        elif space == "slice":
            first, after = neighbour_pairs(rows, sets["real"], is_reference)
            neighbours = real.take(first), real.take(after)
        arms = Arms(real, real.take(is_reference[rows]), judged, neighbours)
        draws, seed = config.evaluation.num_bootstrap, config.seed
        asked = place, arms, draws, seed, DISTANCES, space
        futures.append(task.remote(*asked))  # type: ignore[call-arg]  # Ray forgets the defaults
    results: dict[str, MetricResult] = {}
    for future in futures:
        results.update(**ray.get(future))
    return results


def _are_mixed(samples: SampleSet) -> bool:
    """Whether some samples were asked for without a nodule; of whole volumes none is aimed at."""
    free = samples.index["box"][:, 0] < 0
    return bool(free.any() and not (free.all() and space_of(samples) == "volume"))


def _by_nodule(computed: Computed, boxed: NDArray[np.bool_]) -> Computed:
    """Whole slices once more: those with a nodule (or asked for one), and the others."""
    return {
        (f"all_{kind}", extractor): (rows[mask[rows]], features[mask[rows]])
        for (region, extractor), (rows, features) in computed.items()
        for kind, mask in (("nodule", boxed), ("free", ~boxed))
        if region == "all" and mask.any()
    }
