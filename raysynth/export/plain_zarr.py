"""A run as a plain Zarr v3 hierarchy, for tools that know no Icechunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.export.passport import Content, Passport, sealed
from raysynth.export.writing import ExportedSample, RunFacts, Write

NAME = "samples.zarr"
PARTS: dict[str, Content] = {"hu": "image", "layout": "labels"}
DIMENSIONS = ("z", "y", "x")

CODECS, MAX_BYTES = {"bytes", "zstd"}, 2**32
"""Of an array that is read back."""


@contextmanager
def zarr_files(folder: Path, facts: RunFacts) -> Iterator[Write]:
    """Writes samples.zarr: a group a sample, arrays `hu` and `layout` in it, attributes on each.

    A sample is a chunk, and its arrays carry their passports, so that a part of the hierarchy
    that is copied elsewhere still says what it is.
    """
    root = zarr.open_group(folder / NAME, mode="w", zarr_format=3)
    root.attrs.update(sealed(facts.passport | {"count": facts.count}, "set"))

    def write(sample: ExportedSample) -> None:
        group = root.create_group(sample.name, attributes=sealed(sample.passport, "text"))
        axes = DIMENSIONS[-sample.hu.ndim :]
        for name, values in (("hu", sample.hu), ("layout", sample.layout)):
            spacing = (facts.spacing_mm[0], facts.spacing_mm[1], facts.spacing_mm[1])
            array = group.create_array(
                name,
                data=np.ascontiguousarray(values),
                chunks=values.shape,
                dimension_names=axes,
                attributes=sealed(
                    sample.passport | {"spacing_mm": list(spacing[-values.ndim :])},
                    PARTS[name],
                    values,
                ),
            )
            assert array.shape == values.shape

    yield write


def zarr_passports(path: Path) -> Iterator[tuple[str, Passport, NDArray[Any] | None]]:
    """Path, attributes and values of every group and array of such a hierarchy, or of one array.

    Raises:
        OSError, ValueError, KeyError, TypeError: no Zarr, or a damaged one.
    """
    root = zarr.open(path, mode="r", zarr_format=3)
    nodes = [("", root)]
    if isinstance(root, zarr.Group):
        nodes += sorted(root.members(max_depth=None))
    for name, node in nodes:
        yield name, node.attrs.asdict(), _read(node) if isinstance(node, zarr.Array) else None


def _read(array: Any) -> NDArray[Any]:
    """Nothing of a stranger's is decoded but what exports are coded with, and no more than that."""
    codecs = {codec["name"] for codec in array.metadata.to_dict()["codecs"]}
    if not codecs <= CODECS or array.dtype.kind not in "iu" or array.nbytes > MAX_BYTES:
        raise ValueError(f"{array.nbytes:,} bytes of {array.dtype}, coded with {codecs}")
    return np.asarray(array[...])
