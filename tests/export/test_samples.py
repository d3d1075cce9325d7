"""Nothing leaves without a passing audit of exactly this run; what leaves says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import zarr
from monai.transforms import LoadImage
from PIL import Image

from raysynth.cli import main
from raysynth.config import AuditConfig, ExperimentConfig
from raysynth.errors import InputError, Refused
from raysynth.export.nifti import nifti_files, nifti_passport, write_nifti
from raysynth.export.passport import sealed
from raysynth.export.plain_zarr import zarr_files
from raysynth.export.png import png_files
from raysynth.export.samples import ExportSummary, export_samples
from raysynth.formats.nifti import read_nifti
from raysynth.store.reader import SampleSet
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, write_rows
from storage_schema.v1 import audit
from tests.store.conftest import make_store

COUNT = 3
FORMATS = {"nifti": nifti_files, "png": png_files, "zarr": zarr_files}


def _config(store: Path) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "run",
            "work_dir": store.parent,
            "store": str(store),
            "model": {"family": "latent_diffusion", "autoencoder": "none"},
        }
    )


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    make_store(str(tmp_path / "store"))
    return _config(tmp_path / "store")


def export(
    config: ExperimentConfig, folder: Path, without_audit: str | None = None
) -> ExportSummary:
    return export_samples(config, folder, "nifti", nifti_files, without_audit)


def _put_audit(config: ExperimentConfig, flagged: list[int], **changes: Any) -> None:
    """Replaces the run's audit."""
    spec = audit(COUNT)
    attributes = {
        "bundle": "b" * 64,
        "plan": "p" * 12,
        "source_set": "slices",
        "fingerprint": "a" * 12,
        "parent_snapshot": "none",
        "regions": ["nodule"],
        "thresholds": {"nodule": 2.0},
        "policy": AuditConfig().model_dump(mode="json"),
        "verdict": "passed",
        "findings": {"reasons": ["1 sample is a copy"], "notices": ["a notice"], "regions": {}},
    }

    def build(root: zarr.Group) -> None:
        del root["audits/run"]
        group = create_sample_set(root, "audits/run", spec, attributes | changes)
        columns = {array.name: np.zeros(array.shape, array.dtype) for array in spec.arrays}
        columns["index/flagged"] = np.array(flagged, np.uint8)
        columns["index/embedding_distance"] += np.nan
        columns["index/ncc"] += 0.5
        write_rows(group, 0, columns)

    with StoreRun(config.store_url, "audit", str(len(changes))) as run:
        run.declare(build, "an audit")
        run.publish("audited")


def test_a_passing_run_leaves_with_its_passport(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 1, 0])
    found = export(config, tmp_path / "out")
    assert (found.written, found.withheld, found.audit) == (2, 1, "passed")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    stems = ("run-00000000", "run-00000002")
    endings = (".json", ".nii.gz", "_labels.nii.gz")
    others = ("README.md", "export.json", "labels.json")
    assert names == sorted([*others, *(stem + end for stem in stems for end in endings)])
    passport = json.loads((tmp_path / "out" / "run-00000002.json").read_text())
    assert passport["synthetic"] is True
    assert passport["audit"]["ncc"] == 0.5
    assert passport["audit"]["embedding_distance"] is None
    assert passport["audit"]["without_audit"] is None
    assert passport["passport"] == {"synthetic": True}
    assert passport["contains_real_pixels"] is False
    assert passport["bundle"] == "b" * 64
    card = (tmp_path / "out" / "README.md").read_text()
    assert "synthetic" in card
    assert "2, as nifti" in card
    assert "1 samples that count as copies" in card
    text = json.dumps(passport)
    assert "case-a" not in text
    assert "nearest" not in text
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["complete"] is True


def test_images_keep_values_size_and_sides(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 0, 0])
    export(config, tmp_path / "out")
    run = SampleSet(open_root(config.store_url)["synthetic/run"])
    for ending, name in (("", "hu"), ("_labels", "layout")):
        path = tmp_path / "out" / f"run-00000001{ending}.nii.gz"
        image = read_nifti(path)
        np.testing.assert_array_equal(image.values[0], run.read(name)[1])
        np.testing.assert_allclose(image.spacing_mm, (0.7, 1.5, 1.5), rtol=1e-6)
        np.testing.assert_allclose(image.direction, np.eye(3), atol=1e-6)
        assert b"synthetic" in bytes(nibabel.load(path).header["descrip"].tobytes())


