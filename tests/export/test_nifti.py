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

from raysynth.cli import main
from raysynth.config import AuditConfig, ExperimentConfig
from raysynth.errors import InputError, Refused
from raysynth.export.nifti import _write_image, export_nifti
from raysynth.formats.nifti import read_nifti
from raysynth.store.reader import SampleSet
from raysynth.store.repository import open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, write_rows
from storage_schema.v1 import audit
from tests.store.conftest import make_store

COUNT = 3


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
    found = export_nifti(config, tmp_path / "out")
    assert (found.written, found.withheld, found.audit) == (2, 1, "passed")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    stems = ("run-00000000", "run-00000002")
    endings = (".json", ".nii.gz", "_labels.nii.gz")
    assert names == sorted(["export.json", *(stem + end for stem in stems for end in endings)])
    passport = json.loads((tmp_path / "out" / "run-00000002.json").read_text())
    assert passport["synthetic"] is True
    assert passport["audit"]["ncc"] == 0.5
    assert passport["audit"]["embedding_distance"] is None
    assert passport["audit"]["without_audit"] is None
    assert passport["passport"] == {"synthetic": True}
    assert passport["contains_real_pixels"] is False
    text = json.dumps(passport)
    assert "case-a" not in text
    assert "nearest" not in text
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["complete"] is True


def test_images_keep_values_size_and_sides(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 0, 0])
    export_nifti(config, tmp_path / "out")
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
        export_nifti(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_leaves_without_any_audit(config: ExperimentConfig, tmp_path: Path) -> None:
    with StoreRun(config.store_url, "spoil", "1") as run:
        run.declare(lambda root: root.__delitem__("audits"), "none")
        run.publish("none")
    with pytest.raises(Refused, match="has no audit"):
        export_nifti(config, tmp_path / "out")
    found = export_nifti(config, tmp_path / "out", without_audit="phantoms alone")
    assert (found.written, found.audit) == (3, "none")
    passport = json.loads((tmp_path / "out" / "run-00000000.json").read_text())
    assert passport["audit"] == {"verdict": "none", "without_audit": "phantoms alone"}


def test_a_reason_is_recorded_and_copies_stay_behind(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    _put_audit(config, [1, 0, 0], verdict="failed")
    found = export_nifti(config, tmp_path / "out", without_audit="a test")
    assert (found.written, found.withheld, found.audit) == (2, 1, "failed")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["without_audit"] == "a test"


def test_a_folder_with_other_files_is_left_alone(config: ExperimentConfig, tmp_path: Path) -> None:
    _put_audit(config, [0, 0, 0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="other files are there"):
        export_nifti(config, tmp_path / "full")
    with pytest.raises(InputError, match="say why"):
        export_nifti(config, tmp_path / "out", without_audit=" ")
    export_nifti(config, tmp_path / "out")
    export_nifti(config, tmp_path / "out")


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
    _write_image(tmp_path / "volume.nii.gz", hu, (2.0, 2.0), is_mixed=True)
    read = sitk.ReadImage(tmp_path / "volume.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), hu)
    assert read.GetSpacing() == (2.0, 2.0, 2.0)
    np.testing.assert_allclose(read.GetDirection(), np.eye(3).ravel(), atol=1e-12)
