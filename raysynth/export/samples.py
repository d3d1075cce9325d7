"""Writes a synthetic run for other tools: the gate, then file by file, each with its passport.

Nothing is written without a passing audit of exactly this run, or a reason that is recorded in
every passport. Samples that count as copies stay behind either way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth import __version__
from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.export.card import data_card
from raysynth.export.gate import open_gate
from raysynth.export.passport import Passport, sealed, voxel_hash
from raysynth.export.writing import ExportedSample, Format, RunFacts, write_file, write_json
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

logger = logging.getLogger(__name__)

MANIFEST, CARD = "export.json", "README.md"

REQUEST = ("box", "has_nodule", "batch_shape", "accepted", "found", "draws")
SCORES = ("embedding_distance", "pixel_distance", "ncc", "copy_score")
"""Columns that go into a passport; those that point at real samples stay in the store."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote; also in `export.json` in its folder.

    Attributes:
        run: the synthetic run.
        format: of the files.
        folder: where they are.
        written: samples.
        withheld: samples that count as copies.
        audit: its verdict, or `none`.
        without_audit: the reason that was given for going without one, if any.
    """

    run: str
    format: str
    folder: str
    written: int
    withheld: int
    audit: str
    without_audit: str | None


def export_samples(
    config: ExperimentConfig,
    folder: Path,
    format_name: str,
    open_format: Format,
    without_audit: str | None = None,
) -> ExportSummary:
    """Writes the recipe's run; the same command again writes the same files.

    Args:
        config: the recipe.
        folder: a new one, or that of an earlier export of this run in this format.
        format_name: of the format.
        open_format: writes it.
        without_audit: why the run may leave without a passing audit.

    Raises:
        Refused: no passing audit of this run under the recipe's policy, and no reason.
        InputError: no such run, an empty reason, a folder with something else in it or that cannot
            be written, or a run that this format cannot hold.
    """
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, f"synthetic/{config.name}"))
    if "passport" not in samples.attrs:
        raise InputError(f"synthetic/{config.name} has no passport: draw it with raysynth")
    table, reason = open_gate(config, root, samples, without_audit)
    flagged = np.zeros(samples.count, bool) if table is None else table.index["flagged"] == 1
    summary = ExportSummary(
        run=config.name,
        format=format_name,
        folder=str(folder),
        written=int((~flagged).sum()),
        withheld=int(flagged.sum()),
        audit="none" if table is None else str(table.attrs["verdict"]),
        without_audit=reason,
    )
    facts = RunFacts(
        run=config.name,
        count=summary.written,
        shape=samples.shape,
        spacing_mm=(_spacing_mm(root, samples), samples.pixel_mm),
        intensity=str(samples.attrs["intensity"]),
        passport=samples.attrs["passport"] | {"snapshot": samples.attrs["parent_snapshot"]},
    )
    opened = open_format(folder, facts)  # it may refuse, and then nothing is there yet
    try:
        _claim(folder, summary)
        with opened as write:
            for sample in _leaving(samples, table, ~flagged, summary):
                write(sample)
        card = data_card(facts.passport, asdict(summary), config)
        write_file(folder / CARD, card.encode())
        _write_manifest(folder, summary, complete=True)
    except OSError as error:
        raise InputError(
            f"--to {folder}: {error.strerror or error}: give another folder"
        ) from error
    logger.info("wrote %d samples to %s", summary.written, folder)
    return summary


def _leaving(
    samples: SampleSet,
    table: SampleSet | None,
    leaves: NDArray[np.bool_],
    summary: ExportSummary,
) -> Iterator[ExportedSample]:
    """The samples that leave, a shard in memory at a time."""
    number = 0
    for start, stop in map(samples.shard_rows, range(samples.num_shards)):
        if not leaves[start:stop].any():
            continue
        hu, layout = (samples.read(name, start, stop) for name in ("hu", "layout"))
        for row in map(int, np.flatnonzero(leaves[start:stop]) + start):
            labels = layout[row - start]
            yield ExportedSample(
                name=f"{summary.run}-{row:08d}",
                number=number,
                hu=hu[row - start],
                layout=labels,
                is_mixed=bool(samples.index["copied_fraction"][row] > 0),
                passport=_passport(samples, table, row, summary, labels),
            )
            number += 1


def _spacing_mm(root: zarr.Group, samples: SampleSet) -> float:
    """Between planes."""
    source = open_group(root, f"samples/{samples.attrs['source_set']}")
    try:
        return float(source.attrs["spacing_mm"])  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"samples/{samples.attrs['source_set']} has no one spacing: shard it with spacing_mm"
        ) from error


def _claim(folder: Path, summary: ExportSummary) -> None:
    """Files of anything else are never mixed with those of a run."""
    manifest = folder / MANIFEST
    try:
        known = json.loads(manifest.read_text()) if manifest.exists() else {}
        is_same = (known.get("run"), known.get("format")) == (summary.run, summary.format)
        taken = folder.exists() and any(folder.iterdir()) and not is_same
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--to {folder}: it cannot be read; give a new folder") from error
    if taken:
        raise InputError(f"--to {folder}: other files are there already; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, summary, complete=False)


def _write_manifest(folder: Path, summary: ExportSummary, *, complete: bool) -> None:
    told = asdict(summary) | {"complete": complete}
    del told["folder"]  # a copy of the folder is as good
    write_json(folder / MANIFEST, sealed(told, "set"))


def _passport(
    samples: SampleSet,
    table: SampleSet | None,
    row: int,
    summary: ExportSummary,
    layout: NDArray[np.uint8],
) -> Passport:
    """All that may be told of a sample."""
    index = samples.index
    prompt = bytes(index["prompt"][row]).rstrip(b"\0").decode()
    scores = index["attributes"][row].tolist()
    audit: dict[str, Any] = {"verdict": summary.audit, "without_audit": summary.without_audit}
    if table is not None:
        audit |= {name: _number(table.index[name][row]) for name in SCORES}
        audit |= {"policy": table.attrs["policy"], "notices": table.attrs["findings"]["notices"]}
    return {
        "synthetic": True,
        "contains_real_pixels": bool(index["copied_fraction"][row] > 0),
        "copied_fraction": float(index["copied_fraction"][row]),
        "exported_by": f"raysynth {__version__}",
        "bundle": samples.attrs["bundle"],
        "plan": samples.attrs["plan"],
        "snapshot": samples.attrs["parent_snapshot"],
        "run": summary.run,
        "row": row,
        "seed": int(index["seed"][row]),
        "intensity": samples.attrs["intensity"],
        "pixel_mm": samples.pixel_mm,
        "layout": voxel_hash(layout),
        "request": {
            **{name: index[name][row].tolist() for name in REQUEST},
            "attributes": dict(zip(CONDITION_ATTRIBUTES, scores, strict=True)),
            "prompt": prompt or None,
        },
        "audit": audit,
        "passport": samples.attrs["passport"],
    }


def _number(value: np.floating) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