REFUSED = {
    "failed": ({"verdict": "failed"}, "failed its audit: 1 sample is a copy"),
    "another plan": ({"plan": "q" * 12}, "is of another plan"),
    "another bundle": ({"bundle": "c" * 64}, "is of another bundle"),
    "another policy": ({"policy": {"max_exact": 9}}, "audited under another policy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_leaves_without_a_passing_audit_of_this_run(
    case: str, config: ExperimentConfig, tmp_path: Path
) -> None:
    changes, message = REFUSED[case]
    _put_audit(config, [1, 0, 0], **changes)
    with pytest.raises(Refused, match=message):
        export(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_leaves_without_any_audit(config: ExperimentConfig, tmp_path: Path) -> None:
    with StoreRun(config.store_url, "spoil", "1") as run:
        run.declare(lambda root: root.__delitem__("audits"), "none")
        run.publish("none")
    with pytest.raises(Refused, match="has no audit"):
        export(config, tmp_path / "out")
    found = export(config, tmp_path / "out", without_audit="phantoms alone")
    assert (found.written, found.audit) == (3, "none")
    passport = json.loads((tmp_path / "out" / "run-00000000.json").read_text())
    assert passport["audit"] == {"verdict": "none", "without_audit": "phantoms alone"}


def test_a_reason_is_recorded_and_copies_stay_behind(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    _put_audit(config, [1, 0, 0], verdict="failed")
    found = export(config, tmp_path / "out", without_audit="a test")
    assert (found.written, found.withheld, found.audit) == (2, 1, "failed")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["without_audit"] == "a test"


def test_a_folder_with_other_files_is_left_alone(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 0, 0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="other files are there"):
        export(config, tmp_path / "full")
    with pytest.raises(InputError, match="say why"):
        export(config, tmp_path / "out", without_audit=" ")
    export(config, tmp_path / "out")
    export(config, tmp_path / "out")


def test_the_command_exits_3_where_it_refuses(
    config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _put_audit(config, [1, 0, 0], verdict="failed")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"{{work_dir: {tmp_path}, model: {{family: latent_diffusion, autoencoder: none}}}}"
    )
    arguments = ["export", str(recipe), "--to", str(tmp_path / "out")]
    assert main([*arguments, "--format", "nifti"]) == 3
    assert "failed its audit" in capsys.readouterr().err
    assert main([*arguments, "--format", "tiff"]) == 2
    assert main([*arguments, "--format", "nifti", "--without-audit", "a test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["withheld"] == 1


def test_a_volume_keeps_its_axes_and_its_size(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 400, (5, 6, 7)).astype(np.int16)
    own = sealed({"run": "run"}, "image", hu)
    write_nifti(tmp_path / "volume.nii.gz", hu, (2.0, 2.0), is_mixed=True, passport=own)
    read = sitk.ReadImage(tmp_path / "volume.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), hu)
    assert read.GetSpacing() == (2.0, 2.0, 2.0)
    np.testing.assert_allclose(read.GetDirection(), np.eye(3).ravel(), atol=1e-12)
    assert nifti_passport(tmp_path / "volume.nii.gz")[0] == own
    image = nibabel.load(tmp_path / "volume.nii.gz")
    np.testing.assert_array_equal(image.get_sform(), image.get_qform())
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert image.get_data_dtype() == np.int16
    loaded = LoadImage(image_only=True)(tmp_path / "volume.nii.gz")
    np.testing.assert_array_equal(np.asarray(loaded).T, hu)


def test_the_same_command_writes_the_same_bytes(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 0, 0])
    for name, open_format in FORMATS.items():
        written = []
        for turn in ("first", "second"):
            folder = tmp_path / f"{name} {turn}"
            export_samples(config, folder, name, open_format)
            files = (path for path in sorted(folder.rglob("*")) if path.is_file())
            written.append({path.relative_to(folder): path.read_bytes() for path in files})
        assert written[0] == written[1], name


def test_what_cannot_be_written_leaves_no_whole_export(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    _put_audit(config, [0, 0, 0])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give another folder"):
        export(config, tmp_path / "file" / "out")
    export_samples(config, tmp_path / "out", "png", png_files)
    with pytest.raises(InputError, match="other files are there"):
        export(config, tmp_path / "out")


def test_a_plain_hierarchy_is_read_by_zarr_alone(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 1, 0])
    export_samples(config, tmp_path / "out", "zarr", zarr_files)
    root = zarr.open_group(tmp_path / "out" / "samples.zarr", mode="r")
    run = SampleSet(open_root(config.store_url)["synthetic/run"])
    assert sorted(root.group_keys()) == ["run-00000000", "run-00000002"]
    for name, kept in (("hu", run.read("hu")), ("layout", run.read("layout"))):
        array = root[f"run-00000002/{name}"]
        np.testing.assert_array_equal(array[:], kept[2])
        assert array.attrs["synthetic"] is True
        assert array.attrs["spacing_mm"] == [1.5, 1.5]


def test_a_picture_is_in_the_window_of_lungs(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 0, 0])
    export_samples(config, tmp_path / "out", "png", png_files)
    run = SampleSet(open_root(config.store_url)["synthetic/run"])
    grey = np.asarray(Image.open(tmp_path / "out" / "run-00000001.png"))
    expected = np.clip((run.read("hu")[1] + 1350) / 1500, 0, 1) * 255
    np.testing.assert_allclose(grey, expected, atol=0.51)
    labels = np.asarray(Image.open(tmp_path / "out" / "run-00000001_labels.png"))
    np.testing.assert_array_equal(labels, run.read("layout")[1])
