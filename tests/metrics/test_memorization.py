"""Planted copies are found, honest images seldom taken for copies; on textures with known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage, stats

from raysynth.metrics.features import CtConv
from raysynth.metrics.memorization import (
    SHIFT_PX,
    Nearest,
    Pictures,
    Scale,
    aligned,
    auc,
    feature_distances,
    flips,
    is_exact,
    least_held_out,
    nearest,
    pictures_of,
    pixel_distances,
    threshold_of,
)

SIZE = 32
WIDE = SIZE + 2 * SHIFT_PX


def _textures(count: int, seed: int, size: int = WIDE) -> np.ndarray:
    """A bright blob in the middle of noise with some structure, HU."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(count, size, size)), (0, 1.5, 1.5))
    radius = rng.uniform(3, 8, (count, 1, 1))
    from_middle = np.arange(size) - (size - 1) / 2
    blob = 700 * np.exp(-np.add.outer(from_middle**2, from_middle**2) / radius**2)
    return np.clip(-850 + 400 * noise + blob, -1000, 400).astype(np.int16)


def _pictures(hu: np.ndarray) -> Pictures:
    return pictures_of(hu, SHIFT_PX, CtConv())


def _nearest(queries: Pictures, bank: Pictures, kin: np.ndarray | None = None) -> Nearest:
    return nearest(queries, bank, kin)


@pytest.fixture(scope="module")
def bank_hu() -> np.ndarray:
    return _textures(120, 0)


@pytest.fixture(scope="module")
def bank(bank_hu: np.ndarray) -> Pictures:
    return _pictures(bank_hu)


@pytest.fixture(scope="module")
def scale(bank: Pictures) -> Scale:
    return Scale.of(_nearest(bank, bank, np.eye(len(bank), dtype=bool)).distance)


@pytest.fixture(scope="module")
def held_out(bank: Pictures, scale: Scale) -> np.ndarray:
    return scale.scores(_nearest(_pictures(_textures(200, 1)), bank).distance)


