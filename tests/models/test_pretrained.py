"""Published weights from folders on disk, and what refuses to be one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, VQModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import CLIPTokenizer

from raysynth.condition import Condition
from raysynth.config import (
    ExperimentConfig,
    PretrainedAutoencoderConfig,
    SliceSamples,
    StableDiffusionConfig,
    parse_recipe,
)
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import Bundle, load_bundle, load_tokenizer, save_bundle
from raysynth.models.denoiser import Denoiser, StableDenoiser, build_denoiser
from raysynth.models.facts import BundleFacts
from raysynth.models.pretrained import (
    check_folder,
    finished_weights,
    pretrained_autoencoder,
    pretrained_denoiser,
    pretrained_tokenizer,
    weights_digest,
)
from raysynth.models.text import clip_tokens
from raysynth.prompt import NO_NODULE
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from tests.models.folders import MAX_TOKENS, edit_json, stable_diffusion_folder, vq_folder

PROMPTS = ("axial chest CT, 12 mm part-solid pulmonary nodule, sharp margin", NO_NODULE)


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vq_folder(tmp_path_factory.mktemp("vq"))


@pytest.fixture(scope="module")
def epsilon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_folder(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def velocity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd2")
    return stable_diffusion_folder(path, prediction_type="v_prediction")


def autoencoder_recipe(folder: Path) -> ExperimentConfig:
    model = f"model: {{family: pretrained_autoencoder, pretrained: '{folder}'}}"
    return parse_recipe(model, name="x", overrides=["data.samples.size=32"])


def recipe(folder: Path, *overrides: str) -> ExperimentConfig:
    model = f"model: {{family: stable_diffusion, autoencoder: a, pretrained: '{folder}'}}"
    return parse_recipe(model, name="x", overrides=["data.samples.size=32", *overrides])


def stable(folder: Path, **changes: Any) -> StableDiffusionConfig:
    model = recipe(folder, *(f"model.{name}={value}" for name, value in changes.items())).model
    assert isinstance(model, StableDiffusionConfig)
    return model


def facts(model: Any, **changes: Any) -> BundleFacts:
    said = {"samples": SliceSamples(size=32), "intensity": "hu", "sources": ("phantom",)}
    more = {"snapshot": "S", "patients": {"train": 9}, "indicative": True, "seen_samples": 0}
    return BundleFacts.model_validate({"model": model, **said, **more, **changes})


def saved(path: Path, folder: Path, **weights: Any) -> Bundle:
    """A bundle of the folder, by itself or with trained weights."""
    model, vae = stable(folder), autoencoder_recipe(folder / "vae").model
    save_bundle(
        path,
        facts(model, autoencoder=vae, latent_scale=0.18215),
        pretrained_autoencoder(vae).state_dict(),
        finished_weights(model, weights),
        tokenizer=pretrained_tokenizer(model),
    )
    return load_bundle(path)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_folder_is_an_autoencoder_of_grey_images(
    kind: str, vq: Path, epsilon: Path, tmp_path: Path
) -> None:
    folder = vq if kind == "vq" else epsilon / "vae"
    config = autoencoder_recipe(folder).model
    ours = pretrained_autoencoder(config).eval()
    theirs = (VQModel if kind == "vq" else AutoencoderKL).from_pretrained(folder)
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        coloured = theirs.encode(x.repeat(1, 3, 1, 1))
        latents = coloured.latents if kind == "vq" else coloured.latent_dist.mode()
        assert torch.equal(ours.encode(x), latents)
        torch.testing.assert_close(
            ours.decode(latents), theirs.decode(latents).sample.mean(dim=1, keepdim=True)
        )
        save_bundle(tmp_path / kind, facts(config), ours.state_dict())
        bundle = load_bundle(tmp_path / kind)
        assert bundle.autoencoder is not None
        assert bundle.latent_shape == latents.shape[1:]
        assert torch.equal(
            bundle.autoencoder.decode(bundle.autoencoder.encode(x)), ours.decode(latents)
        )
    assert config.latent_scale == (None if kind == "vq" else 0.18215)
    # Trained on, it learns like ours do.
    sum(ours(x, torch.randn_like(latents)).values()).backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_noise_and_networks_are_read_from_the_folder(epsilon: Path, velocity: Path) -> None:
    assert stable(epsilon).prediction_type == "epsilon"
    config = stable(velocity)
    assert (config.prediction_type, config.schedule) == ("v_prediction", "scaled_linear")
    assert config.num_train_timesteps == 1000
    assert config.downsampling == 2
    with pytest.raises(InputError, match=r"prediction_type 'epsilon', but .* with 'v_prediction'"):
        stable(velocity, prediction_type="epsilon")
    assert not stable(Path("nowhere")).is_known
    with pytest.raises(InputError, match=r"model\.pretrained nowhere: no such folder; give"):
        check_folder(stable(Path("nowhere")))


def test_tokens_are_those_of_the_published_class(epsilon: Path) -> None:
    check_folder(stable(epsilon))
    tokenizer = pretrained_tokenizer(stable(epsilon))
    theirs = CLIPTokenizer.from_pretrained(epsilon / "tokenizer")
    prompts = [*PROMPTS, "", "Any other words: hamartoma!"]
    expected = theirs(prompts, padding="max_length", max_length=MAX_TOKENS).input_ids
    assert clip_tokens(tokenizer, prompts) == expected
    with pytest.raises(InputError, match="is 102 tokens long: this model reads 77; leave some"):
        clip_tokens(tokenizer, ["solid " * 100])


def test_a_longer_grammar_than_a_tokenizer_is_noticed_before_training(
    epsilon: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(epsilon, tmp_path / "short"))
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=20)
    with pytest.raises(InputError, match=r"88 mm .* tokens long: this model reads 20"):
        check_folder(stable(folder))


def drawn(denoiser: Denoiser, config: StableDiffusionConfig, guidance: float) -> torch.Tensor:
    schedule = NoiseSchedule.from_config(config)
    engine = SamplingEngine(
        denoiser, schedule, config.prediction_type, (4, 8, 8), 32, 2, guided=True
    )
    requests = [
        SampleRequest(str(row), 7 + row, Condition(text=prompt), "ddim", 10, guidance)
        for row, prompt in enumerate(PROMPTS)
    ]
    finished = {one.sample_id: one.x_0 for one in engine.run(requests)}
    return torch.stack([finished[str(row)] for row in range(len(PROMPTS))])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guided_samples_equal_the_published_pipeline(
    kind: str, epsilon: Path, velocity: Path
) -> None:
    folder = epsilon if kind == "epsilon" else velocity
    config = stable(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    noise = [torch.randn(4, 8, 8, generator=torch.manual_seed(7 + row)) for row in range(2)]
    expected = pipeline(
        list(PROMPTS),
        num_inference_steps=10,
        guidance_scale=5.0,
        latents=torch.stack(noise),
        output_type="latent",
    ).images
    assert expected.std() > 0.1
    ours = drawn(pretrained_denoiser(config), config, 5.0)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_bundle_draws_the_same_bits_without_its_folder(epsilon: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(epsilon, tmp_path / "folder"))
    config = stable(folder)
    torch.manual_seed(1)
    denoiser = pretrained_denoiser(config)
    before = drawn(denoiser, config, 2.0)
    trained = {
        name: parameter + 0.1 * torch.randn_like(parameter)
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }
    assert trained
    assert all("lora_" in name for name in trained)
    denoiser.load_state_dict(trained, strict=False)
    with_updates = drawn(denoiser, config, 2.0)
    bundle = saved(tmp_path / "bundle", folder, **trained)
    shutil.rmtree(folder)
    assert str(tmp_path) not in (tmp_path / "bundle" / "bundle.json").read_text()
    first = drawn(bundle.denoiser, bundle.config, 2.0)
    torch.testing.assert_close(first, with_updates, atol=1e-4, rtol=1e-4)
    assert (first - before).abs().max() > 0.01
    again = load_bundle(tmp_path / "bundle")
    assert torch.equal(drawn(again.denoiser, again.config, 2.0), first)
    assert again.digest == bundle.digest
    # Its untrained control, and no part of it, needs the folder.
    fresh = build_denoiser(again.diffusion, 4, 8, again.tokenizer)
    assert not torch.equal(drawn(fresh, again.diffusion, 2.0), first)


def test_a_bundle_without_its_tokenizer_is_refused(epsilon: Path, tmp_path: Path) -> None:
    saved(tmp_path / "bundle", epsilon)
    tokenizer = tmp_path / "bundle" / "tokenizer.json"
    tokenizer.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is damaged; copy it again"):
        load_tokenizer(tmp_path / "bundle")
    tokenizer.unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json there; copy the whole folder"):
        load_bundle(tmp_path / "bundle")


def test_folders_of_older_days_load_as_well(epsilon: Path, tmp_path: Path) -> None:
    """Names of layers as in the first releases, half precision, and a tokenizer in two files."""
    folder = Path(shutil.copytree(epsilon, tmp_path / "old"))
    text, vae = folder / "text_encoder" / "model.safetensors", folder / "vae"
    save_file({f"text_model.{name}": t.half() for name, t in load_file(text).items()}, text)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        weights = {
            name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t.half()
            for name, t in weights.items()
        }
    save_file(weights, vae / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    edit_json(vae / "config.json", scaling_factor=None, _diffusers_version="0.6.0")
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type=None)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    _save_in_two_files(tokenizer, folder / "tokenizer")

    config = stable(folder)
    assert config.prediction_type == "epsilon"
    assert autoencoder_recipe(vae).model.latent_scale == 0.18215
    new, old = pretrained_denoiser(stable(epsilon)), pretrained_denoiser(config)
    assert clip_tokens(old.tokenizer, PROMPTS) == clip_tokens(new.tokenizer, PROMPTS)
    for name, tensor in new.text_encoder.state_dict().items():
        torch.testing.assert_close(
            old.text_encoder.state_dict()[name], tensor, atol=1e-3, rtol=1e-3
        )
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            pretrained_autoencoder(autoencoder_recipe(vae).model).encode(x),
            pretrained_autoencoder(autoencoder_recipe(epsilon / "vae").model).encode(x),
            atol=1e-2,
            rtol=1e-2,
        )
    assert weights_digest(config) != weights_digest(stable(epsilon))


def _save_in_two_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    import json

    folder.mkdir()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS}
    special = {"bos_token": "<|startoftext|>"} | {
        f"{name}_token": "<|endoftext|>" for name in ("eos", "pad", "unk")
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said | special))


UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
Damage = Callable[[Path], Any]


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def saying(name: str, **changes: Any) -> Damage:
    return lambda folder: edit_json(folder / name, **changes)


def pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


BAD: dict[str, tuple[Damage, str]] = {
    "another pipeline": (
        saying("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "holds a StableDiffusionXLPipeline: give a folder of Stable Diffusion 1 or 2",
    ),
    "no pipeline at all": (without("model_index.json"), r"no model_index\.json in .*: copy the w"),
    "no JSON": (lambda f: (f / UNET).write_text("{"), r"config\.json is no JSON: copy it again"),
    "another U-Net": (
        saying(UNET, _class_name="SD3Transformer2DModel"),
        "unet holds SD3Transformer2DModel: a UNet2DConditionModel is needed there",
    ),
    "another text encoder": (
        saying("text_encoder/config.json", architectures=["T5EncoderModel"]),
        "text_encoder holds T5EncoderModel: a CLIPTextModel is needed there",
    ),
    "an inpainting model": (saying(UNET, in_channels=9), "takes 9 channels and returns 4, but la"),
    "another text encoder's U-Net": (
        saying(UNET, cross_attention_dim=1024),
        "wants cross_attention_dim 1024, but its text_encoder gives 16 numbers a token",
    ),
    "a U-Net with other inputs": (
        saying(UNET, addition_embed_type="text_time"),
        "wants addition_embed_type, but .*: this is not Stable Diffusion 1 or 2",
    ),
    "a missing part": (lambda f: shutil.rmtree(f / "tokenizer"), r"no tokenizer_config\.json in"),
    "half a tokenizer": (without("tokenizer/tokenizer.json"), r"has no vocab\.json and merges"),
    "another tokenizer": (
        saying("tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer"),
        "is a T5Tokenizer: Stable Diffusion 1 and 2 have a CLIPTokenizer",
    ),
    "a longer tokenizer": (
        saying("tokenizer/tokenizer_config.json", model_max_length=200),
        "model_max_length of 200, but the text_encoder reads 77 tokens",
    ),
    "pickles alone": (
        pickled,
        r"diffusion_pytorch_model\.bin, a pickle, which could run any code: give them as safetens",
    ),
    "no weights": (
        without("text_encoder/model.safetensors"),
        r"no model\.safetensors in .*text_encoder: copy the whole folder",
    ),
    "other betas": (saying(SCHEDULER, beta_end=0.02), r"from 0\.00085 to 0\.02 is unknown here"),
    "another schedule": (saying(SCHEDULER, beta_schedule="sigmoid"), "beta_schedule sigmoid from"),
    "no signal left": (
        saying(SCHEDULER, rescale_betas_zero_snr=True),
        "with rescale_betas_zero_snr is unknown here",
    ),
    "another prediction": (
        saying(SCHEDULER, prediction_type="flow_prediction"),
        "prediction_type 'flow_prediction' is unknown here",
    ),
    "an autoencoder of other channels": (
        saying("vae/config.json", in_channels=4, out_channels=4),
        "vae turns images of 4 channels into images of 4: give an autoencoder of 1 or 3",
    ),
    "an autoencoder of later days": (
        saying("vae/config.json", shift_factor=0.1),
        "vae has a shift_factor, as no autoencoder of Stable Diffusion 1 or 2",
    ),
}


@pytest.fixture(scope="module")
def light(epsilon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with weights that nobody may open."""
    folder = Path(shutil.copytree(epsilon, tmp_path_factory.mktemp("light") / "folder"))
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_unfit_folders_are_refused_in_one_line_unopened(
    case: str, light: Path, tmp_path: Path
) -> None:
    damage, message = BAD[case]
    folder = Path(shutil.copytree(light, tmp_path / "folder"))
    damage(folder)
    with pytest.raises(InputError, match=message) as refused:
        recipe(folder)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("recipe: model: ")


