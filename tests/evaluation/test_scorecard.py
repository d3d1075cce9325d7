import json
from pathlib import Path
from typing import Any

from raysynth.evaluation.scorecard import headline, scorecard, verdict
from raysynth.evaluation.sensitivity import EVIDENCE


def _metric(n: int, value: float = 2.0, **columns: tuple[float, bool]) -> dict[str, Any]:
    return {
        "value": value,
        "interval": [value - 0.5, value + 0.5],
        "n": n,
        "reference_patients": 9,
        "columns": {name: {"value": v, "interval": [v, v]} for name, (v, _) in columns.items()},
        "disjoint": {name: apart for name, (_, apart) in columns.items()},
    }


def _found() -> dict[str, Any]:
    metrics = {
        "kid/slice/all/domain@1/256": _metric(256, floor=(1.9, False), shuffled=(3.0, True)),
        "fid/slice/all/domain@1/256": _metric(256, floor=(1.9, False)),
        "fid/slice/lung/domain@1/4096": _metric(4096, floor=(1.0, True), shuffled=(2.1, False)),
        "kid/slice/lung/domain@1/4096": _metric(4096),
        "kid/slice/all/ct-conv@1/256": _metric(256),
    }
    share = {"found": 0.8, "interval": [0.7, 0.9], "n": 99}
    return {
        "name": "run",
        "metrics": metrics,
        "standing": {
            key: EVIDENCE if "domain" in key else "smoke test: random features" for key in metrics
        },
        "adherence": {
            "synthetic": share,
            "real": share,
            "shuffled": share | {"found": 0.1, "interval": [0.05, 0.2]},
        },
        "strata": [],
        "diversity": {},
        "fills": {},
    }


def test_the_card_has_one_figure_a_place_and_evidence_first(tmp_path: Path) -> None:
    card = scorecard(_found(), tmp_path)
    assert [(line.what, line.measure) for line in card[:3]] == [
        ("all", "kid of domain@1"),
        ("lung", "fid of domain@1"),
        ("all", "kid of ct-conv@1"),
    ]
    assert card[0].verdict.startswith("as near as other patients are")
    assert "better than exchanged requests" in card[0].verdict
    assert card[1].verdict.startswith("further away than other patients are; not told from")
    (nodule,) = [line for line in card if line.what == "nodule where asked"]
    assert nodule.verdict == "follows its requests"
    assert {line.verdict for line in card[-2:]} == {
        "not known: run raysynth downstream",
        "not known: run raysynth audit",
    }


def test_what_was_found_out_since_stands_on_the_card(tmp_path: Path) -> None:
    audit = {"verdict": "passed", "reasons": ["0 of 9"], "samples": 9, "flagged": 0, "exact": 0}
    trial = {
        "verdicts": ["x1: helps", "x2: hurts"],
        "patients": {"real": 30, "held_out": 12},
        "indicative": False,
    }
    for name, found in {"audit": audit, "downstream": trial}.items():
        (tmp_path / f"run_{name}.json").write_text(json.dumps(found))
    card = scorecard(_found(), tmp_path)
    assert [line.verdict for line in card[-3:]] == ["x1: helps", "x2: hurts", "passed: 0 of 9"]
    assert {line.standing for line in card[-3:]} == {"measured"}


def test_without_evidence_there_is_no_headline(tmp_path: Path) -> None:
    found = _found()
    assert headline(scorecard(found, tmp_path)).startswith("all: as near")
    found["standing"] = dict.fromkeys(found["standing"], "smoke test: phantoms")
    assert headline(scorecard(found, tmp_path)).startswith("No headline")


def test_nearer_than_patients_is_no_praise() -> None:
    assert "copies" in verdict(_metric(64, value=0.1, floor=(1.0, True)))


def test_diversity_is_best_where_patients_are(tmp_path: Path) -> None:
    found = _found()
    patients = {"value": 0.3, "interval": [0.25, 0.35]}
    alike = {"value": 0.9, "interval": [0.88, 0.92]}
    for metric, verdict_of_high in (("ms_ssim", "less"), ("lpips", "more")):
        found["diversity"] = {
            f"{metric}/slice/nodule32/x@1/64": {"synthetic": alike, "patients": patients},
            f"{metric}/slice/all/x@1/64": {"synthetic": patients, "patients": patients},
            f"{metric}/slice/lung/x@1/64": {"synthetic": patients},
        }
        card = scorecard(found, tmp_path)
        said = [line.verdict for line in card if line.what == "diversity"]
        assert said[0] == f"{verdict_of_high} varied than patients"
        assert said[1].startswith("as varied as patients")
        assert said[2].startswith("nothing to compare with")
    found["fills"] = {"synthetic": {"copied_fraction": 0.4}}
    card = scorecard(found, tmp_path)
    said = [line.verdict for line in card if line.what == "diversity"]
    assert all(verdict.endswith("both samples keep their host's tissue") for verdict in said)
