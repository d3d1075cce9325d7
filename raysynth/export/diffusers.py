"""Writes a model of slices as folders that diffusers' own `from_pretrained` loads.

U-Nets of MONAI's are rebuilt as those of diffusers that compute the same. Its autoencoder cannot
be: it has no activation before the last convolution of either half. That one, and what turns
requests into channels and tokens, lie beside them as raysynth's own weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor

from raysynth.config import ExperimentConfig
from raysynth.config.model import DiffusionConfig
from raysynth.errors import InputError
from raysynth.export.bundle import released, write_model_passport
from raysynth.models.autoencoder import DiffusersKLAutoencoder, VQAutoencoder
from raysynth.models.bundle import Bundle
from raysynth.models.denoiser import (
    InpaintingDenoiser,
    LatentDenoiser,
    LayoutDenoiser,
    StableDenoiser,
    TextDenoiser,
)
from raysynth.models.facts import AUTOENCODER, model_card

CONDITIONER = "conditioner.safetensors"

_CONVERTED = (InpaintingDenoiser, LatentDenoiser, LayoutDenoiser, StableDenoiser, TextDenoiser)


@dataclass(frozen=True)
class DiffusersRelease:
    """What was written.

    Attributes:
        folder: of the model.
        parts: what is in it.
        bundle: digest of what it was made from.
        audit: what its card says of the privacy audit.
    """

    folder: str
    parts: tuple[str, ...]
    bundle: str
    audit: str


def export_diffusers(
    config: ExperimentConfig, folder: Path, without_audit: str | None = None
) -> DiffusersRelease:
    """Writes the model that drew the recipe's run, which has been evaluated and audited.

    Args:
        config: the recipe.
        folder: a new one; its name becomes the card's title.
        without_audit: why it may leave without a passing audit.

    Raises:
        Refused: no passing audit of the run, and no reason.
        InputError: no run or no bundle, no evaluation, a folder that is there already, or a model
            that diffusers does not know.
    """
    bundle, audit, metrics = released(config, folder, without_audit)
    _check(bundle)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        parts = tuple(_save(bundle, scratch))
        facts = bundle.facts.model_copy(update={"metrics": metrics, "audit": audit})
        (scratch / "README.md").write_text(model_card(facts, folder.name), encoding="utf-8")
        write_model_passport(scratch, config, facts, bundle.digest)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return DiffusersRelease(str(folder), parts, bundle.digest, audit)


def _check(bundle: Bundle) -> None:
    if bundle.facts.spatial_dims != 2 or not isinstance(bundle.denoiser, _CONVERTED):
        kind = "volumes" if bundle.facts.spatial_dims != 2 else "slices"
        raise InputError(
            f"--format diffusers: diffusers has no network for a {bundle.config.family} of {kind}; "
            "recipes of latent_diffusion, text_diffusion, stable_diffusion, inpainting and "
            "layout_diffusion for slices can be written"
        )


def _save(bundle: Bundle, folder: Path) -> Iterator[str]:
    """Writes the parts and tells their names."""
    denoiser = bundle.denoiser
    if isinstance(bundle.autoencoder, DiffusersKLAutoencoder | VQAutoencoder):
        network: Any = bundle.autoencoder.network
        network.register_to_config(scaling_factor=bundle.latent_scale)
        network.save_pretrained(folder / "vae")
        yield "vae"
    elif bundle.autoencoder is not None:
        _save_own(dict(bundle.autoencoder.state_dict()), folder / AUTOENCODER)
        yield AUTOENCODER
    scheduler(bundle.diffusion).save_pretrained(folder / "scheduler")
    yield "scheduler"
    if isinstance(denoiser, StableDenoiser):
        denoiser.unet.save_pretrained(folder / "unet")
        denoiser.text_encoder.save_pretrained(folder / "text_encoder")
        (folder / "tokenizer").mkdir()
        denoiser.tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
        yield from ("unet", "text_encoder", "tokenizer")
        return
    assert denoiser is not None
    converted_unet(denoiser.unet, bundle.facts.latent_shape[-1]).save_pretrained(folder / "unet")
    yield "unet"
    weights = dict(denoiser.state_dict())
    own = {name: one for name, one in weights.items() if not name.startswith("unet.")}
    if own:
        _save_own(own, folder / CONDITIONER)
        yield CONDITIONER


def _save_own(weights: dict[str, Tensor], path: Path) -> None:
    save_file({name: one.contiguous() for name, one in weights.items()}, path)


def scheduler(config: DiffusionConfig) -> Any:
    """Diffusers' scheduler with the noise that a model was trained on."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if config.schedule == "rectified_flow":
        flow: Any = FlowMatchEulerDiscreteScheduler
        return flow(num_train_timesteps=config.num_train_timesteps)
    name, start, end = {
        "linear": ("linear", 1e-4, 0.02),
        "scaled_linear": ("scaled_linear", 0.00085, 0.012),
        "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
    }[config.schedule]
    return DDIMScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=name,
        beta_start=start,
        beta_end=end,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def converted_unet(unet: Any, size: int) -> Any:
    """MONAI's DiffusionModelUNet of slices as diffusers' U-Net, with or without cross-attention.

    Args:
        unet: MONAI's.
        size: cells along a side, for the record.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    crosses = unet.with_conditioning
    attends = list(unet.attention_levels)
    attention = "CrossAttn" if crosses else "Attn"
    kinds = [attention if one else "" for one in attends]
    shape: dict[str, Any] = {
        "sample_size": size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": tuple(unet.block_out_channels),
        "layers_per_block": unet.num_res_blocks[0],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "norm_num_groups": unet.out[0].num_groups,
        "norm_eps": unet.out[0].eps,
    }
    own = {_renamed(key): weights for key, weights in unet.state_dict().items()}
    if crosses:
        # What diffusers calls the dimension of heads is their number.
        heads = [
            channels // width
            for channels, width in zip(unet.block_out_channels, unet.num_head_channels, strict=True)
        ]
        context = own["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        classes = getattr(unet, "class_embedding", None)
        converted: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
            **shape,
            attention_head_dim=tuple(heads),
            cross_attention_dim=context,
            class_embed_type=None if classes is None else "simple_projection",
            projection_class_embeddings_input_dim=None if classes is None else classes.in_features,
        )
    else:
        [width] = set(unet.num_head_channels)
        # Attention alone stands there without a transformer around it.
        own = {_unwrapped(key): weights for key, weights in own.items()}
        converted = UNet2DModel(**shape, attention_head_dim=width)  # type: ignore[no-untyped-call]
    converted.load_state_dict(own)
    return converted.eval()


_NAMES = (
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("middle_block.resnet_1.", "mid_block.resnets.0."),
    ("middle_block.resnet_2.", "mid_block.resnets.1."),
    ("middle_block.attention.", "mid_block.attentions.0."),
    ("downsampler.op.", "downsamplers.0.conv."),
    ("upsampler.postconv.", "upsamplers.0.conv."),
    ("postconv.", "conv."),
    ("skip_connection.", "conv_shortcut."),
    ("ff.linear1.", "ff.net.0.proj."),
    ("ff.linear2.", "ff.net.2."),
    ("out_proj.", "to_out.0."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
)


def _unwrapped(key: str) -> str:
    """Diffusers' name of a weight of attention without context."""
    if ".attentions." not in key:
        return key
    return key.replace(".attn.", ".").replace(".norm.", ".group_norm.")


def _renamed(key: str) -> str:
    """Diffusers' name of a weight; MONAI wraps convolutions once more."""
    if key.endswith((".conv.weight", ".conv.bias")):
        key = key.replace(".conv.", ".")
    for monai, other in _NAMES:
        if key.startswith(monai) or f".{monai}" in key:
            key = key.replace(monai, other)
    return key
