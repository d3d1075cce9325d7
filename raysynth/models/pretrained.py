"""Networks with the weights of a diffusers folder, and low-rank updates of them.

The folder's JSON files have been judged before (`raysynth.config.pretrained`). Loading runs no
code: classes are named here and not by the folder, and weights come from safetensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from raysynth.config.model import FromFolder, PretrainedAutoencoderConfig, StableDiffusionConfig
from raysynth.config.pretrained import TEXT_WEIGHTS, TOKENIZER_FILES, WEIGHTS
from raysynth.errors import InputError
from raysynth.models.autoencoder import Autoencoder, diffusers_class, of_diffusers
from raysynth.models.bundle import files_digest
from raysynth.models.denoiser import StableDenoiser
from raysynth.models.text import clip_tokens
from raysynth.prompt import longest_prompt

ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]
"""Layers that low-rank updates are for: every projection of the attention."""


def check_folder(config: FromFolder) -> None:
    """Makes sure that the folder of pretrained weights can be trained on.

    Raises:
        InputError: it is not there, or our prompts are too long for it.
    """
    if not config.is_known or not config.pretrained.is_dir():
        raise InputError(
            f"model.pretrained {config.pretrained}: no such folder; give a diffusers folder of "
            "pretrained weights (raysynth downloads none)"
        )
    if isinstance(config, StableDiffusionConfig):
        tokenizer = pretrained_tokenizer(config)
        longest = longest_prompt(lambda words: sum(tokenizer.encode(words).attention_mask))
        clip_tokens(tokenizer, [longest])


def weights_digest(config: FromFolder) -> str:
    """SHA-256 over what is loaded from the folder."""
    files = [WEIGHTS]
    if isinstance(config, StableDiffusionConfig):
        tokenizer = (f"tokenizer/{name}" for name in (*TOKENIZER_FILES, "tokenizer_config.json"))
        files = [f"unet/{WEIGHTS}", f"text_encoder/{TEXT_WEIGHTS}", *tokenizer]
    return files_digest(config.pretrained, files)


def pretrained_autoencoder(config: PretrainedAutoencoderConfig) -> Autoencoder:
    """The folder's autoencoder.

    Raises:
        InputError: the weights are damaged, or do not fit their config.json.
    """
    return of_diffusers(_load(diffusers_class(config), config.pretrained))


def pretrained_denoiser(config: StableDiffusionConfig) -> StableDenoiser:
    """The folder's U-Net behind its text encoder; for `tuning: lora` with fresh updates, all zero.

    Raises:
        InputError: the weights are damaged, or do not fit their config.json.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = _load(UNet2DConditionModel, config.pretrained / "unet")
    if config.tuning == "lora":
        unet = with_updates(unet, config.lora_rank)
    text_encoder = _load(CLIPTextModel, config.pretrained / "text_encoder")
    return StableDenoiser(unet, text_encoder, pretrained_tokenizer(config))


def pretrained_tokenizer(config: StableDiffusionConfig) -> Tokenizer:
    """The folder's tokenizer, filling up to its `model_max_length` and cutting nothing off."""
    from transformers import CLIPTokenizer

    folder = config.pretrained / "tokenizer"
    try:
        whole = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its readers raise what they like
        raise InputError(f"{folder} cannot be read ({_line(error)}): copy it again") from error
    tokenizer = Tokenizer.from_str(whole.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    positions = config.networks["text_encoder"].get("max_position_embeddings", 77)
    tokenizer.enable_padding(
        length=min(whole.model_max_length, positions),
        pad_id=whole.pad_token_id,
        pad_token=whole.pad_token,
    )
    return tokenizer


def finished_weights(
    config: StableDiffusionConfig, trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All weights of a fine-tuned model, low-rank updates added to what they update.

    So whoever loads them needs neither the folder nor peft, and draws as fast as before.

    Args:
        config: of the model; its folder gives what was not trained.
        trained: the trained weights, by their names in `pretrained_denoiser`.
    """
    denoiser = pretrained_denoiser(config)
    denoiser.load_state_dict(denoiser.state_dict() | dict(trained), strict=False)
    if config.tuning == "lora":
        denoiser.unet = denoiser.unet.merge_and_unload()
    return denoiser.state_dict()


def with_updates(unet: Any, rank: int) -> Any:
    """The U-Net, its weights frozen, with W + B A instead of W (Hu et al. 2022, eq. 3); B is 0."""
    from peft import LoraConfig, get_peft_model

    updates = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ADAPTED
    )
    return get_peft_model(unet, updates)


def _load(network: Any, folder: Path) -> Any:
    try:
        loaded, found = network.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} does not load as {network.__name__} ({_line(error)}): copy it again"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"{folder} does not load as {network.__name__}: {len(missing)} weights such as "
            f"{missing[0]} are missing; its config.json and weights do not belong together"
        )
    return loaded


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
