import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from raysynth.case import Label
from raysynth.metrics.image import (
    PairedError,
    histogram_distance,
    ms_ssim,
    num_ssim_scales,
    tissue_histograms,
)


def test_squared_error_in_both_units() -> None:
    error = PairedError((-1000, 400))
    error.update(np.full((2, 4), 1000, np.int16), np.full((2, 4), 260, np.int16))
    result = error.compute()
    assert result.mse_hu2 == pytest.approx(140.0**2)
    assert result.mse01 == pytest.approx(0.01)


def test_squared_error_merges_exactly_and_respects_the_mask() -> None:
    rng = np.random.default_rng(0)
    real, synthetic = rng.integers(-1200, 600, size=(2, 30, 8, 8)).astype(np.int16)
    mask = rng.random(real.shape) < 0.3
    whole = PairedError((-1000, 400))
    whole.update(real, synthetic, mask)
    merged = PairedError((-1000, 400))
    for part in (slice(20, 30), slice(0, 5), slice(5, 20)):
        worker = PairedError((-1000, 400))
        worker.update(real[part], synthetic[part], mask[part])
        merged.merge(worker)
    assert merged.compute() == whole.compute()
    clipped = np.clip(real, -1000, 400).astype(float) - np.clip(synthetic, -1000, 400)
    assert whole.compute().mse_hu2 == pytest.approx(np.mean(clipped[mask] ** 2))


def test_histogram_distance_is_the_shift_of_a_tissue() -> None:
    rng = np.random.default_rng(1)
    layout = rng.choice([Label.BACKGROUND, Label.LEFT_LUNG, Label.BODY], (6, 20, 20))
    hu = np.where(layout == Label.BODY, 40, -850) + rng.integers(-50, 50, layout.shape)
    shifted = np.where(layout == Label.BODY, hu + 70, hu)
    real = tissue_histograms(hu.astype(np.int16), layout.astype(np.uint8))
    synthetic = tissue_histograms(shifted.astype(np.int16), layout.astype(np.uint8))
    assert histogram_distance(real["body"], synthetic["body"]) == pytest.approx(70)
    assert histogram_distance(real["lung"], synthetic["lung"]) == 0
    assert np.isnan(histogram_distance(real["nodule"], synthetic["nodule"]))
    lungs = hu[layout == Label.LEFT_LUNG]
    exact = wasserstein_distance(lungs, hu[layout == Label.BODY])
    assert histogram_distance(real["lung"], real["body"]) == pytest.approx(exact, abs=10)
    assert real["lung"].sum() == (layout == Label.LEFT_LUNG).sum()


WINDOW_HU = (-1000.0, 400.0)


def _pairs(size: int) -> np.ndarray:
    """Three smooth images and three that are more or less like them, (2, 3, size, size)."""
    rng = np.random.default_rng(2)
    one = rng.integers(-1100, 500, (3, size // 8, size // 8)).repeat(8, 1).repeat(8, 2)
    other = one + rng.normal(0, [[[30.0]], [[200.0]], [[600.0]]], one.shape)
    return np.stack([one, other]).astype(np.int16)


def test_likeness_of_five_scales_is_that_of_monai() -> None:
    import torch
    from monai.metrics.regression import compute_ms_ssim

    one, other = _pairs(176)
    low, high = WINDOW_HU
    x, y = (torch.from_numpy(np.clip(i, low, high)[:, None] - low).float() for i in (one, other))
    expected = compute_ms_ssim(x, y, 2, data_range=high - low).numpy()[:, 0]
    assert num_ssim_scales(176) == 5
    assert ms_ssim(one, other, WINDOW_HU) == pytest.approx(expected, abs=1e-4)


def test_likeness_of_one_scale_is_that_of_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    one, other = (np.clip(images, *WINDOW_HU) for images in _pairs(16))
    expected = [
        structural_similarity(a + 1000.0, b + 1000.0, data_range=1400, **settings)
        for a, b in zip(one, other, strict=True)
    ]
    assert num_ssim_scales(16) == 1
    assert ms_ssim(one, other, WINDOW_HU) == pytest.approx(np.maximum(expected, 0))


def test_likeness_has_its_closed_forms() -> None:
    one, other = _pairs(48)
    same, alike = ms_ssim(one, one, WINDOW_HU), ms_ssim(one, other, WINDOW_HU)
    assert same == pytest.approx(1)
    assert (np.diff(alike) < 0).all()
    assert alike == pytest.approx(ms_ssim(other, one, WINDOW_HU))
    # Flat images differ in luminance alone, and that counts at the coarsest of three scales.
    flat = np.full((1, 48, 48), -300, np.int16)
    luminance = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    expected = luminance ** (0.3001 / (0.0448 + 0.2856 + 0.3001))
    assert num_ssim_scales(48) == 3
    assert ms_ssim(flat, flat + np.int16(350), WINDOW_HU) == pytest.approx(expected)
    ramp = np.broadcast_to(np.linspace(-1000, 400, 16).astype(np.int16), (1, 16, 16))
    assert ms_ssim(ramp, ramp[:, :, ::-1], WINDOW_HU) == 0
    with pytest.raises(ValueError, match="10 pixels: its window needs 11"):
        num_ssim_scales(10)
