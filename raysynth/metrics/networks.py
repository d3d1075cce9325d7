"""Extractors that are networks of other people; a user names the file of their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from raysynth.errors import InputError
from raysynth.metrics.features import check_samples, windowed
from raysynth.metrics.weights import digest_of, fill, named_file, read_weights, version_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
INCEPTION_SHA256_START = "6726825d"

MEDICALNET_WANTED = "resnet_50_23dataset.pth of MedicalNet (or resnet_50.pth)"

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224
"""Pixels a side of what torchvision's classifiers were trained on."""


class Inception2048:
    """`inception2048@w1`: torch-fidelity's Inception v3, last pooling layer, grey as RGB.

    Slices are windowed to 8 bits (5.5 HU a step), the only input that network takes.

    Args:
        weights: the file of weights; see `INCEPTION_URL`.

    Raises:
        InputError: there is none, or it is another file.
    """

    name = "inception2048@w1"
    dim = 2048
    spatial_dims = 2
    batch_size = 32

    def __init__(self, weights: Path | None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = _file_of("inception2048", weights, f"{INCEPTION_FILE} from {INCEPTION_URL}")
        digest = digest_of(path)
        # torch-fidelity unpickles what it is given, so it is given nothing else.
        if not digest.startswith(INCEPTION_SHA256_START):
            raise InputError(
                f"{path} has SHA-256 {digest[:8]}..., Inception's weights start with "
                f"{INCEPTION_SHA256_START}: download {INCEPTION_URL}"
            )
        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Features (n, 2048) of slices (n, y, x)."""
        check_samples(hu, self)
        features = np.empty((len(hu), self.dim), np.float32)
        for start in range(0, len(hu), self.batch_size):
            grey = np.rint(windowed(hu[start : start + self.batch_size]) * 255).astype(np.uint8)
            rgb = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1)  # (B, 3, H, W)
            with torch.inference_mode():
                features[start : start + len(grey)] = self._network(rgb)[0].numpy()
        return features


class MedicalNet50:
    """`medicalnet50@VERSION`: MedicalNet's 3D ResNet-50 (Chen et al. 2019), mean of its last maps.

    Volumes are windowed to [-1, 1]: a scale fitted to every volume, as in the original, would hide
    wrong Hounsfield units. The network is MONAI's, with strides where the original dilates, so
    features are none to compare with those of the original code. Volumes go through it one by one.

    Args:
        weights: the file of weights; names may begin with `module.`, a last layer is left out.

    Raises:
        InputError: there is none, or it holds another network's.
    """

    dim = 2048
    spatial_dims = 3

    def __init__(self, weights: Path | None) -> None:
        from monai.networks.nets.resnet import resnet50

        path = _file_of("medicalnet50", weights, MEDICALNET_WANTED)
        self.name = f"medicalnet50@{version_of(path)}"
        self._network = resnet50(
            spatial_dims=3,
            n_input_channels=1,
            conv1_t_stride=2,
            shortcut_type="B",
            bias_downsample=False,
            feed_forward=False,
        )
        kept = {
            key: value
            for key, value in read_weights(path).items()
            if not key.startswith(("fc.", "conv_seg."))
        }
        fill(self._network, kept, path, "medicalnet50")

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Features (n, 2048) of volumes (n, z, y, x)."""
        check_samples(hu, self)
        features = np.empty((len(hu), self.dim), np.float32)
        for row, volume in enumerate(hu):
            image = torch.from_numpy(windowed(volume) * 2 - 1)[None, None]  # (1, 1, D, H, W)
            with torch.inference_mode():
                features[row] = self._network(image)[0].numpy()
        return features


class Torchvision:
    """`torchvision-MODEL@VERSION`: what a classifier of torchvision's last layer is shown.

    Slices are windowed, repeated as RGB, stretched to 224 pixels a side and normalized as ImageNet
    is.

    Args:
        model: torchvision's name of it, such as `resnet50`.
        weights: the file of its weights; those of the last layer are not needed.

    Raises:
        InputError: no such model, one without a linear last layer, no file, or one of another
            model.
    """

    spatial_dims = 2
    batch_size = 16

    def __init__(self, model: str, weights: Path | None) -> None:
        from torchvision import models

        if model not in models.list_models(module=models):
            raise InputError(
                f"extractor torchvision:{model}: torchvision has no such classifier; name one of "
                "torchvision.models.list_models(), such as resnet50"
            )
        path = _file_of(f"torchvision:{model}", weights, f"weights of torchvision's {model}")
        self.name = f"torchvision-{model}@{version_of(path)}"
        network = models.get_model(model, weights=None)
        linear = [
            (place, layer)
            for place, layer in network.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        if not linear:
            raise InputError(
                f"extractor torchvision:{model} has no linear layer that features could be taken "
                "before: name another model, such as resnet50"
            )
        head, layer = linear[-1]
        self.dim = layer.in_features
        network.set_submodule(head, nn.Identity())
        kept = {
            key: value
            for key, value in read_weights(path).items()
            if not key.startswith(f"{head}.")
        }
        fill(network, kept, path, f"torchvision:{model}")
        self._network = network

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Features (n, dim) of slices (n, y, x)."""
        check_samples(hu, self)
        features = np.empty((len(hu), self.dim), np.float32)
        for start in range(0, len(hu), self.batch_size):
            grey = torch.from_numpy(windowed(hu[start : start + self.batch_size]))[:, None]
            with torch.inference_mode():
                computed = self._network(_as_imagenet(grey))
            features[start : start + len(grey)] = computed.numpy()
        return features


def _file_of(name: str, weights: Path | None, wanted: str) -> Path:
    setting = f"evaluation.extractor_weights.{name}"
    return named_file(weights, f"extractor {name}", wanted, setting)


def _as_imagenet(grey: torch.Tensor) -> torch.Tensor:
    """Images (B, 1, H, W) in [0, 1] as classifiers of ImageNet are shown them (B, 3, 224, 224)."""
    size = (IMAGENET_SIZE, IMAGENET_SIZE)
    stretched = functional.interpolate(grey, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (stretched - mean) / std
