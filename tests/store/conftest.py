"""A small invented case, and a store with it, a sample set, its latents, and an audited run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from raysynth.case import Case, Label, Nodule
from raysynth.config import SliceSamples
from raysynth.store.run import StoreRun
from raysynth.store.writer import (
    create_sample_set,
    create_volume,
    set_index,
    write_rows,
    write_volume,
)
from raysynth.volume import Volume
from storage_schema.v1 import audit, latents, sample_set, synthetic_run

COUNT, SIZE = 130, 24
"""Two whole shards of samples, and two samples in the third."""

SET_ATTRIBUTES = {
    "kind": "slices",
    "pixel_mm": 1.5,
    "field_of_view_mm": 36.0,
    "spacing_mm": 0.7,
    "intensity": "hu",
    "fingerprint": "f" * 12,
    "settings": SliceSamples(size=SIZE, field_of_view_mm=36.0).settings(),
    "parent_snapshot": "none",
}
LATENT_ATTRIBUTES = {"latent_scale": 0.5, "bundle": "b" * 64, "parent_snapshot": "none"}


def invented_case(case_id: str = "case-a", split: str = "train", seed: int = 0) -> Case:
    """Noise with two boxes for lungs and one nodule, on an oblique anisotropic grid."""
    random = np.random.default_rng(seed)
    shape = (37, 40, 150)
    layout = np.full(shape, Label.BODY, np.uint8)
    layout[3:20, 5:30, 10:60] = Label.LEFT_LUNG
    layout[25:30, 5:30, 80:130] = Label.RIGHT_LUNG
    mask = random.random((3, 4, 5)) < 0.6
    layout[10:13, 12:16, 20:25][mask] = Label.NODULE
    ratings = ((5, 1, 6, 4, 4, 1, 1, 5, 3),) * 3
    direction = np.linalg.qr(random.normal(size=(3, 3)))[0]
    return Case(
        case_id=case_id,
        patient_key=f"patient-of-{case_id}",
        split=split,  # type: ignore[arg-type]
        volume=Volume(
            random.integers(-1024, 3072, shape, np.int16), (2.5, 0.7, 0.7), (-1.5, 2, 3), direction
        ),
        nodules=(Nodule((11.0, 13.5, 22.0), (10, 12, 20), mask, 7.25, ratings),),
        layout=layout,
        source={"format": "invented", "kvp": 120.0},
    )


def invented_samples(seed: int = 0) -> dict[str, np.ndarray]:
    """Compressible HU, and layouts."""
    random = np.random.default_rng(seed)
    hu = (random.integers(-10, 10, (COUNT, SIZE, SIZE)) * 50).astype(np.int16)
    hu[3] = -1000
    layout = random.integers(0, 6, (COUNT, SIZE, SIZE)).astype(np.uint8)
    return {"hu": hu, "layout": layout}


def invented_index() -> dict[str, np.ndarray]:
    """A column of every kind."""
    rows = np.arange(COUNT)
    return {
        "case": np.zeros(COUNT, int),
        "z_mm": rows * 0.5,
        "nodule": np.where(rows % 3, -1, 0),
        "diameter_mm": np.where(rows % 3, np.nan, 6.5),
        "box": np.where((rows % 3 == 0)[:, None], [2, 3, 12, 13], -1),
        "ratings": np.where((rows % 3 == 0)[:, None, None], 3, np.zeros((COUNT, 4, 9), int)),
        "has_nodule": rows % 3 == 0,
        "split": np.zeros(COUNT, int),
    }


def declare_samples(root: zarr.Group) -> None:
    """The groups `samples/slices` and `latents/slices/bundle`."""
    attributes = {**SET_ATTRIBUTES, "cases": ["case-a"]}
    group = create_sample_set(root, "samples/slices", sample_set(COUNT, (SIZE, SIZE)), attributes)
    set_index(group, invented_index())
    create_sample_set(root, "latents/slices/bundle", latents(COUNT, (2, 6, 6)), LATENT_ATTRIBUTES)


def draw_samples(root: zarr.Group) -> None:
    """The group `synthetic/run`, filled."""
    spec = synthetic_run(3, (SIZE, SIZE))
    attributes = {
        **{name: SET_ATTRIBUTES[name] for name in ("kind", "pixel_mm", "intensity")},
        "parent_snapshot": "none",
        "cases": ["case-a"],
        "bundle": "b" * 64,
        "plan": "p" * 12,
        "source_set": "slices",
        "passport": {"synthetic": True},
    }
    group = create_sample_set(root, "synthetic/run", spec, attributes)
    images = {name: rows[:3] for name, rows in invented_samples().items()}
    # Every column is 0; a box of no pixels would be none.
    columns = {a.name: np.zeros(a.shape, a.dtype) for a in spec.arrays if "/" in a.name}
    columns["index/box"] -= 1
    write_rows(group, 0, images | columns)


def audit_samples(root: zarr.Group) -> None:
    """The group `audits/run`, filled."""
    spec = audit(3)
    attributes = {
        "bundle": "b" * 64,
        "plan": "p" * 12,
        "source_set": "slices",
        "fingerprint": "a" * 12,
        "parent_snapshot": "none",
        "regions": ["nodule"],
        "thresholds": {"nodule": 2.0},
        "policy": {},
        "verdict": "passed",
        "findings": {},
    }
    group = create_sample_set(root, "audits/run", spec, attributes)
    columns = {array.name: np.zeros(array.shape, array.dtype) for array in spec.arrays}
    write_rows(group, 0, columns)


def invented_latents() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(COUNT, 2, 6, 6)).astype(np.float16)


def make_store(url: str) -> None:
    """The whole store, in one commit."""
    case = invented_case()

    def build(root: zarr.Group) -> None:
        write_volume(create_volume(root, case), case)
        declare_samples(root)
        write_rows(root["samples/slices"], 0, invented_samples())
        draw_samples(root)
        audit_samples(root)
        write_rows(root["latents/slices/bundle"], 0, {"latents": invented_latents()})

    with StoreRun(url, "make", "1") as run:
        run.declare(build, "Everything")
        run.publish("made")


@pytest.fixture(scope="session")
def read_only_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that no test may change (copy it first)."""
    path = tmp_path_factory.mktemp("stores") / "store"
    make_store(str(path))
    return str(path)


@pytest.fixture
def store(read_only_store: str, tmp_path: Path) -> str:
    """A store of the test's own."""
    import shutil

    return str(shutil.copytree(read_only_store, tmp_path / "store"))
