"""A batch request's samples land in the store: one run, in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.sampling.batch import (
    Run,
    declare_runs,
    drawn_arrays,
    fitting_digest,
    run_attributes,
    sample_set_of,
)
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.planner import NO_SOURCE, PlannedSample
from raysynth.seeding import fingerprint
from raysynth.serving.arrays import of_npz
from raysynth.serving.replica import Order
from raysynth.store.reader import open_group
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import write_rows


def check_landing(config: ExperimentConfig, name: str) -> None:
    """Whether a run of that name can land.

    Raises:
        InputError: there is no such store or sample set, or a run of that name already.
    """
    sample_set_of(config)
    if f"synthetic/{name}" in open_root(config.store_url):
        raise InputError(f"name {name}: the store has such a run already; give another")


def land(
    config: ExperimentConfig, name: str, orders: Sequence[Order], drawn: Sequence[Path]
) -> str:
    """Writes samples as `synthetic/name`.

    Args:
        config: the recipe that is served.
        name: of the run.
        orders: what was asked.
        drawn: what came of it, files as `npz_of` makes them.

    Returns:
        What the store's main points to afterwards.

    Raises:
        InputError: the store or the bundle is another than when the batch was accepted.
    """
    samples = sample_set_of(config)
    digest = fitting_digest(config, samples)
    asked = [PlannedSample(one.sample_id, one.seed, one.condition, NO_SOURCE) for one in orders]
    settings = [
        {
            "sampler": one.sampler,
            "num_inference_steps": one.num_inference_steps,
            "guidance_scale": one.guidance_scale,
        }
        for one in orders
    ]
    mark = fingerprint([digest, name, [one.seed for one in orders], settings])
    plan = list(zip(asked, asked, strict=True))
    run = Run(name, "own", config.sampling.guidance_scale, mark, plan)
    attributes = run_attributes(config, samples, digest)
    attributes["passport"] |= {"recipe": config.name, "served": settings}
    sampler = BundleSampler(config.bundle_path, config.sampling, config.seed)

    def build(root: zarr.Group) -> None:
        declare_runs(root, [run], samples, attributes)
        group = open_group(root, f"synthetic/{name}")
        step = samples.rows_per_shard
        for first in range(0, len(asked), step):
            some = slice(first, first + step)
            write_rows(group, first, _arrays(sampler, asked[some], drawn[some]))

    with StoreRun(config.store_url, verb="serve", fingerprint=mark) as writing:
        if writing.is_new:
            writing.declare(build, f"{len(asked)} samples in synthetic/{name}")
        return writing.publish(f"{len(asked)} samples in synthetic/{name}")


def _arrays(
    sampler: BundleSampler, asked: Sequence[PlannedSample], drawn: Sequence[Path]
) -> dict[str, np.ndarray[Any, Any]]:
    images, shapes = [], []
    for path in drawn:
        hu, about = of_npz(path.read_bytes())
        images.append(hu)
        shapes.append(int(about["batch_shape"]))
    stacked = np.stack(images)
    measured = sampler.measure(stacked, asked)
    draws = np.ones(len(asked), np.uint8)
    return drawn_arrays(sampler, stacked, asked, measured, draws, shapes)
