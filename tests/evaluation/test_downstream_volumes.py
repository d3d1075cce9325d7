"""The trial of volumes: what networks see of them, what they learn, and how they are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from raysynth.case import CONDITION_COLUMNS, Label
from raysynth.cli import main
from raysynth.config import DownstreamConfig, ExperimentConfig, load_recipe
from raysynth.config.data import PatchSamples
from raysynth.errors import InputError
from raysynth.evaluation.downstream import segmentation, volumes
from raysynth.evaluation.downstream.arms import Arm, plan_arms, volumes_of
from raysynth.evaluation.downstream.examples import NOBODY
from raysynth.evaluation.downstream.figures import Metric
from raysynth.evaluation.downstream.folds import make_folds
from raysynth.evaluation.downstream.from_store import downstream, read_real, taught
from raysynth.evaluation.downstream.report import table, table_by_size
from raysynth.evaluation.downstream.segmentation import (
    compared,
    learn_masks,
    lesions_by_size,
    lesions_found,
)
from raysynth.evaluation.downstream.tables import Table, segmentation_figures
from raysynth.evaluation.downstream.trial import ArmResult
from raysynth.evaluation.downstream.volumes import Volumes, random_place
from raysynth.models.bundle import save_bundle
from raysynth.models.facts import BundleFacts
from raysynth.phantom.patient import phantom_case
from raysynth.preprocess.patches import cut_patches, plan_patches
from raysynth.store.reader import SampleSet, case_attrs, open_group
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import (
    create_sample_set,
    create_volume,
    set_index,
    write_rows,
    write_volume,
)
from raysynth.volume import AIR_HU
from storage_schema.v1 import SPLITS, sample_set, synthetic_run
from tests.evaluation.trial_examples import toy_volumes

CONFIG = DownstreamConfig(
    tasks=("segmentation",),
    folds=4,
    ratios=(0.5, 1.0),
    augmented_copies=2,
    steps=200,
    batch_size=4,
    width=16,
    learning_rate=2e-2,
)


def everything(count: int) -> np.ndarray:
    return np.arange(count)


def learned(train: Volumes, side: int) -> dict[str, float]:
    torch.manual_seed(0)
    test = toy_volumes(4, side=side, seed=1)
    found = learn_masks(train, test, CONFIG, 0)
    return segmentation_figures(found | {"patient": np.arange(4)}, np.ones(4))


def test_balls_are_learned() -> None:
    figures = learned(Volumes.of(toy_volumes(8), everything(8)), 16)
    assert figures["dice"] > 0.85
    assert figures["lesion_dice"] > 0.85
    assert figures["lesion_sensitivity"] == 1
    assert figures["voxel_specificity"] > 0.99


def test_larger_volumes_are_learned_from_crops_and_judged_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (segmentation, volumes):
        monkeypatch.setattr(module, "PATCH", 16)
    figures = learned(Volumes.of(toy_volumes(8, side=23), everything(8)), 23)
    assert figures["dice"] > 0.8
    assert figures["lesion_sensitivity"] == 1


def test_half_of_the_crops_lie_around_a_nodules_voxel() -> None:
    rng = np.random.default_rng(0)
    layout = np.zeros((90, 70, 200), np.uint8)
    layout[88, 3, 100] = Label.NODULE
    places = [random_place(layout, rng) for _ in range(400)]
    assert {layout[place].shape for place in places} == {(64, 64, 64)}
    showing = np.mean([(layout[place] == Label.NODULE).any() for place in places])
    # Of the others few reach it: 2 of 27 corners along z and 4 of 7 along y do, 64 of 137 along x.
    assert 0.45 < showing < 0.6
    assert len({place[2].start for place in places}) > 50
    assert random_place(layout[:60, :60, :60], rng) == (slice(0, 60),) * 3


def test_no_arm_copies_a_volume() -> None:
    real, drawn = toy_volumes(3), toy_volumes(4, seed=5)
    rows = np.array([0, 2, 2])
    arm = Arm("all", rows, "drawn", np.array([3]), copies=2)
    taught_by = volumes_of(arm, real, {"drawn": drawn}, seed=0)
    assert len(taught_by) == 3 + 6 + 1
    for one, labels, row in zip(taught_by.hu, taught_by.layout, np.tile(rows, 3), strict=False):
        assert np.shares_memory(one, real.hu[row])
        assert np.shares_memory(labels, real.layout[row])
    assert np.shares_memory(taught_by.hu[-1], drawn.hu[3])
    hu, layout = taught_by.crops(everything(10), np.random.default_rng(0))
    assert hu.dtype == np.int16
    np.testing.assert_array_equal(hu[:3], real.hu[rows])
    np.testing.assert_array_equal(layout[9], drawn.layout[3])


def test_augmented_volumes_are_turned_in_the_axial_plane_mirrored_and_noisy() -> None:
    real = toy_volumes(1)
    copies = Volumes.of(real, everything(1)).augmented(60, np.random.default_rng(0))
    hu, layout = copies.crops(everything(60), np.random.default_rng(1))
    seen = {one.tobytes() for one in layout}
    turns = [np.rot90(real.layout[0], quarters, (1, 2)) for quarters in range(4)]
    assert seen == {one.tobytes() for turn in turns for one in (turn, turn[:, :, ::-1])}
    for one, labels, noise_hu in zip(hu, layout, copies.noise_hu, strict=True):
        # Label and image are turned alike, and the ball keeps its mean.
        ball = one[labels == Label.NODULE]
        assert ball.mean() == pytest.approx(30, abs=4 * 40 / np.sqrt(len(ball)))
        assert ball.std() == pytest.approx(noise_hu, rel=0.35, abs=0.6)
    assert hu.min() >= AIR_HU
    assert max(copies.noise_hu) > 30


def boxes(*sizes: tuple[slice, ...]) -> np.ndarray:
    mask = np.zeros((20, 20, 20), bool)
    for size in sizes:
        mask[size] = True
    return mask


def test_lesions_of_volumes_by_hand() -> None:
    true = boxes(np.s_[0:2, 0:2, 0:2], np.s_[10:14, 10:14, 10:14], np.s_[18:20, 18:20, 18:20])
    # Half of the first, the second with a layer more, which a second part touches by a corner; and
    # something where nothing is.
    drawn = boxes(np.s_[0:1, 0:2, 0:2], np.s_[10:15, 10:14, 10:14], np.s_[0:2, 18:20, 0:2])
    assert lesions_found(drawn, true) == (3, 2)
    # Balls of 8 voxels measure 2.48 voxels, of 64 voxels 4.96.
    for pixel_mm, small, large in ((1.0, 0, 0), (1.5, 0, 1), (3.0, 1, 2), (3.3, 2, 3)):
        expected = np.zeros((3, 4))
        expected[:, small] += (2, 1, 2 * 4 / (8 + 4))
        expected[:, large] += (1, 1, 2 * 64 / (64 + 80))
        np.testing.assert_allclose(lesions_by_size(drawn, true, pixel_mm), expected)
    assert not lesions_by_size(drawn, np.zeros_like(true), 1.0).any()


def test_figures_of_volumes_by_hand() -> None:
    real = toy_volumes(3, each=1, side=20)
    layout = np.zeros_like(real.layout)
    layout[0, :2, :2, :2] = Label.NODULE
    layout[1, :4, :4, :4] = layout[1, 10:12, 10:12, 10:12] = Label.NODULE
    masks = np.zeros(layout.shape, bool)
    masks[0, :1, :2, :2] = True
    masks[1, :4, :4, :4] = True
    masks[2, :2, :2, :5] = True
    examples = replace(real, layout=layout, pixel_mm=np.full(3, 1.5, np.float32))
    found = compared(masks, examples) | {"patient": np.arange(3)}
    figures = segmentation_figures(found, np.ones(3))
    # The third volume shows nothing: it has specificity alone.
    dice = 2 * 4 / 12, 2 * 64 / (72 + 64)
    assert figures["dice"] == pytest.approx(np.mean(dice))
    assert figures["voxel_sensitivity"] == pytest.approx((4 / 8 + 64 / 72) / 2)
    assert figures["voxel_specificity"] == pytest.approx((2 + (8000 - 20) / 8000) / 3)
    assert figures["lesion_sensitivity"] == pytest.approx(2 / 3)
    assert figures["lesion_dice"] == pytest.approx((dice[0] + 1 + 0) / 3)
    assert figures["lesion_dice_below_6"] == pytest.approx(dice[0] / 2)
    assert figures["lesion_sensitivity_below_6"] == 0.5
    assert figures["lesion_dice_6_to_8"] == figures["lesion_sensitivity_6_to_8"] == 1
    assert np.isnan([figures["lesion_dice_8_to_15"], figures["lesion_sensitivity_15_up"]]).all()
    # A patient drawn twice counts twice, one that is not drawn not at all.
    weighed = segmentation_figures(found, np.array([0.0, 2.0, 1.0]))
    assert weighed["dice"] == pytest.approx(dice[1])
    assert weighed["lesion_sensitivity"] == 0.5
    assert weighed["lesion_dice_below_6"] == 0
    assert weighed["voxel_specificity"] == pytest.approx((2 + (8000 - 20) / 8000) / 3)


def test_a_perfect_mask_is_perfect_and_none_is_nothing() -> None:
    real = toy_volumes(3)
    true = real.layout == Label.NODULE

    def figures(masks: np.ndarray) -> list[float]:
        found: Table = compared(masks, real) | {"patient": np.arange(3)}
        return [one for one in segmentation_figures(found, np.ones(3)).values() if one == one]

    assert set(figures(true)) == {1.0}
    # Only specificity has a good word for an empty mask.
    assert sorted(set(figures(np.zeros_like(true)))) == [0.0, 1.0]


def test_volumes_around_the_lungs_show_nodules_though_cut_for_none() -> None:
    real = toy_volumes(4)
    assert real.showing.tolist() == [True] * 4
    layout = real.layout.copy()
    layout[:2] = Label.LEFT_LUNG
    with pytest.raises(InputError, match="folds 3, but 2 patients with a nodule"):
        make_folds(replace(real, layout=layout), 3, seed=0)


def test_no_fold_is_taught_by_those_who_test() -> None:
    real, drawn = toy_volumes(12, each=2), toy_volumes(60, seed=3)
    lender = np.array([NOBODY, "p0", "p5", "p9"])[np.arange(60) % 4]
    drawn = replace(drawn, patient=lender, held_out=np.zeros(60, bool))
    folds = make_folds(real, CONFIG.folds, seed=0)
    assert sorted(key for fold in folds for key in fold.test) == sorted(set(real.patient.tolist()))
    for fold in folds:
        arms = plan_arms("segmentation", real, {"drawn": drawn}, fold, CONFIG, seed=0)
        assert [arm.name for arm in arms] == [
            "real", "+ drawn x0.5", "+ drawn x1", "duplicated", "augmented",
        ]  # fmt: skip
        for arm in arms:
            teachers = {*real.patient[arm.real].tolist(), *drawn.patient[arm.synthetic].tolist()}
            assert not teachers & fold.test
    held_out = real.held_out.copy()
    held_out[0] = False  # one volume of a patient whose other is held out
    (where,) = (fold for fold in folds if "p0" in fold.test)
    with pytest.raises(InputError, match="patients of the generator too, p0"):
        plan_arms(
            "segmentation", replace(real, held_out=held_out), {"drawn": drawn}, where, CONFIG, 0
        )


def test_lesions_by_size_have_a_table_of_their_own() -> None:
    metrics = {
        name: Metric(0.5, 0.1, [0.4, 0.6])
        for name in ("dice", "voxel_specificity", "lesion_dice_below_6", "lesion_sensitivity_15_up")
    }
    arms = {"real": ArmResult(4, 0, 10, metrics)}
    assert table(arms, "dice")[0][:5] == [
        "arm", "real", "synthetic", "dice", "specificity of voxels",
    ]  # fmt: skip
    assert table_by_size(arms) == [
        ["arm", "dice of lesions, below 6 mm", "lesions found, 15 mm and more"],
        ["real", "50.00 ± 10.00", "50.00 ± 10.00"],
    ]


NUM_PATIENTS, NUM_TRAINING, NUM_DRAWN = 5, 1, 40

SHARED = {"kind": "patches", "intensity": "hu", "parent_snapshot": "none"}

RECIPE = """
work_dir: {work_dir}
data:
  source:
    kind: phantom
    num_patients: 5
    spacing_mm: [10.0, 6.0, 6.0]
    nodules_per_patient: [2, 3]
    min_diameter_mm: 20
  samples: {{kind: patches, name: cubes, size: 16, field_of_view_mm: 96, random_per_case: 1}}
