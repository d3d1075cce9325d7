import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from raysynth.case import Label
from raysynth.errors import InputError
from raysynth.metrics.histogram import histogram_distance, tissue_histograms


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


def test_what_means_nothing_is_refused() -> None:
    counts = np.ones((2, 240), np.float32)
    with pytest.raises(InputError, match="240 and 100 features a sample"):
        histogram_distance(counts, counts[:, :100])
