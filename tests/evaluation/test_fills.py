"""A filling that fits cannot be told at the hole's border; another slice's can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from raysynth.case import Label
from raysynth.config.evaluation import LpipsConfig
from raysynth.evaluation.fills import (
    Holes,
    LayoutHoles,
    border_steps,
    fill_quality,
    with_generated,
)
from raysynth.metrics.perceptual import Lpips
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, set_index, write_rows
from storage_schema.v1 import sample_set, synthetic_run
from tests.metrics.test_perceptual import save_lpips

N, SIZE, WINDOW = 12, 16, (-160.0, 240.0)
Y, X = np.mgrid[:SIZE, :SIZE]
HOLE = np.zeros((N, SIZE, SIZE), bool)
HOLE[:, 4:10, 5:12] = True
HOSTS = np.stack([60 + 3 * number + 2 * Y + X for number in range(N)]).astype(np.int16)
PATIENTS = np.arange(N) // 2


def _write(root: zarr.Group, name: str, hu: np.ndarray) -> None:
    attributes = {
        "kind": "slices",
        "intensity": "hu",
        "parent_snapshot": "none",
        "cases": [],
        "pixel_mm": 5.0,
        "bundle": "b" * 64,
        "plan": "p" * 12,
        "source_set": "slices",
        "passport": {},
    }
    group = create_sample_set(
        root, f"synthetic/{name}", synthetic_run(len(hu), hu.shape[1:]), attributes
    )
    set_index(group, {"draws": np.ones(len(hu))})
    write_rows(group, 0, {"hu": hu, "layout": np.zeros(hu.shape, np.uint8)})


def _filled(offset: int, rows: int = N) -> np.ndarray:
    return np.where(HOLE, HOSTS + offset, HOSTS)[:rows].astype(np.int16)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SampleSet]:
    url = str(tmp_path_factory.mktemp("fills") / "store")
    spilt = _filled(0)
    spilt[3, 0, 0] += 1
    runs = {"fits": _filled(0), "bright": _filled(40, rows=6), "spilt": spilt}
    with StoreRun(url, verb="test", fingerprint="f" * 12) as run:
        run.declare(lambda root: [_write(root, *one) for one in runs.items()], "fills")
        run.publish("fills")
    root = open_root(url)
    return {name: SampleSet(open_group(root, f"synthetic/{name}")) for name in runs}


def test_a_seam_is_a_greater_step_than_the_hosts(sets: dict[str, SampleSet]) -> None:
    holes = Holes(HOLE, HOSTS)
    fits, bright, spilt = (
        fill_quality(one, holes, PATIENTS, WINDOW, None) for one in sets.values()
    )
    assert (fits.n, fits.changed, fits.known) == (N, 0, int((~HOLE).sum()))
    assert fits.seam == 1
    assert fits.seam_interval == (1, 1)
    # A host's steps are 2 down a row and 1 along a column; forty on top make them 40 on average.
    assert bright.n == 6
    assert bright.changed == 0
    assert bright.seam == pytest.approx(40 * 26 / (2 * 14 + 12))
    assert spilt.changed == 1
    assert (fits.errors["inside"].mse_hu2, bright.errors["inside"].mse_hu2) == (0, 40**2)
    assert bright.ssim < fits.ssim == 1


def test_a_backbone_sees_what_a_filling_changed(tmp_path: Path) -> None:
    """One that fits, and one that does not, of 32 pixels a side."""
    hole = np.zeros((2, 32, 32), bool)
    hole[:, 8:20, 8:20] = True
    y, x = np.mgrid[:32, :32]
    hosts = np.stack([3 * y + x, 200 - 2 * y]).astype(np.int16)
    filled = hosts.copy()
    filled[1, hole[1]] += 60
    with StoreRun(str(tmp_path / "store"), verb="test", fingerprint="f" * 12) as run:
        run.declare(lambda root: _write(root, "filled", filled), "fills")
        run.publish("fills")
    samples = SampleSet(open_group(open_root(str(tmp_path / "store")), "synthetic/filled"))
    files = save_lpips("alex", tmp_path)
    asked = LpipsConfig(backbone=files[0], heads=files[1])
    found = fill_quality(samples, Holes(hole, hosts), np.arange(2), WINDOW, asked)
    lpips = Lpips("alex", *files, WINDOW)
    assert found.lpips == {lpips.name: pytest.approx(lpips(hosts, filled).mean())}
    assert found.lpips[lpips.name] > 0


def test_steps_are_those_across_the_border_alone() -> None:
    image = np.zeros((1, 5, 5))
    image[0, 2, 2] = 7
    hole = image > 0
    assert border_steps(image, hole).tolist() == [4 * 7]
    hole[0, 2, 3] = True  # nothing is counted between two filled pixels
    assert border_steps(image, hole).tolist() == [3 * 7]
    assert border_steps(image, np.zeros_like(hole)).tolist() == [0]


def test_the_model_window_is_where_steps_are_measured(sets: dict[str, SampleSet]) -> None:
    narrow = fill_quality(sets["bright"], Holes(HOLE, HOSTS), PATIENTS, (-160.0, 0.0), None)
    assert narrow.seam is None


def test_real_organs_are_whole() -> None:
    found = (np.arange(3), np.zeros((3, 2), np.float32))
    real = {(region, "x@1"): found for region in ("all", "liver", "nodule16")}
    assert set(with_generated(real)) - set(real) == {("generated_liver", "x@1")}


SIDE = 16
LAYOUT = np.full((3, SIDE, SIDE, SIDE), Label.BODY, np.uint8)
LAYOUT[:, 4:12, 4:12, 4:12] = Label.RIGHT_LUNG
HOST_ROWS = np.array([4, 0, 4])


def _write_volumes(root: zarr.Group) -> None:
    """Five real volumes, and three on their layouts: 20 HU brighter inside, 2 outside."""
    shared = {"kind": "patches", "intensity": "hu", "parent_snapshot": "none", "cases": []}
    shared |= {"pixel_mm": 5.0}
    real = np.arange(5)[:, None, None, None] * 10 - 300 + np.zeros((1, *[SIDE] * 3))
    cut = {"fingerprint": "f" * 12, "settings": {}, "spacing_mm": 5.0, "field_of_view_mm": 80.0}
    spec = sample_set(5, real.shape[1:])
    group = create_sample_set(root, "samples/patches", spec, shared | cut)
    write_rows(group, 0, {"hu": real.astype(np.int16), "layout": np.zeros(real.shape, np.uint8)})
    drawn = {"bundle": "b" * 64, "plan": "p" * 12, "source_set": "patches", "passport": {}}
    spec = synthetic_run(3, real.shape[1:])
    group = create_sample_set(root, "synthetic/volumes", spec, shared | drawn)
    set_index(group, {"source_sample": HOST_ROWS})
    hu = real[HOST_ROWS] + np.where(LAYOUT == Label.RIGHT_LUNG, 20, 2)
    write_rows(group, 0, {"hu": hu.astype(np.int16), "layout": LAYOUT})


def test_errors_of_volumes_against_the_hosts_of_their_layouts(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    with StoreRun(url, verb="test", fingerprint="f" * 12) as run:
        run.declare(_write_volumes, "volumes")
        run.publish("volumes")
    root = open_root(url)
    real, drawn = (
        SampleSet(open_group(root, path)) for path in ("samples/patches", "synthetic/volumes")
    )
    made = (Label.RIGHT_LUNG,)
    kept = fill_quality(drawn, LayoutHoles(made, True, real), np.arange(3), (-1000.0, 400.0), None)
    inside = 8**3 / SIDE**3
    assert kept.n == 3
    assert kept.changed == kept.known == 3 * (SIDE**3 - 8**3)  # a fault that is seen
    assert kept.copied_fraction == pytest.approx(1 - inside)
    assert kept.errors["inside"].mse_hu2 == 20**2
    assert kept.errors["outside"].mse_hu2 == 2**2
    assert kept.errors["whole"].mse_hu2 == pytest.approx(inside * 20**2 + (1 - inside) * 2**2)
    assert kept.errors["inside"].mse == pytest.approx((20 * 2 / 1400) ** 2)
    drawn_whole = fill_quality(
        drawn, LayoutHoles(made, False, real), np.arange(3), (-1000.0, 400.0), None
    )
    assert drawn_whole.errors == kept.errors
    assert (drawn_whole.changed, drawn_whole.known, drawn_whole.seam) == (None, None, None)
    assert drawn_whole.copied_fraction == 0


def test_a_host_nodule_that_gave_way_was_made_too(tmp_path: Path) -> None:
    """A model that is told of nodules alone draws lung where the host's was: that is no fault."""
    url = str(tmp_path / "store")

    def write(root: zarr.Group) -> None:
        _write_volumes(root)
        host = np.zeros((5, *[SIDE] * 3), np.uint8)
        host[:, :2] = Label.NODULE
        write_rows(open_group(root, "samples/patches"), 0, {"layout": host})

    with StoreRun(url, verb="test", fingerprint="f" * 12) as run:
        run.declare(write, "volumes")
        run.publish("volumes")
    root = open_root(url)
    real, drawn = (
        SampleSet(open_group(root, path)) for path in ("samples/patches", "synthetic/volumes")
    )
    holes = LayoutHoles((Label.NODULE,), True, real)
    found = fill_quality(drawn, holes, np.arange(3), (-1000.0, 400.0), None)
    assert found.known == 3 * (SIDE - 2) * SIDE**2
    assert found.errors["inside"].mse_hu2 == 2**2


def test_what_was_made_follows_from_the_layout() -> None:
    holes = LayoutHoles((Label.RIGHT_LUNG,), True, None)  # type: ignore[arg-type]
    assert np.array_equal(holes.of(LAYOUT, 0), LAYOUT == Label.RIGHT_LUNG)
    everything = LayoutHoles((Label.RIGHT_LUNG,), False, None)  # type: ignore[arg-type]
    assert everything.of(LAYOUT, 0).all()
