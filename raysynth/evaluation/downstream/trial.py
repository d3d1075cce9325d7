"""The trial: folds x tasks x arms x seeds, each training one Ray task, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raysynth.config.downstream import DownstreamConfig, Task
from raysynth.errors import InputError
from raysynth.evaluation.downstream.arms import (
    REAL,
    Arm,
    is_rare,
    plan_arms,
    samples_of,
    usable,
    volumes_of,
)
from raysynth.evaluation.downstream.examples import Examples, of_texture
from raysynth.evaluation.downstream.figures import ALPHA, Figures, Measure, figures_of
from raysynth.evaluation.downstream.folds import Fold, make_folds
from raysynth.evaluation.downstream.tables import (
    Table,
    classification_figures,
    localisation_figures,
    segmentation_figures,
)
from raysynth.evaluation.intervals import MIN_PATIENTS
from raysynth.progress import progress
from raysynth.seeding import seed_of

Learn = Callable[[Any, Examples, DownstreamConfig, int], Table]
"""Of training samples (slices as `Examples`, volumes as `Volumes`), test samples, config, seed."""

HEADLINES: dict[Task, str] = {
    "classification": "accuracy",
    "malignancy": "accuracy",
    "localisation": "ap50",
    "segmentation": "dice",
}
"""The metric of a task that a verdict is about."""


@dataclass(frozen=True)
class ArmResult:
    """What one arm came to.

    Attributes:
        real: real samples that a network was trained on, mean over the folds; repeated and
            augmented ones count each time.
        synthetic: synthetic samples likewise.
        steps: optimizer steps of each network.
        metrics: by name.
    """

    real: float
    synthetic: float
    steps: int
    metrics: Figures


@dataclass(frozen=True)
class TaskResult:
    """Arms by name; the first is the one that others are compared with.

    Attributes:
        headline: the metric that verdicts are about.
        patients: who test, over all folds.
        arms: judged on all test samples.
        rare: the thinned arms, and `real`, judged on the rare kind of nodule alone.
    """

    headline: str
    patients: int
    arms: dict[str, ArmResult]
    rare: dict[str, ArmResult]


@dataclass(frozen=True)
class Trial:
    """All that a trial found.

    Attributes:
        tasks: results by task.
        folds: number of test patients in each.
        excluded: synthetic samples that were left out because their layout is a test patient's, by
            origin and fold.
        notices: what a reader must know beside the figures.
    """

    tasks: dict[str, TaskResult]
    folds: list[int]
    excluded: dict[str, list[int]]
    notices: list[str]


@dataclass(frozen=True)
class _Job:
    """One network to train and judge."""

    task: Task
    fold: Fold
    arm: Arm
    number: int  # of the training seed


def run_trial(
    real: Examples, synthetic: Mapping[str, Examples], config: DownstreamConfig, seed: int = 0
) -> Trial:
    """Trains and judges every network of a trial; figures are of real, held-out patients alone.

    Needs a Ray session (`raysynth.session.connect`).

    Args:
        real: samples of patients; those that are `held_out` test in turn, all others only teach.
        synthetic: samples by origin, each with arms of its own.
        config: of the trial.
        seed: of folds, samples and trainings.

    Raises:
        InputError: too few patients or samples, a test patient among those who teach, or a task
            that volumes have no network for.
    """
    check_tasks(config.tasks, real.spatial_dims)
    folds = make_folds(real, config.folds, seed)
    jobs = [
        _Job(task, fold, arm, number)
        for task in config.tasks
        for fold in folds
        for arm in plan_arms(task, real, synthetic, fold, config, seed)
        for number in range(config.seeds)
    ]
    if config.imbalance is not None:
        _check_rare(real, config)
    tables = _run(jobs, real, synthetic, config, seed)
    return Trial(
        tasks={task: _result(task, jobs, tables, config, seed) for task in config.tasks},
        folds=[len(fold.test) for fold in folds],
        excluded={
            name: [int(fold.tests(one.patient).sum()) for fold in folds]
            for name, one in synthetic.items()
        },
        notices=_notices(real, jobs, config),
    )


def check_tasks(tasks: Sequence[Task], spatial_dims: int) -> None:
    """Refuses what only slices can be tried by.

    Raises:
        InputError: says which tasks, and what to do.
    """
    refused = [task for task in tasks if task != "segmentation"]
    if spatial_dims == 3 and refused:
        raise InputError(
            f"downstream.tasks {', '.join(refused)}: these networks see slices, and the samples "
            "are volumes; set downstream.tasks=[segmentation]"
        )


def learn_task(task: Task) -> tuple[Learn, Measure]:
    """How a task is learned, and how its tables are measured."""
    match task:
        case "classification":
            from raysynth.evaluation.downstream.classification import learn_nodules

            return learn_nodules, classification_figures
        case "malignancy":
            from raysynth.evaluation.downstream.malignancy import learn_malignancy

            return learn_malignancy, classification_figures
        case "localisation":
            from raysynth.evaluation.downstream.localisation import learn_boxes

            return learn_boxes, localisation_figures
        case "segmentation":
            from raysynth.evaluation.downstream.segmentation import learn_masks

            return learn_masks, segmentation_figures


def _run(
    jobs: list[_Job],
    real: Examples,
    synthetic: Mapping[str, Examples],
    config: DownstreamConfig,
    seed: int,
) -> list[Table]:
    """A table for each job."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=int(config.use_gpu))(_train_and_test)
    slices, drawn = ray.put(real), ray.put(synthetic)
    futures = [task.remote(job, slices, drawn, config, seed) for job in jobs]
    with progress("downstream", len(jobs), unit="networks") as view:
        pending = list(futures)
        while pending:
            (done,), pending = ray.wait(pending)
            ray.get(done)  # what went wrong is told at once
            view.advance()
    return ray.get(futures)


