"""No name that a stranger chose becomes a path: it is refused in one line, or hidden by a hash."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from raysynth.config.recipe import load_recipe, parse_recipe
from raysynth.data.ingest import ingest
from raysynth.data.sources import list_cases, read_case
from raysynth.errors import InputError, RaysynthError, UnreadableCase
from raysynth.formats.image import read_image
from raysynth.formats.luna16 import COLUMNS, read_annotations
from raysynth.models.bundle import bundle_digest, read_facts
from raysynth.store.reader import case_attrs, case_ids, open_group
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from tests.data.tiny import tiny_config
from tests.formats.dicom_files import both, ct_slice, put, small_volume, write_series
from tests.formats.image_files import metaimage, nrrd, small_values

TRAP = "/tmp/raysynth_trap"
"""Outside of everything; nothing may ever be there."""

_STEPS = ("..", "../..", "../../..", "..\\..", "....//....//", "..;/..", ".../...")
_TARGETS = ("evil", "etc/passwd", "raysynth_trap/x", "..", "store/refs/branch.main/ref.json")
_PLAIN = (
    *("", ".", "..", "...", "....", "/", "//", "\\", "~", "~root", "~/evil", "$HOME", "${HOME}/x"),
    *("%", "%s", "%n", "{}", "{0}", "*", "?", "[a-z]", "a|b", "a;b", "a&b", "`id`", "$(id)", "-rf"),
    *("--help", "@file", "#", "a#b", "a?b", ".hidden", "a.", "a..", "a ", " a", " ", "\t", "a\tb"),
    *("\n", "a\nb", "a\r\nb", "\r", "\0", "a\0b", "..\0/x", "\x1b[2J", "\x7f", "\x85", "\u2028"),
    *("CON", "con", "PRN", "AUX", "NUL", "COM1", "LPT1", "NUL.txt", "CON ", "COM¹", "CLOCK$"),
    *("C:", "C:evil", "C:\\evil", "C:/evil", "\\\\host\\share", "//host/share", "\\\\?\\C:\\x"),
    *("\\\\.\\pipe\\x", "file:///etc/passwd", "s3://bucket/x", "http://host/x", "data:,x", "a:b"),
    *("evil.dcm:stream", "/dev/null", "/dev/zero", "/proc/self/environ", "/etc/passwd", TRAP),
    *(f"{TRAP}/x", f"/{TRAP}", f"/..{TRAP}", f"x/../../..{TRAP}", f"./..{TRAP}", "x/.", "x/.."),
    *(
        "%2e%2e%2fevil",
        "%2e%2e/evil",
        "..%2fevil",
        "..%5cevil",
        "%252e%252e%252fevil",
        "%00",
        "a%00b",
    ),
    *(
        "%c0%ae%c0%ae%c0%afevil",
        "..%c0%afevil",
        "..%ef%bc%8fevil",
        "&#46;&#46;&#47;evil",
        "\\u002e",
    ),
    *(
        "\uff0e\uff0e\uff0fevil",
        "..\u2215evil",
        "..\u2044evil",
        "..\uff0fevil",
        "\u2025/evil",
        "\u2026/evil",
        "..\uff3cevil",
        "\u2024\u2024/evil",
    ),
    *(
        "\u202e../evil",
        "\u200b../evil",
        "..\u200b/evil",
        "\ufeff../evil",
        "..\u00a0/evil",
        "\uff41",
        "é",
    ),
    *("e\u0301", "İ", "ß", "ﬁ", "😀", "Ω", "\u0000\u0001", "\ud800", "\udcff\udcfe", "a\udc2fb"),
    *("a" * 255, "a" * 256, "a" * 5000, "../" * 500 + "evil", "/" * 4096, "é" * 200, "." * 300),
    *("latest", "refs", "config.yaml", "zarr.json", "c/0/0", "pseudonym.key", "store.lock", "main"),
    *("__proto__", "__init__", "nan", "null", "true", "0", "-1", "1e9", "0x41", "slices/../../x"),
    *("LOCAL", "LIST", "a%02d.raw 1 4 1", "a b", "'; DROP TABLE x", '"', "'", "<b>", "&amp;"),
)
NAMES: list[str] = list(
    dict.fromkeys(
        [
            *_PLAIN,
            *(f"{step}/{target}" for step in _STEPS for target in _TARGETS),
            *(quote(f"{step}/evil", safe="") for step in _STEPS),
        ]
    )
)
HASH = re.compile(r"[0-9a-f]{16}")
SAFE = re.compile(r"[a-z0-9_]+")


def component(name: str) -> bytes | None:
    """The name as one part of a path, if a file can have it."""
    raw = os.fsencode(name) if not any("\ud800" <= one < "\udc80" for one in name) else b""
    if not 0 < len(raw) <= 240 or raw in (b".", b"..") or set(raw) & {0, ord("/")}:
        return None
    return raw


COMPONENTS = [raw for raw in map(component, NAMES) if raw is not None]


def below(folder: Path, raw: bytes) -> Path:
    return folder / os.fsdecode(raw)


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only `work` and `given` may have new files; not their neighbours, and not where we are."""
    (tmp_path / "cwd" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / "deep")
    monkeypatch.setenv("HOME", str(tmp_path / "cwd"))
    for name in ("work", "given"):
        (tmp_path / name).mkdir()
    yield
    strange = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.relative_to(tmp_path).parts[0] not in ("work", "given")
    }
    assert strange == {"cwd", "cwd/deep"}
    assert not Path(TRAP).exists()


