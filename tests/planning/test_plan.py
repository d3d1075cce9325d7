"""Plans of real recipes on described clusters, against arithmetic done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysynth.cli import main
from raysynth.config import load_recipe
from raysynth.config.hardware import Hardware, load_hardware
from raysynth.errors import InputError
from raysynth.planning.plan import find_autoencoder, plan
from raysynth.sampling.footprint import drawing_footprint
from raysynth.training.footprint import training_footprint

ROOT = Path(__file__).parents[2]
RECIPES, CLUSTERS = ROOT / "jobs" / "recipes", ROOT / "cluster" / "hardware"
TINY = RECIPES / "lung_ddpm_tiny.yaml"


def quiet(**changes: object) -> Hardware:
    """A cluster on which nothing happens by chance."""
    values = {
        "name": "quiet",
        "gpu": "test",
        "num_gpus": 4,
        "memory_gib": 8,
        "peak_bf16_tflops": 2e-3,
        "peak_fp32_tflops": 1e-3,
        "training_utilisation": 0.5,
        "sampling_utilisation": 0.25,
        "gpu_link_gb_s": 100,
        "network_gb_s": 10,
        "store_gb_s": 1000,
        "straggler_sigma": 0,
        "handling_s_per_megavoxel": 0,
        "gpu_hours_between_failures": 1e12,
        "dollars_per_gpu_hour": 2,
    }
    return Hardware.model_validate(values | changes)


def test_time_is_arithmetic_over_rate() -> None:
    config = load_recipe(TINY)
    made = plan(config, quiet())
    step = config.training.local_batch_size * training_footprint(config).flops / 0.5e9
    steps = config.training.max_seen_samples / config.training.global_batch_size
    training = made.parts["training"]
    assert training["time"] == pytest.approx(steps * step, rel=1e-3)
    assert training["cost"] == pytest.approx(2 * training["time"] / 3600)
    drawing = drawing_footprint(config)
    assert drawing is not None
    assert drawing.num_calls == config.sampling.num_inference_steps
    sample = drawing.num_calls * drawing.call_flops / 0.25e9
    assert made.parts["drawing"]["a sample"] == pytest.approx(sample)
    whole = made.parts["drawing"]["time"]
    assert whole == pytest.approx(config.sampling.num_samples * sample, rel=0.01)
    for part in made.parts.values():
        assert sum(part.shares.values()) == pytest.approx(1, abs=1e-3)
    assert (training.bottleneck, made.parts["drawing"].bottleneck) == ("computing", "denoising")


def test_guided_models_call_twice() -> None:
    config = load_recipe(RECIPES / "phantom_demo.yaml", ["sampling.guidance_scale=2"])
    autoencoder = find_autoencoder(config, RECIPES)
    found = drawing_footprint(config, autoencoder)
    assert found is not None
    assert found.num_calls == 2 * config.sampling.num_inference_steps
    assert found.decoding_flops > 0


def test_half_the_time_on_twice_the_workers_but_for_the_exchange() -> None:
    one, two = (
        plan(
            load_recipe(TINY, [f"training.num_workers={n}", "training.open_shards=2"]),
            quiet(overlaps=False),
        )
        for n in (1, 2)
    )
    ratio = two.parts["training"]["step"] / one.parts["training"]["step"]
    assert 0.5 < ratio < 0.51


def test_a_slow_network_and_a_slow_store_are_named() -> None:
    changes = ["training.num_workers=2", "training.open_shards=2"]
    config = load_recipe(TINY, changes)
    slow = quiet(gpus_per_node=1, network_gb_s=1e-6)
    assert plan(config, slow).parts["training"].bottleneck == "exchanging gradients"
    full = quiet(store_puts_per_s=1e-3)
    assert plan(config, full).parts["drawing"].bottleneck == "waiting for the store"


def test_what_does_not_fit_is_said_with_what_would() -> None:
    config = load_recipe(TINY, ["training.num_workers=2", "training.open_shards=2"])
    made = plan(config, quiet(num_gpus=1))
    assert not made.fits
    assert "training.num_workers 2: quiet has 1; take fewer" in made.advice
    made = plan(load_recipe(TINY), quiet(memory_gib=0.004))
    assert not made.fits
    assert any("a training step needs" in line for line in made.advice)


def test_every_described_cluster_can_be_read() -> None:
    names = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
    assert names == ["h100_1000", "h100_8", "rtx4090"]
    for name in names:
        assert load_hardware(CLUSTERS / f"{name}.yaml").name == name


def test_the_command_prints_every_figure_with_its_basis(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", str(TINY), "--hardware", str(CLUSTERS / "rtx4090.yaml")]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "lung_ddpm_tiny on rtx4090: 1 x RTX 4090" in text
    assert "training, held up by" in text
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert all(one["basis"] for part in told["parts"].values() for one in part["figures"])
    assert told["cluster"]["num_gpus"] == 1


def test_bad_input_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("gpu: H100\nmemory: 80\n")
    assert main(["plan", str(TINY), "--hardware", str(wrong)]) == 2
    assert "unknown key memory; valid keys there: name, gpu, num_gpus" in capsys.readouterr().err
    assert main(["plan", str(TINY), "--hardware", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file or directory" in capsys.readouterr().err
    config = load_recipe(RECIPES / "phantom_demo.yaml", [f"work_dir={tmp_path}"])
    with pytest.raises(InputError, match=r"neither the bundle .* nor a recipe"):
        find_autoencoder(config, tmp_path)
    assert main(["plan", str(RECIPES / "lung_ddpm.yaml")]) == 2
    assert "wants GPUs and there is none here" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two workers, in earnest: the plan has a rate, an exchange and a memory of this machine."""
    changes = ["training.num_workers=2", "training.open_shards=2", f"work_dir={tmp_path}"]
    options = [word for change in changes for word in ("--set", change)]
    assert main(["plan", str(TINY), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cluster"]["name"] == "here"
    assert 0 < told["cluster"]["training_utilisation"] < 1
    figures = {one["name"]: one["value"] for one in told["parts"]["training"]["figures"]}
    assert figures["network share"] > 0
    assert figures["time"] > 0
