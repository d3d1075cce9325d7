"""Training batches from a sample set: whole shards, shuffled, in an order no worker count changes.

The order is a function of (seed, position) alone. An epoch shuffles the shards, and the samples in
each shard, into one sequence; the sequence is cut into `open_shards` lanes of equal length, and the
global order takes one sample of each lane in turn. So a batch mixes as many shards as there are
lanes, a lane needs one shard at a time, and position q is lane q % open_shards whoever reads it:
worker `rank` of `world_size` reads the positions with q % world_size == rank.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Full, Queue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Split
from raysynth.errors import InputError
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from raysynth.store.shards import Packed
from storage_schema.v1 import SPLITS

Batch = dict[str, NDArray[Any]]

PREFETCHED_BATCHES = 2
"""Batches kept ready for each lane: all of them may need their next shard at the same batch."""

FETCHES_AT_ONCE = 4
"""Shards that are on their way together: an object store answers late, but many at once."""


class GlobalOrder:
    """Which row every position of an endless training run shows.

    Every epoch shows every row. Its sequence is filled up to a multiple of `open_shards` from its
    own beginning, so fewer than `open_shards` rows come twice in an epoch (only a set of fewer rows
    than lanes repeats more).
    """

    def __init__(
        self, rows: NDArray[np.int64], rows_per_shard: int, open_shards: int, seed: int
    ) -> None:
        """Fixes the order.

        Args:
            rows: rows of the sample set to show, ascending.
            rows_per_shard: row r lies in shard r // rows_per_shard.
            open_shards: lanes that an epoch is cut into.
            seed: the same seed and rows give the same order.
        """
        self.rows, self.rows_per_shard = rows, rows_per_shard
        self.open_shards, self.seed = open_shards, seed
        self._sequences: dict[int, NDArray[np.int64]] = {}

    @property
    def epoch_length(self) -> int:
        """Positions of one epoch: the number of rows, rounded up to a multiple of the lanes."""
        return -(-len(self.rows) // self.open_shards) * self.open_shards

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows shown at `positions`, an array of any length."""
        epochs, within = np.divmod(positions, self.epoch_length)
        step, lane = np.divmod(within, self.open_shards)
        place = lane * (self.epoch_length // self.open_shards) + step
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._sequence(int(epoch))[place[chosen] % len(self.rows)]
        return rows

    def _sequence(self, epoch: int) -> NDArray[np.int64]:
        """All rows, shard by shard; the shards, and the rows inside one, in this epoch's order."""
        if epoch not in self._sequences:
            random = np.random.default_rng(seed_of("stream", self.seed, epoch))
            shards, shard_of_row = np.unique(self.rows // self.rows_per_shard, return_inverse=True)
            shard_key = random.random(len(shards))[shard_of_row]
            row_key = random.random(len(self.rows))
            # A batch may cross into the next epoch; older ones are never asked for again.
            self._sequences = {e: s for e, s in self._sequences.items() if e == epoch - 1}
            self._sequences[epoch] = self.rows[np.lexsort((row_key, shard_key))]
        return self._sequences[epoch]


class SampleStream:
    """Endless batches of one split of a sample set, for one of `world_size` workers.

    A worker keeps the shards that its lanes are in and, as they are stored, those that come next,
    which are fetched while these are used. A thread makes the next batches.
    """

    def __init__(
        self,
        samples: SampleSet,
        columns: Sequence[str],
        *,
        seed: int,
        global_batch_size: int,
        open_shards: int = 8,
        rank: int = 0,
        world_size: int = 1,
        split: Split = "train",
        latents: SampleSet | None = None,
    ) -> None:
        """Plans the order; reads nothing yet.

        Args:
            samples: the set to read.
            columns: arrays (`hu`, `layout`, `latents`) and index columns (`box`, `ratings`...) that
                a batch shall have.
            seed: of the order.
            global_batch_size: samples of a batch over all workers.
            open_shards: shards a batch is mixed from, over all workers.
            rank: this worker.
            world_size: number of workers; divides `open_shards` and `global_batch_size`.
            split: which patients' samples to show.
            latents: where the column `latents` is read, row by row parallel to `samples`.

        Raises:
            InputError: the split has no samples.
        """
        assert open_shards % world_size == 0
        assert global_batch_size % world_size == 0
        rows = np.flatnonzero(samples.index["split"] == SPLITS.index(split))
        if not len(rows):
            raise InputError(
                f"the sample set has no {split} samples among its {samples.count}: ingest more "
                f"patients, or change data.split"
            )
        self.order = GlobalOrder(rows, samples.rows_per_shard, open_shards, seed)
        self.global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._samples, self._latents = samples, latents
        self._index = [name for name in columns if name in samples.index]
        self._arrays = [name for name in columns if name not in samples.index]
        self._open: dict[int, Batch] = {}
        self._fetched: dict[int, Future[dict[str, Packed]]] = {}

    def batches(self, seen_samples: int = 0) -> Generator[Batch, None, None]:
        """Batches from where `seen_samples` samples of the global order have been seen.

        Yields:
            The worker's share of each global batch: the asked columns, each (local batch, ...), and
            `position`, int64: the samples' places in the global order (seed noise by it, and it
            does not depend on the workers).
        """
        lanes = self.order.open_shards // self._world_size
        prefetched: Queue[Batch | Exception] = Queue(maxsize=PREFETCHED_BATCHES * lanes)
        stopped = threading.Event()
        reader = threading.Thread(
            target=self._fill, args=(prefetched, stopped, seen_samples), daemon=True
        )
        reader.start()
        try:
            while True:
                batch = prefetched.get()
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            stopped.set()
            reader.join()

    def _fill(
        self, prefetched: Queue[Batch | Exception], stopped: threading.Event, seen: int
    ) -> None:
        """The thread: reads batch after batch until it is stopped, or reading fails."""
        item: Batch | Exception = {}
        self._fetched.clear()  # an earlier run may have called some of them off
        with ThreadPoolExecutor(FETCHES_AT_ONCE) as fetchers:
            while not stopped.is_set() and not isinstance(item, Exception):
                try:
                    item = self._read(seen, fetchers)
                except Exception as error:  # the consumer raises it in its own thread
                    item = error
                seen += self.global_batch_size
                while not stopped.is_set():
                    with suppress(Full):
                        prefetched.put(item, timeout=0.1)
                        break
            fetchers.shutdown(cancel_futures=True)

    def _read(self, seen: int, fetchers: Executor) -> Batch:
        # A batch may be smaller than the number of lanes: all of them stay open.
        window = np.arange(seen, seen + max(self.global_batch_size, self.order.open_shards))
        window = window[window % self._world_size == self._rank]
        rows = self.order.at(window)
        # A shard further on in every lane.
        further = window + self.order.open_shards * self.order.rows_per_shard
        lanes, ahead = self._shards_of(rows), self._shards_of(self.order.at(further))
        for shard in [*lanes, *ahead]:
            if shard not in self._open and shard not in self._fetched:
                self._fetched[shard] = fetchers.submit(self._fetch, shard)
        self._open = {
            shard: self._open[shard] if shard in self._open else self._unpack(shard)
            for shard in lanes
        }
        count = self.global_batch_size // self._world_size
        positions, rows = window[:count], rows[:count]
        shards, within = np.divmod(rows, self.order.rows_per_shard)
        batch: Batch = {"position": positions}
        for name in self._index:
            batch[name] = self._samples.index[name][rows]
        for name in self._arrays:
            items = [self._open[s][name][i] for s, i in zip(shards.tolist(), within, strict=True)]
            batch[name] = np.stack(items)
        return batch

    def _shards_of(self, rows: NDArray[np.int64]) -> list[int]:
        shards: list[int] = np.unique(rows // self.order.rows_per_shard).tolist()
        return shards

    def _fetch(self, shard: int) -> dict[str, Packed]:
        start, stop = self._samples.shard_rows(shard)
        return {name: self._source(name).fetch(name, start, stop) for name in self._arrays}

    def _unpack(self, shard: int) -> Batch:
        packed = self._fetched.pop(shard).result()
        return {name: self._source(name).unpack(name, packed[name]) for name in self._arrays}

    def _source(self, name: str) -> SampleSet:
        if name != "latents":
            return self._samples
        assert self._latents is not None
        return self._latents
