"""Weights of other people's networks: files that a user names, read without running them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysynth.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


def named_file(path: Path | None, who: str, wanted: str, setting: str) -> Path:
    """The file of weights that something needs.

    Args:
        path: given for it; None: there is none.
        who: needs it.
        wanted: what file that would be, and where it comes from.
        setting: what shall name the file.

    Raises:
        InputError: there is none; the message says which is wanted.
    """
    if path is None or not path.is_file():
        found = f"{setting} is not set" if path is None else f"there is no file {path}"
        raise InputError(f"{who} needs {wanted}, but {found}: set {setting} to the file")
    return path


def digest_of(path: Path) -> str:
    """SHA-256 of a file in hex; its first eight digits are the version of what it holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version_of(path: Path) -> str:
    """The version that names of extractors carry, by the content of their file."""
    return digest_of(path)[:8]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that `torch.save` wrote.

    Nothing but tensors comes out: a pickle that would run code is refused. A state dict may lie
    under `state_dict`, and its names may begin with `module.`, as parallel training leaves them.

    Raises:
        InputError: it is neither.
    """
    import torch
    from safetensors.torch import load_file

    found: Any
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, wherever in the reader that is noticed
        raise InputError(
            f"{path} holds no weights that can be read ({type(error).__name__}): give a "
            ".safetensors file, or a state dict saved by torch.save"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no tensors by name: give the state dict of a network")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def fill(network: nn.Module, weights: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Puts weights into a network: all that it has, and nothing else.

    Raises:
        InputError: some are missing, left over or of another shape.
    """
    own = network.state_dict()
    # A count that only training reads; older files lack it.
    keys = {key for key in own.keys() | weights.keys() if not key.endswith("num_batches_tracked")}
    unfit = [
        key
        for key in sorted(keys)
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    ]
    if unfit:
        raise InputError(
            f"{path} is not of {name}: {len(unfit)} tensors are missing, left over or of another "
            f"shape, first {unfit[0]}: give weights of that network"
        )
    network.load_state_dict(weights, strict=False)
    network.eval().requires_grad_(False)
