"""Folders of pretrained weights as people have them, of the published classes but tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raysynth.case import ATTRIBUTES, SCORE_RANGES
from raysynth.prompt import write_prompt

MAX_TOKENS = 77
TINY_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "sample_size": 8,
}
TINY_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def vq_folder(path: Path, **changes: Any) -> Path:
    """CompVis' VQModel: three channels in and out, 4 times smaller latents."""
    torch.manual_seed(0)
    VQModel(**TINY_AUTOENCODER | {"num_vq_embeddings": 32} | changes).save_pretrained(path)
    return path


def stable_diffusion_folder(path: Path, **scheduler: Any) -> Path:
    """A StableDiffusionPipeline; keywords change its scheduler's configuration."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    noise |= {"clip_sample": False, "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**TINY_AUTOENCODER, latent_channels=4),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**TINY_UNET),
        scheduler=DDIMScheduler(**noise | scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    return path


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary was learned from our prompts."""
    rng = np.random.default_rng(0)
    prompts = [
        write_prompt(
            [int(rng.integers(1, SCORE_RANGES[name][1] + 1)) for name in ATTRIBUTES],
            float(rng.uniform(1, 99)),
            "left lung",
            rng=rng,
        ).lower()
        for _ in range(500)
    ]
    # As CLIP's: the end of a word belongs to its last piece, and digits stand alone.
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Whitespace()]
    )
    learner.train_from_iterator(
        prompts,
        trainers.BpeTrainer(
            vocab_size=800,
            end_of_word_suffix="</w>",
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def edit_json(path: Path, **changes: Any) -> None:
    """Changes values of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in values.items() if v is not None}))