def test_unfit_autoencoders_are_refused(light: Path, vq: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unet holds UNet2DConditionModel: a VQModel or Autoen"):
        autoencoder_recipe(light / "unet")
    with pytest.raises(InputError, match="18 is not divisible by 4"):
        parse_recipe(
            "",
            name="x",
            overrides=[
                f"model={{family: pretrained_autoencoder, pretrained: '{vq}'}}",
                "data.samples.size=18",
            ],
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"x" * 99), "does not load as UNet2DConditionModel"),
        (
            lambda file: save_file({"conv_in.bias": torch.zeros(8)}, file, {"format": "pt"}),
            r"weights such as .* are missing; its config\.json and weights do not belong together",
        ),
    ],
)
def test_damaged_weights_are_refused(
    damage: Damage, message: str, epsilon: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(epsilon, tmp_path / "folder"))
    damage(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=message) as refused:
        pretrained_denoiser(stable(folder))
    assert "\n" not in str(refused.value)


def test_networks_of_published_size() -> None:
    """Parameters of the U-Nets of Stable Diffusion 1.5 and 2."""
    shared = {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    shared["up_block_types"] = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    first = {"_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280, 1280]}
    first |= {"cross_attention_dim": 768, "attention_head_dim": 8, **shared}
    second = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}
    second |= {"use_linear_projection": True}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 12, "vocab_size": 49408}
    tokenizer = Tokenizer(models.BPE())
    for unet, millions in ((first, 859.52), (first | second, 865.91)):
        config = stable(Path("nowhere")).model_copy(
            update={"networks": {"unet": unet, "text_encoder": text}}
        )
        with torch.device("meta"):
            denoiser = build_denoiser(config, 4, 64, tokenizer)
            assert isinstance(denoiser, StableDenoiser)
            context = torch.empty(2, 77, unet["cross_attention_dim"])
            x_t, timestep = torch.empty(2, 4, 64, 64), torch.empty(2)
        assert size(denoiser.unet) == pytest.approx(millions, abs=0.01)
        assert size(denoiser.text_encoder) == pytest.approx(123.06, abs=0.01)
        assert denoiser.unet(x_t, timestep, context).sample.shape == x_t.shape


@pytest.mark.parametrize(
    ("name", "channels", "millions"),
    [("VQModel", [128, 256, 512], 55.32), ("AutoencoderKL", [128, 256, 512, 512], 83.65)],
)
def test_autoencoders_of_published_size(name: str, channels: list[int], millions: float) -> None:
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    network = {"_class_name": name, "block_out_channels": channels, "layers_per_block": 2, **blocks}
    network |= {"num_vq_embeddings": 8192} if name == "VQModel" else {}
    config = PretrainedAutoencoderConfig(pretrained=Path("nowhere"), network=network)
    with torch.device("meta"):
        autoencoder = build_autoencoder(config)
        latents = autoencoder.encode(torch.empty(1, 1, 64, 64))
    cells = 64 // config.downsampling
    assert latents.shape == (1, config.latent_channels, cells, cells)
    assert size(autoencoder) == pytest.approx(millions, abs=0.01)


def size(network: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6
