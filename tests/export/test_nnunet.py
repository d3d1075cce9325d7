"""nnU-Net's raw folder: its documented rules, checked on the files themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from raysynth.case import Label
from raysynth.errors import InputError
from raysynth.export.nnunet import nnunet_files
from raysynth.export.verify import verify
from raysynth.export.writing import ExportedSample, RunFacts
from storage_schema.v1 import LABELS

NAME = "Dataset501_Tiny"
COUNT = 3
ORGANS = [Label.BACKGROUND, Label.RIGHT_LUNG, Label.LIVER, Label.RIGHT_KIDNEY]
LUNGS = [Label.BACKGROUND, Label.LEFT_LUNG, Label.NODULE]


def write_set(
    folder: Path, labels: list[Label], shape: tuple[int, ...] = (4, 6, 5), intensity: str = "hu"
) -> tuple[list[NDArray[np.uint8]], dict[str, Any]]:
    """A small data set; its layouts as drawn, and its dataset.json."""
    random = np.random.default_rng(0)
    layouts = []
    folder.mkdir()
    facts = RunFacts("tiny", COUNT, shape, (2.5, 0.75), intensity, {"recipe": "tiny"})
    with nnunet_files(folder, facts) as write:
        for row in range(COUNT):
            hu = random.integers(-1000, 400, shape).astype(np.int16)
            layouts.append(random.choice(np.array(labels, np.uint8), shape))
            passport = {"run": "tiny", "row": row, "bundle": "b" * 64}
            name = f"tiny-{row:08d}"
            write(ExportedSample(name, row, hu, layouts[-1], False, passport))
    return layouts, json.loads((folder / "dataset.json").read_text())


@pytest.mark.parametrize("shape", [(4, 6, 5), (6, 5)], ids=["volumes", "slices"])
@pytest.mark.parametrize("labels", [ORGANS, LUNGS], ids=["organs", "lungs"])
def test_the_rules_of_a_raw_data_set_hold(
    shape: tuple[int, ...], labels: list[Label], tmp_path: Path
) -> None:
    folder = tmp_path / NAME
    _, told = write_set(folder, labels, shape)
    ending = told["file_ending"]
    masks = sorted((folder / "labelsTr").iterdir())
    assert len(masks) == told["numTraining"] == COUNT
    # A case has an image for each channel, and no image is without a case.
    channels = {int(number) for number in told["channel_names"]}
    assert channels == set(range(len(channels)))
    cases = [path.name.removesuffix(ending) for path in masks]
    expected = {f"{case}_{channel:04d}{ending}" for case in cases for channel in channels}
    assert {path.name for path in (folder / "imagesTr").iterdir()} == expected
    # Labels are consecutive from the background on, and no voxel has another.
    assert told["labels"]["background"] == 0
    assert sorted(told["labels"].values()) == list(range(len(told["labels"])))
    seen: set[int] = set()
    for case, mask in zip(cases, masks, strict=True):
        image = sitk.ReadImage(folder / "imagesTr" / f"{case}_0000{ending}")
        drawn = sitk.ReadImage(mask)
        assert image.GetDimension() == drawn.GetDimension() == 3
        for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, part)() == getattr(drawn, part)()
        assert image.GetSpacing() == (0.75, 0.75, 2.5)
        values = sitk.GetArrayFromImage(drawn)
        assert np.issubdtype(values.dtype, np.integer)
        seen |= set(values.ravel().tolist())
    assert seen <= set(told["labels"].values())
    assert max(seen) == max(told["labels"].values())


def test_labels_lead_back_to_those_of_the_store(tmp_path: Path) -> None:
    layouts, told = write_set(tmp_path / NAME, ORGANS)
    assert told["labels"]["liver"] == 6
    assert told["stored_labels"]["liver"] == Label.LIVER
    assert told["labels"].keys() == told["stored_labels"].keys()
    assert told["stored_labels"].items() <= {name: value for value, name in LABELS.items()}.items()
    back = np.zeros(256, np.uint8)
    for name, number in told["labels"].items():
        back[number] = told["stored_labels"][name]
    for path, layout in zip(sorted((tmp_path / NAME / "labelsTr").iterdir()), layouts, strict=True):
        np.testing.assert_array_equal(back[sitk.GetArrayFromImage(sitk.ReadImage(path))], layout)


def test_every_file_is_marked_and_verified(tmp_path: Path) -> None:
    _, told = write_set(tmp_path / NAME, LUNGS)
    assert told["synthetic"] is True
    assert "Synthetic" in told["description"]
    assert told["name"] == "Tiny"
    found = verify(tmp_path)
    assert len(found) == 2 * COUNT + 1
    assert {one.verdict for one in found} == {"valid"}
    for path in (tmp_path / NAME).rglob("*.nii.gz"):
        told_by = sitk.ReadImage(path).GetMetaData("descrip")
        assert re.match("synthetic .*no patient", told_by)


def test_the_same_set_has_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for turn in ("first", "second"):
        folder = tmp_path / turn / NAME
        folder.parent.mkdir()
        write_set(folder, ORGANS)
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        written.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert written[0] == written[1]


def test_only_hounsfield_units_are_called_ct(tmp_path: Path) -> None:
    assert write_set(tmp_path / NAME, LUNGS)[1]["channel_names"] == {"0": "CT"}
    _, told = write_set(tmp_path / "Dataset502_Grey", LUNGS, intensity="relative")
    assert told["channel_names"]["0"] != "CT"


@pytest.mark.parametrize("name", ["out", "Dataset1_Tiny", "Dataset501", "dataset501_Tiny"])
def test_a_name_that_nnunet_would_not_find_is_refused(name: str, tmp_path: Path) -> None:
    facts = RunFacts("tiny", 1, (4, 4), (1.0, 1.0), "hu", {})
    with pytest.raises(InputError, match="Dataset501_Synthetic"):
        nnunet_files(tmp_path / name, facts)
