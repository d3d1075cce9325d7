"""A store of noise: real samples of two splits, a run that fits them, and one that does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from raysynth.config import ExperimentConfig
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import SPLITS, sample_set, synthetic_run

RUN, SMALL_RUN = "shown", "small"
NUM_TRAIN, NUM_TEST, NUM_DRAWN = 20, 40, 36
SLICES_OF_A_CASE = 5


def make_store(config: ExperimentConfig) -> None:
    """Fills the recipe's store."""
    with StoreRun(config.store_url, "make", "1") as run:
        run.declare(lambda root: _fill(root, config), "Everything")
        run.publish("made")


def _fill(root: zarr.Group, config: ExperimentConfig) -> None:
    samples, rng = config.samples, np.random.default_rng(0)
    count, size = NUM_TRAIN + NUM_TEST, samples.shape[0]
    shared = {
        "kind": "slices",
        "intensity": "hu",
        "parent_snapshot": "none",
        "cases": [f"case-{number:02d}" for number in range(count // SLICES_OF_A_CASE)],
        "pixel_mm": samples.pixel_mm,
    }
    about = {
        "fingerprint": "f" * 12,
        "settings": samples.settings(),
        "spacing_mm": samples.spacing_mm,
        "field_of_view_mm": samples.field_of_view_mm,
    }
    rows = np.arange(count)
    has_nodule = rows % 2 == 0
    ratings = np.zeros((count, 4, 9), np.uint8)
    ratings[has_nodule, :3] = rng.integers(1, 6, (int(has_nodule.sum()), 3, 9))
    real = {
        # Scanners pad with -2048, and metal is dense.
        "hu": rng.integers(-2048, 3072, (count, size, size), np.int16),
        "case": rows // SLICES_OF_A_CASE,
        "split": np.where(
            np.arange(count) < NUM_TRAIN, SPLITS.index("train"), SPLITS.index("test")
        ),
        "has_nodule": has_nodule,
        "ratings": ratings,
    }
    _write(root, f"samples/{samples.name}", real, shared | about)
    of_run = {"bundle": "b" * 64, "source_set": samples.name, "passport": {"synthetic": True}}
    for name, side in ((RUN, size), (SMALL_RUN, size // 2)):
        drawn = {
            "hu": rng.integers(-1000, 401, (NUM_DRAWN, side, side), np.int16),
            "has_nodule": np.arange(NUM_DRAWN) % 3 == 0,
            "source_sample": np.arange(NUM_DRAWN) // 2,
            "seed": np.arange(NUM_DRAWN),
        }
        _write(root, f"synthetic/{name}", drawn, shared | of_run | {"plan": name})


def _write(
    root: zarr.Group, path: str, values: dict[str, np.ndarray], attributes: dict[str, Any]
) -> None:
    make = sample_set if path.startswith("samples") else synthetic_run
    hu = values.pop("hu")
    spec = make(len(hu), hu.shape[1:])
    group = create_sample_set(root, path, spec, attributes)
    set_index(group, values)
    blank = {
        array.name: np.zeros(array.shape, array.dtype)
        for array in spec.arrays
        if array.name.removeprefix("index/") not in {"hu", *values}
    }
    write_rows(group, 0, {"hu": hu} | blank)
