"""The whole audit on a store of phantoms, of runs whose copies are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from raysynth.case import Split
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.evaluation.audit import AuditSummary, audit
from raysynth.evaluation.intervals import Figure
from raysynth.evaluation.leaks import Side, leak_of
from raysynth.phantom.patient import phantom_case
from raysynth.preprocess.slices import cut_slices, plan_slices
from raysynth.store.reader import SampleSet, case_attrs
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.validate import validate
from raysynth.store.writer import (
    create_sample_set,
    create_volume,
    set_index,
    write_rows,
    write_volume,
)
from storage_schema.v1 import SPLITS, sample_set, synthetic_run

NUM_TRAIN, NUM_TEST, NUM_OTHERS = 4, 4, 2
SHARED = {"kind": "slices", "intensity": "hu", "parent_snapshot": "none"}


def _config(work_dir: Path, name: str, **audit_policy: object) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": name,
            "work_dir": work_dir,
            "data": {
                "source": {
                    "kind": "phantom",
                    "num_patients": NUM_TRAIN + NUM_TEST,
                    "spacing_mm": (10.0, 5.0, 5.0),
                    "nodules_per_patient": (4, 5),
                    "min_diameter_mm": 16,
                },
                "samples": {"size": 64, "spacing_mm": 5.0, "nodule_free_every": 4},
            },
            "model": {"family": "latent_diffusion", "autoencoder": "none"},
            "audit": {"num_bootstrap": 20, "false_alarms": 0.04} | audit_policy,
        }
    )


def _cut(root: zarr.Group | None, config: ExperimentConfig, number: int, split: Split) -> dict:
    """All slices of a phantom; it goes to the store if there is one."""
    samples = config.slices
    case = phantom_case(config.data.source, number, split)
    if root is None:
        with_attributes = zarr.group()
        group = create_volume(with_attributes, case)
        write_volume(group, case)
        attributes = case_attrs(with_attributes, case.case_id)
    else:
        write_volume(create_volume(root, case), case)
        attributes = case_attrs(root, case.case_id)
    plans = plan_slices(attributes, samples)
    cut = cut_slices(case, plans, samples)
    return {
        "hu": cut.hu,
        "layout": cut.layout,
        "box": cut.box,
        "ratings": cut.ratings,
        "case": np.full(len(plans), number),
        "z_mm": np.array([plan.z_mm for plan in plans]),
        "nodule": np.array([plan.nodule for plan in plans]),
        "split": np.full(len(plans), SPLITS.index(split)),
    }


def _stacked(parts: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(root: zarr.Group, path: str, values: dict[str, np.ndarray], more: dict) -> None:
    make = sample_set if path.startswith("samples") else synthetic_run
    spec = make(len(values["hu"]), values["hu"].shape[1:])
    group = create_sample_set(root, path, spec, SHARED | more)
    images = {name: values.pop(name) for name in ("hu", "layout")}
    blank = {
        array.name: np.zeros(array.shape, array.dtype)
        for array in spec.arrays
        if array.name not in images and array.name.removeprefix("index/") not in values
    }
    set_index(group, values)
    write_rows(group, 0, images | blank)


def _build(root: zarr.Group, config: ExperimentConfig) -> None:
    """A sample set, a run of other patients, and the same one with copies in it."""
    real = _stacked(
        [
            _cut(root, config, number, "train" if number < NUM_TRAIN else "test")
            for number in range(NUM_TRAIN + NUM_TEST)
        ]
    )
    samples = config.slices
    shared: dict[str, Any] = {
        "cases": sorted(name for name, _ in root["volumes"].groups()),
        "pixel_mm": samples.pixel_mm,
    }
    about = {
        "fingerprint": "f" * 12,
        "settings": samples.settings(),
        "spacing_mm": samples.spacing_mm,
        "field_of_view_mm": samples.field_of_view_mm,
    }
    others = _stacked(
        [_cut(None, config, NUM_TRAIN + NUM_TEST + n, "train") for n in range(NUM_OTHERS)]
    )
    drawn = {name: others[name] for name in ("hu", "layout", "box")}
    drawn |= {"source_case": np.full(len(drawn["hu"]), -1)}
    drawn |= {"source_sample": np.full(len(drawn["hu"]), -1)}
    drawn |= {"split": np.zeros(len(drawn["hu"])), "seed": np.arange(len(drawn["hu"]))}
    copied = {name: values.copy() for name, values in drawn.items()}
    rng = np.random.default_rng(0)
    learned = np.flatnonzero((real["split"] == 0) & (real["box"][:, 0] >= 0))
    rows = rng.choice(learned, 20, replace=False)
    place = np.flatnonzero(copied["box"][:, 0] >= 0)[:20]
    for name in ("hu", "layout", "box"):
        copied[name][place] = real[name][rows]
    copied["hu"][place[10:]] += rng.integers(-5, 6, copied["hu"][place[10:]].shape, np.int16)
    real["has_nodule"] = real["box"][:, 0] >= 0
    _write(root, f"samples/{samples.name}", dict(real), shared | about)
    of_run = {"bundle": "b" * 64, "source_set": samples.name, "passport": {"synthetic": True}}
    _write(root, "synthetic/honest", drawn, shared | of_run | {"plan": "honest"})
    _write(root, "synthetic/copying", copied, shared | of_run | {"plan": "copying"})


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    config = _config(folder, "honest")
    with StoreRun(config.store_url, "make", "1") as run:
        run.declare(lambda root: _build(root, config), "Everything")
        run.publish("made")
    return folder


@pytest.fixture(scope="module")
def honest(work_dir: Path) -> AuditSummary:
    return audit(_config(work_dir, "honest"))


@pytest.fixture(scope="module")
def copying(work_dir: Path, honest: AuditSummary) -> AuditSummary:
    return audit(_config(work_dir, "copying"))


@pytest.mark.slow
@pytest.mark.ray
def test_an_honest_run_passes(honest: AuditSummary, work_dir: Path) -> None:
    assert honest.verdict == "passed", honest.reasons
    assert set(honest.regions) == {"nodule", "slice"}
    assert sum(region["samples"] for region in honest.regions.values()) == honest.samples
    assert honest.flagged <= 0.1 * honest.samples
    assert honest.exact == 0
    assert any("held-out patients are few" in notice for notice in honest.notices)
    stored = json.loads(Path(honest.path).read_text())
    assert stored["verdict"] == "passed"


@pytest.mark.slow
@pytest.mark.ray
def test_copies_are_found_and_fail_the_run(copying: AuditSummary, work_dir: Path) -> None:
    assert copying.verdict == "failed"
    assert any("audit.max_exact" in reason for reason in copying.reasons)
    table = _table(work_dir, "copying")
    run = SampleSet(open_root(_config(work_dir, "copying").store_url)["synthetic/copying"])
    planted = np.flatnonzero(run.index["box"][:, 0] >= 0)[:20]
    assert table.index["flagged"][planted].all()
    assert table.index["exact"][planted].sum() >= 15
    assert (table.index["ncc"][planted] > 0.99).all()
    real = SampleSet(open_root(_config(work_dir, "copying").store_url)["samples/slices"])
    nearest = table.index["nearest_sample"][planted]
    assert (real.index["split"][nearest] == 0).all()
    same = (run.read("hu")[planted] == real.read("hu")[nearest]).all(axis=(1, 2))
    assert same[:10].sum() >= 9
    assert copying.regions["nodule"]["leaks"]["embedding"]["nearer_share"]["value"] > 0.5


@pytest.mark.slow
@pytest.mark.ray
def test_the_audit_lies_in_the_store_beside_the_run(
    copying: AuditSummary, honest: AuditSummary, work_dir: Path
) -> None:
    url = _config(work_dir, "honest").store_url
    assert validate(url, full=True) == []
    table = _table(work_dir, "honest")
    assert table.attrs["plan"] == "honest"
    assert table.attrs["policy"]["max_exact"] == 0
    assert set(table.attrs["thresholds"]) == {"nodule", "slice"}
    assert (table.index["nearest_sample"] >= 0).all()


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_command_again_reads_what_is_there(
    honest: AuditSummary, copying: AuditSummary, work_dir: Path
) -> None:
    before = open_root(_config(work_dir, "honest").store_url).attrs["last_run"]
    Path(honest.path).unlink()
    again = audit(_config(work_dir, "honest"))
    assert open_root(_config(work_dir, "honest").store_url).attrs["last_run"] == before
    assert again.regions == json.loads(json.dumps(honest.regions))
    assert Path(honest.path).exists()


@pytest.mark.slow
@pytest.mark.ray
def test_another_policy_replaces_the_audit(copying: AuditSummary, work_dir: Path) -> None:
    lenient = audit(_config(work_dir, "copying", max_copy_rate=0.5, max_exact=1000))
    assert lenient.verdict == "passed"
    assert lenient.flagged == copying.flagged
    assert _table(work_dir, "copying").attrs["policy"]["max_exact"] == 1000


@pytest.mark.slow
@pytest.mark.ray
def test_the_page_shows_pairs_and_says_whose_they_are(
    copying: AuditSummary, work_dir: Path
) -> None:
    page = Path(copying.page).read_text()
    assert Path(copying.page).is_relative_to(work_dir)
    assert "real patients" in page
    assert page.count("<img") == 36
    assert "correlation 1.000" in page


@pytest.mark.slow
@pytest.mark.ray
def test_too_few_held_out_samples_are_refused_by_number(work_dir: Path) -> None:
    with pytest.raises(InputError, match=r"held-out .* need 1000 of 4 at least"):
        audit(_config(work_dir, "honest", false_alarms=0.001))


@pytest.mark.slow
@pytest.mark.ray
def test_no_run_no_audit(work_dir: Path) -> None:
    with pytest.raises(InputError, match="the store has no 'nothing'"):
        audit(_config(work_dir, "nothing"))


def _table(work_dir: Path, name: str) -> SampleSet:
    return SampleSet(open_root(_config(work_dir, name).store_url)[f"audits/{name}"])


def _sides(gap: float, seed: int) -> tuple[Side, Side]:
    """Samples at random places; training items lie `gap` nearer."""
    rng = np.random.default_rng(seed)
    sides = []
    for nearer in (gap, 0.0):
        patient = np.repeat(np.arange(20), 5)
        table = rng.uniform(1, 2, (300, 100)) - nearer
        to_patient = table.reshape(300, 20, 5).min(axis=2)
        sides.append(Side(to_patient, table.min(axis=0), patient))
    return sides[0], sides[1]


def test_no_leak_is_half() -> None:
    found = leak_of(*_sides(0.0, 0), 200, seed=0)
    for figure, truth in ((found.nearer_share, 0.5), (found.auc, 0.5), (found.ratio_median, 1.0)):
        assert isinstance(figure, Figure)
        assert figure.interval is not None
        assert figure.interval[0] <= truth <= figure.interval[1]
        assert figure.value == pytest.approx(truth, abs=0.1)


def test_a_leak_shows_in_every_figure() -> None:
    found = leak_of(*_sides(0.5, 0), 200, seed=0)
    assert found.nearer_share.value > 0.95
    assert found.auc.value > 0.95
    assert found.ratio_median.value < 0.7
    assert found.ratio_low.value <= found.ratio_median.value
