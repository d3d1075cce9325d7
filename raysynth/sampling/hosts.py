"""Decides which holes of which real slices an inpainting model fills (system E)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Label
from raysynth.condition import Condition
from raysynth.config import ExperimentConfig, HoleFilling
from raysynth.config.model import Organ, Window
from raysynth.errors import InputError
from raysynth.layout.holes import ORGANS, box_hole, free_hole, labels_of, organ_hole
from raysynth.layout.morphology import Mask, dilate
from raysynth.sampling.planner import PlannedSample
from raysynth.seeding import seed_of
from raysynth.store.reader import SampleSet
from storage_schema.v1 import SPLITS

MIN_ORGAN_PX = 4
"""An organ of fewer pixels is not worth a hole."""

RIM_PX = 2
"""How far a hole reaches beyond new tissue, so that its border is drawn, too."""

MAX_TRIES = 100
"""Places tried for a donor's tissue in one host."""

MAX_MEAN_PIXELS = 2**26
"""So many are enough for the mean of a tissue: 1,000 slices of 256 x 256."""

MAX_DRAWS = 200
"""Pairs of hosts and donors tried for one sample."""


def plan_inpainting(config: ExperimentConfig, samples: SampleSet) -> list[PlannedSample]:
    """Plans `sampling.num_samples` holes; the same settings and set give the same holes.

    So recipes beside each other fill the same ones, each with its own noise.

    Hosts are slices of test patients, which the model has not seen; donors of new tissue are slices
    of training patients.

    Raises:
        InputError: no test slice shows any of the organs, or nothing fits anywhere.
    """
    model, sampling = config.model, config.sampling
    assert isinstance(model, HoleFilling)
    labels = labels_of(model.organs)
    hosts = dict(_showing(samples, "test", labels))
    rows_of = _rows_by_organ(hosts, model.organs)
    donors: list[NDArray[np.uint8]] = []
    if sampling.hole == "new_tissue":
        donors = [layout for _, layout in _showing(samples, "train", labels)]
        hosts, rows_of = dict(_showing(samples, "test", labels_of(ORGANS))), []
    if not (donors and hosts if sampling.hole == "new_tissue" else rows_of):
        raise InputError(
            f"sample set {config.samples.name} has {len(hosts)} test slices that could take a hole "
            f"and {len(donors)} training slices to lend tissue ({', '.join(model.organs)}): ingest "
            "cases with these organs, or change model.organs"
        )
    rows = np.array(list(hosts))
    plan = []
    for number in range(sampling.num_samples):
        sample_id = f"{config.name}-{number:08d}"
        rng = np.random.default_rng(seed_of("plan", config.seed, number))
        for _ in range(MAX_DRAWS):
            # Organs take turns, else the large ones would have nearly all holes.
            organ, shown = rows_of[number % len(rows_of)] if rows_of else ("", rows)
            row = int(rng.choice(shown))
            made = _hole(hosts[row], organ, config, donors, rng)
            if made is not None:
                break
        else:
            raise InputError(
                f"sampling.hole {sampling.hole}: nothing fitted in {MAX_DRAWS} draws; take another "
                "kind of hole, or larger images"
            )
        hole, layout = made
        hu = samples.read("hu", row, row + 1)[0]
        condition = Condition(layout, known_hu=hu, known_mask=~hole)
        seed = seed_of("sample", config.seed, sample_id)
        plan.append(PlannedSample(sample_id, seed, condition, row))
    return plan


def place_tissue(
    host: NDArray[np.uint8], donor: NDArray[np.uint8], tissue: Label, rng: np.random.Generator
) -> NDArray[np.uint8] | None:
    """The host's layout with the donor's tissue at a random place in the organ it lay in.

    Size and shape stay; the tissue lies wholly inside the organ.

    Args:
        host: layout (y, x) that takes it.
        donor: layout of another patient that shows it.
        tissue: its label.
        rng: draws the place.

    Returns:
        None where the host lacks the organ, or `MAX_TRIES` places did not fit.
    """
    mask = donor == tissue
    around = donor[dilate(mask[None], (1, 2))[0] & ~mask]
    organs = around[np.isin(around, labels_of(ORGANS))]
    if not len(organs):
        return None
    room = host == np.bincount(organs).argmax()
    pixels = np.argwhere(mask)
    pixels -= np.round(pixels.mean(axis=0)).astype(int)
    centres = np.argwhere(room)
    for centre in rng.permutation(centres)[:MAX_TRIES]:
        y, x = (pixels + centre).T
        inside = (y >= 0) & (x >= 0) & (y < host.shape[0]) & (x < host.shape[1])
        if inside.all() and room[y, x].all():
            layout = host.copy()
            layout[y, x] = tissue
            return layout
    return None


