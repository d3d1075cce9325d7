"""What is still wrong, in sentences that follow from the figures themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raysynth.case import LUNG_LABELS, Intensity
from raysynth.report.html import Losses, Tile
from raysynth.store.reader import SampleSet
from raysynth.volume import RELATIVE_RANGE

MAX_PIXELS = 2**24
"""That fine texture is told from."""


def limits(
    found: dict[str, Any],
    detail: tuple[float, float | None],
    frames: Sequence[Tile],
    losses: Losses,
    intensity: Intensity = "hu",
    space: str = "slice",
) -> dict[str, str]:
    """For each picture a sentence on what is still wrong, from the figures themselves."""

    def amount(difference: float) -> str:
        if intensity == "hu":
            return f"{difference:.0f} HU"
        low, high = RELATIVE_RANGE
        return f"{difference / (high - low):.1%} of the grey range"

    texts = {}
    share, sizes = found["adherence"]["synthetic"]["found"], found["sizes"]["synthetic"]
    real, synthetic = detail
    gallery = []
    if synthetic is not None:
        gallery.append(
            f"neighbouring lung pixels of synthetic {space}s differ by {amount(synthetic)} on "
            f"average, of training {space}s by {amount(real)}: "
            f"{'fine texture is missing' if synthetic < real else 'there is no less of it'}."
        )
    if share is not None:
        gallery.append(
            f"In {1 - share:.0%} of the synthetic {space}s nothing was found where a nodule was "
            "asked for."
        )
    texts["gallery"] = " ".join(gallery)
    if sizes["n"]:
        texts["adherence"] = (
            f"where a nodule was found, its diameter is off by "
            f"{sizes['median_absolute_error_mm']:.1f} mm in the median."
        )
    scores = found["consistency"].get("synthetic", {})
    unseen = [name for name, one in scores.items() if one["interval"][0] <= 0]
    texts["consistency"] = (
        f"not to be told from chance: {', '.join(unseen)}."
        if unseen
        else "every score can be seen to some extent."
    )
    if len(frames) > 1:
        moved = np.abs(frames[-1].hu.astype(np.float64) - frames[-2].hu).mean()
        texts["denoising"] = (
            f"between the last two pictures pixels still move by {amount(moved)} on average."
        )
    known = [one for one in found["metrics"].values() if "floor" in one["disjoint"]]
    above = [
        one
        for one in known
        if one["disjoint"]["floor"] and one["value"] > one["columns"]["floor"]["value"]
    ]
    texts["metrics"] = (
        f"{len(above)} of {len(known)} distances lie above their floor with disjoint intervals."
        if known
        else "with so few patients no floor has an interval, so nothing is known to reach it."
    )
    changes = []
    for name, (_, loss) in losses.items():
        tenth = len(loss) // 10
        if tenth:
            before, after = loss[-2 * tenth : -tenth].mean(), loss[-tenth:].mean()
            changes.append(f"{after / before - 1:+.0%} ({name})")
    if changes:
        changed = ", ".join(changes)
        texts["losses"] = f"over the last tenth of training the loss changed by {changed}."
    return texts


def detail(samples: SampleSet) -> float | None:
    """Mean difference of neighbouring lung pixels of a set's first samples, HU; None: no layout."""
    few = max(1, MAX_PIXELS // int(np.prod(samples.shape)))
    stop = min(samples.count, samples.rows_per_shard, few)
    hu = samples.read("hu", 0, stop).astype(np.float64)
    lung = np.isin(samples.read("layout", 0, stop), LUNG_LABELS)
    both = lung[..., 1:] & lung[..., :-1]
    return float(np.abs(np.diff(hu, axis=-1))[both].mean()) if both.any() else None
