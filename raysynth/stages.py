"""The stages of a run, each a function of its resolved recipe. Imports happen when one is called.

The command line, the job files and the demo call these and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import Any

from raysynth.config import ExperimentConfig
from raysynth.session import connect, set_defaults

set_defaults()

Result = dict[str, Any]


def ingest(config: ExperimentConfig) -> Result:
    """Reads the recipe's scans into the store."""
    from raysynth.data.ingest import ingest as run

    return _timed("ingest", config, run)


def shard(config: ExperimentConfig) -> Result:
    """Cuts the recipe's sample set from the stored volumes."""
    from raysynth.data.shard import shard as run

    return _timed("shard", config, run)


def encode(config: ExperimentConfig) -> Result:
    """Encodes the sample set with the recipe's autoencoder."""
    from raysynth.data.encode import encode as run

    return _timed("encode", config, run)


def train(config: ExperimentConfig) -> Result:
    """Fits the recipe's model; ends in a bundle."""
    from raysynth.training.launch import train as run

    return _timed("train", config, run)


def synthesize(config: ExperimentConfig) -> Result:
    """Draws synthetic samples, and the evaluation's controls, into the store."""
    from raysynth.sampling.batch import synthesize as run

    return _timed("synthesize", config, run)


def evaluate(config: ExperimentConfig) -> Result:
    """Judges the synthetic samples and writes the report."""
    from raysynth.evaluation.evaluate import evaluate as run
    from raysynth.evaluation.report import report

    return _timed("evaluate", config, run) | {"report": str(report(config.absolute()))}


def _timed(verb: str, config: ExperimentConfig, run: Any) -> Result:
    """Runs one stage on a cluster and adds its wall time to `work_dir`/timings.json.

    So a stage that was killed and run again, or that had nothing left to do, keeps its time.
    """
    config = config.absolute()
    with connect():
        started = time.monotonic()
        try:
            return asdict(run(config))
        finally:
            _add_seconds(config, verb, time.monotonic() - started)


def stage_seconds(config: ExperimentConfig) -> dict[str, float]:
    """Wall seconds of the stages run in the recipe's work_dir, by `verb name`."""
    path = config.work_dir / "timings.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _add_seconds(config: ExperimentConfig, verb: str, seconds: float) -> None:
    timings, name = stage_seconds(config), f"{verb} {config.name}"
    timings[name] = round(timings.get(name, 0.0) + seconds, 2)
    config.work_dir.mkdir(parents=True, exist_ok=True)
    scratch = config.work_dir / f".timings-{os.getpid()}.json"
    scratch.write_text(json.dumps(timings, indent=1))
    scratch.replace(config.work_dir / "timings.json")
