"""Where cases come from: names and pseudonyms first, pixels one case at a time.

The identity of a patient, series or file leaves this module only as a keyed hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from raysynth.case import Case, Split
from raysynth.config import ExperimentConfig, LidcSource, PhantomSource
from raysynth.errors import InputError
from raysynth.formats.dicom import Refused, find_series, read_series
from raysynth.formats.lidc import series_nodules
from raysynth.phantom.patient import phantom_case
from raysynth.seeding import fingerprint, load_key, pseudonym
from raysynth.store.splits import assign_splits


@dataclass(frozen=True)
class CaseRef:
    """A case that can be read: what names it in the store, and (never shown) where it lies.

    Attributes:
        case_id: name of the case in the store.
        patient_key: pseudonym of the patient.
        split: follows from the patient.
        source: the recipe's section.
        number: of a phantom patient.
        series_uid: of a DICOM series.
        files: of a DICOM series.
    """

    case_id: str
    patient_key: str
    split: Split
    source: PhantomSource | LidcSource = field(repr=False)
    number: int = field(default=0, repr=False)
    series_uid: str = field(default="", repr=False)
    files: tuple[Path, ...] = field(default=(), repr=False)


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
        case LidcSource() as source:
            return _list_lidc(source, config)


def read_case(ref: CaseRef) -> Case:
    """Volume and nodules of one case, as its source has them.

    Raises:
        UnreadableCase: the case breaks a rule.
    """
    match ref.source:
        case PhantomSource() as source:
            case = phantom_case(source, ref.number, ref.split)
            return replace(case, case_id=ref.case_id, patient_key=ref.patient_key)
        case LidcSource() as source:
            volume, tags = read_series(ref.files)
            nodules = series_nodules(ref.series_uid, volume, source.consensus_level)
            kept: dict[str, str | float] = {"format": "dicom", **tags}
            return Case(ref.case_id, ref.patient_key, ref.split, volume, nodules, source=kept)


def _list_phantoms(source: PhantomSource, config: ExperimentConfig) -> list[CaseRef]:
    # An invented patient needs no pseudonym, and a name that depends on no key makes runs on
    # phantoms the same everywhere. A larger num_patients keeps the names of the first ones.
    family = fingerprint(source.model_dump(mode="json", exclude={"num_patients"}))
    names = [f"phantom-{family[:6]}-{number:04d}" for number in range(source.num_patients)]
    splits = assign_splits(names, config.data.split)
    return [
        CaseRef(name, name, splits[name], source, number=number)
        for number, name in enumerate(names)
    ]


def _list_lidc(source: LidcSource, config: ExperimentConfig) -> tuple[list[CaseRef], list[Refusal]]:
    if not source.path.is_dir():
        raise InputError(
            f"data.source.path {source.path} is no folder: give the one that holds the patients"
        )
    series, refused = find_series(source.path)
    if not series:
        found = f"only unusable files ({refused[0].reason})" if refused else "no CT series"
        raise InputError(
            f"data.source.path {source.path} holds {found}: give a folder with CT series"
        )
    key = load_key(config.key_path)
    splits = assign_splits([one.patient_id for one in series], config.data.split)
    refs = [
        CaseRef(
            case_id=pseudonym(key, "series", one.uid),
            patient_key=pseudonym(key, "patient", one.patient_id),
            split=splits[one.patient_id],
            source=source,
            series_uid=one.uid,
            files=one.files,
        )
        for one in series
    ]
    return sorted(refs, key=lambda ref: ref.case_id), _by_folder(refused, source.path, key)


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
