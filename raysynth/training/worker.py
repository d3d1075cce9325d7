"""From a recipe to a bundle, as one worker does it; knows nothing of Ray."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn

from raysynth.config import (
    ExperimentConfig,
    FromFolder,
    OfLatents,
    PretrainedAutoencoderConfig,
    StableDiffusionConfig,
    VQVAEConfig,
)
from raysynth.config.model import AutoencoderConfig
from raysynth.config.pretrained import latent_channels_of, latent_scale_of
from raysynth.data.encode import latents_path
from raysynth.data.stream import SampleStream
from raysynth.errors import InputError
from raysynth.models.autoencoder import VQAutoencoder
from raysynth.models.bundle import bundle_digest, load_bundle, read_facts, save_bundle
from raysynth.models.denoiser import StableDenoiser
from raysynth.models.facts import BundleFacts
from raysynth.models.gan import Adversaries
from raysynth.models.pretrained import (
    check_folder,
    finished_weights,
    pretrained_autoencoder,
    pretrained_denoiser,
    weights_digest,
)
from raysynth.models.space import LatentSpace
from raysynth.seeding import fingerprint, seed_of
from raysynth.store.reader import SampleSet, case_attrs, open_group
from raysynth.store.repository import main_snapshot, open_root
from raysynth.store.splits import is_indicative
from raysynth.training.build import fresh_network, objective_of
from raysynth.training.checkpoints import CheckpointFolder
from raysynth.training.context import WorkerContext
from raysynth.training.engines import local_gpu, memory_of_worker
from raysynth.training.fitting import check_fits
from raysynth.training.history import HISTORY_FILE
from raysynth.training.loop import Outcome, RunFiles, fit
from raysynth.training.objectives import (
    AdversarialObjective,
    DiffusionObjective,
    Objective,
    SelfTaughtObjective,
)
from raysynth.window import normalize

SUMMARY_FILE = "summary.json"

NUM_CODE_SLICES = 16
"""Slices whose latents a codebook begins with: 65,536 of them at the paper's size."""

FREE_FIELDS = {
    "max_seen_samples",
    "max_seconds",
    "num_workers",
    "min_workers",
    "use_gpu",
    "threads_per_worker",
    "engine",
    "zero_stage",
    "compile",
    "micro_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "max_failures",
}
"""Training settings that a run may change when it is resumed: the weights do not follow from them.
(A checkpoint's interval decides where a history's means begin, no more.)"""


@dataclass(frozen=True)
class TrainSummary:
    """What training left.

    Attributes:
        bundle: folder of the bundle.
        digest: of the bundle.
        seconds: of training, over all attempts, without start-up.
        seen_samples: over all workers.
        samples_per_s: of the last attempt.
        final_loss: mean over the last logged interval; None if nothing was logged.
        skipped_steps: steps whose gradient was not finite.
        history: loss history, JSON lines.
        engine: plain, ddp or deepspeed.
        engine_reason: why that one.
    """

    bundle: Path
    digest: str
    seconds: float
    seen_samples: int
    samples_per_s: float
    final_loss: float | None
    skipped_steps: int
    history: Path
    engine: str
    engine_reason: str


@dataclass(frozen=True)
class RunPlan:
    """What is known before a worker starts.

    Attributes:
        files: where the run lives, its fingerprint and data snapshot.
        samples: path of the sample set in the store.
        latents: path of its latents; None for models of images.
    """

    files: RunFiles
    samples: str
    latents: str | None


def plan_run(config: ExperimentConfig) -> RunPlan:
    """Finds everything a recipe trains on.

    A run that was started before goes on with the snapshot it began with.

    Raises:
        InputError: a store, sample set, autoencoder or its latents is missing; says what to run.
            Or pretrained weights are missing, or do not fit.
    """
    if isinstance(config.model, FromFolder):
        check_folder(config.model)
    samples = f"samples/{config.samples.name}"
    root = open_root(config.store_url)
    attributes = _attributes(root, samples, f"the store has no {samples}: run shard first")
    for setting, wanted in config.samples.settings().items():
        if attributes["settings"][setting] != wanted:
            raise InputError(
                f"{samples} was cut with {setting} {attributes['settings'][setting]}, the recipe "
                f"says {wanted}: give the recipe's own set another data.samples.name and run shard"
            )
    latents, digest = None, None
    if isinstance(config.model, OfLatents):
        facts = read_facts(config.autoencoder_path)
        if facts.autoencoder_config is None:
            raise InputError(
                f"bundle {config.autoencoder_path} is a {facts.model.family}, which has no "
                "latents: give model.autoencoder the bundle of an autoencoder"
            )
        cells = facts.latent_shape[1]
        if isinstance(config.model, StableDiffusionConfig):
            _check_latents(config.model, facts, config.autoencoder_path)
        if cells % config.model.downsampling:
            raise InputError(
                f"latents of {config.autoencoder_path} have {cells} cells a side, not a multiple "
                f"of {config.model.downsampling}, the network's downsampling: use fewer levels in "
                "model.channels"
            )
        digest = bundle_digest(config.autoencoder_path)
        latents = latents_path(config, digest)
        missing = f"the store has no latents of {samples} by {config.autoencoder_path}"
        _attributes(root, latents, f"{missing}: run encode first")
    follows_from = {
        "seed": config.seed,
        "samples": attributes["fingerprint"],
        "autoencoder": digest,
        "model": config.model.model_dump(mode="json", exclude={"autoencoder", "pretrained"}),
        "training": config.training.model_dump(mode="json", exclude=FREE_FIELDS),
    }
    if isinstance(config.model, FromFolder):
        follows_from["pretrained"] = weights_digest(config.model)
    identity = fingerprint(follows_from)
    folder = config.work_dir / "checkpoints" / config.name
    checkpoint = CheckpointFolder(folder, config.training.keep_checkpoints).newest_valid()
    snapshot = main_snapshot(config.store_url)
    if checkpoint is not None and checkpoint.state["fingerprint"] == identity:
        snapshot = checkpoint.state["snapshot"]
    log = config.work_dir / "logs" / config.name
    return RunPlan(RunFiles(folder, log, identity, snapshot), samples, latents)


