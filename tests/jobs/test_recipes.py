"""Every tiny recipe, stage by stage, through the command line; and the demo as one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raysynth import demo
from raysynth.case import Label
from raysynth.cli import main
from raysynth.config import load_recipe
from raysynth.models.bundle import load_bundle
from raysynth.store.reader import SampleSet, open_group
from raysynth.store.repository import open_root
from raysynth.store.validate import validate
from storage_schema.v1 import SPLITS
from tests.formats.lidc_crops import a_record, write_crop

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
JUDGED = (
    "lidc_attributes_ldm_1_tiny",
    "lidc_attributes_ldm_4_tiny",
    "inpaint_new_tissue_tiny",
    "lung_ddpm_tiny",
)
"""One of each kind: evaluation looks at what was requested, not at which network drew it."""


def run(verb: str, recipe: str, work_dir: Path, *overrides: str) -> None:
    """One stage, which must end well."""
    settings = [word for text in (f"work_dir={work_dir}", *overrides) for word in ("--set", text)]
    assert main([verb, str(RECIPES / f"{recipe}.yaml"), *settings]) == 0


def _judge(name: str, work_dir: Path) -> dict[str, Any]:
    run("evaluate", name, work_dir)
    judged = json.loads((work_dir / "evaluation" / f"{name}.json").read_text())
    assert judged["metrics"]
    assert all(math.isfinite(result["value"]) for result in judged["metrics"].values())
    return judged


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store of the tiny recipes and their two autoencoders."""
    path = tmp_path_factory.mktemp("tiny")
    run("ingest", "lidc_vq_tiny", path)
    run("shard", "lidc_vq_tiny", path)
    for autoencoder in ("lidc_vq_tiny", "lidc_kl_tiny"):
        run("train", autoencoder, path)
        assert load_bundle(path / "bundles" / autoencoder).denoiser is None
    run("encode", "lidc_attributes_ldm_1_tiny", path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *(f"lidc_attributes_ldm_{number}_tiny" for number in (1, 2, 4)),  # 3: see below
        "luna16_semantic_tiny",
        "luna16_spade_gan_tiny",
    ],
)
def test_a_system_runs_to_its_report(work_dir: Path, name: str) -> None:
    run("train", name, work_dir)
    asked = load_recipe(RECIPES / f"{name}.yaml").model
    learned = load_bundle(work_dir / "bundles" / name).config
    moved = {"autoencoder"}
    assert learned.model_dump(exclude=moved) == asked.model_dump(exclude=moved)
    run("synthesize", name, work_dir)
    root = open_root(str(work_dir / "store"))
    drawn = SampleSet(open_group(root, f"synthetic/{name}"))
    assert drawn.count == 8
    # Sixty-four samples teach nothing: what is drawn only has to lie in the model's window.
    assert -1000 <= drawn.read("hu").min() <= drawn.read("hu").max() <= 2500
    assert validate(work_dir / "store", full=True) == []
    if name in JUDGED:
        _judge(name, work_dir)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store of the tiny recipes of volumes."""
    path = tmp_path_factory.mktemp("tiny3d")
    run("ingest", "lung_ddpm_tiny", path)
    run("shard", "lung_ddpm_tiny", path)
    return path


@pytest.mark.parametrize(
    "name", ["lung_ddpm_tiny", "lung_ddpm_patch_tiny", "pix2pix3d_tiny", "lidc_flow3d_tiny"]
)
def test_volumes_are_drawn_and_judged(volumes: Path, name: str) -> None:
    verbs = ["train", "synthesize"]
    if name == "lung_ddpm_patch_tiny":
        verbs = ["shard", *verbs]
    if name == "lidc_flow3d_tiny":
        run("train", "lidc_kl3d_tiny", volumes)
        verbs = ["encode", *verbs]
    for verb in verbs:
        run(verb, name, volumes)
    root, config = open_root(str(volumes / "store")), load_recipe(RECIPES / f"{name}.yaml")
    drawn = SampleSet(open_group(root, f"synthetic/{name}"))
    real = SampleSet(open_group(root, f"samples/{config.samples.name}"))
    assert drawn.shape == real.shape == (16, 16, 16)
    for row, host in enumerate(drawn.index["source_sample"].tolist()):
        hu, own = drawn.read("hu", row, row + 1)[0], real.read("hu", host, host + 1)[0]
        same = float(np.mean(hu == own))
        assert same >= drawn.index["copied_fraction"][row]
        assert (same > 0.5) == config.copies
    assert validate(volumes / "store", full=True) == []
    if name in JUDGED:
        run("evaluate", name, volumes)
        assert (volumes / "evaluation" / f"{name}.html").exists()


def test_a_bundle_draws_larger_volumes_in_tiles(volumes: Path) -> None:
    larger = (
        "data.samples.name=large",
        "data.samples.size=24",
        "data.samples.field_of_view_mm=480",
    )
    run("train", "lung_ddpm_tiny", volumes)
    bundle = f"bundle={volumes / 'bundles' / 'lung_ddpm_tiny'}"
    run("shard", "lung_ddpm_tiny", volumes, *larger)
    settings = (*larger, bundle, "name=in_tiles", "evaluation.controls=false")
    run("synthesize", "lung_ddpm_tiny", volumes, *settings)
    root = open_root(str(volumes / "store"))
    assert SampleSet(open_group(root, "synthetic/in_tiles")).shape == (24, 24, 24)


def test_an_extractor_of_the_domain_judges(work_dir: Path) -> None:
    name, features = "luna16_semantic_tiny", "lidc_extractor_tiny"
    run("train", features, work_dir)
    for verb in ("train", "synthesize"):
        run(verb, name, work_dir)
    run("evaluate", name, work_dir, f"evaluation.extractors=[ct-conv, 'bundle:bundles/{features}']")
    judged = json.loads((work_dir / "evaluation" / f"{name}.json").read_text())
    learned = {key for key in judged["metrics"] if "/domain-lidc_extractor_tiny@" in key}
    assert {key.split("/")[0] for key in learned} >= {"fid", "kid"}
    assert all(math.isfinite(judged["metrics"][key]["value"]) for key in learned)
    with pytest.raises(AssertionError):  # the command says why and ends with an error
        run("synthesize", features, work_dir)


def test_recipes_are_compared(work_dir: Path) -> None:
    names = ("luna16_semantic_tiny", "luna16_spade_gan_tiny")
    recipes = [str(RECIPES / f"{name}.yaml") for name in names]
    assert main(["compare", *recipes, "--set", f"work_dir={work_dir}"]) == 0
    compared = json.loads((work_dir / "evaluation" / "compare.json").read_text())
    assert [one["name"] for one in compared["contenders"]] == list(names)
    for one in compared["contenders"]:
        assert one["parameters"] > 1000
        assert 0 < one["seconds_per_image"] < 10
        assert one["memory_mib"] > 100
    page = (work_dir / "evaluation" / "compare.html").read_text()
    assert all(page.count(name) >= 2 for name in names)


def test_prompts_are_drawn(work_dir: Path) -> None:
    name = "lidc_text_ldm_tiny"
    run("shard", "lidc_text_kl_tiny", work_dir)
    run("train", "lidc_text_kl_tiny", work_dir)
    for verb in ("encode", "train", "synthesize"):
        run(verb, name, work_dir)
    drawn = SampleSet(open_group(open_root(str(work_dir / "store")), f"synthetic/{name}"))
    prompts = [row.tobytes().rstrip(b"\0").decode() for row in drawn.index["prompt"]]
    assert all(prompt.startswith("axial chest CT, ") for prompt in prompts)
    assert len(set(prompts)) == drawn.count == 8
    assert (drawn.index["source_case"] == -1).all()
    for scale in (1, 3):
        swept = open_group(open_root(str(work_dir / "store")), f"synthetic/{name}_scale_{scale}")
        assert np.array_equal(SampleSet(swept).index["prompt"][::2], drawn.index["prompt"][:4])
    assert validate(work_dir / "store", full=True) == []


@pytest.mark.parametrize("version", ["sd15", "sd2"])
def test_stable_diffusion_is_tuned(work_dir: Path, version: str, tmp_path: Path) -> None:
    from tests.models.folders import stable_diffusion_folder

    predicted = {"sd15": "epsilon", "sd2": "v_prediction"}[version]
    folder = stable_diffusion_folder(tmp_path / version, prediction_type=predicted)
    name, published = f"{version}_lora_tiny", f"{version}_vae_tiny"
    run("shard", published, work_dir)
    run("train", published, work_dir, f"model.pretrained={folder / 'vae'}")
    for verb in ("encode", "train", "synthesize"):
        run(verb, name, work_dir, f"model.pretrained={folder}")
    bundle = load_bundle(work_dir / "bundles" / name)
    assert bundle.diffusion.prediction_type == predicted
    assert bundle.latent_scale == 0.18215
    drawn = SampleSet(open_group(open_root(str(work_dir / "store")), f"synthetic/{name}"))
    assert drawn.count == 8
    # Two nodules may be told of in the same words.
    assert len({row.tobytes() for row in drawn.index["prompt"]}) > 4
    assert validate(work_dir / "store", full=True) == []


def test_a_published_autoencoder_serves_the_attributes(work_dir: Path, tmp_path: Path) -> None:
    from tests.models.folders import vq_folder

    published, name = "lidc_vq_pretrained_tiny", "lidc_attributes_ldm_3_tiny"
    run("train", published, work_dir, f"model.pretrained={vq_folder(tmp_path / 'vqvae')}")
    changes = ("name=published", f"model.autoencoder=bundles/{published}")
    for verb in ("encode", "train"):
        run(verb, name, work_dir, *changes)
    assert load_bundle(work_dir / "bundles" / "published").autoencoder is not None


def test_models_of_greys_are_trained_and_drawn(tmp_path: Path) -> None:
    """The recipes of LIDC's crops, on invented ones, with a few of their steps."""
    for number in range(24):
        write_crop(tmp_path / "crops", a_record(skip=8 * number))
    few = [
        f"data.source.path={tmp_path / 'crops'}",
        "training.global_batch_size=8",
        "training.max_seen_samples=32",
        "sampling.num_samples=8",
        "sampling.num_inference_steps=4",
        "sampling.batch_size=8",
        "evaluation.controls=false",
    ]
    for verb in ("ingest", "shard", "train"):
        run(verb, "lidc_slices_kl", tmp_path, *few)
    name = "lidc_slices_attributes"
    for verb in ("encode", "train", "synthesize"):
        run(verb, name, tmp_path, *few)
    card = (tmp_path / "bundles" / name / "card.md").read_text()
    assert "NOT Hounsfield units" in card
    assert "CC BY 3.0" in card
    assert validate(tmp_path / "store", full=True) == []


