"""The stages of a run, each a function of its resolved recipe. Imports happen when one is called.

The command line, the job files and the demo call these and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raysynth.config import ExperimentConfig, OfLatents
from raysynth.progress import add_stage_seconds
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
    if config.evaluation.stream:
        from raysynth.evaluation.watch import synthesize_watched as run
    else:
        from raysynth.sampling.batch import synthesize as run

    return _timed("synthesize", config, run)


def evaluate(config: ExperimentConfig) -> Result:
    """Judges the synthetic samples and writes the report."""
    from raysynth.evaluation.evaluate import evaluate as run
    from raysynth.evaluation.report import report

    return _timed("evaluate", config, run) | {"report": str(report(config.absolute()))}


def audit(config: ExperimentConfig) -> Result:
    """Holds the synthetic samples against those that their model learned from."""
    from raysynth.evaluation.audit import audit as run

    return _on_the_card("audit", config, run)


def export(
    config: ExperimentConfig, folder: Path, file_format: str, without_audit: str | None
) -> Result:
    """Writes samples, or the bundle that drew them, for others, if their audit lets them leave."""
    from raysynth.errors import InputError
    from raysynth.export.bundle import export_bundle
    from raysynth.export.dicom import dicom_files
    from raysynth.export.diffusers import export_diffusers
    from raysynth.export.nifti import nifti_files
    from raysynth.export.nnunet import nnunet_files
    from raysynth.export.plain_zarr import zarr_files
    from raysynth.export.png import png_files
    from raysynth.export.samples import export_samples
    from raysynth.export.writing import Format

    config, folder = config.absolute(), folder.absolute()
    if file_format == "bundle":
        return asdict(export_bundle(config, folder, without_audit))
    if file_format == "diffusers":
        return asdict(export_diffusers(config, folder, without_audit))
    formats: dict[str, Format] = {
        "nifti": nifti_files,
        "dicom": dicom_files,
        "nnunet": nnunet_files,
        "png": png_files,
        "zarr": zarr_files,
    }
    names = [*formats, "bundle", "diffusers"]
    if file_format not in formats:
        raise InputError(f"--format {file_format}: there are {', '.join(names)}")
    written = export_samples(config, folder, file_format, formats[file_format], without_audit)
    return asdict(written)


def verify(path: Path) -> Result:
    """Checks exported files: how many are valid, and which are altered or unmarked."""
    from raysynth.export.verify import verify as run

    found = run(path)
    return {
        "checked": len(found),
        "valid": sum(one.verdict == "valid" for one in found),
        "flawed": [asdict(one) for one in found if one.verdict != "valid"],
    }


def downstream(config: ExperimentConfig) -> Result:
    """Puts the synthetic samples to the trial: do networks learn more with them?"""
    from raysynth.evaluation.downstream.from_store import downstream as run

    return _on_the_card("downstream", config, run)


def compare(configs: Sequence[ExperimentConfig]) -> Result:
    """Trains, draws and judges what is not there yet, and puts the recipes beside each other."""
    from raysynth.evaluation.compare import check_comparable
    from raysynth.evaluation.compare import compare as run

    configs = [config.absolute() for config in configs]
    check_comparable(configs)
    with connect():
        for config in configs:
            if isinstance(config.model, OfLatents):
                encode(config)
            for stage in (train, synthesize, evaluate):
                stage(config)
        return asdict(run(configs))


def _on_the_card(verb: str, config: ExperimentConfig, run: Any) -> Result:
    """Runs a stage whose outcome stands on the scorecard, and writes the report again if it is."""
    from raysynth.evaluation.report import report

    result, config = _timed(verb, config, run), config.absolute()
    if (config.work_dir / "evaluation" / f"{config.name}.json").exists():
        report(config)
    return result


def _timed(verb: str, config: ExperimentConfig, run: Any) -> Result:
    """Runs one stage on a cluster and keeps its wall time."""
    config = config.absolute()
    with connect():
        started = time.monotonic()
        try:
            return asdict(run(config))
        finally:
            seconds = time.monotonic() - started
            add_stage_seconds(config.work_dir, f"{verb} {config.name}", seconds)
