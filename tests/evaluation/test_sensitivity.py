import numpy as np

from raysynth.evaluation.sensitivity import (
    DEGRADE,
    EVIDENCE,
    Sensitivity,
    _HeldOut,
    _without_modes,
    standing,
)


def _half() -> _HeldOut:
    rng = np.random.default_rng(0)
    layout = np.full((6, 32, 32), 1, np.uint8)
    layout[:, 12:18, 12:18] = 5
    hu = np.where(layout == 5, 40, -850) + rng.integers(-20, 20, layout.shape)
    return _HeldOut(hu.astype(np.int16), layout, np.tile([12, 12, 18, 18], (6, 1)).astype(np.int16))


def test_degradations_do_what_they_are_named_for() -> None:
    half = _half()
    worse = {
        kind: DEGRADE[kind](half, level)
        for kind, level in {"blur": 2.0, "noise": 50.0, "shift": 25.0, "removal": 0.5}.items()
    }
    assert np.array_equal(worse["shift"], half.hu + 25)
    assert abs((worse["noise"] - half.hu).std() - 50) < 2
    assert np.abs(np.diff(worse["blur"], axis=2)).max() < np.abs(np.diff(half.hu, axis=2)).max() / 2
    nodule = half.layout == 5
    gone = [
        bool(image[inside].max() < -500)
        for image, inside in zip(worse["removal"], nodule, strict=True)
    ]
    assert sum(gone) == 3
    assert np.array_equal(worse["removal"][~nodule], half.hu[~nodule])


def test_dropping_modes_keeps_the_number_and_one_end() -> None:
    features = np.stack([np.arange(8.0), np.zeros(8)], 1).astype(np.float32)
    left = _without_modes(features, 0.75)
    assert left.shape == features.shape
    assert len(np.unique(left[:, 0])) == 2


def test_only_what_grows_with_every_degradation_is_evidence() -> None:
    sees, blind = Sensitivity(64, {}, ()), Sensitivity(64, {}, ("blur",))
    answers = {
        "kid/slice/all/domain@1": sees,
        "kid/slice/nodule32/domain@1": blind,
        "kid/slice/all/ct-conv@1": sees,
        "kid/slice/liver/domain@1": sees,
    }

    def of(key: str, phantoms: bool = False) -> str:
        return standing(key, answers, phantoms)

    assert of("kid/slice/all/domain@1/64") == EVIDENCE
    assert of("kid/slice/all_nodule/domain@1/64") == EVIDENCE
    assert of("kid/slice/generated_liver/domain@1/64") == EVIDENCE
    assert of("kid/slice/nodule32/domain@1/64") == "not evidence: blind to blur"
    assert of("kid/slice/all/ct-conv@1/64") == "smoke test: random features"
    assert of("kid/slice/lung/domain@1/64") == "not tested on patients made worse"
    assert of("kid/slice/all/domain@1/64", phantoms=True) == "smoke test: phantoms"
