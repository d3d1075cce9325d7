"""Feature extractors by name: what Fréchet and kernel distances compare."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from raysynth.config.evaluation import EXTRACTOR_NAMES
from raysynth.errors import InputError
from raysynth.metrics.samples import require_finite
from raysynth.window import LUNG_WINDOW_HU

if TYPE_CHECKING:
    import torch

MIN_IMAGE_SIZE = 16


class Extractor(Protocol):
    """A named map from slices, or volumes, to features.

    Attributes:
        name: `extractor@version`, part of every metric's key. Another version, other numbers.
        dim: length of a feature vector.
        spatial_dims: 2: it takes slices (n, y, x); 3: volumes (n, z, y, x).
    """

    name: str
    dim: int
    spatial_dims: int

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Features (n, dim) of samples in HU, at least `MIN_IMAGE_SIZE` pixels a side."""
        ...


def load_extractor(
    name: str, weights: Mapping[str, Path] | None = None, spatial_dims: int = 2
) -> Extractor:
    """An extractor by its name in a recipe, one of `EXTRACTOR_NAMES`.

    Args:
        name: of the extractor.
        weights: `evaluation.extractor_weights`, the files of weights by extractor.
        spatial_dims: 2 or 3, of the samples: `ct-conv` is there for both. Others take what they
            take, see `Extractor.spatial_dims`.

    Raises:
        InputError: unknown name, weights or a bundle that are absent or another network's, or a
            module of the user's that gives no extractor.
    """
    file = (weights or {}).get(name)
    match name.partition(":"):
        case "ct-conv", "", _:
            return CtConv() if spatial_dims == 2 else CtConv3d()
        case "bundle", ":", path:
            from raysynth.metrics.domain import Domain

            return Domain(Path(path))
        case "inception2048", "", _:
            from raysynth.metrics.networks import Inception2048

            return Inception2048(file)
        case "medicalnet50", "", _:
            from raysynth.metrics.networks import MedicalNet50

            return MedicalNet50(file)
        case "torchvision", ":", model:
            from raysynth.metrics.networks import Torchvision

            return Torchvision(model, file)
        case "module", ":", place:
            from raysynth.metrics.given import given_extractor

            return given_extractor(place)
        case _:
            raise InputError(f"no extractor {name!r}; there are {EXTRACTOR_NAMES}")


class CtConv:
    """`ct-conv@1`: fixed random convolutions at four scales and a few radiomic statistics.

    Needs no download, so that a machine without network can judge. 80 features of a slice: at each
    of four scales (each half the former) the mean responses of two layers of eight filters (64);
    the means of a 3 x 3 grid (9), which say where things are; the shares of six HU bands and the
    spread (7). Fixed factors balance the groups over real chest slices and bring the mean
    square of their features to about 1, where KID's cubic kernel is well conditioned.

    The weights come from the raw stream of a bit generator, which numpy guarantees not to change.
    Samples go through the network at one fixed batch shape: a feature does not depend, to the last
    bit, on which others it is computed with.
    """

    name = "ct-conv@1"
    dim = 80
    spatial_dims = 2
    seed = 20_261_120

    num_scales = 4
    num_filters = 8
    batch_size = 32
    band_edges_hu = (-950, -500, -150, -20, 150)
    """Air, lung, partly filled lung, fat, soft tissue, bone."""
    gains = (8.0, 1.0, 2.0)
    """Factors of responses, grid and bands."""

    def __init__(self) -> None:
        import torch

        bits = np.random.PCG64(self.seed)
        f, axes = self.num_filters, self.spatial_dims
        self._layers = [
            (_filters(bits, (f, 1, *[5] * axes)), _filters(bits, (f, f, *[3] * axes)))
            for _ in range(self.num_scales)
        ]
        low, high = LUNG_WINDOW_HU
        edges = [(edge - low) / (high - low) * 2 - 1 for edge in self.band_edges_hu]
        self._edges = torch.tensor(edges, dtype=torch.float32)

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Features (n, dim) of samples in HU."""
        import torch

        check_samples(hu, self)
        features = np.empty((len(hu), self.dim), np.float32)
        for start in range(0, len(hu), self.batch_size):
            batch = hu[start : start + self.batch_size]
            padded = np.zeros((self.batch_size, *hu.shape[1:]), np.float32)
            padded[: len(batch)] = windowed(batch) * 2 - 1
            with torch.inference_mode():
                computed = self._features(torch.from_numpy(padded)[:, None])
            features[start : start + len(batch)] = computed[: len(batch)].numpy()
        return features

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of windowed images in [-1, 1], shape (B, 1, H, W) or (B, 1, D, H, W)."""
        import torch
        from torch.nn import functional

        volumes = self.spatial_dims == 3
        in_grid = functional.adaptive_avg_pool3d if volumes else functional.adaptive_avg_pool2d
        places = tuple(range(2, images.ndim))
        responses, scaled = [], images
        for first, second in self._layers:
            x = _convolve(scaled, first).relu_()  # (B, 8, (d,) h, w)
            responses.append(x.mean(places))
            x = _convolve(_halved(x), second).relu_()
            responses.append(x.mean(places))
            scaled = _halved(scaled)
        grid = in_grid(images, 3).flatten(1)
        pixels = images.flatten(1)
        count = pixels.shape[1]
        above = torch.stack([(pixels > edge).sum(1) for edge in self._edges], 1)  # (B, edges)
        shares = -torch.diff(functional.pad(above, (1, 0), value=count), append=0 * above[:, :1])
        bands = torch.cat([shares / count, pixels.std(1, keepdim=True)], 1)
        response_gain, grid_gain, band_gain = self.gains
        return torch.cat(
            [torch.cat(responses, 1) * response_gain, grid * grid_gain, bands * band_gain], 1
        )


