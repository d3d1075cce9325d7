"""Extractors that a user's own module gives, held to what ours promise."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError
from raysynth.metrics.features import Extractor
from raysynth.metrics.samples import require_finite


class CheckedExtractor:
    """An extractor whose features are looked at before anybody compares them.

    Args:
        extract: it.
        place: where it comes from, for messages.

    Raises:
        InputError: it has no name with a version, or no length of its features.
    """

    def __init__(self, extract: Extractor, place: str) -> None:
        name, dim = getattr(extract, "name", None), getattr(extract, "dim", None)
        if not isinstance(name, str) or "@" not in name or "/" in name:
            raise InputError(
                f"{place} returned an extractor whose name is {name!r}: metric keys need "
                "NAME@VERSION without a slash"
            )
        if not isinstance(dim, int) or dim < 1:
            raise InputError(
                f"{place} returned an extractor whose dim is {dim!r}: give the length of a "
                "feature vector"
            )
        self.name, self.dim = name, dim
        self.spatial_dims: int = getattr(extract, "spatial_dims", 2)
        self._extract, self._place = extract, place

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Its features (n, dim).

        Raises:
            InputError: they are of another shape, or not finite.
        """
        features: NDArray[Any] = np.asarray(self._extract(hu), dtype=np.float32)
        if features.shape != (len(hu), self.dim):
            raise InputError(
                f"{self._place} gave features {features.shape} of {len(hu)} samples: its dim "
                f"promises {(len(hu), self.dim)}"
            )
        require_finite(features, self._place, "features")
        return features


def given_extractor(place: str) -> CheckedExtractor:
    """What the function at `PACKAGE.NAME:FUNCTION` returns, called without arguments.

    Raises:
        InputError: there is no such module or function, or it returns no extractor.
    """
    module, _, function = place.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"extractor module:{place}: {error}: name a module that every worker can import, and "
            "a function in it"
        ) from error
    return CheckedExtractor(build(), f"extractor module:{place}")
