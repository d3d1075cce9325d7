"""Joins a Ray cluster, or starts one on this machine, the way raysynth's jobs want it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from raysynth.errors import InputError

logger = logging.getLogger(__name__)


def set_defaults() -> None:
    """Environment that Ray and torch read once, when they are imported; what is set stays."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        # More threads than cores make everybody many times slower: workers ask for what they use.
        "OMP_NUM_THREADS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray session for the block: RAY_ADDRESS's cluster if set, else a local one.

    A session that somebody else has already opened is used as it is and left open.
    Local clusters need a token, answer on the loopback address alone and have no dashboard.

    Args:
        num_cpus: cores of a local cluster; None: all.
    """
    set_defaults()
    import ray

    if ray.is_initialized():
        yield
        return
    _shut_token_file()
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            "local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    _shut_token_file()
    _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(count: int, each: Mapping[str, float], what: str) -> None:
    """Whether the session has what `count` workers of a job take; Ray would wait for it forever.

    Args:
        count: workers that run at the same time.
        each: `CPU` and `GPU` of one.
        what: names the job.

    Raises:
        InputError: a session on this machine has less. A cluster may grow: there it is a warning.
    """
    import ray

    present: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, of_one in each.items():
        wanted, there = of_one * count, present.get(kind, 0.0)
        if wanted <= there:
            continue
        if "RAY_ADDRESS" in os.environ:
            logger.warning(
                "%s waits: it wants %g %s, the cluster has %g now", what, wanted, kind, there
            )
        else:
            raise InputError(
                f"{what} wants {wanted:g} {kind} and this machine offers {there:g}: lower the "
                "recipe's number of workers or threads, change use_gpu, or give RAY_ADDRESS"
            )


def _quiet_ray_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _shut_token_file() -> None:
    """Ray leaves its token readable by everybody under the usual umask."""
    token = os.path.expanduser("~/.ray/auth_token")
    if os.path.exists(token):
        os.chmod(token, 0o600)
