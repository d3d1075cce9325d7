"""What an audit found, in words and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig, FromFolder
from raysynth.evaluation.audit_pictures import (
    NUM_PLANES,
    REGIONS,
    Look,
    cut_real,
    cut_synthetic,
    looks_of,
)
from raysynth.evaluation.audit_region import RegionAudit
from raysynth.layout.morphology import Mask
from raysynth.metrics.memorization import aligned, nearest
from raysynth.report.html import AuditPage, Tile, write_audit
from raysynth.store.reader import SampleSet

FEW_PATIENTS = 20
"""With fewer held-out patients the rate of false alarms is no more than a hint: samples of one
patient resemble each other."""

NUM_PAIRS = 12

PICTURES = {
    "nodule": "nodule crops",
    "slice": "whole samples",
    "generated": "parts made anew",
}


def written(name: str, region: RegionAudit) -> str:
    """One region in a sentence."""
    low, high = region.interval
    return (
        f"{region.flagged} of {region.samples} {PICTURES[name]} ({region.copy_rate:.2%}, 95 % "
        f"interval {low:.2%} to {high:.2%}) are nearer to a training sample than "
        f"{region.threshold.count - region.threshold.alarms + 1} of {region.threshold.count} "
        f"held-out ones are, of {region.held_out_patients} patients; of honest samples "
        f"{region.threshold.expected:.2%} would be, {region.threshold.at_most:.2%} at most"
    )


def notices_of(
    config: ExperimentConfig,
    synthetic: SampleSet,
    regions: Mapping[str, RegionAudit],
    nearest_to_lender: NDArray[np.bool_],
) -> list[str]:
    """What a reader must know beside the figures."""
    notices = []
    if config.copies:
        hosts = len(np.unique(synthetic.index["source_case"]))
        notices.append(
            "The reference leaks by design: what was not made anew in a sample is a real patient's "
            f"({hosts} cases). Only what was made was compared; handle the samples as these "
            "patients' own."
        )
    elif (synthetic.index["source_case"] >= 0).any():
        lenders = np.unique(synthetic.index["source_case"])
        notices.append(
            f"Outlines of lungs and body were lent by {int((lenders >= 0).sum())} real cases: a "
            "likeness in them is asked for, not memorized."
            + (
                f" {int(nearest_to_lender.sum())} flagged samples are nearest to the case that "
                "lent their outlines."
                if nearest_to_lender.any()
                else ""
            )
        )
    if len(synthetic.shape) == 3:
        notices.append(
            f"Of every volume the mean of {NUM_PLANES} axial planes was compared, through its "
            "nodule or its middle: of a volume that was copied elsewhere alone nothing is said."
        )
    if isinstance(config.model, FromFolder):
        notices.append(
            "The weights were pretrained by others, on images that nobody here can compare with."
        )
    for name, region in regions.items():
        if region.held_out_patients < FEW_PATIENTS:
            notices.append(
                f"{PICTURES[name].capitalize()}: {region.held_out_patients} held-out patients are "
                "few. Samples of one patient resemble each other, so the rate of false alarms is "
                "no more than a hint."
            )
        if region.duplicates:
            notices.append(
                f"{region.duplicates} held-out {PICTURES[name]} are copies of training ones: the "
                "split leaks. They set no threshold."
            )
    return notices


def write_audit_page(
    config: ExperimentConfig,
    sets: Mapping[str, SampleSet],
    table: SampleSet,
    hole: Mask | None,
    path: Path,
) -> None:
    """The page of the closest pairs. It shows real patients, so it stays in the work folder."""
    findings, verdict = table.attrs["findings"], table.attrs["verdict"]
    looks = {look.region: look for look in looks_of(config, sets["synthetic"])}
    order = np.argsort(-table.index["copy_score"], kind="stable")[:NUM_PAIRS]
    tiles: list[Tile] = []
    for row in order.tolist():
        look = looks[REGIONS[int(table.index["region"][row])]]
        tiles += _pair(sets, table, look, row, hole)
    write_audit(
        AuditPage(
            title=f"Privacy audit of {config.name}",
            verdict=verdict,
            reasons=findings["reasons"],
            notices=findings["notices"],
            tables={PICTURES[name]: _figures(found) for name, found in findings["regions"].items()},
            pairs=tiles,
        ),
        path,
    )


def _pair(
    sets: Mapping[str, SampleSet], table: SampleSet, look: Look, row: int, hole: Mask | None
) -> list[Tile]:
    """A sample, its nearest training sample turned to match it, and their difference."""
    other = int(table.index["nearest_sample"][row])
    made = None if hole is None else hole[row : row + 1]
    query = cut_synthetic(sets["synthetic"], row, row + 1, look, made).pictures
    others = cut_real(sets["real"], other, other + 1, look, np.ones(1, bool), flipped=False)
    closest = int(nearest(query, others.pictures).row[0, 2])
    real = aligned(query, others.pictures.take(np.array([closest])))
    drawn = query.images[0]
    if query.mask is not None:
        drawn, real = (np.where(query.mask[0], image, 0) for image in (drawn, real))
    score, ncc = (float(table.index[name][row]) for name in ("copy_score", "ncc"))
    flagged = ", flagged" if table.index["flagged"][row] else ""
    captions = (
        f"sample {row}: score {score:.2f}{flagged}",
        f"training sample {other}: correlation {ncc:.3f}",
        "difference",
    )
    images = (drawn, real, 0.5 + (drawn - real) / 2)
    low, high = look.window_hu
    return [
        Tile(np.rint(low + image * (high - low)).astype(np.int16), caption=caption)
        for image, caption in zip(images, captions, strict=True)
    ]


def _figures(region: Mapping[str, Any]) -> list[list[str]]:
    """Heading and rows."""
    rows = [
        ["figure", "value", "95 % interval", "without a leak"],
        [
            "flagged samples",
            f"{region['copy_rate']:.2%}",
            _percent(region["interval"]),
            f"{region['threshold']['expected']:.2%}",
        ],
        ["the same picture as a training sample", f"{region['exact']}", "", "0"],
        [
            "correlation above .95 with a training sample",
            f"{region['likely_ncc'] / region['samples']:.2%}",
            "",
            f"{region['likely_ncc_held_out']:.2%}",
        ],
        [
            "training samples (patients), held-out ones",
            f"{region['train']} ({region['train_patients']}), "
            f"{region['held_out']} ({region['held_out_patients']})",
            "",
            "",
        ],
    ]
    rows += [
        [f"{criterion}: nearer than 99 % of held-out samples", f"{share:.2%}", "", "1 %"]
        for criterion, share in region["below_first_percentile"].items()
    ]
    for embedding, leak in region["leaks"].items():
        for field, words, chance in (
            ("nearer_share", "nearer to training than to as many held-out samples", "50 %"),
            ("ratio_median", "distance to training by distance to held-out, median", "1"),
            ("ratio_low", "the same, 5th percentile", ""),
            ("auc", "AUC of telling training samples by their distance to the run", ".5"),
        ):
            figure = leak[field]
            low, high = figure["interval"]
            rows.append(
                [
                    f"{embedding}: {words}",
                    f"{figure['value']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    chance,
                ]
            )
    return rows


def _percent(interval: tuple[float, float]) -> str:
    return "{:.2%} to {:.2%}".format(*interval)
