"""What several ways to do one thing cost: ratios with intervals, a table and a line of JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Seconds(NamedTuple):
    """By the processor's clock, which other load hardly moves, and by the wall's."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Seconds:
        """The clocks."""
        return cls(time.process_time(), time.perf_counter())

    def elapsed(self) -> Seconds:
        """What has passed since these clocks were read."""
        now = Seconds.now()
        return Seconds(now.cpu - self.cpu, now.wall - self.wall)


@dataclass(frozen=True)
class Row:
    """One way in a table.

    Attributes:
        name: of the way.
        cpu_ms: median of processor time.
        wall_ms: median of wall time.
        ratio: the median paired ratio of processor times; None for the way that others are
            compared with.
        interval: its 95 % bootstrap interval.
        at_least: what the ratio must reach; None: nothing is asked.
        at_most: what it must not pass.
    """

    name: str
    cpu_ms: float
    wall_ms: float
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_missed(self) -> bool:
        """Whether a target is."""
        if self.ratio is None:
            return False
        too_low = self.at_least is not None and self.ratio < self.at_least
        return too_low or (self.at_most is not None and self.ratio > self.at_most)


def median_row(name: str, spent: Sequence[Seconds]) -> Row:
    """The row of the way that others are compared with."""
    cpu, wall = 1e3 * np.median(spent, axis=0)
    return Row(name, float(cpu), float(wall))


def paired_ratio(
    over: Sequence[Seconds], under: Sequence[Seconds]
) -> tuple[float, tuple[float, float]]:
    """The median ratio of processor times taken in turn, and its 95 % bootstrap interval."""
    ratios = np.array([a.cpu / b.cpu for a, b in zip(over, under, strict=True)])
    drawn = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5]).tolist()
    return float(np.median(ratios)), (low, high)


def memory_bytes(name: str) -> int:
    """Of this process, as Linux counts it: what it holds (`VmRSS`), or its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) * 1024


def forget_peak() -> None:
    """Lets the peak of this process's memory begin at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def facts_of_run(*packages: str) -> dict[str, Any]:
    """What a figure depends on, besides its seed: `report` adds the load at the end."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "threads": 1,
        "cores": os.cpu_count(),
        "load": [round(os.getloadavg()[0], 2)],
    }


def report(facts: dict[str, Any], tables: dict[str, list[Row]], of: str) -> int:
    """Prints the tables and the JSON line; returns the exit code, 1 where a target is missed.

    Args:
        facts: of the run.
        tables: rows by title.
        of: what the ratios are, for their column's head.
    """
    facts["load"].append(round(os.getloadavg()[0], 2))
    loaded = " (loaded)" if max(facts["load"]) > 0.5 else ""
    for name, fact in facts.items():
        print(f"{name}: {fact}{loaded if name == 'load' else ''}")
    for title, rows in tables.items():
        print(f"\n{title:44s}{'CPU ms':>10s}{'wall ms':>10s}   {of}")
        for row in rows:
            print(_line(row))
    missed = [
        f"{title}: {row.name}" for title, rows in tables.items() for row in rows if row.is_missed
    ]
    print(f"\nmissed: {missed or 'nothing'}")
    listed = {title: [asdict(row) for row in rows] for title, rows in tables.items()}
    print(json.dumps(facts | {"tables": listed, "missed": missed}))
    return int(bool(missed))


def _line(row: Row) -> str:
    line = f"  {row.name:42s}{row.cpu_ms:10.1f}{row.wall_ms:10.1f}"
    if row.ratio is None or row.interval is None:
        return line
    line += f"   {row.ratio:.3f} [{row.interval[0]:.3f}, {row.interval[1]:.3f}]"
    for sign, target in ((">=", row.at_least), ("<=", row.at_most)):
        if target is not None:
            line += f"   target {sign} {target:g}: {'MISSED' if row.is_missed else 'met'}"
    return line
