"""A Ray cluster on this machine, in a process of its own: Ray reads its authentication mode once.

python -m tests.jobs.cluster_head HEAD_CPUS NODES

Prints the addresses of its dashboard and of itself, then obeys lines: `kill` takes the youngest of
its nodes away without a word to anybody, `add` starts another one; both answer `done`. An empty
line ends it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_health_check_period_ms": "1000",  # a lost node is noticed after five times this
    # `python` of a job is the cluster's, as on any node.
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


class Head:
    """A running cluster.

    Attributes:
        address: of its dashboard, which takes jobs.
        gcs: of the cluster, `host:port`.
    """

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str]) -> None:
        """Reads where it is."""
        self.process, self.environment = process, environment
        assert process.stdin
        assert process.stdout
        self.stdin, self.stdout = process.stdin, process.stdout
        self.address = f"http://{self.stdout.readline().strip()}"
        self.gcs = self.stdout.readline().strip()

    def tell(self, order: str) -> None:
        """Waits until an order is carried out."""
        self.stdin.write(f"{order}\n")
        self.stdin.flush()
        assert self.stdout.readline().strip() == "done"

    def submit(self, *job: str) -> subprocess.Popen[str]:
        """Starts `ray job submit`, whose output is that of the job."""
        return subprocess.Popen(
            ["ray", "job", "submit", "--address", self.address, "--working-dir", ".", "--", *job],
            env=os.environ | self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def running(
    head_cpus: int, nodes: int = 0, environment: dict[str, str] = ENVIRONMENT
) -> Iterator[Head]:
    """A cluster that takes jobs; nobody enters without the token of the environment."""
    command = [sys.executable, "-m", "tests.jobs.cluster_head", str(head_cpus), str(nodes)]
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    head = Head(process, environment)
    # The agent that starts jobs does so some seconds after the head has told its address.
    try:
        for _ in range(12):
            probe = head.submit("true")
            said, _ = probe.communicate(timeout=300)
            if probe.returncode == 0:
                break
            time.sleep(5)
        else:
            raise RuntimeError(f"the cluster takes no jobs:\n{said}")
        yield head
    finally:
        process.communicate("\n", timeout=60)


def main(head_cpus: int, count: int) -> None:
    """Runs the cluster."""
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    options = {"num_cpus": head_cpus, "include_dashboard": True, "dashboard_port": 0}
    # Not a port that another cluster of this machine has taken.
    options["dashboard_agent_listen_port"] = port
    cluster = Cluster(initialize_head=True, head_node_args=options)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(count)]
    _say(cluster.head_node.webui_url)
    _say(cluster.address)
    for line in sys.stdin:
        match line.strip():
            case "kill":
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            case "add":
                nodes.append(cluster.add_node(num_cpus=1))
            case _:
                break
        _say("done")
    cluster.shutdown()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
