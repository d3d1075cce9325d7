"""The report's charts, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REAL, SYNTHETIC, CONTROL, INK = "#3b7dd8", "#e07b39", "#9aa3ad", "#39424e"


Estimate = tuple[float, tuple[float, float] | None]
"""A value and its interval, if there are patients enough for one."""


@dataclass(frozen=True)
class SweepPanel:
    """One figure over the guidance scales, and that of patients."""

    title: str
    scales: Sequence[float]
    values: Sequence[Estimate]
    patients: Estimate | None


def loss_chart(curves: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> str:
    """Training loss against samples seen, one panel a model."""
    figure, panels = _figure(len(curves), width=3.6)
    for panel, (name, (seen, loss)) in zip(panels, curves.items(), strict=True):
        panel.plot(seen, loss, color=CONTROL, linewidth=0.8)
        panel.plot(seen, _smooth(loss), color=SYNTHETIC, linewidth=1.8)
        _title(panel, name)
        panel.set_xlabel("samples seen")
        panel.set_yscale("log")
    panels[0].set_ylabel("loss")
    return _svg(figure)


def size_chart(requested_mm: NDArray[np.float64], measured_mm: NDArray[np.float64]) -> str:
    """Re-measured against requested nodule diameter; the diagonal is perfect."""
    figure, (panel,) = _figure(1, width=3.6)
    limit = float(np.nanmax([*requested_mm, *measured_mm, 1.0])) * 1.05
    panel.plot([0, limit], [0, limit], color=CONTROL, linewidth=1)
    panel.scatter(requested_mm, measured_mm, s=9, color=SYNTHETIC, alpha=0.6, linewidths=0)
    panel.set(xlim=(0, limit), ylim=(0, limit), xlabel="requested, mm", ylabel="found, mm")
    _title(panel, "nodule diameter")
    return _svg(figure)


def coverage_chart(
    names: Sequence[str], requested: NDArray[np.float64], reference: NDArray[np.float64]
) -> str:
    """Shares of the scores 1-5 of each attribute: requested beside LIDC's readers.

    Args:
        names: attributes.
        requested: shares, shape (attributes, 5).
        reference: the same of the annotation database.
    """
    figure, panels = _figure(len(names), width=1.7)
    scores = np.arange(1, 6)
    for panel, name, asked, real in zip(panels, names, requested, reference, strict=True):
        panel.bar(scores - 0.2, real, 0.4, color=REAL, label="LIDC readers")
        panel.bar(scores + 0.2, asked, 0.4, color=SYNTHETIC, label="requested")
        _title(panel, name)
        panel.set_xticks(scores)
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("share")
    panels[-1].legend(frameon=False, fontsize=7)
    return _svg(figure)


def metric_chart(
    title: str, entries: Sequence[tuple[str, float, tuple[float, float] | None, bool]]
) -> str:
    """One metric of several sets as points with intervals; lower is better.

    Args:
        title: the metric's key.
        entries: (name, value, interval if there is one, is the judged set).
    """
    figure, (panel,) = _figure(1, width=3.6, height=0.7 + 0.32 * len(entries))
    for row, (_, value, interval, judged) in enumerate(entries):
        color = SYNTHETIC if judged else CONTROL
        if interval is not None:
            panel.plot(interval, [row, row], color=color, linewidth=3, alpha=0.5)
        panel.plot(value, row, "o", color=color, markersize=6)
    panel.set_yticks(range(len(entries)), [name for name, *_ in entries])
    panel.set_ylim(len(entries) - 0.5, -0.5)
    lowest = [value if interval is None else interval[0] for _, value, interval, _ in entries]
    panel.set_xlim(left=min(0.0, *lowest))
    metric, _, place = title.partition("/")
    _title(panel, f"{metric}\n{place}")
    return _svg(figure)


def sweep_chart(panels: Sequence[SweepPanel], chosen: float | None) -> str:
    """Curves over the guidance scale with their intervals; a line where the choice lies."""
    figure, axes = _figure(len(panels), width=2.6)
    for axis, panel in zip(axes, panels, strict=True):
        values = [value for value, _ in panel.values]
        if panel.patients is not None:
            value, interval = panel.patients
            axis.axhline(value, color=REAL, linewidth=1.2, label="patients")
            if interval is not None:
                axis.axhspan(*interval, color=REAL, alpha=0.15, linewidth=0)
        for scale, (_, interval) in zip(panel.scales, panel.values, strict=True):
            if interval is not None:
                axis.plot([scale] * 2, interval, color=SYNTHETIC, linewidth=3, alpha=0.5)
        axis.plot(panel.scales, values, "o-", color=SYNTHETIC, markersize=4, label="synthetic")
        if chosen is not None:
            axis.axvline(chosen, color=INK, linewidth=0.8, linestyle=":", label="chosen")
        axis.set_xticks(panel.scales, [f"{scale:g}" for scale in panel.scales])
        axis.set_xlabel("guidance scale")
        _title(axis, panel.title)
    axes[0].legend(frameon=False, fontsize=7)
    return _svg(figure)


def histogram_chart(edges: NDArray[np.int64], counts: dict[str, NDArray[np.int64]]) -> str:
    """Share of each tissue's voxels by HU, on a logarithmic axis."""
    figure, (panel,) = _figure(1, width=7.2, height=3.0)
    for tissue, voxels in counts.items():
        panel.stairs(voxels / voxels.sum(), edges, label=tissue, linewidth=1.4)
    panel.set(xlabel="HU", ylabel="share of the tissue's voxels", yscale="log")
    if counts:
        panel.legend(frameon=False, fontsize=7, ncols=2)
    return _svg(figure)


def geometry_chart(spacing_mm: NDArray[np.float64], diameter_mm: NDArray[np.float64]) -> str:
    """Voxel sizes of the cases, and diameters of their nodules."""
    figure, (voxels, *others) = _figure(2 if len(diameter_mm) else 1, width=3.6)
    across, between = spacing_mm[:, 2], spacing_mm[:, 0]
    voxels.scatter(across, between, s=12, color=REAL, alpha=0.6, linewidths=0)
    voxels.set(xlabel="in the plane, mm", ylabel="between planes, mm")
    voxels.set(xlim=(0, 1.1 * max(across, default=1)), ylim=(0, 1.1 * max(between, default=1)))
    _title(voxels, "voxel size of the cases")
    for nodules in others:
        bins = np.arange(0, 2 + max(30, *diameter_mm), 2).tolist()
        nodules.hist(diameter_mm, bins=bins, color=REAL)
        nodules.set(xlabel="diameter, mm", ylabel="nodules")
        _title(nodules, "nodules")
    return _svg(figure)


def time_chart(seconds: dict[str, float]) -> str:
    """Where the run's time went."""
    figure, (panel,) = _figure(1, width=7.2, height=0.4 + 0.26 * len(seconds))
    panel.barh(list(seconds), list(seconds.values()), color=REAL, height=0.7)
    for row, value in enumerate(seconds.values()):
        panel.text(value, row, f" {value:.1f} s", va="center", fontsize=8, color=INK)
    panel.invert_yaxis()
    panel.set_xlabel("seconds")
    panel.margins(x=0.12)
    return _svg(figure)


def _figure(count: int, width: float, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, color=INK, labelcolor=INK)
        panel.xaxis.label.set_fontsize(8)
        panel.yaxis.label.set_fontsize(8)
    return figure, list(panels)


def _title(panel: Axes, text: str) -> None:
    panel.set_title(text, fontsize=9, color=INK)


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "raysynth", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    width = max(1, len(values) // 20)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")
