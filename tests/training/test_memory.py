from __future__ import annotations

import pytest

from raysynth.training.memory import BUCKET_ELEMENTS, choose_engine, state_of
from tests.training.tiny import tiny_config

BILLION = 10**9
GIB = 2**30


def parts(stage: int | None, workers: int) -> tuple[float, ...]:
    """Weights, gradients, moments, average, in bytes a parameter."""
    name = "ddp" if stage is None else "deepspeed"
    state = state_of(BILLION, BILLION, workers, name, stage or 0)  # type: ignore[arg-type]
    held = state.weights, state.gradients, state.moments, state.average
    return tuple(size / BILLION for size in held)


def test_stages_shard_what_their_table_says() -> None:
    """Rajbhandari et al. 2020, figure 1, with everything in float32 and a sharded average."""
    assert parts(None, 4) == parts(0, 4) == (4, 4, 8, 1)
    assert parts(1, 4) == (5, 4, 2, 1)
    assert parts(2, 4) == (5, 1, 2, 1)
    assert parts(3, 4) == (2, 1, 2, 1)


def test_frozen_weights_have_nothing_but_themselves() -> None:
    state = state_of(BILLION, BILLION // 10, 1, "plain", 0)
    assert state.peak() == 4 * BILLION + (4 + 8 + 4) * BILLION // 10


def test_activations_and_the_update_come_one_after_the_other() -> None:
    state = state_of(BILLION, BILLION, 2, "deepspeed", 2)
    held = state.peak() - state.stepping
    assert state.stepping == 2 * BILLION
    assert state.peak(10 * GIB) == held + 4 * BUCKET_ELEMENTS + 10 * GIB


def test_auto_takes_the_simplest_engine_that_leaves_half_of_the_memory() -> None:
    asked = tiny_config(engine="deepspeed", zero_stage=3)
    assert choose_engine(asked, 1, 1, GIB).zero_stage == 3
    assert choose_engine(tiny_config(), BILLION, BILLION, GIB).name == "plain"
    config = tiny_config(num_workers=8, open_shards=8)
    chosen = [choose_engine(config, BILLION, BILLION, gib * GIB) for gib in (48, 24, 18, 8)]
    assert [str(one) for one in chosen] == [
        "ddp",
        "DeepSpeed ZeRO-1",
        "DeepSpeed ZeRO-2",
        "DeepSpeed ZeRO-3",
    ]
    assert "15 GiB whole, more than half of 24 GiB" in chosen[1].reason
    for choice, gib in zip(chosen[:3], (48, 24, 18), strict=True):
        state = state_of(BILLION, BILLION, 8, choice.name, choice.zero_stage)
        assert state.peak() <= gib * GIB / 2


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_one_worker_shards_nothing(stage: int | None) -> None:
    weights, gradients, moments, average = parts(stage, 1)
    assert (gradients, moments, average) == (4, 8, 4)
    assert weights in (4, 8)  # with the optimizer's own