@pytest.fixture(scope="module")
def abdomen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of slices of the abdomen."""
    path = tmp_path_factory.mktemp("abdomen")
    run("ingest", "inpaint_inside_tiny", path)
    run("shard", "inpaint_inside_tiny", path)
    return path


@pytest.mark.parametrize(
    "name",
    [*(f"inpaint_{kind}_tiny" for kind in ("inside", "outside", "new_tissue")), "pix2pix_tiny"],
)
def test_holes_are_filled_and_all_else_is_kept(abdomen: Path, name: str) -> None:
    for verb in ("train", "synthesize"):
        run(verb, name, abdomen)
    root = open_root(str(abdomen / "store"))
    drawn = SampleSet(open_group(root, f"synthetic/{name}"))
    hosts = SampleSet(open_group(root, "samples/slices"))
    kept = drawn.read("hu") == hosts.read("hu")[drawn.index["source_sample"]]
    assert (kept.mean(axis=(1, 2)) >= drawn.index["copied_fraction"] - 1e-6).all()
    assert (drawn.index["copied_fraction"] > 0.1).all()
    assert (drawn.index["copied_fraction"] < 1).all()
    assert (hosts.index["split"][drawn.index["source_sample"]] == SPLITS.index("test")).all()
    # The control of no network: what was filled is one value a tissue, in every slice.
    constant = SampleSet(open_group(root, f"synthetic/{name}_constant"))
    filled = constant.read("hu") != hosts.read("hu")[constant.index["source_sample"]]
    for label in np.unique(constant.read("layout")[filled]):
        assert len(np.unique(constant.read("hu")[filled & (constant.read("layout") == label)])) == 1
    if "new_tissue" in name:
        new = (drawn.read("layout") == Label.TUMOUR).sum(axis=(1, 2))
        old = (hosts.read("layout") == Label.TUMOUR).sum(axis=(1, 2))
        assert (new > old[drawn.index["source_sample"]]).all()
    assert validate(abdomen / "store", full=True) == []
    if name in JUDGED:
        judged = _judge(name, abdomen)
        assert set(judged["fills"]) == {"synthetic", "untrained", "shuffled", "constant"}
        assert all(fill["changed"] == 0 for fill in judged["fills"].values())
        assert all(fill["known"] > 0 for fill in judged["fills"].values())


def test_the_demo_sums_itself_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On few crops of real texture: its recipe takes no overrides.
    recipes = tmp_path / "recipes"
    shutil.copytree(RECIPES, recipes)
    texture = recipes / "phantom_real_texture.yaml"
    few = yaml.safe_load(texture.read_text())
    few["data"]["source"]["num_patients"] = 4
    few["sampling"]["num_samples"] = 8
    texture.write_text(yaml.safe_dump(few))
    monkeypatch.setattr(demo, "recipes_folder", lambda: recipes)
    summary = demo.run_demo(
        tmp_path,
        None,
        [
            "data.source.num_patients=4",
            "data.source.spacing_mm=[10.0, 4.0, 4.0]",
            "training.max_seen_samples=320",
            "sampling.num_samples=16",
            "sampling.num_inference_steps=4",
            "evaluation.num_bootstrap=10",
        ],
    )
    told = json.loads(summary.path.read_text())
    assert told["cases"] == 4
    assert told["slices"] > 0
    assert set(told["stages"]) == {
        "ingest",
        "shard",
        "train_autoencoder",
        "encode",
        "train",
        "synthesize",
        "evaluate",
        "texture_ingest",
        "texture_shard",
        "texture_synthesize",
    }
    assert "synthetic/phantom_real_texture" in summary.texture.read_text()
    assert all(stage["seconds"] >= 0 for stage in told["stages"].values())
    assert {"value", "floor", "untrained", "n"} <= set(next(iter(told["metrics"].values())))
    assert told["settings"]["data"]["source"]["num_patients"] == 4
    assert told["report"] == str(summary.report)
    assert summary.report.stat().st_size > 50_000
