"""How much each owner has asked for lately."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raysynth.errors import RaysynthError
from raysynth.serving.tokens import Grant


class OverQuota(RaysynthError):
    """An owner asks for more than they may.

    Attributes:
        retry_after_s: when it is worth asking again.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Quotas:
    """Leaky buckets: an owner may use what an hour or minute allows at once, and it comes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has asked for anything.

        Args:
            clock: seconds that never go back.
        """
        self._clock = clock
        self._used: dict[tuple[str, str], tuple[float, float]] = {}
        self._unfinished: Counter[str] = Counter()

    def request(self, owner: str, grant: Grant) -> None:
        """Counts a request.

        Raises:
            OverQuota: there were too many.
        """
        self._use(owner, "requests_per_minute", 1, grant.requests_per_minute, 60)

    def draw(self, owner: str, grant: Grant, num_voxels: int) -> None:
        """Counts voxels that are to be drawn.

        Raises:
            OverQuota: there were too many.
        """
        self._use(owner, "voxels_per_hour", num_voxels, grant.voxels_per_hour, 3600)

    def check_unfinished(self, owner: str, grant: Grant, more: int) -> None:
        """Whether so many samples more may be under way.

        Raises:
            OverQuota: they may not.
        """
        if self._unfinished[owner] + more > grant.max_unfinished:
            raise OverQuota(
                f"{self._unfinished[owner]} samples of yours are unfinished, and {more} more are "
                f"above your {grant.max_unfinished} (max_unfinished)",
                retry_after_s=2,
            )

    @contextmanager
    def unfinished(self, owner: str, count: int) -> Iterator[None]:
        """Samples that are under way for the block."""
        self._unfinished[owner] += count
        try:
            yield
        finally:
            self._unfinished[owner] -= count

    def _use(self, owner: str, name: str, amount: float, limit: float, period_s: float) -> None:
        now = self._clock()
        used, since = self._used.get((owner, name), (0.0, now))
        used = max(0.0, used - (now - since) * limit / period_s)
        if used + amount > limit:
            # What is more than a period allows never fits; the message says how much does.
            wait_s = min((used + amount - limit) * period_s / limit, period_s)
            raise OverQuota(
                f"this is above your {name} of {limit:,}: ask again in {math.ceil(wait_s)} s",
                retry_after_s=math.ceil(wait_s),
            )
        self._used[owner, name] = (used + amount, now)
