from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.config import ExperimentConfig, parse_recipe
from raysynth.errors import InputError
from raysynth.evaluation.compare import Contender, check_comparable, table, verdict


def contender(name: str, **fids: tuple[float, float, float]) -> Contender:
    metrics = {
        f"fid/slice/{region}/ct-conv@1/64": {
            "value": value,
            "interval": (low, high),
            "floor": 0.5,
            "floor_interval": None if region == "all" else (0.25, 0.75),
        }
        for region, (low, value, high) in fids.items()
    }
    share = {"found": 0.5, "interval": (0.4, 0.6), "n": 10}
    adherence = {"synthetic": share, "real": share}
    return Contender(name, "semantic_diffusion", 1_500_000, 60, 0.125, 800, metrics, adherence)


def recipe(name: str, *overrides: str) -> ExperimentConfig:
    text = "{work_dir: runs/shared, model: {family: pix2pix}}"
    return parse_recipe(text, name=name, overrides=overrides)


def test_a_verdict_needs_disjoint_intervals() -> None:
    one = contender("one", all=(1, 2, 3), lung=(1, 2, 3), nodule16=(7, 8, 9))
    other = contender("other", all=(4, 5, 6), lung=(2, 3, 4), nodule16=(4, 5, 6))
    assert verdict(one, other) == (
        "one and other: one is closer in all; other is closer in nodule16; "
        "no difference is certain in lung (FID)."
    )


def test_the_table_has_what_all_recipes_share_and_ends_with_the_floor() -> None:
    heading, *rows, floor = table(
        [contender("one", all=(1, 2, 3), lung=(1, 2, 3)), contender("other", all=(4, 5, 6))]
    )
    assert {len(row) for row in (heading, *rows, floor)} == {9}
    assert heading[6] == "FID all"
    assert [row[6] for row in rows] == ["2 [1, 3]", "5 [4, 6]"]
    assert rows[0][:6] == ["one", "semantic_diffusion", "1.50 M", "60 s", "0.125 s", "800 MiB"]
    assert floor[6] == "0.5 (no interval)"
    assert rows[0][7] == floor[7] == "50.0 % [40.0 %, 60.0 %] of 10 boxes"
    assert rows[0][8] == "-"


def test_only_recipes_of_one_sample_set_are_compared(tmp_path: Path) -> None:
    check_comparable([recipe("a"), recipe("b")])
    with pytest.raises(InputError, match="1 recipe: give two or more"):
        check_comparable([recipe("a")])
    with pytest.raises(InputError, match=r"different data\.samples"):
        check_comparable([recipe("a"), recipe("b", "data.samples.size=128")])
    with pytest.raises(InputError, match="different store"):
        check_comparable([recipe("a"), recipe("b", f"work_dir={tmp_path}")])
    with pytest.raises(InputError, match="give each recipe once"):
        check_comparable([recipe("a"), recipe("a")])
