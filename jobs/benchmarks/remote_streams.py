"""Epochs of training slices from an S3 server behind a slow line: raysynth against zarr.

python -m jobs.benchmarks.remote_streams [--volumes N] [--repeats N] [--bits-per-s N]

The slices of `jobs.benchmarks.streams`, in a bucket of moto's server on this machine. A proxy makes
the line: it holds every answer back for 20 ms, lets 1 Gb/s through, and counts requests. Reported
are the stored bytes that a reader gets per second, as a share of the line, and its GETs of a shard
(the median one) in an epoch. Every byte is checked as in `streams`. The server's own speed is
printed: below twice the line, it is what is measured. Each reader runs in a process of its own, in
rotating order. The last line is everything as JSON; exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from jobs.benchmarks.sample_data import is_installed, make_data, samples_of, stored_bytes
from jobs.benchmarks.streams import (
    Epoch,
    Measured,
    by_shards,
    by_units,
    is_right,
    measure,
    stream_epochs,
)

KIND, DELAY_S, BURST_S, PIECE_BYTES = "slices", 0.02, 0.005, 2**16
LEAST_SHARE, MOST_GETS = 0.85, 1.1
SHARD_KEY = re.compile(r"/chunks/|/slices/hu/c/")
"""Of a shard in Icechunk (where index columns are shards too), or in plain Zarr."""

Held = asyncio.Queue[tuple[float, bytes]]
"""Pieces of an answer and when they arrive; an empty one ends it."""

CREDENTIALS = {
    "AWS_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
}


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--volumes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--bits-per-s", type=float, default=1e9)
    options = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", **CREDENTIALS}
    facts: dict[str, Any] = {"load": [os.getloadavg()[0]]}
    with tempfile.TemporaryDirectory(prefix="raysynth-remote-") as path, _server(path) as port:
        crcs, facts["data"] = make_data(Path(path), options.volumes)
        facts["server_mb_per_s"] = round(_upload(Path(path), port) / 1e6)
        line = Line(port, options.bits_per_s / 8)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{line.port}"
        runs = _run_all(line, options.repeats)
        stored = stored_bytes(Path(path), KIND)
    facts["load"].append(os.getloadavg()[0])
    facts["not_installed"] = [name for name in READERS if not runs[name]]
    for name, of_one in runs.items():
        if not all(is_right(run, crcs[KIND], len(crcs[KIND])) for run, _ in of_one):
            print(f"{name} gives other voxels than were written: nothing is comparable")
            return 1
    return _report(runs, facts, stored / line.bytes_per_s)


class Line:
    """A proxy, in a thread, between clients on this machine and a server: delay, rate, a count.

    Attributes:
        port: where it listens.
        bytes_per_s: what it lets through, of all answers together.
        gets: how often each path was asked for.
    """

    def __init__(self, server_port: int, bytes_per_s: float) -> None:
        """Starts listening."""
        self.bytes_per_s, self.gets = bytes_per_s, Counter[str]()
        self._server_port, self._free_at, started = server_port, 0.0, threading.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await server.serve_forever()

        threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
        started.wait()

    async def _connect(self, *client: Any) -> None:
        server = await asyncio.open_connection("127.0.0.1", self._server_port)
        held: Held = asyncio.Queue()
        parts = (self._ask(client[0], server[1]), self._hold(server[0], held))
        await asyncio.gather(*parts, self._answer(held, client[1]), return_exceptions=True)

    async def _ask(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(PIECE_BYTES):
            if data.startswith(b"GET "):
                self.gets[data.split(maxsplit=2)[1].decode()] += 1
            server.write(data)
        server.close()

    async def _hold(self, server: asyncio.StreamReader, held: Held) -> None:
        data = b"-"
        while data:
            data = await server.read(PIECE_BYTES)
            held.put_nowait((time.monotonic() + DELAY_S, data))

    async def _answer(self, held: Held, client: asyncio.StreamWriter) -> None:
        while item := await held.get():
            arrives_at, data = item
            await asyncio.sleep(arrives_at - time.monotonic())
            # Sleeps are some milliseconds off; what was missed may be caught up.
            idle_since = max(self._free_at, time.monotonic() - BURST_S)
            self._free_at = idle_since + len(data) / self.bytes_per_s
            await asyncio.sleep(self._free_at - time.monotonic())
            if not data:
                break
            client.write(data)
            await client.drain()
        client.close()


@contextmanager
def _server(folder: str) -> Iterator[int]:
    """Moto's S3 server; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with Path(folder, "moto.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield port
        finally:
            server.terminate()
            server.wait()


