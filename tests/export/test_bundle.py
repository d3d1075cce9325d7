"""A bundle leaves by the gate of samples, at half the size, and its card says what is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zarr

from raysynth.config import AuditConfig, ExperimentConfig
from raysynth.errors import InputError, Refused
from raysynth.export.bundle import export_bundle
from raysynth.export.verify import verify
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import load_bundle, save_bundle
from raysynth.models.denoiser import build_denoiser
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set
from storage_schema.v1 import audit, synthetic_run
from tests.models.test_bundle import AUTOENCODERS, DIFFUSION, facts

KEY = "kid/slice/all/domain@1/64"
FOUND = {
    "metrics": {
        KEY: {"value": 0.5, "columns": {"untrained": {}}},
        "mmd2/slice/all/domain@1/64": {"value": 0.25, "columns": {"untrained": {}}},
    },
    "adherence": {"synthetic": {"found": 0.75, "n": 40}},
}


def _put_run(config: ExperimentConfig, bundle: str, verdict: str) -> None:
    """A run of that bundle and its audit."""
    shared = {"bundle": bundle, "plan": "p" * 12, "source_set": "slices", "parent_snapshot": "none"}
    run = {"kind": "slices", "intensity": "hu", "cases": [], "pixel_mm": 1.0, "passport": {}}
    table = {
        "fingerprint": "a" * 12,
        "regions": ["nodule"],
        "thresholds": {},
        "policy": AuditConfig().model_dump(mode="json"),
        "verdict": verdict,
        "findings": {"reasons": ["1 of 3 is near"], "notices": [], "regions": {}},
    }

    def build(root: zarr.Group) -> None:
        create_sample_set(root, "synthetic/run", synthetic_run(3, (16, 16)), shared | run)
        create_sample_set(root, "audits/run", audit(3), shared | table)

    with StoreRun(config.store_url, "test", "f" * 12) as writing:
        writing.declare(build, "a run")
        writing.publish("a run")


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    model = {"family": "latent_diffusion", "autoencoder": "none"}
    config = ExperimentConfig.model_validate({"name": "run", "work_dir": tmp_path, "model": model})
    torch.manual_seed(0)
    said = facts(DIFFUSION, autoencoder=AUTOENCODERS["kl"], latent_scale=0.5)
    networks = build_autoencoder(AUTOENCODERS["kl"]), build_denoiser(DIFFUSION, 4, 8)
    save_bundle(config.bundle_path, said, *(network.state_dict() for network in networks))
    return config


def _evaluated(config: ExperimentConfig, verdict: str = "passed") -> None:
    _put_run(config, load_bundle(config.bundle_path).digest, verdict)
    (config.work_dir / "evaluation").mkdir()
    (config.work_dir / "evaluation" / "run.json").write_text(json.dumps(FOUND))


def test_a_bundle_leaves_in_half_precision_with_its_figures(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    _evaluated(config)
    released = export_bundle(config, tmp_path / "out" / "small")
    own, other = load_bundle(config.bundle_path), load_bundle(tmp_path / "out" / "small")
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (config.bundle_path, tmp_path / "out" / "small")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    assert released.digest == other.digest
    weights = zip(own.denoiser.parameters(), other.denoiser.parameters(), strict=True)
    assert all(torch.equal(one.half().float(), two) for one, two in weights)
    assert other.facts.metrics == {KEY: 0.5, "found/slice/box/synthetic/40": 0.75}
    card = (tmp_path / "out" / "small" / "card.md").read_text()
    assert "Privacy audit: passed, on 3 samples of run run: 1 of 3 is near." in card
    assert "nothing here has tested" not in card


def test_the_files_of_a_bundle_that_left_are_known(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    _evaluated(config)
    export_bundle(config, tmp_path / "out")
    assert {one.verdict for one in verify(tmp_path / "out")} == {"valid"}
    card = tmp_path / "out" / "card.md"
    card.write_text(card.read_text().replace("Research only", "For the clinic"))
    (tmp_path / "out" / "more.bin").write_bytes(b"more")
    flawed = {Path(one.path).name: one.verdict for one in verify(tmp_path / "out") if one.reason}
    assert flawed == {"card.md": "altered", "more.bin": "unmarked"}


def test_a_bundle_stays_where_its_samples_stay(config: ExperimentConfig, tmp_path: Path) -> None:
    _evaluated(config, verdict="failed")
    with pytest.raises(Refused, match="failed its audit"):
        export_bundle(config, tmp_path / "out")
    export_bundle(config, tmp_path / "out", without_audit="a test")
    assert "left without one: a test" in (tmp_path / "out" / "card.md").read_text()
    with pytest.raises(InputError, match="is there already"):
        export_bundle(config, tmp_path / "out", without_audit="a test")


def test_a_bundle_without_figures_or_of_another_run_stays(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    _put_run(config, "b" * 64, "passed")
    with pytest.raises(InputError, match="was not drawn by the bundle"):
        export_bundle(config, tmp_path / "out")
