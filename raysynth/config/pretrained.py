"""Folders of published weights, as diffusers writes them, judged by their JSON files alone.

Nothing here loads a weight: what cannot be used is refused before anything large is read. Weights
are taken from safetensors only; pickles run code when they are opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

Network = dict[str, Any]
"""A network's config.json."""

WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"

PICKLES = (".bin", ".ckpt", ".pt", ".pth")

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")

NO_OTHER_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim")
"""Settings by which a U-Net wants more than a timestep and a prompt."""

KNOWN_SCHEDULES = {
    # Those of `raysynth.diffusion.schedule.build_schedule`: first and last beta.
    "linear": ("linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "squaredcos_cap_v2": ("cosine", None, None),
}


def read_autoencoder(folder: Path) -> Network:
    """What config.json says of an autoencoder whose weights lie beside it.

    Raises:
        ValueError: it is something else, of the wrong number of channels, or has no safetensors.
    """
    network = _read_network(folder, ("VQModel", "AutoencoderKL"))
    into, out = network.get("in_channels", 3), network.get("out_channels", 3)
    if into != out or into not in (1, 3):
        raise ValueError(
            f"{folder} turns images of {into} channels into images of {out}: give an autoencoder "
            "of 1 or 3 channels"
        )
    moved = [name for name in ("shift_factor", "latents_mean") if network.get(name) is not None]
    if moved:
        raise ValueError(f"{folder} has a {moved[0]}, as no autoencoder of Stable Diffusion 1 or 2")
    _find_weights(folder, WEIGHTS)
    return network


def read_stable_diffusion(folder: Path) -> dict[str, Any]:
    """What the folder of a StableDiffusionPipeline says of its networks and of its noise.

    Returns:
        `networks`, `num_train_timesteps`, `schedule` and `prediction_type`.

    Raises:
        ValueError: a part is missing, another class, without safetensors, or does not fit another.
    """
    pipeline = _read_json(folder / "model_index.json").get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise ValueError(
            f"{folder} holds a {pipeline}: give a folder of Stable Diffusion 1 or 2, a "
            "StableDiffusionPipeline"
        )
    unet = _read_network(folder / "unet", ("UNet2DConditionModel",))
    text_encoder = _read_network(folder / "text_encoder", ("CLIPTextModel",))
    vae = read_autoencoder(folder / "vae")
    into, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if not into == out == latent_channels_of(vae):
        raise ValueError(
            f"{folder / 'unet'} takes {into} channels and returns {out}, but latents of its vae "
            f"have {latent_channels_of(vae)}: give a model that draws whole images from prompts"
        )
    width, told = text_encoder.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
    others = [name for name in NO_OTHER_INPUTS if unet.get(name) is not None]
    if width != told or others:
        wanted = others[0] if others else f"cross_attention_dim {told}"
        raise ValueError(
            f"{folder / 'unet'} wants {wanted}, but its text_encoder gives {width} numbers a token "
            "and nothing else: this is not Stable Diffusion 1 or 2"
        )
    _find_weights(folder / "unet", WEIGHTS)
    _find_weights(folder / "text_encoder", TEXT_WEIGHTS)
    _check_tokenizer(folder / "tokenizer", text_encoder.get("max_position_embeddings", 77))
    networks = {"unet": unet, "text_encoder": text_encoder, "vae": vae}
    return {"networks": networks, **_read_noise(folder / "scheduler")}


def downsampling_of(network: Network) -> int:
    """Factor by which a network's deepest level is smaller than its input, per axis."""
    return int(2 ** (len(network["block_out_channels"]) - 1))


def latent_channels_of(network: Network) -> int:
    """Channels of an autoencoder's latents."""
    if network["_class_name"] == "VQModel":
        return int(network.get("vq_embed_dim") or network.get("latent_channels", 3))
    return int(network.get("latent_channels", 4))


def latent_scale_of(network: Network) -> float | None:
    """The published factor on latents of an AutoencoderKL, which its U-Net is used to."""
    if network["_class_name"] == "VQModel":
        return None
    return float(network.get("scaling_factor", 0.18215))


def _read_noise(folder: Path) -> dict[str, Any]:
    """The noise that a U-Net was trained with, by the names of our recipes."""
    path = folder / "scheduler_config.json"
    said = _read_json(path)
    asked = said.get("beta_schedule", "linear")
    schedule, *betas = KNOWN_SCHEDULES.get(asked, (None,))
    given = said.get("beta_start", 1e-4), said.get("beta_end", 0.02)
    special = [name for name in ("trained_betas", "rescale_betas_zero_snr") if said.get(name)]
    same = all(b is None or math.isclose(b, g) for b, g in zip(betas, given, strict=False))
    if schedule is None or special or not same:
        raise ValueError(
            f"{path}: beta_schedule {asked} from {given[0]} to {given[1]}"
            f"{''.join(f' with {name}' for name in special)} is unknown here; known are linear "
            "from 0.0001 to 0.02, scaled_linear from 0.00085 to 0.012, and squaredcos_cap_v2"
        )
    predicted = said.get("prediction_type", "epsilon")
    if predicted not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"{path}: prediction_type {predicted!r} is unknown here; known are epsilon, sample and "
            "v_prediction"
        )
    return {
        "num_train_timesteps": int(said.get("num_train_timesteps", 1000)),
        "schedule": schedule,
        "prediction_type": predicted,
    }


def _check_tokenizer(folder: Path, positions: int) -> None:
    said = _read_json(folder / "tokenizer_config.json")
    kind = str(said.get("tokenizer_class", "CLIPTokenizer"))
    if kind.removesuffix("Fast") != "CLIPTokenizer":
        raise ValueError(f"{folder} is a {kind}: Stable Diffusion 1 and 2 have a CLIPTokenizer")
    whole, *pieces = (folder / name for name in TOKENIZER_FILES)
    if not whole.exists() and not all(piece.exists() for piece in pieces):
        raise ValueError(f"{folder} has no vocab.json and merges.txt: copy the whole folder")
    longest = said.get("model_max_length", positions)
    if longest > positions:
        raise ValueError(
            f"{folder} has a model_max_length of {longest}, but the text_encoder reads {positions} "
            "tokens: they do not belong together"
        )


def _read_network(folder: Path, classes: Collection[str]) -> Network:
    """A part's config.json, refused where it is of none of the classes."""
    said = _read_json(folder / "config.json")
    # diffusers writes the one, transformers the other.
    found = said.get("_class_name") or next(iter(said.get("architectures") or ()), "nothing known")
    if found not in classes:
        raise ValueError(f"{folder} holds {found}: a {' or '.join(classes)} is needed there")
    # What else begins so are versions, and paths of whoever wrote it.
    kept = {name: value for name, value in said.items() if not name.startswith("_")}
    return {**kept, "_class_name": found}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no {path.name} in {path.parent}: copy the whole folder") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: copy it again") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no JSON object: copy it again")
    return said


def _find_weights(folder: Path, name: str) -> None:
    if (folder / name).exists():
        return
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which could run any code: "
            f"give them as safetensors, {name}"
        )
    raise ValueError(f"no {name} in {folder}: copy the whole folder")
