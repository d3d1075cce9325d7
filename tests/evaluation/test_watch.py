"""Metrics while samples are drawn: whatever is lost, killed or repeated, they end the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from raysynth.config import ExperimentConfig
from raysynth.data.ingest import ingest
from raysynth.data.shard import shard
from raysynth.errors import InputError
from raysynth.evaluation import watch
from raysynth.evaluation.running import RunningValue
from raysynth.evaluation.stream import MetricStream, Values, open_run, stream_folder
from raysynth.evaluation.watch import Sender, metric_stream, stream_store, synthesize_watched
from raysynth.progress import Progress
from raysynth.sampling.batch import plan_mark
from raysynth.store.reader import SampleSet
from tests.evaluation.equal_values import assert_equal_values
from tests.sampling.crashing_run import drawing_config, make_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _config(work_dir: Path, name: str = "tiny") -> ExperimentConfig:
    config = drawing_config(work_dir, num_samples=135)
    changes = {"stream": True, "controls": False}
    evaluation = config.evaluation.model_copy(update=changes)
    return config.model_copy(update={"name": name, "evaluation": evaluation})


def _written(config: ExperimentConfig) -> Values:
    found = json.loads(stream_folder(config).with_suffix(".json").read_text())
    return {key: RunningValue(**value) for key, value in found["metrics"].items()}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> ExperimentConfig:
    config = _config(tmp_path_factory.mktemp("watched"))
    ingest(config)
    shard(config)
    make_bundle(config)
    assert synthesize_watched(config).drawn == 135
    return config


@pytest.fixture(scope="module")
def expected(watched: ExperimentConfig) -> Values:
    return stream_store(watched)


@pytest.fixture
def run(watched: ExperimentConfig) -> SampleSet:
    return open_run(watched, plan_mark(watched))


def _push(stream: Any, run: SampleSet, number: int) -> Any:
    start, stop = run.shard_rows(number)
    hu, layout = (run.read(name, start, stop) for name in ("hu", "layout"))
    push = getattr(stream.push, "remote", stream.push)
    return push(start, hu, layout, run.index["box"][start:stop])


@pytest.fixture
def forgotten(watched: ExperimentConfig) -> ExperimentConfig:
    """Nothing of the run is saved."""
    (stream_folder(watched) / "state.npz").unlink(missing_ok=True)
    return watched


def test_the_last_values_are_those_of_the_whole_store(
    watched: ExperimentConfig, expected: Values
) -> None:
    assert {key.split("/")[2] for key in expected} == {"all", "lung", "nodule16"}
    assert expected["fid/slice/all/ct-conv@1"].n == 135
    assert_equal_values(_written(watched), expected)


def test_a_finished_run_is_watched_from_the_store(
    forgotten: ExperimentConfig, expected: Values
) -> None:
    assert synthesize_watched(forgotten).drawn == 0
    assert_equal_values(_written(forgotten), expected)


def test_a_killed_stream_goes_on_from_what_it_saved(
    forgotten: ExperimentConfig, run: SampleSet, expected: Values
) -> None:
    with metric_stream(forgotten, plan_mark(forgotten)) as (_, stream):
        ray.get([_push(stream, run, 2), _push(stream, run, 0)])
        ray.get(stream.save.remote())
        _push(stream, run, 1)
        ray.kill(stream, no_restart=False)
        _push(stream, run, 0)  # counted before
        (fid, kid) = ray.get(stream.current.remote()).values()
        assert fid.n in (71, 135)  # the shard pushed before the kill came through, or did not
        assert kid.std > 0
        assert_equal_values(ray.get(stream.finish.remote()), expected)


class KillingSender(Sender):
    """Kills the stream in the middle."""

    def __call__(self, first_row: int, *shard: Any) -> None:
        super().__call__(first_row, *shard)
        if first_row == 64:
            ray.kill(ray.get_actor(self._name), no_restart=False)


def test_killed_while_samples_are_drawn(
    watched: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(watched.work_dir, "killed")
    watched.bundle_path.parent.joinpath("killed").symlink_to(watched.bundle_path)
    monkeypatch.setattr(watch, "Sender", KillingSender)
    assert synthesize_watched(config).drawn == 135
    assert_equal_values(_written(config), stream_store(config))


@pytest.mark.parametrize("damage", ["flipped", "empty", "other"])
def test_a_saved_state_that_is_of_no_use_is_made_again(
    forgotten: ExperimentConfig, run: SampleSet, expected: Values, damage: str
) -> None:
    mark = plan_mark(forgotten)
    stream = MetricStream(forgotten, "0" * 12 if damage == "other" else mark)
    _push(stream, run, 0)
    stream.save()
    path = stream_folder(forgotten) / "state.npz"
    if damage != "other":
        saved = bytearray(path.read_bytes())
        saved[len(saved) // 2] ^= 1
        path.write_bytes(saved if damage == "flipped" else b"")
    stream = MetricStream(forgotten, mark)
    assert stream.current() == {}
    assert_equal_values(stream.finish(), expected)


def test_current_values_are_told_at_most_every_second(
    forgotten: ExperimentConfig, run: SampleSet, expected: Values
) -> None:
    stream = MetricStream(forgotten, plan_mark(forgotten))
    assert stream.current() == {}
    _push(stream, run, 2)
    _push(stream, run, 1)
    first = stream.current()
    assert {key: value.n for key, value in first.items()} == {
        "fid/slice/all/ct-conv@1": 71,
        "kid/slice/all/ct-conv@1": 71,
    }
    _push(stream, run, 0)
    assert stream.current() is first


def test_a_run_of_another_plan_is_refused(watched: ExperimentConfig) -> None:
    with pytest.raises(InputError, match="synthetic/tiny was drawn by another bundle or plan"):
        open_run(watched, "0" * 12)


def test_noted_figures_stay_in_the_progress_view(capfd: pytest.CaptureFixture[str]) -> None:
    view = Progress("synthesize", 3, "shards")
    view.note(fid=1.5)
    view.update(3, loss=2.0)
    view.note(fid=1.25)  # nothing is shown after the end
    *_, line = capfd.readouterr().err.splitlines()
    assert json.loads(line)["fid"] == 1.5
    assert json.loads(line)["loss"] == 2.0
