"""Counts against closed forms, and against what the same network does with real tensors."""

from __future__ import annotations

import torch
from torch import nn

from raysynth.models.counting import Hollow


def test_products_and_convolutions_have_the_flops_of_their_definition():
    hollow = Hollow()
    linear = hollow.build(lambda: nn.Linear(64, 32, bias=False))
    conv = hollow.build(lambda: nn.Conv2d(8, 16, 3, padding=1, bias=False))
    with hollow.count(linear) as count:
        linear(hollow.emptied(torch.zeros(10, 64)))
    assert count.flops == 2 * 10 * 64 * 32
    with hollow.count(conv) as count:
        conv(hollow.emptied(torch.zeros(2, 8, 20, 20))).sum().backward()
    # As many for the gradient of the weights; none for that of the input, which needs none.
    assert count.flops == 2 * (2 * 2 * 20 * 20 * 16 * 8 * 9)


def test_memory_is_what_is_alive_at_the_fullest_moment():
    hollow = Hollow()
    nothing = nn.Module()
    x = hollow.emptied(torch.zeros(1000))
    with hollow.count(nothing) as count:
        for _ in range(3):  # one alive at a time, and the next while it is made
            x = x + 1
    assert count.peak_bytes == 2 * 4000
    with hollow.count(nothing) as count:
        kept = [x * number for number in range(5)]
    assert count.peak_bytes == 5 * 4000
    assert len(kept) == 5


def test_weights_and_their_gradients_are_not_counted():
    hollow = Hollow()
    linear = hollow.build(lambda: nn.Linear(1000, 1000, bias=False))
    with hollow.count(linear) as count:
        linear(hollow.emptied(torch.zeros(1, 1000))).sum().backward()
    # A gradient is one of these until it is put where it belongs.
    assert count.peak_bytes < 2 * 4 * 1000**2
    assert linear.weight.grad is not None


def test_nothing_is_computed():
    hollow = Hollow()
    huge = hollow.build(lambda: nn.Linear(10**6, 10**6, bias=False))  # four terabytes
    with hollow.count(huge) as count:
        huge(hollow.emptied(torch.zeros(1, 10**6)))
    assert count.flops == 2 * 10**12
