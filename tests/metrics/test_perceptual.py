from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision import models

from raysynth.errors import InputError
from raysynth.metrics.perceptual import Lpips, LpipsNetwork

MODELS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
CHANNELS = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Backbones and heads of random weights, saved as the published ones are."""
    folder = tmp_path_factory.mktemp("lpips")
    return {name: save_lpips(name, folder) for name in MODELS}


def save_lpips(name: str, folder: Path) -> tuple[Path, Path]:
    """Backbone and heads of random weights."""
    torch.manual_seed(0)
    model = MODELS[name]
    layers = models.get_model(model, weights=None).features.state_dict()
    backbone, heads = folder / f"{model}.pth", folder / f"{name}.pth"
    torch.save({f"features.{key}": value for key, value in layers.items()}, backbone)
    weights = [torch.rand(1, count, 1, 1) for count in CHANNELS[name]]
    torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(weights)}, heads)
    return backbone, heads


def _slices(count: int, size: int = 40) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(count, size, size))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5))
    return np.clip(smooth / smooth.std() * 300 - 400, -1000, 400).astype(np.int16)


def _by_hand(name: str, backbone: Path, heads: Path, one: np.ndarray, other: np.ndarray) -> float:
    """LPIPS of one pair, pixel by pixel, on taps that are found by the kind of their layer."""
    layers = models.get_model(MODELS[name], weights=None).features
    weights = torch.load(backbone, weights_only=True).items()
    layers.load_state_dict({key.removeprefix("features."): value for key, value in weights})
    if name == "squeeze":  # the first layer, and each Fire but those that a Fire and a pool follow
        taps = [1, 4, 7, 9, 10, 11, 12]
    else:
        taps = [i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.ReLU)]
    if name == "vgg":  # the last one of each of the five blocks
        taps = [i for i in taps if isinstance(layers[i + 1], torch.nn.MaxPool2d)]
    features = []
    for image in (one, other):
        grey = (torch.from_numpy(image).float() + 1000) / 1400 * 2 - 1
        mean, std = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
        shown = torch.stack([(grey - m) / s for m, s in zip(mean, std, strict=True)])[None]
        with torch.no_grad():
            features.append([layers[: tap + 1](shown)[0].double() for tap in taps])
    heads = torch.load(heads, weights_only=True).values()
    total = 0.0
    for *maps, head in zip(*features, heads, strict=True):
        at = []
        for y, x in np.ndindex(maps[0].shape[1:]):
            a, b = (side[:, y, x] / (side[:, y, x].norm() + 1e-10) for side in maps)
            at.append(float(head.double().flatten() @ (a - b) ** 2))
        total += np.mean(at)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_definition_pixel_by_pixel(name: LpipsNetwork, files) -> None:
    one, other = _slices(2), _slices(4)[2:]
    found = Lpips(name, *files[name])(one, other)
    expected = [_by_hand(name, *files[name], a, b) for a, b in zip(one, other, strict=True)]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_is_zero_for_equals_symmetric_and_grows_with_blur(name: LpipsNetwork, files) -> None:
    measure = Lpips(name, *files[name])
    one = _slices(3)
    assert measure(one, one) == pytest.approx(0, abs=1e-12)
    blurred = [
        ndimage.gaussian_filter(one.astype(float), (0, sigma, sigma)) for sigma in (0.7, 1.5, 3)
    ]
    distances = np.stack([measure(one, other) for other in blurred])
    assert (distances > 0).all()
    assert (np.diff(distances, axis=0) > 0).all()
    assert measure(blurred[1], one) == pytest.approx(distances[1], rel=1e-6)
    # More pairs than a batch holds are the same pairs.
    many = measure(one.repeat(7, 0), blurred[1].repeat(7, 0))
    assert many == pytest.approx(distances[1].repeat(7), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_published_heads_fit(name: LpipsNetwork, files, real_data: Path) -> None:
    heads = real_data / "lpips-heads" / f"{name}.pth"
    measure = Lpips(name, files[name][0], heads)
    one = _slices(2)
    assert measure.name.startswith(f"lpips-{name}@")
    assert measure(one, one) == pytest.approx(0, abs=1e-12)
    assert (measure(one, one[::-1]) > 0).all()


def test_files_that_are_missing_or_others_are_refused(files, tmp_path: Path) -> None:
    backbone, heads = files["alex"]
    with pytest.raises(InputError, match=r"needs the ImageNet .* alexnet, but its backbone is"):
        Lpips("alex", None, heads)
    with pytest.raises(InputError, match=r"vgg16, but there is no file .*vgg16\.pth"):
        Lpips("vgg", tmp_path / "vgg16.pth", heads)
    with pytest.raises(InputError, match=r"needs alex\.pth of LPIPS v0\.1, but its heads is not"):
        Lpips("alex", backbone, None)
    with pytest.raises(InputError, match=r"alexnet\.pth is not of vgg16: \d+ tensors"):
        Lpips("vgg", backbone, files["vgg"][1])
    with pytest.raises(InputError, match="does not hold the 5 heads of LPIPS of alex"):
        Lpips("alex", backbone, files["squeeze"][1])
    with pytest.raises(InputError, match="no LPIPS of 'resnet'; there are alex, vgg, squeeze"):
        Lpips("resnet", backbone, heads)


def test_what_means_nothing_is_refused(files) -> None:
    measure = Lpips("alex", *files["alex"])
    one = _slices(2).astype(np.float32)
    with pytest.raises(InputError, match=r"at least 32 pixels a side, not \(2, 31, 40\)"):
        measure(one[:, :31], one[:, :31])
    with pytest.raises(InputError, match="LPIPS compares slices"):
        measure(one[None], one[None])
    spoiled = one.copy()
    spoiled[1, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"voxels of 1 of 2 samples are not finite .* sample 1"):
        measure(one, spoiled)
