"""What is under cluster/ fits KubeRay's own definitions, and names only what there is."""

from __future__ import annotations

import importlib
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from raysynth.config import load_recipe
from raysynth.progress import METRICS
from raysynth.serving import gateway
from raysynth.serving.replica import LEVELS, TOTALS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
CLUSTER_IN = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def documents() -> list[dict[str, Any]]:
    return [one for file in MANIFESTS for one in yaml.safe_load_all(file.read_text())]


def clusters() -> dict[str, dict[str, Any]]:
    """The specification of every Ray cluster."""
    found = {}
    for one in documents():
        if one["kind"] in RAY_KINDS:
            place = CLUSTER_IN.get(one["kind"])
            found[one["kind"]] = one["spec"][place] if place else one["spec"]
    return found


def schema_of(kind: str) -> dict[str, Any]:
    folder = os.environ.get("RAYSYNTH_SCHEMAS")
    if not folder:
        pytest.skip("RAYSYNTH_SCHEMAS is not set: KubeRay's definitions are not here")
    packed = Path(folder) / "kuberay" / f"ray.io_{RAY_KINDS[kind]}.yaml.xz"
    definition = yaml.safe_load(lzma.decompress(packed.read_bytes()))
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def unknown_fields(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """Fields that the schema does not list: Kubernetes drops them, or refuses them if strict."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    if isinstance(value, list):
        items = schema.get("items", {})
        return [f for n, one in enumerate(value) for f in unknown_fields(one, items, f"{at}[{n}]")]
    if not isinstance(value, dict) or "additionalProperties" in schema:
        return []
    listed = schema.get("properties", {})
    if not listed:
        return []
    unknown = [f"{at}.{name}" for name in value if name not in listed]
    for name in value.keys() & listed.keys():
        unknown += unknown_fields(value[name], listed[name], f"{at}.{name}")
    return unknown


@pytest.mark.parametrize("kind", RAY_KINDS)
def test_manifests_fit_the_definitions(kind: str) -> None:
    schema = schema_of(kind)
    (manifest,) = [one for one in documents() if one["kind"] == kind]
    # Kubernetes checks the metadata itself: the definition says no more than that it is an object.
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(manifest)] == []
    assert unknown_fields(manifest["spec"], schema["properties"]["spec"]) == []


def test_a_slip_of_the_pen_is_seen() -> None:
    schema = schema_of("RayCluster")
    (manifest,) = [one for one in documents() if one["kind"] == "RayCluster"]
    spec = manifest["spec"] | {"autoscalerOption": {}}
    assert unknown_fields(spec, schema["properties"]["spec"]) == [".autoscalerOption"]


def test_clusters_are_closed_and_their_heads_do_no_work() -> None:
    found = clusters()
    assert set(found) == set(RAY_KINDS)
    for kind, spec in found.items():
        assert spec["authOptions"] == {"mode": "token"}, kind
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", kind
        assert spec["enableInTreeAutoscaling"], kind
        assert all(
            group["maxReplicas"] > group["minReplicas"] for group in spec["workerGroupSpecs"]
        )
    policy, of_api = [one for one in documents() if one["kind"] == "NetworkPolicy"]
    assert of_api["spec"]["podSelector"] == policy["spec"]["podSelector"]
    (clients,) = of_api["spec"]["ingress"]
    assert clients["ports"] == [{"port": "serve"}]
    # The label that KubeRay gives all of its pods.
    assert policy["spec"]["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    everything, metrics = policy["spec"]["ingress"]
    assert all("podSelector" in peer for peer in everything["from"])
    assert metrics["ports"] == [{"port": "metrics"}]


def test_every_node_has_the_shared_folder_and_a_port_for_metrics() -> None:
    for kind, spec in clusters().items():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
            assert mounts == {"shared": "/shared", "shm": "/dev/shm"}, kind
            assert {one["name"] for one in pod["volumes"]} == set(mounts), kind
            assert {"containerPort": 8080, "name": "metrics"} in container["ports"], kind
            assert container["resources"]["requests"] == container["resources"]["limits"], kind


@pytest.mark.parametrize("file", [*MANIFESTS, CLUSTER / "README.md", CLUSTER / "slurm.sh"])
def test_jobs_and_recipes_that_are_named_exist(file: Path) -> None:
    text = file.read_text()
    for verb in re.findall(r"jobs\.([a-z]+)", text):
        assert (ROOT / "jobs" / f"{verb}.py").exists(), verb
    recipes = re.findall(r"jobs/recipes/([a-z0-9_]+)\.yaml", text)
    recipes += re.findall(r"(?:RECIPE|AUTOENCODER): ([a-z0-9_]+)", text)
    for recipe in recipes:
        assert (ROOT / "jobs" / "recipes" / f"{recipe}.yaml").exists(), recipe


def test_the_dashboard_shows_what_is_exported() -> None:
    board = json.loads((CLUSTER / "grafana.json").read_text())
    asked = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    shown = {name.removeprefix("ray_") for name in re.findall(r"ray_raysynth_\w+", asked)}
    assert shown == {*METRICS, *LEVELS, *TOTALS, *gateway.METRICS}


def test_the_job_runs_the_verbs_in_order() -> None:
    (job,) = [one for one in documents() if one["kind"] == "RayJob"]
    command = job["spec"]["entrypoint"]
    assert re.findall(r"jobs\.([a-z]+)", command) == [
        *("ingest", "shard", "train", "encode", "train", "synthesize", "evaluate", "audit")
    ]
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    dry = command.replace("python -m", "echo").replace("cd /raysynth;", "")
    said = subprocess.run(
        ["sh", "-c", dry], env=os.environ | variables, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(said) == 8
    assert said[2].startswith("jobs.train jobs/recipes/lidc_vq.yaml --set work_dir=/shared/runs")


def test_the_service_names_an_application_that_can_be_built() -> None:
    (service,) = [one for one in documents() if one["kind"] == "RayService"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (app,) = config.applications
    module, _, name = str(app.import_path).partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    recipe = ROOT / str(app.args["recipe"]).removeprefix("/raysynth/")
    resolved = load_recipe(recipe, app.args["set"])
    assert str(resolved.bundle_path) == "/shared/runs/bundles/lidc_attributes_ldm_4"
    assert resolved.serving.num_replicas == 8


def test_the_slurm_script_asks_for_what_it_needs(tmp_path: Path) -> None:
    """`srun` and `scontrol` of a cluster that only writes down what it is told."""
    for name, body in {"scontrol": "echo first; echo second", "srun": 'echo "$@"'}.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/sh\n{body}\n")
        stub.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    script = str(CLUSTER / "slurm.sh")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", script, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    job = run("train", "r.yaml", "--set", "work_dir=/scratch/a b")
    assert job.stdout.split() == [
        *("--kill-on-bad-exit=1", "ray", "symmetric-run", "--address", "first:6379"),
        *("--min-nodes", "2", "--", "python", "-m", "jobs.train", "r.yaml"),
        *("--set", "work_dir=/scratch/a", "b"),
    ]
    refused = run()
    assert refused.returncode != 0
    assert "which verb" in refused.stderr


def test_the_linter_of_dockerfiles_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("there is no hadolint for this platform")
    command = [str(linter), "--no-color", str(CLUSTER / "Dockerfile")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


def test_the_image_is_pinned_and_runs_as_nobody_special() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    steps = [line for line in lines if line and not line.startswith(("#", " "))]
    assert re.fullmatch(r"FROM python:3\.\d+-slim", steps[0])
    assert any("--constraint constraints.txt" in line for line in lines)
    users = [line.split()[1] for line in steps if line.startswith("USER ")]
    assert users == ["1000"]
    for line in steps:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