def _upload(folder: Path, port: int) -> float:
    """Puts both stores into the bucket; returns bytes per second of reading shards directly."""
    import boto3
    from botocore.config import Config

    settings = Config(retries={"total_max_attempts": 20})
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", config=settings)
    client.create_bucket(Bucket="bucket")
    files = [path for name in ("store", "plain") for path in (folder / name).rglob("*")]
    keys = [str(path.relative_to(folder)) for path in files if path.is_file()]
    for key in keys:
        client.put_object(Bucket="bucket", Key=key, Body=(folder / key).read_bytes())
    started = time.perf_counter()
    shards = [key for key in keys if re.search(r"plain/.*/hu/c/", key)]
    with ThreadPoolExecutor(4) as four:
        sizes = list(four.map(lambda key: len(_get(client, key)), shards))
    return sum(sizes) / (time.perf_counter() - started)


def _get(client: Any, key: str) -> bytes:
    data: bytes = client.get_object(Bucket="bucket", Key=key)["Body"].read()
    return data


# The readers.


def _raysynth() -> Epoch:
    samples = samples_of("s3://bucket/store", KIND)
    return by_shards(partial(samples.read, "hu"), samples.count)


def _sixteen() -> Epoch:
    """Not shuffled: what the server and the line give to many requests at once."""
    samples = samples_of("s3://bucket/store", KIND)
    return by_units(lambda _: samples.read("hu"), 1)


def _stream(open_shards: int) -> Epoch:
    return stream_epochs(samples_of("s3://bucket/store", KIND), open_shards)


def _s3fs() -> Epoch:
    from zarr.storage import FsspecStore

    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "key": "test", "secret": "test"}
    return _zarr(FsspecStore.from_url("s3://bucket/plain", storage_options=options))


def _obstore() -> Epoch:
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    bucket = S3Store(
        "bucket",
        prefix="plain",
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
        virtual_hosted_style_request=False,
    )
    return _zarr(ObjectStore(bucket, read_only=True))


def _zarr(store: Any) -> Epoch:
    array: Any = zarr.open_array(store, path=f"samples/{KIND}/hu", mode="r")
    return by_shards(lambda start, stop: array[start:stop], array.shape[0])


READERS: dict[str, Callable[[], Epoch]] = {
    "raysynth SampleStream, 8 open": partial(_stream, open_shards=8),
    "raysynth SampleStream, 1 open": partial(_stream, open_shards=1),
    "raysynth": _raysynth,
    "raysynth, 16 shards at once": _sixteen,
    "zarr + s3fs": _s3fs,
    "zarr + obstore": _obstore,
}
MODULES = {"zarr + s3fs": "s3fs", "zarr + obstore": "obstore"}
TARGETED = "raysynth SampleStream, 8 open"


def _run_all(line: Line, repeats: int) -> dict[str, list[tuple[Measured, float]]]:
    """By reader: what was measured, and the GETs of a shard in an epoch."""
    runs: dict[str, list[tuple[Measured, float]]] = {name: [] for name in READERS}
    names, spawn = list(READERS), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        for repeat in range(repeats):
            shift = repeat * len(names) // repeats
            for name in names[shift:] + names[:shift]:
                line.gets.clear()
                run = fresh.submit(_run, name).result()
                shards = [n for path, n in line.gets.items() if SHARD_KEY.search(path)]
                if run is not None:
                    runs[name].append((run, float(np.median(shards)) / 2))
    return runs


def _run(name: str) -> Measured | None:
    """In a fresh process: two epochs of one reader; None where it is not installed."""
    return measure(READERS[name]) if is_installed(MODULES.get(name, "zarr")) else None


def _report(
    runs: dict[str, list[tuple[Measured, float]]], facts: dict[str, Any], line_s: float
) -> int:
    """Prints the table and the JSON line; `line_s` is what an epoch takes at least."""
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print("\nreader                          slices/s   CPU s       s  share of line  GETs a shard")
    rows = []
    for name, of_one in runs.items():
        if not of_one:
            continue
        wall_s, cpu_s = np.median([run.steady for run, _ in of_one], axis=0).tolist()
        row = {"reader": name, "slices_per_s": len(of_one[0][0].crcs) / wall_s, "cpu_s": cpu_s}
        row |= {"wall_s": wall_s, "share": line_s / wall_s}
        row |= {"gets_per_shard": float(np.median([gets for _, gets in of_one]))}
        rows.append(row)
        print(
            f"{name:32s}{row['slices_per_s']:8.0f}{cpu_s:8.2f}{wall_s:8.2f}{row['share']:15.2f}"
            f"{row['gets_per_shard']:14.2f}"
        )
    [ours] = [row for row in rows if row["reader"] == TARGETED]
    met = {
        f"share of the line >= {LEAST_SHARE}": ours["share"] >= LEAST_SHARE,
        f"GETs a shard <= {MOST_GETS}": ours["gets_per_shard"] <= MOST_GETS,
    }
    for target, reached in met.items():
        print(f"{TARGETED}: {target}: {'met' if reached else 'MISSED'}")
    missed = [target for target, reached in met.items() if not reached]
    print(json.dumps(facts | {"rows": rows, "missed": missed}))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
