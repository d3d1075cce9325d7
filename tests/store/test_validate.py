"""A sound store passes, and every seeded fault is found at its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync

from raysynth.store.run import StoreRun
from raysynth.store.validate import summary, validate
from raysynth.store.writer import create_volume, write_volume
from tests.store.conftest import COUNT, audit_samples, invented_case

SLICES = "samples/slices"
LATENTS = "latents/slices/bundle"
DRAWN = "synthetic/run"
AUDIT = "audits/run"


def test_a_sound_store_has_no_problems(read_only_store: str) -> None:
    assert validate(read_only_store) == []
    assert validate(read_only_store, full=True) == []


def test_an_empty_store_has_no_problems(tmp_path: Path) -> None:
    with StoreRun(str(tmp_path / "store"), "make", "1") as run:
        run.publish("empty")
    assert validate(tmp_path / "store") == []


def test_a_store_from_before_there_were_audits_has_no_problems(store: str) -> None:
    with StoreRun(store, "spoil", "1") as run:
        run.declare(deleted("audits"), "As it was")
        run.publish("without audits")
    assert validate(store) == []
    assert summary(store).audits == {}
    with StoreRun(store, "audit", "1") as run:
        run.declare(audit_samples, "The first audit")
        run.publish("audited")
    assert validate(store) == []


def test_summary_counts(read_only_store: str) -> None:
    counts = summary(read_only_store)
    assert (counts.cases, counts.patients, counts.nodules, counts.quarantined) == (1, 1, 1, 0)
    assert counts.splits == {"train": 1, "val": 0, "test": 0}
    assert counts.samples == {SLICES: COUNT, LATENTS: COUNT, DRAWN: 3}
    assert counts.audits == {"run": "passed"}
    assert counts.stored_bytes > 100_000
    assert [run.message for run in counts.publications] == [
        "made",
        "Empty store",
    ]
    assert counts.publications[0].snapshot == counts.snapshot
    assert counts.unpublished == ()


def attribute(path: str, **values: object) -> Callable[[zarr.Group], None]:
    return lambda root: root[path].attrs.update(values)


def without(path: str, name: str) -> Callable[[zarr.Group], None]:
    return lambda root: root[path].attrs.__delitem__(name)


def value(path: str, row: object, new: object) -> Callable[[zarr.Group], None]:
    return lambda root: root[path].__setitem__(row, new)


def deleted(path: str) -> Callable[[zarr.Group], None]:
    return lambda root: root.__delitem__(path)


def metadata(path: str, **changes: Any) -> Callable[[zarr.Group], None]:
    """Rewrites some of an array's zarr.json."""

    def change(root: zarr.Group) -> None:
        stored = json.loads(json.dumps(root[path].metadata.to_dict())) | changes
        buffer = default_buffer_prototype().buffer.from_bytes(json.dumps(stored).encode())
        sync(root.store.set(f"{path}/zarr.json", buffer))

    return change


def plain_array(path: str) -> Callable[[zarr.Group], None]:
    """The same data without shards and checksums."""

    def change(root: zarr.Group) -> None:
        values = root[path][:]
        del root[path]
        root.create_array(path, data=values)

    return change


def second_case(root: zarr.Group) -> None:
    """Another case of the same patient, in another split."""
    case = invented_case("case-b", split="test")
    create_volume(root, case).attrs["patient_key"] = "patient-of-case-a"
    write_volume(root["volumes/case-b"], case)


def nodule(**changes: object) -> Callable[[zarr.Group], None]:
    def change(root: zarr.Group) -> None:
        group = root["volumes/case-a"]
        group.attrs["nodules"] = [{**group.attrs["nodules"][0], **changes}]

    return change


