"""Events that closed forms leave out: stragglers, failures, a busy store; all from a seed."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

STEPS_AT_ONCE = 65_536
MOST_LEASES = 200_000
"""Work is handed out in so many leases at most, so that a simulation ends within seconds."""


@dataclass(frozen=True)
class TrainingOutcome:
    """A simulated training run.

    Attributes:
        seconds: in all.
        failures: of any of its workers.
        waiting_s: for the slowest worker of each step.
        saving_s: that checkpoints stood in the way.
        lost_s: steps done again, and restarts.
    """

    seconds: float
    failures: int
    waiting_s: float
    saving_s: float
    lost_s: float


def simulate_training(
    num_steps: int,
    step_s: float,
    *,
    num_workers: int,
    sigma: float,
    steps_between_checkpoints: int,
    stall_s: float,
    between_failures_s: float,
    restart_s: float,
    seed: int,
) -> TrainingOutcome:
    """Steps that end when the slowest worker ends, with failures that lead back to a checkpoint.

    Args:
        num_steps: to be made.
        step_s: of a worker that nothing holds up.
        num_workers: each step's time is the largest of as many log-normal ones.
        sigma: of their logarithm.
        steps_between_checkpoints: after which one is saved.
        stall_s: that saving one adds.
        between_failures_s: mean of the exponential time to the group's next failure.
        restart_s: from a failure until the first step after it.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    done, clock, failures = 0, 0.0, 0
    waiting, saving, lost = 0.0, 0.0, 0.0
    next_failure = rng.exponential(between_failures_s)
    saved_at = 0.0  # when the last checkpoint, or the start, was
    while done < num_steps:
        count = min(STEPS_AT_ONCE, num_steps - done)
        # The largest of n draws has the quantile U^(1/n) of one.
        slowest = np.exp(sigma * ndtri(rng.random(count) ** (1 / num_workers)))
        # Log-normal times have a mean above their median: step_s is the mean of one worker.
        seconds = step_s * slowest / math.exp(sigma**2 / 2)
        is_saved = (np.arange(done + 1, done + count + 1) % steps_between_checkpoints) == 0
        ends = clock + np.cumsum(seconds + stall_s * is_saved)
        through = int(np.searchsorted(ends, next_failure))
        waiting += float(seconds[:through].sum()) - step_s * through
        saves = np.flatnonzero(is_saved[:through])
        saving += stall_s * len(saves)
        if len(saves):
            saved_at = float(ends[saves[-1]])
        if through == count:
            done, clock = done + count, float(ends[-1])
            continue
        done = (done + through) // steps_between_checkpoints * steps_between_checkpoints
        failures += 1
        clock = next_failure + restart_s
        lost += clock - saved_at
        saved_at = clock
        next_failure = clock + rng.exponential(between_failures_s)
    return TrainingOutcome(clock, failures, waiting, saving, lost)


@dataclass(frozen=True)
class DrawingOutcome:
    """A simulated batch synthesis.

    Attributes:
        seconds: until the last sample is written.
        busy: share of the actors' time that went into samples that were kept.
        writing: share of it that went into waiting for the store.
        redone: units that were drawn more than once, since a node was lost.
        tail_s: from when the first actor had nothing left to do.
    """

    seconds: float
    busy: float
    writing: float
    redone: int
    tail_s: float


