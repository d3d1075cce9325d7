"""What must hold of samples before any figure of them means something."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.errors import InputError

Features = NDArray[np.floating]


def checked_features(features: Features, metric: str, at_least: int) -> NDArray[np.float64]:
    """Features (n, dim) in float64, as metrics compute with them.

    Args:
        features: of n samples.
        metric: whose they are, for the message.
        at_least: samples without which its value would say nothing.

    Raises:
        InputError: too few, of another shape, or some are not finite.
    """
    if features.ndim != 2:
        raise InputError(f"{metric} compares features (n, dim), not an array {features.shape}")
    if len(features) < at_least:
        raise InputError(
            f"{metric} needs at least {at_least} samples a side, got {len(features)}: give more"
        )
    values = np.asarray(features, dtype=np.float64)
    require_finite(values, metric, "features")
    return values


def checked_pair(
    real: Features, synthetic: Features, metric: str, at_least: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`checked_features` of both sides, which must be as long as each other's."""
    x, y = (checked_features(side, metric, at_least) for side in (real, synthetic))
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"{metric} of {x.shape[1]} and {y.shape[1]} features a sample: compare those of one "
            "extractor"
        )
    return x, y


def require_finite(values: NDArray[Any], metric: str, what: str) -> None:
    """Refuses NaN and infinity, which would pass unseen through a clip or a comparison.

    Raises:
        InputError: says how many of the samples (n, ...) hold some, and which is the first.
    """
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    raise InputError(
        f"{metric}: {what} of {len(bad)} of {len(values)} samples are not finite numbers, first "
        f"of sample {bad[0]}: leave them out"
    )
