"""The application that Ray Serve runs: `serve deploy`'s import path, and `raysynth serve`."""

from __future__ import annotations

import logging
import time
from typing import Any

from ray import serve
from ray.serve import Application

from raysynth.config import Diffusion, ExperimentConfig, load_recipe
from raysynth.errors import InputError
from raysynth.evaluation.stream import open_reference
from raysynth.models.bundle import read_facts
from raysynth.serving.gateway import Gateway
from raysynth.serving.metrics import MetricsKeeper
from raysynth.serving.replica import Replica, served_bundles, service_folder
from raysynth.serving.tokens import FOLDER, add_token, load_tokens
from raysynth.session import check_resources, connect

logger = logging.getLogger(__name__)

NAME = "raysynth"
DRAIN_S = 600
"""A replica that is told to end finishes what it has, for so long."""

OWNER = "owner"
"""Of the token that is made where there is none yet."""


def build(arguments: dict[str, Any]) -> Application:
    """The application of a recipe, for Ray Serve's config files.

    Args:
        arguments: `recipe`, the path of its file, and `set`, a list of overrides.
    """
    return application(load_recipe(arguments["recipe"], arguments.get("set", [])))


def application(config: ExperimentConfig, replica_class: type[Replica] = Replica) -> Application:
    """Gateway, replicas and metrics of a recipe's bundle, and of others beside it.

    Args:
        config: the recipe.
        replica_class: what draws.

    Raises:
        InputError: there is no bundle, or one that draws in one call or not at all.
    """
    config = config.absolute()
    serving, sampling = config.serving, config.sampling
    for path in served_bundles(config).values():
        facts = read_facts(path)
        if not isinstance(facts.model, Diffusion):
            raise InputError(f"bundle {path} is a {facts.model.family}: serve a diffusion model")
    if serving.metrics:
        open_reference(config)  # says what is missing
    at_once = 2 * sampling.batch_size + serving.max_waiting
    scaling: dict[str, Any] = {"num_replicas": serving.num_replicas}
    if serving.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": serving.num_replicas,
                "max_replicas": serving.max_replicas,
                # Another one as soon as all slots are taken.
                "target_ongoing_requests": sampling.batch_size,
                "upscale_delay_s": 10,
                "downscale_delay_s": 120,
            }
        }
    replica: Any = serve.deployment(
        replica_class,
        name="replica",
        # One more than it takes: it refuses by itself, and says why.
        max_ongoing_requests=at_once + 8,
        ray_actor_options={
            "num_cpus": sampling.threads_per_actor,
            "num_gpus": int(sampling.use_gpu),
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=DRAIN_S,
        **scaling,
    )
    keeper: Any = serve.deployment(
        MetricsKeeper, name="metrics", ray_actor_options={"num_cpus": 0.25}
    )
    gateway: Any = Gateway
    most = serving.max_replicas or serving.num_replicas
    ingress = gateway.options(
        max_ongoing_requests=4 * at_once * most, ray_actor_options={"num_cpus": 0.1}
    )
    streams = keeper.bind(config, service_folder(config) / "metrics")
    bound: Application = ingress.bind(replica.bind(config), streams, config)
    return bound


def serve_here(config: ExperimentConfig, host: str, port: int) -> None:
    """Serves until it is interrupted.

    A first token is made, and told, if there is none.

    Raises:
        InputError: there is nothing to serve, or too little to serve it on.
    """
    config = config.absolute()
    app = application(config)
    folder = config.work_dir / FOLDER
    with connect():
        replicas = config.serving.num_replicas
        each = {"CPU": config.sampling.threads_per_actor, "GPU": int(config.sampling.use_gpu)}
        check_resources(replicas, each, "serving")
        if not load_tokens(folder):
            token = add_token(folder, OWNER)
            logger.warning("token of %s, told this once: %s", OWNER, token)
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name=NAME, route_prefix="/")
        logger.warning("serving http://%s:%d/docs until you press Ctrl-C", host, port)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            serve.shutdown()  # type: ignore[no-untyped-call]
