"""What a reader must know beside the figures of an evaluation."""

from __future__ import annotations

import numpy as np
import zarr

from raysynth.evaluation.judge import MetricResult
from raysynth.evaluation.regions import GENERATED, is_generated
from raysynth.evaluation.sets import space_of
from raysynth.sampling.adherence import MAX_LUNG_HU, MIN_CONTRAST_HU
from raysynth.store.reader import SampleSet, case_attrs
from raysynth.store.splits import is_indicative
from raysynth.window import LUNG_WINDOW_HU

MAX_SHARE_GAP = 0.02
"""By which shares of samples without nodule may differ and still be called the same."""


def notices_of(
    root: zarr.Group,
    sets: dict[str, SampleSet],
    patients: dict[str, int],
    metrics: dict[str, MetricResult],
) -> list[str]:
    """Sentences on few patients, phantoms, copied pixels, and unequal or selected samples.

    Args:
        root: of the store.
        sets: what was judged.
        patients: real ones in all, and in the reference.
        metrics: what came out.
    """
    real, synthetic = sets["real"], sets["synthetic"]
    samples = f"{space_of(real)}s"
    notices = kind_notices(root, real)
    if is_indicative(patients["real"]):
        notices.append(f"indicative only: {patients['real']} patients")
    if patients["real"] < 2:
        notices.append("one patient: there is no patient-disjoint floor")
    few = {
        key.split("/")[2]: result.reference_patients
        for key, result in metrics.items()
        if result.resampled == "samples"
    }
    if few:
        counts = ", ".join(f"{place} {count}" for place, count in sorted(few.items()))
        notices.append(
            f"few patients in the reference ({counts}): intervals draw samples instead of patients "
            "there and are too narrow"
        )
    empty, asked_empty = (
        float(np.mean(samples.index["box"][:, 0] < 0)) for samples in (real, synthetic)
    )
    if abs(empty - asked_empty) > MAX_SHARE_GAP:
        notices.append(
            f"{empty:.0%} of the {samples} of patients show no nodule, of the synthetic ones "
            f"{asked_empty:.0%} were asked for without: distances of whole {samples} and lungs "
            "stay above their floor for that"
        )
    places = {key.split("/")[2] for key in metrics}
    copied = float(synthetic.index["copied_fraction"].mean()) if GENERATED in places else 0.0
    if copied:
        notices.append(
            f"{copied:.0%} of every synthetic {space_of(real)} are its host's own pixels, on "
            "average: figures of `all` are mostly theirs. Read those of "
            + " and ".join(sorted(place for place in places if is_generated(place)))
        )
    if (synthetic.index["draws"] > 1).any():
        most = synthetic.attrs["passport"]["sampling"]["max_draws"]
        notices.append(
            f"{samples} without the nodule asked for were drawn again, up to {most} times: shares "
            "found, and distances, are those of a selection (controls were drawn once)"
        )
    if any(result.n <= result.dim for key, result in metrics.items() if key.startswith("fid/")):
        notices.append("FID has no more samples than dimensions somewhere: prefer KID there")
    if not any(place.startswith("nodule") for place in places):
        notices.append("too few nodules to judge them apart")
    return notices


def kind_notices(root: zarr.Group, real: SampleSet) -> list[str]:
    """Sentences on phantoms, and on grey values without a unit."""
    notices = []
    kinds = {case_attrs(root, case).source.get("kind") for case in real.attrs["cases"]}
    if kinds == {"phantom"}:
        notices.append("all patients are phantoms: these figures are a smoke test, not evidence")
    elif "phantom" in kinds:
        notices.append("some patients are phantoms, the others real: use a store for each")
    if real.attrs["intensity"] != "hu":
        low, high = LUNG_WINDOW_HU
        notices.append(
            "grey values without a unit: nothing here is in HU. Distances (their keys say "
            "`relative`) are of the whole grey range; a nodule counts as found where it stands out "
            f"by {MIN_CONTRAST_HU / (high - low):.0%} of that range from lung in its lower "
            f"{(MAX_LUNG_HU - low) / (high - low):.0%}"
        )
    return notices
