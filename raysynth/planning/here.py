"""This machine as a plan sees it: how fast it takes steps of a recipe, tried out."""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysynth.condition import Condition
from raysynth.config import Diffusion, ExperimentConfig, Gan
from raysynth.config.hardware import Hardware
from raysynth.config.model import AutoencoderConfig
from raysynth.diffusion.schedule import NoiseSchedule
from raysynth.errors import InputError
from raysynth.models.autoencoder import build_autoencoder
from raysynth.models.conditioner import collate
from raysynth.sampling.adherence import NODULE_LUNG_LABELS, count_unrequested, find_nodule
from raysynth.sampling.engine import SampleRequest, SamplingEngine
from raysynth.sampling.footprint import DrawingFootprint, drawing_footprint
from raysynth.training.build import fresh_network
from raysynth.training.fitting import check_fits
from raysynth.training.footprint import (
    Footprint,
    bare_objective,
    example_batch,
    latent_shape,
)

PROBE_BYTES = 2**26
GEMM_SIZE = 2048
MEASURED_S = 5.0
"""So long steps are taken, two at least."""

MOST_S = 120.0
"""That one step may take to be tried out."""

RESTART_S = 15.0
"""That a group of Ray Train workers takes to start."""


def measure_here(config: ExperimentConfig, autoencoder: AutoencoderConfig | None) -> Hardware:
    """Takes a few steps of a recipe with as many processes as it wants, all at once.

    Args:
        config: the recipe.
        autoencoder: of a model of latents.

    Raises:
        InputError: it does not fit into this machine, or takes too long to be tried out.
    """
    training, sampling = config.training, config.sampling
    workers, actors = training.num_workers, sampling.num_actors
    if training.use_gpu or sampling.use_gpu:
        if not torch.cuda.is_available():
            raise InputError(
                f"{config.name} wants GPUs and there is none here: name the cluster it is for by "
                "--hardware, or set training.use_gpu and sampling.use_gpu to false"
            )
        workers = actors = 1  # they do not get in each other's way
        processes, name = torch.cuda.device_count(), torch.cuda.get_device_name()
        memory = float(torch.cuda.mem_get_info()[1])
    else:
        processes, name = max(workers, actors), f"CPU, {training.threads_per_worker} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    footprint = check_fits(config, autoencoder, memory).footprint
    trained = _in_processes(_train, workers, config, autoencoder, footprint)
    drawing = drawing_footprint(config, autoencoder)
    drawn = {} if drawing is None else _in_processes(_draw, actors, config, autoencoder, drawing)
    config.work_dir.mkdir(parents=True, exist_ok=True)
    disk = write_speed(config.work_dir) / 1e3
    half = training.precision == "bf16"
    training_peak = trained["peak"]
    drawing_peak = drawn.get("peak", training_peak)
    return Hardware(
        name="here",
        gpu=name,
        num_gpus=processes,
        gpus_per_node=processes,
        memory_gib=memory / 2**30,
        peak_bf16_tflops=training_peak / 1e12,
        peak_fp32_tflops=(drawing_peak if half else training_peak) / 1e12,
        training_utilisation=footprint.flops / trained["sample_s"] / training_peak,
        sampling_utilisation=drawn.get("call_flops_per_s", training_peak) / drawing_peak,
        decoding_utilisation=drawn.get("decoding_flops_per_s", training_peak) / drawing_peak,
        handling_s_per_megavoxel=drawn.get("handling_s", 0.0),
        overlaps=training.use_gpu,
        gpu_link_gb_s=trained.get("link_gb_s", 100.0),
        network_gb_s=1.0,  # there is one node
        store_gb_s=disk,
        checkpoint_gb_s=disk / max(workers, 1),
        straggler_sigma=trained["sigma"],
        restart_s=RESTART_S,
    )


def write_speed(folder: Path) -> float:
    """MB a second that a folder takes, until they are on the disk."""
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    block = secrets.token_bytes(2**20)
    try:
        started = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return PROBE_BYTES / 1e6 / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)


