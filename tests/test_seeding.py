"""Seeds, pseudonyms and their key."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from raysynth.errors import InputError
from raysynth.seeding import fingerprint, load_key, pseudonym, seed_of, unit_interval


def test_a_seed_follows_from_identity_alone() -> None:
    # A constant: were it to change, every published sample would change with it.
    assert seed_of("sample", 0, "demo-00000000") == 4_081_539_429_686_576_692
    assert seed_of("a", 1) != seed_of("a1")
    assert 0 <= unit_interval("patient", 3) < 1


def test_fingerprint_ignores_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_pseudonyms_need_the_key(tmp_path: Path) -> None:
    key, other = load_key(tmp_path / "a" / "key"), load_key(tmp_path / "b" / "key")
    assert key == load_key(tmp_path / "a" / "key")
    assert stat.S_IMODE((tmp_path / "a" / "key").stat().st_mode) == 0o600
    name = pseudonym(key, "patient", "LIDC-IDRI-0001")
    assert name == pseudonym(key, "patient", "LIDC-IDRI-0001")
    assert name != pseudonym(other, "patient", "LIDC-IDRI-0001")
    assert name != pseudonym(key, "series", "LIDC-IDRI-0001")
    assert "0001" not in name


@pytest.mark.parametrize("content", ["", "ab", "z" * 64])
def test_what_is_no_key_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(InputError, match="expected 64 hex digits"):
        load_key(tmp_path / "key")
