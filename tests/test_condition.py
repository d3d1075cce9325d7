"""What cannot be asked is refused in one line, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysynth.case import Label
from raysynth.condition import Condition, check_condition
from raysynth.config import SamplingConfig
from raysynth.config.data import SliceSamples
from raysynth.config.model import LatentDiffusionConfig, VQVAEConfig
from raysynth.errors import InputError
from raysynth.models.bundle import FACTS
from raysynth.models.facts import BundleFacts
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.planner import PlannedSample

SIZE = 32
LAYOUT = np.full((SIZE, SIZE), Label.BODY, np.uint8)
LAYOUT[8:24, 4:14] = Label.RIGHT_LUNG
UNKNOWN = np.where(LAYOUT == Label.BODY, np.uint8(7), np.uint8(99))
NAN = float("nan")

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layout of another size": (
        {"layout": LAYOUT[:8]},
        r"layout of shape \(8, 32\): this model needs \(32, 32\)",
    ),
    "layout of numbers": ({"layout": LAYOUT / 5}, "layout of type float64: give labels as uint8"),
    "unknown labels": (
        {"layout": UNKNOWN},
        "layout has unknown labels 7, 99: give 0 background, 1 left lung, .* 20 tumour",
    ),
    "box outside the image": (
        {"box": (4, 4, 40, 8)},
        r"box \(4, 4, 40, 8\): give \(y0, x0, y1, x1\) with 0 <= y0 < y1 <= 32",
    ),
    "box before the image": ({"box": (-3, 4, 4, 8)}, r"box \(-3, 4, 4, 8\): give \(y0, x0"),
    "empty box": ({"box": (4, 4, 4, 8)}, r"box \(4, 4, 4, 8\): give \(y0, x0"),
    "box upside down": ({"box": (9, 4, 4, 8)}, r"box \(9, 4, 4, 8\): give \(y0, x0"),
    "box of three": ({"box": (4, 4, 8)}, "box .*: give four whole numbers"),
    "box of no numbers": ({"box": (4, 4, NAN, 8)}, "box .*: give four whole numbers"),
    "box outside the lungs": (
        {"layout": LAYOUT, "box": (8, 20, 16, 28)},
        r"box \(8, 20, 16, 28\) lies outside the lungs of its layout: move it into labels 1 or 2",
    ),
    "rating above 5": ({"attributes": (1, 2, 3, 4, 6)}, r"attributes \(1, 2, 3, 4, 6\): give 5"),
    "rating below 0": ({"attributes": (1, 2, 3, 4, -1)}, "give 5 scores 1-5 .0: not given. for sp"),
    "half a rating": ({"attributes": (1, 2, 3, 4, 2.5)}, "give 5 scores 1-5"),
    "no rating": ({"attributes": (1, 2, 3, 4, NAN)}, "give 5 scores 1-5"),
    "too few ratings": ({"attributes": (1, 2, 3)}, r"attributes \(1, 2, 3\): give 5 scores"),
    "a hole in nothing": ({"known_mask": LAYOUT > 0}, "known_hu and known_mask: give both, or nei"),
}
SCALES = {
    "no number": (NAN, "guidance_scale nan of sample x: give a number of 0 or more"),
    "without end": (float("inf"), "guidance_scale inf of sample x: give a number"),
    "below 0": (-1.0, r"guidance_scale -1\.0 of sample x: give a number of 0 or more"),
    "words": ("much", "guidance_scale 'much' of sample x: give a number"),
    "truth": (True, "guidance_scale True of sample x: give a number"),
}


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> BundleSampler:
    """Of a bundle that lacks its weights: whoever tries to load them gets another error."""
    path: Path = tmp_path_factory.mktemp("bundle")
    facts = BundleFacts(
        model=LatentDiffusionConfig(
            autoencoder=Path("none"), channels=(8,), attention_levels=(False,), norm_num_groups=8
        ),
        autoencoder=VQVAEConfig(channels=(8,), norm_num_groups=8),
        samples=SliceSamples(size=SIZE),
        intensity="hu",
        sources=("phantom",),
        snapshot="none",
        patients={"train": 1},
        indicative=True,
        seen_samples=0,
    )
    (path / FACTS).write_text(facts.model_dump_json())
    return BundleSampler(path, SamplingConfig(), 0)


def _draw(sampler: BundleSampler, condition: Condition, scale: Any = 2.0) -> None:
    sampler.draw([PlannedSample("x", 1, condition, -1)], guidance_scale=scale)


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_in_one_line(sampler: BundleSampler, case: str) -> None:
    parts, message = BAD[case]
    with pytest.raises(InputError, match=message) as refused:
        _draw(sampler, Condition(**parts))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", SCALES)
def test_bad_scales_are_refused_in_one_line(sampler: BundleSampler, case: str) -> None:
    scale, message = SCALES[case]
    with pytest.raises(InputError, match=message):
        _draw(sampler, Condition(), scale)


def test_weights_are_looked_for_only_after_good_requests(sampler: BundleSampler) -> None:
    with pytest.raises(InputError, match="copy the whole folder"):
        _draw(sampler, Condition(LAYOUT, (10, 6, 16, 12), (1, 2, 3, 4, 0)))


def test_the_published_prior_may_ask_outside_the_lungs() -> None:
    asked = Condition(LAYOUT, (8, 20, 16, 28))
    check_condition(asked, SIZE)
    nothing_known = Condition(np.zeros_like(LAYOUT), asked.box)
    check_condition(nothing_known, SIZE, inside_lung=True)