def _train_and_test(
    job: _Job,
    real: Examples,
    synthetic: Mapping[str, Examples],
    config: DownstreamConfig,
    seed: int,
) -> Table:
    """Trains one network, in a worker, and says what it made of the fold's test samples."""
    import torch

    # One seed for all arms of a fold: as they start alike, their differences vary less.
    own = seed_of("network", seed, job.task, job.fold.number, job.number)
    torch.manual_seed(own)
    tests = usable(job.task, real, is_real=True) & job.fold.tests(real.patient)
    test = real.take(tests)
    taught = volumes_of if real.spatial_dims == 3 else samples_of
    train = taught(job.arm, real, synthetic, own)
    learn, _ = learn_task(job.task)
    table = learn(train, test, config, own)
    rows = table.pop("row")
    table["patient"] = test.patient[rows]
    if config.imbalance is not None:
        table["is_rare"] = is_rare(job.task, real, config.imbalance.texture)[tests][rows]
    return table


def _result(
    task: Task, jobs: list[_Job], tables: list[Table], config: DownstreamConfig, seed: int
) -> TaskResult:
    of_task = [(job, table) for job, table in zip(jobs, tables, strict=True) if job.task == task]
    names = list(dict.fromkeys(job.arm.name for job, _ in of_task))
    runs = {
        name: [
            [table for job, table in of_task if job.arm.name == name and job.number == number]
            for number in range(config.seeds)
        ]
        for name in names
    }
    thinned = {job.arm.name for job, _ in of_task if job.arm.is_thinned}
    measure = learn_task(task)[1]
    draw_seed = seed_of("bootstrap", seed, task)

    def judged(chosen: Mapping[str, list[list[Table]]]) -> dict[str, ArmResult]:
        figures = figures_of(chosen, measure, config.num_bootstrap, draw_seed)
        return {
            name: replace(_counted([job.arm for job, _ in of_task], name, config), metrics=found)
            for name, found in figures.items()
        }

    rare = {
        name: [[_only_rare(table) for table in of_seed] for of_seed in runs[name]]
        for name in names
        if name in thinned
    }
    if not any(len(table["patient"]) for runs_of in rare.values() for table in runs_of[0]):
        rare = {}
    if rare:
        rare[REAL] = [[_only_rare(table) for table in of_seed] for of_seed in runs[REAL]]
    return TaskResult(
        headline=HEADLINES[task],
        patients=len(np.unique(np.concatenate([table["patient"] for _, table in of_task]))),
        arms=judged({name: runs[name] for name in names if name not in thinned}),
        rare=judged(rare) if rare else {},
    )


def _counted(arms: list[Arm], name: str, config: DownstreamConfig) -> ArmResult:
    mine = [arm for arm in arms if arm.name == name]
    return ArmResult(
        real=float(np.mean([len(arm.real) * (1 + arm.copies) for arm in mine])),
        synthetic=float(np.mean([len(arm.synthetic) for arm in mine])),
        steps=config.steps,
        metrics={},
    )


def _only_rare(table: Table) -> dict[str, Any]:
    return {name: column[table["is_rare"]] for name, column in table.items()}


def _check_rare(real: Examples, config: DownstreamConfig) -> None:
    assert config.imbalance is not None
    texture = config.imbalance.texture
    rare = len(np.unique(real.patient[real.held_out & of_texture(real, texture)]))
    if rare < 2:
        raise InputError(
            f"downstream.imbalance: {rare} held-out patients have a {texture} nodule with scores, "
            "so there is nothing to judge by; choose another texture, or leave imbalance out"
        )


def _notices(real: Examples, jobs: list[_Job], config: DownstreamConfig) -> list[str]:
    patients = len(np.unique(real.patient[real.held_out]))
    notices = [
        f"every network was trained for {config.steps} steps, whatever its samples: more data is "
        "not more training here, and “duplicated” shows what chance does",
        "figures of folds share training patients: the tests' p-values are optimistic, the "
        "interval over patients is the primary figure",
    ]
    compared = len({job.arm.name for job in jobs if not job.arm.is_thinned}) - 1
    least = min(1.0, compared * 2.0 ** (1 - config.folds))
    if least >= ALPHA:
        notices.append(
            f"{config.folds} folds and {compared} arms: no signed-rank test can come below "
            f"{least:.2g} after Holm, so nothing here can be certain; use more folds or fewer arms"
        )
    if patients < MIN_PATIENTS:
        notices.append(f"{patients} test patients: intervals over them are too narrow")
    return notices
