import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from raysynth.case import Label
from raysynth.metrics.image import PairedError, histogram_distance, tissue_histograms


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
