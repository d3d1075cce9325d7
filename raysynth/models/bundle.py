"""A bundle: the folder that holds a trained model and the facts about it.

`bundle.json` (the facts), `autoencoder.safetensors` (not for models of pixels),
`denoiser.safetensors`, `generator.safetensors` or `encoder.safetensors` (diffusion models, GANs and
extractors; EMA weights), `tokenizer.json` (of Stable Diffusion) and `card.md`. Loading one runs no
code, needs nothing from outside the folder, and other files in it are never opened.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from raysynth.case import Intensity
from raysynth.config.data import Samples
from raysynth.config.model import (
    Diffusion,
    DiffusionConfig,
    ExtractorConfig,
    Gan,
    GanConfig,
    ModelConfig,
    StableDiffusionConfig,
    Window,
)
from raysynth.errors import InputError
from raysynth.models.autoencoder import Autoencoder, build_autoencoder
from raysynth.models.denoiser import Denoiser, build_denoiser
from raysynth.models.encoder import Encoder
from raysynth.models.facts import AUTOENCODER, DENOISER, SCHEMA, BundleFacts, model_card
from raysynth.models.gan import Generator, build_generator
from raysynth.models.space import LatentSpace, PixelSpace, Space

FACTS, CARD, TOKENIZER = "bundle.json", "card.md", "tokenizer.json"
GENERATOR, ENCODER = "generator.safetensors", "encoder.safetensors"


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        facts: what `bundle.json` says.
        autoencoder: with its weights, in evaluation mode; None for a model of pixels.
        denoiser: likewise; None but for diffusion models.
        generator: likewise; None but for GANs.
        encoder: likewise; None but for extractors.
        tokenizer: likewise; None but for Stable Diffusion.
        digest: names the bundle: SHA-256 over its files, in hex.
    """

    facts: BundleFacts
    autoencoder: Autoencoder | None
    denoiser: Denoiser | None
    generator: Generator | None
    encoder: Encoder | None
    tokenizer: Tokenizer | None
    digest: str

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.facts.model

    @property
    def diffusion(self) -> DiffusionConfig:
        """The configuration of a diffusion model."""
        assert isinstance(self.facts.model, Diffusion)
        return self.facts.model

    @property
    def gan(self) -> GanConfig:
        """The configuration of a GAN."""
        assert isinstance(self.facts.model, Gan)
        return self.facts.model

    @property
    def window_hu(self) -> Window:
        """HU that the networks see as -1 and 1."""
        return self.facts.window_hu

    @property
    def latent_scale(self) -> float:
        """Factor on the autoencoder's latents; divide by it before decoding."""
        return self.facts.latent_scale

    @property
    def space(self) -> Space:
        """Where the denoiser works."""
        if self.autoencoder is None:
            return PixelSpace(self.window_hu)
        return LatentSpace(self.autoencoder, self.latent_scale, self.window_hu)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, *latent) of what is denoised: latents, or the image itself."""
        return self.facts.latent_shape

    @property
    def samples(self) -> Samples:
        """How the training images were cut."""
        return self.facts.samples

    @property
    def intensity(self) -> Intensity:
        """Whether images are in Hounsfield units."""
        return self.facts.intensity

    @property
    def snapshot(self) -> str:
        """Store snapshot of the training samples."""
        return self.facts.snapshot


def save_bundle(
    path: Path,
    facts: BundleFacts,
    autoencoder: Mapping[str, Tensor] | None = None,
    denoiser: Mapping[str, Tensor] | None = None,
    generator: Mapping[str, Tensor] | None = None,
    encoder: Mapping[str, Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Writes a bundle, whole or not at all; an older one at `path` is replaced.

    Args:
        path: the bundle's folder; its name becomes the card's title.
        facts: what to say about it.
        autoencoder: the autoencoder's `state_dict`; None for a model of pixels, or an extractor.
        denoiser: a diffusion model's (averaged) `state_dict`.
        generator: a GAN's.
        encoder: an extractor's.
        tokenizer: Stable Diffusion's.

    Returns:
        The bundle's digest.
    """
    assert (denoiser is not None) == isinstance(facts.model, Diffusion)
    assert (generator is not None) == isinstance(facts.model, Gan)
    assert (encoder is not None) == isinstance(facts.model, ExtractorConfig)
    assert (tokenizer is not None) == isinstance(facts.model, StableDiffusionConfig)
    assert (autoencoder is not None) == (facts.autoencoder_config is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}-*"):  # of a killed writer
        shutil.rmtree(leftover)
    scratch = path.with_name(f".{path.name}-{uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        (scratch / FACTS).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (scratch / CARD).write_text(model_card(facts, path.name), encoding="utf-8")
        files = {
            AUTOENCODER: autoencoder,
            DENOISER: denoiser,
            GENERATOR: generator,
            ENCODER: encoder,
        }
        for name, weights in files.items():
            if weights is not None:
                _save_weights(scratch / name, weights)
        if tokenizer is not None:
            tokenizer.save(str(scratch / TOKENIZER))
        digest = bundle_digest(scratch)
        if path.exists():
            # A folder cannot be renamed over a full one: for an instant there is none.
            retired = scratch.with_name(f"{scratch.name}-old")
            path.rename(retired)
            scratch.rename(path)
            shutil.rmtree(retired)
        else:
            scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return digest


def load_bundle(path: Path) -> Bundle:
    """Reads a bundle and rebuilds its networks on the CPU.

    Raises:
        InputError: no bundle there, of an unknown schema, incomplete, or not matching its facts.
    """
    facts = read_facts(path)
    autoencoder, denoiser, generator, encoder, tokenizer = (None,) * 5
    if facts.autoencoder_config is not None:
        autoencoder = build_autoencoder(facts.autoencoder_config, facts.spatial_dims)
        _load_weights(autoencoder, path, AUTOENCODER)
    if isinstance(facts.model, Diffusion):
        channels, size, *_ = facts.latent_shape
        if isinstance(facts.model, StableDiffusionConfig):
            tokenizer = load_tokenizer(path)
        denoiser = build_denoiser(facts.model, channels, size, tokenizer, facts.spatial_dims)
        _load_weights(denoiser, path, DENOISER)
    if isinstance(facts.model, Gan):
        generator = build_generator(facts.model, facts.samples.size, facts.spatial_dims)
        _load_weights(generator, path, GENERATOR)
    if isinstance(facts.model, ExtractorConfig):
        encoder = Encoder(facts.model)
        _load_weights(encoder, path, ENCODER)
    digest = bundle_digest(path)
    return Bundle(facts, autoencoder, denoiser, generator, encoder, tokenizer, digest)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a bundle of Stable Diffusion, without its weights.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        text = (path / TOKENIZER).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"bundle {path}: no {TOKENIZER} there; copy the whole folder") from error
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library has no class of its own for what it cannot read
        raise InputError(f"bundle {path}: {TOKENIZER} is damaged; copy it again") from error


