"""Feature extractors by name: what Fréchet and kernel distances compare."""

from __future__ import annotations

from collections.abc import Mapping
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


def load_extractor(name: str, weights: Mapping[str, Path] | None = None) -> Extractor:
    """An extractor by its name in a recipe, one of `EXTRACTOR_NAMES`.

    Args:
        name: of the extractor.
        weights: `evaluation.extractor_weights`, the files of weights by extractor.

    Raises:
        InputError: unknown name, weights or a bundle that are absent or another network's, or a
            module of the user's that gives no extractor.
    """
    file = (weights or {}).get(name)
    match name.partition(":"):
        case "ct-conv", "", _:
            return CtConv()
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
    Slices go through the network at one fixed batch shape: a feature does not depend, to the last
    bit, on which slices it is computed with.
    """

    name = "ct-conv@1"
    dim = 80
    spatial_dims = 2

    num_scales = 4
    num_filters = 8
    batch_size = 32
    band_edges_hu = (-950, -500, -150, -20, 150)
    """Air, lung, partly filled lung, fat, soft tissue, bone."""
    gains = (8.0, 1.0, 2.0)
    """Factors of responses, grid and bands."""

    def __init__(self) -> None:
        import torch

        bits = np.random.PCG64(20_261_120)
        f = self.num_filters
        self._layers = [
            (_filters(bits, (f, 1, 5, 5)), _filters(bits, (f, f, 3, 3)))
            for _ in range(self.num_scales)
        ]
        low, high = LUNG_WINDOW_HU
        edges = [(edge - low) / (high - low) * 2 - 1 for edge in self.band_edges_hu]
        self._edges = torch.tensor(edges, dtype=torch.float32)

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Features (n, 80) of slices (n, y, x)."""
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
        """Features of windowed images in [-1, 1], shape (B, 1, H, W)."""
        import torch
        from torch.nn import functional

        responses, scaled = [], images
        for first, second in self._layers:
            x = _convolve(scaled, first).relu_()  # (B, 8, h, w)
            responses.append(x.mean((2, 3)))
            x = _convolve(_halved(x), second).relu_()
            responses.append(x.mean((2, 3)))
            scaled = _halved(scaled)
        grid = functional.adaptive_avg_pool2d(images, 3).flatten(1)
        pixels = images.flatten(1)
        count = pixels.shape[1]
        above = torch.stack([(pixels > edge).sum(1) for edge in self._edges], 1)  # (B, edges)
        shares = -torch.diff(functional.pad(above, (1, 0), value=count), append=0 * above[:, :1])
        bands = torch.cat([shares / count, pixels.std(1, keepdim=True)], 1)
        response_gain, grid_gain, band_gain = self.gains
        return torch.cat(
            [torch.cat(responses, 1) * response_gain, grid * grid_gain, bands * band_gain], 1
        )


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


def _filters(bits: np.random.PCG64, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Random filters (out, in, h, w) of zero mean and unit norm."""
    import torch

    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
    weights = raw.astype(np.float64).reshape(shape) / 2**53 - 0.5
    weights -= weights.mean(axis=(1, 2, 3), keepdims=True)
    weights /= np.sqrt((weights**2).sum(axis=(1, 2, 3), keepdims=True))
    return torch.from_numpy(weights.astype(np.float32))


def _halved(x: torch.Tensor) -> torch.Tensor:
    """Means of 2 x 2 pixels; an odd last row or column is left out.

    Bit by bit what `avg_pool2d` gives, in three quarters of its time.
    """
    h, w = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    a, b, c, d = (x[..., i:h:2, j:w:2] for i in (0, 1) for j in (0, 1))
    return (a + b).add_(c).add_(d).div_(4)


def _convolve(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """A convolution that keeps the size; the border is repeated."""
    from torch.nn import functional

    pad = filters.shape[-1] // 2
    return functional.conv2d(functional.pad(x, (pad,) * 4, mode="replicate"), filters)
