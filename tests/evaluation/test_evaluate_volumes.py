"""The whole evaluation on stores of phantoms cut into volumes, with `models` of known quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from raysynth.case import CONDITION_COLUMNS
from raysynth.config import ExperimentConfig
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.errors import InputError
from raysynth.evaluation.evaluate import EvaluationSummary, evaluate
from raysynth.evaluation.judge import GROUPS, OVERLAP
from raysynth.layout.holes import labels_of, organ_hole
from raysynth.store.reader import SampleSet
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import SPLITS, synthetic_run

pytestmark = pytest.mark.ray

MADE_OF = labels_of(("lung", "nodule"))


def _config(
    work_dir: Path,
    samples: dict[str, Any],
    model: dict[str, Any],
    num_patients: int,
    spacing_mm: tuple[float, float, float],
) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "work_dir": work_dir,
            "data": {
                "source": {
                    "kind": "phantom",
                    "num_patients": num_patients,
                    "spacing_mm": spacing_mm,
                    "nodules_per_patient": (3, 4),
                    "min_diameter_mm": 14,
                },
                "split": {"val": 0.0, "test": 0.5},
                "samples": {"kind": "patches", **samples},
            },
            "model": model,
            "evaluation": {"num_bootstrap": 20},
        }
    )


DIFFUSION = {
    "family": "layout_diffusion",
    "channels": (8, 8),
    "attention_levels": (False, False),
    "norm_num_groups": 4,
}
GAN = {"family": "layout_gan"}
AROUND_NODULES = {"size": 20, "field_of_view_mm": 80.0, "patches_per_nodule": 2}
WHOLE = {"size": 32, "field_of_view_mm": 320.0, "centre": "lungs"}


def _write_run(root: zarr.Group, name: str, hu: np.ndarray, asked: dict[str, Any]) -> None:
    attributes = {
        "kind": "patches",
        "intensity": "hu",
        "parent_snapshot": "none",
        "cases": asked["cases"],
        "pixel_mm": asked["pixel_mm"],
        "bundle": "b" * 64,
        "plan": "p" * 12,
        "source_set": "patches",
        "passport": {},
    }
    spec = synthetic_run(len(hu), hu.shape[1:])
    group = create_sample_set(root, f"synthetic/{name}", spec, attributes)
    hole = organ_hole(asked["layout"], MADE_OF)
    set_index(
        group,
        {
            "box": asked["box"],
            "source_case": asked["case"],
            "source_sample": asked["rows"],
            "attributes": asked["attributes"],
            "draws": np.ones(len(hu)),
            "copied_fraction": 1 - hole.mean((1, 2, 3)),
        },
    )
    write_rows(group, 0, {"hu": hu, "layout": asked["layout"]})


def _write_runs(root: zarr.Group, config: ExperimentConfig) -> None:
    """A good `model` adds noise to its hosts; controls are noise, another's, and a constant."""
    real = SampleSet(root[f"samples/{config.data.samples.name}"])
    rows = np.flatnonzero(real.index["split"] == SPLITS.index("test"))
    hosts, layout = real.read("hu")[rows], real.read("layout")[rows]
    asked = {
        "rows": rows,
        "cases": real.attrs["cases"],
        "pixel_mm": real.pixel_mm,
        "layout": layout,
        "box": real.index["box"][rows],
        "case": real.index["case"][rows],
        "attributes": real.index["ratings"][rows, 0][:, CONDITION_COLUMNS],
    }
    hole = organ_hole(layout, MADE_OF)
    rng = np.random.default_rng(0)
    drawn = {
        config.name: np.clip(hosts + 10 * rng.choice([-1, 1], hosts.shape), -1000, 400),
        f"{config.name}_untrained": rng.integers(-1000, 400, hosts.shape),
        f"{config.name}_shuffled": np.roll(hosts, len(hosts) // 2, axis=0),
        f"{config.name}_constant": np.full(hosts.shape, -850),
    }
    for name, hu in drawn.items():
        kept = np.where(hole, hu, hosts) if config.copies else hu
        _write_run(root, name, kept.astype(np.int16), asked)


def _store(config: ExperimentConfig) -> ExperimentConfig:
    ingest(config)
    shard(config)
    with StoreRun(config.store_url, verb="test", fingerprint="f" * 12) as run:
        run.declare(lambda root: _write_runs(root, config), "runs")
        run.publish("a store to judge")
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> ExperimentConfig:
    folder = tmp_path_factory.mktemp("volumes")
    return _store(_config(folder, AROUND_NODULES, DIFFUSION, 8, (6.0, 4.0, 4.0)))


@pytest.fixture(scope="module")
def summary(config: ExperimentConfig) -> EvaluationSummary:
    return evaluate(config)


def test_every_region_has_every_metric_under_keys_of_volumes(summary: EvaluationSummary) -> None:
    measured = {tuple(key.split("/")[:4]) for key in summary.metrics}
    distances = {
        (metric, "volume", region, "ct-conv3d@1")
        for metric in ("fid", "kid", "mmd2", "mmd2_fixed", *OVERLAP)
        for region in ("all", "generated", "generated_lung", "nodule16")
    }
    tissues = {("hu_w1", "volume", name, "histogram@1") for name in ("lung", "body", "nodule")}
    radiomics = {
        (metric, "volume", "nodule", "radiomics3d@1") for metric in ("fid", *GROUPS["radiomics"])
    }
    # Features that do not vary among a dozen real nodules have no figure.
    assert distances | tissues < measured <= distances | tissues | radiomics
    assert {key[3] for key in measured} >= {"radiomics3d@1"}


def test_what_was_made_tells_models_from_controls(summary: EvaluationSummary) -> None:
    for region in ("generated", "generated_lung", "nodule16"):
        (found,) = (one for key, one in summary.metrics.items() if f"kid/volume/{region}/" in key)
        assert set(found.columns) == {
            *("untrained", "shuffled", "constant", "copy_paste"),
            *({"floor"} & found.columns.keys()),
        }
        assert found.value < found.columns["untrained"].value
        assert found.value < found.columns["constant"].value


def test_errors_against_hosts_have_their_closed_forms(summary: EvaluationSummary) -> None:
    fill = summary.fills["synthetic"]
    assert (fill.changed, fill.errors["outside"].mse_hu2) == (0, 0)
    made = 1 - fill.copied_fraction
    # Ten HU everywhere, but where the window ends.
    assert fill.errors["inside"].mse_hu2 == pytest.approx(100, rel=0.15)
    assert fill.errors["whole"].mse_hu2 == pytest.approx(made * fill.errors["inside"].mse_hu2)
    assert fill.errors["inside"].mse == pytest.approx(
        fill.errors["inside"].mse_hu2 * (2 / 1400) ** 2
    )
    assert set(summary.fills) == {"synthetic", "untrained", "shuffled", "constant"}
    assert all(one.changed == 0 for one in summary.fills.values())
    assert summary.fills["constant"].errors["inside"].mse > fill.errors["inside"].mse
    assert any("are its host's own pixels" in notice for notice in summary.notices)


def test_nodules_are_looked_for_in_their_cubes(summary: EvaluationSummary) -> None:
    found = {name: share.found or 0.0 for name, share in summary.adherence.items()}
    assert min(found["real"], found["synthetic"]) > 0.6
    assert max(found["untrained"], found["constant"]) < 0.2
    error_mm = summary.sizes["synthetic"].median_absolute_error_mm
    assert error_mm is not None
    assert error_mm < 6.0  # one voxel and a half: the nodules measure three or four
    assert {"diameter_mm", "lung", "zone"} <= {one.factor for one in summary.strata}
    answered = {tuple(key.split("/")[1:3]) for key in summary.sensitivity}
    assert ("volume", "generated") in answered


def test_extractors_of_slices_are_refused(config: ExperimentConfig) -> None:
    module = f"module:{__name__}:OfSlices"
    evaluation = config.evaluation.model_copy(update={"extractors": (module,)})
    with pytest.raises(InputError, match=r"takes slices, and samples are volumes: leave it out"):
        evaluate(config.model_copy(update={"evaluation": evaluation}))


class OfSlices:
    name, dim, spatial_dims = "own@1", 1, 2

    def __call__(self, hu: np.ndarray) -> np.ndarray:
        raise AssertionError("it is never asked")


def test_whole_volumes_that_were_drawn_are_judged_as_wholes(
    tmp_path: Path, local_ray: None
) -> None:
    config = _store(_config(tmp_path, WHOLE, GAN, 24, (12.0, 8.0, 8.0)))
    real = SampleSet(open_root(config.store_url)["samples/patches"])
    assert (real.index["box"] == -1).all()
    summary = evaluate(config)
    regions = {key.split("/")[2] for key in summary.metrics}
    assert regions >= {"all", "generated_lung", "nodule16"}
    assert "generated" not in regions
    # No cube is aimed at a nodule, but layouts show some.
    assert summary.adherence["synthetic"].n > 0
    fill = summary.fills["synthetic"]
    assert (fill.changed, fill.known, fill.seam, fill.copied_fraction) == (None, None, None, 0)
    assert fill.errors["outside"].mse_hu2 > 0