def outcome(call: Callable[[], Any]) -> Any:
    """What comes back, or the refusal."""
    try:
        return call()
    except RaysynthError as error:
        return error


def is_one_line(error: RaysynthError) -> bool:
    return len(str(error).splitlines()) == 1


def test_there_are_enough_names() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 200
    assert len(COMPONENTS) >= 100


def test_uids_and_patients_become_hashes(tmp_path: Path) -> None:
    """Headers alone decide names: a slice each will do."""
    raw = _slice()
    given = {}
    for number, name in enumerate(NAMES):
        text = name.encode("utf-8", "surrogatepass")[:1000]
        named = both(put("SeriesInstanceUID", "UC", text), put("PatientID", "UC", text))
        path = tmp_path / "given" / f"{number}.dcm"
        path.write_bytes(named(raw))
        given[path] = name
    config = tiny_config(tmp_path / "work", source={"kind": "dicom", "path": tmp_path / "given"})
    refs, refused = list_cases(config)
    # What is empty without its control characters names nothing; what differs by them is one.
    seen = {path for ref in refs for path in ref.files}
    assert len(refs) > 150
    assert len(seen) + sum(int(one.reason.split()[0]) for one in refused) == len(NAMES)
    assert {one.rule for one in refused} <= {"missing-tag", "missing-patient", "mixed-patients"}
    for ref in refs:
        assert HASH.fullmatch(ref.case_id)
        assert HASH.fullmatch(ref.patient_key)
    for one in refused:
        assert HASH.fullmatch(one.source)
        assert one.reason.isprintable()


def _slice() -> bytes:
    import io

    stream = io.BytesIO()
    tags = ct_slice(small_volume(8, 4), 0, "1.2.3", "P")
    tags.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_names_of_images_become_hashes(tmp_path: Path) -> None:
    for number, raw in enumerate(COMPONENTS):
        folder = tmp_path / "given" / "flat"
        if number % 2:
            folder = below(tmp_path / "given", raw)
        folder.mkdir(exist_ok=True)
        below(folder, raw + b".mha").write_bytes(metaimage())
    source = {"kind": "images", "path": tmp_path / "given", "needs_lung": False}
    refs, _ = list_cases(tiny_config(tmp_path / "work", source=source))
    assert len({ref.case_id for ref in refs}) == len(COMPONENTS)
    for ref in refs:
        assert HASH.fullmatch(ref.case_id + ref.patient_key[:0])
        assert HASH.fullmatch(ref.patient_key)
        assert read_case(ref).volume.shape == small_values().shape


def test_names_of_luna16_become_hashes(tmp_path: Path) -> None:
    given = tmp_path / "given"
    with (given / "annotations.csv").open("w", newline="", errors="replace") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows([name, -138, -118, -295, 5] for name in NAMES if "\0" not in name)
    (given / "a.raw").write_bytes(small_values().tobytes())
    for raw in COMPONENTS:
        below(given, raw + b".mhd").write_bytes(metaimage(ElementDataFile="a.raw"))
    found = read_annotations(given / "annotations.csv")
    assert len(found) > 180
    refs, _ = list_cases(tiny_config(tmp_path / "work", source={"kind": "luna16", "path": given}))
    assert len({ref.case_id for ref in refs}) == len(COMPONENTS)
    assert all(HASH.fullmatch(ref.case_id) and HASH.fullmatch(ref.patient_key) for ref in refs)
    assert sum(bool(ref.findings) for ref in refs) > 90


