from __future__ import annotations

import torch

from raysynth.training.ema import Ema


def test_average_follows_the_warmed_up_decay() -> None:
    tensors = [torch.zeros(3), torch.zeros(2, 2)]
    ema = Ema(tensors, decay=0.5)
    expected = 0.0
    for step in range(1, 12):
        for tensor in tensors:
            tensor.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    for average in ema.average:
        torch.testing.assert_close(average, torch.full_like(average, expected))


def test_no_decay_keeps_the_plain_weights() -> None:
    tensor = torch.randn(4)
    ema = Ema([tensor], decay=0.0)
    tensor += 1
    ema.update(1)
    torch.testing.assert_close(ema.average[0], tensor)
