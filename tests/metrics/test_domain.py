"""Features by a bundle: the same as in training, of slices in HU and of greys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raysynth.case import Intensity
from raysynth.config import ExtractorConfig, SliceSamples
from raysynth.config.model import ModelConfig
from raysynth.errors import InputError
from raysynth.metrics.domain import check_intensity, shown_window
from raysynth.metrics.features import load_extractor
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import load_bundle, save_bundle
from raysynth.models.encoder import Encoder
from raysynth.models.facts import BundleFacts
from raysynth.volume import RELATIVE_RANGE
from raysynth.window import LUNG_WINDOW_HU, measurable, normalize
from tests.training.tiny import MODEL as AUTOENCODER

TINY = ExtractorConfig(channels=(8, 16), feature_dim=6, window_hu=(-900.0, 300.0))
GREYS = TINY.model_copy(update={"window_hu": RELATIVE_RANGE})


def _facts(model: ModelConfig, intensity: Intensity) -> BundleFacts:
    return BundleFacts(
        model=model,
        samples=SliceSamples(size=32),
        intensity=intensity,
        sources=("phantom",),
        snapshot="ABC123",
        patients={"train": 4},
        indicative=True,
        seen_samples=64,
    )


def save_extractor(path: Path, model: ExtractorConfig, intensity: Intensity = "hu") -> Encoder:
    """A bundle of a fresh encoder, which is returned in evaluation mode."""
    torch.manual_seed(0)
    encoder = Encoder(model).eval()
    save_bundle(path, _facts(model, intensity), encoder=encoder.state_dict())
    return encoder


def _slices(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 400, (count, size, size)).astype(np.int16)


def test_a_bundle_gives_the_features_of_its_network(tmp_path: Path) -> None:
    encoder, hu = save_extractor(tmp_path / "mine", TINY), _slices(32)
    extract = load_extractor(f"bundle:{tmp_path / 'mine'}")
    assert extract.name == f"domain-mine@{load_bundle(tmp_path / 'mine').digest[:8]}"
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(normalize(hu, TINY.window_hu))[:, None])
    features = extract(hu)
    assert features.shape == (32, extract.dim) == (32, 6)
    np.testing.assert_array_equal(features, expected.numpy())


def test_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    save_extractor(tmp_path / "mine", TINY)
    extract, hu = load_extractor(f"bundle:{tmp_path / 'mine'}"), _slices(70)
    alone = np.concatenate([extract(hu[i : i + 1]) for i in (0, 31, 32, 69)])
    np.testing.assert_array_equal(alone, extract(hu)[[0, 31, 32, 69]])
    assert extract(hu[:0]).shape == (0, 6)


def test_greys_come_back_to_the_window_that_was_learned(tmp_path: Path) -> None:
    low, high = RELATIVE_RANGE
    assert shown_window(RELATIVE_RANGE, "relative") == LUNG_WINDOW_HU
    assert shown_window(TINY.window_hu, "hu") == TINY.window_hu
    encoder = save_extractor(tmp_path / "greys", GREYS, "relative")
    greys = np.random.default_rng(0).integers(low, high, (8, 32, 32)).astype(np.int16)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(normalize(greys, RELATIVE_RANGE))[:, None]).numpy()
    shown = load_extractor(f"bundle:{tmp_path / 'greys'}")(measurable(greys, "relative"))
    np.testing.assert_allclose(shown, expected, atol=2e-3)


def test_another_model_has_no_features(tmp_path: Path) -> None:
    autoencoder = build_autoencoder(AUTOENCODER)
    save_bundle(tmp_path / "ae", _facts(AUTOENCODER, "hu"), autoencoder.state_dict())
    with pytest.raises(InputError, match=r"ae is a autoencoder_kl, which has no features") as told:
        load_extractor(f"bundle:{tmp_path / 'ae'}")
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match=r"no bundle\.json there; train the model first"):
        load_extractor(f"bundle:{tmp_path / 'nothing'}")


def test_greys_are_not_judged_by_who_learned_on_hu(tmp_path: Path) -> None:
    save_extractor(tmp_path / "mine", TINY)
    names = ("ct-conv", f"bundle:{tmp_path / 'mine'}")
    check_intensity(names, "hu")
    with pytest.raises(InputError, match="mine learned on intensity 'hu', the samples have 'rela"):
        check_intensity(names, "relative")
