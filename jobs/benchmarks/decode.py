"""What decoding a volume costs: in slabs, as a whole, and in MONAI's overlapping tiles.

python -m jobs.benchmarks.decode [--rounds N] [--cells N] [--threads N]

A latent 4 x 32^3 becomes a volume of 128^3 by a small autoencoder. Ways take turns in every round;
ratios are of processor seconds. "Seam" is the largest difference to the whole network's volume, in
HU of a window of 1,400. Peaks are of the process's memory above what it held before, each measured
in a process of its own (on Linux). Prints a table and a line of JSON; exits 1 where a target is
missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jobs.benchmarks.ratios import (
    Row,
    Seconds,
    facts_of_run,
    forget_peak,
    median_row,
    memory_bytes,
    paired_ratio,
    report,
)
from raysynth.config import AutoencoderKLConfig
from raysynth.models.autoencoder import KLAutoencoder

CONFIG = AutoencoderKLConfig(
    channels=(16, 32, 64), num_res_blocks=1, norm_num_groups=16, latent_channels=4
)
WINDOW_HU = 1400.0
SLABS, WHOLE, TILES = "raysynth, slabs", "whole network", "MONAI, tiles"
FASTER_THAN_TILES, MOST_SEAM_HU, MOST_MEMORY = 1.5, 1.0, 0.5


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    run = partial(_decode, cells=options.cells)
    volumes = {way: run(way) for way in (SLABS, WHOLE, TILES)}
    spent: dict[str, list[Seconds]] = {way: [] for way in volumes}
    for _ in range(options.rounds):
        for way, seconds in spent.items():
            started = Seconds.now()
            run(way)
            seconds.append(started.elapsed())
    rows = [median_row(SLABS, spent[SLABS])]
    for way, target in ((WHOLE, None), (TILES, FASTER_THAN_TILES)):
        row, ratio = median_row(way, spent[way]), paired_ratio(spent[way], spent[SLABS])
        rows.append(Row(way, row.cpu_ms, row.wall_ms, *ratio, at_least=target))
    seams = {
        way: float((volumes[way] - volumes[WHOLE]).abs().max()) * WINDOW_HU / 2
        for way in (SLABS, TILES)
    }
    peaks = {way: _peak_mb(way, options.cells, options.threads) for way in volumes}
    share = peaks[SLABS] / peaks[WHOLE]
    facts = facts_of_run("torch", "monai") | {
        "threads": options.threads,
        "seam_hu": {way: round(seam, 5) for way, seam in seams.items()},
        "peak_mb": {way: round(peak) for way, peak in peaks.items()},
        "memory_of_whole": round(share, 3),
        "missed_besides": [
            name
            for name, value, most in (
                ("seam", seams[SLABS], MOST_SEAM_HU),
                ("memory", share, MOST_MEMORY),
            )
            if value > most
        ],
    }
    size = options.cells * CONFIG.downsampling
    missed = report(facts, {f"a volume of {size}^3": rows}, "times ours")
    return max(missed, int(bool(facts["missed_besides"])))


def _autoencoder() -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(CONFIG, spatial_dims=3).eval()


@torch.inference_mode()
def _decode(way: str, cells: int) -> Tensor:
    import raysynth.models.monai  # noqa: F401, I001  # imports MONAI without what nobody needs
    from monai.inferers.inferer import SlidingWindowInferer

    autoencoder = _autoencoder()
    latents = torch.randn(1, 4, *(cells,) * 3, generator=torch.Generator().manual_seed(0))
    match way:
        case "raysynth, slabs":
            return autoencoder.decode(latents)
        case "whole network":
            return autoencoder.network.decode(latents)
        case _:
            # Half as wide tiles and a quarter of overlap, blended: MONAI's usual ones.
            inferer = SlidingWindowInferer(cells // 2, overlap=0.25, mode="gaussian")
            drawn: Tensor = inferer(latents, autoencoder.network.decode)  # type: ignore[assignment]
            return drawn


def _peak_mb(way: str, cells: int, threads: int) -> float:
    """Of one decoding, in a fresh process: what it takes above a tiny one."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(send, way, cells, threads))
    process.start()
    peak = float(receive.recv())
    process.join()
    return peak


def _measure_peak(send: Any, way: str, cells: int, threads: int) -> None:
    torch.set_num_threads(threads)
    _decode(way, 8)
    before = memory_bytes("VmRSS")
    forget_peak()
    _decode(way, cells)
    send.send((memory_bytes("VmHWM") - before) / 2**20)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
