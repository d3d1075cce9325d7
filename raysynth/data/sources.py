"""Where cases come from: names and pseudonyms first, pixels one case at a time.

The identity of a patient, series or file leaves this module only as a keyed hash.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from raysynth.case import Case, Nodule, Split
from raysynth.config import (
    DicomSource,
    ExperimentConfig,
    ImageSource,
    LidcSlicesSource,
    LidcSource,
    Luna16Source,
    PhantomSource,
)
from raysynth.config.data import Source
from raysynth.errors import InputError
from raysynth.formats.dicom import Refused, find_series, read_series
from raysynth.formats.image import IMAGE_SUFFIXES, labels_of, read_image, volume_of
from raysynth.formats.lidc import patients_of_series, series_nodules
from raysynth.formats.lidc_slices import find_crops, patient_of, read_crop
from raysynth.formats.luna16 import Finding, anatomy_of, nodule_of, read_annotations
from raysynth.layout.crop import crop_anatomy
from raysynth.layout.foreign import nodules_of, translate
from raysynth.phantom.patient import phantom_case
from raysynth.seeding import fingerprint, load_key, pseudonym
from raysynth.store.splits import assign_splits, listed_splits

ITEMS_PER_TASK = 500
"""A second's work or less: headers of files are read in about 2 ms each."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_Named = tuple[str, Path]
"""An image file after its name: its place in the folder without suffix."""


