"""Is a cluster fit for a run, and closed to strangers? What is not is told with its remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysynth.config import ExperimentConfig
from raysynth.errors import RaysynthError
from raysynth.planning.here import write_speed
from raysynth.session import connect
from raysynth.store.repository import local_path, open_root

PACKAGES = ("raysynth", "ray", "torch", "deepspeed", "zarr", "icechunk", "numpy")
"""Whose versions must be equal on all nodes: they hand each other objects and files."""

MOST_CLOCK_SKEW_S = 0.5
LEAST_WRITE_MB_S = 50.0
"""Below it a checkpoint of 1 GB takes longer than 20 seconds."""

LEAST_SHM_SHARE = 0.9
"""Of Ray's object store that /dev/shm must hold; else it lies on the disk."""

STRANGER_TIMEOUT_S = 60


@dataclass(frozen=True)
class Finding:
    """One check of one thing.

    Attributes:
        check: what was looked at.
        is_fine: whether a run can start with it.
        found: what is the case.
        advice: what to do; empty where all is well.
    """

    check: str
    is_fine: bool
    found: str
    advice: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        name: its address; the head's, where the driver runs on it.
        versions: by package, and of Python.
        time_s: its clock, seconds since 1970.
        gpus: that torch sees there.
        shm_bytes: size of its shared memory; None where there is no such thing.
        token_mode: permissions of the token file; None without one.
        auth_mode: `RAY_AUTH_MODE` there.
        read: what it found in the driver's probe of the work folder, or why it could not.
        write_mb_s: how fast it writes there; None: it cannot.
        store: why it cannot open the store; None: it can, or there is none yet.
    """

    name: str
    versions: dict[str, str]
    time_s: float
    gpus: int
    shm_bytes: int | None
    token_mode: int | None
    auth_mode: str
    read: str | None
    write_mb_s: float | None
    store: str | None


def doctor(config: ExperimentConfig | None, address: str | None = None) -> list[Finding]:
    """Examines the cluster of RAY_ADDRESS, or of an address; else a local one.

    Args:
        config: a recipe whose folders and resources are checked; None: the cluster alone.
        address: of the cluster's head, `host:port`.

    Returns:
        Findings; what could not be found out is not fine.

    Raises:
        RaysynthError: no cluster answers.
    """
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    try:
        with connect():
            return _examine(None if config is None else config.absolute())
    except ConnectionError as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise RaysynthError(
            f"no Ray cluster answers at {where} ({error}): start one, or set RAY_ADDRESS and "
            "RAY_AUTH_TOKEN"
        ) from error


def _examine(config: ExperimentConfig | None) -> list[Finding]:
    import ray

    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in known if node["Alive"]]
    facts, skews = _ask_all(nodes, config)
    findings = [
        Finding("nodes", True, _listed(nodes)),
        compare_versions([one.versions for one in facts], [one.name for one in facts]),
        check_clocks(skews),
        _shared_memory(nodes, facts),
        check_tokens(facts),
        _strangers(ray.get_runtime_context().gcs_address, _dashboard()),
        _gpus(nodes, facts),
    ]
    if config is not None:
        findings += [_resources(config), *_storage(config, facts)]
    return findings


def compare_versions(versions: Sequence[Mapping[str, str]], names: Sequence[str]) -> Finding:
    """Whether all nodes have the same packages.

    Args:
        versions: of each node, by package.
        names: of the nodes.
    """
    differing = []
    for package in versions[0]:
        by_version: dict[str, list[str]] = {}
        for name, one in zip(names, versions, strict=True):
            by_version.setdefault(one.get(package, "missing"), []).append(name)
        if len(by_version) > 1:
            told = "; ".join(f"{v} on {', '.join(on)}" for v, on in sorted(by_version.items()))
            differing.append(f"{package}: {told}")
    if differing:
        return Finding(
            "versions", False, "; ".join(differing), "give all nodes one image, or one environment"
        )
    own = ", ".join(f"{name} {version}" for name, version in versions[0].items())
    return Finding("versions", True, own)


def check_clocks(skews: Mapping[str, tuple[float, float]]) -> Finding:
    """Whether clocks are close: leases, tokens and logs are compared across nodes.

    Args:
        skews: by node, seconds by which it is ahead of this one, and how sure that is (plus or
            minus).
    """
    far = {n: s for n, (s, unsure) in skews.items() if abs(s) - unsure > MOST_CLOCK_SKEW_S}
    worst = max((abs(skew) for skew, _ in skews.values()), default=0.0)
    if not far:
        return Finding("clocks", True, f"at most {worst:.2f} s apart, as far as can be told")
    told = ", ".join(f"{name} by {skew:+.1f} s" for name, skew in far.items())
    return Finding("clocks", False, f"{told} from this node", "set them by NTP (chrony)")


def check_tokens(facts: Sequence[NodeFacts]) -> Finding:
    """Whether every node wants a token, and keeps its own from other users."""
    open_nodes = [one.name for one in facts if one.auth_mode != "token"]
    if open_nodes:
        return Finding(
            "tokens",
            False,
            f"RAY_AUTH_MODE is not token on {', '.join(open_nodes)}",
            "set RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN on every node, and start Ray again",
        )
    readable = [one.name for one in facts if one.token_mode is not None and one.token_mode & 0o077]
    if readable:
        return Finding(
            "tokens",
            False,
            f"~/.ray/auth_token can be read by other users on {', '.join(readable)}",
            "chmod 600 ~/.ray/auth_token there",
        )
    return Finding("tokens", True, "asked for on every node")


def _ask_all(
    nodes: Sequence[Mapping[str, Any]], config: ExperimentConfig | None
) -> tuple[list[NodeFacts], dict[str, tuple[float, float]]]:
    """What every node says, and by how much its clock is ahead."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = None if config is None else config.work_dir
    store = None if config is None else config.store_url
    secret = secrets.token_hex(16)
    probe = None if folder is None else folder / f".doctor-{secret[:8]}"
    facts, skews = [], {}
    try:
        if probe is not None:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_text(secret)
        for node in nodes:
            there: Any = ray.remote(  # type: ignore[call-overload]  # Ray's types lack this strategy
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            ask, clock = there(ask_node), there(_time)
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            facts.append(ray.get(ask.remote(name, probe, store)))
            ray.get(clock.remote())  # its process is there now
            before = time.time()
            then = ray.get(clock.remote())
            after = time.time()
            skews[name] = then - (before + after) / 2, (after - before) / 2
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)
    return [
        one if one.read is None or one.read != secret else _same_folder(one) for one in facts
    ], skews


