"""Writes a model of slices as folders that diffusers' own `from_pretrained` loads.

Networks of MONAI's are rebuilt as those of diffusers that compute the same. What turns requests
into channels and tokens is raysynth's own, and lies beside them in `conditioner.safetensors`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raysynth.config import ExperimentConfig
from raysynth.config.model import DiffusionConfig
from raysynth.errors import InputError
from raysynth.export.bundle import release, write_folder_passport
from raysynth.models.autoencoder import Autoencoder
from raysynth.models.bundle import Bundle
from raysynth.models.denoiser import (
    InpaintingDenoiser,
    LatentDenoiser,
    LayoutDenoiser,
    StableDenoiser,
    TextDenoiser,
)
from raysynth.models.facts import model_card
from raysynth.models.monai import AutoencoderKL

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
    bundle, audit, metrics = release(config, folder, without_audit)
    _check(bundle)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        parts = tuple(_save(bundle, scratch))
        facts = bundle.facts.model_copy(update={"metrics": metrics, "audit": audit})
        (scratch / "README.md").write_text(model_card(facts, folder.name), encoding="utf-8")
        write_folder_passport(scratch, config, facts, bundle.digest)
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
    if bundle.autoencoder is not None:
        _vae(bundle.autoencoder, bundle.latent_scale).save_pretrained(folder / "vae")
        yield "vae"
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
    own = {
        name: weights.contiguous()
        for name, weights in denoiser.state_dict().items()
        if not name.startswith("unet.")
    }
    if own:
        save_file(own, folder / CONDITIONER)
        yield CONDITIONER


def scheduler(config: DiffusionConfig) -> Any:
    """Diffusers' scheduler with the noise that a model was trained on."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if config.schedule == "rectified_flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
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


def _vae(autoencoder: Autoencoder, latent_scale: float) -> Any:
    """Diffusers' autoencoder; ours is one already unless MONAI built it."""
    network = getattr(autoencoder, "network")  # noqa: B009 - of every kind, not of their base
    if isinstance(network, AutoencoderKL):
        network = converted_autoencoder(network)
    network.register_to_config(scaling_factor=latent_scale)
    return network


def converted_autoencoder(network: AutoencoderKL) -> Any:
    """MONAI's AutoencoderKL of slices, without attention, as diffusers'.

    diffusers has more residual blocks: two in the middle, and one more at each level of the
    decoder. Those add nothing here, since their last convolution is zero.
    """
    from diffusers import AutoencoderKL as DiffusersKL

    encoder, decoder = network.encoder, network.decoder
    levels, blocks = len(encoder.channels), set(encoder.num_res_blocks)
    assert len(blocks) == 1, blocks
    converted: Any = DiffusersKL(  # type: ignore[no-untyped-call]
        in_channels=encoder.in_channels,
        out_channels=decoder.out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(encoder.channels),
        layers_per_block=blocks.pop(),
        latent_channels=network.latent_channels,
        norm_num_groups=encoder.norm_num_groups,
        mid_block_add_attention=False,
    )
    for module in converted.modules():
        if module.__class__.__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    own = dict(network.state_dict())
    weights: dict[str, Tensor] = converted.state_dict()
    for side, half in (("encoder", encoder), ("decoder", decoder)):
        for number, name in enumerate(_places(half, side)):
            prefix = f"{side}.blocks.{number}."
            for key in [key for key in own if key.startswith(prefix)]:
                inner = key.removeprefix(prefix)
                inner = inner.removeprefix("conv.") if name.startswith("conv_") else _renamed(inner)
                weights[f"{side}.{name}{inner}"] = own.pop(key)
    for kind in ("weight", "bias"):
        pair = [own.pop(f"quant_conv_{half}.conv.{kind}") for half in ("mu", "log_sigma")]
        weights[f"quant_conv.{kind}"] = torch.cat(pair)
        weights[f"post_quant_conv.{kind}"] = own.pop(f"post_quant_conv.conv.{kind}")
        # diffusers' encoder gives twice as many channels, of which the second half is not read.
        last = weights[f"encoder.conv_out.{kind}"]
        weights[f"encoder.conv_out.{kind}"] = torch.cat([last, torch.zeros_like(last)])
    read = weights["quant_conv.weight"]
    weights["quant_conv.weight"] = torch.cat([read, torch.zeros_like(read)], dim=1)
    assert not own, sorted(own)
    converted.load_state_dict(weights)
    return converted.eval()


def _places(half: Any, side: str) -> Iterator[str]:
    """Where each block of one half of MONAI's autoencoder stands in diffusers'."""
    level, resnet = 0, 0
    kind, changes = ("down", "downsamplers") if side == "encoder" else ("up", "upsamplers")
    last = len(half.blocks) - 1
    for number, block in enumerate(half.blocks):
        match block.__class__.__name__:
            case "AEKLResBlock":
                yield f"{kind}_blocks.{level}.resnets.{resnet}."
                resnet += 1
            case "AEKLDownsample" | "UpSample":
                yield f"{kind}_blocks.{level}.{changes}.0."
                level, resnet = level + 1, 0
            case "GroupNorm":
                yield "conv_norm_out."
            case _:
                yield {0: "conv_in.", last: "conv_out."}[number]


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
    ("nin_shortcut.", "conv_shortcut."),
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
