"""Writes a bundle for others: half precision, with the figures and the audit of its run.

The gate is that of samples: no bundle leaves without a passing audit of the recipe's run, or a
reason that its card tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.export.gate import open_gate
from raysynth.export.passport import sealed
from raysynth.export.writing import write_json
from raysynth.models.bundle import Bundle, load_bundle, save_bundle
from raysynth.models.facts import BundleFacts
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root

PASSPORT, FILES = "passport.json", "files"
"""Of a model's folder; what in it lists the others."""

RELEASED = ("fid/", "kid/")
"""Beginnings of the metrics that a card tells; the evaluation has all."""


@dataclass(frozen=True)
class BundleRelease:
    """What was written.

    Attributes:
        folder: of the bundle.
        digest: of it; half precision makes it another than that of the trained one.
        megabytes: of its files.
        audit: what its card says of the privacy audit.
        metrics: on its card.
    """

    folder: str
    digest: str
    megabytes: float
    audit: str
    metrics: dict[str, float]


def export_bundle(
    config: ExperimentConfig, folder: Path, without_audit: str | None = None
) -> BundleRelease:
    """Writes the bundle that drew the recipe's run, which has been evaluated and audited.

    Args:
        config: the recipe.
        folder: a new one; its name becomes the card's title.
        without_audit: why it may leave without a passing audit.

    Raises:
        Refused: no passing audit of the run, and no reason.
        InputError: no run or no bundle, no evaluation, or a folder that is there already.
    """
    bundle, audit, metrics = released(config, folder, without_audit)
    facts = bundle.facts.model_copy(update={"metrics": metrics, "audit": audit})
    digest = save_bundle(
        folder,
        facts,
        autoencoder=_halved(bundle.autoencoder),
        denoiser=_halved(bundle.denoiser),
        generator=_halved(bundle.generator),
        tokenizer=bundle.tokenizer,
    )
    write_model_passport(folder, config, facts, digest)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return BundleRelease(str(folder), digest, size / 1e6, audit, metrics)


def released(
    config: ExperimentConfig, folder: Path, without_audit: str | None
) -> tuple[Bundle, str, dict[str, float]]:
    """The bundle that drew the recipe's run, what its card says of the audit, and its metrics.

    Raises:
        Refused: no passing audit of the run, and no reason.
        InputError: no run or no bundle, no evaluation, or a folder that is there already.
    """
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, f"synthetic/{config.name}"))
    table, reason = open_gate(config, root, samples, without_audit)
    if folder.exists():
        raise InputError(f"--to {folder}: it is there already; give a new folder")
    bundle = load_bundle(config.bundle_path)
    if samples.attrs["bundle"] != bundle.digest:
        raise InputError(
            f"synthetic/{config.name} was not drawn by the bundle at {config.bundle_path}: draw "
            "and audit another run"
        )
    audit = f"left without one: {reason}" if reason else _told(config, table)
    return bundle, audit, _metrics(config)


def write_model_passport(
    folder: Path, config: ExperimentConfig, facts: BundleFacts, digest: str
) -> None:
    """Says of a model's folder what it is, and lists its files for `verify`.

    Args:
        folder: with all its files.
        config: the recipe.
        facts: of the model, as its card tells them.
        digest: of its bundle.
    """
    told = {
        "bundle": digest,
        "recipe": config.name,
        "snapshot": facts.snapshot,
        "patients": facts.patients,
        "audit": facts.audit,
        "metrics": facts.metrics,
        "purpose": "research only: what it draws is synthetic",
        FILES: files_in(folder),
    }
    write_json(folder / PASSPORT, sealed(told, "set"))


def files_in(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model's folder but its passport."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / PASSPORT
    }


def _told(config: ExperimentConfig, table: SampleSet | None) -> str:
    assert table is not None
    reasons = "; ".join(table.attrs["findings"]["reasons"])
    return f"passed, on {table.count:,} samples of run {config.name}: {reasons}"


def _metrics(config: ExperimentConfig) -> dict[str, float]:
    """Figures of the run's evaluation: distances beside their controls, and adherence."""
    path = config.work_dir / "evaluation" / f"{config.name}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} is not there: run `raysynth evaluate` first, a card without figures is none"
        ) from error
    told = {
        key: one["value"]
        for key, one in found["metrics"].items()
        if key.startswith(RELEASED) and "untrained" in one["columns"]
    }
    for name in ("synthetic", "shuffled"):
        share = found["adherence"].get(name)
        if share and share["n"]:
            told[f"found/slice/box/{name}/{share['n']}"] = share["found"]
    return told


def _halved(network: nn.Module | None) -> Mapping[str, Tensor] | None:
    if network is None:
        return None
    return {
        name: weights.half() if weights.is_floating_point() else weights
        for name, weights in network.state_dict().items()
    }
