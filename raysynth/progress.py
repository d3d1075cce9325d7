"""A run's progress: a live line on a terminal, JSON lines elsewhere, metrics of its Ray session.

Also how long stages took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

_TIMINGS = "timings.json"

METRICS = {
    "raysynth_done": "units of a stage that are done",
    "raysynth_total": "units of a stage",
    "raysynth_per_second": "units done a second, of this attempt",
    "raysynth_seconds_left": "until the stage ends at this rate",
    "raysynth_value": "what a stage shows beside its rate: a loss, a distance",
}
"""Gauges by name, labelled by stage, unit and, of the last, name. Ray puts `ray_` before them."""


class Progress:
    """Counts units of one stage. `advance` is cheap: output is limited to a few lines a second."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = 0
        self._noted: dict[str, float | str] = {}
        self._start = time.monotonic()
        self._first = 0
        self._last_shown = 0.0
        self._live = sys.stderr.isatty()

    def advance(self, count: int = 1, **fields: float | str) -> None:
        """Adds finished units; `fields` (a loss, say) are shown beside the rate."""
        self.update(self.done + count, **fields)

    def note(self, **fields: float | str) -> None:
        """Shows these beside the rate from now on; a thread of its own may tell them."""
        self._noted = self._noted | fields
        if self.done < self.total:
            self.update(self.done)

    def resume(self, done: int) -> None:
        """Counts units that an earlier, interrupted run finished; they do not make the rate."""
        self.done = self._first = done

    def update(self, done: int, **fields: float | str) -> None:
        """Sets the number of finished units."""
        self.done = done
        interval = 0.2 if self._live else 5.0
        now = time.monotonic()
        if done >= self.total or now - self._last_shown >= interval:
            self._last_shown = now
            self._show(now - self._start, self._noted | fields)

    def _show(self, seconds: float, fields: dict[str, float | str]) -> None:
        rate = (self.done - self._first) / seconds if seconds > 0 else 0.0
        left_s = (self.total - self.done) / rate if rate > 0 else float("nan")
        self._export(rate, left_s, fields)
        if not self._live:
            line = {
                "stage": self.stage,
                "done": self.done,
                "total": self.total,
                f"{self.unit}_per_s": round(rate, 3),
                "left_s": None if left_s != left_s else round(left_s, 1),
                **fields,
            }
            print(json.dumps(line), file=sys.stderr, flush=True)  # noqa: T201
            return
        shown = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in fields.items()
        )
        left = "" if left_s != left_s else f"  {left_s:.0f} s left"
        line_text = (
            f"\r\x1b[K{self.stage}  {self.done}/{self.total} {self.unit}  "
            f"{rate:.1f}/s{left}  {shown}"
        )
        sys.stderr.write(line_text)
        sys.stderr.flush()

    def _export(self, rate: float, left_s: float, fields: dict[str, float | str]) -> None:
        """To the metrics of the Ray session, if there is one."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        gauges, labels = _gauges(), {"stage": self.stage, "unit": self.unit, "name": ""}
        values = (self.done, self.total, rate, left_s)
        for gauge, value in zip(list(METRICS)[:-1], values, strict=True):
            if value == value:
                gauges[gauge].set(value, labels)
        for name, field in fields.items():
            if isinstance(field, float) and field == field:
                gauges["raysynth_value"].set(field, labels | {"name": name})

    def close(self) -> None:
        """Ends the line."""
        if self._live:
            sys.stderr.write("\n")


@lru_cache(maxsize=1)
def _gauges() -> dict[str, Any]:
    """Once a process: Ray has one of each name."""
    from ray.util.metrics import Gauge

    labels = ("stage", "unit", "name")
    return {name: Gauge(name, description, labels) for name, description in METRICS.items()}


def stage_seconds(work_dir: Path) -> dict[str, float]:
    """Wall seconds of the stages run in a work_dir, by `verb name`, over all their attempts."""
    path = work_dir / _TIMINGS
    return json.loads(path.read_text()) if path.exists() else {}


def add_stage_seconds(work_dir: Path, stage: str, seconds: float) -> None:
    """Adds to a stage's time, so that one that was stopped and run again keeps what it had."""
    timings = stage_seconds(work_dir)
    timings[stage] = round(timings.get(stage, 0.0) + seconds, 2)
    work_dir.mkdir(parents=True, exist_ok=True)
    scratch = work_dir / f".{os.getpid()}-{_TIMINGS}"
    scratch.write_text(json.dumps(timings, indent=1))
    scratch.replace(work_dir / _TIMINGS)


@contextmanager
def progress(stage: str, total: int, unit: str = "samples") -> Iterator[Progress]:
    """A stage's progress for the block."""
    view = Progress(stage, total, unit)
    try:
        yield view
    finally:
        view.close()
