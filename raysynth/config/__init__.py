"""Recipes: strict pydantic sections and the loader. Imports neither torch nor ray."""

from raysynth.config.audit import AuditConfig
from raysynth.config.base import Section
from raysynth.config.data import (
    DataConfig,
    DicomSource,
    ImageSource,
    LidcSlicesSource,
    LidcSource,
    Luna16Source,
    PhantomSource,
    SliceSamples,
    SplitConfig,
)
from raysynth.config.downstream import DownstreamConfig, Imbalance
from raysynth.config.evaluation import EvaluationConfig
from raysynth.config.experiment import ExperimentConfig
from raysynth.config.model import (
    AutoencoderKLConfig,
    Diffusion,
    DiffusionConfig,
    ExtractorConfig,
    FromFolder,
    Gan,
    HoleFilling,
    InpaintingConfig,
    LatentDiffusionConfig,
    ModelConfig,
    OfLatents,
    Pix2PixConfig,
    PretrainedAutoencoderConfig,
    SemanticDiffusionConfig,
    SpadeGanConfig,
    StableDiffusionConfig,
    TextDiffusionConfig,
    TextGuided,
    VQVAEConfig,
)
from raysynth.config.recipe import load_recipe, parse_recipe
from raysynth.config.sampling import SamplingConfig
from raysynth.config.training import TrainingConfig

__all__ = [
    "AuditConfig",
    "AutoencoderKLConfig",
    "DataConfig",
    "DicomSource",
    "Diffusion",
    "DiffusionConfig",
    "DownstreamConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "ExtractorConfig",
    "FromFolder",
    "Gan",
    "HoleFilling",
    "ImageSource",
    "Imbalance",
    "InpaintingConfig",
    "LatentDiffusionConfig",
    "LidcSlicesSource",
    "LidcSource",
    "Luna16Source",
    "ModelConfig",
    "OfLatents",
    "PhantomSource",
    "Pix2PixConfig",
    "PretrainedAutoencoderConfig",
    "SamplingConfig",
    "Section",
    "SemanticDiffusionConfig",
    "SliceSamples",
    "SpadeGanConfig",
    "SplitConfig",
    "StableDiffusionConfig",
    "TextDiffusionConfig",
    "TextGuided",
    "TrainingConfig",
    "VQVAEConfig",
    "load_recipe",
    "parse_recipe",
]