@pytest.mark.ray
def test_hostile_names_are_ingested_by_their_hashes(tmp_path: Path, local_ray: None) -> None:
    names = ["../../evil", f"{TRAP}/x", "C:\\evil"]
    for name in names:
        raw = component(name) or component(name.replace("/", "\u2215"))
        assert raw is not None
        folder = below(tmp_path / "given", raw)
        volume = small_volume(8, 16)
        uid, patient = f"1.2.{len(raw)}.{names.index(name)}", name[:60]
        files = write_series(folder, volume, series_uid=uid, patient_id=patient)
        for path in files:
            path.write_bytes(put("SeriesInstanceUID", "UI", name[:60].encode())(path.read_bytes()))
    below(tmp_path / "given", b"\xff\xfe.dcm").write_bytes(b"noise")
    source = {"kind": "dicom", "path": tmp_path / "given", "needs_lung": False}
    config = tiny_config(tmp_path / "work", source=source)
    assert ingest(config).cases == len(names)
    root = open_root(config.store_url)
    assert all(HASH.fullmatch(case_id) for case_id in case_ids(root))
    (entry,) = root["quarantine"].attrs["entries"]
    assert HASH.fullmatch(entry["source"])


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_data_files_lie_beside_their_header(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "given" / "inside"
    folder.mkdir()
    raw = small_values().tobytes()
    for bait in ("given/evil", "given/x", "work/evil"):
        (tmp_path / bait).write_bytes(raw)
    read = 0
    for text in NAMES:
        text = text.encode("utf-8", "replace").decode()
        if text == "LOCAL":  # not a name, but the header's own file
            continue
        header = nrrd(b"", data_file=text) if name == "a.nhdr" else metaimage(ElementDataFile=text)
        (folder / name).write_bytes(header)
        with pytest.raises(UnreadableCase) as refusal:
            read_image(folder / name)
        told = refusal.value.reason
        assert told.isprintable(), repr(text)
        assert len(text) < 4 or text.isalnum() or text not in told, repr(text)
        plain = component(text.strip())
        if plain is None or set(text) & set("%\\"):
            continue
        # Beside the header, whatever its name, it may be read.
        below(folder, plain).write_bytes(raw)
        try:
            read += read_image(folder / name).values.shape == small_values().shape
        except UnreadableCase:
            assert set(text) & set("\n\r\u2028\x85\x1c") or text in ("LIST", "LOCAL"), repr(text)
        below(folder, plain).unlink()
    assert read > 60


@pytest.mark.parametrize(
    "place",
    [
        lambda name: {"name": name},
        lambda name: {"data": {"samples": {"name": name}}},
    ],
    ids=["name", "samples.name"],
)
def test_recipes_have_plain_names(tmp_path: Path, place: Callable[[str], dict[str, Any]]) -> None:
    for name in NAMES:
        values = {
            "name": "tiny",
            "work_dir": str(tmp_path / "work"),
            "model": {"family": "autoencoder_kl"},
        }
        text = yaml.safe_dump(values | place(name))
        found = outcome(lambda text=text: parse_recipe(text, name="x"))
        if isinstance(found, InputError):
            assert is_one_line(found), repr(name)
        else:
            assert SAFE.fullmatch(found.name)
            assert SAFE.fullmatch(found.data.samples.name)
            assert found.bundle_path.parent == tmp_path / "work" / "bundles"
        for control in ("_untrained", "_shuffled", "_constant"):
            with pytest.raises(InputError):
                parse_recipe(yaml.safe_dump(values | {"name": f"{name}{control}"}), name="x")


def test_a_recipe_is_not_named_by_a_strange_file(tmp_path: Path) -> None:
    text = "work_dir: work\nmodel: {family: autoencoder_kl}\n"
    for raw in COMPONENTS:
        path = below(tmp_path / "given", raw + b".yaml")
        path.write_text(text)
        found = outcome(lambda path=path: load_recipe(path))
        if isinstance(found, InputError):
            # The user's own path is shown as it is.
            assert is_one_line(found) or not str(path).isprintable()
        else:
            assert SAFE.fullmatch(found.name)


def test_bundles_have_no_members_but_their_own(tmp_path: Path) -> None:
    """`bundle.json` names no file, and what lies beside it is not looked at."""
    folder = tmp_path / "given"
    for raw in COMPONENTS:
        path = below(folder, raw)
        path.mkdir() if len(raw) % 2 else path.symlink_to("/dev/zero")
    before = bundle_digest(folder)
    for name in NAMES:
        facts = {
            "schema_version": "raysynth-bundle-1",
            "model": {"family": "latent_diffusion", "autoencoder": name},
            "samples": {"name": name},
            "snapshot": name,
            "files": [name],
        }
        (folder / "bundle.json").write_text(json.dumps(facts))
        with pytest.raises(InputError) as refusal:
            read_facts(folder)
        assert is_one_line(refusal.value)
    (folder / "bundle.json").unlink()
    assert bundle_digest(folder) == before


def test_names_inside_a_store_stay_inside(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "work")
    with StoreRun(config.store_url, "make", "1") as run:
        run.publish("empty")
    root = open_root(config.store_url)
    files = sorted((tmp_path / "work").rglob("*"))
    asks: list[Callable[[str], object]] = [
        lambda name: case_attrs(root, name),
        lambda name: open_group(root, f"samples/{name}"),
        lambda name: open_root(config.store_url, name or "0"),
    ]
    for name in NAMES:
        for ask in asks:
            found = outcome(lambda ask=ask, name=name: ask(name))
            # A name of nothing may be the group itself, which is empty.
            assert isinstance(found, RaysynthError) or not list(found.group_keys()), repr(name)
    assert sorted((tmp_path / "work").rglob("*")) == files


def test_runs_have_plain_names(tmp_path: Path) -> None:
    for name in NAMES:
        plain = re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None
        if plain:
            assert "/" not in StoreRun(tmp_path / "work" / "store", "shard", name).branch
        else:
            with pytest.raises(AssertionError):
                StoreRun(tmp_path / "work" / "store", "shard", name or "\n")
