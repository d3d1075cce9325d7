"""The privacy audit: are samples of a run copies of what its model learned from, and may it leave.

Every sample is held against all training samples, and held-out real ones likewise: what they reach
is chance. The scores lie in the store beside the run, the verdict with them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.config import AuditConfig, ExperimentConfig, HoleFilling
from raysynth.errors import InputError
from raysynth.evaluation.audit_pictures import REGIONS, looks_of
from raysynth.evaluation.audit_region import RegionAudit, Scores, audit_region
from raysynth.evaluation.audit_report import notices_of, write_audit_page, written
from raysynth.evaluation.fills import read_holes
from raysynth.evaluation.findings import write_findings
from raysynth.evaluation.sets import check_drawn_by, patients_of
from raysynth.layout.morphology import Mask
from raysynth.models.bundle import read_facts
from raysynth.progress import progress
from raysynth.seeding import fingerprint
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index
from storage_schema.v1 import audit as audit_spec

VERSION = 2
"""Of the method: another one, and runs are audited anew."""

Verdict = Literal["passed", "failed"]


@dataclass(frozen=True)
class AuditSummary:
    """What an audit found; also `work_dir`/evaluation/`name`_audit.json.

    Attributes:
        name: of the synthetic run.
        verdict: whether the run keeps the policy.
        reasons: why it failed, or what it showed.
        notices: what a reader must know beside the figures.
        samples: of the run.
        flagged: samples that count as copies; exports leave them out.
        exact: of these, the same picture as a training sample.
        regions: figures by what was compared (`audit_region.RegionAudit` as JSON).
        snapshot: of the store with the audit.
        seconds: wall time.
        path: the JSON file.
        page: pictures of the closest pairs. They are of real patients: keep the page in the house.
    """

    name: str
    verdict: Verdict
    reasons: list[str]
    notices: list[str]
    samples: int
    flagged: int
    exact: int
    regions: dict[str, Any]
    snapshot: str
    seconds: float
    path: str
    page: str


def audit(config: ExperimentConfig) -> AuditSummary:
    """Audits the recipe's synthetic run; an audit that is in the store already is only shown.

    Needs a Ray session (`raysynth.session.connect`).

    Raises:
        InputError: no synthetic run, one of another bundle, set or settings, or too few held-out
            patients or samples to tell copies from chance.
    """
    started = time.monotonic()
    root = open_root(config.store_url)
    sets = _open_sets(root, config)
    hole = None  # of models guided by layouts, what their layouts show
    if isinstance(config.model, HoleFilling):
        hole = read_holes(config, sets["real"], sets["synthetic"]).hole
    mark = _fingerprint(config, sets)
    place = f"audits/{config.name}"
    if place not in root or SampleSet(open_group(root, place)).attrs["fingerprint"] != mark:
        _audit(config, root, sets, hole, mark)
    snapshot = main_snapshot(config.store_url)
    table = SampleSet(open_group(open_root(config.store_url, snapshot), place))
    folder = config.work_dir / "evaluation"
    path, page = (folder / f"{config.name}_audit{ending}" for ending in (".json", ".html"))
    findings = table.attrs["findings"]
    summary = AuditSummary(
        name=config.name,
        verdict=table.attrs["verdict"],
        reasons=findings["reasons"],
        notices=findings["notices"],
        samples=table.count,
        flagged=int(table.index["flagged"].sum()),
        exact=int(table.index["exact"].sum()),
        regions=findings["regions"],
        snapshot=snapshot,
        seconds=time.monotonic() - started,
        path=str(path),
        page=str(page),
    )
    write_findings(path, asdict(summary))
    write_audit_page(config, sets, table, hole, page)
    return summary


def failures(regions: Mapping[str, RegionAudit], policy: AuditConfig) -> list[str]:
    """In which ways a run breaks the policy, in words; none: it keeps it."""
    found = []
    for name, region in regions.items():
        allowed = region.threshold.at_most + policy.max_copy_rate
        if region.interval[0] > allowed:
            found.append(
                f"of its {name} pictures at least {region.interval[0]:.1%} are nearer to training "
                f"samples than held-out ones come; chance explains {region.threshold.at_most:.1%} "
                f"at most, and audit.max_copy_rate allows {policy.max_copy_rate:.1%} beyond"
            )
    exact = sum(region.exact for region in regions.values())
    if exact > policy.max_exact:
        found.append(
            f"{exact} samples are the same picture as a training sample, and audit.max_exact "
            f"allows {policy.max_exact}"
        )
    return found


def _open_sets(root: zarr.Group, config: ExperimentConfig) -> dict[str, SampleSet]:
    """The run, and the sample set that its bundle learned from."""
    name = config.samples.name
    real = SampleSet(open_group(root, f"samples/{name}"))
    synthetic = SampleSet(open_group(root, f"synthetic/{config.name}"))
    check_drawn_by(config, synthetic, config.name)
    if synthetic.attrs["source_set"] != name:
        raise InputError(
            f"synthetic/{config.name} belongs to the sample set {synthetic.attrs['source_set']}, "
            f"the recipe's data.samples.name is {name}: audit it with the recipe that drew it"
        )
    if config.bundle_path.exists():  # on another machine it may not be
        _check_learned(config, real)
    return {"real": real, "synthetic": synthetic}


def _check_learned(config: ExperimentConfig, real: SampleSet) -> None:
    """The bundle must have learned from the set that its samples are held against."""
    snapshot, name = read_facts(config.bundle_path).snapshot, real.group.path
    try:
        learned = open_root(config.store_url, snapshot).get(name)
    except InputError:
        learned = None
    if learned is None or learned.attrs["fingerprint"] != real.attrs["fingerprint"]:
        raise InputError(
            f"bundle {config.bundle_path} did not learn from {name} of store {config.store_url} as "
            "it is now: audit in the store that it was trained in"
        )


def _fingerprint(config: ExperimentConfig, sets: Mapping[str, SampleSet]) -> str:
    """Of all that decides an audit."""
    return fingerprint(
        {
            "version": VERSION,
            "run": [sets["synthetic"].attrs[name] for name in ("plan", "bundle")],
            "samples": sets["real"].attrs["fingerprint"],
            "policy": config.audit.model_dump(),
            "seed": config.seed,
        }
    )


def _audit(
    config: ExperimentConfig,
    root: zarr.Group,
    sets: Mapping[str, SampleSet],
    hole: Mask | None,
    mark: str,
) -> None:
    """Computes the audit and publishes it."""
    synthetic = sets["synthetic"]
    patients = patients_of(root, {"real": sets["real"]})["real"]
    regions: dict[str, RegionAudit] = {}
    columns = _empty_columns(synthetic.count)
    with progress("audit", synthetic.count) as view:
        for look in looks_of(config, synthetic):
            found, scores = audit_region(
                look, sets, patients, hole, config.audit, config.seed, view
            )
            regions[look.region] = found
            _fill(columns, scores, REGIONS.index(look.region))
    assert (columns["nearest_sample"] >= 0).all()
    broken = failures(regions, config.audit)
    lent = _lent(sets, columns["nearest_sample"])
    attributes = {
        **{name: synthetic.attrs[name] for name in ("bundle", "plan", "source_set")},
        "fingerprint": mark,
        "parent_snapshot": main_snapshot(config.store_url),
        "regions": list(REGIONS),
        "thresholds": {name: found.threshold.score for name, found in regions.items()},
        "policy": config.audit.model_dump(mode="json"),
        "verdict": "failed" if broken else "passed",
        "findings": {
            "regions": {name: asdict(found) for name, found in regions.items()},
            "reasons": broken or [written(name, found) for name, found in regions.items()],
            "notices": notices_of(config, synthetic, regions, lent & (columns["flagged"] == 1)),
        },
    }

    def build(writable: zarr.Group) -> None:
        place = f"audits/{config.name}"
        if place in writable:  # of another policy, or another run of that name
            del writable[place]
        group = create_sample_set(writable, place, audit_spec(synthetic.count), attributes)
        set_index(group, columns)

    with StoreRun(config.store_url, verb="audit", fingerprint=mark) as run:
        if run.is_new:
            run.declare(build, f"{config.name} audited")
        run.publish(f"audit of synthetic/{config.name}: {attributes['verdict']}")


def _empty_columns(count: int) -> dict[str, NDArray[Any]]:
    return {
        array.name.removeprefix("index/"): np.full(array.shape, array.fill, array.dtype)
        for array in audit_spec(count).arrays
    }


def _fill(columns: dict[str, NDArray[Any]], scores: Scores, region: int) -> None:
    rows = scores.rows
    columns["region"][rows] = region
    columns["nearest_sample"][rows] = scores.nearest_row
    columns["embedding_distance"][rows] = scores.distance[:, 0]
    columns["pixel_distance"][rows] = scores.distance[:, 1]
    columns["ncc"][rows] = 1 - scores.distance[:, 2]
    columns["copy_score"][rows] = scores.score
    columns["exact"][rows] = scores.exact
    columns["flagged"][rows] = scores.flagged


def _lent(sets: Mapping[str, SampleSet], nearest: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Samples whose nearest training sample is of the case that lent them their layout."""
    real, synthetic = sets["real"], sets["synthetic"]
    same: NDArray[np.bool_] = real.index["case"][nearest] == synthetic.index["source_case"]
    return same
