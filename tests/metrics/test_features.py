import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import Dataset

from raysynth.errors import InputError
from raysynth.metrics.features import CtConv, load_extractor
from raysynth.metrics.fidelity import register_with_torch_fidelity
from raysynth.metrics.frechet import frechet_distance_of
from raysynth.metrics.kernel import kernel_distance


def _slices(count: int, size: int = 48, seed: int = 0) -> np.ndarray:
    """Smooth random images between air and soft tissue."""
    noise = np.random.default_rng(seed).normal(size=(count, size, size))
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3))
    return np.clip(smooth / smooth.std() * 300 - 400, -1000, 1000).astype(np.int16)


def test_features_do_not_depend_on_the_batch() -> None:
    extract, slices = CtConv(), _slices(70)
    together = extract(slices)
    assert together.shape == (70, CtConv.dim)
    assert together.dtype == np.float32
    alone = np.concatenate([extract(slices[i : i + 1]) for i in (0, 31, 32, 69)])
    np.testing.assert_array_equal(alone, together[[0, 31, 32, 69]])


def test_weights_are_the_same_on_every_machine() -> None:
    first = CtConv()._layers[0][0][0, 0]
    expected = [0.1160, -0.2989, 0.1842]
    np.testing.assert_allclose(first[0, :3].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("size", [16, 33, 96])
def test_every_size_gives_finite_features(size: int) -> None:
    features = CtConv()(_slices(3, size))
    assert features.shape == (3, CtConv.dim)
    assert np.isfinite(features).all()


def test_too_small_slices_are_refused() -> None:
    with pytest.raises(InputError, match=r"ct-conv@1 takes slices .* at least 16 pixels"):
        CtConv()(np.zeros((1, 15, 20), np.int16))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda hu: ndimage.gaussian_filter(hu, (0, 1.5, 1.5)), id="blurred"),
        pytest.param(lambda hu: hu + np.random.default_rng(5).normal(0, 80, hu.shape), id="noisy"),
        pytest.param(lambda hu: hu + 60, id="brighter"),
        pytest.param(lambda hu: np.roll(hu, 24, axis=1) // 2 - 300, id="less-contrast"),
    ],
)
def test_spoiled_slices_are_farther_than_other_real_ones(spoil) -> None:
    extract = CtConv()
    real, other = extract(_slices(400, seed=1)), extract(_slices(400, seed=2))
    spoiled = extract(spoil(_slices(400, seed=2)).astype(np.int16))
    assert frechet_distance_of(real, spoiled) > 1.5 * frechet_distance_of(real, other)


class _Slices(Dataset):
    def __init__(self, hu: np.ndarray) -> None:
        self._hu = torch.from_numpy(hu)[:, None]

    def __len__(self) -> int:
        return len(self._hu)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._hu[index]


def test_torch_fidelity_judges_alike_with_our_extractor() -> None:
    from torch_fidelity import calculate_metrics

    real, synthetic = _slices(160, 32, seed=1), _slices(150, 32, seed=2) + np.int16(40)
    judged = calculate_metrics(
        input1=_Slices(synthetic),
        input2=_Slices(real),
        feature_extractor=register_with_torch_fidelity(),
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=100,
        kid_subsets=10,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    extract = CtConv()
    x, y = extract(synthetic), extract(real)
    fid = judged["frechet_inception_distance"]
    assert frechet_distance_of(y, x) == pytest.approx(fid, abs=1e-4)
    kid = judged["kernel_inception_distance_mean"]
    ours = kernel_distance(x, y, num_subsets=10, subset_size=100)
    assert ours.mean == pytest.approx(kid, rel=1e-3)


def test_unknown_extractors_are_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no extractor 'vgg'; there are ct-conv, bundle:PATH"):
        load_extractor("vgg")
    with pytest.raises(InputError, match="no extractor 'ct-conv:2'"):
        load_extractor("ct-conv:2")


def test_pixels_that_are_no_numbers_are_refused() -> None:
    hu = np.zeros((3, 32, 32), np.float32)
    hu[1, 4, 4] = np.nan
    with pytest.raises(InputError, match=r"ct-conv@1: pixels of 1 of 3 samples .* sample 1"):
        CtConv()(hu)
