"""The command line: exit codes and one-line reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysynth.cli import main

DEMO = str(Path(__file__).parents[1] / "jobs" / "recipes" / "phantom_demo.yaml")

BAD = {
    "no such recipe": (["train", "nope.yaml"], "nope.yaml: No such file"),
    "unknown key": (["ingest", DEMO, "--set", "data.sauce=1"], "unknown key data.sauce"),
    "impossible size": (["shard", DEMO, "--set", "data.samples.size=33"], "33 is not divisible"),
    "no argument": (["train"], "Missing argument"),
    "unknown verb": (["dream"], "No such command"),
    "not a store": (["inspect", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_2_with_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("raysynth: ")
    assert message in lines[0]


def test_a_dry_run_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", DEMO, "--dry-run", "--set", "seed=7"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7
