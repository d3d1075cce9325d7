import numpy as np
import pytest

from raysynth.errors import InputError
from raysynth.metrics.image import PairedError, psnr

WINDOW_HU = (-1000.0, 400.0)
SHAPES = [(24, 9, 8), (24, 5, 6, 7)]


def _pairs(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(-1200, 600, size=(2, *shape)).astype(np.int16)


def test_squared_error_in_both_units_and_decibels() -> None:
    error = PairedError((-1000, 400))
    error.update(np.full((1, 2, 4), 1000, np.int16), np.full((1, 2, 4), 260, np.int16))
    result = error.compute()
    assert result.mse_hu2 == pytest.approx(140.0**2)
    assert result.mse01 == pytest.approx(0.01)
    assert result.psnr_db == pytest.approx(20)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_parts", [1, 8, 64])
@pytest.mark.parametrize("masked", [True, False])
def test_merging_parts_in_any_order_equals_the_whole(
    shape: tuple[int, ...], num_parts: int, masked: bool
) -> None:
    rng = np.random.default_rng(1)
    real, synthetic = _pairs((64, *shape[1:]))
    mask = rng.random(real.shape) < 0.3 if masked else None
    whole = PairedError((-1000, 400))
    whole.update(real, synthetic, mask)
    merged = PairedError((-1000, 400))
    parts = np.array_split(np.arange(64), num_parts)
    for part in rng.permutation(num_parts):
        worker, rows = PairedError((-1000, 400)), parts[part]
        worker.update(real[rows], synthetic[rows], None if mask is None else mask[rows])
        merged.merge(worker)
    found, expected = merged.compute(), whole.compute()
    assert found.mse_hu2 == expected.mse_hu2  # whole numbers: exact
    assert found.psnr_db == pytest.approx(expected.psnr_db, rel=1e-12)
    clipped = np.clip(real, -1000, 400).astype(float) - np.clip(synthetic, -1000, 400)
    shown = np.ones_like(real, bool) if mask is None else mask
    assert found.mse_hu2 == pytest.approx(np.mean(clipped[shown] ** 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_is_that_of_scikit_image_and_monai(shape: tuple[int, ...]) -> None:
    import torch
    from monai.metrics import PSNRMetric
    from skimage.metrics import peak_signal_noise_ratio

    real, synthetic = (np.clip(images, *WINDOW_HU).astype(float) for images in _pairs(shape))
    found = psnr(real, synthetic, WINDOW_HU)
    expected = [
        peak_signal_noise_ratio(a, b, data_range=1400) for a, b in zip(real, synthetic, strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-12)
    of_monai = PSNRMetric(max_val=1400)(*(torch.from_numpy(i)[:, None] for i in (real, synthetic)))
    assert found == pytest.approx(of_monai[:, 0].numpy(), rel=1e-6)
    error = PairedError(WINDOW_HU)
    error.update(real, synthetic)
    assert error.compute().psnr_db == pytest.approx(found.mean(), rel=1e-12)


def test_equal_images_have_no_noise_and_an_empty_mask_no_psnr() -> None:
    real, synthetic = _pairs((3, 8, 8))
    synthetic[1] = real[1]
    assert np.isinf(psnr(real, synthetic, WINDOW_HU)).tolist() == [False, True, False]
    mask = np.ones(real.shape, bool)
    mask[1] = False
    error = PairedError(WINDOW_HU)
    error.update(real, synthetic, mask)
    assert error.compute().psnr_db == pytest.approx(
        psnr(real[::2], synthetic[::2], WINDOW_HU).mean()
    )
    with pytest.raises(InputError, match="at least 1 pixel a pair, got 0 of pair 1"):
        psnr(real, synthetic, WINDOW_HU, mask)
    with pytest.raises(InputError, match="at least 1 pixel, got 0"):
        PairedError(WINDOW_HU).compute()


def test_what_means_nothing_is_refused() -> None:
    real, synthetic = _pairs((3, 8, 8)).astype(np.float32)
    synthetic[2, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"voxels of 1 of 3 samples are not finite .* sample 2"):
        psnr(real, synthetic, WINDOW_HU)
    with pytest.raises(InputError, match=r"of one shape, not \(3, 8, 8\) and \(3, 8, 7\)"):
        PairedError(WINDOW_HU).update(real, real[:, :, :7])
    with pytest.raises(InputError, match=r"mask \(3, 8\) for images \(3, 8, 8\)"):
        psnr(real, real, WINDOW_HU, np.ones((3, 8), bool))
