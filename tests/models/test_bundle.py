import json
import pickle

import numpy as np
import pytest
import torch

from raysynth.condition import Condition
from raysynth.config.data import SliceSamples
from raysynth.config.model import (
    AutoencoderKLConfig,
    LatentDiffusionConfig,
    SemanticDiffusionConfig,
    SpadeGanConfig,
    VQVAEConfig,
)
from raysynth.errors import InputError
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.bundle import load_bundle, read_facts, save_bundle
from raysynth.models.conditioner import collate
from raysynth.models.denoiser import build_denoiser
from raysynth.models.facts import BundleFacts, model_card

SMALL = {"channels": (8, 8, 8), "num_res_blocks": 1, "norm_num_groups": 8}
AUTOENCODERS = {
    "kl": AutoencoderKLConfig(**SMALL, window_hu=(-1000, 400)),
    "vq": VQVAEConfig(**SMALL, num_codes=16),
}
DIFFUSION = LatentDiffusionConfig(
    autoencoder="bundles/elsewhere",
    channels=(8, 16),
    attention_levels=(False, True),
    num_res_blocks=1,
    num_head_channels=8,
    norm_num_groups=8,
)


def facts(model, **changes):
    return BundleFacts(
        model=model,
        samples=SliceSamples(size=32),
        intensity="hu",
        sources=("lidc",),
        snapshot="ABC123",
        patients={"train": 20, "val": 3, "test": 4},
        seen_samples=12_800,
        **{"indicative": False} | changes,
    )


@pytest.fixture
def diffusion_bundle(tmp_path):
    torch.manual_seed(0)
    autoencoder, denoiser = build_autoencoder(AUTOENCODERS["kl"]), build_denoiser(DIFFUSION, 4, 8)
    said = facts(
        DIFFUSION,
        autoencoder=AUTOENCODERS["kl"],
        latent_scale=0.5,
        metrics={"fid/slice/all/ct-conv@1/64": 12.5},
    )
    path = tmp_path / "bundles" / "mine"
    digest = save_bundle(path, said, autoencoder.state_dict(), denoiser.state_dict())
    return path, digest, denoiser, said


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_survives(tmp_path, name):
    torch.manual_seed(0)
    autoencoder = build_autoencoder(AUTOENCODERS[name]).eval()
    digest = save_bundle(tmp_path / name, facts(AUTOENCODERS[name]), autoencoder.state_dict())
    bundle = load_bundle(tmp_path / name)
    assert bundle.digest == digest
    assert bundle.denoiser is None
    assert bundle.config == AUTOENCODERS[name]
    assert bundle.latent_shape == (AUTOENCODERS[name].latent_channels, 8, 8)
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        latents = bundle.autoencoder.encode(x)
        assert torch.equal(latents, autoencoder.encode(x))
        assert torch.equal(bundle.autoencoder.decode(latents), autoencoder.decode(latents))


def test_diffusion_model_survives(diffusion_bundle):
    path, digest, denoiser, said = diffusion_bundle
    bundle = load_bundle(path)
    assert (bundle.facts, bundle.digest) == (said, digest)
    assert bundle.window_hu == (-1000, 400)
    assert bundle.samples.pixel_mm == 360 / 32
    assert bundle.diffusion.prediction_type == "epsilon"
    assert sorted(file.name for file in path.iterdir()) == [
        "autoencoder.safetensors",
        "bundle.json",
        "card.md",
        "denoiser.safetensors",
    ]
    x_t, timestep = torch.randn(1, 4, 8, 8), torch.tensor([3])
    condition = collate([], 32).null()
    condition = type(condition)(
        torch.ones(1, 32, 32, dtype=torch.uint8),
        torch.tensor([[3, 3, 9, 9]]),
        torch.tensor([[1, 2, 3, 4, 5]]),
    )
    with torch.no_grad():
        expected = denoiser.eval()(x_t, timestep, condition)
        assert torch.equal(bundle.denoiser(x_t, timestep, condition), expected)


