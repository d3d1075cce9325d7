"""A trial in words and tables."""

from __future__ import annotations

from collections.abc import Mapping

from raysynth.evaluation.downstream.figures import Difference, Metric
from raysynth.evaluation.downstream.trial import ArmResult, Trial
from raysynth.report.html import UsefulnessPage
from raysynth.sampling.cohort import DIAMETERS

SPOKEN = {
    "auc": "AUC",
    "f1": "F1",
    "lesion_sensitivity": "lesions found",
    "lesion_dice": "dice of lesions",
    "voxel_sensitivity": "sensitivity of voxels",
    "voxel_specificity": "specificity of voxels",
}

SPOKEN_SIZES = dict(
    zip(DIAMETERS, ("below 6 mm", "6 to 8 mm", "8 to 15 mm", "15 mm and more"), strict=True)
)

HEADINGS = {1: "helps", 0: "no difference is certain", -1: "hurts"}


def usefulness_page(name: str, trial: Trial, notices: list[str]) -> UsefulnessPage:
    """What a trial's page shows."""
    tables, said = {}, {}
    for title, headline, arms in _groups(trial):
        tables[title] = table(arms, headline)
        said[title] = verdicts(arms, headline)
        if any(_size_of(metric) for metric in next(iter(arms.values())).metrics):
            sizes = f"{title}: lesions by their diameter"
            tables[sizes], said[sizes] = table_by_size(arms), []
    left = {origin: sum(counts) for origin, counts in trial.excluded.items()}
    excluded = "; ".join(
        f"{count} samples of {origin} lie on layouts of test patients and were left out of the "
        "folds in which these test"
        for origin, count in left.items()
    )
    return UsefulnessPage(
        title=f"Is {name} of use?",
        notices=notices,
        tables=tables,
        verdicts=said,
        excluded=f"{excluded}." if excluded else "",
    )


def all_verdicts(trial: Trial) -> list[str]:
    """The sentences on all arms, task by task."""
    return [
        f"{title}: {sentence}"
        for title, headline, arms in _groups(trial)
        for sentence in verdicts(arms, headline)
    ]


def verdicts(arms: Mapping[str, ArmResult], headline: str) -> list[str]:
    """A sentence for each arm that is compared with the first."""
    base, *others = arms
    return [verdict(name, arms[name].metrics[headline], base, headline) for name in others]


def verdict(name: str, metric: Metric, base: str, headline: str) -> str:
    """Whether an arm helps, in words and figures."""
    difference = metric.difference
    if difference is None or difference.value is None or difference.interval is None:
        return f"{name}: there was nothing to compare it by."
    low, high = difference.interval
    return (
        f"{name}: {HEADINGS[difference.sign]}: {spoken(headline)} {difference.value:+.3f} "
        f"[{low:+.3f}, {high:+.3f}] against {base}, Holm p {difference.signed_rank_p:.2g} "
        f"(signed-rank) and {difference.rank_sum_p:.2g} (rank-sum)."
    )


def table(arms: Mapping[str, ArmResult], headline: str) -> list[list[str]]:
    """Heading, and a row for each arm: metrics, and what sets it apart from the first."""
    base, *_ = arms
    names = [name for name in arms[base].metrics if not _size_of(name)]
    spoken_headline = spoken(headline)
    heading = ["arm", "real", "synthetic", *map(spoken, names)]
    heading += [f"{spoken_headline} against {base}", "p rank-sum", "p signed-rank"]
    rows = [
        [
            name,
            f"{arm.real:.0f}",
            f"{arm.synthetic:.0f}",
            *(_percent(arm.metrics[metric]) for metric in names),
            *_compared(arm.metrics[headline].difference),
        ]
        for name, arm in arms.items()
    ]
    return [heading, *rows]


def table_by_size(arms: Mapping[str, ArmResult]) -> list[list[str]]:
    """Heading, and a row for each arm: the metrics of lesions of one class of diameter."""
    base, *_ = arms
    names = [name for name in arms[base].metrics if _size_of(name)]
    rows = [
        [name, *(_percent(arm.metrics[metric]) for metric in names)] for name, arm in arms.items()
    ]
    return [["arm", *map(spoken, names)], *rows]


def spoken(metric: str) -> str:
    """A metric's name as tables have it."""
    size = _size_of(metric)
    if size:
        return f"{spoken(metric.removesuffix(f'_{size}'))}, {SPOKEN_SIZES[size]}"
    return SPOKEN.get(metric, metric.upper() if metric[-1].isdigit() else metric)


def _groups(trial: Trial) -> list[tuple[str, str, Mapping[str, ArmResult]]]:
    """Title, headline and arms of every table."""
    groups: list[tuple[str, str, Mapping[str, ArmResult]]] = []
    for task, result in trial.tasks.items():
        title = f"{task} ({result.patients} test patients)"
        groups.append((title, result.headline, result.arms))
        if result.rare:
            groups.append((f"{task}, rare nodules alone", result.headline, result.rare))
    return groups


def _size_of(metric: str) -> str:
    """The class of diameters that a metric is about; empty: it is about all lesions."""
    return next((name for name in DIAMETERS if metric.endswith(f"_{name}")), "")


def _percent(metric: Metric) -> str:
    if metric.mean is None:
        return "-"
    spread = "" if metric.sd is None else f" ± {100 * metric.sd:.2f}"
    return f"{100 * metric.mean:.2f}{spread}"


def _compared(difference: Difference | None) -> list[str]:
    if difference is None or difference.value is None or difference.interval is None:
        return ["-"] * 3
    low, high = (100 * edge for edge in difference.interval)
    return [
        f"{100 * difference.value:+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{difference.rank_sum_p:.2g} ({difference.rank_sum.effect:+.2f})",
        f"{difference.signed_rank_p:.2g} ({difference.signed_rank.effect:+.2f})",
    ]
