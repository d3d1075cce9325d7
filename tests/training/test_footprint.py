"""Counted training steps against real ones, and what is proposed where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raysynth.config import AutoencoderKLConfig, OfLatents, load_recipe, parse_recipe
from raysynth.errors import InputError
from raysynth.models.counting import Tally
from raysynth.training.build import fresh_network, objective_of
from raysynth.training.fitting import check_fits, need_of, what_fits
from raysynth.training.footprint import example_batch, training_footprint

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
VOLUMES = """
data: {samples: {kind: patches, size: 32, field_of_view_mm: 64}}
model:
  family: layout_diffusion
  channels: [16, 32]
  attention_levels: [false, true]
  num_res_blocks: 1
  num_head_channels: 16
  norm_num_groups: 8
training: {global_batch_size: 4, micro_batch_size: 2, open_shards: 2}
"""


def config_of(*overrides: str) -> Any:
    return parse_recipe(VOLUMES, name="volumes", overrides=overrides)


@pytest.mark.parametrize(
    "changes", [(), ("model.checkpointing=true",), ("training.precision=bf16",)]
)
def test_a_hollow_step_takes_the_memory_of_a_real_one(changes: tuple[str, ...]) -> None:
    config = config_of(*changes)
    objective: Any = objective_of(config, fresh_network(config, None), None)
    memory = Tally()
    for p in objective.module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: memory.disregard(p.grad))
    half = config.training.precision == "bf16"
    with memory:
        for tensor in objective.module.parameters():
            memory.disregard(tensor)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = objective.loss(objective.module, example_batch(config, 2), torch.device("cpu"))
        loss["loss"].backward()
    counted = training_footprint(config)
    assert counted.activation_bytes(2) == pytest.approx(memory.peak, rel=0.02)
    assert counted.num_parameters == sum(p.numel() for p in objective.module.parameters())


def test_activations_that_are_computed_twice_cost_arithmetic_and_save_memory() -> None:
    kept, twice = (training_footprint(config_of(f"model.checkpointing={x}")) for x in (0, 1))
    assert 1.2 * kept.flops < twice.flops < 1.4 * kept.flops  # 4 passes instead of 3
    assert twice.sample_bytes < 0.8 * kept.sample_bytes


SLOW = (
    "phantom_demo",
    "phantom_demo_kl",
    "phantom_text",
    "phantom_spade_gan",
    "phantom_inpaint",
    "phantom_pix2pix",
    "phantom_pix2pix3d",
    "lidc_vq_tiny",
)


@pytest.mark.parametrize(
    "name",
    [
        "phantom_semantic",
        "phantom_flow3d",
        "lidc_extractor_tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_every_family_can_be_counted(name: str) -> None:
    config = load_recipe(RECIPES / f"{name}.yaml")
    autoencoder = None
    if isinstance(config.model, OfLatents):
        autoencoder = load_recipe(RECIPES / f"{config.model.autoencoder.name}.yaml").model
        assert isinstance(autoencoder, AutoencoderKLConfig)
    found = training_footprint(config, autoencoder)
    assert found.flops > 0
    assert found.sample_bytes > 0
    assert 0 < found.num_trained <= found.num_parameters


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    config = config_of()
    need = need_of(config, None, 1e12)
    check_fits(config, None, need.total)
    with pytest.raises(InputError, match=r"this would fit: --set training.micro_batch_size=1"):
        check_fits(config, None, need.total - 1)
    assert what_fits(config, None, need.total) == ()
    # Where one sample is too much, activations are computed twice; then it takes a smaller patch.
    one = need_of(config_of("training.micro_batch_size=1"), None, 1e12).total
    assert what_fits(config, None, one - 1) == (
        "model.checkpointing=true",
        "training.micro_batch_size=1",
    )
    twice = need_of(
        config_of("training.micro_batch_size=1", "model.checkpointing=true"), None, 1e12
    ).total
    smaller = what_fits(config, None, twice - 1)
    assert smaller is not None
    assert "data.samples.size=16" in smaller
    assert "data.samples.field_of_view_mm=32.0" in smaller
    with pytest.raises(InputError, match="take GPUs with more memory"):
        check_fits(config, None, 1e6)
