"""Does a recipe's model fit: a training step and a denoising step at full size, and their memory.

python -m jobs.benchmarks.full_size RECIPE [--steps N] [--threads N] [--set KEY=VALUE ...]

For models of pixels. Trains on samples of noise, so no data is needed: one micro batch, as the
recipe has it, forwards and backwards in the recipe's precision, a step of Adam, and the running
average of the weights. Then one step of the recipe's sampler. "Peak" is of what the process held
above its state before it made the network: weights, gradients, Adam's moments, the average, and
activations. On a CPU it is measured through Linux, on a GPU through its allocator; tensors have the
same sizes on both. Prints a line of JSON; exits 1 where a training step takes more than --at-most-
gib.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.benchmarks.ratios import facts_of_run, forget_peak, memory_bytes
from raysynth.condition import Condition
from raysynth.config import LayoutDiffusionConfig, load_recipe
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.layout.holes import layout_hole
from raysynth.models.denoiser import build_denoiser
from raysynth.models.space import PixelSpace
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.training.objectives import DiffusionObjective

GIB = 2**30


def main(arguments: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at-most-gib", type=float, default=24.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = load_recipe(options.recipe, options.set)
    if not isinstance(config.model, LayoutDiffusionConfig):
        parser.error(f"{options.recipe}: only layout_diffusion, not {config.model.family}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, training = config.samples.shape, config.training
    count = training.micro_batch_size or training.local_batch_size
    batch = _batch(count, shape)
    meter = _Meter(device)
    denoiser = build_denoiser(config.model, 1, config.samples.size, spatial_dims=len(shape))
    denoiser = denoiser.to(device)
    space = PixelSpace(config.model.window_hu)
    objective = DiffusionObjective(denoiser, space, config=config.model, seed=0)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5)
    average = [parameter.detach().clone() for parameter in denoiser.parameters()]
    spent = []
    for _ in range(options.steps):
        started = time.monotonic()
        bf16 = training.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = objective.loss(denoiser, batch, device)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [*denoiser.parameters()], 5e-4)
        final = float(loss)
        spent.append(time.monotonic() - started)
    trained_gib = meter.peak_gib()
    del optimizer, average, loss
    drawing = _Meter(device)
    started = time.monotonic()
    _denoise_once(config, denoiser, space, batch, device)
    facts = facts_of_run("torch", "monai") | {
        "recipe": options.recipe.stem,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": options.threads,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "shape": [count, *shape],
        "precision": training.precision,
        "checkpointing": config.model.checkpointing,
        "loss": round(final, 4),
        "training_step_s": [round(seconds, 2) for seconds in spent],
        "training_peak_gib": round(trained_gib, 2),
        "denoising_step_s": round(time.monotonic() - started, 2),
        "denoising_peak_gib": round(drawing.peak_gib(), 2),
    }
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print(json.dumps(facts))
    return int(trained_gib > options.at_most_gib)


def _batch(count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    layout = np.full((count, *shape), 4, np.uint8)
    middle = (slice(None), *(slice(size // 4, 3 * size // 4) for size in shape))
    layout[middle] = 1
    layout[(slice(None), *(slice(size // 2, size // 2 + 4) for size in shape))] = 5
    return {
        "hu": rng.integers(-1000, 400, (count, *shape), np.int16),
        "layout": layout,
        "box": np.full((count, 2 * len(shape)), -1, np.int16),
        "ratings": np.zeros((count, 4, 9), np.uint8),
        "position": np.arange(count),
    }


def _denoise_once(
    config: Any, denoiser: Any, space: PixelSpace, batch: dict[str, Any], device: torch.device
) -> None:
    """One step of one sample, tissue outside the layout copied."""
    hu, layout = batch["hu"][0], batch["layout"][0]
    known = ~layout_hole(layout, config.model.layout_labels)
    engine = SamplingEngine(
        denoiser,
        NoiseSchedule.from_config(config.model),
        config.model.prediction_type,
        (1, *config.samples.shape),
        config.samples.size,
        1,
        space=space,
        feather_px=config.sampling.feather_px,
        device=device,
    )
    condition = Condition(layout, known_hu=hu, known_mask=known)
    steps = config.sampling.num_inference_steps
    engine.admit(SampleRequest("one", 0, condition, config.sampling.sampler, steps))
    engine.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


class _Meter:
    """Memory above what is held now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = memory_bytes("VmRSS")
            forget_peak()

    def peak_gib(self) -> float:
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else memory_bytes("VmHWM")
        return (peak - self.before) / GIB


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
