"""Encodes a sample set with a trained autoencoder, once, so that training reads latents."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from raysynth.config import ExperimentConfig, OfLatents, PretrainedAutoencoderConfig
from raysynth.data.units import write_units
from raysynth.errors import InputError
from raysynth.models.bundle import Bundle, load_bundle
from raysynth.seeding import fingerprint
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.run import StoreRun
from raysynth.store.writer import create_sample_set, write_rows
from raysynth.window import normalize
from storage_schema.v1 import latents

BATCH_SIZE, BATCH_PIXELS = 16, 2**22
"""Samples in one call of the encoder, and pixels of all of them: two volumes of 128^3."""

SCALE_SAMPLES = 128
"""Training samples from which the latents' spread is measured."""


@dataclass(frozen=True)
class EncodeSummary:
    """What a set of latents has.

    Attributes:
        samples: encoded, all of the set.
        latent_shape: (c, *latent) of one of them.
        latent_scale: what networks see is times this: 1 / standard deviation over training
            samples, or the factor published with the autoencoder.
        seconds: wall time; next to nothing if the latents were there already.
        snapshot: of the store that has them all.
    """

    samples: int
    latent_shape: tuple[int, ...]
    latent_scale: float
    seconds: float
    snapshot: str


@dataclass(frozen=True)
class _Encoder:
    """Encodes the rows of a shard. Each actor has a copy, and loads the bundle once."""

    bundle_path: Path
    use_gpu: bool

    @cached_property
    def bundle(self) -> Bundle:
        return load_bundle(self.bundle_path)

    def __call__(self, root: zarr.Group, rows: tuple[str, str, int, int]) -> None:
        source, target, start, stop = rows
        hu = SampleSet(open_group(root, source)).read("hu", start, stop)
        write_rows(open_group(root, target), start, {"latents": self.encode(hu)})

    def encode(self, hu: NDArray[np.int16]) -> NDArray[np.float16]:
        """Unscaled latents (n, c, *latent) of images (n, *spatial)."""
        device = torch.device("cuda" if self.use_gpu else "cpu")
        assert self.bundle.autoencoder is not None
        autoencoder = self.bundle.autoencoder.to(device)
        encoded = []
        size = max(1, min(BATCH_SIZE, BATCH_PIXELS // hu[0].size))
        with torch.inference_mode():
            for batch in np.split(hu, range(size, len(hu), size)):
                images = torch.from_numpy(normalize(batch, self.bundle.window_hu)[:, None])
                encoded.append(autoencoder.encode(images.to(device)).half().cpu().numpy())
        return np.concatenate(encoded)


def encode(config: ExperimentConfig) -> EncodeSummary:
    """Encodes the recipe's sample set with its autoencoder, unless the store has the latents.

    Raises:
        InputError: the recipe's model needs no latents; there is no sample set or autoencoder, or
            the two do not fit.
    """
    started = time.monotonic()
    if not isinstance(config.model, OfLatents):
        raise InputError(
            f"model.family {config.model.family} is trained on images: only models of latents have "
            "something to encode"
        )
    encoder = _Encoder(config.autoencoder_path, config.training.use_gpu)
    name, snapshot = config.samples.name, main_snapshot(config.store_url)
    root = open_root(config.store_url, snapshot)
    samples = SampleSet(open_group(root, f"samples/{name}"))
    _check(config, encoder.bundle, samples)
    path = latents_path(config, encoder.bundle.digest)
    if root.get(path) is None:
        snapshot = _write(config, encoder, samples, path, snapshot)
    done = SampleSet(open_group(open_root(config.store_url, snapshot), path))
    return EncodeSummary(
        samples=done.count,
        latent_shape=done.shape,
        latent_scale=done.attrs["latent_scale"],
        seconds=time.monotonic() - started,
        snapshot=snapshot,
    )


def latents_path(config: ExperimentConfig, digest: str) -> str:
    """Group of the latents of the recipe's sample set by the autoencoder of that digest."""
    return f"latents/{config.samples.name}/{digest[:12]}"


def _check(config: ExperimentConfig, autoencoder: Bundle, samples: SampleSet) -> None:
    """The set must look as what the autoencoder was trained on."""
    trained_as = autoencoder.facts.autoencoder_config
    if trained_as is None:
        raise InputError(
            f"bundle {config.autoencoder_path} is a {autoencoder.config.family}, which has no "
            "latents: give model.autoencoder the bundle of an autoencoder"
        )
    factor = trained_as.downsampling
    for what, trained, given in (
        ("intensity", autoencoder.intensity, samples.attrs["intensity"]),
        ("pixel_mm", round(autoencoder.samples.pixel_mm, 6), round(samples.pixel_mm, 6)),
        ("size modulo its downsampling", 0, samples.shape[-1] % factor),
    ):
        if trained != given:
            raise InputError(
                f"autoencoder {config.autoencoder_path} wants {what} {trained}, samples "
                f"{config.samples.name!r} have {given}: train one on these samples"
            )


def _write(
    config: ExperimentConfig, encoder: _Encoder, samples: SampleSet, path: str, parent: str
) -> str:
    """Declares, fills and publishes the latents; returns the snapshot that has them."""
    digest = encoder.bundle.digest
    identity = fingerprint({"set": samples.attrs["fingerprint"], "path": path, "bundle": digest})
    with StoreRun(config.store_url, verb="encode", fingerprint=identity) as run:
        if run.is_new:
            # A few slices, in this process: the machine that drives may have no GPU.
            scale, shape = _measure(replace(encoder, use_gpu=False), samples)
            attributes = {"latent_scale": scale, "bundle": digest, "parent_snapshot": parent}
            spec = latents(samples.count, shape)

            def build(root: zarr.Group) -> None:
                create_sample_set(root, path, spec, attributes)

            run.declare(build, "latents planned")
        target = SampleSet(open_group(run.root, path))
        ranges = [target.shard_rows(number) for number in range(target.num_shards)]
        write_units(
            run,
            {f"rows-{start}": (samples.group.path, path, start, stop) for start, stop in ranges},
            # What this process has loaded stays here: an actor loads its own.
            _Encoder(encoder.bundle_path, encoder.use_gpu),
            stage="encode",
            noun="shards",
            num_actors=config.training.num_workers if encoder.use_gpu else _num_cores(),
            num_gpus=int(encoder.use_gpu),
        )
        return run.publish(f"{samples.count} latents in {path}")


def _measure(encoder: _Encoder, samples: SampleSet) -> tuple[float, tuple[int, ...]]:
    """1 / standard deviation of all latents of some training samples, and the shape of one.

    The factor of Rombach et al. 2022 (High-Resolution Image Synthesis with Latent Diffusion Models,
    appendix G), so that networks see latents of unit variance. A published factor stays.
    """
    rows = samples.training_rows()
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), SCALE_SAMPLES)).astype(int)]
    encoded = np.concatenate(list(_encode_rows(encoder, samples, chosen))).astype(np.float64)
    config = encoder.bundle.facts.autoencoder_config
    published = config.latent_scale if isinstance(config, PretrainedAutoencoderConfig) else None
    return published or float(1.0 / encoded.std()), encoded.shape[1:]


def _encode_rows(
    encoder: _Encoder, samples: SampleSet, rows: NDArray[np.int64]
) -> Iterator[NDArray[np.float16]]:
    for shard in np.unique(rows // samples.rows_per_shard).tolist():
        start, stop = samples.shard_rows(shard)
        inside = rows[(rows >= start) & (rows < stop)] - start
        yield encoder.encode(samples.read("hu", start, stop)[inside])


def _num_cores() -> int:
    import ray

    return int(ray.cluster_resources()["CPU"])  # type: ignore[no-untyped-call]