KINDS = {
    "exact": lambda hu, rng: hu,
    "noise": lambda hu, rng: hu + rng.integers(-5, 6, hu.shape).astype(np.int16),
    "flip": lambda hu, rng: flips(hu)[rng.integers(1, 8)],
    "shift": lambda hu, rng: np.roll(hu, (4, -4), (1, 2)),
    "all": lambda hu, rng: (
        np.roll(flips(hu)[3], -4, 1) + rng.integers(-5, 6, hu.shape).astype("i2")
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_are_found(
    kind: str, bank_hu: np.ndarray, bank: Pictures, scale: Scale, held_out: np.ndarray
) -> None:
    rng = np.random.default_rng(2)
    rows = rng.choice(len(bank), 40, replace=False)
    found = _nearest(_pictures(KINDS[kind](bank_hu[rows], rng)), bank)
    flagged = scale.scores(found.distance) > threshold_of(held_out, 0.01).score
    assert flagged.sum() >= (40 if kind == "exact" else 38)
    assert (found.row[:, 2] == rows).sum() >= 38
    if kind == "exact":
        assert is_exact(found.distance).all()
        assert (found.row == rows[:, None]).all()


def test_honest_images_are_seldom_flagged(
    bank: Pictures, scale: Scale, held_out: np.ndarray
) -> None:
    honest = scale.scores(_nearest(_pictures(_textures(200, 3)), bank).distance)
    assert (honest > threshold_of(held_out, 0.01).score).sum() <= 6
    assert stats.ks_2samp(honest, held_out).pvalue > 0.001


@pytest.mark.parametrize(("count", "alarms"), [(100, 1), (298, 1), (299, 1), (1000, 5)])
def test_thresholds_keep_their_rate(count: int, alarms: int) -> None:
    rng = np.random.default_rng(count)
    shares = []
    for _ in range(400):
        threshold = threshold_of(rng.normal(size=count), 0.01)
        assert threshold.alarms == alarms
        shares.append(stats.norm.sf(threshold.score))
    assert np.mean(shares) == pytest.approx(threshold.expected, rel=0.15)
    assert np.mean(shares) <= 0.0101
    assert np.mean(np.array(shares) <= threshold.at_most) == pytest.approx(0.975, abs=0.02)
    if count >= 299:
        assert np.mean(np.array(shares) <= 0.01) >= 0.93


def test_one_percent_needs_a_hundred() -> None:
    assert least_held_out(0.01) == 100


def test_kin_are_not_compared(bank: Pictures) -> None:
    kin = np.eye(len(bank), dtype=bool)
    assert (_nearest(bank, bank).distance[:, 2] < 1e-3).all()
    apart = _nearest(bank, bank, kin)
    assert (apart.distance[:, 2] > 0.01).all()
    assert (apart.row != np.arange(len(bank))[:, None]).all()


def test_blocks_and_batches_change_nothing(bank: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = _pictures(_textures(6, 4))
    whole = _nearest(queries, bank)
    monkeypatch.setattr("raysynth.metrics.memorization.BLOCK", 7)
    one = _nearest(queries.take(slice(2, 3)), bank)
    np.testing.assert_allclose(one.distance[0], whole.distance[2], rtol=1e-3)
    np.testing.assert_array_equal(one.row[0], whole.row[2])


def test_distances_do_not_see_flips(bank_hu: np.ndarray, bank: Pictures) -> None:
    for version in flips(bank_hu[:3]):
        turned = _pictures(version)
        by_feature = feature_distances(turned, bank)
        assert by_feature is not None
        assert (by_feature.argmin(1) == np.arange(3)).all()
        np.testing.assert_allclose(
            pixel_distances(turned, bank), pixel_distances(bank.take(slice(3)), bank), atol=2e-3
        )


def test_what_a_mask_hides_does_not_count(bank_hu: np.ndarray, bank: Pictures) -> None:
    hu = bank_hu[:5].copy()
    mask = np.zeros((5, SIZE, SIZE), bool)
    mask[:, 4:24, 6:30] = True
    inner = np.s_[:, SHIFT_PX:-SHIFT_PX, SHIFT_PX:-SHIFT_PX]
    others = _textures(5, 9)[inner]
    hu[inner] = np.where(mask, hu[inner], others)
    found = _nearest(pictures_of(hu, SHIFT_PX, None, mask=mask), bank)
    assert (found.row[:, 2] == np.arange(5)).all()
    assert is_exact(found.distance).all()
    assert np.isnan(found.distance[:, 0]).all()
    assert not is_exact(_nearest(_pictures(hu), bank).distance).any()
    assert np.isfinite(Scale.of(found.distance[:, :]).scores(found.distance)).all()


@pytest.mark.parametrize("version", range(8))
def test_a_copy_is_turned_back(version: int, bank_hu: np.ndarray, bank: Pictures) -> None:
    moved = np.roll(flips(bank_hu[:1])[version], (2, -3), (1, 2))
    query = _pictures(moved)
    np.testing.assert_allclose(aligned(query, bank.take(slice(1))), query.images[0], atol=2e-3)


def test_flat_pictures_are_like_none(bank: Pictures) -> None:
    found = _nearest(_pictures(np.full((2, WIDE, WIDE), -1000, np.int16)), bank)
    np.testing.assert_allclose(found.distance[:, 2], 1)


def test_whole_slices_cannot_be_shifted() -> None:
    hu = _textures(30, 5, size=48)
    slices = pictures_of(hu, 0, CtConv())
    found = _nearest(slices.take(slice(10)), slices)
    assert (found.row == np.arange(10)[:, None]).all()


def test_auc_of_distances() -> None:
    assert auc(np.array([0.1, 0.2]), np.array([0.3, 0.4])) == 1
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
