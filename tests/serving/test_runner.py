"""Requests that join, leave and finish at any step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from raysynth.condition import Condition
from raysynth.config import ExperimentConfig
from raysynth.errors import InputError
from raysynth.sampling.curve import Slots, slots_that_pay
from raysynth.sampling.draw import BundleSampler
from raysynth.sampling.planner import NO_SOURCE, PlannedSample
from raysynth.serving.runner import Busy, Runner


@pytest.fixture
def runner(served: ExperimentConfig) -> Iterator[Runner]:
    runner = Runner(sampler_of(served))
    yield runner
    runner.close()


def sampler_of(config: ExperimentConfig, **changes: Any) -> BundleSampler:
    sampling = config.sampling.model_copy(update=changes)
    return BundleSampler(config.bundle_path, sampling, config.seed)


def box_at(corner: int) -> Condition:
    return Condition(box=(corner, corner, corner + 6, corner + 6), attributes=(3, 3, 3, 3, 3))


def test_samples_are_those_of_a_batch_run_whoever_shares_their_calls(
    served: ExperimentConfig, runner: Runner
) -> None:
    planned = [PlannedSample(f"s{n}", n, box_at(n), NO_SOURCE) for n in range(12)]
    alone = sampler_of(served).draw(planned)
    # Others of more and fewer steps come and go between them.
    steps = [3, 7, 5, 9]
    others = [
        runner.submit(f"o{n}", 100 + n, Condition(), num_inference_steps=steps[n % 4])
        for n in range(10)
    ]
    tickets = [runner.submit(one.sample_id, one.seed, one.condition) for one in planned]
    for ticket, expected in zip(tickets, alone, strict=True):
        np.testing.assert_array_equal(ticket.drawn.result(60), expected)
        assert ticket.batch_shape == served.sampling.batch_size
    for other in others:
        assert other.drawn.result(60).dtype == np.int16


def test_guided_and_unguided_requests_are_served_together(
    served: ExperimentConfig, runner: Runner
) -> None:
    tickets = [
        runner.submit(f"{scale}", 7, box_at(5), guidance_scale=scale) for scale in (1.0, 2.0, 4.0)
    ]
    images = [ticket.drawn.result(60) for ticket in tickets]
    for scale, image in zip((1.0, 2.0, 4.0), images, strict=True):
        planned = PlannedSample("x", 7, box_at(5), NO_SOURCE)
        expected = sampler_of(served).draw([planned], guidance_scale=scale)[0]
        np.testing.assert_array_equal(image, expected)
    assert tickets[1].batch_shape == 2 * served.sampling.batch_size


def test_progress_is_told_step_by_step(runner: Runner) -> None:
    told: list[tuple[int, int]] = []
    ticket = runner.submit(
        "a", 0, box_at(3), num_inference_steps=5, on_step=lambda *step: told.append(step)
    )
    ticket.drawn.result(60)
    assert told == [(step, 5) for step in range(1, 6)]


def test_who_gives_up_frees_a_slot_at_once(served: ExperimentConfig) -> None:
    runner = Runner(sampler_of(served, batch_size=1))
    started = threading.Event()
    long = runner.submit(
        "long", 0, box_at(2), num_inference_steps=1000, on_step=lambda *_: started.set()
    )
    short = runner.submit("short", 1, box_at(4), num_inference_steps=2)
    assert started.wait(60)
    assert not short.drawn.done()
    runner.cancel(long)
    assert short.drawn.result(60).shape == (32, 32)
    with pytest.raises(CancelledError):
        long.drawn.result()
    waiting = runner.submit("waiting", 2, box_at(4))
    runner.cancel(waiting)
    runner.close()
    counts = runner.counts
    assert (counts.waiting, counts.busy, counts.cancelled) == (0, 0, 2)


def test_too_many_are_refused_and_none_is_lost(served: ExperimentConfig) -> None:
    runner = Runner(sampler_of(served, batch_size=2), max_waiting=3)
    tickets, refused = [], 0
    for number in range(20):
        try:
            tickets.append(runner.submit(f"{number}", number, box_at(1), num_inference_steps=20))
        except Busy:
            refused += 1
    assert refused > 0
    runner.close()  # drains
    assert all(ticket.drawn.done() for ticket in tickets)
    assert all(ticket.drawn.exception() is None for ticket in tickets)
    with pytest.raises(Busy):
        runner.submit("late", 0, box_at(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": Condition(box=(0, 0, 900, 900))}, "box"),
        ({"condition": Condition(attributes=(9, 9, 9, 9, 9))}, "attributes"),
        ({"num_inference_steps": 5000}, "5000"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
    ],
)
def test_bad_requests_are_refused_at_once_and_others_go_on(
    runner: Runner, changes: dict[str, Any], message: str
) -> None:
    request = {"sample_id": "bad", "seed": 0, "condition": Condition()} | changes
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        runner.submit(**request)
    assert time.monotonic() - started < 1
    assert runner.submit("good", 0, Condition()).drawn.result(60).ndim == 2


def test_a_pinned_batch_shape_gives_the_bits_of_a_run_at_it(
    served: ExperimentConfig, runner: Runner
) -> None:
    planned = PlannedSample("x", 7, box_at(5), NO_SOURCE)
    for slots in (1, 3):
        ticket = runner.submit(f"{slots}", 7, box_at(5), batch_shape=slots)
        expected = sampler_of(served, batch_size=slots).draw([planned])[0]
        np.testing.assert_array_equal(ticket.drawn.result(60), expected)
        assert ticket.batch_shape == slots


def test_previews_end_in_the_sample(served: ExperimentConfig, runner: Runner) -> None:
    shown: list[tuple[int, np.ndarray]] = []
    ticket = runner.submit(
        "a",
        0,
        box_at(3),
        num_inference_steps=40,
        on_preview=lambda *one: shown.append(one),
        preview_every=10,
    )
    assert ticket.drawn.result(60).shape == (32, 32)
    assert shown
    assert {step % 10 for step, _ in shown} == {0}
    assert all(picture.dtype == np.int16 for _, picture in shown)


def test_slots_follow_from_what_batches_save() -> None:
    assert slots_that_pay({1: 8.9, 2: 6.7, 4: 3.5, 8: 2.4, 16: 2.0}) == Slots(few=4, many=16)
    assert slots_that_pay({1: 20.8, 2: 13.9, 4: 12.1, 8: 13.3}) == Slots(few=2, many=2)
    assert slots_that_pay({1: 10.5, 2: 8.7, 4: 10.7}) == Slots(few=1, many=1)


def test_a_crowd_goes_to_an_engine_of_more_slots_and_leaves_it_again(
    served: ExperimentConfig,
) -> None:
    runner = Runner(sampler_of(served, batch_size=2), max_waiting=64, crowd_slots=8)
    first = runner.submit("first", 0, box_at(1))
    assert first.drawn.result(60).ndim == 2
    crowd = [runner.submit(f"c{n}", n, box_at(n)) for n in range(24)]
    images = [ticket.drawn.result(60) for ticket in crowd]
    last = runner.submit("last", 3, box_at(3))
    assert last.drawn.result(60).ndim == 2
    runner.close()
    shapes = {ticket.batch_shape for ticket in crowd}
    assert 8 in shapes
    assert shapes <= {2, 8}
    assert (first.batch_shape, last.batch_shape) == (2, 2)
    for number, (ticket, image) in enumerate(zip(crowd, images, strict=True)):
        planned = PlannedSample("x", number, box_at(number), NO_SOURCE)
        alone = sampler_of(served, batch_size=ticket.batch_shape).draw([planned])[0]
        np.testing.assert_array_equal(image, alone)
