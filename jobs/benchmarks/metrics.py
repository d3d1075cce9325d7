"""Final values of metrics, and statistics on the way, against others on the same features.

python -m jobs.benchmarks.metrics [--rounds N] [--dim D]

10,000 features of 2,048 numbers stream in batches of 64 into statistics; then FID at N = 256, 1,000
and 5,000 a side, from features and from what was kept of them, each against peers that start from
the same; KID, and precision and recall, at 5,000. Peers: `scipy.linalg.sqrtm` of the product of
covariances, as clean-fid does it; torch-fidelity; torchmetrics 1.9, where it is installed (`pip
install --no-deps --target FOLDER torchmetrics lightning-utilities`, then PYTHONPATH=FOLDER). All
take as many threads as they choose. Ways take turns in every round; ratios are of processor
seconds, which other load hardly moves. Errors of FID are relative to what torch's singular values
give, of the others to torch-fidelity. Exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from jobs.benchmarks.ratios import Row, Seconds, facts_of_run, median_row, paired_ratio, report
from raysynth.metrics.frechet import FeatureMoments, frechet_distance, frechet_distance_of
from raysynth.metrics.kernel import FeatureTable, kernel_distance
from raysynth.metrics.manifold import NUM_NEIGHBOURS, manifold_overlap

Features = NDArray[np.float32]
Way = Callable[[], Any]

STREAMED, BATCH_SIZE = 10_000, 64
MOST_ERROR, MOST_MERGE_ERROR = 1e-6, 1e-9

FASTER_THAN_ROOT = {256: 200.0, 1000: 50.0, 5000: 2.5}
"""How often ours shall fit into the time of sqrtm, by N."""

FASTER_THAN_TORCHMETRICS = 1.4

LARGEST = max(FASTER_THAN_ROOT)

OURS, ROOT = "raysynth", "scipy sqrtm"
TORCHMETRICS, TORCH_FIDELITY = "torchmetrics", "torch-fidelity"


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=2048)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    peers = ["torchmetrics"] if importlib.util.find_spec("torchmetrics") else []
    facts = facts_of_run("numpy", "scipy", "torch", "torch-fidelity", *peers)
    facts |= {"threads": torch.get_num_threads(), "dim": options.dim}
    facts["not_installed"] = [] if peers else ["torchmetrics: install it, or read on without"]
    real, synthetic = _features(options.dim)
    if peers:
        _torchmetrics([real[:2]], [])  # its import is not what is timed
    spent, _ = _take_turns(_streams(real, bool(peers)), options.rounds)
    tables = {f"{STREAMED:,} features in batches of {BATCH_SIZE}": _rows(spent, {})}
    errors: dict[str, float] = {}
    for count, faster in FASTER_THAN_ROOT.items():
        targets = {ROOT: faster, TORCHMETRICS: FASTER_THAN_TORCHMETRICS}
        exact = _exact(real[:count], synthetic[:count])
        for start, ways in _ways(real[:count], synthetic[:count], bool(peers)).items():
            spent, values = _take_turns(ways, options.rounds)
            tables[f"FID at N = {count:,}, of {start}"] = _rows(spent, targets)
            errors |= {
                f"FID of {start}, {way}, N = {count:,}": abs(value / exact - 1)
                for way, value in values.items()
            }
    for name, ways in _others(real[:LARGEST], synthetic[:LARGEST]).items():
        spent, values = _take_turns(ways, options.rounds)
        tables[f"{name} at N = {LARGEST:,}"] = _rows(spent, {})
        errors[f"{name}, {OURS}"] = float(
            max(abs(np.divide(values[OURS], values[TORCH_FIDELITY]) - 1))
        )
    merged = {f"{parts} of them": _merge_error(real, synthetic, parts) for parts in (1, 8, 64)}
    wrong = _report_errors(errors, merged)
    facts |= {"errors": errors, "merge_errors": merged, "errors_missed": wrong}
    return max(report(facts, tables, "times ours"), int(bool(wrong)))


def _features(dim: int) -> tuple[Features, Features]:
    """Features of a random extractor; their variances fall, as those of a real one do."""
    rng = np.random.default_rng(0)
    mixing = np.arange(1.0, dim + 1)[:, None] ** -0.5 * rng.normal(size=(dim, dim))
    real, synthetic = (
        (rng.normal(size=(STREAMED, dim)) @ mixing * spread + shift).astype(np.float32)
        for spread, shift in ((1.0, 0.0), (1.05, 0.1))
    )
    return real, synthetic


# What is timed: statistics on the way, and final values.


def _streams(real: Features, with_torchmetrics: bool) -> dict[str, Way]:
    batches = np.array_split(real, range(BATCH_SIZE, len(real), BATCH_SIZE))
    ways: dict[str, Way] = {
        f"{OURS}, moments": partial(_moments, batches),
        f"{OURS}, table": partial(_table, batches),
        "one product of all": partial(_product, real),
    }
    if with_torchmetrics:
        ways["torchmetrics"] = partial(_torchmetrics, batches, [])
    return ways


def _ways(
    real: Features, synthetic: Features, with_torchmetrics: bool
) -> dict[str, dict[str, Way]]:
    """Ways to a final FID, by what they start from."""
    of_features: dict[str, Way] = {
        OURS: partial(frechet_distance_of, real, synthetic),
        ROOT: partial(_by_root, real, synthetic),
    }
    if with_torchmetrics and len(real) > real.shape[1]:
        of_features[TORCHMETRICS] = lambda: _by_torchmetrics(_torchmetrics([real], [synthetic]))
    if len(real) <= real.shape[1]:
        return {"features": of_features}
    moments = [_moments([side]) for side in (real, synthetic)]
    statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in (synthetic, real)]
    of_moments: dict[str, Way] = {
        OURS: partial(frechet_distance, *moments),
        TORCH_FIDELITY: partial(_by_torch_fidelity, statistics),
    }
    if with_torchmetrics:
        of_moments[TORCHMETRICS] = partial(_by_torchmetrics, _torchmetrics([real], [synthetic]))
    return {"features": of_features, "what was kept": of_moments}


def _others(real: Features, synthetic: Features) -> dict[str, dict[str, Way]]:
    """Ways to the other metrics of features."""
    tensors = [torch.from_numpy(side) for side in (synthetic, real)]

    def our_kid() -> list[float]:
        return [kernel_distance(synthetic, real).mean]

    def their_kid() -> list[float]:
        told = kid_features_to_metric(*tensors, kid_subset_size=1000, verbose=False)
        return [float(told["kernel_inception_distance_mean"])]

    def our_overlap() -> list[float]:
        overlap = manifold_overlap(real, synthetic)
        return [overlap.precision, overlap.recall]

    def their_overlap() -> list[float]:
        told = prc_features_to_metric(*tensors, prc_neighborhood=NUM_NEIGHBOURS, verbose=False)
        return [float(told["precision"]), float(told["recall"])]

    return {
        "KID": {OURS: our_kid, TORCH_FIDELITY: their_kid},
        "precision and recall": {OURS: our_overlap, TORCH_FIDELITY: their_overlap},
    }


def _moments(batches: Iterable[Features]) -> FeatureMoments:
    moments: FeatureMoments | None = None
    for batch in batches:
        moments = moments or FeatureMoments(batch.shape[1])
        moments.update(batch)
    assert moments is not None
    return moments


def _table(batches: Iterable[Features]) -> FeatureTable:
    table, first = FeatureTable(), 0
    for batch in batches:
        table.update(np.arange(first, first + len(batch)), batch)
        first += len(batch)
    table.compute()
    return table


def _product(features: Features) -> NDArray[np.float64]:
    """The least that a covariance takes."""
    values = features.astype(np.float64)
    return values.T @ values


def _by_root(real: Features, synthetic: Features) -> float:
    mean_r, mean_s = real.mean(0, np.float64), synthetic.mean(0, np.float64)
    one, other = (np.cov(side.astype(np.float64), rowvar=False) for side in (real, synthetic))
    root = np.asarray(sqrtm(one @ other))
    if not np.isfinite(root).all():
        offset = np.eye(len(one)) * 1e-6
        root = np.asarray(sqrtm((one + offset) @ (other + offset)))
    distance = np.sum((mean_r - mean_s) ** 2) + np.trace(one) + np.trace(other)
    return float(distance - 2 * np.trace(root.real))


def _by_torch_fidelity(statistics: list[Any]) -> float:
    judged = fid_statistics_to_metric(*statistics, verbose=False)
    return float(judged["frechet_inception_distance"])


def _torchmetrics(real: Iterable[Features], synthetic: Iterable[Features]) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = torch.nn.Identity()
    sides = [(batch, True) for batch in real] + [(batch, False) for batch in synthetic]
    extractor.num_features = sides[0][0].shape[1]
    metric = FrechetInceptionDistance(feature=extractor)
    # Its sums are of single precision unless asked otherwise.
    metric.set_dtype(torch.float64)
    for batch, is_real in sides:
        metric.update(torch.from_numpy(batch), real=is_real)
    return metric


def _by_torchmetrics(metric: Any) -> float:
    metric._computed = None  # or it would give what it found before
    return float(metric.compute())


# Turns, and what they are held to.


def _take_turns(
    ways: dict[str, Way], rounds: int
) -> tuple[dict[str, list[Seconds]], dict[str, Any]]:
    """Of each way the time of every round, and what it returned."""
    spent: dict[str, list[Seconds]] = {way: [] for way in ways}
    values = {}
    for _ in range(rounds):
        for way, run in ways.items():
            started = Seconds.now()
            values[way] = run()
            spent[way].append(started.elapsed())
    return spent, values


def _rows(spent: dict[str, list[Seconds]], targets: dict[str, float]) -> list[Row]:
    """Each of ours, and peers against it."""
    peers = [way for way in spent if not way.startswith(OURS)]
    rows = []
    for ours in [way for way in spent if way not in peers]:
        rows.append(median_row(ours, spent[ours]))
        for peer in peers:
            row = median_row(f"  {peer}", spent[peer])
            ratio, interval = paired_ratio(spent[peer], spent[ours])
            target = targets.get(peer)
            rows.append(Row(row.name, row.cpu_ms, row.wall_ms, ratio, interval, target))
    return rows


def _exact(real: Features, synthetic: Features) -> float:
    """FID by singular values of deviations (or of their triangles) in another library."""
    x, y = (torch.from_numpy(side).double() for side in (real, synthetic))
    shift = x.mean(0) - y.mean(0)
    x, y = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (x, y))
    trace = x.square().sum() + y.square().sum()
    if len(x) > x.shape[1]:
        x, y = (torch.linalg.qr(side, mode="r").R for side in (x, y))
    return float(shift @ shift + trace - 2 * torch.linalg.svdvals(x @ y.T).sum())


def _merge_error(real: Features, synthetic: Features, parts: int) -> float:
    """The largest relative difference that merging makes, of moments and of their FID."""
    whole, merged = [], []
    for side in (real, synthetic):
        whole.append(_moments([side]))
        total = FeatureMoments(side.shape[1])
        for part in reversed(np.array_split(side, parts)):
            total.merge(_moments([part]))
        merged.append(total)
    differences = [abs(frechet_distance(*merged) / frechet_distance(*whole) - 1)]
    for one, other in zip(whole, merged, strict=True):
        for expected, found in zip(one.compute(), other.compute(), strict=True):
            differences.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    return max(differences)


def _report_errors(errors: dict[str, float], merged: dict[str, float]) -> list[str]:
    """Prints the table; returns what missed its target."""
    missed = []
    print(f"{'relative error':50s}")
    for name, error in errors.items():
        verdict = ""
        if OURS in name:
            verdict = f"   target <= {MOST_ERROR:g}: {'met' if error <= MOST_ERROR else 'MISSED'}"
            missed += [] if error <= MOST_ERROR else [name]
        print(f"  {name:48s}{error:10.1e}{verdict}")
    print(f"{'moments and FID of merged parts, relative':50s}")
    for name, error in merged.items():
        met = error <= MOST_MERGE_ERROR
        verdict = f"   target <= {MOST_MERGE_ERROR:g}: {'met' if met else 'MISSED'}"
        missed += [] if met else [name]
        print(f"  {name:48s}{error:10.1e}{verdict}")
    print()
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
