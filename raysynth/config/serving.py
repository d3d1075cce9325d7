"""How bundles are served."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from raysynth.config.base import Section


class ServingConfig(Section):
    """The HTTP service. Sampler, steps, guidance and the most slots are those of `sampling`."""

    bundles: tuple[Path, ...] = ()
    """More bundles to serve, beside the recipe's own; requests name them by their folder."""
    num_replicas: int = Field(1, ge=1)
    """Processes that draw, each with its own copy of what is asked for."""
    max_replicas: int | None = Field(None, ge=1)
    """More of them where slots are short, fewer where they idle; None: always `num_replicas`."""
    max_waiting: int = Field(64, ge=1)
    """Requests that may wait at a replica for a slot; more are told to come back later."""
    max_steps: int = Field(250, ge=1)
    """Of one request."""
    max_batch: int = Field(4096, ge=1)
    """Samples of one batch request."""
    preview_every: int = Field(5, ge=1)
    """Steps between two previews of a job that somebody watches."""
    keep_results: int = Field(1000, ge=1)
    """Jobs that are remembered; the oldest finished ones make room."""
    metrics: bool = False
    """Whether what is drawn of the recipe's own bundle is compared, as it comes, with the real
    test patients of the recipe's store."""

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> ServingConfig:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas}: give num_replicas ({self.num_replicas}) or more"
            )
        return self
