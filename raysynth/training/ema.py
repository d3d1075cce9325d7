"""The exponential moving average of the weights: what a bundle holds and sampling uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Ema:
    """A running average beside the trained tensors.

    decay_n = min(decay, (1 + n) / (10 + n)) after n steps (Karras et al. 2022 and TensorFlow's
    ExponentialMovingAverage warm up alike): early weights are forgotten at once, late ones kept.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], decay: float) -> None:
        """Starts at the tensors' values.

        Args:
            tensors: what is averaged; the same objects are read at every update.
            decay: per step, reached at the end of the warm-up; 0 follows the tensors exactly.
        """
        self.decay = decay
        self._tensors = [tensor.detach() for tensor in tensors]
        self.average = [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the tensors, after optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # One fused pass over all tensors: a Python loop costs more than the arithmetic.
        torch._foreach_lerp_(self.average, self._tensors, 1.0 - decay)
