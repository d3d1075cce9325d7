"""What a study shows, against the store that it comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.serving.study_items import Items, ReaderStudyIn, choose_items
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from storage_schema.v1 import SPLITS
from tests.data.tiny import tiny_config
from tests.serving.study_store import NUM_DRAWN, NUM_TEST, RUN, SMALL_RUN, make_store


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    config = tiny_config(Path(tmp_path_factory.mktemp("studied")))
    make_store(config)
    return config


def wanted(**more: object) -> ReaderStudyIn:
    return ReaderStudyIn.model_validate({"run": RUN, "readers": ["anna"], "per_kind": 8} | more)


def rows_of(config: ExperimentConfig, items: Items) -> list[tuple[SampleSet, int]]:
    """Where in the store each image comes from, found by its pixels."""
    root, low, high = open_root(config.store_url), *items.value_range
    sets = [
        SampleSet(open_group(root, path))
        for path in (f"samples/{config.samples.name}", f"synthetic/{RUN}")
    ]
    places = {
        image.clip(low, high).tobytes(): (stored, row)
        for stored in sets
        for row, image in enumerate(stored.read("hu"))
    }
    found = [places[image.tobytes()] for image in items.images]
    assert [stored is sets[1] for stored, _ in found] == items.is_synthetic
    return found


def test_items_are_test_samples_and_drawn_ones_half_and_half(config: ExperimentConfig) -> None:
    items = choose_items(config, wanted(calibration=2))
    assert items.is_synthetic[:4].count(True) == 2
    assert items.is_synthetic[4:].count(True) == 8
    found = rows_of(config, items)
    assert len({(id(stored), row) for stored, row in found}) == 20
    for (stored, row), drawn in zip(found, items.is_synthetic, strict=True):
        assert drawn or stored.index["split"][row] == SPLITS.index("test")


def test_a_seed_chooses_the_same_items(config: ExperimentConfig) -> None:
    one, same, other = (choose_items(config, wanted(seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.images, same.images)
    assert one.is_synthetic == same.is_synthetic
    assert (one.images != other.images).any()


def test_neither_kind_has_values_that_the_other_does_not_reach(config: ExperimentConfig) -> None:
    items, drawn = (
        choose_items(config, wanted()),
        np.array(choose_items(config, wanted()).is_synthetic),
    )
    # Stored are -2048 to 3071 of real samples, and -1000 to 400 of the run.
    assert items.value_range == (-1000, 400)
    for kind in (drawn, ~drawn):
        assert (items.images[kind].min(), items.images[kind].max()) == (-1000, 400)


def test_every_case_comes_once_before_any_comes_twice(config: ExperimentConfig) -> None:
    items = choose_items(config, wanted(per_kind=6, calibration=2))  # there are 8 test cases
    found = zip(rows_of(config, items), items.is_synthetic, strict=True)
    cases = [int(stored.index["case"][row]) for (stored, row), drawn in found if not drawn]
    assert len(set(cases)) == 8


def test_matched_items_have_the_same_properties(config: ExperimentConfig) -> None:
    items = choose_items(config, wanted(match=["has_nodule"], calibration=0, per_kind=16))
    has = [bool(stored.index["has_nodule"][row]) for stored, row in rows_of(config, items)]
    drawn = items.is_synthetic
    of_real, of_drawn = (
        sum(one for one, kind in zip(has, drawn, strict=True) if kind is wanted_kind)
        for wanted_kind in (False, True)
    )
    assert of_real == of_drawn
    assert 0 < of_real < 16


def test_nodules_without_scores_match_none_that_have_them(config: ExperimentConfig) -> None:
    # The run asked for no scores: only real samples without a nodule are alike.
    items = choose_items(config, wanted(match=["texture"]))
    for (stored, row), drawn in zip(rows_of(config, items), items.is_synthetic, strict=True):
        assert drawn or not stored.index["has_nodule"][row]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"run": "nobody"}, "run: the store has no 'nobody' in /synthetic; there is: shown, small"),
        ({"run": SMALL_RUN}, "run: small has another size"),
        ({"split": "val"}, "per_kind: 10 items .* 0 val samples and 36 of run shown give 0"),
        ({"per_kind": 35}, f"{NUM_TEST} test samples and {NUM_DRAWN} of run shown give 36"),
        ({"per_kind": 19, "match": ["texture"]}, "matched by texture, give 20"),
    ],
    ids=["run", "size", "split", "too few", "too few that match"],
)
def test_what_the_store_cannot_give_is_refused(
    config: ExperimentConfig, changed: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        choose_items(config, wanted(**changed))


def test_a_recipe_without_a_store_has_no_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="store"):
        choose_items(tiny_config(tmp_path), wanted())