def read_facts(path: Path) -> BundleFacts:
    """What a bundle says about itself, without its weights.

    Raises:
        InputError: no bundle there, or of an unknown schema.
    """
    try:
        values: Any = json.loads((path / FACTS).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"bundle {path}: no {FACTS} there; train the model first") from error
    except ValueError as error:
        raise InputError(f"bundle {path}: {FACTS} is no JSON; train the model again") from error
    schema = values.get("schema_version") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f"bundle {path}: schema_version {schema!r}, but this raysynth reads {SCHEMA!r}; "
            "use the version that wrote it"
        )
    try:
        return BundleFacts.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"bundle {path}: {FACTS}: {place}: {problem['msg']}") from error


def bundle_digest(path: Path) -> str:
    """SHA-256 over names and bytes of the bundle's own files."""
    return files_digest(path, (FACTS, CARD, DENOISER, GENERATOR, ENCODER, AUTOENCODER, TOKENIZER))


def files_digest(path: Path, names: Iterable[str]) -> str:
    """SHA-256 over names and bytes of those files that are there, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(names):
        if (path / name).exists():
            with (path / name).open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            digest.update(name.encode() + b"\0" + content.digest())
    return digest.hexdigest()


def _save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)


def _load_weights(network: nn.Module, path: Path, name: str) -> None:
    """Fills a network from the file of that name, refusing what does not match in every tensor."""
    try:
        weights = load_file(path / name)
    except OSError as error:
        raise InputError(f"bundle {path}: no {name} there; copy the whole folder") from error
    except SafetensorError as error:
        raise InputError(f"bundle {path}: {name} is damaged ({error}); copy it again") from error
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if found != expected:
        key = min(key for key in expected | found if expected.get(key) != found.get(key))
        raise InputError(
            f"bundle {path}: {name} does not fit {FACTS}: {key} has shape "
            f"{found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
        )
    network.load_state_dict(weights)
    network.eval()