def tissue_means(samples: SampleSet, window_hu: Window) -> NDArray[np.int16]:
    """Mean HU of every label in slices of training patients, as a table (256,); 0 of absent ones.

    What may be known of a hole without any model: filled with it, figures say what copying earns.

    Args:
        samples: whose slices or volumes; of as many as have `MAX_MEAN_PIXELS`.
        window_hu: what a model sees. Values are clipped to it.
    """
    sums, counts = np.zeros(256), np.zeros(256)
    read = 0
    rng = np.random.default_rng(seed_of("tissue means", samples.num_shards))
    for shard in rng.permutation(samples.num_shards):
        start, stop = samples.shard_rows(int(shard))
        learned = samples.index["split"][start:stop] == SPLITS.index("train")
        if read >= MAX_MEAN_PIXELS:
            break
        if not learned.any():
            continue
        layouts, images = (samples.read(name, start, stop)[learned] for name in ("layout", "hu"))
        for labels, hu in zip(layouts, images, strict=True):
            sums += np.bincount(labels.ravel(), np.clip(hu, *window_hu).ravel(), 256)
            counts += np.bincount(labels.ravel(), minlength=256)
            read += labels.size
    return np.rint(sums / np.maximum(counts, 1)).astype(np.int16)


def _rows_by_organ(
    hosts: dict[int, NDArray[np.uint8]], organs: Sequence[Organ]
) -> list[tuple[Organ, NDArray[np.int64]]]:
    """Which slices show each organ; nothing of organs that none shows."""
    found = []
    for organ in organs:
        rows = [
            row
            for row, layout in hosts.items()
            if np.isin(layout, ORGANS[organ]).sum() >= MIN_ORGAN_PX
        ]
        if rows:
            found.append((organ, np.array(rows)))
    return found


def _hole(
    layout: NDArray[np.uint8],
    organ: str,
    config: ExperimentConfig,
    donors: list[NDArray[np.uint8]],
    rng: np.random.Generator,
) -> tuple[Mask, NDArray[np.uint8]] | None:
    """The hole, and the layout that is asked for in it; None where nothing fits.

    An organ is all of it: both kidneys, both lungs.
    """
    match config.sampling.hole:
        case "organ":
            return organ_hole(layout, ORGANS[organ]), layout
        case "box":
            whole = organ_hole(layout, ORGANS[organ])
            return box_hole(whole, config.sampling.hole_margin_px), layout
        case "free":
            return free_hole(layout.shape, rng), layout
        case "new_tissue":
            donor = donors[rng.integers(len(donors))]
            assert isinstance(config.model, HoleFilling)
            tissue = Label(rng.choice(np.intersect1d(donor, labels_of(config.model.organs))))
            placed = place_tissue(layout, donor, tissue, rng)
            if placed is None:
                return None
            new = (placed != layout)[None]
            for _ in range(RIM_PX):
                new = dilate(new, (1, 2))
            return new[0], placed


def _showing(
    samples: SampleSet, split: str, labels: list[Label]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Rows and layouts of a split's slices that show any of the labels."""
    for shard in range(samples.num_shards):
        start, stop = samples.shard_rows(shard)
        of_split = samples.index["split"][start:stop] == SPLITS.index(split)
        if of_split.any():
            layouts = samples.read("layout", start, stop)
            shown = np.isin(layouts, labels).sum(axis=(1, 2)) >= MIN_ORGAN_PX
            for offset in np.flatnonzero(of_split & shown):
                yield start + int(offset), layouts[offset]