def _time() -> float:
    return time.time()


def _same_folder(facts: NodeFacts) -> NodeFacts:
    """The node has read what the driver wrote."""
    return NodeFacts(**{**facts.__dict__, "read": ""})


def ask_node(name: str, probe: Path | None, store: str | None) -> NodeFacts:
    """Everything a node can say of itself; runs there.

    Args:
        name: of the node.
        probe: a file that the driver wrote into the work folder.
        store: to open.
    """
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    token = Path("~/.ray/auth_token").expanduser()
    read, speed = None, None
    if probe is not None:
        try:
            read = probe.read_text()
        except OSError as error:
            read = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            speed = write_speed(probe.parent)
    return NodeFacts(
        name=name,
        versions=versions,
        time_s=time.time(),
        gpus=torch.cuda.device_count(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        token_mode=stat.S_IMODE(token.stat().st_mode) if token.exists() else None,
        auth_mode=os.environ.get("RAY_AUTH_MODE", ""),
        read=read,
        write_mb_s=speed,
        store=None if store is None else _why_closed(store),
    )


def _why_closed(store: str) -> str | None:
    """Why a store cannot be read; None if it can, or if a local one is not there yet."""
    path = local_path(store)
    if path is not None and not path.exists():
        return None
    try:
        open_root(store)
    except Exception as error:  # whatever a disk or bucket answers
        return str(error).splitlines()[0]
    return None


def _listed(nodes: Sequence[Mapping[str, Any]]) -> str:
    total: dict[str, float] = {}
    for node in nodes:
        for kind, amount in node["Resources"].items():
            total[kind] = total.get(kind, 0.0) + amount
    memory = total.get("memory", 0.0) / 2**30
    return (
        f"{len(nodes)} with {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU and "
        f"{memory:.0f} GiB of memory for tasks"
    )


def _shared_memory(nodes: Sequence[Mapping[str, Any]], facts: Sequence[NodeFacts]) -> Finding:
    small = [
        one.name
        for node, one in zip(nodes, facts, strict=True)
        if one.shm_bytes is not None
        and one.shm_bytes < LEAST_SHM_SHARE * node["Resources"].get("object_store_memory", 0.0)
    ]
    if small:
        return Finding(
            "shared memory",
            False,
            f"/dev/shm is smaller than Ray's object store on {', '.join(small)}",
            "enlarge it (docker --shm-size, an emptyDir of medium Memory), or start Ray with less "
            "--object-store-memory",
        )
    return Finding("shared memory", True, "holds Ray's object store on every node")


def _dashboard() -> str | None:
    from ray._private.worker import global_worker

    url: str = global_worker.node.webui_url if global_worker.node else ""
    return url or None


def _strangers(gcs_address: str, dashboard: str | None) -> Finding:
    """Comes without a token, as a stranger would, to the two doors of a cluster."""
    entered = []
    script = f"import ray; ray.init(address={gcs_address!r}, log_to_driver=False)"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
    }
    environment |= {"RAY_AUTH_MODE": "disabled"}
    stranger = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if stranger.wait(timeout=STRANGER_TIMEOUT_S) == 0:
            entered.append(f"Ray itself at {gcs_address}")
    except subprocess.TimeoutExpired:  # nobody let it in
        stranger.kill()
    if dashboard is not None:
        try:
            urllib.request.urlopen(f"http://{dashboard}/api/jobs/", timeout=10).close()
            entered.append(f"the dashboard at {dashboard}")
        except (urllib.error.URLError, OSError):
            pass
    if entered:
        return Finding(
            "strangers",
            False,
            f"{' and '.join(entered)} let in who has no token",
            "start Ray with RAY_AUTH_MODE=token on every node; until then anybody can run code",
        )
    return Finding("strangers", True, "are refused without a token")