model:
  family: layout_diffusion
  channels: [8, 16]
  attention_levels: [false, false]
  num_head_channels: [8, 16]
  norm_num_groups: 8
downstream:
  tasks: [segmentation]
  folds: 2
  ratios: [0.5]
  augmented_copies: 1
  steps: 2
  batch_size: 4
  width: 4
  num_bootstrap: 20
"""


def _write_real(root: zarr.Group, config: ExperimentConfig) -> None:
    """Some patients to train on, and others who are held out."""
    samples = config.samples
    assert isinstance(samples, PatchSamples)
    cut, index, cases = [], [], []
    for number in range(NUM_PATIENTS):
        split = "train" if number < NUM_TRAINING else "test"
        case = phantom_case(config.data.source, number, split)
        write_volume(create_volume(root, case), case)
        plans = plan_patches(case_attrs(root, case.case_id), samples)
        cut.append(cut_patches(case, plans, samples))
        index += [(number, plan.nodule, SPLITS.index(split)) for plan in plans]
        cases.append(case.case_id)
    columns = dict(zip(("case", "nodule", "split"), zip(*index, strict=True), strict=True))
    hu, layout, box, ratings, middle_mm = (
        np.concatenate([getattr(one, name) for one in cut])
        for name in ("hu", "layout", "box", "ratings", "middle_mm")
    )
    attributes = SHARED | {
        "cases": cases,
        "pixel_mm": samples.pixel_mm,
        "fingerprint": "f" * 12,
        "settings": samples.settings(),
        "spacing_mm": samples.spacing_mm,
        "field_of_view_mm": samples.field_of_view_mm,
    }
    spec = sample_set(len(hu), hu.shape[1:])
    group = create_sample_set(root, f"samples/{samples.name}", spec, attributes)
    shown = {"has_nodule": (layout == Label.NODULE).any(axis=(1, 2, 3)), "middle_mm": middle_mm}
    set_index(group, columns | {"box": box, "ratings": ratings} | shown)
    write_rows(group, 0, {"hu": hu, "layout": layout})


def _write_run(root: zarr.Group, bundle: str) -> None:
    """A `model` that repeats its training patients; all but the lungs is copied from them."""
    real = SampleSet(open_group(root, "samples/cubes"))
    rows = np.resize(np.flatnonzero(real.index["split"] == 0), NUM_DRAWN)
    attributes = SHARED | {
        "cases": real.attrs["cases"],
        "pixel_mm": real.pixel_mm,
        "bundle": bundle,
        "plan": "p" * 12,
        "source_set": "cubes",
        "passport": {"sampling": {"num_inference_steps": 50}},
    }
    group = create_sample_set(
        root, "synthetic/tiny", synthetic_run(NUM_DRAWN, real.shape), attributes
    )
    columns = {
        "box": real.index["box"][rows],
        "source_sample": rows,
        "source_case": real.index["case"][rows],
        "copied_fraction": np.full(NUM_DRAWN, 0.8, np.float32),
        "attributes": real.index["ratings"][rows, 0][:, CONDITION_COLUMNS],
        "accepted": np.arange(NUM_DRAWN) % 2,
    }
    set_index(group, columns)
    write_rows(group, 0, {"hu": real.read("hu")[rows], "layout": real.read("layout")[rows]})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a store of volumes, a bundle and a synthetic run."""
    folder = tmp_path_factory.mktemp("volumes")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(work_dir=folder / "run"))
    config = load_recipe(path)
    with StoreRun(config.store_url, verb="test", fingerprint="a" * 12) as run:
        run.declare(lambda root: _write_real(root, config), "real")
        snapshot = run.publish("patients")
    facts = BundleFacts(
        model=config.model,
        samples=config.samples,
        intensity="hu",
        sources=("phantom",),
        snapshot=snapshot,
        patients={"train": NUM_TRAINING, "test": NUM_PATIENTS - NUM_TRAINING},
        indicative=True,
        seen_samples=8,
    )
    digest = save_bundle(config.bundle_path, facts, denoiser={})
    with StoreRun(config.store_url, verb="test", fingerprint="b" * 12) as run:
        run.declare(lambda root: _write_run(root, digest), "drawn")
        run.publish("a run")
    return path


