"""Kills, redeployments, lost clients and overload: what the service survives (R10 to R16, S5).

python -m jobs.benchmarks.serving_faults [--full] [--only R12] [--kills 3] [--redeployments 2]
        [--disconnects 50] [--overload 30] [--soak 180] [--repeats 10] [--slow 200]

R10  SIGKILL of the replica, the gateway, the proxy or the controller, in turn, every 20 seconds,
     while 32 clients ask by chance: jobs with idempotency keys, samples they wait for, and such
     samples by the typed client, which asks again. `lost` counts accepted jobs that do not end;
     every job's HU are those of a run alone.
R11  The application is deployed anew, with one more replica and one less in turn, under load.
R12  Clients ask for samples of 250 steps of an engine with one slot, and hang up; how much longer
     the next one's few steps take than on an idle service; and what memory that costs.
R13  Five times what the service can draw is asked for, from sockets that never wait for an answer.
R14  80 % of what it can draw, for as long as given: does anything grow?
R16  Five times the same request at the same time, under one idempotency key; and its result, twice.
S5   Slow clients hold half a request each; a body of 1 GiB is sent, with and without its length.

A network of random weights on a process of one thread, ten steps; all on this machine, client too.
`--full` does what a release asks for: 30 kills, 20 redeployments, 500 disconnects, 5 minutes of
overload, 30 of soak, 100 repeats. Prints a line for every rule and one of JSON; exits 1 unless all
of them hold.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from ray import serve

from jobs.benchmarks.random_bundle import make_bundle, slices_recipe
from jobs.benchmarks.ratios import facts_of_run
from raysynth.condition import Condition
from raysynth.config import ExperimentConfig
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.planner import NO_SOURCE, PlannedSample
from raysynth.serving.api import MAX_UPLOAD_BYTES
from raysynth.serving.app import application
from raysynth.serving.client import Client, Refused
from raysynth.serving.replica import service_folder
from raysynth.serving.tokens import Grant, add_token
from raysynth.session import connect

PORT, SIZE, STEPS, SLOTS = 8125, 16, 10, 8
FULL = {
    "kills": 30,
    "redeployments": 20,
    "disconnects": 500,
    "overload": 300,
    "soak": 1800,
    "repeats": 100,
}
NUM_CLIENTS = 32
KILL_EVERY_S = 20.0
TITLES = {
    "replica": "ray::ServeReplica:raysynth:replica",
    "gateway": "ray::ServeReplica:raysynth:gateway",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
"""Of the service's processes."""

MI_B = 2**20


@dataclass
class Rule:
    """What a rule's runs came to.

    Attributes:
        name: of the rule.
        figures: what was counted and measured.
        broken: what did not hold.
    """

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        """Notes what does not hold."""
        if not holds:
            self.broken.append(what)


