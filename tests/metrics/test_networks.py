import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raysynth.errors import InputError
from raysynth.metrics.features import Extractor, load_extractor
from raysynth.metrics.networks import IMAGENET_MEAN, IMAGENET_STD
from raysynth.window import LUNG_WINDOW_HU


def _hu(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-1100, 500, shape).astype(np.int16)


def _loaded(name: str, path: Path) -> Extractor:
    return load_extractor(name, {name: path})


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A classifier of random weights, and the file that a user would have of it."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = resnet18(weights=None).eval()
    path = tmp_path_factory.mktemp("resnet18") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture(scope="session")
def medicalnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """MedicalNet's architecture, and a file with names as published."""
    from monai.networks.nets.resnet import ResNetFeatures

    torch.manual_seed(0)
    network = ResNetFeatures("resnet50", pretrained=False).eval()
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_50_23dataset.pth"
    weights = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": weights}, path)
    return network, path


def test_a_classifier_gives_what_its_last_layer_is_shown(resnet18) -> None:
    network, path = resnet18
    extract = _loaded("torchvision:resnet18", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (extract.name, extract.dim) == (f"torchvision-resnet18@{digest[:8]}", 512)
    hu = _hu(3, 224, 224)
    low, high = LUNG_WINDOW_HU
    grey = torch.from_numpy((np.clip(hu, low, high) - low) / np.float32(high - low)).float()
    channels = [(grey - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    with torch.inference_mode():
        logits = network(torch.stack(channels, 1))
    expected = (network.fc.weight @ torch.from_numpy(extract(hu)).T).T + network.fc.bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert extract(_hu(2, 40, 56)).shape == (2, 512)  # other sizes are stretched


def test_weights_of_other_files_and_without_their_head_are_the_same(resnet18, tmp_path) -> None:
    network, path = resnet18
    headless = {key: v for key, v in network.state_dict().items() if not key.startswith("fc.")}
    save_file(headless, tmp_path / "backbone.safetensors")
    one = _loaded("torchvision:resnet18", path)
    other = _loaded("torchvision:resnet18", tmp_path / "backbone.safetensors")
    assert one.name != other.name  # another file, other numbers as far as keys can tell
    np.testing.assert_array_equal(one(_hu(2, 64, 64)), other(_hu(2, 64, 64)))


def test_medicalnet_takes_volumes(medicalnet) -> None:
    network, path = medicalnet
    extract = _loaded("medicalnet50", path)
    assert extract.name.startswith("medicalnet50@")
    assert (extract.dim, extract.spatial_dims) == (2048, 3)
    hu = _hu(2, 32, 40, 48)
    low, high = LUNG_WINDOW_HU
    images = torch.from_numpy(np.clip(hu, low, high) - low)[:, None] / (high - low) * 2 - 1
    with torch.inference_mode():
        maps = network(images)[-1]  # (2, 2048, 1, 2, 2)
    expected = maps.mean((2, 3, 4)).numpy()
    np.testing.assert_allclose(extract(hu), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match=r"takes volumes \(n, z, y, x\) .* not \(4, 32, 32\)"):
        extract(_hu(4, 32, 32))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("inception2048", r"weights-inception-2015\S+ from https"),
        ("medicalnet50", "resnet_50_23dataset.pth"),
        ("torchvision:resnet18", "weights of torchvision's resnet18"),
    ],
)
def test_missing_weights_say_which_file_and_where(name: str, wanted: str, tmp_path: Path) -> None:
    where = rf"evaluation\.extractor_weights\.{name}"
    with pytest.raises(InputError, match=rf"needs {wanted}.* {where} is not set: set {where} to"):
        load_extractor(name)
    with pytest.raises(InputError, match=rf"needs {wanted}.* no file .*weights\.pth: set {where}"):
        _loaded(name, tmp_path / "weights.pth")


def test_other_weights_are_refused(tmp_path: Path, resnet18) -> None:
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"SHA-256 .* start with 6726825d"):
        _loaded("inception2048", wrong)
    with pytest.raises(InputError, match="no weights that can be read"):
        _loaded("medicalnet50", wrong)
    _, path = resnet18
    with pytest.raises(InputError, match=r"is not of torchvision:resnet34: \d+ tensors"):
        _loaded("torchvision:resnet34", path)
    torch.save({"epoch": 3}, wrong)
    with pytest.raises(InputError, match="holds no tensors by name"):
        _loaded("torchvision:resnet18", wrong)
    torch.save(torch.nn.Linear(2, 2), wrong)  # a pickled module would run code
    with pytest.raises(InputError, match=r"no weights that can be read \(UnpicklingError\)"):
        _loaded("torchvision:resnet18", wrong)


def test_classifiers_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torchvision has no such classifier"):
        load_extractor("torchvision:resnet19")
    path = tmp_path / "squeezenet.pth"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no linear layer"):
        _loaded("torchvision:squeezenet1_1", path)
