"""A guidance-scale sweep as the report shows it, from the figures in the evaluation's JSON."""

from __future__ import annotations

from typing import Any

from raysynth.report.charts import SweepPanel
from raysynth.report.html import SweepSection

TITLES = {
    "fid": "FID, lower is better",
    "kid": "KID, lower is better",
    "ms_ssim": "MS-SSIM, best like patients",
    "lpips": "LPIPS, best like patients",
    "kappa": "kappa of scores, higher is better",
    "found": "nodules found, higher is better",
}
"""Of every figure of `raysynth.evaluation.sweep.ASPECTS`, in its order."""

HEADINGS = {
    "fid": "FID",
    "kid": "KID",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS",
    "kappa": "kappa",
    "found": "nodules found",
}


def sweep_section(found: dict[str, Any], drawn_at: float) -> SweepSection | None:
    """Panels, table and sentences; None where nothing was swept.

    Args:
        found: the evaluation.
        drawn_at: guidance scale of the run itself.
    """
    sweep = found["sweep"]
    if sweep is None:
        return None
    scales, patients = sweep["scales"], sweep["patients"]
    names = [name for name in TITLES if all(name in one["figures"] for one in scales)]
    panels = [
        SweepPanel(
            TITLES[name],
            [one["scale"] for one in scales],
            [_entry(one["figures"][name]) for one in scales],
            _entry(patients[name]) if name in patients else None,
        )
        for name in names
    ]
    aspects = list(scales[0]["ranks"])
    heading = ["guidance scale", *(HEADINGS[name] for name in names)]
    heading += [f"rank, {aspect}" for aspect in aspects]
    rows = [
        [
            f"{one['scale']:g}" + (" (chosen)" if one["scale"] == sweep["chosen"] else ""),
            *(_cell(one["figures"][name]) for name in names),
            *(f"{one['ranks'][aspect]:g}" for aspect in aspects),
            "-" if one["mean_rank"] is None else f"{one['mean_rank']:.2f}",
        ]
        for one in scales
    ]
    of_patients = [_cell(patients[name]) if name in patients else "-" for name in names]
    rows.append(["patients", *of_patients, *["-"] * (len(aspects) + 1)])
    keys = ", ".join(sweep["keys"].values())
    return SweepSection(
        panels, [[*heading, "mean rank"], *rows], sweep["chosen"], _sentences(sweep, drawn_at), keys
    )


def _sentences(sweep: dict[str, Any], drawn_at: float) -> list[str]:
    """What the rule says, how sure it is, and by whom it was made."""
    scales, chosen = sweep["scales"], sweep["chosen"]
    if chosen is None:
        return ["Too few samples: no scale can be chosen."]
    said = [f"Rule: {sweep['rule']}. It takes {chosen:g}; this run was drawn at {drawn_at:g}."]
    left_out = {"quality", "diversity", "consistency"} - set(scales[0]["ranks"])
    if left_out:
        said.append(f"Not ranked for want of figures: {', '.join(sorted(left_out))}.")
    best = next(one for one in scales if one["scale"] == chosen)
    unsure = [f"{one['scale']:g}" for one in scales if one is not best and _overlaps(one, best)]
    if unsure:
        said.append(
            f"Ranks take the values as they are; every interval of {', '.join(unsure)} overlaps "
            "that of the chosen scale, so there the choice is not certain."
        )
    if sweep["reference"] == "test":
        said.append(
            "There were too few validation patients: the scale was chosen by the test patients, "
            "so their figures of it are optimistic."
        )
    return said


def _overlaps(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether no figure tells two scales apart."""
    for name in one["figures"].keys() & other["figures"].keys():
        mine, its = (scale["figures"][name]["interval"] for scale in (one, other))
        if mine and its and (mine[1] < its[0] or its[1] < mine[0]):
            return False
    return True


def _entry(figure: dict[str, Any]) -> tuple[float, tuple[float, float] | None]:
    interval = figure["interval"]
    return figure["value"], interval and (interval[0], interval[1])


def _cell(figure: dict[str, Any]) -> str:
    value, interval = _entry(figure)
    if interval is None:
        return f"{value:.3g} (no interval)"
    return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"