class Service:
    """The application, deployed on this machine."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Deploys it."""
        self.config = config
        grant = Grant(requests_per_minute=10**9, max_unfinished=10**6, voxels_per_hour=10**15)
        self.token = add_token(service_folder(config), "load", grant)
        self.client = Client(f"http://127.0.0.1:{PORT}", self.token, timeout_s=120)
        self.hasty = Client(self.client.url, self.token, timeout_s=120, patience_s=0)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        self.deploy(1)
        self.client.sample(seed=0)

    def deploy(self, replicas: int) -> None:
        """Deploys with so many replicas."""
        serving = self.config.serving.model_copy(update={"num_replicas": replicas})
        app = application(self.config.model_copy(update={"serving": serving}))
        serve.run(app, name="raysynth", route_prefix="/")

    def process(self, role: str) -> psutil.Process | None:
        """Of a part of the service, by the title that Ray gives it; the youngest of several."""
        found = []
        for one in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if one.cmdline()[:1] and one.cmdline()[0].startswith(TITLES[role]):
                    found.append(one)
        return max(found, key=psutil.Process.create_time, default=None)

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of gateway and replica."""
        return {role: self._living(role).memory_info().rss / MI_B for role in PARTS}

    def descriptors(self) -> int:
        """Open files of gateway and replica."""
        return sum(self._living(role).num_fds() for role in PARTS)

    def _living(self, role: str) -> psutil.Process:
        found = self.process(role)
        assert found is not None, f"no {role}"
        return found

    def expected(self, seed: int, batch_shape: int) -> np.ndarray:
        """What a run alone draws."""
        sampler = BundleSampler(self.config.bundle_path, self.config.sampling, 0)
        planned = PlannedSample("alone", seed, Condition(), NO_SOURCE)
        hu: np.ndarray = sampler.with_slots(batch_shape).draw([planned])[0]
        return hu


PARTS = ("gateway", "replica")


@contextmanager
def deployed(folder: Path) -> Iterator[Service]:
    """The service of a network of random weights, for the block."""
    config = slices_recipe(folder, SIZE, num_inference_steps=STEPS, batch_size=2 * SLOTS)
    make_bundle(config, config.bundle_path)
    with connect(num_cpus=4):
        yield Service(config)
        serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def load(call: Callable[[int], None], rate: float, clients: int) -> Iterator[None]:
    """Calls that come by chance, so many a second from so many clients, while the block runs."""
    stop = threading.Event()

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        for turn in itertools.count():
            if stop.wait(rng.exponential(clients / rate)):
                return
            call(number + clients * turn)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for one in threads:
        one.start()
    try:
        yield
    finally:
        stop.set()
        for one in threads:
            one.join()


def capacity(service: Service, seconds: float = 10.0, clients: int = 2 * SLOTS) -> float:
    """Samples a second when so many clients ask again as soon as they have one."""
    count, until = Counter[str](), time.monotonic() + seconds

    def work(_: int) -> None:
        while time.monotonic() < until:
            service.client.sample(seed=1)
            count["done"] += 1

    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return count["done"] / (time.monotonic() - begun)


def kills(service: Service, count: int, every_s: float = KILL_EVERY_S) -> Rule:
    """R10."""
    rule, lock = Rule("R10"), threading.Lock()
    told: Counter[str] = Counter()
    accepted: dict[int, str] = {}

    def ask(number: int) -> None:
        kind = ("job", "sample", "patient")[number % 3]
        try:
            if kind == "job":
                accepted[number] = service.client.submit(seed=number, idempotency_key=f"k{number}")
            elif kind == "sample":
                service.hasty.sample(seed=number)
            else:
                service.client.sample(seed=number)
            what = "ok"
        except Refused as error:
            what = str(error.status)
        except OSError:
            what = "cut off"
        with lock:
            told[f"{kind} {what}"] += 1

    recoveries = []
    rate = 0.4 * capacity(service)
    with load(ask, rate, NUM_CLIENTS):
        for number in range(count):
            time.sleep(every_s)
            role = list(TITLES)[number % len(TITLES)]
            process = service.process(role)
            rule.expect(process is not None, f"no {role} was there to be killed")
            if process is not None:
                process.kill()
                recoveries.append((role, _recovery_s(service)))
        time.sleep(5)
    lost = wrong = 0
    for number, job in accepted.items():
        try:
            drawn = service.client.result(job, wait_s=300)
        except (Refused, OSError):
            lost += 1
            continue
        shape = int(drawn.facts["batch_shape"])
        wrong += not np.array_equal(drawn.hu, service.expected(number, shape))
    samples, failed = _of_kind(told, "sample")
    patient, failed_patient = _of_kind(told, "patient")
    rule.figures = {
        "kills": count,
        "jobs": len(accepted),
        "lost": lost,
        "wrong": wrong,
        "samples": samples,
        "samples_failed": failed,
        "asked_again": patient,
        "asked_again_failed": failed_patient,
        "recovery_s": recoveries,
        "told": dict(told),
    }
    rule.expect(lost == 0, f"{lost} accepted jobs are lost")
    rule.expect(wrong == 0, f"{wrong} jobs are not those of a run alone")
    rule.expect(failed_patient == 0, f"{failed_patient} samples failed that were asked for again")
    rule.expect(
        failed <= 0.01 * samples, f"{failed} of {samples} samples failed that were asked for once"
    )
    late = [f"{role} {seconds:.1f} s" for role, seconds in recoveries if seconds > 15]
    rule.expect(not late, f"recovered late: {late}")
    return rule


def _of_kind(told: Counter[str], kind: str) -> tuple[int, int]:
    """How many there were of a kind of request, and how many of them failed."""
    there = sum(count for name, count in told.items() if name.startswith(f"{kind} "))
    return there, there - told[f"{kind} ok"]


def _recovery_s(service: Service) -> float:
    """Until a sample is drawn, and two more after it."""
    begun, row, first = time.monotonic(), 0, 0.0
    while row < 3 and time.monotonic() - begun < 120:
        try:
            service.hasty.sample(seed=3)
            first = first if row else time.monotonic()
            row += 1
        except (Refused, OSError):
            row = 0
            time.sleep(0.1)
    return first - begun if row else 120.0


def redeployments(service: Service, count: int) -> Rule:
    """R11."""
    rule, told = Rule("R11"), Counter[str]()

    def ask(number: int) -> None:
        try:
            service.hasty.sample(seed=number)
            told["ok"] += 1
        except Refused as error:
            told[f"{error.status} {error.detail}"[:80]] += 1
        except OSError as error:
            told[f"cut off: {error}"[:80]] += 1

    with load(ask, 0.4 * capacity(service), 8):
        for number in range(count):
            service.deploy(2 - number % 2)
            time.sleep(3)
        service.deploy(1)
    failed = told.total() - told["ok"]
    rule.figures = {"redeployments": count, "requests": told.total(), "failed": failed}
    if failed:
        rule.figures["told"] = dict(told)
    rule.expect(failed == 0, f"{failed} requests failed")
    return rule


def disconnects(service: Service, count: int) -> Rule:
    """R12."""
    rule = Rule("R12")
    idle = [_probe_s(service, batch_shape=1) for _ in range(20)]
    late, warm = [], count // 4
    for turn in range(count):
        if turn == warm:
            before = service.memory_mb()
        line = _hanging(service, turn)
        time.sleep(0.3)
        line.close()
        late.append(_probe_s(service, batch_shape=1) - float(np.median(idle)))
    grown = {role: mb - before[role] for role, mb in service.memory_mb().items()}
    slope = 100 * sum(grown.values()) / (count - warm)
    late_ms, step_ms = 1e3 * np.array(late), 1e3 * float(np.median(idle)) / STEPS
    slow = int((late_ms > step_ms + 100).sum())
    rule.figures = {
        "disconnects": count,
        "probe_ms": 1e3 * float(np.median(idle)),
        "late_ms": dict(
            zip(("p50", "p99"), np.percentile(late_ms, (50, 99)).tolist(), strict=True)
        ),
        "slow": slow,
        "mb_per_100": slope,
    }
    rule.expect(slow == 0, f"{slow} of {count} times a slot was free later than a step + .1 s")
    rule.expect(slope < 1, f"memory grows by {slope:.2f} MiB with 100 of them")
    return rule


def _probe_s(service: Service, **request: int) -> float:
    started = time.perf_counter()
    service.client.sample(seed=5, **request)
    return time.perf_counter() - started


def _head(service: Service, path: str, length: int | None, kind: str = "application/json") -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {service.token}\r\n"
        f"Content-Type: {kind}\r\n{size}\r\n\r\n"
    ).encode()


def _hanging(service: Service, seed: int) -> socket.socket:
    """A long request, of an engine with one slot, whose answer nobody waits for."""
    asked = {"seed": seed, "num_inference_steps": 250, "batch_shape": 1}
    body = json.dumps(asked).encode()
    line = socket.create_connection(("127.0.0.1", PORT))
    line.sendall(_head(service, "/v1/samples", len(body)) + body)
    return line


def overload(service: Service, seconds: float) -> Rule:
    """R13."""
    rule = Rule("R13")
    can = capacity(service)
    before = service.memory_mb()
    answers: list[tuple[int, float, bool]] = []
    job = service.client.submit(seed=4, num_inference_steps=50)
    asyncio.run(_flood(service, 5 * can, seconds, answers))
    peak = {role: mb - before[role] for role, mb in service.memory_mb().items()}
    drawn = sum(status == 200 for status, _, _ in answers)
    refused = [(s, retry) for status, s, retry in answers if status in (429, 503)]
    waits = 1e3 * np.array([s for s, _ in refused] or [0.0])
    rule.figures = {
        "capacity": can,
        "asked": len(answers) / seconds,
        "drawn": drawn / seconds,
        "goodput": drawn / seconds / can,
        "refused": len(refused),
        "refused_ms_p50": float(np.percentile(waits, 50)),
        "refused_ms_p99": float(np.percentile(waits, 99)),
        "other": dict(Counter(status for status, _, _ in answers if status not in (200, 429, 503))),
        "grown_mb": peak,
    }
    rule.expect(rule.figures["goodput"] >= 0.95, f"goodput {rule.figures['goodput']:.2f}")
    rule.expect(float(np.percentile(waits, 99)) < 50, "refusals take longer than 50 ms (p99)")
    rule.expect(all(retry for _, retry in refused), "refusals without Retry-After")
    rule.expect(not rule.figures["other"], f"other answers: {rule.figures['other']}")
    rule.expect(sum(peak.values()) < 200, f"memory grew: {peak}")
    rule.expect(service.client.wait(job)["state"] == "done", "an accepted job was not drawn")
    return rule


async def _flood(
    service: Service, rate: float, seconds: float, answers: list[tuple[int, float, bool]]
) -> None:
    """Requests by chance, each on a connection of its own; notes status, seconds, Retry-After."""
    rng, body = np.random.default_rng(0), b'{"seed": 2}'
    packed = _head(service, "/v1/samples", len(body)) + body

    async def one() -> None:
        started = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.write(packed)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 120)
            status = int(head.split(maxsplit=2)[1])
            took, retry = time.perf_counter() - started, b"retry-after" in head.lower()
            writer.close()
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            status, took, retry = 0, time.perf_counter() - started, False
        answers.append((status, took, retry))

    async with asyncio.TaskGroup() as group:
        until, due = time.monotonic() + seconds, time.monotonic()
        while due < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(one())
            due += rng.exponential(1 / rate)


def soak(service: Service, seconds: float) -> Rule:
    """R14."""
    rule, waits, told = Rule("R14"), list[tuple[float, float]](), Counter[str]()
    rate, begun = 0.8 * capacity(service), time.monotonic()

    def ask(number: int) -> None:
        started = time.monotonic()
        try:
            service.hasty.sample(seed=number)
            waits.append((started - begun, time.monotonic() - started))
        except (Refused, OSError) as error:
            told[str(error)[:80]] += 1

    with load(ask, rate, NUM_CLIENTS):
        time.sleep(seconds / 4)
        before, files = service.memory_mb(), service.descriptors()
        time.sleep(3 * seconds / 4)
        after, files_after = service.memory_mb(), service.descriptors()
    times, took = np.array(waits).T
    quarters = [took[(times >= a * seconds / 4) & (times < (a + 1) * seconds / 4)] for a in (1, 3)]
    p99 = [1e3 * float(np.percentile(one, 99)) for one in quarters]
    grown = {role: after[role] / before[role] - 1 for role in after}
    rule.figures = {
        "seconds": seconds,
        "requests": len(waits) + told.total(),
        "errors": told.total(),
        "p50_ms": 1e3 * float(np.percentile(took, 50)),
        "p99_ms": p99,
        "memory": grown,
        "descriptors": files_after - files,
    }
    rule.expect(not told, f"errors: {dict(told)}")
    rule.expect(p99[1] < 1.1 * p99[0], f"p99 went from {p99[0]:.0f} to {p99[1]:.0f} ms")
    rule.expect(max(grown.values()) < 0.02, f"memory grew: {grown}")
    rule.expect(files_after - files <= NUM_CLIENTS, "open files grew")
    return rule


def repeats(service: Service, count: int) -> Rule:
    """R16."""
    rule, several, differ = Rule("R16"), 0, 0
    with ThreadPoolExecutor(5) as pool:
        for number in range(count):
            key = f"repeat {number}"
            asked = [
                pool.submit(service.client.submit, seed=number, idempotency_key=key)
                for _ in range(5)
            ]
            ids = {one.result() for one in asked}
            several += len(ids) > 1
            first, again = (service.client.result(next(iter(ids))) for _ in range(2))
            differ += not np.array_equal(first.hu, again.hu)
    rule.figures = {"repeats": count, "several_jobs": several, "other_results": differ}
    rule.expect(several == 0, f"{several} keys started several jobs")
    rule.expect(differ == 0, f"{differ} results differ when fetched again")
    return rule


def hostile(service: Service, count: int) -> Rule:
    """S5, what takes long: slow clients and large bodies."""
    rule = Rule("S5")
    idle = [_probe_s(service) for _ in range(20)]
    slow = []
    for number in range(count):
        line = socket.create_connection(("127.0.0.1", PORT))
        line.sendall(_head(service, "/v1/samples", 100)[: 40 + number % 100])
        slow.append(line)
    beside = []
    for _ in range(20):
        for line in slow:
            with suppress(OSError):  # it may be told that this is no HTTP
                line.send(b"x")
        beside.append(_probe_s(service))
    for line in slow:
        line.close()
    before = service.memory_mb()
    told = [_status(service, 2**30), _status(service, None)]
    grown = {role: mb - before[role] for role, mb in service.memory_mb().items()}
    rule.figures = {
        "slow_clients": count,
        "probe_ms": 1e3 * float(np.median(idle)),
        "probe_ms_beside": 1e3 * float(np.median(beside)),
        "large_bodies": told,
        "grown_mb": grown,
    }
    rule.expect(
        bool(np.median(beside) < 2 * np.median(idle) + 0.05), "slow clients make others wait"
    )
    rule.expect(set(told) <= {413, 0}, f"1 GiB was answered by {told}")
    most = MAX_UPLOAD_BYTES / MI_B
    rule.expect(sum(grown.values()) < most, f"memory grew: {grown}")
    return rule


def _status(service: Service, length: int | None) -> int:
    """Sends 1 GiB; what came back, 0 if the line was cut."""
    piece = bytes(MI_B)
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        connection.connect()
        line = connection.sock
        line.sendall(_head(service, "/v1/uploads", length, "application/x-npz"))
        line.settimeout(0.05)
        for _ in range(1024):
            try:
                if answer := line.recv(1024):
                    return int(answer.split(maxsplit=2)[1])
                return 0
            except TimeoutError:
                pass
            line.settimeout(30)
            line.sendall(piece if length else b"100000\r\n" + piece + b"\r\n")
            line.settimeout(0.001)
        line.settimeout(60)
        return int(line.recv(1024).split(maxsplit=2)[1])
    except OSError:
        return 0
    finally:
        connection.close()


RULES: dict[str, tuple[Callable[[Service, Any], Rule], str]] = {
    "R12": (disconnects, "disconnects"),
    "R16": (repeats, "repeats"),
    "S5": (hostile, "slow"),
    "R13": (overload, "overload"),
    "R14": (soak, "soak"),
    "R11": (redeployments, "redeployments"),
    "R10": (kills, "kills"),
}


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", choices=RULES, default=list(RULES))
    counts = {
        "kills": 3,
        "redeployments": 2,
        "disconnects": 50,
        "overload": 30,
        "soak": 180,
        "repeats": 10,
        "slow": 200,
    }
    for name, few in counts.items():
        parser.add_argument(f"--{name}", type=int, default=few)
    options = parser.parse_args(arguments)
    if options.full:
        for name, many in FULL.items():
            setattr(options, name, many)
    torch.set_num_threads(1)
    facts = facts_of_run("torch", "ray")
    found = []
    with tempfile.TemporaryDirectory() as folder, deployed(Path(folder)) as service:
        for name, (run, option) in RULES.items():
            if name in options.only:
                rule = run(service, getattr(options, option))
                found.append(rule)
                verdict = "; ".join(rule.broken) or "holds"
                print(f"{rule.name:4} {verdict}\n     {json.dumps(rule.figures)}", flush=True)
    print(json.dumps(facts | {one.name: asdict(one) for one in found}))
    return int(any(one.broken for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