def _gpus(nodes: Sequence[Mapping[str, Any]], facts: Sequence[NodeFacts]) -> Finding:
    blind = [
        f"{one.name} (Ray {node['Resources'].get('GPU', 0):g}, torch {one.gpus})"
        for node, one in zip(nodes, facts, strict=True)
        if node["Resources"].get("GPU", 0.0) > 0 and not one.gpus
    ]
    if blind:
        return Finding(
            "GPUs",
            False,
            f"torch sees none on {', '.join(blind)}",
            "install a torch for that driver (nvidia-smi shows it), or pass the GPUs to the "
            "container",
        )
    count = sum(node["Resources"].get("GPU", 0.0) for node in nodes)
    return Finding("GPUs", True, f"{count:g}")


def _resources(config: ExperimentConfig) -> Finding:
    """Whether the recipe's training workers and samplers find a place."""
    import ray

    present: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    training, sampling = config.training, config.sampling
    wanted = {
        "training": (
            training.fewest_workers * training.threads_per_worker,
            training.fewest_workers * training.use_gpu,
        ),
        "synthesis": (sampling.threads_per_actor, int(sampling.use_gpu)),
    }
    short = [
        f"{what} wants {cpus} CPU and {gpus} GPU"
        for what, (cpus, gpus) in wanted.items()
        if cpus > present.get("CPU", 0.0) or gpus > present.get("GPU", 0.0)
    ]
    if short:
        there = f"there are {present.get('CPU', 0):g} CPU and {present.get('GPU', 0):g} GPU now"
        return Finding(
            "resources",
            False,
            f"{'; '.join(short)}; {there}",
            "add nodes, lower training.num_workers or min_workers, or set use_gpu to false; a "
            "cluster that grows by itself may do",
        )
    return Finding("resources", True, "training and synthesis find a place")


def _storage(config: ExperimentConfig, facts: Sequence[NodeFacts]) -> list[Finding]:
    folder, findings = config.work_dir, []
    apart = [one.name for one in facts if one.read != ""]
    if apart:
        findings.append(
            Finding(
                "work_dir",
                False,
                f"{folder} is another folder on {', '.join(apart)}, or not there",
                "give a path on storage that all nodes share",
            )
        )
    else:
        findings.append(Finding("work_dir", True, f"{folder} is the same everywhere"))
    closed = [one.name for one in facts if one.write_mb_s is None]
    slow = [
        f"{one.name} ({one.write_mb_s:.0f} MB/s)"
        for one in facts
        if one.write_mb_s is not None and one.write_mb_s < LEAST_WRITE_MB_S
    ]
    if closed:
        findings.append(
            Finding(
                "writing",
                False,
                f"{folder} cannot be written on {', '.join(closed)}",
                "give the user of Ray's processes the right to write there",
            )
        )
    elif slow:
        findings.append(
            Finding(
                "writing",
                False,
                f"slow on {', '.join(slow)}; {LEAST_WRITE_MB_S:.0f} MB/s are wanted",
                "take faster storage for work_dir, or write checkpoints less often",
            )
        )
    else:
        least = min(one.write_mb_s for one in facts if one.write_mb_s is not None)
        findings.append(Finding("writing", True, f"{least:.0f} MB/s and more"))
    unread = [f"{one.name}: {one.store}" for one in facts if one.store is not None]
    if unread:
        findings.append(
            Finding(
                "store",
                False,
                "; ".join(unread),
                "give every node the path or the bucket's address and keys (AWS_*)",
            )
        )
    else:
        findings.append(Finding("store", True, f"{config.store_url} opens, or is not there yet"))
    return findings