@pytest.mark.parametrize(
    ("fault", "path", "what"),
    [
        (without("", "created_by"), "/", "created_by is missing"),
        (lambda root: root.create_group("notes"), "notes", "not part"),
        (attribute("quarantine", entries=[{"source": "a"}]), "quarantine", "entry 0"),
        (without("quarantine", "entries"), "quarantine", "entries is missing"),
        (without("volumes/case-a", "direction"), "volumes/case-a", "direction is missing"),
        (attribute("volumes/case-a", split="dev"), "volumes/case-a", "'dev', not one of train"),
        (attribute("volumes/case-a", intensity="grey"), "volumes/case-a", "'grey'"),
        (attribute("volumes/case-a", spacing_mm=[1, -1, 1]), "volumes/case-a", "positive"),
        (nodule(corner_zyx=[36, 12, 20]), "volumes/case-a", "nodule 0 reaches out"),
        (nodule(ratings=[[7] * 9]), "volumes/case-a", "no LIDC scores"),
        (nodule(ratings=[[3] * 9] * 5), "volumes/case-a", "no LIDC scores"),
        (attribute("volumes/case-a", nodules=[{}]), "volumes/case-a", "cannot be read: KeyError"),
        (deleted("volumes/case-a/hu"), "volumes/case-a", "no array volumes/case-a/hu"),
        (value("volumes/case-a/layout", (36, 0, 0), 200), "volumes/case-a/layout", "200 is no"),
        (value("volumes/case-a/hu", (0, 0, 0), -32768), "volumes/case-a/hu", "is no HU"),
        (attribute("volumes/case-a", source={"kvp": 119.0}), "volumes/case-a", "checksum"),
        (attribute(SLICES, note="later"), SLICES, "checksum does not fit"),
        (second_case, "volumes/case-b", "a leak"),
        (plain_array(f"{SLICES}/hu"), SLICES, "not decoded"),
        (plain_array(f"{SLICES}/index/box"), f"{SLICES}/index/box", "codecs"),
        (metadata(f"{SLICES}/layout", data_type="int16"), f"{SLICES}/layout", "data_type"),
        (metadata(f"{SLICES}/layout", fill_value=0), f"{SLICES}/layout", "fill_value is 0"),
        (metadata(f"{SLICES}/layout", dimension_names=None), f"{SLICES}/layout", "dimension_na"),
        (metadata(f"{SLICES}/index/split", shape=[7]), f"{SLICES}/index/split", "shape is .7."),
        (deleted(f"{SLICES}/index/box"), f"{SLICES}/index/box", "is missing"),
        (lambda r: r[SLICES].create_array("x", shape=1, dtype="i1"), f"{SLICES}/x", "not part"),
        (lambda r: r[f"{SLICES}/index"].create_group("x"), f"{SLICES}/index/x", "not part"),
        (without(SLICES, "fingerprint"), SLICES, "fingerprint is missing"),
        (attribute(SLICES, pixel_mm=0), SLICES, "pixel_mm is 0"),
        (attribute(SLICES, cases=["case-z"]), SLICES, "case-z .* is not in the store"),
        (value(f"{SLICES}/index/case", 70, 1), f"{SLICES}/index/case", "row 70 is 1: .* 0 to 0"),
        (
            value(f"{SLICES}/index/box", 5, [0, 0, 25, 9]),
            f"{SLICES}/index/box",
            "row 5 is .0, 0, 25",
        ),
        (value(f"{SLICES}/index/box", 5, [4, 4, 4, 9]), f"{SLICES}/index/box", "row 5"),
        (
            value(f"{SLICES}/index/ratings", (5, 1, 2), 7),
            f"{SLICES}/index/ratings",
            "allowed are 0 to 6",
        ),
        (value(f"{SLICES}/index/split", 5, 3), f"{SLICES}/index/split", "allowed are 0 to 2"),
        (value(f"{SLICES}/index/has_nodule", 5, 2), f"{SLICES}/index/has_nodule", "0 to 1"),
        (value(f"{SLICES}/layout", (129, 0, 0), 77), f"{SLICES}/layout", "row 128: 77 is no label"),
        (value(f"{LATENTS}/latents", (0, 0, 0, 0), np.nan), f"{LATENTS}/latents", "not finite"),
        (value(f"{DRAWN}/index/copied_fraction", 2, 1.5), f"{DRAWN}/index/copied_fraction", "1.5"),
        (value(f"{DRAWN}/index/source_case", 2, 9), f"{DRAWN}/index/source_case", "-1 to 0"),
        (without(DRAWN, "passport"), DRAWN, "passport is missing"),
        (without(LATENTS, "latent_scale"), LATENTS, "latent_scale"),
        (without(AUDIT, "verdict"), AUDIT, "verdict is missing"),
        (attribute(AUDIT, verdict="perhaps"), AUDIT, "'perhaps', not one of passed"),
        (attribute(AUDIT, plan="q"), AUDIT, "checksum"),
        (value(f"{AUDIT}/index/flagged", 1, 2), f"{AUDIT}/index/flagged", "0 to 1"),
        (value(f"{AUDIT}/index/nearest_sample", 1, 130), f"{AUDIT}/index/nearest_sample", "0 to 1"),
        (deleted(f"{AUDIT}/index/ncc"), f"{AUDIT}/index/ncc", "is missing"),
        (deleted(DRAWN), AUDIT, "no 'run' in /synthetic"),
    ],
)
def test_seeded_faults_are_found(
    store: str, fault: Callable[[zarr.Group], None], path: str, what: str
) -> None:
    with StoreRun(store, "spoil", "1") as run:
        run.declare(fault, "Spoil it")
        run.publish("spoiled")
    problems = validate(store)
    assert any(problem.path == path for problem in problems), problems
    assert any(re.search(what, p.what) for p in problems if p.path == path), problems


def test_a_fault_in_the_middle_needs_full(store: str) -> None:
    with StoreRun(store, "spoil", "1") as run:
        run.declare(value(f"{SLICES}/layout", (100, 0, 0), 77), "Spoil it")
        run.publish("spoiled")
    assert validate(store) == []
    assert [problem.path for problem in validate(store, full=True)] == [f"{SLICES}/layout"]


def test_damage_is_a_problem_not_a_crash(store: str) -> None:
    for file in Path(store, "chunks").iterdir():
        file.write_bytes(bytes(len(file.read_bytes())))
    problems = validate(store)
    assert {problem.path for problem in problems} >= {"volumes/case-a", SLICES}
    assert all("damaged" in problem.what for problem in problems)