def simulate_drawing(
    num_units: int,
    unit_s: float,
    *,
    num_actors: int,
    actors_per_node: int,
    sigma: float,
    store_s: float,
    node_failures_per_s: float,
    restart_s: float,
    seed: int,
) -> DrawingOutcome:
    """Actors that draw units and write each before the next; what a lost node had is drawn again.

    Args:
        num_units: shards to be drawn.
        unit_s: of drawing one, mean.
        num_actors: processes that draw.
        actors_per_node: that are lost together.
        sigma: of the logarithm of a unit's time.
        store_s: that the store, which takes one after the other, is busy with one unit.
        node_failures_per_s: of one node.
        restart_s: until a lost node is back.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    lease = -(-num_units // MOST_LEASES)
    waiting = -(-num_units // lease)
    lease_s, lease_store_s = unit_s * lease, store_s * lease
    sigma /= math.sqrt(lease)
    # Events: an actor is free, or (with the seconds that it took) has drawn a lease.
    events = [(0.0, actor, 0.0) for actor in range(num_actors)]
    returned: list[float] = []  # when leases of lost nodes can be taken again
    failures = _Failures(rng, -(-num_actors // actors_per_node), node_failures_per_s, restart_s)
    store_free, kept_s, writing_s, redone, idle_from = 0.0, 0.0, 0.0, 0, math.inf
    durations: Iterator[float] = iter(())
    idle: list[int] = []
    while events:
        clock, actor, took = heapq.heappop(events)
        node = actor // actors_per_node
        if took:
            store_free = max(clock, store_free) + lease_store_s
            kept_s += took
            writing_s += store_free - clock
            clock = store_free
        if waiting:
            waiting -= 1
        elif returned:
            idle_from = min(idle_from, clock)
            clock = max(clock, heapq.heappop(returned))
        else:
            idle_from = min(idle_from, clock)
            idle.append(actor)
            continue
        clock = failures.up_from(node, clock)
        duration = next(durations, None)
        if duration is None:
            draws = np.exp(sigma * rng.standard_normal(STEPS_AT_ONCE) - sigma**2 / 2)
            durations = iter((lease_s * draws).tolist())
            duration = next(durations)
        failure = failures.between(node, clock, clock + duration)
        if failure is None:
            heapq.heappush(events, (clock + duration, actor, duration))
        else:
            redone += lease
            heapq.heappush(returned, failure)
            heapq.heappush(events, (failure, actor, 0.0))
            if idle:
                heapq.heappush(events, (failure, idle.pop(), 0.0))
    end = store_free
    total = end * num_actors
    return DrawingOutcome(end, kept_s / total, writing_s / total, redone, max(0.0, end - idle_from))


class _Failures:
    """When nodes are lost, drawn as far as anybody looks."""

    def __init__(
        self, rng: np.random.Generator, num_nodes: int, per_s: float, restart_s: float
    ) -> None:
        self.rng, self.per_s, self.restart_s = rng, per_s, restart_s
        self.lost: list[list[float]] = [[] for _ in range(num_nodes)]

    def between(self, node: int, start: float, stop: float) -> float | None:
        """The first failure of a node in [start, stop)."""
        if not self.per_s:
            return None
        lost = self.lost[node]
        while not lost or lost[-1] < stop:
            back = lost[-1] + self.restart_s if lost else 0.0
            lost.append(back + self.rng.exponential(1 / self.per_s))
        first = lost[bisect.bisect_left(lost, start)]
        return first if first < stop else None

    def up_from(self, node: int, clock: float) -> float:
        """When a node is there, from a time on."""
        last = bisect.bisect_right(self.lost[node], clock) - 1
        return clock if last < 0 else max(clock, self.lost[node][last] + self.restart_s)


@dataclass(frozen=True)
class ServingOutcome:
    """Simulated requests to many replicas.

    Attributes:
        mean_s: from a request's arrival to its end.
        p99_s: what one in a hundred exceeds.
        repeated: requests that a lost replica had, and another drew again.
        lost: requests that were never answered.
    """

    mean_s: float
    p99_s: float
    repeated: int
    lost: int


def simulate_serving(
    num_requests: int,
    service_s: float,
    *,
    num_replicas: int,
    slots: int,
    load: float,
    choices: int,
    lost_share: float,
    sigma: float,
    seed: int,
) -> ServingOutcome:
    """Poisson arrivals at replicas of some slots; each goes to the freest of a few at random.

    Power of two choices: Mitzenmacher 2001. In the middle of the run a share of the replicas is
    lost at once, and their requests begin again elsewhere.

    Args:
        num_requests: that arrive.
        service_s: mean seconds that a request holds a slot.
        num_replicas: there at the start.
        slots: requests that a replica draws together.
        load: arrivals, as a share of what all replicas together can draw.
        choices: replicas that are asked how free they are.
        lost_share: of the replicas.
        sigma: of the logarithm of a request's time in a slot.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    gap_s = service_s / (load * num_replicas * slots)
    arrivals = np.cumsum(rng.exponential(gap_s, num_requests))
    lost_at = float(arrivals[num_requests // 2])
    spread = np.exp(sigma * rng.standard_normal(num_requests) - sigma**2 / 2)
    took = (service_s * spread).tolist()
    waiting = [(when, number) for number, when in enumerate(arrivals.tolist())]
    # When each replica's slots are free again, the earliest first; and what it has been given.
    free = [[0.0] * slots for _ in range(num_replicas)]
    given: list[list[tuple[float, int]]] = [[] for _ in range(num_replicas)]
    ends = np.full(num_requests, np.nan)
    alive, repeated, is_whole = np.arange(num_replicas), 0, True
    while waiting:
        now, number = heapq.heappop(waiting)
        if is_whole and now >= lost_at:
            is_whole = False
            gone = rng.choice(alive, round(lost_share * num_replicas), replace=False)
            alive = np.setdiff1d(alive, gone)
            again = [one for replica in gone for end, one in given[replica] if end > now]
            repeated = len(again)
            ends[again] = np.nan
            for one in again:
                heapq.heappush(waiting, (now, one))
        asked = rng.choice(alive, choices).tolist()
        # How long until a slot is free, and then how many are taken.
        best = min(asked, key=lambda one: (max(free[one][0], now), sum(t > now for t in free[one])))
        end = max(now, heapq.heappop(free[best])) + took[number]
        heapq.heappush(free[best], end)
        if is_whole:
            given[best].append((end, number))
        ends[number] = end
    latency = ends - arrivals
    p99 = float(np.nanpercentile(latency, 99))
    return ServingOutcome(float(np.nanmean(latency)), p99, repeated, int(np.isnan(ends).sum()))
