"""A whole run: one model on one sample set of one store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from raysynth.config.audit import AuditConfig
from raysynth.config.base import Section
from raysynth.config.data import DataConfig, PatchSamples, SliceSamples
from raysynth.config.downstream import DownstreamConfig
from raysynth.config.evaluation import BUNDLE_PREFIX, EvaluationConfig
from raysynth.config.model import (
    Diffusion,
    ExtractorConfig,
    FromFolder,
    HoleFilling,
    LayoutGuided,
    ModelConfig,
    OfLatents,
    TextGuided,
    takes_volumes,
)
from raysynth.config.sampling import SamplingConfig
from raysynth.config.serving import ServingConfig
from raysynth.config.training import TrainingConfig
from raysynth.errors import InputError

Control = Literal["untrained", "shuffled", "constant"]
"""A run drawn beside a recipe's own, to compare: with fresh weights, with requests exchanged, or
with holes filled by each tissue's mean."""

CONTROLS: tuple[Control, ...] = get_args(Control)

BUILTIN_BUNDLES = Path(__file__).parents[1] / "bundles"
"""Bundles that the package brings."""

DRAWN_BESIDE = re.compile(rf"_({'|'.join(CONTROLS)}|pairs|scale_[0-9.]+)$")
"""How the names of controls end, of `evaluation.num_pairs` and of runs at one of
`evaluation.guidance_scales`."""