def _in_processes(
    measure: Callable[..., dict[str, float]], count: int, *arguments: Any
) -> dict[str, float]:
    """What a function measures in several processes that run at once, on average."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _process, (count, folder, measure, arguments), nprocs=count
        )
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    return {name: sum(one[name] for one in found) / count for name in found[0]}


def _process(
    rank: int,
    count: int,
    folder: str,
    measure: Callable[..., dict[str, float]],
    arguments: tuple[Any, ...],
) -> None:
    if count > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=count
        )
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measure(*arguments)))
    if count > 1:
        torch.distributed.destroy_process_group()


def _train(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None, footprint: Footprint
) -> dict[str, float]:
    """Optimizer steps without an exchange of gradients, and the exchange by itself."""
    training = config.training
    device = torch.device("cuda" if training.use_gpu else "cpu")
    torch.set_num_threads(training.threads_per_worker)
    half = training.precision == "bf16"
    peak = _gemm_flops(device, torch.bfloat16 if half else torch.float32)
    micro_batch = training.forward_batch_size
    _check_patience(footprint.flops * micro_batch, peak)
    shape = latent_shape(config, autoencoder)
    objective = bare_objective(config, autoencoder)
    objective.module.to(device)
    batch = example_batch(config, micro_batch, shape)
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, training.learning_rate, fused=True)

    def step() -> None:
        for _ in range(training.gradient_accumulation_steps):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = objective.loss(objective.module, batch, device)["loss"]
            torch.autograd.backward(loss / training.gradient_accumulation_steps)
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.01)

    times = _timed(step, device)
    found = {
        "peak": peak,
        "sample_s": float(np.mean(times)) / training.local_batch_size,
        "sigma": float(np.std(np.log(times))),
    }
    if torch.distributed.is_initialized():
        gradients = torch.zeros(footprint.num_trained)
        seconds = _mean_s(lambda: torch.distributed.all_reduce(gradients), device)
        count = torch.distributed.get_world_size()
        sent_gb = 2 * gradients.numel() * 4 * (count - 1) / count / 1e9
        found["link_gb_s"] = sent_gb / seconds
    return found


def _draw(
    config: ExperimentConfig, autoencoder: AutoencoderConfig | None, footprint: DrawingFootprint
) -> dict[str, float]:
    """Network calls at the recipe's batch size, decoding, and what is done with a sample then."""
    model, sampling, shape = config.model, config.sampling, config.samples.shape
    device = torch.device("cuda" if sampling.use_gpu else "cpu")
    torch.set_num_threads(sampling.threads_per_actor)
    peak = _gemm_flops(device, torch.float32)
    batch, dims = sampling.batch_size, len(shape)
    _check_patience(footprint.call_flops * batch, peak)
    latent = latent_shape(config, autoencoder)
    found = {"peak": peak}
    network: Any = fresh_network(config, latent).to(device).eval()
    if isinstance(model, Gan):
        generator = network.generator
        condition = collate([Condition()] * batch, shape[-1], dims).to(device)
        with torch.inference_mode():
            seconds = _mean_s(lambda: generator(generator.encode(condition)), device)
        found["call_flops_per_s"] = batch * footprint.call_flops / seconds
    else:
        assert isinstance(model, Diffusion)
        guided = sampling.guidance_scale != 1
        engine = SamplingEngine(
            network,
            NoiseSchedule.from_config(model),
            model.prediction_type,
            latent or (1, *shape),
            shape[-1],
            batch,
            guided=guided,
            compiled=sampling.compile,
            device=device,
        )

        def step() -> None:
            while engine.num_busy < batch:
                steps = sampling.num_inference_steps
                engine.admit(SampleRequest("one", 0, Condition(), sampling.sampler, steps))
            engine.step()
            engine.retire()

        seconds = _mean_s(step, device)
        calls = batch * (2 if guided else 1)
        found["call_flops_per_s"] = calls * footprint.call_flops / seconds
    if autoencoder is not None:
        decoder = build_autoencoder(autoencoder, dims).to(device).eval()
        assert latent is not None
        latents = torch.zeros(batch, *latent, device=device)
        with torch.inference_mode():
            seconds = _mean_s(lambda: decoder.decode(latents), device)
        found["decoding_flops_per_s"] = batch * footprint.decoding_flops / seconds
    one = example_batch(config, 1)
    hu, layout, box = one["hu"][0], one["layout"][0], tuple(one["box"][0].tolist())
    lung, pixel_mm = np.isin(layout, NODULE_LUNG_LABELS), config.samples.pixel_mm

    def handle() -> None:
        find_nodule(hu, lung, box, pixel_mm)
        count_unrequested(hu, layout, box, pixel_mm)

    found["handling_s"] = _mean_s(handle, torch.device("cpu")) / (hu.size / 1e6)
    return found


def _mean_s(call: Callable[[], Any], device: torch.device) -> float:
    return float(np.mean(_timed(call, device)))


def _timed(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of each of some calls, after one that warms up; all processes take part together."""
    call()
    times: list[float] = []
    while not _agreed(len(times) >= 2 and sum(times) >= MEASURED_S):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def _agreed(done: bool) -> bool:
    """Whether any process is done: so all of them leave a loop together."""
    if not torch.distributed.is_initialized():
        return done
    done_anywhere = torch.tensor(float(done))
    torch.distributed.all_reduce(done_anywhere, torch.distributed.ReduceOp.MAX)
    return bool(done_anywhere)


def _gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: what a network could reach at most."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=dtype)
    seconds = min(_timed(lambda: a @ a, device))
    return 2 * GEMM_SIZE**3 / seconds


def _check_patience(flops: float, peak: float) -> None:
    seconds = flops / (0.2 * peak)
    if seconds > MOST_S:
        raise InputError(
            f"one step of this recipe would take about {math.ceil(seconds / 60)} minutes here: "
            "name the cluster it is for by --hardware"
        )