def test_cubes_of_a_store_are_read_one_by_one(recipe: Path) -> None:
    config = load_recipe(recipe)
    root = open_root(config.store_url)
    real = read_real(root, SampleSet(open_group(root, "samples/cubes")), taught(config))
    assert real.spatial_dims == 3
    assert real.box.shape == (len(real), 6)
    assert set(real.pixel_mm.tolist()) == {6.0}
    assert len(set(real.plane.tolist())) == len(real)
    assert real.showing[real.boxed].all()
    assert (real.side[real.boxed] >= 2).all()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_recipe_of_volumes_is_put_to_the_trial(recipe: Path) -> None:
    assert main(["downstream", str(recipe)]) == 0
    folder = recipe.parent / "run" / "evaluation"
    found = json.loads((folder / "tiny_downstream.json").read_text())
    (result,) = found["tasks"].values()
    assert list(result["arms"]) == ["real", "+ synthetic x0.5", "duplicated", "augmented"]
    for arm in result["arms"].values():
        assert arm["steps"] == 2
        assert {"dice", "lesion_dice_15_up", "voxel_specificity"} < set(arm["metrics"])
        assert all(len(metric["folds"]) == 2 for metric in arm["metrics"].values())
    real, augmented = (result["arms"][name]["real"] for name in ("real", "augmented"))
    assert augmented == 2 * real
    assert sum(found["folds"]) == found["patients"]["held_out"] == NUM_PATIENTS - NUM_TRAINING
    # Layouts are lent by training patients, who never test.
    assert found["excluded"] == {"synthetic": [0, 0]}
    page = (folder / "tiny_downstream.html").read_text()
    assert page.count("<table>") == 2
    assert "lesions found, 15 mm and more" in page


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "downstream.tasks=[classification, malignancy, segmentation]",
            r"tasks classification, malignancy: .* set downstream\.tasks=\[segmentation\]",
        ),
        ("downstream.tasks=[localisation]", r"tasks localisation: these networks see slices"),
        ("downstream.folds=9", r"folds 9, but \d patients with a nodule"),
        ("downstream.ratios=[50]", r"ratios 50 wants \d+ samples of synthetic"),
    ],
)
def test_what_volumes_cannot_be_tried_by_is_refused(
    recipe: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        downstream(load_recipe(recipe, [override]))


def test_patients_who_taught_the_generator_may_not_be_held_out_now(recipe: Path) -> None:
    config = load_recipe(recipe)
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, "samples/cubes"))
    everybody = frozenset(read_real(root, samples, frozenset()).patient.tolist())
    with pytest.raises(InputError, match="4 patients who are held out now were among the gen"):
        read_real(root, samples, everybody)
