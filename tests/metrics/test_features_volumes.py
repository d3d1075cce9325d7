import resource

import numpy as np
import pytest
from scipy import ndimage

from raysynth.errors import InputError
from raysynth.metrics.features import CtConv, CtConv3d, load_extractor
from raysynth.metrics.kernel import cubic_mmd2


def _volumes(count: int, size: int = 20, seed: int = 0) -> np.ndarray:
    """Smooth random volumes between air and soft tissue."""
    noise = np.random.default_rng(seed).normal(size=(count, size, size, size))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5))
    return np.clip(smooth / smooth.std() * 300 - 400, -1000, 1000).astype(np.int16)


def test_the_name_in_a_recipe_means_the_extractor_of_its_samples() -> None:
    assert load_extractor("ct-conv").name == "ct-conv@1"
    volumes = load_extractor("ct-conv", spatial_dims=3)
    assert (volumes.name, volumes.spatial_dims, volumes.dim) == ("ct-conv3d@1", 3, CtConv3d.dim)


def test_features_are_the_same_on_every_machine_and_in_every_batch() -> None:
    extract, volumes = CtConv3d(), _volumes(5)
    together = extract(volumes)
    assert together.shape == (5, CtConv3d.dim)
    np.testing.assert_array_equal(together, CtConv3d()(volumes))
    alone = np.concatenate([extract(volumes[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(alone, together)
    first = extract._layers[0][0][0, 0, 0]
    expected = [0.0622, -0.1207, 0.0923]
    np.testing.assert_allclose(first[0, :3].numpy(), expected, atol=1e-4)


def test_constant_volumes_have_the_features_that_can_be_said_beforehand() -> None:
    """Filters without a mean answer nothing; the grid shows the value, the bands where it lies."""
    (features,) = CtConv3d()(np.full((1, 16, 16, 16), -300, np.int16))
    np.testing.assert_allclose(features[:64], 0, atol=1e-4)
    np.testing.assert_allclose(features[64:91], 0, atol=1e-6)  # the middle of the window
    np.testing.assert_allclose(features[91:], [0, 0, 2, 0, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("size", [16, 17, 33])
def test_every_size_gives_finite_features(size: int) -> None:
    assert np.isfinite(CtConv3d()(_volumes(2, size))).all()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda hu: ndimage.gaussian_filter(hu, (0, 1, 1, 1)), id="blurred"),
        pytest.param(lambda hu: hu + np.random.default_rng(5).normal(0, 150, hu.shape), id="noisy"),
        pytest.param(lambda hu: hu + 150, id="brighter"),
    ],
)
def test_spoiled_volumes_are_farther_than_other_real_ones(spoil) -> None:
    extract = CtConv3d()
    real, other = extract(_volumes(130, 16, seed=1)), extract(_volumes(130, 16, seed=2))
    spoiled = extract(spoil(_volumes(130, 16, seed=2)).astype(np.int16))
    assert cubic_mmd2(real, spoiled) > 3 * abs(cubic_mmd2(real, other))


def test_slices_and_volumes_are_not_taken_for_each_other() -> None:
    with pytest.raises(
        InputError, match=r"ct-conv3d@1 takes volumes \(n, z, y, x\) of at least 16"
    ):
        CtConv3d()(np.zeros((1, 20, 20), np.int16))
    with pytest.raises(InputError, match=r"ct-conv@1 takes slices"):
        CtConv()(np.zeros((1, 20, 20, 20), np.int16))


def test_a_large_volume_takes_less_than_a_gigabyte() -> None:
    extract = CtConv3d()
    extract(_volumes(1, 16))  # what loading takes is not what a volume takes
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    extract(np.zeros((1, 128, 128, 128), np.int16))
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after_kib - before_kib < 2**20
