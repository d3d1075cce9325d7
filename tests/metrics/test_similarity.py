import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ms_ssim, compute_ssim_and_cs
from skimage.metrics import structural_similarity

from raysynth.errors import InputError
from raysynth.metrics.similarity import (
    SCALE_WEIGHTS,
    PairedSimilarity,
    ms_ssim,
    num_ssim_scales,
    ssim,
)

WINDOW_HU = (-1000.0, 400.0)

BEFORE = ("ff10a6b232311", "e9d6965ce2852", "79182f4698f0e")


def _pairs(size: int, spatial_dims: int = 2) -> np.ndarray:
    """Three smooth images and three that are more or less like them, (2, 3, size, size, ...)."""
    rng = np.random.default_rng(2)
    one = rng.integers(-1100, 500, (3, *[-(-size // 8)] * spatial_dims))
    for axis in range(1, spatial_dims + 1):
        one = one.repeat(8, axis)
    one = one[:, *[slice(size)] * spatial_dims]
    spread = np.reshape([30.0, 200.0, 600.0], (3, *[1] * spatial_dims))
    return np.stack([one, one + rng.normal(0, spread, one.shape)]).astype(np.int16)


def _tensors(*images: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.clip(i, *WINDOW_HU)[:, None] + 1000.0).float() for i in images]


def test_likeness_of_five_scales_is_that_of_monai() -> None:
    one, other = _pairs(176)
    expected = compute_ms_ssim(*_tensors(one, other), 2, data_range=1400)[:, 0].numpy()
    assert num_ssim_scales(176) == 5
    assert ms_ssim(one, other, WINDOW_HU) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("spatial_dims", "size"), [(2, 60), (3, 24), (3, 46)])
def test_likeness_of_fewer_scales_is_that_of_monai_with_their_weights(
    spatial_dims: int, size: int
) -> None:
    # Only with the weights given: MONAI refuses images too small for all five scales, and rounds
    # to float32. It too takes the product of means, and the luminance of the coarsest scale alone.
    one, other = _pairs(size, spatial_dims)
    weights = np.array(SCALE_WEIGHTS[: num_ssim_scales(size)])
    assert len(weights) == {60: 3, 24: 2, 46: 3}[size]
    expected = compute_ms_ssim(
        *_tensors(one, other), spatial_dims, data_range=1400, weights=weights / weights.sum()
    )
    assert ms_ssim(one, other, WINDOW_HU) == pytest.approx(expected[:, 0].numpy(), abs=1e-4)


@pytest.mark.parametrize(("spatial_dims", "size"), [(2, 16), (2, 61), (3, 13), (3, 24)])
def test_ssim_is_that_of_scikit_image_and_monai(spatial_dims: int, size: int) -> None:
    # scikit-image by default takes a flat window of 7 and Bessel's correction: not here.
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    one, other = (np.clip(images, *WINDOW_HU) for images in _pairs(size, spatial_dims))
    expected = [
        structural_similarity(a + 1000.0, b + 1000.0, data_range=1400, **settings)
        for a, b in zip(one, other, strict=True)
    ]
    found = ssim(one, other, WINDOW_HU)
    assert found == pytest.approx(expected, abs=1e-9)
    window = {"kernel_size": [11] * spatial_dims, "kernel_sigma": [1.5] * spatial_dims}
    of_monai, _ = compute_ssim_and_cs(
        *_tensors(one, other), spatial_dims, data_range=1400, **window
    )
    assert found == pytest.approx(of_monai.flatten(1).mean(1).numpy(), abs=1e-4)
    if num_ssim_scales(size) == 1:
        assert ms_ssim(one, other, WINDOW_HU) == pytest.approx(np.maximum(found, 0))


def test_likeness_of_slices_is_what_it_was_before_there_were_volumes() -> None:
    expected = [float.fromhex(f"0x1.{digits}p-1") for digits in BEFORE]
    assert ms_ssim(*_pairs(48), WINDOW_HU) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_likeness_has_its_closed_forms(spatial_dims: int) -> None:
    one, other = _pairs(48, spatial_dims)
    for measure in (ssim, ms_ssim):
        same, alike = measure(one, one, WINDOW_HU), measure(one, other, WINDOW_HU)
        assert same == pytest.approx(1)
        assert (np.diff(alike) < 0).all()
        assert alike == pytest.approx(measure(other, one, WINDOW_HU))
    # Flat images differ in luminance alone, and that counts at the coarsest of three scales.
    flat = np.full_like(one[:1], -300)
    luminance = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    brighter = flat + np.int16(350)
    assert ssim(flat, brighter, WINDOW_HU) == pytest.approx(luminance)
    expected = luminance ** (0.3001 / (0.0448 + 0.2856 + 0.3001))
    assert num_ssim_scales(48) == 3
    assert ms_ssim(flat, brighter, WINDOW_HU) == pytest.approx(expected)
    steps = np.linspace(-1000, 400, 16).astype(np.int16)
    ramp = np.broadcast_to(steps, (1, *[16] * spatial_dims))
    assert ms_ssim(ramp, ramp[..., ::-1], WINDOW_HU) == 0
    assert ssim(ramp, ramp[..., ::-1], WINDOW_HU) < 0


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("num_parts", [1, 8, 64])
def test_merging_parts_in_any_order_equals_the_whole(spatial_dims: int, num_parts: int) -> None:
    rng = np.random.default_rng(3)
    shape = (64, *[12] * spatial_dims)
    one, other = rng.integers(-1100, 500, (2, *shape)).astype(np.int16)
    merged = PairedSimilarity(WINDOW_HU)
    parts = np.array_split(np.arange(64), num_parts)
    for part in rng.permutation(num_parts):
        worker = PairedSimilarity(WINDOW_HU)
        worker.update(one[parts[part]], other[parts[part]])
        merged.merge(worker)
    found = merged.compute()
    assert found.count == 64
    assert found.ssim == pytest.approx(ssim(one, other, WINDOW_HU).mean(), rel=1e-12)
    assert found.ms_ssim == pytest.approx(ms_ssim(one, other, WINDOW_HU).mean(), rel=1e-12)


def test_what_means_nothing_is_refused() -> None:
    one = np.zeros((2, 12, 12), np.float32)
    with pytest.raises(InputError, match="10 pixels: its window needs 11"):
        num_ssim_scales(10)
    with pytest.raises(InputError, match="9 pixels: its window needs 11"):
        ssim(np.zeros((1, 9, 30, 30)), np.zeros((1, 9, 30, 30)), WINDOW_HU)
    with pytest.raises(InputError, match="of one shape"):
        ms_ssim(one, one[:1], WINDOW_HU)
    with pytest.raises(InputError, match="SSIM needs at least 1 pair, got 0"):
        PairedSimilarity(WINDOW_HU).compute()
    one[1, 3, 3] = np.nan
    with pytest.raises(InputError, match=r"voxels of 1 of 2 samples are not finite .* sample 1"):
        ssim(one, one, WINDOW_HU)