def _check_latents(model: StableDiffusionConfig, facts: BundleFacts, autoencoder: Path) -> None:
    """A U-Net of Stable Diffusion works in the latents, and at the scale, of its own autoencoder.

    Its decoder may be another: some were trained on for longer.
    """
    theirs = model.networks["vae"]
    wanted = latent_channels_of(theirs), latent_scale_of(theirs)
    config, given = facts.autoencoder_config, None
    if isinstance(config, PretrainedAutoencoderConfig):
        given = config.latent_channels, config.latent_scale
    if given != wanted:
        raise InputError(
            f"model.autoencoder {autoencoder}: Stable Diffusion needs its own, of {wanted[0]} "
            f"channels scaled by {wanted[1]}: train a pretrained_autoencoder recipe from "
            f"{model.pretrained / 'vae'}"
        )


def finished_run(config: ExperimentConfig, plan: RunPlan) -> TrainSummary | None:
    """The summary of this very run, if it has ended before and its bundle is still there."""
    try:
        saved = json.loads((plan.files.log / SUMMARY_FILE).read_text())
    except FileNotFoundError:
        return None
    same = saved["run"] == _run_identity(config, plan)
    if not same or bundle_digest(config.bundle_path) != saved["summary"]["digest"]:
        return None
    paths = {name: Path(saved["summary"][name]) for name in ("bundle", "history")}
    return TrainSummary(**saved["summary"] | paths)


def train_and_bundle(
    config: ExperimentConfig, plan: RunPlan, context: WorkerContext
) -> TrainSummary | None:
    """Trains as one worker of a group; rank 0 writes the bundle and returns the summary.

    Raises:
        InputError: a step does not fit the GPU (says what would), or workers see other folders.
    """
    torch.set_num_threads(config.training.threads_per_worker)
    if config.training.use_gpu:
        torch.cuda.set_device(local_gpu())
    _check_folder(plan)
    # Nodes may be missing.
    present = config.training.model_copy(update={"num_workers": context.world_size})
    config = config.model_copy(update={"training": present})
    root = open_root(config.store_url, plan.files.snapshot)
    samples = SampleSet(open_group(root, plan.samples))
    latents = SampleSet(open_group(root, plan.latents)) if plan.latents else None
    if config.training.use_gpu:  # else memory is paged, and what else needs it unknown
        check_fits(config, _autoencoder(config), memory_of_worker(config.training))
    objective = build_objective(config, samples, latents)
    stream = SampleStream(
        samples,
        objective.columns,
        seed=config.seed,
        global_batch_size=config.training.global_batch_size,
        open_shards=config.training.open_shards,
        rank=context.rank,
        world_size=context.world_size,
        latents=latents,
    )
    outcome = fit(objective, stream, config.training, context, plan.files)
    if context.rank != 0:
        return None
    digest = _save_bundle(config, plan, objective, samples, outcome)
    summary = TrainSummary(
        bundle=config.bundle_path,
        digest=digest,
        seconds=outcome.now.seconds,
        seen_samples=outcome.now.seen_samples,
        samples_per_s=outcome.samples_per_s,
        final_loss=outcome.now.loss,
        skipped_steps=outcome.now.skipped_steps,
        history=plan.files.log / HISTORY_FILE,
        engine=outcome.engine.name,
        engine_reason=outcome.engine.reason,
    )
    saved = {"run": _run_identity(config, plan), "summary": asdict(summary)}
    scratch = plan.files.log / f".{SUMMARY_FILE}"
    scratch.write_text(json.dumps(saved, indent=1, default=str))
    scratch.replace(plan.files.log / SUMMARY_FILE)
    return summary


def _check_folder(plan: RunPlan) -> None:
    """Whether all workers see the folder that the driver made; all find that alike."""
    folder = plan.files.checkpoints
    seen: list[bool] = [folder.is_dir()]
    if torch.distributed.is_initialized():
        seen = [False] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(seen, folder.is_dir())
    if not all(seen):
        raise InputError(
            f"{len(seen) - sum(seen)} of {len(seen)} workers do not see {folder}: give work_dir a "
            "path on storage that all nodes share"
        )


