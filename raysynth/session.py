"""Joins a Ray cluster, or starts one on this machine, the way raysynth's jobs want it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


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
