"""How much time and memory a block of a test may take."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def bounds(max_cpu_s: float = 5, max_bytes: int = 64 << 20) -> Iterator[None]:
    """Fails if the block takes more time of the CPU, on all threads, or more resident memory.

    Time of the CPU, because a test's neighbours take the other.
    """
    before_bytes = _resident("VmRSS")
    # Forgets the highest mark so far; where there is no such thing, an older mark may hide a new.
    if CLEAR.exists():
        CLEAR.write_text("5")
    start = time.process_time()
    yield
    seconds = time.process_time() - start
    grown_bytes = _resident("VmHWM") - before_bytes
    assert seconds < max_cpu_s, f"{seconds:.1f} s"
    assert grown_bytes < max_bytes, f"{grown_bytes / 2**20:.0f} MiB"


def _resident(mark: str) -> int:
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    found = re.search(rf"{mark}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) << 10