def _autoencoder(config: ExperimentConfig) -> AutoencoderConfig | None:
    """Of a model of latents."""
    if not isinstance(config.model, OfLatents):
        return None
    return read_facts(config.autoencoder_path).autoencoder_config


def build_objective(
    config: ExperimentConfig, samples: SampleSet, latents: SampleSet | None
) -> Objective:
    """The recipe's objective around its network before training.

    Its weights are pretrained, or follow from the seed alone; only a codebook follows from the
    first training samples, too.
    """
    model, space = config.model, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("weights", config.seed))
        network: nn.Module
        if isinstance(model, PretrainedAutoencoderConfig):
            network = pretrained_autoencoder(model)
        elif isinstance(model, StableDiffusionConfig):
            network = pretrained_denoiser(model)
        else:
            network = fresh_network(config, None if latents is None else latents.shape)
        if isinstance(model, VQVAEConfig):
            hu = _first_training_slices(samples, NUM_CODE_SLICES)
            images = torch.from_numpy(normalize(hu, model.window_hu)[:, None])
            autoencoder = getattr(network, "generator", network)
            assert isinstance(autoencoder, VQAutoencoder)
            autoencoder.spread_codes(images)
        if latents is not None:
            bundle = load_bundle(config.autoencoder_path)
            assert bundle.autoencoder is not None
            scale = latents.attrs["latent_scale"]
            space = LatentSpace(bundle.autoencoder, scale, bundle.window_hu)
        return objective_of(config, network, space)


def _first_training_slices(samples: SampleSet, count: int) -> NDArray[np.int16]:
    """Evenly spread slices of the first shard that has any of the training split, (n, y, x)."""
    rows = samples.training_rows()
    start, stop = samples.shard_rows(int(rows[0]) // samples.rows_per_shard)
    inside = rows[rows < stop] - start
    chosen = inside[np.linspace(0, len(inside) - 1, min(len(inside), count)).astype(int)]
    hu: NDArray[np.int16] = samples.read("hu", start, stop)[chosen]
    return hu


def _save_bundle(
    config: ExperimentConfig,
    plan: RunPlan,
    objective: Objective,
    samples: SampleSet,
    outcome: Outcome,
) -> str:
    """Writes the averaged weights with all that is known of them; returns the digest."""
    root = open_root(config.store_url, plan.files.snapshot)
    cases = [case_attrs(root, case_id) for case_id in samples.attrs["cases"]]
    sources = {str(case.source.get("kind", "unknown")) for case in cases}
    splits = {case.patient_key: case.split for case in cases}
    patients = Counter(splits.values())
    autoencoder, latent_scale = None, 1.0
    trained, tokenizer = outcome.weights, None
    if isinstance(objective.module, Adversaries):
        trained = _of_part("generator", trained)
    weights: dict[str, dict[str, Tensor]] = {"autoencoder": trained}
    if isinstance(objective, AdversarialObjective):
        weights = {"generator": trained}
    if isinstance(objective, SelfTaughtObjective):
        weights = {"encoder": _of_part("encoder", trained)}
    if isinstance(objective, DiffusionObjective):
        weights = {"denoiser": outcome.weights}
        if isinstance(objective.module, StableDenoiser):
            assert isinstance(config.model, StableDiffusionConfig)
            weights = {"denoiser": finished_weights(config.model, outcome.weights)}
            tokenizer = objective.module.tokenizer
        if isinstance(objective.space, LatentSpace):
            autoencoder = read_facts(config.autoencoder_path).autoencoder_config
            weights["autoencoder"] = objective.space.autoencoder.state_dict()
            latent_scale = objective.space.latent_scale
    facts = BundleFacts(
        model=config.model,
        autoencoder=autoencoder,
        latent_scale=latent_scale,
        samples=config.samples,
        intensity=samples.attrs["intensity"],
        sources=tuple(sorted(sources)),
        snapshot=plan.files.snapshot,
        patients=dict(sorted(patients.items())),
        indicative=is_indicative(len(splits)),
        seen_samples=outcome.now.seen_samples,
    )
    return save_bundle(config.bundle_path, facts, **weights, tokenizer=tokenizer)


def _of_part(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its part of all the weights: a discriminator, or an expander, has done its work."""
    own = f"{name}."
    return {key.removeprefix(own): tensor for key, tensor in weights.items() if key.startswith(own)}


def _run_identity(config: ExperimentConfig, plan: RunPlan) -> dict[str, str | float | None]:
    """What a finished run must have in common with a recipe to be its run."""
    training = config.training
    return {
        "fingerprint": plan.files.fingerprint,
        "max_seen_samples": training.max_seen_samples,
        "max_seconds": training.max_seconds,
    }


def _attributes(root: zarr.Group, path: str, missing: str) -> dict[str, Any]:
    group = root.get(path)
    if group is None:
        raise InputError(missing)
    return group.attrs.asdict()
