"""No planted identity gets out of ingest: not into the store, a log, a message or a page."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from numcodecs.zstd import Zstd

from raysynth.cli import main
from raysynth.seeding import load_key, pseudonym
from raysynth.store.reader import case_attrs, case_ids
from raysynth.store.repository import open_root
from raysynth.volume import Volume
from tests.data.identities import (
    TAGS,
    UID_ROOT,
    WORD,
    Person,
    person,
    write_person,
)
from tests.formats.dicom_files import UNDEFINED, Damage, element, inserted, put

pytestmark = pytest.mark.ray

SPACING_MM = (8.0, 5.0, 5.0)
ZSTD = b"\x28\xb5\x2f\xfd"
"""Start of what Icechunk compressed."""


def chest() -> Volume:
    """Two lungs in a body in air, as coarse as lungs can be found."""
    z, y, x = np.indices((30, 56, 72))
    z, y, x = (8.0 * (z - 15), 5.0 * (y - 28), 5.0 * (x - 36))
    hu = np.full(z.shape, -1000, np.int16)
    hu[(y / 105) ** 2 + (x / 150) ** 2 < 1] = 40
    for side in (-70, 70):
        hu[(z / 90) ** 2 + (y / 75) ** 2 + ((x - side) / 50) ** 2 < 1] = -850
    return Volume(hu, SPACING_MM, (-120.0, -140.0, -180.0))


@pytest.fixture(scope="module")
def people() -> list[Person]:
    return [person(number) for number in range(5)]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, people: list[Person]) -> Path:
    """Series of five people: two can be read, and the others break rules, as do more files."""
    root = tmp_path_factory.mktemp("scans")
    series = [write_person(root, one, chest()) for one in people]
    names = [one.identities["PatientName"] for one in people]
    for path in series[1][::2]:  # pydicom warns of what it does not know, and quotes it
        spoil(path, put("SpecificCharacterSet", "CS", names[1]))
    series[2][12].unlink()
    spoil(series[3][5], put("RescaleSlope", "DS", names[3]))
    spoil(series[3][6], put("NumberOfFrames", "IS", names[3]))
    # It is warned of as well, with the name of the file.
    spoil(series[4][7], inserted(element(0x00091010, "OB", b"", UNDEFINED)))
    for path in series[4][8:]:
        spoil(path, put("PatientID", "LO", people[4].identities["PatientComments"]))
    (root / f"{names[0]}.dcm").write_text(f"{names[0]}\n" * 100)
    (root / people[1].folder / names[1]).symlink_to("/")
    return root


def spoil(path: Path, damage: Damage) -> None:
    path.write_bytes(damage(path.read_bytes()))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, scans: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    values = {
        "work_dir": str(folder / "work"),
        "data": {
            "source": {"kind": "dicom", "path": str(scans)},
            "samples": {"size": 32, "spacing_mm": 8.0},
            "max_quarantined": 0.9,
        },
        "model": {"family": "autoencoder_kl", "channels": [8, 8, 8], "norm_num_groups": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def secrets(people: list[Person]) -> list[str]:
    return [text for one in people for text in one.identities.values()]


def test_three_hundred_identities_are_planted(
    scans: Path, people: list[Person], secrets: list[str]
) -> None:
    assert len(secrets) == len(set(secrets)) >= 300
    assert len(TAGS) >= 40
    names = "\n".join(str(path) for path in scans.rglob("*")).encode()
    raw = (b"\n".join(path.read_bytes() for path in scans.rglob("*.dcm")) + names).lower()
    assert not [text for text in secrets if text.lower().encode() not in raw]


def test_none_of_them_gets_out(
    recipe: Path,
    people: list[Person],
    secrets: list[str],
    tmp_path: Path,
    local_ray: None,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work_dir = recipe.parent / "work"
    store, page = str(work_dir / "store"), tmp_path / "page.html"
    inspect = ["inspect", store, "--full", "--json", "--page", str(page)]
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        exits = [
            main(arguments)
            for arguments in (
                ["ingest", str(recipe)],
                ["shard", str(recipe)],
                inspect,
                ["ingest", str(recipe), "--set", "data.max_quarantined=0.1"],
            )
        ]
    out, err = capfd.readouterr()
    assert exits == [0, 0, 0, 1], err

    root = open_root(store)
    entries = root["quarantine"].attrs["entries"]
    assert {entry["rule"] for entry in entries} == {
        *("missing-slice", "bad-tag", "unknown-kind", "mixed-patients", "not-dicom", "link"),
    }
    told = [caplog.text, out, err, page.read_text(), *(str(one.message) for one in warned)]
    stored = dict(everything(root))
    logged = dict(ray_logs())
    assert len(logged) > 5
    for name, text in {
        "said": "\n".join(told).encode(),
        **stored,
        **{str(path): path.read_bytes() for path in work_dir.rglob("*") if path.is_file()},
        **{f"unpacked {path}": unpacked(path) for path in (work_dir / "store").rglob("*")},
        "names": "\n".join(str(path) for path in work_dir.rglob("*")).encode(),
        **logged,
    }.items():
        assert not found(secrets, text), name


def test_who_has_the_key_alone_knows_a_patient(
    recipe: Path, people: list[Person], tmp_path: Path, local_ray: None
) -> None:
    work_dir = recipe.parent / "work"
    main(["ingest", str(recipe)])
    root = open_root(work_dir / "store")
    key = load_key(work_dir / "pseudonym.key")
    patients = {one.identities["PatientID"] for one in people}
    stored = {case_attrs(root, case_id).patient_key for case_id in case_ids(root)}
    assert len(stored) == 2
    assert stored < {pseudonym(key, "patient", patient) for patient in patients}
    assert not stored & {pseudonym(bytes(32), "patient", patient) for patient in patients}
    assert not stored & {hashed[:16] for patient in patients for hashed in digests(patient)}
    text = (work_dir / "pseudonym.key").read_text().strip()
    assert bytes.fromhex(text) == key
    for path in (work_dir / "store").rglob("*"):
        if path.is_file():
            raw = path.read_bytes() + unpacked(path)
            assert key not in raw
            assert text.encode() not in raw


def everything(root: zarr.Group) -> Iterator[tuple[str, bytes]]:
    """Attributes, and values as they are after decompression, by path."""
    yield "/", json.dumps(root.attrs.asdict()).encode()
    for path, node in root.members(max_depth=None):
        yield path, path.encode() + json.dumps(node.attrs.asdict()).encode()
        if isinstance(node, zarr.Array):
            yield f"values of {path}", node[...].tobytes()


def unpacked(path: Path) -> bytes:
    """What Icechunk compressed in a file: snapshots, manifests, logs of transactions."""
    raw = path.read_bytes() if path.is_file() else b""
    head, mark, packed = raw[:64].partition(ZSTD)
    if not mark:
        return b""
    return head + bytes(Zstd().decode(mark + packed + raw[64:]))


def ray_logs() -> Iterator[tuple[str, bytes]]:
    """What Ray and its workers wrote down in this session."""
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    for path in folder.rglob("*"):
        if path.is_file():
            yield f"Ray's {path.name}", path.read_bytes()


def found(secrets: list[str], text: bytes) -> list[str]:
    """The secrets that a text holds, in any case of letters, as UTF-8, UTF-16 or hashed."""
    lower = text.lower()
    plain = secrets if any(mark in lower for mark in MARKS) else []
    hashed = secrets if HEX.search(lower) else []
    return [
        *(one for one in plain if any(form in lower for form in forms(one.lower()))),
        *(one for one in hashed if any(digest.encode() in lower for digest in digests(one))),
    ]


def forms(text: str) -> tuple[bytes, ...]:
    return text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be")


def digests(text: str) -> list[str]:
    return [hashlib.new(name, text.encode()).hexdigest() for name in ("md5", "sha1", "sha256")]


MARKS = [form for mark in (WORD.lower(), UID_ROOT, "1923", "1924") for form in forms(mark)]
"""One of these is in every secret, and few of them in anything else."""

HEX = re.compile(rb"[0-9a-f]{32}")
