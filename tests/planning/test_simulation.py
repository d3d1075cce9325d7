import numpy as np
import pytest

from raysynth.planning.formulas import goodput, slowest_of
from raysynth.planning.simulation import simulate_drawing, simulate_serving, simulate_training

QUIET = {"sigma": 0.0, "stall_s": 0.0, "between_failures_s": 1e15, "restart_s": 0.0, "seed": 0}
STILL = {"sigma": 0.0, "store_s": 0.0, "node_failures_per_s": 0.0, "restart_s": 0.0, "seed": 0}


def test_nothing_random_is_steps_and_saves():
    found = simulate_training(
        100, 2.0, num_workers=7, steps_between_checkpoints=10, **QUIET | {"stall_s": 0.5}
    )
    assert found.seconds == pytest.approx(200 + 10 * 0.5)
    assert (found.failures, found.lost_s) == (0, 0.0)
    assert found.saving_s == pytest.approx(5.0)
    assert found.waiting_s == pytest.approx(0.0, abs=1e-9)


def test_every_step_waits_for_the_slowest():
    found = simulate_training(
        20_000, 1.0, num_workers=500, steps_between_checkpoints=10**9, **QUIET | {"sigma": 0.05}
    )
    assert found.seconds == pytest.approx(20_000 * slowest_of(500, 0.05), rel=5e-3)
    assert found.waiting_s == pytest.approx(found.seconds - 20_000, rel=1e-6)


def test_failures_cost_what_the_formula_says():
    """Young's first order holds where intervals and restarts are short against failures."""
    settings = QUIET | {"stall_s": 5.0, "between_failures_s": 20_000.0, "restart_s": 300.0}
    found = simulate_training(
        2_000_000, 1.0, num_workers=1, steps_between_checkpoints=450, **settings
    )
    assert found.failures > 50
    share = 2_000_000 / found.seconds
    assert share == pytest.approx(goodput(5.0, 450.0, 20_000.0, 300.0), abs=4e-3)
    parts = found.waiting_s + found.saving_s + found.lost_s
    assert 2_000_000 + parts == pytest.approx(found.seconds, rel=1e-3)


def test_equal_units_on_equal_actors():
    found = simulate_drawing(1000, 15.0, num_actors=10, actors_per_node=8, **STILL)
    assert found.seconds == pytest.approx(1500.0)
    assert found.busy == pytest.approx(1.0)
    assert (found.redone, found.tail_s) == (0, 0.0)


def test_a_store_that_takes_one_unit_a_second_is_the_bottleneck():
    found = simulate_drawing(1000, 1.0, num_actors=100, actors_per_node=8, **STILL | {"store_s": 1})
    assert found.seconds == pytest.approx(1001.0, rel=1e-3)
    assert found.writing > 0.9


@pytest.mark.parametrize("units", [120, 997])
def test_what_lost_nodes_had_is_drawn_again(units: int):
    lossy = STILL | {"node_failures_per_s": 1 / 200, "restart_s": 60.0}
    found = simulate_drawing(units, 20.0, num_actors=16, actors_per_node=4, **lossy)
    assert found.redone > 0
    # Every unit counts once, however often it was begun.
    assert found.busy * found.seconds * 16 == pytest.approx(units * 20.0)
    quiet = simulate_drawing(units, 20.0, num_actors=16, actors_per_node=4, **STILL)
    assert found.seconds > quiet.seconds


def test_the_seed_decides_everything():
    settings = STILL | {"sigma": 0.2, "node_failures_per_s": 1e-3, "restart_s": 9.0}
    runs = [
        simulate_drawing(400, 5.0, num_actors=8, actors_per_node=4, **settings | {"seed": seed})
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_million_units_are_simulated_as_leases():
    settings = STILL | {"sigma": 0.05}
    found = simulate_drawing(1_000_000, 15.0, num_actors=1000, actors_per_node=8, **settings)
    assert found.seconds == pytest.approx(15_000, rel=0.02)
    assert np.isfinite(found.busy)


ONE = {"num_replicas": 1, "slots": 1, "choices": 1, "lost_share": 0.0, "sigma": 0.0, "seed": 0}


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_replica_of_one_slot_is_an_m_d_1_queue(load: float):
    """Pollaczek-Khinchine: mean s (1 + rho / (2 (1 - rho)))."""
    found = simulate_serving(200_000, 2.0, load=load, **ONE)
    assert found.mean_s == pytest.approx(2 * (1 + load / (2 * (1 - load))), rel=0.03)


def test_two_choices_and_lost_replicas():
    many = ONE | {"num_replicas": 200, "slots": 4}
    one, two = (
        simulate_serving(20_000, 10.0, load=0.8, **many | {"choices": choices})
        for choices in (1, 2)
    )
    assert two.p99_s < 0.7 * one.p99_s
    hit = simulate_serving(20_000, 10.0, load=0.8, **many | {"choices": 2, "lost_share": 0.1})
    assert hit.repeated > 0
    assert hit.lost == 0
    assert hit.p99_s > two.p99_s
