"""Whoever reads a figure must be told what it can be and which way is better."""

import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import raysynth.metrics

NO_METRICS = {
    # Statistics and features that metrics are computed from.
    "FeatureMoments",
    "FeatureTable",
    "median_distance",
    "num_ssim_scales",
    "tissue_histograms",
    "radiomic_features",
    "measurable_masks",
    "windowed_pair",
    # What metrics return; a field tells its own range where the metric does not.
    "FrechetLimit",
    "ManifoldOverlap",
    "KernelDistance",
    "PairedErrors",
    "Similarity",
}
ABOUT_EXTRACTORS = {"domain", "features", "fidelity", "given", "networks", "samples", "weights"}
NO_FIGURES = {"memorization", "running"}
"""Modules of likeness, one image with another, and of what distances are computed from."""


def _public() -> dict[str, Any]:
    """Public functions and classes by module and name, each where it is defined."""
    found = {}
    for module in pkgutil.iter_modules(raysynth.metrics.__path__):
        if module.name in ABOUT_EXTRACTORS | NO_FIGURES:
            continue
        loaded = importlib.import_module(f"raysynth.metrics.{module.name}")
        for name, value in vars(loaded).items():
            defined = inspect.isfunction(value) or inspect.isclass(value)
            if defined and value.__module__ == loaded.__name__ and not name.startswith("_"):
                found[f"{module.name}.{name}"] = value
    return found


METRICS = {
    place: value for place, value in _public().items() if place.split(".")[1] not in NO_METRICS
}


@pytest.mark.parametrize("place", METRICS)
def test_every_metric_states_its_range_and_direction(place: str) -> None:
    told = inspect.getdoc(METRICS[place]) or ""
    assert "ange" in told, f"{place} says nothing of its range"  # "Range" or "ranges"
    assert "better" in told, f"{place} does not say which way is better"
    assert "20" in told or "19" in told, f"{place} names no paper"


def test_the_metrics_are_found() -> None:
    names = {place.split(".")[1] for place in METRICS}
    assert {"frechet_distance", "kernel_distance", "manifold_overlap", "ssim", "Lpips"} <= names
    assert {place.split(".")[1] for place in _public()} >= NO_METRICS
