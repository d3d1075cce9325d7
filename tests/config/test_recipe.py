"""Recipes: strict, early, and explained when refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.config import (
    ExperimentConfig,
    LayoutDiffusionConfig,
    load_recipe,
    parse_recipe,
)
from raysynth.errors import InputError

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.yaml"))
MINIMAL = "model: {family: autoencoder_kl}"
DENOISING = "model: {family: semantic_diffusion}"
FLOW = ["model.schedule=rectified_flow", "model.prediction_type=flow"]

BAD = {
    "unknown key": ("model: {family: vqvae, chanels: 3}", [], "unknown key model.chanels; valid"),
    "unknown section": (MINIMAL + "\ntrainin: 3", [], "unknown key trainin; valid keys"),
    "unknown key in a union": (
        MINIMAL,
        ["data.source={kind: lidc, path: x, level: 1}"],
        "unknown key data.source.level; valid keys there: kind, path, nodule_mask, consensus_level",
    ),
    "union without its tag": (MINIMAL, ["data.source={path: x}"], "data.source: say which one by"),
    "unknown family": ("model: {family: gan}", [], "'autoencoder_kl', 'vqvae'"),
    "no model": ("seed: 1", [], "model is missing"),
    "impossible size": (MINIMAL, ["data.samples.size=70"], "70 is not divisible by 4.*68 or 72"),
    "negative seed": (MINIMAL, ["seed=-1"], "seed is -1"),
    "fewer workers than shards can share": (
        MINIMAL,
        ["training.num_workers=4", "training.min_workers=2"],
        "open_shards 8 is not a multiple of num_workers 3: change one of them",
    ),
    "fewest workers above the most": (
        MINIMAL,
        ["training.min_workers=2"],
        "min_workers 2 exceeds num_workers 1: change one",
    ),
    "batch and shards": (MINIMAL, ["training.open_shards=3"], "64 is not a multiple of open_shar"),
    "crops without nodules": (MINIMAL, ["data.samples.centre=nodule"], "set it to 0"),
    "no levels": (MINIMAL, ["model.channels=[]"], "channels"),
    "no groups": (MINIMAL, ["model.norm_num_groups=0"], "norm_num_groups is 0"),
    "no width": (MINIMAL, ["model.channels=[0, 0]"], "channels"),
    "endless field": (MINIMAL, ["data.samples.field_of_view_mm=.inf"], "field_of_view_mm is inf"),
    "window upside down": (MINIMAL, ["model.window_hu=[5, 1]"], "low < high"),
    "no patients left": (MINIMAL, ["data.split={val: 0.5, test: 0.5}"], "nothing is left to train"),
    "a trial of nothing": (MINIMAL, ["downstream.tasks=[]"], "tasks nothing: give one or more"),
    "a ratio twice": (MINIMAL, ["downstream.ratios=[1, 1.0]"], "ratios 1.0, 1.0: .* each once"),
    "all rare ones kept": (MINIMAL, ["downstream.imbalance={kept: 1}"], "imbalance.kept is 1"),
    "override without value": (MINIMAL, ["seed"], "write it as section.key=value"),
    "override below a value": (MINIMAL, ["seed=1", "seed.x=2"], "seed is a value, not a section"),
    "a flow on another schedule": (
        DENOISING,
        ["model.prediction_type=flow"],
        "prediction_type flow with schedule linear: a flow needs rectified_flow; use that",
    ),
    "no flow on its schedule": (
        DENOISING,
        ["model.schedule=rectified_flow"],
        "prediction_type epsilon with schedule rectified_flow: .*; use flow or sample",
    ),
    "velocity on the schedule of flows": (
        DENOISING,
        ["model.schedule=rectified_flow", "model.prediction_type=v_prediction"],
        "prediction_type v_prediction with schedule rectified_flow: .*; use flow or sample",
    ),
    "ancestors of a flow": (
        DENOISING,
        [*FLOW, "sampling.sampler=ddpm"],
        "sampler ddpm with model.schedule rectified_flow: .*; use ddim, dpm_solver.. or unipc",
    ),
    "min-SNR of absolute errors": (
        DENOISING,
        ["model.loss=l1", "model.snr_gamma=5"],
        "snr_gamma 5.0 with loss l1: it weighs squared errors; use loss l2",
    ),
    "words for who hears none": (
        DENOISING,
        ["sampling.prompts=['axial chest CT']"],
        "prompts with model.family semantic_diffusion, which hears no words: leave them out",
    ),
    "nodules for who fills holes": (
        "model: {family: inpainting}",
        ["sampling.cohort={texture: {solid: 1.0}}"],
        "cohort and counterfactual with model.family inpainting: they plan nodules",
    ),
    "a cohort of unrelated draws": (
        DENOISING,
        ["sampling.prior=independent", "sampling.cohort={texture: {solid: 1.0}}"],
        "prior independent draws sizes and scores by itself: leave out cohort",
    ),
    "an extractor without levels": ("model: {family: extractor, channels: []}", [], "channels"),
    "an extractor of single slices": (
        "model: {family: extractor}",
        ["training.micro_batch_size=1"],
        "1 sample a forward pass with model.family extractor: .*; raise training.micro_batch_size",
    ),
    "widths of no groups": (
        "model: {family: extractor, channels: [12]}",
        [],
        r"channels \(12,\): 12 is not a multiple of norm_num_groups 8",
    ),
    "one scale is no sweep": (
        DENOISING,
        ["evaluation.guidance_scales=[3]"],
        "evaluation: guidance_scales 3: give two or more different ones, or none",
    ),
    "a sweep of equal scales": (
        DENOISING,
        ["evaluation.guidance_scales=[3, 1, 3.0]"],
        "guidance_scales 3, 1, 3: give two or more different ones",
    ),
    "a sweep with a scale that is none": (
        DENOISING,
        ["evaluation.guidance_scales=[1, .nan]"],
        r"evaluation.guidance_scales.1 is nan",
    ),
    "a sweep below nothing": (
        DENOISING,
        ["evaluation.guidance_scales=[1, -2]"],
        r"evaluation.guidance_scales.1 is -2",
    ),
    "a sweep of who is not guided": (
        "model: {family: spade_gan}",
        ["evaluation.guidance_scales=[1, 3]"],
        "guidance_scales with model.family spade_gan: only diffusion models are guided",
    ),
    "a sweep without a null condition": (
        DENOISING,
        ["evaluation.guidance_scales=[1, 3]", "model.condition_drop=0"],
        "guidance_scales with model.condition_drop 0: this model never learns",
    ),
    "the name of a swept scale": (
        DENOISING,
        ["name=mine_scale_3"],
        "runs that end in _scale_3 are controls of others",
    ),
    "a scale of words": (DENOISING, ["sampling.guidance_scale=much"], "guidance_scale is 'much'"),
    "a scale that is no number": (DENOISING, ["sampling.guidance_scale=.nan"], "scale is nan"),
    "a scale without end": (DENOISING, ["sampling.guidance_scale=.inf"], "scale is inf"),
    "a scale below nothing": (DENOISING, ["sampling.guidance_scale=-1"], "scale is -1"),
    "a rating outside 1 to 5": (
        DENOISING,
        ["sampling.counterfactual={texture: [1, 6]}"],
        r"counterfactual.texture \(1, 6\): give two or more scores from 1 to 5",
    ),
    "an extractor nobody knows": (
        MINIMAL,
        ["evaluation.extractors=[vgg]"],
        "evaluation: extractors: no extractor 'vgg'; there are ct-conv, bundle:PATH",
    ),
    "no extractor": (MINIMAL, ["evaluation.extractors=[]"], r"evaluation.extractors is \[\]"),
    "one extractor twice": (
        MINIMAL,
        ["evaluation.extractors=[ct-conv, ct-conv]"],
        "extractors ct-conv, ct-conv: name each once",
    ),
    "weights of who needs none": (
        MINIMAL,
        ["evaluation.extractor_weights.ct-conv=weights.pth"],
        "extractor_weights.ct-conv: no extractor of that name takes weights",
    ),
    "LPIPS of volumes": (
        MINIMAL,
        ["data.samples={kind: patches}", "evaluation.lpips={backbone: a.pth, heads: b.pth}"],
        "evaluation.lpips with data.samples.kind patches: LPIPS compares slices; leave it out",
    ),
    "no signal at all": (DENOISING, ["model.snr_gamma=0"], "snr_gamma is 0"),
    "a list": ("- 1", [], "expected `key: value` sections, found list"),
    "units that crops lost": (
        MINIMAL,
        ["data.source={kind: lidc_slices, path: x, intensity: hu}"],
        "data.source.intensity is 'hu'",
    ),
    "no YAML": ("a: [", [], "no valid YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_are_refused_in_one_line(case: str) -> None:
    text, overrides, message = BAD[case]
    with pytest.raises(InputError, match=message) as refused:
        parse_recipe(text, name="bad", overrides=overrides)
    assert "\n" not in str(refused.value)


def test_overrides_win_over_the_recipe_and_defaults_fill_the_rest() -> None:
    config = parse_recipe(
        MINIMAL + "\ntraining: {learning_rate: 1}", name="x", overrides=["training.num_workers=2"]
    )
    assert config.training.num_workers == 2
    assert config.training.learning_rate == 1
    assert config.training.local_batch_size == config.training.global_batch_size // 2
    assert config.bundle_path == Path("runs/x/bundles/x")


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver++", "unipc"])
@pytest.mark.parametrize("prediction_type", ["flow", "sample"])
def test_flows_are_drawn_by_every_deterministic_sampler(prediction_type: str, sampler: str) -> None:
    asked = [*FLOW, f"model.prediction_type={prediction_type}", f"sampling.sampler={sampler}"]
    config = parse_recipe(DENOISING, name="x", overrides=asked)
    assert config.sampling.sampler == sampler


def test_bundles_of_extractors_lie_in_the_work_dir_and_are_shared_by_name() -> None:
    asked = ["work_dir=/runs/x", "evaluation.extractors=[ct-conv, 'bundle:bundles/mine']"]
    config = parse_recipe(MINIMAL, name="x", overrides=asked)
    absolute = config.absolute()
    assert absolute.evaluation.extractors == ("ct-conv", "bundle:/runs/x/bundles/mine")
    assert absolute.absolute() == absolute
    for one in (config, absolute):
        assert one.shareable()["evaluation"]["extractors"] == ["ct-conv", "bundle:mine"]


def test_a_missing_file_names_itself() -> None:
    with pytest.raises(InputError, match=r"recipe nope\.yaml: No such file"):
        load_recipe("nope.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_survives_its_own_dump(path: Path) -> None:
    config = load_recipe(path)
    again = parse_recipe(config.model_dump_json(), name=config.name)
    assert again == config


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in RECIPES
        # The small ones are their own siblings.
        if not path.stem.startswith(("phantom_", "lidc_slices_")) and "tiny" not in path.stem
    ],
    ids=lambda path: path.stem,
)
def test_every_published_recipe_has_a_tiny_sibling_of_the_same_structure(path: Path) -> None:
    config = load_recipe(path)
    tiny = load_recipe(path.with_name(f"{path.stem}_tiny.yaml"))
    assert tiny.model.family == config.model.family
    same = ("conditioning", "context", "prediction_type", "schedule", "loss", "snr_gamma")
    for choice in (*same, "edge_map", "tuning"):
        assert getattr(tiny.model, choice, None) == getattr(config.model, choice, None)


def test_weights_of_extractors_are_found_from_everywhere_and_told_to_nobody() -> None:
    overrides = [
        "evaluation.extractors=['torchvision:resnet18', 'module:mine.networks:build', ct-conv]",
        "evaluation.extractor_weights.torchvision:resnet18=weights/resnet18.pth",
        "evaluation.extractor_weights.inception2048=~/inception.pth",
    ]
    config = parse_recipe(MINIMAL, name="mine", overrides=overrides).absolute()
    assert config.evaluation.extractor_weights == {
        "torchvision:resnet18": Path.cwd() / "weights/resnet18.pth",
        "inception2048": Path.home() / "inception.pth",
    }
    told = config.shareable()["evaluation"]
    assert told["extractors"] == ["torchvision:resnet18", "module:mine.networks:build", "ct-conv"]
    assert "extractor_weights" not in told


def test_a_model_of_slices_cuts_volumes_but_is_not_trained_on_them() -> None:
    samples = "{kind: patches, size: 16, field_of_view_mm: 64}"
    network = "channels: [8], attention_levels: [false], norm_num_groups: 8"

    def recipe(family: str) -> ExperimentConfig:
        model = f"{{family: {family}, {network}}}"
        text = f"{{work_dir: runs, data: {{samples: {samples}}}, model: {model}}}"
        return parse_recipe(text, name="volumes")

    assert recipe("layout_diffusion").samples.shape == (16, 16, 16)
    with pytest.raises(InputError, match=r"works on slices, but data\.samples\.kind is patches"):
        _ = recipe("semantic_diffusion").samples


def test_heads_are_as_wide_as_each_level_allows() -> None:
    layout = "{work_dir: runs, model: {family: layout_diffusion, channels: [64, 192], %s}}"
    attends = "attention_levels: [false, true], norm_num_groups: 8"
    published = parse_recipe(layout % f"{attends}, num_head_channels: [64, 192]", name="heads")
    assert isinstance(published.model, LayoutDiffusionConfig)
    assert published.model.head_channels == (64, 192)
    for heads, message in (("[64]", "give one number, or one for each level"), ("[64, 80]", "80")):
        with pytest.raises(InputError, match=message):
            parse_recipe(layout % f"{attends}, num_head_channels: {heads}", name="heads")
