import itertools

import numpy as np
import pytest
from scipy import ndimage

from raysynth.errors import InputError
from raysynth.metrics.frechet import frechet_distance_of
from raysynth.metrics.nodule import (
    RADIOMIC_NAMES,
    measurable_masks,
    radiomic_distances,
    radiomic_features,
    radiomics,
)

SIZE = 65


def _distance_mm(pixel_mm: float, spatial_dims: int = 2, size: int = SIZE) -> np.ndarray:
    """Of each pixel to the middle one."""
    axes = [np.arange(size) - size // 2] * spatial_dims
    return np.sqrt(sum(axis**2.0 for axis in np.meshgrid(*axes, indexing="ij"))) * pixel_mm


def _named(hu: np.ndarray, mask: np.ndarray, pixel_mm: float = 1.0) -> dict[str, float]:
    (row,) = radiomics(hu[None], mask[None], pixel_mm)
    return dict(zip(RADIOMIC_NAMES, row.tolist(), strict=True))


@pytest.mark.parametrize("pixel_mm", [0.5, 1.0])
@pytest.mark.parametrize("diameter_mm", [12.0, 20.0, 26.0])
def test_a_disc_has_its_closed_forms(pixel_mm: float, diameter_mm: float) -> None:
    mask = _distance_mm(pixel_mm) <= diameter_mm / 2
    found = _named(np.where(mask, 30, -800), mask, pixel_mm)
    assert found["diameter_mm"] == pytest.approx(diameter_mm, rel=0.03)
    assert found["circularity"] == pytest.approx(1, abs=0.09)  # the border has steps
    assert found["elongation"] == pytest.approx(1, abs=1e-6)
    assert found["solidity"] > 0.9
    assert found["mean_hu"] == found["p10_hu"] == found["p90_hu"] == 30
    assert found["sd_hu"] == found["skewness"] == found["kurtosis"] == found["entropy_bits"] == 0
    # Central differences reach one pixel over the edge, from either side.
    assert found["edge_hu_per_mm"] == pytest.approx(830 / 2 / pixel_mm, rel=0.25)
    texture = [found[f"glcm_{name}"] for name in ("contrast", "homogeneity", "correlation")]
    assert texture == [0, 1, 1]
    assert found["ring_contrast_hu"] == 830


@pytest.mark.parametrize("diameter_mm", [10.0, 20.0])
def test_a_ball_has_its_closed_forms(diameter_mm: float) -> None:
    mask = _distance_mm(1.0, 3, 33) <= diameter_mm / 2
    found = _named(np.where(mask, 30, -800), mask)
    assert found["diameter_mm"] == pytest.approx(diameter_mm, rel=0.03)
    assert found["circularity"] == pytest.approx(1, abs=0.03)
    assert found["elongation"] == pytest.approx(1, abs=1e-6)
    assert found["mean_hu"] == 30
    assert found["ring_contrast_hu"] == 830


def test_spacing_of_every_axis_counts() -> None:
    ball = _distance_mm(1.0, 3, 33) <= 10
    thick = ball[::2]  # slices 2 mm apart
    hu = np.where(ball, 30, -800)
    whole = radiomics(hu[None], ball[None], 1.0)[0]
    (sliced,) = radiomics(hu[None, ::2], thick[None], (2.0, 1.0, 1.0))
    for name, tolerance in {"diameter_mm": 0.02, "circularity": 0.05, "elongation": 0.02}.items():
        column = RADIOMIC_NAMES.index(name)
        assert sliced[column] == pytest.approx(whole[column], rel=tolerance), name


def test_an_ellipse_is_long_and_a_cross_is_not_solid() -> None:
    y, x = np.mgrid[-32:33, -32:33]
    ellipse = (x / 24) ** 2 + (y / 8) ** 2 <= 1
    found = _named(np.zeros((SIZE, SIZE)), ellipse)
    assert found["elongation"] == pytest.approx(1 / 3, rel=0.04)
    # Perimeter by Ramanujan 1914.
    h = (24 - 8) ** 2 / (24 + 8) ** 2
    perimeter = np.pi * 32 * (1 + 3 * h / (10 + np.sqrt(4 - 3 * h)))
    assert found["circularity"] == pytest.approx(4 * np.pi**2 * 24 * 8 / perimeter**2, rel=0.05)
    cross = (abs(x) <= 3) | (abs(y) <= 3)
    cross &= (abs(x) <= 20) & (abs(y) <= 20)
    assert _named(np.zeros((SIZE, SIZE)), cross)["solidity"] < 0.5


def test_noise_inside_has_the_statistics_of_a_gaussian() -> None:
    mask = _distance_mm(1.0) <= 31
    hu = np.random.default_rng(0).normal(-100, 80, mask.shape)
    found = _named(hu, mask)
    assert found["mean_hu"] == pytest.approx(-100, abs=6)
    assert found["sd_hu"] == pytest.approx(80, rel=0.05)
    assert found["skewness"] == pytest.approx(0, abs=0.1)
    assert found["kurtosis"] == pytest.approx(0, abs=0.2)
    assert found["p10_hu"] == pytest.approx(-100 - 1.2816 * 80, abs=8)
    assert found["p90_hu"] == pytest.approx(-100 + 1.2816 * 80, abs=8)
    expected_bits = np.log2(80 / 25 * np.sqrt(2 * np.pi * np.e))  # of a Gaussian in narrow bins
    assert found["entropy_bits"] == pytest.approx(expected_bits, rel=0.01)
    # Independent neighbours differ by twice the variance, in levels of 50 HU and their rounding.
    assert found["glcm_contrast"] == pytest.approx(2 * ((80 / 50) ** 2 + 1 / 12), rel=0.05)
    assert found["glcm_correlation"] == pytest.approx(0, abs=0.03)


def test_the_edge_is_the_slope_of_a_cone() -> None:
    distance_mm = _distance_mm(0.5)
    found = _named(-40 * distance_mm, distance_mm <= 8, 0.5)
    assert found["edge_hu_per_mm"] == pytest.approx(40, rel=0.02)
    step = np.where(distance_mm <= 8, 0.0, -800.0)
    edges = [
        _named(ndimage.gaussian_filter(step, sigma), distance_mm <= 8, 0.5)["edge_hu_per_mm"]
        for sigma in (0.5, 1.5, 3.0)
    ]
    assert edges == sorted(edges, reverse=True)


def test_texture_ignores_what_lies_outside() -> None:
    mask = _distance_mm(1.0) <= 12
    rng = np.random.default_rng(1)
    inside = rng.normal(-100, 80, mask.shape)
    one = _named(np.where(mask, inside, -900), mask)
    other = _named(np.where(mask, inside, rng.normal(0, 300, mask.shape)), mask)
    same = [name for name in RADIOMIC_NAMES if name not in ("edge_hu_per_mm", "ring_contrast_hu")]
    assert [one[name] for name in same] == [other[name] for name in same]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_mask_of_four_pixels_gives_finite_features(spatial_dims: int) -> None:
    places = list(itertools.product(range(3), repeat=spatial_dims))
    chosen = list(itertools.combinations(places, 4))
    rng = np.random.default_rng(2)
    if spatial_dims == 3:
        chosen = [chosen[i] for i in rng.choice(len(chosen), 60, replace=False)]
    masks = np.zeros((len(chosen), *[3] * spatial_dims), bool)
    for mask, pixels in zip(masks, chosen, strict=True):
        mask[tuple(np.transpose(pixels))] = True
    for hu in (np.full(masks.shape, -500), rng.integers(-1000, 400, masks.shape)):
        features = radiomics(hu.astype(np.int16), masks, 0.7)
        assert np.isfinite(features).all()


def test_smaller_masks_are_refused_and_can_be_told_apart() -> None:
    masks = np.zeros((3, 8, 8), bool)
    masks[0, 2:4, 2:4], masks[1, 2, 2:5], masks[2] = True, True, True
    assert measurable_masks(masks).tolist() == [True, False, False]
    hu = np.zeros(masks.shape, np.int16)
    with pytest.raises(InputError, match=r"at least 4 pixels .* got 3 of 64 in nodule 1"):
        radiomics(hu, masks, 1.0)
    with pytest.raises(InputError, match="with some outside, got 64 of 64 in nodule 0"):
        radiomics(hu[2:], masks[2:], 1.0)
    assert len(radiomics(hu[:1], masks[:1], 1.0)) == 1
    assert radiomics(hu[:0], masks[:0], 1.0).shape == (0, 16)
    with pytest.raises(InputError, match=r"masks of one shape, not \(3, 8, 8\) and \(1, 8, 8\)"):
        radiomics(hu, masks[:1], 1.0)
    spoiled = hu.astype(np.float32)
    spoiled[0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"pixels of 1 of 3 samples are not finite"):
        radiomics(spoiled, masks, 1.0)


def test_distance_of_shifted_gaussians_is_their_shift_in_standard_deviations() -> None:
    real, other = np.random.default_rng(3).normal(size=(2, 4000, 16)) * np.arange(1, 17) + 5
    shifted = other + 0.5 * np.arange(1, 17)
    distances = radiomic_distances(real, shifted)
    assert tuple(distances) == RADIOMIC_NAMES
    assert list(distances.values()) == pytest.approx([0.5] * 16, abs=0.06)
    # A wider Gaussian: |s - 1| E|z|.
    wider = radiomic_distances(real, (other - 5) * 2 + 5)
    assert list(wider.values()) == pytest.approx([np.sqrt(2 / np.pi)] * 16, rel=0.12)
    assert set(radiomic_distances(real, real).values()) == {0.0}


def test_a_feature_that_does_not_vary_is_equal_or_infinitely_far() -> None:
    real, synthetic = np.random.default_rng(4).normal(size=(2, 20, 16))
    real[:, 3] = synthetic[:, 3] = 1.0
    real[:, 4] = 2.0
    distances = list(radiomic_distances(real, synthetic).values())
    assert distances[3] == 0
    assert np.isinf(distances[4])
    with pytest.raises(InputError, match="at least 2 samples a side, got 1"):
        radiomic_distances(real, synthetic[:1])
    with pytest.raises(InputError, match="distances of 15 features, not 16"):
        radiomic_distances(real[:, :15], synthetic[:, :15])


def test_features_give_a_frechet_distance_that_sees_softer_edges() -> None:
    rng = np.random.default_rng(5)
    distance_mm = _distance_mm(1.0, size=41)

    def drawn(sigma: float) -> np.ndarray:
        masks = np.stack([distance_mm <= radius for radius in rng.uniform(4, 12, 60)])
        hu = np.where(masks, rng.normal(-50, 60, masks.shape), rng.normal(-850, 40, masks.shape))
        return radiomic_features(ndimage.gaussian_filter(hu, (0, sigma, sigma)), masks, 1.0)

    real, other, soft = drawn(0.8), drawn(0.8), drawn(1.6)
    assert frechet_distance_of(real, soft) > 3 * frechet_distance_of(real, other)
