import math

import numpy as np
import pytest

from raysynth.config.hardware import Hardware
from raysynth.planning.formulas import best_interval_s, exchange, goodput, slowest_of
from raysynth.training.memory import EngineChoice

GIGA = 10**9 // 4  # parameters whose gradients are one GB


def cluster(**changes: object) -> Hardware:
    values = {
        "name": "test",
        "gpu": "test",
        "num_gpus": 1000,
        "gpus_per_node": 8,
        "memory_gib": 80,
        "peak_bf16_tflops": 1,
        "peak_fp32_tflops": 1,
        "gpu_link_gb_s": 1e9,
        "network_gb_s": 50,
        "store_gb_s": 1,
        "overlaps": False,
    }
    return Hardware.model_validate(values | changes)


def exchanged(workers: int, stage: int | None, hardware: Hardware, micro: int = 1, **more: bool):
    name = "ddp" if stage is None else "deepspeed"
    engine = EngineChoice(name, stage or 0, "")  # type: ignore[arg-type]
    return exchange(GIGA, workers, engine, hardware, compute_s=3.0, num_micro_batches=micro, **more)


def test_an_all_reduce_sends_twice_its_bytes_but_for_one_part():
    hardware = cluster(gpus_per_node=1, network_gb_s=1)
    told = exchanged(4, None, hardware)
    assert told.gigabytes == pytest.approx(2 * 3 / 4)
    assert told.seconds == told.exposed_s == pytest.approx(2 * 3 / 4)
    assert exchanged(1, None, hardware).seconds == 0


def test_stage_3_sends_half_as_much_again_and_stage_2_the_same():
    hardware = cluster(gpus_per_node=1)
    ddp, zero_2, zero_3 = (exchanged(8, stage, hardware) for stage in (None, 2, 3))
    assert zero_2.gigabytes == pytest.approx(ddp.gigabytes)
    assert zero_3.gigabytes == pytest.approx(1.5 * ddp.gigabytes)
    # Both exchange in every micro batch, DDP in the last alone.
    assert exchanged(8, None, hardware, 4).seconds == pytest.approx(ddp.seconds)
    assert exchanged(8, 3, hardware, 4).seconds == pytest.approx(4 * zero_3.seconds)


def test_nodes_that_add_up_first_use_the_network_an_eighth_as_much():
    hardware = cluster(network_gb_s=12.5)
    by_node = exchanged(1000, None, hardware)
    flat = exchanged(1000, None, hardware, by_node=False)
    # 2 GB a GPU over 100 Gb/s a node: 160 ms, or 1.3 s if each GPU sends its own.
    assert by_node.seconds == pytest.approx(0.16, rel=0.02)
    assert flat.seconds == pytest.approx(1.28, rel=0.02)


def test_a_backward_pass_hides_what_is_exchanged_during_it():
    hardware = cluster(network_gb_s=12.5, overlaps=True)
    assert exchanged(1000, None, hardware).exposed_s == 0  # 0.16 s, and 2 s of backward
    slow = cluster(network_gb_s=0.5, overlaps=True)
    told = exchanged(1000, None, slow)
    assert told.exposed_s == pytest.approx(told.seconds - 2.0)


def test_the_slowest_of_many_is_the_median_of_their_largest():
    rng = np.random.default_rng(0)
    largest = np.exp(0.05 * rng.standard_normal((2000, 500)).max(axis=1))
    assert slowest_of(500, 0.05) == pytest.approx(float(np.median(largest)), rel=2e-3)
    assert slowest_of(1, 0.05) == slowest_of(500, 0.0) == 1.0


def test_goodput_is_that_of_the_published_cases():
    # Llama 3: a failure in 50.7 h at 1,000 GPUs; 300 s until work goes on.
    month = 50.7 * 3600
    for stall, expected in ((5.0, 0.991), (60.0, 0.973)):
        best = best_interval_s(stall, month)
        assert goodput(stall, best, month, 300) == pytest.approx(expected, abs=1e-3)
        worse = [goodput(stall, best * factor, month, 300) for factor in (0.5, 2.0)]
        assert max(worse) < goodput(stall, best, month, 300)
    assert goodput(1.0, 10.0, 1.0, 300.0) == 0.0
    assert math.isclose(best_interval_s(2.0, 100.0), 20.0)
