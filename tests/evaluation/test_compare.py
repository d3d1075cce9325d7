from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raysynth.config import ExperimentConfig, parse_recipe
from raysynth.errors import InputError
from raysynth.evaluation.compare import Contender, check_comparable, distances, table, verdict


def contender(name: str, **fids: tuple[float, float, float]) -> Contender:
    metrics = {
        f"fid/slice/{region}/ct-conv@1/64": {
            "value": value,
            "n": 64,
            "interval": (low, high),
            "columns": {
                "floor": {"value": 0.5, "interval": None if region == "all" else (0.25, 0.75)}
            },
        }
        for region, (low, value, high) in fids.items()
    }
    share = {"found": 0.5, "interval": (0.4, 0.6), "n": 10}
    adherence = {"synthetic": share, "real": share}
    return Contender(
        name, "semantic_diffusion", 1_500_000, 60, 0.125, 800, metrics, adherence, {}, [], []
    )


def filler(name: str) -> Contender:
    one = contender(name, generated_liver=(1, 2, 3), all=(1, 2, 3))
    (key,) = (key for key in one.metrics if "liver" in key)
    larger = key.replace("/64", "/80")
    one.metrics[larger] = one.metrics[key] | {"n": 80}
    near = {"neighbour": {"value": 1.0, "interval": (0.5, 1.5)}}
    one.metrics[key] |= {"columns": one.metrics[key]["columns"] | near}
    quality = {"n": 9, "changed": 0, "known": 1234, "seam": 1.02, "seam_interval": (0.9, 1.1)}
    return replace(one, fills={"synthetic": quality, "shuffled": quality | {"seam": 3.0}})


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


def test_the_table_has_what_each_recipe_costs_and_whether_it_obeys() -> None:
    heading, *rows = table([contender("one", all=(1, 2, 3)), contender("other", all=(4, 5, 6))])
    assert {len(row) for row in (heading, *rows)} == {8}
    assert rows[0][:6] == ["one", "semantic_diffusion", "1.50 M", "60 s", "0.125 s", "800 MiB"]
    assert rows[0][6] == "50.0 % [40.0 %, 60.0 %] of 10 boxes"
    assert rows[0][7] == "-"


def test_a_training_that_was_elsewhere_took_no_zero_seconds() -> None:
    elsewhere = replace(contender("one", all=(1, 2, 3)), training_seconds=0.0)
    assert table([elsewhere])[1][3] == "-"


def test_distances_are_those_that_all_recipes_share_beside_their_floors() -> None:
    one = contender("one", all=(1, 2, 3), lung=(1, 2, 3))
    heading, *rows = distances([one, contender("other", all=(4, 5, 6))])
    assert heading == ["FID of", "N", "one", "other", "floor: other patients"]
    assert rows == [["all", "64", "2 [1, 3]", "5 [4, 6]", "0.5 (no interval)"]]


def test_of_filled_holes_what_was_made_stands_first_beside_neighbouring_slices() -> None:
    fillers = [filler("one"), filler("other")]
    heading, *rows = distances(fillers)
    assert heading[-2:] == ["floor: other patients", "floor: neighbouring slices"]
    # Of the larger N no neighbours are known.
    assert [row[:2] for row in rows] == [["generated liver", "64"], ["all", "64"]]
    assert rows[0][-1] == "1 [0.5, 1.5]"
    assert rows[1][-1] == "-"
    assert "no difference is certain in generated liver, all" in verdict(*fillers)
    assert table(fillers)[1][6:] == [
        "0 of 1,234",
        "1.02 [0.90, 1.10] times the patient's",
        "3.00 [0.90, 1.10] times the patient's",
    ]


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
