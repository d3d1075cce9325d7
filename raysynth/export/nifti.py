"""Writes a synthetic run as NIfTI: each sample's image, label map and passport.

The gate: nothing is written without a passing audit of exactly this run, or a reason that is
recorded in every passport. Samples that count as copies stay behind either way.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from raysynth import __version__
from raysynth.case import CONDITION_ATTRIBUTES
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.export.gate import open_gate
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

logger = logging.getLogger(__name__)

MANIFEST = "export.json"

DESCRIPTION = b"synthetic (raysynth), no patient; research only"
WITH_REAL_PIXELS = b"synthetic in part (raysynth), rest a real scan; research only"
"""The header's descrip; at most 79 bytes."""

REQUEST = ("box", "has_nodule", "batch_shape", "copied_fraction", "accepted", "found", "draws")
SCORES = ("embedding_distance", "pixel_distance", "ncc", "copy_score")
"""Columns that go into a passport; those that point at real samples stay in the store."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote; also `export.json` in its folder.

    Attributes:
        run: the synthetic run.
        folder: where the files are.
        written: samples.
        withheld: samples that count as copies.
        audit: its verdict, or `none`.
        without_audit: the reason that was given for going without one, if any.
    """

    run: str
    folder: str
    written: int
    withheld: int
    audit: str
    without_audit: str | None


def export_nifti(
    config: ExperimentConfig, folder: Path, without_audit: str | None = None
) -> ExportSummary:
    """Writes the recipe's run; the same command again writes the same files.

    Args:
        config: the recipe.
        folder: a new one, or that of an earlier export of this run.
        without_audit: why the run may leave without a passing audit.

    Raises:
        Refused: no passing audit of this run under the recipe's policy, and no reason.
        InputError: no such run, an empty reason, or a folder with something else in it.
    """
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, f"synthetic/{config.name}"))
    table, reason = open_gate(config, root, samples, without_audit)
    source = open_group(root, f"samples/{samples.attrs['source_set']}")
    flagged = np.zeros(samples.count, bool) if table is None else table.index["flagged"] == 1
    summary = ExportSummary(
        run=config.name,
        folder=str(folder),
        written=int((~flagged).sum()),
        withheld=int(flagged.sum()),
        audit="none" if table is None else str(table.attrs["verdict"]),
        without_audit=reason,
    )
    _claim(folder, config.name)
    _write_json(folder / MANIFEST, asdict(summary) | {"complete": False})
    spacing_mm = (float(source.attrs["spacing_mm"]), samples.pixel_mm)  # type: ignore[arg-type]
    for start, stop in map(samples.shard_rows, range(samples.num_shards)):
        hu, layout = (samples.read(name, start, stop) for name in ("hu", "layout"))
        for row in np.flatnonzero(~flagged[start:stop]) + start:
            stem = folder / f"{config.name}-{row:08d}"
            is_mixed = bool(samples.index["copied_fraction"][row] > 0)
            _write_image(Path(f"{stem}.nii.gz"), hu[row - start], spacing_mm, is_mixed)
            _write_image(Path(f"{stem}_labels.nii.gz"), layout[row - start], spacing_mm, is_mixed)
            _write_json(Path(f"{stem}.json"), _passport(samples, table, int(row), summary))
    _write_json(folder / MANIFEST, asdict(summary) | {"complete": True})
    logger.info("wrote %d samples to %s", summary.written, folder)
    return summary


def _claim(folder: Path, run: str) -> None:
    """Files of anything else are never mixed with those of a run."""
    manifest = folder / MANIFEST
    try:
        known = json.loads(manifest.read_text())["run"] if manifest.exists() else None
        taken = folder.exists() and any(folder.iterdir()) and known != run
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--to {folder}: it cannot be read; give a new folder") from error
    if taken:
        raise InputError(f"--to {folder}: other files are there already; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)


def nifti_image(
    pixels: NDArray[Any], spacing_mm: tuple[float, float], is_mixed: bool
) -> nibabel.Nifti1Image:
    """A sample as NIfTI, marked as synthetic.

    A volume, or a plane as one, in LPS as samples are; NIfTI counts x and y the other way.

    Args:
        pixels: (z, y, x) or (y, x).
        spacing_mm: between planes, and of a pixel.
        is_mixed: whether some are copied from a real scan.
    """
    depth_mm, pixel_mm = spacing_mm
    affine = np.diag([-pixel_mm, -pixel_mm, depth_mm, 1.0])
    volume = pixels if pixels.ndim == 3 else pixels[None]
    image = nibabel.Nifti1Image(volume.T, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    image.header["descrip"] = WITH_REAL_PIXELS if is_mixed else DESCRIPTION
    return image


def _write_image(
    path: Path, pixels: NDArray[Any], spacing_mm: tuple[float, float], is_mixed: bool
) -> None:
    image = nifti_image(pixels, spacing_mm, is_mixed)
    part = path.with_name(f".{path.name}")  # its ending says that it is to be packed
    nibabel.save(image, part)
    os.replace(part, path)


def _passport(
    samples: SampleSet, table: SampleSet | None, row: int, summary: ExportSummary
) -> dict[str, Any]:
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
        "exported_by": f"raysynth {__version__}",
        "run": summary.run,
        "row": row,
        "seed": int(index["seed"][row]),
        "intensity": samples.attrs["intensity"],
        "pixel_mm": samples.pixel_mm,
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


def _write_json(path: Path, values: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
