"""How a bundle is served."""

from __future__ import annotations

from pydantic import Field

from raysynth.config.base import Section


class ServingConfig(Section):
    """The HTTP service. Slots, sampler, steps and guidance are those of `sampling`."""

    num_replicas: int = Field(1, ge=1)
    """Processes that draw, each with its own copy of the bundle."""
    max_waiting: int = Field(64, ge=1)
    """Requests that may wait at a replica for a slot; more are told to come back later."""
    max_steps: int = Field(250, ge=1)
    """Of one request."""
    keep_results: int = Field(1000, ge=1)
    """Jobs that are remembered; the oldest finished ones make room."""
