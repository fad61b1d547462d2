"""`launch/serve.yaml` and `launch/ray_serve.py`: servers that are started for us, and share a store."""

import importlib.util
from pathlib import Path
import sys
import types
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
import yaml

from tests.serve.conftest import until
from voco_jax.serve.__main__ import _parser

LAUNCH = Path(__file__).parents[2] / "launch"
PROBE = {
    "httpGet": {"path": str, "port": str}, "periodSeconds": int, "timeoutSeconds": int, "failureThreshold": int,
}  # fmt: skip
LABELS = {"app": str}
CONTAINER = {
    "name": str, "image": str, "command": [str], "env": [{"name": str, "value": str}],
    "ports": [{"name": str, "containerPort": int}], "startupProbe": PROBE, "readinessProbe": PROBE,
    "livenessProbe": PROBE, "lifecycle": {"preStop": {"sleep": {"seconds": int}}},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "resources": {
        "requests": {"cpu": str, "memory": str, "ephemeral-storage": str},
        "limits": {"nvidia.com/gpu": int, "memory": str},
    },
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}  # fmt: skip
POD = {
    "serviceAccountName": str, "nodeSelector": {"cloud.google.com/gke-accelerator": str},
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int, "seccompProfile": {"type": str}},
    "terminationGracePeriodSeconds": int, "containers": [CONTAINER],
    "volumes": [{"name": str, "secret": {"secretName": str}, "emptyDir": {"sizeLimit": str}}],
}  # fmt: skip
SCRAPED = {f"prometheus.io/{name}": str for name in ("scrape", "port", "path")}
# The fields of https://kubernetes.io/docs/reference/kubernetes-api/ that the file uses, by version and kind
SPECS: dict[tuple[str, str], Any] = {
    ("apps/v1", "Deployment"): {
        "selector": {"matchLabels": LABELS}, "strategy": {"rollingUpdate": {"maxSurge": int, "maxUnavailable": int}},
        "template": {"metadata": {"labels": LABELS, "annotations": SCRAPED}, "spec": POD},
    },
    ("v1", "Service"): {
        "selector": LABELS, "ports": [{"name": str, "port": int, "targetPort": str}], "sessionAffinity": str,
    },
    ("autoscaling/v2", "HorizontalPodAutoscaler"): {
        "scaleTargetRef": {"apiVersion": str, "kind": str, "name": str}, "minReplicas": int, "maxReplicas": int,
        "metrics": [
            {"type": str, "pods": {"metric": {"name": str}, "target": {"type": str, "averageValue": str}}},
        ],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": int}},
    },
    ("policy/v1", "PodDisruptionBudget"): {"maxUnavailable": int, "selector": {"matchLabels": LABELS}},
}  # fmt: skip


def check(found: object, expected: Any, where: str) -> None:
    """That there are no other fields, each of its type."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and {*found} <= {*expected}, where
        for name, value in found.items():
            check(value, expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and found, where
        for i, value in enumerate(found):
            check(value, expected[0], f"{where}[{i}]")
    else:
        assert type(found) is expected, f"{where}: {found!r}"


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict]:
    found = list(yaml.safe_load_all((LAUNCH / "serve.yaml").read_text()))
    for one in found:
        assert {*one} == {"apiVersion", "kind", "metadata", "spec"} and one["metadata"] == {"name": "voco"}
        check(one["spec"], SPECS[one["apiVersion"], one["kind"]], one["kind"])
    return {one["kind"]: one["spec"] for one in found}


def test_what_belongs_together_in_the_manifest(manifest):
    pod = manifest["Deployment"]["template"]
    labels, spec = pod["metadata"]["labels"], pod["spec"]
    (container,) = spec["containers"]
    for selector in (manifest["Deployment"]["selector"], manifest["PodDisruptionBudget"]["selector"]):
        assert selector == {"matchLabels": labels}
    assert manifest["Service"]["selector"] == labels
    (port,) = container["ports"]
    (served,) = manifest["Service"]["ports"]
    assert served["targetPort"] == port["name"]
    assert manifest["HorizontalPodAutoscaler"]["scaleTargetRef"] == {
        "apiVersion": "apps/v1", "kind": "Deployment", "name": "voco",
    }  # fmt: skip
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_the_manifest_is_of_this_server(manifest, server, tmp_path):
    """Its options, the paths that are asked for, the metric, and the time that it takes to stop."""
    spec = manifest["Deployment"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"][:2] == ["voco", "serve"]
    here = [option.replace("gs://my-bucket", str(tmp_path)) for option in container["command"]]
    args = _parser().parse_args(here[2:])
    (port,) = container["ports"]
    assert args.port == port["containerPort"] and args.host == "0.0.0.0"
    assert str(args.api_keys).startswith(container["volumeMounts"][0]["mountPath"])
    annotations = manifest["Deployment"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(args.port)
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    for path in {annotations["prometheus.io/path"], *(probe["path"] for probe in probes)}:
        assert httpx.get(f"{server.url}{path}").is_success
    assert all(probe["port"] == port["name"] for probe in probes)
    (metric,) = manifest["HorizontalPodAutoscaler"]["metrics"]
    assert f"\n{metric['pods']['metric']['name']} 0.0\n" in httpx.get(f"{server.url}/metrics").text
    # Connections, then answers and uploads (and 10 s for the thread), then the store
    stops = container["lifecycle"]["preStop"]["sleep"]["seconds"] + 3 * args.grace + 10
    assert stops <= spec["terminationGracePeriodSeconds"]


def ray_serve(monkeypatch, **variables: str) -> tuple[types.ModuleType, dict]:
    """`launch/ray_serve.py`, and the options of its deployment. What stands for Ray has what the file uses of it."""
    options: dict[str, Any] = {}

    def deployment(cls, **given):
        options.update(given, cls=cls)
        return types.SimpleNamespace(bind=lambda: cls)

    ray = types.ModuleType("ray")
    ray.serve = types.SimpleNamespace(deployment=deployment, ingress=lambda make: lambda: make)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    for name in ("RUN", "STORE", "VOCO_API_KEYS", "GPUS", "REPLICAS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("launch.ray_serve", LAUNCH / "ray_serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, options


def test_an_application_of_ray_serve(monkeypatch, two_tokens_run, tmp_path):
    """The application of a replica, and what it is told; without a run it ends with a line."""
    keys = "a key of sixteen letters".replace(" ", "_")
    given = dict(RUN=str(two_tokens_run), STORE=str(tmp_path), VOCO_API_KEYS=keys)
    module, options = ray_serve(monkeypatch, **given, GPUS="0.5", REPLICAS="3")
    assert options["ray_actor_options"] == {"num_gpus": 0.5, "runtime_env": {"env_vars": given}}
    assert options["autoscaling_config"]["max_replicas"] == 3
    app = module.app()
    service = app.state.server.service
    assert service.store._disk is not None and service.scheduler.batch.most_rows == module.ROWS
    monkeypatch.setattr(service.scheduler, "warm_up", lambda: None)
    with TestClient(app) as client:
        until(lambda: client.get("/ready").is_success, "it is not ready")
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {keys}"}).is_success
    with pytest.raises(SystemExit, match="ray_serve.py: error: RUN and STORE: expected a run directory, and a d"):
        ray_serve(monkeypatch, RUN="a")