class CtConv3d(CtConv):
    """`ct-conv3d@1`: what `ct-conv@1` is of slices, of volumes (n, z, y, x).

    98 features: filters and pooling have an axis more, and so has the grid (27). Volumes go through
    one by one: 128 voxels a side take about half a gigabyte.
    """

    name = "ct-conv3d@1"
    dim = 98
    spatial_dims = 3

    batch_size = 1
    gains = (8.0, 1.0, 2.0)


def windowed(hu: NDArray[np.int16]) -> NDArray[np.float32]:
    """HU in `LUNG_WINDOW_HU` as [0, 1]."""
    low, high = LUNG_WINDOW_HU
    clipped: NDArray[np.float32] = np.clip(hu, low, high).astype(np.float32)
    return (clipped - np.float32(low)) / np.float32(high - low)


def check_samples(hu: NDArray[np.int16], extractor: Extractor) -> None:
    """Refuses what an extractor cannot see.

    Raises:
        InputError: slices for volumes or the reverse, too small ones, or some not finite.
    """
    wanted = "slices (n, y, x)" if extractor.spatial_dims == 2 else "volumes (n, z, y, x)"
    if hu.ndim != extractor.spatial_dims + 1 or min(hu.shape[1:]) < MIN_IMAGE_SIZE:
        raise InputError(
            f"{extractor.name} takes {wanted} of at least {MIN_IMAGE_SIZE} pixels a side, not "
            f"{hu.shape}: give those, or take another extractor"
        )
    require_finite(hu, extractor.name, "pixels")


def _filters(bits: np.random.PCG64, shape: tuple[int, ...]) -> torch.Tensor:
    """Random filters (out, in, (d,) h, w) of zero mean and unit norm."""
    import torch

    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
    weights = raw.astype(np.float64).reshape(shape) / 2**53 - 0.5
    of_filter = tuple(range(1, len(shape)))
    weights -= weights.mean(axis=of_filter, keepdims=True)
    weights /= np.sqrt((weights**2).sum(axis=of_filter, keepdims=True))
    return torch.from_numpy(weights.astype(np.float32))


def _halved(x: torch.Tensor) -> torch.Tensor:
    """Means of two pixels along every axis; an odd last one is left out.

    Bit by bit what average pooling gives, in three quarters of its time.
    """
    sizes = [size // 2 * 2 for size in x.shape[2:]]
    first, second, *others = (
        x[:, :, *(slice(start, size, 2) for start, size in zip(corner, sizes, strict=True))]
        for corner in product((0, 1), repeat=len(sizes))
    )
    total = first + second
    for part in others:
        total += part
    return total.div_(2 ** len(sizes))


def _convolve(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """A convolution that keeps the size; the border is repeated."""
    from torch.nn import functional

    axes, pad = filters.ndim - 2, filters.shape[-1] // 2
    convolve = functional.conv2d if axes == 2 else functional.conv3d
    return convolve(functional.pad(x, (pad,) * (2 * axes), mode="replicate"), filters)
