"""Features of a network that raysynth trained itself on slices of this domain.

It learned from the training split alone: the test patients that metrics compare with are as new to
it as synthetic slices are. Its bundle says how many patients of which split its store had; whoever
judges another store must see to it that none of these is tested there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raysynth.case import Intensity
from raysynth.config.evaluation import BUNDLE_PREFIX
from raysynth.errors import InputError
from raysynth.models.bundle import load_bundle, read_facts
from raysynth.volume import RELATIVE_RANGE
from raysynth.window import LUNG_WINDOW_HU, normalize


class Domain:
    """`domain-<name of the bundle>@<start of its digest>`: the encoder of an extractor's bundle.

    Slices go through the network at one fixed batch shape: a feature does not depend, to the last
    bit, on which slices it is computed with.
    """

    spatial_dims = 2
    batch_size = 32

    def __init__(self, path: Path) -> None:
        """Loads the bundle at `path`.

        Raises:
            InputError: there is none, it is damaged, or it is another model's.
        """
        facts = read_facts(path)
        bundle = load_bundle(path) if facts.model.family == "extractor" else None
        if bundle is None or bundle.encoder is None:
            raise InputError(
                f"bundle {path} is a {facts.model.family}, which has no features to compare: give "
                "evaluation.extractors the bundle of an extractor recipe"
            )
        self.name = f"domain-{path.name}@{bundle.digest[:8]}"
        self.dim = bundle.encoder.last.out_features
        self._encoder = bundle.encoder
        self._window = shown_window(bundle.window_hu, bundle.intensity)

    def __call__(self, hu: NDArray[np.int16]) -> NDArray[np.float32]:
        """Features (n, dim) of slices (n, y, x)."""
        features = np.empty((len(hu), self.dim), np.float32)
        padded = np.zeros((self.batch_size, 1, *hu.shape[1:]), np.float32)
        for start in range(0, len(hu), self.batch_size):
            batch = hu[start : start + self.batch_size]
            padded[: len(batch), 0] = normalize(batch, self._window)
            with torch.inference_mode():
                computed = self._encoder(torch.from_numpy(padded))
            features[start : start + len(batch)] = computed[: len(batch)].numpy()
        return features


def shown_window(window_hu: tuple[float, float], intensity: Intensity) -> tuple[float, float]:
    """A bundle's window in the values that extractors are shown (`raysynth.window.measurable`).

    Those of images in HU are their own. Grey values without a unit come laid on the window of
    lungs, and the bundle's window with them.
    """
    if intensity == "hu":
        return window_hu
    low, high = LUNG_WINDOW_HU
    first, last = RELATIVE_RANGE
    start, stop = (low + (end - first) * (high - low) / (last - first) for end in window_hu)
    return start, stop


def check_intensity(extractors: tuple[str, ...], intensity: Intensity) -> None:
    """An extractor of images in HU knows nothing of grey values without a unit, nor the reverse.

    Args:
        extractors: names, as in a recipe.
        intensity: of the sets that are judged.

    Raises:
        InputError: one of them learned on the other kind.
    """
    for name in extractors:
        if not name.startswith(BUNDLE_PREFIX):
            continue
        learned = read_facts(Path(name.removeprefix(BUNDLE_PREFIX))).intensity
        if learned != intensity:
            raise InputError(
                f"evaluation.extractors: {name} learned on intensity {learned!r}, the samples have "
                f"{intensity!r}: train one on these samples"
            )
