"""The card of an exported data set: what it is, how it was made, what it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raysynth.config import ExperimentConfig
from raysynth.export.passport import Passport

SHOWN = ("fid/", "kid/", "mmd/")
"""Beginnings of the metrics that a card tells."""

MOST_SHOWN = 8


def data_card(passport: Passport, summary: dict[str, Any], config: ExperimentConfig) -> str:
    """The card, in Markdown.

    Args:
        passport: of the run.
        summary: of the export.
        config: the recipe.
    """
    audit = (
        f"left without one: {summary['without_audit']}"
        if summary["without_audit"]
        else f"{summary['audit']}; {summary['withheld']} samples that count as copies stayed behind"
    )
    lines = [
        f"# Synthetic lung CT: {summary['run']}",
        "",
        "**These images are synthetic. They show no patient, and are for research only: not for",
        "diagnosis, not for treatment.** Keep this file and the passports with them.",
        "",
        f"- Samples: {summary['written']:,}, as {summary['format']}",
        f"- Made by: {passport.get('software', 'raysynth')}, recipe {passport.get('recipe')}, "
        f"seed {passport.get('seed')}",
        f"- Bundle (SHA-256): {passport.get('bundle')}",
        f"- Data snapshot that requests and layouts come from: {passport.get('snapshot')}",
        f"- Source of its recipe's scans: {config.data.source.kind}. Licences and attributions "
        "bind whoever passes this on",
        f"- Privacy audit: {audit}",
        "",
        "`raysynth verify` on this folder tells whether any file was altered since it was written.",
        "",
        "## Evaluation",
        "",
        *_metrics(config.work_dir / "evaluation" / f"{config.name}.json"),
    ]
    return "\n".join(lines) + "\n"


def _metrics(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        return ["It was not evaluated: nobody knows how good it is."]
    rows = [
        f"| {key} | {one['value']:.4g} | {_told(one.get('floor'))} |"
        for key, one in found.items()
        if key.startswith(SHOWN)
    ][:MOST_SHOWN]
    return [
        "Distances to real test patients, beside the floor that two halves of these reach:",
        "",
        "| metric/space/region/extractor/N | value | floor |",
        "|---|---|---|",
        *rows,
    ]


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
