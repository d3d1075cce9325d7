"""The whole evaluation on a store of phantoms, with `models` whose quality is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from raysynth.case import CONDITION_COLUMNS, Split
from raysynth.config import ExperimentConfig, ExtractorConfig
from raysynth.config.evaluation import LpipsConfig
from raysynth.errors import InputError
from raysynth.evaluation.evaluate import EvaluationSummary, evaluate
from raysynth.evaluation.judge import GROUPS, OVERLAP
from raysynth.evaluation.sweep_report import sweep_section
from raysynth.phantom.patient import phantom_case
from raysynth.preprocess.slices import cut_slices, plan_slices
from raysynth.store.reader import SampleSet, case_attrs
from raysynth.store.run import StoreRun
from raysynth.store.writer import (
    create_sample_set,
    create_volume,
    set_index,
    write_rows,
    write_volume,
)
from raysynth.volume import RELATIVE_RANGE
from raysynth.window import LUNG_WINDOW_HU, denormalize, normalize
from storage_schema.v1 import SPLITS, sample_set, synthetic_run
from tests.metrics.test_domain import save_extractor

pytestmark = pytest.mark.ray

NUM_PATIENTS = 4
SHARED = {"kind": "slices", "intensity": "hu", "parent_snapshot": "none"}


def _config(work_dir: Path) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "work_dir": work_dir,
            "data": {
                "source": {
                    "kind": "phantom",
                    "num_patients": NUM_PATIENTS,
                    "spacing_mm": (10.0, 6.0, 6.0),
                    "nodules_per_patient": (5, 7),
                    "min_diameter_mm": 20,
                },
                "samples": {"size": 48, "spacing_mm": 5.0, "nodule_free_every": 2},
            },
            "model": {"family": "latent_diffusion", "autoencoder": "none"},
            "evaluation": {
                "num_bootstrap": 30,
                "guidance_scales": (1.0, 3.0, 8.0),
                "num_pairs": 99,
            },
        }
    )


def _write_real(root: zarr.Group, config: ExperimentConfig) -> None:
    """Two patients to test, two to train, and all their slices."""
    samples = config.data.samples
    cut, index, cases = [], [], []
    for number in range(NUM_PATIENTS):
        split: Split = "test" if number < 2 else "train"
        case = phantom_case(config.data.source, number, split)
        write_volume(create_volume(root, case), case)
        plans = plan_slices(case_attrs(root, case.case_id), samples)
        cut.append(cut_slices(case, plans, samples))
        index += [(number, plan.z_mm, plan.nodule, SPLITS.index(split)) for plan in plans]
        cases.append(case.case_id)
    columns = dict(zip(("case", "z_mm", "nodule", "split"), zip(*index, strict=True), strict=True))
    hu, layout, box, ratings = (
        np.concatenate([getattr(one, name) for one in cut])
        for name in ("hu", "layout", "box", "ratings")
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
    set_index(group, columns | {"box": box, "ratings": ratings, "has_nodule": box[:, 0] >= 0})
    write_rows(group, 0, {"hu": hu, "layout": layout})


def _write_synthetic(root: zarr.Group, name: str, hu: np.ndarray, asked: dict[str, Any]) -> None:
    attributes = SHARED | {
        "cases": asked["cases"],
        "pixel_mm": asked["pixel_mm"],
        "bundle": "b" * 64,
        "plan": "p" * 12,
        "source_set": "slices",
        "passport": {},
    }
    spec = synthetic_run(len(hu), hu.shape[1:])
    group = create_sample_set(root, f"synthetic/{name}", spec, attributes)
    set_index(
        group,
        {
            "box": asked["box"],
            "source_case": asked["case"],
            "source_sample": asked["rows"],
            "attributes": asked["attributes"],
            "draws": np.ones(len(hu)),
        },
    )
    write_rows(group, 0, {"hu": hu, "layout": asked["layout"]})


def _write_runs(root: zarr.Group, config: ExperimentConfig) -> None:
    """A perfect `model` repeats training patients; one control is noise, one ignores requests."""
    real = SampleSet(root[f"samples/{config.data.samples.name}"])
    rows = np.flatnonzero((real.index["split"] == 0) & (real.index["box"][:, 0] >= 0))
    hu = real.read("hu")[rows]
    asked = {
        "rows": rows,
        "cases": real.attrs["cases"],
        "pixel_mm": real.pixel_mm,
        "layout": real.read("layout")[rows],
        "box": real.index["box"][rows],
        "case": real.index["case"][rows],
        "attributes": real.index["ratings"][rows, 0][:, CONDITION_COLUMNS],
    }
    rng = np.random.default_rng(0)
    _write_synthetic(root, config.name, hu, asked)
    noise = rng.integers(-1000, 400, hu.shape).astype(np.int16)
    _write_synthetic(root, f"{config.name}_untrained", noise, asked)
    others = np.roll(hu, len(hu) // 2, axis=0)
    _write_synthetic(root, f"{config.name}_shuffled", others, asked)
    _write_swept(root, config, hu, asked)


def _write_swept(
    root: zarr.Group, config: ExperimentConfig, hu: np.ndarray, asked: dict[str, Any]
) -> None:
    """Two of each request: ignored and coarse at 1, as asked for at 3, all alike at 8."""
    per_sample = {"rows", "layout", "box", "case", "attributes"}
    twice = {
        name: np.repeat(part, 2, axis=0) if name in per_sample else part
        for name, part in asked.items()
    }
    rng = np.random.default_rng(1)
    noisy = np.repeat(hu, 2, axis=0) + rng.normal(0, 60, (2 * len(hu), *hu.shape[1:]))
    ignored = rng.permutation(noisy) + rng.normal(0, 200, noisy.shape)
    alike = np.repeat(noisy[:1], len(noisy), axis=0)
    for scale, images in ((1, ignored), (3, noisy), (8, alike)):
        _write_synthetic(root, config.swept_name(scale), images.astype(np.int16), twice)
    _write_synthetic(root, config.pairs_name, noisy.astype(np.int16), twice)


def _write_greys(root: zarr.Group) -> None:
    """The same real and synthetic slices as grey values that have no unit."""
    real = ("case", "z_mm", "nodule", "split", "box", "ratings", "has_nodule")
    asked = ("box", "source_case", "source_sample", "attributes", "draws")
    for path, of_kind, columns in (
        ("samples/slices", sample_set, real),
        ("synthetic/tiny", synthetic_run, asked),
    ):
        source = SampleSet(root[path])
        spec = of_kind(source.count, source.shape)
        attributes = source.attrs | {"intensity": "relative"}
        group = create_sample_set(root, f"{path.partition('/')[0]}/greys", spec, attributes)
        set_index(group, {name: source.index[name] for name in columns})
        greys = denormalize(normalize(source.read("hu"), LUNG_WINDOW_HU), RELATIVE_RANGE)
        write_rows(group, 0, {"hu": greys, "layout": source.read("layout")})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    config = _config(tmp_path_factory.mktemp("evaluation"))
    with StoreRun(config.store_url, verb="test", fingerprint="f" * 12) as run:
        run.declare(lambda root: _write_real(root, config), "real")
        run.commit([], ["runs"], "synthetic", lambda root: _write_runs(root, config))
        run.commit([], ["greys"], "greys", _write_greys)
        run.publish("a store to judge")
    return config


@pytest.fixture(scope="module")
def summary(config: ExperimentConfig, local_ray: None) -> EvaluationSummary:
    return evaluate(config)


def test_every_region_has_every_metric(summary: EvaluationSummary) -> None:
    measured = {tuple(key.split("/")[i] for i in (0, 2, 3)) for key in summary.metrics}
    distances = {
        (metric, region, "ct-conv@1")
        for metric in ("fid", "kid", "mmd2", "mmd2_fixed", *OVERLAP)
        for region in ("all", "lung", "nodule16")
    }
    tissues = {("hu_w1", tissue, "histogram@1") for tissue in ("lung", "body", "nodule")}
    radiomics = {(metric, "nodule", "radiomics@1") for metric in ("fid", *GROUPS["radiomics"])}
    assert measured == distances | tissues | radiomics


def _of(summary: EvaluationSummary, start: str) -> Any:
    found = [one for key, one in summary.metrics.items() if key.startswith(start)]
    (full,) = [one for one in found if "untrained" in one.columns]
    return full


def test_the_perfect_model_is_near_the_floor_and_controls_are_not(
    summary: EvaluationSummary,
) -> None:
    everything = _of(summary, "kid/slice/all/")
    assert everything.value < 0.2 * everything.columns["untrained"].value
    assert everything.disjoint["untrained"]
    assert everything.columns["floor"].interval is not None
    # Shuffled requests change no slice as a whole, only what stands in the places asked for.
    assert everything.columns["shuffled"].value == pytest.approx(everything.value, rel=0.2)
    for place in ("kid/slice/lung/", "hu_w1/slice/nodule/"):
        one = _of(summary, place)
        assert one.value < 0.8 * one.columns["shuffled"].value, place
    nodule = _of(summary, "kid/slice/nodule16/")
    assert nodule.value < 0.5 * nodule.columns["untrained"].value


def test_figures_stand_beside_neighbours_and_pasted_nodules(summary: EvaluationSummary) -> None:
    beside = {
        name
        for key, one in summary.metrics.items()
        if "/all/ct-conv" in key
        for name in one.columns
    }
    assert beside == {"floor", "untrained", "shuffled", "neighbour", "copy_paste"}
    assert {"copy_paste", "floor"} < set(_of(summary, "kid/slice/nodule16/").columns)


def test_every_figure_says_what_it_is_worth(summary: EvaluationSummary) -> None:
    assert set(summary.standing.values()) == {"smoke test: phantoms"}
    answers = summary.sensitivity
    assert {key.split("/")[2] for key in answers} >= {"all", "lung"}
    for key in ("fid/slice/all/ct-conv@1", "kid/slice/all/ct-conv@1"):
        assert "shift" not in answers[key].blind_to, key


def test_strata_come_worst_first(summary: EvaluationSummary) -> None:
    assert {"diameter_mm", "texture", "lung", "zone"} <= {one.factor for one in summary.strata}
    values = [one.distance.value for one in summary.strata if one.distance is not None]
    assert values == sorted(values, reverse=True)
    asked = sum(one.synthetic for one in summary.strata if one.factor == "texture")
    assert asked == summary.adherence["synthetic"].n


def test_adherence_has_a_ceiling_and_a_floor(summary: EvaluationSummary) -> None:
    found = {name: share.found for name, share in summary.adherence.items()}
    assert set(found) == {
        name + suffix
        for name in ("real", "synthetic", "untrained", "shuffled")
        for suffix in ("", "_stray")
    }
    assert found["synthetic"] > 0.5
    assert found["real"] > 0.5
    for chance in ("real_stray", "synthetic_stray", "shuffled", "untrained"):
        assert found[chance] < 0.25, chance
    error_mm = summary.sizes["synthetic"].median_absolute_error_mm
    assert error_mm is not None
    assert error_mm < 7.5  # one pixel


def test_few_phantoms_are_said_to_be_few_phantoms(summary: EvaluationSummary) -> None:
    assert summary.indicative
    assert summary.patients == {"real": NUM_PATIENTS, "reference": 2}
    assert any("phantoms" in notice for notice in summary.notices)
    assert any("samples instead of patients" in notice for notice in summary.notices)
    assert sum(summary.coverage["texture"].requested) == pytest.approx(1)


def test_greys_without_a_unit_are_judged_under_another_key(
    config: ExperimentConfig, local_ray: None
) -> None:
    samples = config.slices.model_copy(update={"name": "greys"})
    data = config.data.model_copy(update={"samples": samples})
    evaluation = config.evaluation.model_copy(update={"guidance_scales": (), "num_pairs": 0})
    changes = {"name": "greys", "data": data, "evaluation": evaluation}
    greys = evaluate(config.model_copy(update=changes))
    places = {tuple(key.split("/")[2:4]) for key in greys.metrics}
    assert places == {
        *((region, "ct-conv-relative@1") for region in ("all", "lung", "nodule16")),
        ("nodule", "radiomics-relative@1"),
    }
    assert any("without a unit" in notice for notice in greys.notices)
    assert greys.adherence["real"].found is not None
    assert greys.adherence["real"].found > 0.5
    mixed = config.model_copy(update={"data": data})
    with pytest.raises(InputError, match="synthetic/tiny has intensity 'hu', samples/greys"):
        evaluate(mixed)


def test_a_bundle_of_the_store_may_judge(
    config: ExperimentConfig, local_ray: None, tmp_path: Path
) -> None:
    learned = ExtractorConfig(channels=(8, 16), feature_dim=6, window_hu=(-1000.0, 400.0))
    save_extractor(tmp_path / "bundles" / "features", learned)
    asked = {"extractors": ("bundle:bundles/features",), "guidance_scales": ()}
    evaluation = config.evaluation.model_copy(update=asked)
    place = {"work_dir": tmp_path, "store": config.store_url}
    config = config.model_copy(update={"evaluation": evaluation, **place}).absolute()
    judged = evaluate(config)
    (extractor,) = {key.split("/")[3] for key in judged.metrics} - {
        "histogram@1",
        "radiomics@1",
    }
    assert re.fullmatch(r"domain-features@[0-9a-f]{8}", extractor)
    for region in ("all", "lung", "nodule16"):
        distance = _of(judged, f"fid/slice/{region}/")
        assert distance.value < distance.columns["untrained"].value
    samples = config.slices.model_copy(update={"name": "greys"})
    data = config.data.model_copy(update={"samples": samples})
    with pytest.raises(InputError, match="features learned on intensity 'hu', the samples have"):
        evaluate(config.model_copy(update={"name": "greys", "data": data}))


def test_the_file_holds_the_summary(summary: EvaluationSummary) -> None:
    written = json.loads(Path(summary.path).read_text())
    key = next(iter(summary.metrics))
    assert written["metrics"][key]["value"] == summary.metrics[key].value
    assert written["adherence"]["real"]["found"] == summary.adherence["real"].found


def test_what_cannot_be_judged_is_said(config: ExperimentConfig) -> None:
    missing = config.model_copy(update={"name": "other"})
    with pytest.raises(InputError, match=r"no 'other' in /synthetic; there is: greys, tiny"):
        evaluate(missing)
    evaluation = config.evaluation.model_copy(update={"extractors": ("inception2048",)})
    with pytest.raises(InputError, match="weights-inception-2015"):
        evaluate(config.model_copy(update={"evaluation": evaluation}))


def test_requests_are_read_off_the_slices_that_follow_them(summary: EvaluationSummary) -> None:
    seen = summary.consistency
    assert set(seen) == {"real", "synthetic", "shuffled", "untrained"}
    # A dozen nodules: other scores than the texture happen to be alike where they are exchanged.
    texture = {name: agreements["texture"] for name, agreements in seen.items()}
    assert texture["synthetic"].interval[0] > 0.5
    assert texture["shuffled"].interval[1] < texture["synthetic"].interval[0]
    assert all(abs(agreement.kappa) < 0.25 for agreement in seen["untrained"].values())
    assert summary.reader_kappa["texture"] == pytest.approx(0.59, abs=0.01)


def test_a_sweep_takes_the_scale_that_follows_requests_and_varies(
    summary: EvaluationSummary,
) -> None:
    swept = summary.sweep
    assert swept is not None
    figures = {one.scale: {n: f.value for n, f in one.figures.items()} for one in swept.scales}
    assert list(figures) == [1, 3, 8]
    assert set(figures[3]) == {"fid", "kid", "ms_ssim", "kappa", "found"}
    assert figures[8]["ms_ssim"] > 0.99 > figures[3]["ms_ssim"] > figures[1]["ms_ssim"]
    assert min(figures[1]["kid"], figures[8]["kid"]) > figures[3]["kid"]
    assert figures[3]["kappa"] > figures[1]["kappa"]
    assert figures[3]["found"] > figures[1]["found"] + 0.2
    assert swept.chosen == 3
    assert swept.reference == "test"  # no patient is there to validate
    assert swept.keys["ms_ssim"].startswith("ms_ssim/slice/nodule16/1-scales@1/")
    # Neighbouring phantoms share no nodule: what they reach beside is the floor and the share.
    assert {"fid", "kid", "found", "kappa"} <= set(swept.patients)
    section = sweep_section(json.loads(Path(summary.path).read_text()), 1.0)
    assert section is not None
    assert "3 (chosen)" in [row[0] for row in section.table]
    assert any("chosen by the test patients" in sentence for sentence in section.sentences)


def test_samples_of_one_request_stand_beside_nodules_that_are_alike(
    summary: EvaluationSummary,
) -> None:
    ((key, of_sets),) = summary.diversity.items()
    assert key.startswith("ms_ssim/slice/nodule16/1-scales@1/")
    assert summary.sweep is not None
    assert of_sets["synthetic"].value == summary.sweep.scales[1].figures["ms_ssim"].value
    assert of_sets.get("patients") == summary.sweep.patients.get("ms_ssim")


def test_pairs_that_were_not_drawn_are_named(config: ExperimentConfig, local_ray: None) -> None:
    greys = config.model_copy(
        update={
            "name": "greys",
            "data": config.data.model_copy(
                update={"samples": config.slices.model_copy(update={"name": "greys"})}
            ),
            "evaluation": config.evaluation.model_copy(update={"guidance_scales": ()}),
        }
    )
    with pytest.raises(
        InputError, match="num_pairs 99, and the store has no synthetic/greys_pairs"
    ):
        evaluate(greys)


def test_files_that_lpips_lacks_are_named_first(config: ExperimentConfig, local_ray: None) -> None:
    files = LpipsConfig(backbone=config.work_dir / "alexnet.pth", heads=config.work_dir / "a.pth")
    evaluation = config.evaluation.model_copy(update={"lpips": files})
    with pytest.raises(
        InputError, match=r"LPIPS of alex needs the ImageNet weights .*alexnet\.pth"
    ):
        evaluate(config.model_copy(update={"evaluation": evaluation, "store": "/nowhere"}))


def test_a_scale_that_was_not_drawn_is_named(config: ExperimentConfig, local_ray: None) -> None:
    evaluation = config.evaluation.model_copy(update={"guidance_scales": (3.0, 5.0)})
    with pytest.raises(InputError, match="asks for 5, and the store has no synthetic/tiny_scale_5"):
        evaluate(config.model_copy(update={"evaluation": evaluation}))
