"""Decoding of volumes slab by slab: what the whole network gives, in a fraction of its memory.

Tiles that are decoded one by one differ at their borders, as every group normalisation sees its own
tile; and where tiles overlap work is done twice. Here each layer passes over the volume in slabs
with the one or two planes that its convolution needs of the neighbours, normalised by the
statistics of the whole layer. So nothing is computed twice and there is no seam: results differ
from the whole network's by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysynth.models.monai import AEKLResBlock, AutoencoderKL, UpSample

SLAB_VOXELS = 2**18
"""Of a layer's output that are computed at once: 16 planes of 128 x 128."""

Read = Callable[[int, int], Tensor]
"""Planes [start, stop) of a layer's input."""

Size = tuple[int, int, int]
"""Of a volume, (z, y, x)."""


def decode_in_slabs(network: AutoencoderKL, latents: Tensor) -> Tensor:
    """What `network.decode` gives, without gradients.

    At the finest level its peak is the input and the output of one layer and some slabs.

    Args:
        network: without attention, as `KLAutoencoder` builds it.
        latents: (B, c, d, h, w).

    Returns:
        Images (B, 1, z, y, x).
    """
    x: Tensor = network.post_quant_conv(latents)
    norm: nn.GroupNorm | None = None
    for block in network.decoder.get_submodule("blocks").children():
        match block:
            case AEKLResBlock():
                x = _residual(block, x)
            case UpSample():
                x = _upsampled(block, x)
            case nn.GroupNorm():
                norm = block  # of the last convolution's input
            case _:
                x = _convolved(_conv_of(block), *_normalised(norm, x, activate=False))
    return x


def _residual(block: AEKLResBlock, x: Tensor) -> Tensor:
    """MONAI's residual block, as far as possible in the memory of x."""
    first, channels = _normalised(block.norm1, x), block.out_channels
    if x.shape[1] >= 2 * channels:
        hidden, out = x[:, :channels], x[:, channels : 2 * channels]
        held: tuple[slice, Tensor, Tensor] | None = None
        for start, stop, slab in _slabs(_conv_of(block.conv1), *first):
            shortcut = block.nin_shortcut(x[:, :, start:stop])
            _store(held, hidden, out)  # the next slab reads planes of this one: it waits
            held = slice(start, stop), slab, shortcut
        _store(held, hidden, out)
    else:
        hidden = _convolved(_conv_of(block.conv1), *first)
        out = x[:, :channels] if channels <= x.shape[1] else torch.empty_like(hidden)
        for start, stop in _ranges(first[1]):
            out[:, :, start:stop] = block.nin_shortcut(x[:, :, start:stop])
    for start, stop, slab in _slabs(_conv_of(block.conv2), *_normalised(block.norm2, hidden)):
        out[:, :, start:stop] += slab
    return out


def _store(held: tuple[slice, Tensor, Tensor] | None, *places: Tensor) -> None:
    """Puts what was computed for some planes into each of two tensors."""
    if held is not None:
        planes, *values = held
        for place, value in zip(places, values, strict=True):
            place[:, :, planes] = value


def _upsampled(block: UpSample, x: Tensor) -> Tensor:
    """Every voxel eight times, and a convolution."""

    def read(start: int, stop: int) -> Tensor:
        first = start // 2
        planes = functional.interpolate(x[:, :, first : (stop + 1) // 2], scale_factor=2.0)
        return planes[:, :, start - 2 * first : stop - 2 * first]

    depth, height, width = (2 * size for size in x.shape[2:])
    return _convolved(_conv_of(block.get_submodule("postconv")), read, (depth, height, width))


def _normalised(norm: nn.GroupNorm | None, x: Tensor, activate: bool = True) -> tuple[Read, Size]:
    """Reads planes of x normalised over the whole of it; and how large x is."""
    depth, height, width = x.shape[2:]
    size = depth, height, width
    if norm is None:
        return (lambda start, stop: x[:, :, start:stop]), size
    scale, shift = _scale_and_shift(norm, x)

    def read(start: int, stop: int) -> Tensor:
        planes = torch.addcmul(shift, x[:, :, start:stop], scale)
        return functional.silu(planes, inplace=True) if activate else planes

    return read, size


def _scale_and_shift(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel, (B, C, 1, 1, 1), that normalise its group."""
    batch, channels, depth, height, width = x.shape
    sums = torch.zeros(2, batch, norm.num_groups, dtype=torch.float64, device=x.device)
    for start, stop in _ranges((depth, height, width)):
        planes = x[:, :, start:stop].float()
        grouped = planes.reshape(batch, norm.num_groups, -1, *planes.shape[2:])
        sums[0] += grouped.sum((2, 3, 4, 5))
        sums[1] += grouped.square().sum((2, 3, 4, 5))
    mean, square = sums / (x[0].numel() // norm.num_groups)
    spread = (square - mean.square() + norm.eps).rsqrt()
    members = channels // norm.num_groups
    scale = spread.repeat_interleave(members, 1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(members, 1) * scale
    shape = (batch, channels, 1, 1, 1)
    return scale.to(x.dtype).view(shape), shift.to(x.dtype).view(shape)


def _conv_of(block: nn.Module) -> nn.Conv3d:
    """The convolution within MONAI's."""
    conv = block.get_submodule("conv")
    assert isinstance(conv, nn.Conv3d)
    return conv


def _convolved(conv: nn.Conv3d, read: Read, size: Size) -> Tensor:
    out: Tensor | None = None
    for start, stop, slab in _slabs(conv, read, size):
        if out is None:
            out = slab.new_empty(*slab.shape[:2], *size)
        out[:, :, start:stop] = slab
    assert out is not None
    return out


def _slabs(conv: nn.Conv3d, read: Read, size: Size) -> Iterator[tuple[int, int, Tensor]]:
    """Slabs of a convolution's output: first and last plane, and values."""
    halo, depth = conv.kernel_size[0] // 2, size[0]
    for start, stop in _ranges(size):
        low, high = max(0, start - halo), min(depth, stop + halo)
        missing = (low - start + halo, stop + halo - high)
        planes = read(low, high)
        if any(missing):
            planes = functional.pad(planes, (0, 0, 0, 0, *missing))
        padding = (0, halo, halo)
        yield start, stop, functional.conv3d(planes, conv.weight, conv.bias, padding=padding)


def _ranges(size: Size) -> Iterator[tuple[int, int]]:
    planes = max(1, SLAB_VOXELS // (size[1] * size[2]))
    for start in range(0, size[0], planes):
        yield start, min(start + planes, size[0])