@dataclass(frozen=True)
class CaseRef:
    """A case that can be read: what names it in the store, and (never shown) where it lies.

    Attributes:
        case_id: name of the case in the store.
        patient_key: pseudonym of the patient.
        split: follows from the patient.
        source: the recipe's section.
        number: of a phantom patient.
        series_uid: of a DICOM series, or what else names the case in its folder.
        files: of a DICOM series; of others the volume and its label maps, if there are any.
        findings: of a LUNA16 volume.
    """

    case_id: str
    patient_key: str
    split: Split
    source: Source = field(repr=False)
    number: int = field(default=0, repr=False)
    series_uid: str = field(default="", repr=False)
    files: tuple[Path, ...] = field(default=(), repr=False)
    findings: tuple[Finding, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Refusal:
    """What was refused: a case, or the files of a folder that broke the same rule.

    Attributes:
        source: keyed hash of the series or folder.
        rule: stable name of the rule.
        reason: one line for people, without identifiers.
    """

    source: str
    rule: str
    reason: str


def list_cases(config: ExperimentConfig) -> tuple[list[CaseRef], list[Refusal]]:
    """All cases of the recipe's source, sorted by id, and files that should have been in one.

    No pixel is read.

    Raises:
        InputError: the folder does not exist or holds no series.
    """
    match config.data.source:
        case PhantomSource() as source:
            return _list_phantoms(source, config), []
        case LidcSource() | DicomSource() as source:
            return _list_dicom(source, config)
        case LidcSlicesSource() as source:
            return _list_crops(source, config), []
        case Luna16Source() as source:
            return _list_luna16(source, config)
        case ImageSource() as source:
            return _list_images(source, config)


def read_case(ref: CaseRef) -> Case:
    """Volume, nodules and outlines of one case, as its source has them.

    Raises:
        UnreadableCase: the case breaks a rule.
    """
    case = _read_case(ref)
    return replace(case, source={"kind": ref.source.kind, **case.source})


def _read_case(ref: CaseRef) -> Case:
    case = partial(Case, ref.case_id, ref.patient_key, ref.split)
    match ref.source:
        case PhantomSource() as source:
            made = phantom_case(source, ref.number, ref.split)
            return replace(made, case_id=ref.case_id, patient_key=ref.patient_key)
        case LidcSource() as source:
            volume, tags = read_series(ref.files)
            level = source.consensus_level if source.nodule_mask == "consensus" else None
            nodules = series_nodules(ref.series_uid, volume, level)
            return case(volume, nodules, source={"format": "dicom", **tags})
        case DicomSource():
            volume, tags = read_series(ref.files)
            return case(volume, source={"format": "dicom", **tags})
        case LidcSlicesSource() as source:
            volume, nodule, lung = read_crop(ref.files, source.consensus_level)
            return case(
                volume,
                (nodule,),
                outlines=crop_anatomy(volume, nodule, lung),
                intensity=source.intensity,
                source={"format": "png"},
            )
        case Luna16Source() as source:
            volume = volume_of(read_image(ref.files[0]), "hu")
            if source.nodule_mask == "lidc":
                nodules = series_nodules(ref.series_uid, volume)
            else:
                rule = source.nodule_mask
                nodules = tuple(nodule_of(one, volume, rule) for one in ref.findings)
            outlines = None
            if len(ref.files) > 1:
                outlines = anatomy_of(labels_of(read_image(ref.files[1]), volume), volume)
            return case(volume, nodules, outlines=outlines, source={"format": "metaimage"})
        case ImageSource() as source:
            return _image_case(ref, source)


def _image_case(ref: CaseRef, source: ImageSource) -> Case:
    volume = volume_of(read_image(ref.files[0]), source.intensity)
    outlines: NDArray[np.uint8] | None = None
    nodules: tuple[Nodule, ...] = ()
    if len(ref.files) > 1:
        labels = labels_of(read_image(ref.files[1]), volume)
        outlines = translate(labels, source.class_map, volume)
        nodules = nodules_of(outlines, volume)
    return Case(
        ref.case_id,
        ref.patient_key,
        ref.split,
        volume,
        nodules,
        outlines=outlines,
        intensity=source.intensity,
        source={"format": "image"},
    )


def _list_phantoms(source: PhantomSource, config: ExperimentConfig) -> list[CaseRef]:
    # An invented patient needs no pseudonym, and a name that depends on no key makes runs on
    # phantoms the same everywhere. A larger num_patients keeps the names of the first ones.
    no_matter = {"num_patients"} if source.intensity != "hu" else {"num_patients", "intensity"}
    family = fingerprint(source.model_dump(mode="json", exclude=no_matter))
    names = [f"phantom-{family[:6]}-{number:04d}" for number in range(source.num_patients)]
    splits = _splits(names, config)
    return [
        CaseRef(name, name, splits[name], source, number=number)
        for number, name in enumerate(names)
    ]


def _list_dicom(
    source: LidcSource | DicomSource, config: ExperimentConfig
) -> tuple[list[CaseRef], list[Refusal]]:
    series, refused = find_series(_folder(source.path, "path"), _on_cluster)
    if not series:
        there = f"only unusable files ({refused[0].reason})" if refused else "no CT series"
        raise InputError(
            f"data.source.path {source.path} holds {there}: give a folder with CT series"
        )
    found = [_Found(one.uid, one.patient_id, one.files) for one in series]
    key = load_key(config.key_path)
    return _refs(source, config, key, found), _by_folder(refused, source.path, key)


def _list_crops(source: LidcSlicesSource, config: ExperimentConfig) -> list[CaseRef]:
    folder = _folder(source.path, "path")
    crops = find_crops(folder)
    if not crops:
        raise InputError(
            f"data.source.path {source.path} holds no LIDC-IDRI-*/nodule-*/images/slice-*.png: "
            "give the unpacked folder"
        )
    found = [
        _Found(files[0].relative_to(folder).as_posix(), patient_of(files[0]), files)
        for files in crops
    ]
    return _refs(source, config, load_key(config.key_path), found)


def _list_luna16(
    source: Luna16Source, config: ExperimentConfig
) -> tuple[list[CaseRef], list[Refusal]]:
    """The challenge's volumes. Scans of one LIDC patient stay together."""
    folder = _folder(source.path, "path")
    findings = read_annotations(source.annotations or folder / "annotations.csv")
    lungs = _images(_folder(source.lungs, "lungs")) if source.lungs else []
    patients = patients_of_series()
    # The segmentations have the names of the volumes, wherever they lie.
    segmentations = [(path.stem, path) for _, path in lungs]
    volumes = [
        (path.stem, path) for _, path in _without(_images(folder), lungs) if path.suffix == ".mhd"
    ]
    if not volumes:
        raise InputError(f"data.source.path {source.path} holds no .mhd volume")
    key = load_key(config.key_path)
    pairs, refused = _pairs(volumes, segmentations, key)
    found = [
        _Found(uid, patients.get(uid, uid), files, findings.get(uid, ()))
        for uid, files in pairs.items()
    ]
    return _refs(source, config, key, found), refused


def _list_images(
    source: ImageSource, config: ExperimentConfig
) -> tuple[list[CaseRef], list[Refusal]]:
    folder = _folder(source.path, "path")
    labels = _images(_folder(source.labels, "labels")) if source.labels else []
    volumes = _without(_images(folder), labels)
    if not volumes:
        raise InputError(
            f"data.source.path {source.path} holds no volume ({', '.join(IMAGE_SUFFIXES)})"
        )
    lost = {name for name, _ in labels} - {name for name, _ in volumes}
    if lost:
        raise InputError(
            f"data.source.labels {source.labels}: {len(lost)} label maps have no volume of their "
            "name: name each as its volume"
        )
    key = load_key(config.key_path)
    pairs, refused = _pairs(volumes, labels, key)
    found = [_Found(name, name, files) for name, files in pairs.items()]
    return _refs(source, config, key, found), refused


def _pairs(
    volumes: Sequence[_Named], labels: Sequence[_Named], key: bytes
) -> tuple[dict[str, tuple[Path, ...]], list[Refusal]]:
    """Each volume with the label map of its name, if there is one; refused are names of several."""
    files: dict[str, tuple[list[Path], list[Path]]] = {}
    for place, named in enumerate((volumes, labels)):
        for name, path in named:
            files.setdefault(name, ([], []))[place].append(path)
    pairs, refused = {}, []
    for name, (of_volume, of_labels) in sorted(files.items()):
        if len(of_volume) == 1 and len(of_labels) <= 1:
            pairs[name] = (*of_volume, *of_labels)
        elif of_volume:
            refused.append(
                Refusal(
                    pseudonym(key, "series", name),
                    "same-name",
                    f"{len(of_volume)} volumes and {len(of_labels)} label maps have one name: "
                    "which belong together? Keep one of each",
                )
            )
    return pairs, refused


def _on_cluster(
    work: Callable[[Sequence[_Item]], list[_Result]], items: Sequence[_Item]
) -> list[_Result]:
    """Does work on a list in parts, on all cores of the Ray cluster; a short one is done here."""
    parts = [items[at : at + ITEMS_PER_TASK] for at in range(0, len(items), ITEMS_PER_TASK)]
    if len(parts) <= 1:
        return work(items)
    import ray

    if not ray.is_initialized():
        return work(items)
    task = ray.remote(work)
    return [result for part in ray.get([task.remote(part) for part in parts]) for result in part]


def _splits(patient_ids: list[str], config: ExperimentConfig) -> dict[str, Split]:
    if config.data.split_list is not None:
        return listed_splits(patient_ids, config.data.split_list)
    return assign_splits(patient_ids, config.data.split)


@dataclass(frozen=True)
class _Found:
    """A case before it gets its pseudonyms."""

    uid: str
    patient_id: str
    files: tuple[Path, ...]
    findings: tuple[Finding, ...] = ()


def _refs(
    source: LidcSource | LidcSlicesSource | DicomSource | Luna16Source | ImageSource,
    config: ExperimentConfig,
    key: bytes,
    found: Sequence[_Found],
) -> list[CaseRef]:
    splits = _splits([one.patient_id for one in found], config)
    refs = [
        CaseRef(
            case_id=pseudonym(key, "series", one.uid),
            patient_key=pseudonym(key, "patient", one.patient_id),
            split=splits[one.patient_id],
            source=source,
            series_uid=one.uid,
            files=one.files,
            findings=one.findings,
        )
        for one in found
    ]
    return sorted(refs, key=lambda ref: ref.case_id)


def _folder(path: Path, name: str) -> Path:
    if not path.is_dir():
        raise InputError(
            f"data.source.{name} {path} is no folder: give the one that holds the patients"
        )
    return path


def _images(folder: Path) -> list[_Named]:
    """Image files below a folder; links are passed over."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            suffix = next((end for end in IMAGE_SUFFIXES if name.lower().endswith(end)), None)
            path = Path(parent, name)
            if suffix is not None and path.is_file() and not path.is_symlink():
                place = (path.parent / name[: -len(suffix)]).relative_to(folder)
                found.append((place.as_posix(), path))
    return sorted(found)


def _without(images: Sequence[_Named], others: Sequence[_Named]) -> list[_Named]:
    paths = {path for _, path in others}
    return [image for image in images if image[1] not in paths]


def _by_folder(refused: Sequence[Refused], root: Path, key: bytes) -> list[Refusal]:
    """One refusal for a folder and rule: a hundred bad slices are one bad series."""
    reasons: dict[tuple[str, str], str] = {}
    count: Counter[tuple[str, str]] = Counter()
    for one in refused:
        folder = one.path.parent.relative_to(root) if one.path != root else Path()
        place = (pseudonym(key, "folder", folder.as_posix()), one.rule)
        reasons.setdefault(place, one.reason)
        count[place] += 1
    return [
        Refusal(folder, rule, f"{count[folder, rule]} files: {reason}")
        for (folder, rule), reason in reasons.items()
    ]
