"""What HTTP costs: the service against calls of its runner in one process (B7).

python -m jobs.benchmarks.serving [--seconds 60]

Eight clients ask for slices of ten steps, each again as soon as it has one: of a runner in their
own process, then over HTTP of gateway and replica, for so many seconds each. Eight slots; the
network is a stub that waits for 20 ms, as for a device that computes, so that the cores of this
machine are there for the service. Prints a table and a line of JSON; exits 1 where the service
draws less than .90 of the samples a second, or adds more than 8 ms to the median of what a client
waits, or 30 ms to its 99th percentile.

With RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 in the environment HAProxy
takes the place of Ray Serve's own proxy, and the service's processes speak to each other by gRPC.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY

from jobs.benchmarks.random_bundle import make_bundle, slices_recipe
from jobs.benchmarks.ratios import facts_of_run
from raysynth.condition import Condition
from raysynth.sampling.draw import BundleSampler
from raysynth.serving.app import application
from raysynth.serving.client import Client
from raysynth.serving.replica import Replica, service_folder
from raysynth.serving.runner import Runner
from raysynth.serving.tokens import add_token
from raysynth.session import connect

NUM_CLIENTS, NUM_SLOTS, NUM_STEPS, SIZE = 8, 8, 10, 64
STEP_S = 0.02
PORT = 8124


class StubReplica(Replica):
    """A replica whose networks wait."""

    def _make_runner(self, model: str) -> Runner:
        runner = super()._make_runner(model)
        runner.sampler.bundle.denoiser.predict = _wait  # type: ignore[union-attr, method-assign]
        return runner


def _wait(x_t: torch.Tensor, *_: Any) -> torch.Tensor:
    time.sleep(STEP_S)
    return x_t


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = facts_of_run("torch", "ray") | {"haproxy": RAY_SERVE_ENABLE_HA_PROXY}
    with tempfile.TemporaryDirectory() as folder:
        config = slices_recipe(
            Path(folder), SIZE, num_inference_steps=NUM_STEPS, batch_size=NUM_SLOTS
        )
        make_bundle(config, config.bundle_path)
        sampler = BundleSampler(config.bundle_path, config.sampling, config.seed)
        sampler.bundle.denoiser.predict = _wait  # type: ignore[union-attr, method-assign]
        runner = Runner(sampler)

        def call(number: int) -> None:
            runner.submit(f"s{number}", number, Condition()).drawn.result()

        call(0)
        in_process = _measured(call, options.seconds)
        step_ms = 1e3 * runner.counts.step_s / runner.counts.steps
        runner.close()
        token = add_token(service_folder(config), "benchmark")
        client = Client(f"http://127.0.0.1:{PORT}", token)
        with connect():
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            serve.run(application(config, StubReplica), name="raysynth")

            def ask(number: int) -> None:
                client.sample(seed=number, batch_shape=NUM_SLOTS)

            ask(0)
            over_http = _measured(ask, options.seconds)
            serve.shutdown()
    share = over_http["a_second"] / in_process["a_second"]
    added = {name: over_http[name] - in_process[name] for name in ("p50_ms", "p99_ms")}
    print(f"a step of {NUM_SLOTS} slots takes {step_ms:.1f} ms")
    for name, one in (("in process", in_process), ("over HTTP", over_http)):
        print(
            f"{name:11} {one['a_second']:6.1f} samples/s, p50 {one['p50_ms']:6.1f} ms, "
            f"p99 {one['p99_ms']:6.1f} ms"
        )
    print(f"{share:.3f} of the samples; p50 +{added['p50_ms']:.1f}, p99 +{added['p99_ms']:.1f} ms")
    missed = share < 0.90 or added["p50_ms"] > 8 or added["p99_ms"] > 30
    print(f"target >= .90, + 8 ms, + 30 ms: {'MISSED' if missed else 'met'}")
    print(json.dumps(facts | {"in_process": in_process, "over_http": over_http, "share": share}))
    return int(missed)


def _measured(call: Callable[[int], None], seconds: float) -> dict[str, float]:
    """Calls by all clients for so long: how many a second, and what each waits."""
    waits: list[float] = []
    numbers = iter(range(1, 10**9))
    until = time.perf_counter() + seconds

    def work() -> None:
        while (started := time.perf_counter()) < until:
            call(next(numbers))
            waits.append(time.perf_counter() - started)

    clients = [threading.Thread(target=work) for _ in range(NUM_CLIENTS)]
    begun = time.perf_counter()
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    p50, p99 = 1e3 * np.percentile(waits, (50, 99))
    a_second = len(waits) / (time.perf_counter() - begun)
    return {"a_second": a_second, "p50_ms": float(p50), "p99_ms": float(p99)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
