"""What an audit compares of samples: crops, whole slices, and holes without their surroundings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zarr
from scipy import ndimage

from raysynth.case import Label
from raysynth.config import ExperimentConfig
from raysynth.evaluation.audit_pictures import (
    Items,
    cut_real,
    cut_synthetic,
    hole_boxes,
    joined,
    looks_of,
    with_masks_of,
)
from raysynth.metrics.memorization import is_exact, nearest
from raysynth.store.reader import SampleSet
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import sample_set, synthetic_run

COUNT, SIZE = 12, 64


def _config(model: dict[str, Any]) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "run", "work_dir": "runs", "model": model})


LATENT = _config({"family": "latent_diffusion", "autoencoder": "none"})
HOLES = _config({"family": "inpainting", "organs": ["liver"]})
COPYING = _config({"family": "layout_diffusion"})


def _organ(at: int) -> np.ndarray:
    """A disc of a liver around (`at`, 32)."""
    y, x = np.ogrid[:SIZE, :SIZE]
    return (y - at) ** 2 + (x - 32) ** 2 < 14**2


def _texture(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(COUNT, SIZE, SIZE))
    return (50 + 120 * ndimage.gaussian_filter(noise, (0, 1, 1)) / 0.28).astype(np.int16)


def _set(path: str, hu: np.ndarray, layout: np.ndarray, box: np.ndarray) -> SampleSet:
    make = sample_set if path.startswith("samples") else synthetic_run
    spec = make(len(hu), hu.shape[1:])
    attributes: dict[str, Any] = {attribute.name: "" for attribute in spec.attributes}
    attributes |= {"kind": "slices", "pixel_mm": 1.0, "intensity": "hu"}
    group = create_sample_set(zarr.group(), path, spec, attributes)
    set_index(group, {"box": box})
    write_rows(group, 0, {"hu": hu, "layout": layout})
    return SampleSet(group)


def _boxes(boxed: int) -> np.ndarray:
    """The first ones have a box, the others none."""
    boxes = np.full((COUNT, 4), -1)
    boxes[:boxed] = (20, 30, 32, 42)
    return boxes


@pytest.fixture(scope="module")
def real() -> SampleSet:
    layout = np.where(_organ(30), np.uint8(Label.LIVER), np.uint8(Label.BODY))
    return _set("samples/s", _texture(0), np.stack([layout] * COUNT), _boxes(9))


def test_boxed_samples_are_crops_and_the_others_slices() -> None:
    run = _set("synthetic/r", _texture(1), np.zeros((COUNT, SIZE, SIZE), np.uint8), _boxes(5))
    crops, slices = looks_of(LATENT, run)
    assert (crops.region, crops.size, crops.margin) == ("nodule", 32, 6)
    assert (slices.region, slices.size, slices.margin) == ("slice", 64, 0)
    found = cut_synthetic(run, 0, COUNT, crops)
    np.testing.assert_array_equal(found.rows, np.arange(5))
    assert found.pictures.windows.shape == (5, 44, 44)
    assert found.pictures.features is not None
    assert found.pictures.features.shape == (8, 5, 80)
    assert cut_synthetic(run, 0, COUNT, slices).rows.tolist() == list(range(5, COUNT))
    only = _set("synthetic/r", _texture(1), np.zeros((COUNT, SIZE, SIZE), np.uint8), _boxes(COUNT))
    assert [look.region for look in looks_of(LATENT, only)] == ["nodule"]


def test_a_real_crop_is_looked_up_where_its_nodule_is(real: SampleSet) -> None:
    run = _set("synthetic/r", real.read("hu"), real.read("layout"), _boxes(9))
    look = looks_of(LATENT, run)[0]
    bank = cut_real(real, 0, COUNT, look, np.ones(COUNT, bool), flipped=False)
    assert bank.rows.tolist() == list(range(9))
    found = nearest(cut_synthetic(run, 0, COUNT, look).pictures, bank.pictures)
    assert is_exact(found.distance).all()
    wanted = np.arange(COUNT) % 2 == 0
    some = cut_real(real, 0, COUNT, look, wanted, flipped=False)
    assert some.rows.tolist() == [0, 2, 4, 6, 8]


def test_large_slices_are_made_smaller(real: SampleSet) -> None:
    hu = np.repeat(np.repeat(_texture(2), 3, axis=1), 3, axis=2)[:4]
    run = _set("synthetic/r", hu, np.zeros(hu.shape, np.uint8), np.full((4, 4), -1))
    (look,) = looks_of(LATENT, run)
    assert (look.factor, look.size) == (3, 64)
    assert cut_synthetic(run, 0, 4, look).pictures.windows.shape == (4, 64, 64)


def test_of_a_filled_slice_nothing_but_the_hole_counts(real: SampleSet) -> None:
    # Other patients' slices; half of the holes hold the texture of a training patient's liver.
    hu, hole = _texture(3), np.stack([_organ(34)] * COUNT)
    moved = np.roll(real.read("hu"), 4, axis=1)
    copied = np.arange(COUNT) < 6
    hu = np.where(hole & copied[:, None, None], moved, hu)
    run = _set("synthetic/r", hu, np.zeros(hu.shape, np.uint8), np.full((COUNT, 4), -1))
    (look,) = looks_of(HOLES, run)
    assert look.region == "generated"
    bank = cut_real(real, 0, COUNT, look, np.ones(COUNT, bool), flipped=False)
    filled = cut_synthetic(run, 0, COUNT, look, hole)
    assert filled.pictures.mask is not None
    assert filled.pictures.features is None
    found = nearest(filled.pictures, bank.pictures)
    np.testing.assert_array_equal(is_exact(found.distance), copied)
    assert (bank.rows[found.row[copied, 2]] == np.flatnonzero(copied)).all()
    held_out = with_masks_of(bank.take(slice(3)), filled, 0)
    assert held_out.pictures.mask is not None
    assert with_masks_of(bank, bank, 0) is bank


def _volumes(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(COUNT, 32, 32, 32))
    return (-400 + 300 * ndimage.gaussian_filter(noise, (0, 2, 2, 2)) / 0.05).astype(np.int16)


def test_copies_of_volumes_are_found_by_the_planes_through_their_nodules() -> None:
    """Three are copied as they are, three turned over, three a plane higher, three not at all."""
    learned, hu = _volumes(4), _volumes(5)
    hu[:3], hu[3:6] = learned[:3], learned[3:6, :, ::-1, ::-1]
    hu[6:9] = np.roll(learned[6:9], 1, axis=1)
    none = np.zeros(hu.shape, np.uint8)
    box = np.full((COUNT, 6), (13, 13, 13, 19, 19, 19))
    box[::2] = -1  # half have none: these are compared by their own middle
    train, run = _set("samples/s", learned, none, box), _set("synthetic/r", hu, none, box)
    assert [look.region for look in looks_of(LATENT, run)] == ["nodule", "slice"]
    for look in looks_of(LATENT, run):
        bank = cut_real(train, 0, COUNT, look, np.ones(COUNT, bool), flipped=False)
        items = cut_synthetic(run, 0, COUNT, look)
        found = nearest(items.pictures, bank.pictures)
        copied = items.rows < 9
        assert (bank.rows[found.row[copied, 2]] == items.rows[copied]).all(), look.region
        assert is_exact(found.distance[items.rows < 6]).all(), look.region
        assert found.distance[copied, 2].max() < 0.1 < found.distance[~copied, 2].min()


def test_of_volumes_on_copied_tissue_what_the_layout_shows_counts() -> None:
    learned, hu = _volumes(4), _volumes(5)
    layout = np.full(hu.shape, Label.BODY, np.uint8)
    layout[:, 8:24, 8:24, 8:24] = Label.RIGHT_LUNG
    hu[:6, 8:24, 8:24, 8:24] = learned[:6, 8:24, 8:24, 8:24]
    box = np.full((COUNT, 6), -1)
    train, run = _set("samples/s", learned, layout, box), _set("synthetic/r", hu, layout, box)
    (look,) = looks_of(COPYING, run)
    assert look.region == "generated"
    bank = cut_real(train, 0, COUNT, look, np.ones(COUNT, bool), flipped=False)
    found = nearest(cut_synthetic(run, 0, COUNT, look).pictures, bank.pictures)
    np.testing.assert_array_equal(is_exact(found.distance), np.arange(COUNT) < 6)


def test_an_empty_hole_is_all_of_the_slice() -> None:
    holes = np.stack([_organ(30), np.zeros((SIZE, SIZE), bool)])
    assert hole_boxes(holes).tolist() == [[17, 19, 44, 46], [0, 0, SIZE, SIZE]]


def test_parts_come_together_in_order(real: SampleSet) -> None:
    look = looks_of(LATENT, _set("synthetic/r", _texture(1), real.read("layout"), _boxes(9)))[0]
    every = np.ones(COUNT, bool)
    whole = cut_real(real, 0, COUNT, look, every, flipped=True)
    parts = [cut_real(real, n, n + 4, look, every[:4], flipped=True) for n in (0, 4, 8)]
    found = joined(parts)
    assert isinstance(found, Items)
    np.testing.assert_array_equal(found.rows, whole.rows)
    np.testing.assert_array_equal(found.pictures.windows, whole.pictures.windows)
    np.testing.assert_array_equal(found.pictures.features, whole.pictures.features)
    assert joined([]) is None
