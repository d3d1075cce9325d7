"""Batch synthesis against a bare loop: what does it cost to be killed and lose nothing (B13)?

python -m jobs.benchmarks.batch_job [--samples 2000]

Draws slices with a small network of random weights, one thread. The loop draws and measures shard
by shard, saves each with NumPy, and leaves out files that exist. Ours is `raysynth synthesize` with
one actor. Both run to the end, and their seconds are those above a run of one shard: start-up stays
apart. Then ours is killed (SIGKILL to all of it) when half is done, and run again: every sample
must be there once, bit by bit as in the undisturbed run. Prints a table and a line of JSON; exits 1
where ours takes more than 1.03 of the loop's time or a sample is missing, there twice or another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from jobs.benchmarks.random_bundle import make_bundle, slices_recipe
from jobs.benchmarks.ratios import facts_of_run
from raysynth import stages
from raysynth.config import ExperimentConfig
from raysynth.sampling.batch import plan_run_samples
from raysynth.sampling.draw import BundleSampler
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.validate import validate

AT_MOST = 1.03


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=2000)
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    facts = facts_of_run("torch", "ray") | {"samples": options.samples}
    with tempfile.TemporaryDirectory() as folder:
        config = slices_recipe(
            Path(folder), 64, num_samples=options.samples, num_inference_steps=8, batch_size=8
        )
        recipe = Path(folder) / "batch_job.yaml"
        recipe.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        stages.ingest(config)
        stages.shard(config)
        for name in ("one_shard", "whole", "killed"):
            make_bundle(config, Path(folder) / "bundles" / name)
        loop_s = _loop(config, Path(folder) / "loop")
        one_shard = _run(recipe, "one_shard", ["sampling.num_samples=64"])
        whole = _run(recipe, "whole", [])
        ours_s = whole - one_shard
        killed_after = _killed_run(recipe, "killed", options.samples)
        again = _run(recipe, "killed", [])
        faults = _faults(config, options.samples)
    loop_s *= 1 - 64 / options.samples
    ratio = ours_s / loop_s
    print(
        f"loop {loop_s:.1f} s, ours {ours_s:.1f} s above one shard ({one_shard:.1f} s): {ratio:.3f}"
    )
    print(f"killed after {killed_after} shards; the rest took {again:.1f} s")
    print("; ".join(faults) or "every sample is there once, and the same")
    missed = ratio > AT_MOST or bool(faults)
    print(f"target <= {AT_MOST} of the loop, nothing lost: {'MISSED' if missed else 'met'}")
    figures = {"loop_s": loop_s, "ours_s": ours_s, "ratio": ratio, "faults": faults}
    print(json.dumps(facts | figures))
    return int(missed)


def _loop(config: ExperimentConfig, folder: Path) -> float:
    """Seconds of drawing and measuring all shards, without loading the bundle."""
    folder.mkdir()
    root = open_root(config.store_url)
    samples = SampleSet(open_group(root, f"samples/{config.samples.name}"))
    plan = plan_run_samples(config, samples)
    bundle = config.work_dir / "bundles" / "whole"
    sampler = BundleSampler(bundle, config.sampling, config.seed, config.samples.size)
    sampler.draw(plan[:1])
    started = time.monotonic()
    for first in range(0, len(plan), 64):
        path = folder / f"{first}.npz"
        if path.exists():
            continue
        asked = plan[first : first + 64]
        hu, measured, _ = sampler.draw_until_found(asked)
        layout = np.stack([np.asarray(one.condition.layout) for one in asked])
        found = [one.found for one in measured]
        np.savez(path, hu=hu, layout=layout, found=found)
        sampler.count_unrequested(hu, layout, asked)
    return time.monotonic() - started


def _command(recipe: Path, name: str, changes: list[str]) -> list[str]:
    options = [word for one in [f"name={name}", *changes] for word in ("--set", one)]
    return [sys.executable, "-m", "jobs.synthesize", str(recipe), *options]


def _run(recipe: Path, name: str, changes: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(_command(recipe, name, changes), check=True, capture_output=True)
    return time.monotonic() - started


def _killed_run(recipe: Path, name: str, num_samples: int) -> int:
    """Kills a run when half of its shards are done; returns how many that were."""
    process = subprocess.Popen(
        _command(recipe, name, []),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    done = 0
    for line in process.stderr:
        done = _done(line, done)
        if done >= num_samples / 64 / 2:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return done


def _done(line: str, before: int) -> int:
    try:
        told: Any = json.loads(line)
    except ValueError:
        return before
    return int(told["done"]) if told.get("stage") == "synthesize" else before


def _faults(config: ExperimentConfig, num_samples: int) -> list[str]:
    """What is wrong with the run that was killed, held against the one that was not."""
    root = open_root(config.store_url)
    digests = []
    for name in ("whole", "killed"):
        run = SampleSet(open_group(root, f"synthetic/{name}"))
        hu = run.read("hu", 0, run.count)
        digests.append([hashlib.sha256(one.tobytes()).hexdigest() for one in hu])
    whole, killed = digests
    faults = []
    if len(killed) != num_samples:
        faults.append(f"{num_samples - len(killed)} samples are missing")
    others = sum(a != b for a, b in zip(whole, killed, strict=False))
    if others:
        faults.append(f"{others} samples are others")
    copies = len(whole) - len(set(whole)) - (len(killed) - len(set(killed)))
    if copies:
        faults.append(f"{abs(copies)} samples are there twice")
    return faults + [str(problem) for problem in validate(config.store_url)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
