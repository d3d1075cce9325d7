"""A phantom is a function of (seed, number), its layout is exact, and it looks like a chest."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import pytest
from scipy import ndimage

from raysynth.case import LUNG_LABELS, Case, Label
from raysynth.config.data import PhantomSource
from raysynth.errors import InputError
from raysynth.phantom.anatomy import build_anatomy
from raysynth.phantom.patient import phantom_case, phantom_torso

COARSE = PhantomSource(spacing_mm=(4.0, 2.5, 2.5), nodules_per_patient=(2, 3))
NUMBERS = (0, 1, 2, 3)


@lru_cache
def patient(number: int) -> Case:
    return phantom_case(COARSE, number)


def digest(case: Case) -> str:
    assert case.layout is not None
    return hashlib.sha256(case.volume.hu.tobytes() + case.layout.tobytes()).hexdigest()


def test_a_patient_follows_from_seed_and_number_alone() -> None:
    again = phantom_case(COARSE, 1)
    assert digest(again) == digest(patient(1))
    assert again.patient_key == "phantom-0-1"
    held_out = phantom_case(COARSE, 1, "test")
    assert held_out.split == "test"
    # The same body, but other nodules: no real one is lent to two splits.
    assert held_out.patient_key == again.patient_key
    assert digest(held_out) != digest(again)
    assert len({digest(patient(number)) for number in NUMBERS}) == len(NUMBERS)
    other_seed = COARSE.model_copy(update={"seed": 1})
    assert digest(phantom_case(other_seed, 1)) != digest(patient(1))


@pytest.mark.parametrize("number", NUMBERS)
def test_tissues_have_their_hounsfield_units(number: int) -> None:
    case = patient(number)
    hu, layout = case.volume.hu, case.layout
    assert layout is not None
    assert layout.shape == hu.shape
    lungs = np.isin(layout, LUNG_LABELS)
    assert -900 < hu[lungs].mean() < -700
    assert hu[layout == Label.BACKGROUND].mean() < -970
    assert np.median(hu[layout == Label.TRACHEA]) < -850  # voxels at its wall are mixed
    body = hu[layout == Label.BODY]
    assert -80 < np.median(body) < 100
    assert (body > 300).mean() > 0.01  # bone
    assert ((body > -130) & (body < -70)).mean() > 0.05  # fat
    assert 10 < hu[lungs].std() < 200


@pytest.mark.parametrize("number", NUMBERS)
def test_lungs_lie_where_lungs_lie(number: int) -> None:
    case = patient(number)
    assert case.layout is not None
    litres = np.prod(case.volume.spacing_mm) / 1e6
    left, right = (np.argwhere(case.layout == label) for label in LUNG_LABELS)
    assert 2 < (len(left) + len(right)) * litres < 7
    assert left[:, 2].mean() > right[:, 2].mean()  # x grows towards the patient's left
    assert len(right) > 0.95 * len(left)
    skin = case.layout != Label.BACKGROUND
    assert not skin[:, 0].any(), "the body touches the volume's front"
    assert not skin[:, -1].any(), "the body touches the volume's back"
    assert not skin[:, :, 0].any(), "the body touches the volume's right side"
    assert not skin[:, :, -1].any(), "the body touches the volume's left side"


@pytest.mark.parametrize("number", NUMBERS)
def test_nodules_lie_apart_and_inside_lung(number: int) -> None:
    case = patient(number)
    assert case.layout is not None
    assert 2 <= len(case.nodules) <= 3
    marked = np.zeros(case.volume.shape, bool)
    for nodule in case.nodules:
        box = tuple(slice(*ends) for ends in nodule.box_zyx)
        assert not marked[box][nodule.mask].any()
        marked[box] |= nodule.mask
    np.testing.assert_array_equal(marked, case.layout == Label.NODULE)


def test_nodules_replace_nothing_but_lung() -> None:
    case = patient(1)
    before = build_anatomy(phantom_torso(COARSE, 1), organ_labels=False).layout
    assert case.layout is not None
    changed = before != case.layout
    np.testing.assert_array_equal(changed, case.layout == Label.NODULE)
    assert np.isin(before[changed], LUNG_LABELS).all()


def test_finer_voxels_show_the_same_patient() -> None:
    """The shapes follow from the patient, not from the voxels (only grain and noise do)."""
    finer = COARSE.model_copy(update={"spacing_mm": (3.0, 2.0, 2.0)})
    fine = phantom_case(finer, 1)
    volumes = []
    for case in (patient(1), fine):
        lungs = np.isin(case.layout, LUNG_LABELS)
        volumes.append(lungs.sum() * np.prod(case.volume.spacing_mm) / 1e6)
    assert volumes[0] == pytest.approx(volumes[1], rel=0.02)


def test_an_abdomen_without_lung_vessels_is_one_too() -> None:
    source = PhantomSource(anatomy="abdomen", spacing_mm=(8.0, 5.0, 5.0))
    assert (phantom_case(source, 152).layout == Label.LIVER).any()


def test_an_abdomen_has_its_organs() -> None:
    source = PhantomSource(anatomy="abdomen", spacing_mm=(4.0, 2.5, 2.5))
    case = phantom_case(source, 0)
    hu, layout = case.volume.hu, case.layout
    assert layout is not None
    millilitres = np.prod(case.volume.spacing_mm) / 1e3
    for label, low, high in (
        (Label.LIVER, 600, 2200),
        (Label.LEFT_KIDNEY, 80, 260),
        (Label.RIGHT_KIDNEY, 80, 260),
        (Label.SPLEEN, 60, 450),
    ):
        organ = layout == label
        assert low < organ.sum() * millilitres < high, label
        assert 20 < np.median(hu[organ]) < 250, label
    tumour, liver = layout == Label.TUMOUR, layout == Label.LIVER
    assert 1 < tumour.sum() * millilitres < 120
    assert np.median(hu[tumour]) < np.median(hu[liver]) - 15
    around = ndimage.binary_dilation(tumour) & ~tumour
    assert (layout[around] == Label.LIVER).all()
    x_of = {label: np.argwhere(layout == label)[:, 2].mean() for label in np.unique(layout)}
    assert x_of[Label.LIVER] < x_of[Label.SPLEEN]
    assert x_of[Label.RIGHT_KIDNEY] < x_of[Label.LEFT_KIDNEY]
    assert case.nodules == ()


def test_no_nodule_is_that_large() -> None:
    source = COARSE.model_copy(update={"min_diameter_mm": 500.0})
    with pytest.raises(InputError, match=r"no LIDC nodule measures 500 mm.*min_diameter_mm"):
        phantom_case(source, 0)
