"""`raysynth demo`: the whole main job on small images, on phantoms or on real scans."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysynth import stages
from raysynth.config import ExperimentConfig, load_recipe
from raysynth.data.inspect import inspect_store
from raysynth.errors import InputError
from raysynth.progress import stage_seconds
from raysynth.session import connect

Stage = Callable[[ExperimentConfig], stages.Result]


@dataclass(frozen=True)
class DemoSummary:
    """Where the demo left its pages and its figures.

    Attributes:
        report: on what it trained.
        texture: crops on real texture, drawn by the bundle that the package brings.
        path: the figures.
    """

    report: Path
    texture: Path
    path: Path


def run_demo(work_dir: Path, lidc: Path | None, overrides: list[str]) -> DemoSummary:
    """Runs ingest, shard, train, encode, train, synthesize and evaluate in one local cluster.

    Then draws on real texture, which nothing learns in minutes, with the package's own bundle.

    Args:
        work_dir: parent of the run's folder (`demo`, or `demo_lidc` on real scans).
        lidc: a folder of LIDC-IDRI DICOM series; None: phantom patients.
        overrides: `--set` values for both recipes.
    """
    source, patience, folder = [], [], work_dir / "demo"
    if lidc is not None:
        if not lidc.is_dir():
            raise InputError(f"--lidc {lidc}: no such folder; give the folder of the DICOM series")
        # Few scans: every nodule and every lung plane counts.
        source = [
            f"data.source={{kind: lidc, path: {json.dumps(str(lidc.resolve()))}}}",
            "data.samples.min_nodule_mm=0",
            "data.samples.nodule_free_every=1",
        ]
        # Real texture takes longer to learn.
        patience = ["training.max_seconds=300"]
        folder = work_dir / "demo_lidc"
    settings = [*source, f"work_dir={json.dumps(str(folder))}"]
    recipes = recipes_folder()
    autoencoder = load_recipe(recipes / "phantom_demo_kl.yaml", [*settings, *overrides])
    model = load_recipe(recipes / "phantom_demo.yaml", [*settings, *patience, *overrides])

    texture = load_recipe(
        recipes / "phantom_real_texture.yaml",
        [f"work_dir={json.dumps(str(folder / 'texture'))}"],
    )

    steps: list[tuple[str, Stage, ExperimentConfig]] = [
        ("ingest", stages.ingest, model),
        ("shard", stages.shard, model),
        ("train_autoencoder", stages.train, autoencoder),
        ("encode", stages.encode, model),
        ("train", stages.train, model),
        ("synthesize", stages.synthesize, model),
        ("evaluate", stages.evaluate, model),
        ("texture_ingest", stages.ingest, texture),
        ("texture_shard", stages.shard, texture),
        ("texture_synthesize", stages.synthesize, texture),
    ]
    page = folder / "texture.html"
    with connect():
        results = {name: stage(config) for name, stage, config in steps}
        inspect_store(texture.store_url, page)
    timings = stage_seconds(model.work_dir) | stage_seconds(texture.work_dir)
    seconds = {name: timings[f"{stage.__name__} {config.name}"] for name, stage, config in steps}
    return _summarize(model, results, seconds, page)


def recipes_folder() -> Path:
    """The shipped recipes: inside an installed package, or in a source tree's `jobs`."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "jobs" / "recipes"


def _summarize(
    config: ExperimentConfig,
    results: dict[str, stages.Result],
    seconds: dict[str, float],
    texture: Path,
) -> DemoSummary:
    evaluation = results["evaluate"]
    summary: dict[str, Any] = {
        "cases": results["ingest"]["cases"],
        "nodules": results["ingest"]["nodules"],
        "slices": results["shard"]["samples"],
        "stages": {name: {"seconds": value} for name, value in seconds.items()},
        "metrics": {
            key: {"value": one["value"], "interval": one["interval"], "n": one["n"]}
            | {name: figure["value"] for name, figure in one["columns"].items()}
            for key, one in evaluation["metrics"].items()
        },
        "adherence": evaluation["adherence"],
        "indicative": evaluation["indicative"],
        "settings": config.shareable(),
        "report": evaluation["report"],
        "texture": str(texture),
    }
    path = config.work_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2, default=str))
    return DemoSummary(Path(evaluation["report"]), texture, path)
