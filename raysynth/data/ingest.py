"""Reads every case of a source into the store: one Ray Data task a case."""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zarr

from raysynth.config import ExperimentConfig, PhantomSource
from raysynth.data.sources import CaseRef, Refusal, list_cases, read_case
from raysynth.data.units import write_units
from raysynth.errors import InputError, RaysynthError, UnreadableCase
from raysynth.preprocess.case import prepare
from raysynth.seeding import fingerprint, load_key, pseudonym
from raysynth.store.reader import VolumeAttrs, case_attrs, case_ids
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_volume, update_quarantine, write_volume

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestSummary:
    """What one ingest did.

    Attributes:
        cases: in the store afterwards.
        added: by this run.
        quarantined: cases and files refused by this run.
        nodules: in all cases of the store.
        seconds: wall time.
        snapshot: what main points to afterwards.
    """

    cases: int
    added: int
    quarantined: int
    nodules: int
    seconds: float
    snapshot: str


def ingest(config: ExperimentConfig) -> IngestSummary:
    """Reads the cases that the store does not have yet, and publishes them.

    The same command resumes after any crash: committed cases wait on the run's branch.

    Raises:
        InputError: there is no source, or every case of it was refused.
        RaysynthError: more than `data.max_quarantined` were refused; the good ones are published.
    """
    started = time.monotonic()
    refs, refusals = list_cases(config)
    identity = config.data.model_dump(mode="json", include={"source", "split"})
    with StoreRun(config.store_url, verb="ingest", fingerprint=fingerprint(identity)) as run:
        stored = _stored_cases(run)
        settings = _shared_settings(config)
        _check_settings(config, _root_attributes(run).get("ingested", {}), settings)
        waiting = [ref for ref in refs if ref.case_id not in stored]
        if config.data.split_list is None:
            waiting = _keep_splits(waiting, stored)
        else:
            _check_listed(config, refs, stored)
        units = {ref.case_id: ref for ref in waiting}
        failures = write_units(run, units, _write_case, stage="ingest", noun="cases")
        refusals += failures.values()
        stored = _stored_cases(run)
        added = len(run.completed)
        _record(run, stored, refusals, settings)
        snapshot = run.publish(f"{added} cases added, {len(refusals)} refused")
    _judge(config, len(refs), list(failures.values()), refusals)
    splits = {case.split for case in stored.values()}
    for missing in {"train", "test"} - splits:
        logger.warning(
            "no %s patient in the store: ingest more, or models cannot be %s",
            missing,
            "fitted" if missing == "train" else "judged",
        )
    return IngestSummary(
        cases=len(stored),
        added=added,
        quarantined=len(refusals),
        nodules=sum(len(case.nodules) for case in stored.values()),
        seconds=time.monotonic() - started,
        snapshot=snapshot,
    )


def _stored_cases(run: StoreRun) -> dict[str, VolumeAttrs]:
    root = run.root
    return {case_id: case_attrs(root, case_id) for case_id in case_ids(root)}


def _root_attributes(run: StoreRun) -> dict[str, Any]:
    return run.root.attrs.asdict()


def _check_listed(
    config: ExperimentConfig, refs: list[CaseRef], stored: dict[str, VolumeAttrs]
) -> None:
    kept = {case.patient_key: case.split for case in stored.values()}
    moved = {ref.patient_key for ref in refs if kept.get(ref.patient_key, ref.split) != ref.split}
    if moved:
        raise InputError(
            f"data.split_list {config.data.split_list} puts {len(moved)} patients of store "
            f"{config.store_url} into another split than they are in: use a new store"
        )


def _keep_splits(refs: list[CaseRef], stored: dict[str, VolumeAttrs]) -> list[CaseRef]:
    """A patient of whom the store has a case stays in the split that it has there.

    With few patients a split depends on who the others are, so it may have changed its mind. Should
    nobody be left to test, a new patient does.
    """
    splits = {ref.patient_key: ref.split for ref in refs}
    kept = {case.patient_key: case.split for case in stored.values()}
    new = sorted(splits.keys() - kept.keys())
    splits |= kept
    if new and kept and "test" not in splits.values():
        splits[new[0]] = "test"
    return [replace(ref, split=splits[ref.patient_key]) for ref in refs]


def _write_case(root: zarr.Group, ref: CaseRef) -> Refusal | None:
    """Reads, prepares and writes one case, or says why it is refused."""
    try:
        case = prepare(read_case(ref), needs_lung=ref.source.needs_lung)
    except UnreadableCase as error:
        return Refusal(ref.case_id, error.rule, error.reason)
    except InputError:  # the recipe's fault, not the case's
        raise
    except Exception as error:  # one odd file must not stop a thousand others
        # The error's own text may quote the file, and so the patient.
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        return Refusal(ref.case_id, "unexpected", f"{type(error).__name__} in {where}")
    write_volume(create_volume(root, case), case)
    return None


def _shared_settings(config: ExperimentConfig) -> dict[str, Any]:
    """What all cases of a store must have been ingested with."""
    listed = config.data.split_list is not None
    settings: dict[str, Any] = {"split": "listed" if listed else config.data.split.model_dump()}
    if not isinstance(config.data.source, PhantomSource):
        # A mark by which the key is known again, and nothing else.
        settings["key"] = pseudonym(load_key(config.key_path), "mark", "")
    for name in ("consensus_level", "nodule_mask", "class_map"):
        if hasattr(config.data.source, name):
            settings[name] = config.data.source.model_dump(mode="json")[name]
    return settings


def _check_settings(
    config: ExperimentConfig, stored: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Cases that are stored would keep what they have: masks, splits, names under another key."""
    for name, value in wanted.items():
        if name in stored and stored[name] != value:
            if name == "key":
                raise InputError(
                    f"{config.key_path} is not the key that the patients of store "
                    f"{config.store_url} were named with: copy that one here, or use a new store"
                )
            raise InputError(
                f"store {config.store_url} was ingested with {name} {stored[name]}, the recipe "
                f"says {value}: set it back, or use a new store"
            )


def _record(
    run: StoreRun,
    stored: dict[str, VolumeAttrs],
    refusals: list[Refusal],
    settings: dict[str, Any],
) -> None:
    """Writes what was refused into the quarantine, and the settings into the root."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entries = [{**asdict(refusal), "when": now} for refusal in refusals]

    def build(root: zarr.Group) -> None:
        update_quarantine(root, entries, readable=stored)
        known: Any = root.attrs.asdict().get("ingested", {})
        if known != known | settings:
            root.attrs["ingested"] = known | settings

    run.declare(build, "Quarantine and settings")


def _judge(
    config: ExperimentConfig, num_cases: int, failures: list[Refusal], refusals: list[Refusal]
) -> None:
    """Raises if too much was refused. It is in the quarantine by now, and the rest published."""
    if not refusals:
        return
    rules = ", ".join(
        f"{rule} ({count})" for rule, count in Counter(one.rule for one in refusals).most_common()
    )
    logger.warning("refused: %s; the store's quarantine says why", rules)
    if len(failures) == num_cases:
        raise InputError(
            f"all {num_cases} cases were refused: {rules}; first: {failures[0].reason}"
        )
    share = len(refusals) / (num_cases + len(refusals) - len(failures))
    if share > config.data.max_quarantined:
        raise RaysynthError(
            f"{share:.0%} of the cases were refused, data.max_quarantined is "
            f"{config.data.max_quarantined:.0%}: {rules}; the others are in the store"
        )
