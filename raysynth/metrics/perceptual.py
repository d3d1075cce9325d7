"""LPIPS: how different two slices look to a network that learned to see, where a user has one."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from raysynth.config.evaluation import LpipsConfig, LpipsNetwork
from raysynth.errors import InputError
from raysynth.metrics.image import Hu, windowed_pair
from raysynth.metrics.weights import fill, named_file, read_weights, version_of
from raysynth.window import LUNG_WINDOW_HU

if TYPE_CHECKING:
    from torch import Tensor

MIN_LPIPS_SIZE = 32
"""Pixels a side: below, the coarsest layers see nothing."""

# Torchvision's name, and the layers of its `features` after which LPIPS looks.
_BACKBONES: dict[LpipsNetwork, tuple[str, tuple[int, ...]]] = {
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}

# The statistics of ImageNet for images in [-1, 1], rounded as LPIPS was trained.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips:
    """Learned perceptual distance of pairs of slices, version 0.1 (Zhang et al. 2018, eq. 1).

    At each of some layers the features of both images are brought to unit length at every pixel;
    the squares of their differences are weighed by channel, averaged over pixels and summed over
    layers. Slices are windowed and shown as grey RGB in [-1, 1].

    Range and direction: 0 to infinity, no unit, mostly below 1; of paired images lower is better,
    and 0 if equal. Of two samples of one request the value of real pairs is the aim: neither
    extreme is better. Values of two backbones or sizes do not compare.

    Args:
        network: which backbone.
        backbone: its ImageNet weights, as torchvision publishes them.
        heads: the weights of channels, `alex.pth`, `vgg.pth` or `squeeze.pth` of LPIPS v0.1.
        window_hu: HU are clipped to this range first.

    Attributes:
        name: `lpips-NETWORK@BACKBONE-HEADS`, versions by the content of both files.

    Raises:
        InputError: a file is missing, or is not of that network.
    """

    batch_size = 16

    def __init__(
        self,
        network: LpipsNetwork,
        backbone: Path | None,
        heads: Path | None,
        window_hu: tuple[float, float] = LUNG_WINDOW_HU,
    ) -> None:
        import torch
        from torchvision import models

        if network not in _BACKBONES:
            known = ", ".join(get_args(LpipsNetwork))
            raise InputError(f"no LPIPS of {network!r}; there are {known}")
        model, self._taps = _BACKBONES[network]
        who, published = f"LPIPS of {network}", f"the ImageNet weights of torchvision's {model}"
        backbone = named_file(backbone, who, published, "its backbone")
        heads = named_file(heads, who, f"{network}.pth of LPIPS v0.1", "its heads")
        self.name = f"lpips-{network}@{version_of(backbone)}-{version_of(heads)}"
        self.window_hu = window_hu
        with torch.device("meta"):  # most of a VGG is its classifier, which nobody needs
            layers = models.get_model(model, weights=None).features[: self._taps[-1] + 1]
        self._layers = layers.to_empty(device="cpu")
        own = {f"features.{key}" for key in self._layers.state_dict()}
        kept = {
            key.removeprefix("features."): value
            for key, value in read_weights(backbone).items()
            if key in own
        }
        fill(self._layers, kept, backbone, model)
        self._heads = _read_heads(heads, who, len(self._taps))

    def __call__(self, one: Hu, other: Hu) -> NDArray[np.float64]:
        """The distance of each pair (n,) of slices (n, y, x), 0 to infinity; lower is more alike.

        Raises:
            InputError: shapes differ, slices are too small, or pixels are not finite.
        """
        import torch

        x, y = windowed_pair(one, other, self.window_hu, "LPIPS")
        if x.ndim != 3 or min(x.shape[1:]) < MIN_LPIPS_SIZE:
            raise InputError(
                f"LPIPS compares slices (n, y, x) of at least {MIN_LPIPS_SIZE} pixels a side, not "
                f"{x.shape}: give those"
            )
        values = np.empty(len(x))
        for start in range(0, len(x), self.batch_size):
            batch = slice(start, start + self.batch_size)
            with torch.inference_mode():
                values[batch] = self._distances(_shown(x[batch]), _shown(y[batch])).numpy()
        return values

    def _distances(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W)."""
        total = x.new_zeros(len(x))
        for number, layer in enumerate(self._layers):
            x, y = layer(x), layer(y)
            if number in self._taps:
                head = self._heads[self._taps.index(number)]
                difference = (_unit(x) - _unit(y)) ** 2  # (B, C, h, w)
                total = total + (difference * head).sum(1).mean((1, 2))
        return total


@lru_cache(maxsize=1)
def load_lpips(files: LpipsConfig, window_hu: tuple[float, float] = LUNG_WINDOW_HU) -> Lpips:
    """LPIPS by a recipe's files, read once a process.

    Raises:
        InputError: a file is missing, or is not of that network.
    """
    return Lpips(files.network, files.backbone, files.heads, window_hu)


def _read_heads(path: Path, who: str, count: int) -> list[Tensor]:
    """The weight of each channel (1, C, 1, 1) at each layer."""
    found = read_weights(path)
    names = [f"lin{number}.model.1.weight" for number in range(count)]
    if set(names) != found.keys():
        raise InputError(
            f"{path} does not hold the {count} heads of {who}, {names[0]} to {names[-1]}: give "
            "the file of that network"
        )
    return [found[name] for name in names]


def _shown(images: NDArray[np.float64]) -> Tensor:
    """Images (B, H, W) in [0, 1] as backbones are shown them (B, 3, H, W)."""
    import torch

    grey = torch.from_numpy(images * 2 - 1).float()[:, None]
    shift, scale = (torch.tensor(v)[None, :, None, None] for v in (_SHIFT, _SCALE))
    return (grey - shift) / scale


def _unit(features: Tensor) -> Tensor:
    """Features of unit length at every pixel."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