def test_a_model_of_pixels_needs_no_autoencoder(tmp_path):
    small = {name: getattr(DIFFUSION, name) for name in ("channels", "attention_levels")}
    groups = {"num_head_channels": 8, "norm_num_groups": 8, "layout_channels": 8}
    model = SemanticDiffusionConfig(**small, **groups, window_hu=(-1350, 150))
    torch.manual_seed(0)
    denoiser = build_denoiser(model, 1, 32).eval()
    digest = save_bundle(tmp_path / "semantic", facts(model), None, denoiser.state_dict())
    bundle = load_bundle(tmp_path / "semantic")
    assert (bundle.digest, bundle.autoencoder) == (digest, None)
    assert (bundle.window_hu, bundle.latent_shape) == ((-1350, 150), (1, 32, 32))
    condition = collate([Condition(np.eye(32, dtype=np.uint8))], 32)
    x_t, timestep = torch.randn(1, 1, 32, 32), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(
            bundle.denoiser(x_t, timestep, condition), denoiser(x_t, timestep, condition)
        )


def test_no_path_of_the_training_machine_is_kept(diffusion_bundle):
    path, *_ = diffusion_bundle
    assert "elsewhere" not in (path / "bundle.json").read_text()
    assert read_facts(path).model.autoencoder.name == "autoencoder.safetensors"


def test_card_says_which_part_of_a_published_loss_is_missing():
    left_out = "Left out: the perceptual term of the published loss"
    assert left_out in model_card(facts(SpadeGanConfig()), "gan")
    assert "with no discriminator" in model_card(facts(AUTOENCODERS["kl"]), "plain")
    against = VQVAEConfig(**SMALL, adversarial_weight=0.1)
    assert "with a discriminator at weight 0.1" in model_card(facts(against), "sharp")
    assert "Left out" not in model_card(facts(SemanticDiffusionConfig()), "diffusion")


def test_card_states_the_facts(diffusion_bundle):
    path, *_ = diffusion_bundle
    card = (path / "card.md").read_text()
    for part in ("# mine", "Research only", "synthetic", "LIDC-IDRI", "12,800", "[-1000, 400]"):
        assert part in card
    assert "| `fid/slice/all/ct-conv@1/64` | 12.5 |" in card
    assert "indicative" not in card


def test_digest_follows_the_content_alone(diffusion_bundle, tmp_path):
    path, digest, _, said = diffusion_bundle
    (path / "evil.pkl").write_bytes(pickle.dumps({"weights": 1}))
    assert load_bundle(path).digest == digest
    again = load_bundle(path)
    copy = tmp_path / "other" / "mine"
    weights = again.autoencoder.state_dict(), again.denoiser.state_dict()
    assert save_bundle(copy, said, *weights) == digest
    weights[1][next(iter(weights[1]))].add_(1e-3)
    assert save_bundle(copy, said, *weights) != digest
    assert [entry.name for entry in copy.parent.iterdir()] == ["mine"]


class Boom:
    """A pickle that would leave a trace if anybody opened it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_a_pickle_in_place_of_weights_is_refused_unopened(diffusion_bundle, tmp_path):
    path, *_ = diffusion_bundle
    (path / "denoiser.safetensors").write_bytes(pickle.dumps(Boom(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"denoiser\.safetensors is damaged"):
        load_bundle(path)
    assert not (tmp_path / "ran").exists()


def _rewrite(path, **changes):
    file = path / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "bundle.json").unlink(), r"no bundle\.json there; train the model first"),
        (lambda p: (p / "bundle.json").write_text("{"), r"bundle\.json is no JSON"),
        (lambda p: _rewrite(p, schema_version="raysynth-bundle-9"), "'raysynth-bundle-9', but"),
        (lambda p: _rewrite(p, hidden=1), r"bundle\.json: hidden: Extra inputs"),
        (lambda p: _rewrite(p, autoencoder=None), "autoencoder: give it for a latent diffusion"),
        (lambda p: (p / "denoiser.safetensors").unlink(), r"no denoiser\.safetensors there"),
        (lambda p: (p / "denoiser.safetensors").write_bytes(b"x" * 99), "is damaged"),
        (
            lambda p: (p / "autoencoder.safetensors").rename(p / "denoiser.safetensors"),
            r"no autoencoder\.safetensors there",
        ),
        (
            lambda p: _rewrite(p, samples={"kind": "slices", "size": 64}),
            r"denoiser\.safetensors does not fit bundle\.json: .* has shape \(.*expected \(",
        ),
    ],
)
def test_damaged_bundles_are_refused_in_one_line(diffusion_bundle, damage, message):
    path, *_ = diffusion_bundle
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        load_bundle(path)
    assert "\n" not in str(caught.value)
