"""What models guided by layouts are asked for, and how requests are completed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zarr

from raysynth.case import LUNG_LABELS, Label
from raysynth.config import ExperimentConfig, parse_recipe
from raysynth.errors import InputError
from raysynth.layout.holes import layout_hole
from raysynth.layout.propose import lung_depth, without_nodules
from raysynth.sampling.layouts import Lender, plan_layouts
from raysynth.sampling.planner import shuffle_conditions
from raysynth.store.reader import SampleSet
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import sample_set

SIZE = 24
ORGANS = ("lung", "nodule")


def lungs(number: int) -> np.ndarray:
    """Two lungs in a body, the left one with a nodule; no two volumes are alike."""
    made = np.full((SIZE,) * 3, Label.BODY, np.uint8)
    made[2:22, 3:21, 2 : 11 - number % 3] = Label.RIGHT_LUNG
    made[2:22, 3:21, 13:22] = Label.LEFT_LUNG
    made[10:13, 10:13, 16 + number % 3 : 19 + number % 3] = Label.NODULE
    return made


@pytest.fixture(scope="module")
def root() -> zarr.Group:
    """Six volumes; the last three of test patients."""
    root = zarr.create_group(zarr.storage.MemoryStore(), zarr_format=3)
    layout = np.stack([lungs(number) for number in range(6)])
    attributes: dict[str, Any] = {
        "kind": "patches",
        "pixel_mm": 4.0,
        "intensity": "hu",
        "cases": [f"case-{number}" for number in range(6)],
        "parent_snapshot": "0",
        "fingerprint": "0",
        "settings": {},
        "spacing_mm": 4.0,
        "field_of_view_mm": 96.0,
    }
    group = create_sample_set(root, "samples/cubes", sample_set(6, (SIZE,) * 3), attributes)
    starts = [np.argwhere(one == Label.NODULE).min(axis=0) for one in layout]
    ratings = np.zeros((6, 4, 9), np.uint8)
    ratings[:, 1] = 4
    set_index(
        group,
        {
            "case": np.arange(6),
            "split": np.array([0, 0, 0, 2, 2, 2]),
            "has_nodule": np.ones(6),
            "box": np.array([[*start, *(start + 3)] for start in starts]),
            "ratings": ratings,
        },
    )
    hu = np.random.default_rng(0).integers(-1000, 400, layout.shape).astype(np.int16)
    write_rows(group, 0, {"hu": hu, "layout": layout})
    return root


def samples_of(root: zarr.Group) -> SampleSet:
    group = root["samples/cubes"]
    assert isinstance(group, zarr.Group)
    return SampleSet(group)


def recipe(sampling: str, model: str = "", centre: str = "lungs") -> ExperimentConfig:
    samples = (
        f"{{kind: patches, name: cubes, size: {SIZE}, field_of_view_mm: 96, centre: {centre}}}"
    )
    network = "channels: [8, 16], attention_levels: [false, false], norm_num_groups: 8"
    return parse_recipe(
        f"{{work_dir: runs, data: {{samples: {samples}}}, model: {{family: layout_diffusion, "
        f"{network}, {model}}}, sampling: {{num_samples: 9, {sampling}}}}}",
        name="guided",
    )


def test_hosts_are_test_patients_in_turn_with_their_own_nodules(root: zarr.Group) -> None:
    samples = samples_of(root)
    plan = plan_layouts(recipe("nodules: own"), samples)
    assert sorted(one.source_sample for one in plan) == [3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert len({one.seed for one in plan}) == 9
    lender = Lender("samples/cubes", ORGANS, copies=True)
    for one in plan:
        assert one.condition.layout is None  # plans hold no volumes
        assert one.condition.attributes == (4,) * 5
        whole = lender(root, one).condition
        host = samples.read("layout", one.source_sample, one.source_sample + 1)[0]
        assert whole.layout is not None
        assert whole.known_mask is not None
        assert np.array_equal(whole.layout, host)
        assert np.array_equal(~whole.known_mask, layout_hole(host, ORGANS))
        assert one.condition.box is not None
        box = tuple(
            slice(one.condition.box[axis], one.condition.box[3 + axis]) for axis in range(3)
        )
        assert (host[box] == Label.NODULE).all()
    assert plan == plan_layouts(recipe("nodules: own"), samples)


def test_new_nodules_lie_wholly_in_one_lung(root: zarr.Group) -> None:
    samples = samples_of(root)
    plan = plan_layouts(recipe("nodules: new, nodule_free: 0.34"), samples)
    lender = Lender("samples/cubes", ("nodule",), copies=True)
    without = [one for one in plan if one.condition.box is None]
    assert len(without) == 3
    for one in plan:
        if one in without:
            continue
        own = samples.read("layout", one.source_sample, one.source_sample + 1)[0]
        anatomy = without_nodules(own)
        whole = lender(root, one).condition
        assert whole.layout is not None
        assert whole.known_mask is not None
        new = whole.layout == Label.NODULE
        assert len(np.unique(anatomy[new])) == 1
        assert np.isin(anatomy[new], LUNG_LABELS).all()
        assert np.array_equal(whole.layout[~new], anatomy[~new])
        # The host's own nodule gave way, so it is not among what is known.
        assert not whole.known_mask[own == Label.NODULE].any()
        assert np.array_equal(~whole.known_mask, new | (own == Label.NODULE))
        assert one.lent is not None
        assert one.lent.ball is not None
        assert lung_depth(anatomy)[one.lent.ball.centre] > one.lent.ball.radius
        assert one.condition.box is not None
        low, high = one.condition.box[:3], one.condition.box[3:]
        assert {b - a for a, b in zip(low, high, strict=True)} == {high[0] - low[0]}


def test_in_crops_a_new_nodule_comes_to_the_place_of_the_own(root: zarr.Group) -> None:
    samples = samples_of(root)
    for one in plan_layouts(recipe("nodules: new", centre="nodule"), samples):
        assert one.lent is not None
        assert one.lent.ball is not None
        box = samples.index["box"][one.source_sample]
        assert one.lent.ball.centre == tuple((box[:3] + 1).tolist())


def test_exchanged_requests_come_with_their_layouts(root: zarr.Group) -> None:
    plan = plan_layouts(recipe("nodules: new"), samples_of(root))
    for own, drawn in zip(plan, shuffle_conditions(plan), strict=True):
        assert (drawn.sample_id, drawn.seed) == (own.sample_id, own.seed)
        (lender,) = [one for one in plan if one.lent is drawn.lent]
        assert lender is not own
        assert drawn.source_sample == lender.source_sample


def test_what_no_model_can_be_told_is_refused(root: zarr.Group) -> None:
    samples = samples_of(root)
    (_, one, *_) = plan_layouts(recipe("nodules: new, nodule_free: 0.99"), samples)
    with pytest.raises(InputError, match="shows no nodule: this model is told of nothing else"):
        Lender("samples/cubes", ("nodule",), copies=True)(root, one)
    with pytest.raises(InputError, match=r"cohort and counterfactual with sampling\.nodules own"):
        recipe("nodules: own, counterfactual: {texture: [1, 5]}")
    large = recipe("nodules: new")
    settings = large.data.samples.model_copy(
        update={"min_nodule_mm": 25.0, "field_of_view_mm": 48.0}
    )
    data = large.data.model_copy(update={"samples": settings})
    with pytest.raises(InputError, match=r"lower data\.samples\.min_nodule_mm"):
        plan_layouts(large.model_copy(update={"data": data}), samples)