class ExperimentConfig(Section):
    """A resolved recipe. Checks that need several sections stand here alone."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Names the bundle and the synthetic run; the recipe's file name if not given."""
    work_dir: Path
    """Folder of the run's files. Recipes that build on each other share it."""
    store: str | None = None
    """Local path or s3:// URL of the store; None: `work_dir`/store."""
    seed: int = Field(0, ge=0)
    bundle: str | None = None
    """A trained bundle to draw with: its folder, or `builtin:` and the name of one that the package
    brings. None: the one that this recipe trains."""
    data: DataConfig = DataConfig()
    model: ModelConfig
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    audit: AuditConfig = AuditConfig()
    downstream: DownstreamConfig = DownstreamConfig()
    serving: ServingConfig = ServingConfig()

    @property
    def store_url(self) -> str:
        """Where the store is."""
        return self.store or str(self.work_dir / "store")

    @property
    def key_path(self) -> Path:
        """The pseudonym key: beside the store's folder, never in it."""
        return self.work_dir / "pseudonym.key"

    @property
    def bundle_path(self) -> Path:
        """Where this recipe's bundle is: given, or left by training."""
        if self.bundle is None:
            return self.work_dir / "bundles" / self.name
        kind, _, name = self.bundle.partition(":")
        return BUILTIN_BUNDLES / name if kind == "builtin" else Path(self.bundle)

    @property
    def autoencoder_path(self) -> Path:
        """The autoencoder bundle of a latent model."""
        assert isinstance(self.model, OfLatents)
        return self.work_dir / self.model.autoencoder

    def control_name(self, control: Control) -> str:
        """The run that is drawn as one of the controls."""
        return f"{self.name}_{control}"

    @property
    def pairs_name(self) -> str:
        """The run that is drawn for `evaluation.num_pairs`, two samples a request."""
        return f"{self.name}_pairs"

    def swept_name(self, guidance_scale: float) -> str:
        """The run that is drawn at one of `evaluation.guidance_scales`."""
        return f"{self.name}_scale_{guidance_scale:g}"

    @property
    def samples(self) -> SliceSamples | PatchSamples:
        """The sample set, which the model can work on.

        Raises:
            InputError: the recipe cuts something else.
        """
        samples = self.data.samples
        if isinstance(samples, PatchSamples) and not takes_volumes(self.model):
            raise InputError(
                f"{self.name}: model.family {self.model.family} works on slices, but "
                f"data.samples.kind is {samples.kind}: only ingest and shard can run with that"
            )
        return samples

    @property
    def slices(self) -> SliceSamples:
        """The sample set of a model of slices.

        Raises:
            InputError: the recipe cuts something else.
        """
        samples = self.samples
        if not isinstance(samples, SliceSamples):
            raise InputError(
                f"{self.name}: this is done with slices alone, but data.samples.kind is "
                f"{samples.kind}: take a recipe of slices"
            )
        return samples

    @property
    def copies(self) -> bool:
        """Whether a sample keeps pixels of the patient who lends its layout."""
        if isinstance(self.model, HoleFilling):
            return True
        guided = isinstance(self.model, LayoutGuided) and isinstance(self.model, Diffusion)
        return guided and self.sampling.background == "copied"

    def absolute(self) -> ExperimentConfig:
        """The recipe with paths that mean the same in the folder of every worker."""
        source, evaluation = self.data.source, self.evaluation
        places = ("path", "annotations", "lungs", "labels")
        given = {name: getattr(source, name, None) for name in places}
        source = source.model_copy(
            update={name: _absolute(path) for name, path in given.items() if path is not None}
        )
        weights = {name: _absolute(file) for name, file in evaluation.extractor_weights.items()}
        extractors = tuple(map(self._extractor, evaluation.extractors))
        lpips = evaluation.lpips
        if lpips is not None:
            files = {"backbone": _absolute(lpips.backbone), "heads": _absolute(lpips.heads)}
            lpips = lpips.model_copy(update=files)
        evaluation = evaluation.model_copy(
            update={"extractor_weights": weights, "extractors": extractors, "lpips": lpips}
        )
        model = self.model
        if isinstance(model, FromFolder):
            model = model.model_copy(update={"pretrained": _absolute(model.pretrained)})
        split_list = self.data.split_list and _absolute(self.data.split_list)
        data = {"source": source, "split_list": split_list}
        served = self.serving.model_copy(
            update={"bundles": tuple(map(_absolute, self.serving.bundles))}
        )
        store = self.store
        if store is not None and "://" not in store:
            store = str(_absolute(Path(store)))
        bundle = self.bundle
        if bundle is not None and not bundle.startswith("builtin:"):
            bundle = str(_absolute(Path(bundle)))
        return self.model_copy(
            update={
                "work_dir": _absolute(self.work_dir),
                "store": store,
                "bundle": bundle,
                "data": self.data.model_copy(update=data),
                "model": model,
                "evaluation": evaluation,
                "serving": served,
            }
        )

    def shareable(self) -> dict[str, Any]:
        """The recipe as JSON values without the places of this machine, which may name people.

        Nor is there what the files at these places say.
        """
        local: dict[str, Any] = {
            "work_dir": True,
            "store": True,
            "bundle": True,
            "data": {"source": {"path", "annotations", "lungs", "labels"}, "split_list": True},
            "model": {"autoencoder", "pretrained", "network", "networks"},
            "evaluation": {"extractor_weights": True, "lpips": {"backbone", "heads"}},
            "serving": {"bundles"},
        }
        shared = self.model_dump(mode="json", exclude=local)
        shared["evaluation"]["extractors"] = [
            name if path is None else f"{BUNDLE_PREFIX}{path.name}"
            for name in self.evaluation.extractors
            for path in [_bundle_of(name)]
        ]
        return shared

    def _extractor(self, name: str) -> str:
        """An extractor's name; if it is a bundle's, with the path from the root on."""
        path = _bundle_of(name)
        return name if path is None else f"{BUNDLE_PREFIX}{_absolute(self.work_dir / path)}"

    @model_validator(mode="after")
    def _bundle_is_there(self) -> ExperimentConfig:
        kind, _, name = (self.bundle or "").partition(":")
        there = sorted(path.name for path in BUILTIN_BUNDLES.glob("*/"))
        if kind == "builtin" and name not in there:
            raise ValueError(f"bundle {self.bundle!r}: the package brings {', '.join(there)}")
        return self

    @model_validator(mode="after")
    def _learns_something(self) -> ExperimentConfig:
        if not self.training.max_seen_samples and not isinstance(self.model, FromFolder):
            raise ValueError(
                f"training.max_seen_samples 0 with model.family {self.model.family}: only weights "
                "that are pretrained are of use without training"
            )
        return self

    @model_validator(mode="after")
    def _shows_spread(self) -> ExperimentConfig:
        training = self.training
        together = training.micro_batch_size or training.local_batch_size
        if isinstance(self.model, ExtractorConfig) and together < 2:
            raise ValueError(
                f"{together} sample a forward pass with model.family extractor: it learns from "
                "the spread of several; raise training.micro_batch_size or global_batch_size"
            )
        return self

    @model_validator(mode="after")
    def _names_no_control(self) -> ExperimentConfig:
        beside = DRAWN_BESIDE.search(self.name)
        if beside:
            raise ValueError(
                f"name {self.name!r}: runs that end in {beside.group()} are controls of others; "
                "choose another name"
            )
        return self

    @model_validator(mode="after")
    def _can_be_guided(self) -> ExperimentConfig:
        scales, model = self.evaluation.guidance_scales, self.model
        if scales and not isinstance(model, Diffusion):
            raise ValueError(
                f"evaluation.guidance_scales with model.family {model.family}: only diffusion "
                "models are guided; leave them out"
            )
        if scales and isinstance(model, Diffusion) and not model.condition_drop:
            raise ValueError(
                "evaluation.guidance_scales with model.condition_drop 0: this model never learns "
                "what no condition looks like; drop some, or leave the scales out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_streamed(self) -> ExperimentConfig:
        if self.evaluation.stream and self.copies:
            raise ValueError(
                f"evaluation.stream with model.family {self.model.family}: most of a filled slice "
                "is a patient's own, which would pass for quality; leave it out, and evaluate"
            )
        return self

    @model_validator(mode="after")
    def _lpips_sees_slices(self) -> ExperimentConfig:
        samples = self.data.samples
        if self.evaluation.lpips and isinstance(samples, PatchSamples):
            raise ValueError(
                f"evaluation.lpips with data.samples.kind {samples.kind}: LPIPS compares slices; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _steps_fit_schedule(self) -> ExperimentConfig:
        steps = self.sampling.num_inference_steps
        if isinstance(self.model, Diffusion) and steps > self.model.num_train_timesteps:
            raise ValueError(
                f"sampling.num_inference_steps {steps} exceeds model.num_train_timesteps "
                f"{self.model.num_train_timesteps}: use fewer steps"
            )
        return self

    @model_validator(mode="after")
    def _sampler_fits_schedule(self) -> ExperimentConfig:
        if (
            isinstance(self.model, Diffusion)
            and self.model.schedule == "rectified_flow"
            and self.sampling.sampler == "ddpm"
        ):
            raise ValueError(
                "sampling.sampler ddpm with model.schedule rectified_flow: it needs a "
                "variance-preserving schedule; use ddim, dpm_solver++ or unipc"
            )
        return self

    @model_validator(mode="after")
    def _requests_fit_model(self) -> ExperimentConfig:
        sampling, family = self.sampling, self.model.family
        if sampling.prompts and not isinstance(self.model, TextGuided):
            raise ValueError(
                f"sampling.prompts with model.family {family}, which hears no words: leave them "
                "out, or use a text_diffusion or stable_diffusion recipe"
            )
        if (sampling.cohort or sampling.counterfactual) and isinstance(self.model, HoleFilling):
            raise ValueError(
                f"sampling.cohort and counterfactual with model.family {family}: they plan "
                "nodules, and this model fills holes; leave them out"
            )
        hosted = isinstance(self.model, LayoutGuided) and sampling.nodules == "own"
        if (sampling.cohort or sampling.counterfactual) and hosted:
            raise ValueError(
                "sampling.cohort and counterfactual with sampling.nodules own: samples have the "
                "nodules of their hosts; use nodules new, or leave them out"
            )
        return self

    @model_validator(mode="after")
    def _size_fits_network(self) -> ExperimentConfig:
        factor = self.model.downsampling
        size = self.data.samples.size
        if size % factor:
            lower = size // factor * factor
            near = f"{lower} or {lower + factor}" if lower else f"{factor}"
            raise ValueError(
                f"data.samples.size {size} is not divisible by {factor}, the network's "
                f"downsampling: use {near}, or fewer levels in model.channels"
            )
        return self


def _bundle_of(extractor: str) -> Path | None:
    """The path in the name of an extractor that is a bundle's."""
    path = extractor.removeprefix(BUNDLE_PREFIX)
    return None if path == extractor else Path(path).expanduser()


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()
