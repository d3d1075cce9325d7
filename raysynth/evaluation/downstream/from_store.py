"""The trial of a recipe's synthetic run: samples from the store, figures to a file and a page."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from raysynth.case import ATTRIBUTES
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.evaluation.consistency import mean_scores
from raysynth.evaluation.downstream.examples import NOBODY, Examples
from raysynth.evaluation.downstream.report import all_verdicts, usefulness_page
from raysynth.evaluation.downstream.trial import Trial, check_tasks, run_trial
from raysynth.evaluation.findings import write_findings
from raysynth.evaluation.notices import kind_notices
from raysynth.evaluation.sets import check_drawn_by
from raysynth.models.bundle import read_facts
from raysynth.report.html import write_usefulness
from raysynth.store.reader import SampleSet, case_attrs, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.splits import is_indicative
from raysynth.window import measurable
from storage_schema.v1 import SPLITS

logger = logging.getLogger(__name__)

ORIGIN = "synthetic"
"""What the run is called in the names of arms."""


@dataclass(frozen=True)
class DownstreamSummary:
    """What a trial came to; the JSON file has every figure besides.

    Attributes:
        name: of the synthetic run.
        verdicts: a sentence for each arm.
        patients: real ones in all, and held out from the generator.
        samples: real ones, and synthetic ones that could be used.
        indicative: so few held-out patients that every figure is no more than a hint.
        notices: what a reader must know beside the figures.
        snapshot: of the store that was read.
        seconds: wall time.
        page: the HTML page.
        path: the JSON file.
    """

    name: str
    verdicts: list[str]
    patients: dict[str, int]
    samples: dict[str, int]
    indicative: bool
    notices: list[str]
    snapshot: str
    seconds: float
    page: str
    path: str


def downstream(config: ExperimentConfig) -> DownstreamSummary:
    """Puts the recipe's synthetic run to the trial.

    Needs a Ray session (`raysynth.session.connect`).

    Raises:
        InputError: no synthetic run, or one of another bundle or settings; its bundle is gone, or
            has learned from patients who are held out now; too few patients or samples; a task that
            volumes have no network for.
    """
    started = time.monotonic()
    check_tasks(config.downstream.tasks, len(config.samples.shape))
    snapshot = main_snapshot(config.store_url)
    root = open_root(config.store_url, snapshot)
    samples = SampleSet(open_group(root, f"samples/{config.samples.name}"))
    run = SampleSet(open_group(root, f"synthetic/{config.name}"))
    check_drawn_by(config, run, config.name)
    _check_alike(config, samples, run)
    real = read_real(root, samples, taught(config))
    synthetic = read_synthetic(root, run, config.downstream.accepted_only)
    trial = run_trial(real, {ORIGIN: synthetic}, config.downstream, config.seed)
    patients = {
        "real": len(np.unique(real.patient)),
        "held_out": len(np.unique(real.patient[real.held_out])),
    }
    notices = kind_notices(root, samples)
    if is_indicative(patients["held_out"]):
        notices.append(f"indicative only: {patients['held_out']} held-out patients")
    if config.downstream.accepted_only:
        left = int(run.count - len(synthetic))
        notices.append(
            f"{left} of {run.count} synthetic samples did not show what was asked for and were "
            "left out: what helps here is a selection"
        )
    folder = config.work_dir / "evaluation"
    page, path = (folder / f"{config.name}_downstream.{ending}" for ending in ("html", "json"))
    summary = DownstreamSummary(
        name=config.name,
        verdicts=all_verdicts(trial),
        patients=patients,
        samples={"real": len(real), ORIGIN: len(synthetic)},
        indicative=is_indicative(patients["held_out"]),
        notices=notices + trial.notices,
        snapshot=snapshot,
        seconds=time.monotonic() - started,
        page=str(page),
        path=str(path),
    )
    _write(summary, trial, config, path)
    write_usefulness(usefulness_page(config.name, trial, summary.notices), page)
    return summary


def taught(config: ExperimentConfig) -> frozenset[str]:
    """Keys of the patients that the recipe's generator was trained on, as its snapshot has them.

    Raises:
        InputError: no bundle, or one of a snapshot that the store does not have.
    """
    facts = read_facts(config.bundle_path)
    root = open_root(config.store_url, facts.snapshot)
    samples = SampleSet(open_group(root, f"samples/{facts.samples.name}"))
    cases = [case_attrs(root, case) for case in samples.attrs["cases"]]
    return frozenset(case.patient_key for case in cases if case.split == "train")


def read_real(root: zarr.Group, samples: SampleSet, taught: frozenset[str]) -> Examples:
    """The samples of patients. Who validated or tested while the generator learned is held out.

    Args:
        root: of the store.
        samples: the set.
        taught: keys of the patients that the generator was trained on.

    Raises:
        InputError: the split has changed since then.
    """
    cases = [case_attrs(root, case) for case in samples.attrs["cases"]]
    moved = {case.patient_key for case in cases if case.split != "train"} & taught
    if moved:
        raise InputError(
            f"{len(moved)} patients who are held out now were among the generator's training "
            "patients: restore the split (data.split, data.split_list), or train it again"
        )
    of_case = np.array([case.patient_key for case in cases])
    case, ratings = samples.index["case"], samples.index["ratings"]
    scores = np.stack(list(mean_scores(ratings).values()), axis=1)
    return Examples(
        hu=measurable(samples.read("hu"), samples.attrs["intensity"]),
        layout=samples.read("layout"),
        pixel_mm=_pixel_mm(samples),
        box=samples.index["box"],
        patient=of_case[case],
        plane=_planes(samples),
        scores=scores.astype(np.float32),
        malignancy=_malignancy(ratings),
        held_out=samples.index["split"] != SPLITS.index("train"),
    )


def read_synthetic(root: zarr.Group, run: SampleSet, accepted_only: bool) -> Examples:
    """The samples of a synthetic run; their patients are those who lent the layouts.

    Raises:
        InputError: none is left.
    """
    chosen = np.ones(run.count, bool)
    if accepted_only:
        chosen = run.index["accepted"] == 1
    if not chosen.any():
        raise InputError(
            f"downstream.accepted_only: none of {run.count} synthetic samples was accepted; set it "
            "to false, or draw others"
        )
    of_case = [case_attrs(root, case).patient_key for case in run.attrs["cases"]]
    asked = run.index["attributes"].astype(np.float32)
    everything = Examples(
        hu=measurable(run.read("hu"), run.attrs["intensity"]),
        layout=run.read("layout"),
        pixel_mm=_pixel_mm(run),
        box=run.index["box"],
        # Row -1 is the last one: nobody.
        patient=np.array([*of_case, NOBODY])[run.index["source_case"]],
        plane=np.arange(run.count),
        scores=np.where(asked > 0, asked, np.float32(np.nan)),
        malignancy=np.full(run.count, np.nan, np.float32),
        held_out=np.zeros(run.count, bool),
    )
    return everything.take(chosen)


def _planes(samples: SampleSet) -> NDArray[np.int64]:
    """The same number for rows of the same image."""
    is_crop = samples.attrs["settings"].get("centre") == "nodule"
    if is_crop or samples.attrs["kind"] == "patches":
        return np.arange(samples.count)  # those of one plane lie around different places
    place = np.stack([samples.index["case"].astype(np.float64), samples.index["z_mm"]])
    _, plane = np.unique(place, axis=1, return_inverse=True)
    return plane.reshape(-1).astype(np.int64)


def _pixel_mm(samples: SampleSet) -> NDArray[np.float32]:
    return np.full(samples.count, samples.pixel_mm, np.float32)


def _malignancy(ratings: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean over the readers who gave one; NaN where nobody did."""
    given = ratings[:, :, ATTRIBUTES.index("malignancy")].astype(np.float32)
    readers = (given > 0).sum(axis=1)
    mean = given.sum(axis=1) / np.maximum(readers, 1)
    return np.where(readers > 0, mean, np.nan).astype(np.float32)


def _check_alike(config: ExperimentConfig, samples: SampleSet, run: SampleSet) -> None:
    for what, of_run, of_set in (
        ("kind", run.attrs["kind"], samples.attrs["kind"]),
        ("intensity", run.attrs["intensity"], samples.attrs["intensity"]),
        ("pixels a side", run.shape[-1], samples.shape[-1]),
        ("pixels of mm", round(run.pixel_mm, 6), round(samples.pixel_mm, 6)),
    ):
        if of_run != of_set:
            raise InputError(
                f"synthetic/{config.name} has {what} {of_run}, samples/{config.samples.name} "
                f"{of_set}: use the set that the model was trained on"
            )


def _write(summary: DownstreamSummary, trial: Trial, config: ExperimentConfig, path: Path) -> None:
    """Replaces the file in one step."""
    found = asdict(summary) | asdict(trial) | {"notices": summary.notices}
    found["settings"] = config.downstream.model_dump(mode="json")
    write_findings(path, found)
    logger.info("wrote %s", path)
